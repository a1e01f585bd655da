"""How a private symbol of torch is looked up, and what is said where it is missing."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from pamm_compile.errors import UnsupportedTorchError

OLDEST_TORCH = (2, 11)

RESOLVED: list[str] = []
"""Every private symbol in use, as "module:attribute", in the order it was looked up."""


def resolve(symbol: str) -> Any:
    """Import one private symbol.

    Args:
        symbol: "module:attribute".

    Returns:
        The object.

    Raises:
        UnsupportedTorchError: this torch does not have it.
    """
    module, attribute = symbol.split(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no {module}.{attribute}, which pamm_compile needs. "
            f"Supported: torch {'.'.join(map(str, OLDEST_TORCH))} and newer; install one of these, "
            "or a newer pamm_compile."
        ) from error
    if symbol not in RESOLVED:
        RESOLVED.append(symbol)
    return found


def check_torch_version(version: str) -> None:
    """Refuse a torch that is too old.

    Args:
        version: as in `torch.__version__`.

    Raises:
        UnsupportedTorchError: older than `OLDEST_TORCH`.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise UnsupportedTorchError(
            f"torch {version} is too old: pamm_compile needs torch "
            f"{'.'.join(map(str, OLDEST_TORCH))} or newer."
        )


check_torch_version(torch.__version__)
