"""The networks of Lyrics in Flax NNX, one idea per file. Shapes: B batch, T tokens, D width, H heads, d width per head."""
