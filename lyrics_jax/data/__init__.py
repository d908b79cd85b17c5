"""From records to batches: pictures, texts, augmentation and reading. This package imports NumPy and Grain, not JAX."""
