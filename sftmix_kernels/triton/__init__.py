"""Triton kernels, one file per schedule: `row_chunks.py` and `vocab_tiles.py`.

`primitives.py` has the maths they share. Nothing here is imported before the first call on a CUDA
tensor (or on any tensor where ``TRITON_INTERPRET=1``).
"""
