"""The ``row_chunks`` schedule: logits of a chunk of rows, turned into gradients in place."""
