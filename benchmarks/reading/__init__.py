"""Time the reading of data beside `datasets.load_dataset`: python -m benchmarks.reading."""
