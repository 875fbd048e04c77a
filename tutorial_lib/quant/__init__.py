"""Smaller numbers for the same model."""
