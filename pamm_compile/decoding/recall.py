"""Caches that keep every token and recall some: what clusters and pages have in common."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pamm_compile.decoding.store import WholeLayer


class RecallLayer(WholeLayer):
    """Keeps every token; a single new query attends to those that `choose` picks for it.

    Several queries at once (the prompt, a further turn, drafts of an assistant) attend to all.

    Args:
        budget: tokens that a query attends to; while there are no more, it attends to all.
        host: hold keys and values in the host's memory.
    """

    def __init__(self, budget: int, host: bool = False) -> None:
        super().__init__(host)
        self.budget = budget

    def choose_and_attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        if query.shape[2] > 1 or self.seen <= self.budget:
            return super().choose_and_attend(module, query, mask, scaling)
        allowed = None if mask is None else mask[:, 0, -1, : self.seen]
        index, usable = self.choose(query[:, :, 0], allowed)
        keys, values = self.fetch(index)
        if allowed is not None:
            # Padding may share a page with tokens.
            seen = allowed[:, None].expand(-1, index.shape[1], -1).gather(2, index)
            usable = seen if usable is None else usable & seen
        output = scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=None if usable is None else usable[:, :, None],
            scale=scaling,
        )
        return output.transpose(1, 2).contiguous()

    @abstractmethod
    def choose(self, query: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pick the tokens of one query a row.

        Args:
            query: [batch, heads, d].
            allowed: [batch, seen], bool, False for padding; None where there is none.

        Returns:
            index: [batch, heads, n], int64, token numbers.
            usable: [batch, heads, n], bool, False where a row has fewer tokens; None: all are.
        """

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, n, d] of the tokens chosen."""
        keys, values = self.store.gather(index)
        return keys, values
