"""Caches that drop tokens for good: what they have in common, and rules without training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pamm_compile.decoding.attention import AttendingLayer, Call, check_count
from pamm_compile.decoding.store import ChoosingCache

# Queries whose attention weights over all keys are held at a time.
_BLOCK = 256


class EvictingLayer(AttendingLayer):
    """Keeps some of the tokens of each key head; new queries attend to what is kept.

    A prompt attends to all of itself, in however many pieces it comes. Tokens are evicted when the
    first new token arrives, and at every `interval` tokens after. Keys keep the rotation of the
    position they had.

    Attributes:
        state: what is held:
            keys, values: [batch, key heads, n, d] each.
            position: [batch, key heads, n], int32; token numbers, padding counted.
            order: [batch, key heads, n], int32; token numbers without padding, -1 for padding and
                in slots that hold no token.
            count: [batch], int32; tokens so far, without padding.
    """

    needs_weights = False
    budget: Any
    last: int
    interval = 1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state: dict[str, Tensor] = {}
        self.pending = self.dropped = False
        self.decided = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        batch, heads, new, _ = key.shape
        if self.pending and not self._is_prompt(self.seen + new, new):
            self._evict()
        number = torch.arange(self.seen, self.seen + new, device=key.device, dtype=torch.int32)
        arrived = {"keys": key, "values": value, "position": number.expand(batch, heads, -1)}
        for name, part in arrived.items():
            held = self.state.get(name)
            self.state[name] = part if held is None else torch.cat([held, part], dim=2)

    def _is_prompt(self, seen: int, new: int) -> bool:
        return new > 1 or seen <= self.prompt_length

    def choose_and_attend(self, call: Call) -> Tensor:
        new = call.query.shape[2]
        self._number(call)
        mask = call.mask
        if self.dropped:
            allowed = self._allowed(call)
            groups = call.query.shape[1] // self.state["keys"].shape[1]
            mask = None if allowed is None else allowed.repeat_interleave(groups, 1)
        output = call.over(self.state["keys"], self.state["values"], mask)
        if self.needs_weights:
            self._observe(call)
        self.pending = self._is_prompt(self.seen, new)
        if not self.pending:
            self._evict()
        return output

    def _number(self, call: Call) -> None:
        """Count the new tokens, and leave out what is padding."""
        batch, _, new, _ = call.query.shape
        if call.mask is None:
            real = torch.ones(batch, new, dtype=torch.bool, device=call.query.device)
        else:
            # The last query sees every token that is no padding, be it padding itself.
            real = call.mask[:, 0, -1, -new:].expand(batch, -1)
        count = self.state.get("count", torch.zeros_like(real[:, 0], dtype=torch.int32))
        order = (count[:, None] + real.cumsum(1, dtype=torch.int32) - 1).masked_fill(~real, -1)
        order = order[:, None].expand(-1, self.state["keys"].shape[1], -1)
        held = self.state.get("order")
        self.state["order"] = order if held is None else torch.cat([held, order], dim=2)
        self.state["count"] = count + real.sum(1, dtype=torch.int32)

    def _allowed(self, call: Call) -> Tensor | None:
        """Which kept tokens each query may see, [batch, key heads, q, n]; None: all of them."""
        real = self.state["order"][:, :, None] >= 0
        new, mask = call.query.shape[2], call.mask
        if new == 1 and mask is None and bool(real.all()):
            return None
        position = self.state["position"][:, :, None].long()
        number = torch.arange(self.seen - new, self.seen, device=position.device)
        allowed = real & (position <= number[:, None])
        if mask is not None:
            index = position.expand(-1, -1, new, -1)
            allowed &= mask.expand(len(index), index.shape[1], -1, -1).gather(3, index)
        return allowed

    def _observe(self, call: Call) -> None:
        """Show the rule the attention weights of the new queries, a block at a time."""
        keys = self.state["keys"].float()
        heads, slots = keys.shape[1:3]
        query, allowed = call.query.float(), self._allowed(call)
        real = self.state["order"][:, 0, slots - query.shape[2] :] >= 0
        # Padding comes first, wherever it was, so that what follows it follows tokens.
        places = real.int().argsort(dim=1, stable=True)[:, None, :, None]
        if not bool(real.all()):
            query = query.gather(2, places.expand_as(query))
        grouped = query.unflatten(1, (heads, -1))
        for start in range(0, query.shape[2], _BLOCK):
            rows = slice(start, start + _BLOCK)
            score = torch.einsum("bhgqd,bhnd->bhgqn", grouped[:, :, :, rows], keys) * call.scaling
            if allowed is not None:
                index = places[:, :, rows].expand(-1, heads, -1, slots)
                score = score.masked_fill(~allowed.gather(2, index)[:, :, None], -torch.inf)
            if call.sinks is not None:
                sinks = call.sinks.float().view(1, heads, -1, 1, 1)
                score = torch.cat([score, sinks.expand(*score.shape[:-1], 1)], dim=-1)
            weights = score.softmax(-1)[..., :slots].mean(2)
            # A padding query gives nothing any weight.
            counts = real.gather(1, places[:, 0, rows, 0])[:, None, :, None]
            self.observe(weights.masked_fill(~counts, 0))

    def observe(self, weights: Tensor) -> None:
        """Take note of weights [batch, key heads, q, n], the mean of a group's heads."""

    def _evict(self) -> None:
        self.pending = False
        if self.decided and self.seen - self.decided < self.interval:
            return
        index = self.choose(self.state["order"] >= 0)
        self.decided = self.seen
        if index is None:
            return
        self.dropped = True
        for name in ("keys", "values"):
            self.state[name] = take(self.state[name], index)
        for name in ("position", "order"):
            self.state[name] = self.state[name].gather(2, index.clamp(min=0))
        self.state["order"] = self.state["order"].masked_fill(index < 0, -1)
        self.keep(index)

    @abstractmethod
    def choose(self, real: Tensor) -> Tensor | None:
        """Slots to keep, [batch, key heads, m], int64, ascending, -1 for none; None: all of them.

        `real` [batch, key heads, n] is False in padding and in slots without a token.
        """

    def keep(self, index: Tensor) -> None:
        """Follow an eviction with what the rule itself remembers of every slot."""

    def best(self, budget: int, rank: Tensor, real: Tensor) -> Tensor | None:
        """The `budget` slots of highest rank [batch, key heads, n], whatever is not real last."""
        if rank.shape[2] <= budget:
            return None
        rank = rank.masked_fill(~real, -torch.inf)
        return rank.topk(budget, dim=2).indices.sort(dim=2).values

    @property
    def age(self) -> Tensor:
        """Tokens since, [batch, key heads, n], int32; padding does not count."""
        return self.state["count"][:, None, None] - 1 - self.state["order"]

    def forget_last(self, count: int) -> None:
        left = self.seen - count
        if self.dropped or self.needs_weights or not left:
            super().forget_last(count)
        self.state["count"] -= (self.state["order"][:, 0, left:] >= 0).sum(1, dtype=torch.int32)
        for name in ("keys", "values", "position", "order"):
            self.state[name] = self.state[name][:, :, :left]

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: choose(t) for name, t in self.state.items()}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.state.values())

    def clear(self) -> None:
        self.state = {}
        self.pending = self.dropped = False
        self.decided = 0


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather slots [batch, key heads, m] of [batch, key heads, n, d]; -1 takes any."""
    return x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))


class WindowCache(ChoosingCache):
    """Keep the first tokens and the last ones.

    Equivalent to `[*tokens[:sinks], *tokens[sinks:][-(budget - sinks):]]` of every sequence.

    Args:
        budget: tokens kept, more than `sinks`.
        sinks: first tokens that are never dropped.

    Source: StreamingLLM, arXiv 2309.17453, except that keys keep their positions.
    """

    def __init__(self, budget: int, *, sinks: int = 4) -> None:
        check_count(0, sinks=sinks)
        check_count(sinks + 1, budget=budget)
        super().__init__(partial(_WindowLayer, budget=budget, sinks=sinks), 0)


class _WindowLayer(EvictingLayer):
    sinks: int

    def choose(self, real: Tensor) -> Tensor | None:
        order = self.state["order"]
        return self.best(
            self.budget, order.float().masked_fill(order < self.sinks, torch.inf), real
        )


class HeavyHitterCache(ChoosingCache):
    """Keep the last tokens and those that received most attention so far.

    Equivalent to dropping, at every token beyond `budget` and in each key head, the one of lowest
    `weights.sum(queries)` that is not among the last `recent`.

    Args:
        budget: tokens kept, at least 2.
        recent: last tokens that are never dropped; half the budget by default.

    Source: H2O, arXiv 2306.14048.
    """

    def __init__(self, budget: int, *, recent: int | None = None) -> None:
        check_count(2, budget=budget)
        recent = budget // 2 if recent is None else recent
        check_count(0, recent=recent)
        check_count(recent, budget=budget)
        super().__init__(partial(_HeavyHitterLayer, budget=budget, last=recent), 0)


class _HeavyHitterLayer(EvictingLayer):
    needs_weights = True

    def observe(self, weights: Tensor) -> None:
        received = weights.sum(2)
        if "received" in self.state:
            before = self.state["received"]
            received[:, :, : before.shape[2]] += before
        self.state["received"] = received

    def choose(self, real: Tensor) -> Tensor | None:
        rank = self.state["received"].masked_fill(self.age < self.last, torch.inf)
        return self.best(self.budget, rank, real)

    def keep(self, index: Tensor) -> None:
        self.state["received"] = self.state["received"].gather(2, index)


class NormCache(ChoosingCache):
    """Keep the tokens whose keys have the smallest norms.

    Equivalent to `tokens[keys.norm(dim=-1).argsort()[:budget]]` in each key head.

    Args:
        budget: tokens kept, at least 2.
        recent: last tokens that are never dropped.
        whole_layers: layers, from the first, that drop nothing.

    Source: arXiv 2406.11430, which leaves the first two layers whole.
    """

    def __init__(self, budget: int, *, recent: int = 1, whole_layers: int = 2) -> None:
        check_count(1, recent=recent)
        check_count(max(2, recent), budget=budget)
        check_count(0, whole_layers=whole_layers)
        super().__init__(partial(_NormLayer, budget=budget, last=recent), whole_layers)


class _NormLayer(EvictingLayer):
    def choose(self, real: Tensor) -> Tensor | None:
        rank = -torch.linalg.vector_norm(self.state["keys"].float(), dim=3)
        return self.best(self.budget, rank.masked_fill(self.age < self.last, torch.inf), real)


class KeyDiffCache(ChoosingCache):
    """Keep the tokens whose keys are least like the average key.

    Equivalent to `tokens[cosine_similarity(keys, mean).argsort()[:budget]]` in each key head, where
    `mean` is that of `normalize(keys)` over all tokens so far, dropped ones too; after the prompt
    and then at every `interval` new tokens, which are kept meanwhile.

    Args:
        budget: tokens kept, at least 2.
        interval: new tokens between two decisions.
        recent: last tokens that are never dropped.
        whole_layers: layers, from the first, that drop nothing.

    Source: KeyDiff, arXiv 2504.15364.
    """

    def __init__(
        self, budget: int, *, interval: int = 512, recent: int = 1, whole_layers: int = 0
    ) -> None:
        check_count(1, recent=recent, interval=interval)
        check_count(max(2, recent), budget=budget)
        check_count(0, whole_layers=whole_layers)
        layer = partial(_KeyDiffLayer, budget=budget, interval=interval, last=recent)
        super().__init__(layer, whole_layers)


class _KeyDiffLayer(_NormLayer):
    """Beside what every evicting layer holds: sum, [batch, key heads, 1, d], of unit keys."""

    def choose(self, real: Tensor) -> Tensor | None:
        keys = self.state["keys"].float()
        new = real & (self.state["position"] >= self.decided)
        total = (normalize(keys, dim=3) * new[..., None]).sum(2, keepdim=True)
        self.state["sum"] = total + self.state.get("sum", torch.zeros_like(total))
        rank = -cosine_similarity(keys, self.state["sum"], dim=3)
        return self.best(self.budget, rank.masked_fill(self.age < self.last, torch.inf), real)
