"""The terms of a stage's loss, one file each, with the equation in the docstring."""
