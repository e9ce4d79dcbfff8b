"""Data: read files and hub names into examples."""
