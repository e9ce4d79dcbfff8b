"""Benchmarks: ours beside what a user would write and beside peers, in one process."""
