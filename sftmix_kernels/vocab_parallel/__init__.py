"""An LM head whose rows are shared out over the ranks of a group."""
