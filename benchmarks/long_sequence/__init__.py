"""How long sequences can be in a given memory, by way of training: see `docs/memory.md`."""
