"""Evaluation: answers for judges, and accuracy in the paper's medical tasks."""
