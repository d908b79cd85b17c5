"""Image encoders: a picture becomes a sequence of tokens."""
