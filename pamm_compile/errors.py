"""One class per cause; every message says what was given, what is allowed and what to do."""

from __future__ import annotations


class PammError(Exception):
    """Base of every exception that pamm_compile raises on purpose."""


class InvalidOptionError(PammError, ValueError):
    """An option has a value that is not allowed, or a name that does not exist."""


class NothingMatchedError(PammError, RuntimeError):
    """`strict=True`, and a training graph has no compressed site."""


class UnknownReportError(PammError, RuntimeError):
    """`strict=True`, and a cache returned a graph without its report."""


class UnsupportedTorchError(PammError, ImportError):
    """The installed torch lacks an internal that pamm_compile relies on, or is too old."""


class MeasurementError(PammError, RuntimeError):
    """Nothing was found to measure, or it cannot be measured in this way."""


class MethodError(PammError, RuntimeError):
    """A method failed, wrote to its arguments, or returned something that is not allowed."""


class UnsupportedTrainerError(PammError, RuntimeError):
    """A trainer is set up in a way that does not work with compiled code."""


class UnsupportedModelError(PammError, TypeError):
    """A model has a part that a method for generation cannot treat without changing its meaning."""


class CacheStateError(PammError, RuntimeError):
    """A cache of keys and values was used in a way that would give a wrong result."""


class MissingPackageError(PammError, ImportError):
    """An optional package that this function needs is not installed."""
