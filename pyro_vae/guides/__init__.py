"""Amortized guides for any model."""
