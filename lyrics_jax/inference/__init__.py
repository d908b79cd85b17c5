"""A run's model at work: its parameters on any mesh, and the words that it generates."""
