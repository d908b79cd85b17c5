"""Runs the visual refiner once over images and text and writes training records."""
