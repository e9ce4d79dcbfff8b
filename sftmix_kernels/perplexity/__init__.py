"""Per-example perplexity in one pass over the vocabulary, and the compiled ops under it."""
