"""Chat templates: examples written as the model reads them, and cut into tokens."""
