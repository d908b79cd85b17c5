"""Ahead-of-time plans: a train step compiled for a TPU slice that is not there, and what the compiler says about it."""
