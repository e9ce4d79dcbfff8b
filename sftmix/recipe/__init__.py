"""A recipe: the command line's options, config files, what is loaded and what is recorded."""
