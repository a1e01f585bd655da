"""The two operators of PAMM: contracts (schema), plain PyTorch (reference), use (compression)."""

from pamm_compile.ops.schema import assign, contract, index_dtype

__all__ = ["assign", "contract", "index_dtype"]
