"""The ``vocab_tiles`` schedule: logits never leave registers, and backward computes them again."""
