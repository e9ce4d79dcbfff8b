"""Write examples as the model reads them, with chat templates, and cut them into tokens."""
