"""A recipe: read the command line and config files, load what they name, and record it."""
