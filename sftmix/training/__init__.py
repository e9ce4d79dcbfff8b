"""Training: options, objective, trainer, scoring, and what is saved."""
