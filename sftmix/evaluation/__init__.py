"""Evaluation: answer questions for judges, and measure accuracy in the paper's medical tasks."""
