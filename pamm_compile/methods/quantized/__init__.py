"""Quantized: an input itself, in 8 or 4 bits."""
