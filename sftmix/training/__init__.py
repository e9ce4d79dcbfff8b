"""Training: options, loss, trainer, scoring, and what is saved."""
