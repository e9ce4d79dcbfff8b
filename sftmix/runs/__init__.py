"""A run: its folder, ranks, checkpoints and provenance, and how it ends."""
