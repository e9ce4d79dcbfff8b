"""The commands: one module each, with a `main` that takes the words after the command's name."""
