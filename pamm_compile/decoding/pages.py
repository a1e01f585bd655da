"""Pages of neighbouring tokens, recalled by a bound on their scores: what clusters compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pamm_compile.decoding.attention import check_count
from pamm_compile.decoding.store import ChoosingCache, RecallLayer


class PageCache(ChoosingCache):
    """Attend to the pages of tokens whose best possible score for a query is largest.

    Equivalent to attention over the last page and the `budget // page - 1` others with the largest
    `maximum(query * page.amin(0), query * page.amax(0)).sum()`, each head for itself.

    Args:
        budget: tokens that a query attends to, at least two pages, rounded down to whole pages.
        page: tokens of a page.
        whole_layers: layers, from the first, that attend to everything.

    Source: Quest, arXiv 2406.10774.
    """

    def __init__(self, budget: int, *, page: int = 16, whole_layers: int = 2) -> None:
        check_count(1, page=page)
        check_count(2 * page, budget=budget)
        check_count(0, whole_layers=whole_layers)
        super().__init__(partial(PageLayer, budget=budget, page=page), whole_layers)


class PageLayer(RecallLayer):
    """One layer of a `PageCache`, whose arguments it takes.

    `bounds` has the smallest and largest keys of full pages, [batch, key heads, pages, d] each.
    """

    page: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bounds: list[Tensor] = []

    def choose(self, query: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The last page is attended to whether full or not.
        pages = (self.seen - 1) // self.page
        self._bound(pages, allowed)
        low, high = self.bounds
        grouped = query.unflatten(1, (low.shape[1], -1)).float()
        score = torch.matmul(grouped.clamp(min=0), high.float().transpose(2, 3))
        score += torch.matmul(grouped.clamp(max=0), low.float().transpose(2, 3))
        if allowed is not None:
            empty = ~allowed[:, : pages * self.page].unflatten(1, (pages, self.page)).any(2)
            score = score.masked_fill(empty[:, None, None], -torch.inf)
        best = score.topk(min(pages, self.budget // self.page - 1), dim=-1).indices.flatten(1, 2)
        within = torch.arange(self.page, device=query.device)
        index = (best[..., None] * self.page + within).flatten(2)
        last = torch.arange(pages * self.page, self.seen, device=query.device)
        return torch.cat([index, last.expand(*index.shape[:2], -1)], dim=2), None

    def _bound(self, pages: int, allowed: Tensor | None = None) -> None:
        known = self.bounds[0].shape[2] if self.bounds else 0
        if known > pages:
            self.bounds = [b[:, :, :pages] for b in self.bounds]
        elif known < pages:
            part = slice(known * self.page, pages * self.page)
            low = high = self.store.keys[:, :, part]
            if allowed is not None:
                padding = ~allowed[:, None, part, None]
                low = low.masked_fill(padding, torch.finfo(low.dtype).max)
                high = high.masked_fill(padding, torch.finfo(high.dtype).min)
            shape = (pages - known, self.page)
            bounds = [low.unflatten(2, shape).amin(3), high.unflatten(2, shape).amax(3)]
            if self.bounds:
                bounds = [torch.cat(b, dim=2) for b in zip(self.bounds, bounds, strict=True)]
            self.bounds = bounds

    def forget_last(self, count: int) -> None:
        super().forget_last(count)
        if self.bounds:
            # A page that lost a token is bounded anew when it is full again.
            self._bound(min(self.bounds[0].shape[2], (self.seen - count) // self.page))

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().select_rows(choose)
        self.bounds = [choose(b) for b in self.bounds]

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(b.nbytes for b in self.bounds)

    def clear(self) -> None:
        super().clear()
        self.bounds = []
