"""The two operators of PAMM: their contracts (schema) and the algorithm in plain PyTorch (reference)."""

from pamm_compile.ops.schema import assign, contract, index_dtype

__all__ = ["assign", "contract", "index_dtype"]
