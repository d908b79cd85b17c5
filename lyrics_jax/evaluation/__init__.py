"""Asking a trained model, and scoring and showing what it answers."""
