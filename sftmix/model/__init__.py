"""The model: its LM head, how the loss runs inside its forward pass, and its files."""
