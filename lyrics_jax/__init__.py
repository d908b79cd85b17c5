"""Trains Lyrics vision-language models: MQ-Former alignment and instruction tuning, in Flax NNX, sharded over TPU pods."""
