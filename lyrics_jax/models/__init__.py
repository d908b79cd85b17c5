"""Modules that compute: layers, image encoders, language models, connectors, and the two models made of them."""
