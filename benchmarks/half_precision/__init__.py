"""Train all weights in less than float32: how many of them move."""
