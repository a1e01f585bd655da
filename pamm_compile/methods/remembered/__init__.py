"""Directions that are remembered from the weight gradients of an earlier step."""
