"""A torch.compile backend that compresses the saved inputs of attention projections (PAMM)."""

from pamm_compile._version import __version__

__all__ = ["__version__"]
