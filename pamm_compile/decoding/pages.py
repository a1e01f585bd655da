"""Pages of neighbouring tokens, recalled by a bound on their scores: what clusters compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pamm_compile.decoding.attention import check_count
from pamm_compile.decoding.recall import RecallLayer
from pamm_compile.decoding.store import ChoosingCache


class PageCache(ChoosingCache):
    """Attend to the pages of tokens whose best possible score for a query is largest.

    Equivalent to attention over the last page and the `budget // page - 1` others with the largest
    `maximum(query * page.amin(0), query * page.amax(0)).sum()`, each head for itself.

    Args:
        budget: tokens that a query attends to, at least two pages, rounded down to whole pages.
        page: tokens of a page.
        whole_layers: layers, from the first, that attend to everything.

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: Quest, arXiv 2406.10774.
    """

    def __init__(self, budget: int, *, page: int = 16, whole_layers: int = 2) -> None:
        check_count("page", page, 1)
        check_count("budget", budget, 2 * page)
        check_count("whole_layers", whole_layers, 0)
        super().__init__(partial(PageLayer, budget, page), whole_layers)


class PageLayer(RecallLayer):
    """One layer of a `PageCache`, whose arguments it takes.

    Attributes:
        bounds: smallest and largest keys of the full pages, [batch, key heads, pages, d] each.
    """

    def __init__(self, budget: int, page: int) -> None:
        super().__init__(budget)
        self.page = page
        self.bounds: list[Tensor] = []

    def choose(self, query: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The last page is attended to whether full or not.
        pages = (self.seen - 1) // self.page
        self._bound(pages)
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

    def _bound(self, pages: int) -> None:
        known = self.bounds[0].shape[2] if self.bounds else 0
        if known > pages:
            self.bounds = [b[:, :, :pages] for b in self.bounds]
        elif known < pages:
            new = self.store.keys[:, :, known * self.page : pages * self.page]
            paged = new.unflatten(2, (pages - known, self.page))
            bounds = [paged.amin(3), paged.amax(3)]
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
