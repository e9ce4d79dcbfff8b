"""Chat templates: write examples as the model reads them, and cut them into tokens."""
