"""Helpers for trainers that make or compile the model themselves; each needs its own library."""
