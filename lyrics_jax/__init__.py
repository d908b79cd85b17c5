"""Lyrics (arXiv 2312.05278) and its relatives in JAX: alignment and instruction tuning over exported records."""
