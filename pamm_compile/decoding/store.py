"""Layers that keep every token, to attend to all or some, and the cache that mixes layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pamm_compile.decoding.attention import AttendingLayer, Call

# Tokens of spare room, so that a new token does not copy all others.
_ROOM = 256


class TokenStore:
    """Keys and values in order of arrival, in buffers with room to grow, on the host if asked."""

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
        """Keys and values [batch, heads, n, d] at `index` [batch, heads, n], on its device."""
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


class WholeLayer(AttendingLayer):
    """Keeps every token, and lets every query attend to all of them.

    It does what Transformers' `DynamicLayer` does, which copies all keys and values for each token.
    """

    is_croppable = True

    def __init__(self, host: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.store = TokenStore(host)

    def append(self, key: Tensor, value: Tensor) -> None:
        self.store.append(key, value)

    def choose_and_attend(self, call: Call) -> Tensor:
        keys, values = (t.to(call.query.device) for t in (self.store.keys, self.store.values))
        return call.over(keys, values, call.mask)

    def forget_last(self, count: int) -> None:
        self.store.length -= count

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.store.select_rows(choose)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def clear(self) -> None:
        self.store = TokenStore(self.store.host)


class RecallLayer(WholeLayer):
    """Keeps every token; a single new query attends to those that `choose` picks for it.

    Several queries at once (the prompt, a further turn, drafts of an assistant) attend to all.
    While there are no more than `budget` tokens, it attends to all of them.
    """

    budget: int

    def choose_and_attend(self, call: Call) -> Tensor:
        query, mask = call.query, call.mask
        if query.shape[2] > 1 or self.seen <= max(self.budget, self.prompt_length):
            return super().choose_and_attend(call)
        allowed = None if mask is None else mask[:, 0, -1, : self.seen]
        index, usable = self.choose(query[:, :, 0], allowed)
        keys, values = self.fetch(index)
        if allowed is not None:
            # Padding may share a page with tokens.
            seen = allowed[:, None].expand(-1, index.shape[1], -1).gather(2, index)
            usable = seen if usable is None else usable & seen
        return call.over(keys, values, None if usable is None else usable[:, :, None])

    @abstractmethod
    def choose(self, query: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pick the tokens of one query [batch, heads, d] a row.

        `allowed` [batch, seen] is False for padding. Gives token numbers [batch, heads, n], int64,
        and where a row has fewer of them, False in as many bools; None: all are.
        """

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, n, d] of the tokens chosen."""
        keys, values = self.store.gather(index)
        return keys, values


class ChoosingCache(Cache):
    """A cache whose first layers keep and attend to everything, and whose others `make` makes.

    Layers of the model that see a sliding window keep that window, and choose nothing. The first
    `prompt_length` tokens belong to a prompt, as far as is known.
    """

    def __init__(self, make: Callable[[], AttendingLayer], whole_layers: int) -> None:
        super().__init__(layer_class_to_replicate=WholeLayer)
        self._make = make
        self._whole_layers = whole_layers
        self.prompt_length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while (index := len(self.layers)) <= layer_idx:
            made = WholeLayer() if index < self._whole_layers else self._make()
            made.home = (self.layers, index)
            self.layers.append(made)
        layer: Any = self.layers[layer_idx]
        layer.prompt_length = self.prompt_length
        updated: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return updated

    def reset(self) -> None:
        self.prompt_length = 0
        super().reset()  # type: ignore[no-untyped-call]
