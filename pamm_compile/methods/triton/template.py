"""Templates for Inductor: their text, and the constants that it is rendered with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch

TRITON_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""What the templates take; anything else runs the eager kernel of the operator."""


def float32_precision() -> str:
    """Return how Triton is to multiply fp32 operands: "tf32" only where torch's own matmul may.

    Equivalent to: `torch.backends.cuda.matmul.fp32_precision`, with "ieee" for anything but "tf32".
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def source(package: str, name: str, helpers: Sequence[str]) -> str:
    """Return the text of a template, the functions of `tiles.py` that it calls pasted behind it.

    Reads the files, and so imports no Triton.

    Args:
        package: that has `tiles.py` and the folder `templates`.
        name: of the template.
        helpers: names of the functions.

    Returns:
        What Inductor renders.
    """
    here = resources.files(package)
    template = here.joinpath("templates", f"{name}.py.jinja").read_text("utf-8")
    functions = re.split(r"\n(?=@triton\.jit\n)", here.joinpath("tiles.py").read_text("utf-8"))[1:]
    heads = tuple(f"@triton.jit\ndef {helper}(" for helper in helpers)
    return template + "\n\n" + "\n".join(f for f in functions if f.startswith(heads))


def constants(**values: Any) -> dict[str, Any]:
    """Return template arguments, which Inductor prints as Python: strings get their quotes."""
    return {name: repr(v) if isinstance(v, str) else v for name, v in values.items()}
