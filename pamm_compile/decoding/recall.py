"""Caches that keep every token and recall some: what clusters and pages have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pamm_compile.decoding.attention import AttendingLayer, whole

# Tokens of spare room, so that a new token does not copy all others.
_ROOM = 256


class TokenStore:
    """Keys and values in order of arrival, in buffers with room to grow.

    Args:
        host: hold them in the host's memory, wherever the model is.
    """

    def __init__(self, host: bool = False) -> None:
        self.host = host
        self.length = 0
        self.buffers: list[Tensor] = []

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add [batch, key heads, q, d] keys and as many values."""
        end = self.length + key.shape[2]
        if not self.buffers:
            self.buffers = [self._empty(t, end + _ROOM) for t in (key, value)]
        elif end > self.buffers[0].shape[2]:
            grown = [self._empty(t, end + max(_ROOM, end // 8)) for t in self.buffers]
            for new, old in zip(grown, self.buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self.buffers = grown
        for buffer, new in zip(self.buffers, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end

    def _empty(self, like: Tensor, length: int) -> Tensor:
        device = torch.device("cpu") if self.host else like.device
        shape = (*like.shape[:2], length, like.shape[3])
        pinned = self.host and torch.cuda.is_available()
        return torch.empty(shape, dtype=like.dtype, device=device, pin_memory=pinned)

    @property
    def keys(self) -> Tensor:
        """[batch, key heads, length, d], where they are held."""
        return self.buffers[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """[batch, key heads, length, d_v], where they are held."""
        return self.buffers[1][:, :, : self.length]

    def gather(self, index: Tensor) -> list[Tensor]:
        """Keys and values [batch, heads, n, d] at `index` [batch, heads, n], on its device.

        Heads are query heads; each group of them reads the key head it belongs to.
        """
        batch, heads, count = index.shape
        rows = self.rows(index).flatten().to(self.buffers[0].device)
        return [
            b.flatten(0, 2).index_select(0, rows).view(batch, heads, count, -1).to(index.device)
            for b in self.buffers
        ]

    def rows(self, index: Tensor) -> Tensor:
        """Turn token numbers [batch, heads, n] into rows of the flattened buffers."""
        batch, heads, _ = index.shape
        _, key_heads, room, _ = self.buffers[0].shape
        first = torch.arange(batch * key_heads, device=index.device).view(batch, key_heads) * room
        return index + first.repeat_interleave(heads // key_heads, 1)[..., None]

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.buffers = [choose(b) for b in self.buffers]

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buffers)


class RecallLayer(AttendingLayer):
    """Keeps every token; a single new query attends to those that `choose` picks for it.

    Several queries at once (the prompt, a further turn, drafts of an assistant) attend to all.

    Args:
        budget: tokens that a query attends to; while there are no more, it attends to all.
        host: hold keys and values in the host's memory.
    """

    is_croppable = True

    def __init__(self, budget: int, host: bool = False) -> None:
        super().__init__()
        self.budget = budget
        self.store = TokenStore(host)

    def append(self, key: Tensor, value: Tensor) -> None:
        self.store.append(key, value)

    def choose_and_attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        if query.shape[2] > 1 or self.seen <= self.budget:
            keys, values = (t.to(query.device) for t in (self.store.keys, self.store.values))
            return whole(module, query, keys, values, mask, scaling)
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

    def forget_last(self, count: int) -> None:
        self.store.length -= count

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.store.select_rows(choose)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def clear(self) -> None:
        self.store = TokenStore(self.store.host)
