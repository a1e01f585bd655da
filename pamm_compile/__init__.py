"""A torch.compile backend that compresses the saved inputs of attention projections (PAMM)."""

from pamm_compile._version import __version__
from pamm_compile.backend import Backend, backend
from pamm_compile.errors import (
    InvalidOptionError,
    NothingMatchedError,
    PammError,
    UnsupportedTorchError,
)
from pamm_compile.graph.match import Reason, register_attention
from pamm_compile.report import GraphReport, Note, Report, SiteReport

__all__ = [
    "Backend",
    "GraphReport",
    "InvalidOptionError",
    "Note",
    "NothingMatchedError",
    "PammError",
    "Reason",
    "Report",
    "SiteReport",
    "UnsupportedTorchError",
    "__version__",
    "backend",
    "register_attention",
]
