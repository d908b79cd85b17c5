"""From records to batches: text, pictures, augmentation and reading. NumPy and Grain only, no JAX."""
