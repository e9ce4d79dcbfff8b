"""Everything about a run: its folder, ranks, checkpoints and provenance, and how it ends."""
