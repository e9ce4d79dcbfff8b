"""Read files and hub names into examples."""
