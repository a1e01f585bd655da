"""The two operators of PAMM: signatures (operators), plain PyTorch (eager), use (compression)."""

from pamm_compile.methods.pamm.operators import assign, contract, index_dtype

__all__ = ["assign", "contract", "index_dtype"]
