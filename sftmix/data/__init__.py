"""Data: files and hub names read into examples, row by row."""
