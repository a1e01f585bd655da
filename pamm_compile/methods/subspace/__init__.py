"""Subspace: principal directions of an input (directions), and it along them (method)."""
