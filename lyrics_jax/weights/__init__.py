"""Weights in the layouts of other frameworks: reading their files, and the tables of their names."""
