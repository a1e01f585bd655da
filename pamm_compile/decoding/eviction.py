"""Caches that drop tokens for good: what they have in common, and three rules to compare with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pamm_compile.decoding.attention import AttendingLayer, check_count, whole
from pamm_compile.decoding.store import ChoosingCache

# Queries whose attention weights over all keys are held at a time.
_BLOCK = 256


class EvictingLayer(AttendingLayer):
    """Keeps some of the tokens of each key head; new queries attend to what is kept.

    The prompt attends to all of itself, and tokens are evicted after it and after each later token.
    Keys keep the rotation of the position they had.

    Attributes:
        state: what is held:
            keys, values: [batch, key heads, n, d] each.
            position: [batch, key heads, n], int64; token numbers, -1 in slots that hold none.
            first: [batch], int64; number of the first token that is no padding.
    """

    needs_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}

    def append(self, key: Tensor, value: Tensor) -> None:
        batch, heads, new, _ = key.shape
        position = torch.arange(self.seen - new, self.seen, device=key.device)
        arrived = {"keys": key, "values": value, "position": position.expand(batch, heads, -1)}
        for name, part in arrived.items():
            held = self.state.get(name)
            self.state[name] = part if held is None else torch.cat([held, part], dim=2)

    def after_prompt(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        if mask is None:
            self.state["first"] = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        else:
            self.state["first"] = mask[:, 0, -1].int().argmax(1)
        self._observe_and_evict(query, mask, scaling)

    def choose_and_attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        allowed = self._allowed(query.shape[2], mask)
        keys, values = self.state["keys"], self.state["values"]
        spread = None
        if allowed is not None:
            spread = allowed.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        output = whole(module, query, keys, values, spread, scaling)
        self._observe_and_evict(query, mask, scaling)
        return output

    def _allowed(self, queries: int, mask: Tensor | None) -> Tensor | None:
        """Which kept tokens each query may see, [batch, key heads, q, n]; None: all of them."""
        position = self.state["position"][:, :, None]
        if queries == 1 and mask is None and bool((position >= 0).all()):
            return None
        number = torch.arange(self.seen - queries, self.seen, device=position.device)
        allowed = (position >= 0) & (position <= number[:, None])
        if mask is not None:
            index = position.clamp(min=0).expand(-1, -1, queries, -1)
            allowed &= mask.expand(-1, index.shape[1], -1, -1).gather(3, index)
        return allowed

    def _observe_and_evict(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        if self.needs_weights:
            self._observe(query, mask, scaling)
        real = self._allowed(1, None if mask is None else mask[:, :, -1:])
        if real is None:
            real = torch.ones_like(self.state["position"], dtype=torch.bool)[:, :, None]
        index = self.choose(real[:, :, 0])
        if index is not None:
            self._keep(index)

    def _observe(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Show the rule the attention weights of the new queries, a block at a time."""
        queries = query.shape[2]
        keys = self.state["keys"].float()
        allowed = self._allowed(queries, mask)
        grouped = query.unflatten(1, (keys.shape[1], -1)).float()
        for start in range(0, queries, _BLOCK):
            rows = slice(start, start + _BLOCK)
            score = torch.einsum("bhgqd,bhnd->bhgqn", grouped[:, :, :, rows], keys) * scaling
            if allowed is not None:
                score = score.masked_fill(~allowed[:, :, None, rows], -torch.inf)
            # A padding query sees nothing, and gives nothing any weight.
            self.observe(score.softmax(-1).nan_to_num(0).mean(2))

    def observe(self, weights: Tensor) -> None:
        """Take note of attention weights [batch, key heads, q, n], the mean of a group's heads.

        Called for consecutive queries; the last `n` only grows between evictions.
        """

    @abstractmethod
    def choose(self, real: Tensor) -> Tensor | None:
        """Which slots to keep.

        Args:
            real: [batch, key heads, n], bool; False in padding and in slots without a token.

        Returns:
            [batch, key heads, m], int64, ascending, -1 for none; None to keep everything.
        """

    def _keep(self, index: Tensor) -> None:
        for name in ("keys", "values"):
            self.state[name] = take(self.state[name], index)
        position = self.state["position"].gather(2, index.clamp(min=0))
        self.state["position"] = position.masked_fill(index < 0, -1)
        self.keep(index)

    def keep(self, index: Tensor) -> None:
        """Follow `_keep` with what the rule itself remembers of every slot."""

    def best(self, budget: int, rank: Tensor, real: Tensor) -> Tensor | None:
        """The `budget` slots of highest rank [batch, key heads, n], whatever is not real last."""
        if rank.shape[2] <= budget:
            return None
        rank = rank.masked_fill(~real, -torch.inf)
        return rank.topk(budget, dim=2).indices.sort(dim=2).values

    def recent(self, count: int) -> Tensor:
        """Slots of the last `count` tokens, [batch, key heads, n], bool."""
        return self.state["position"] >= self.seen - count

    def forget_last(self, count: int) -> None:
        left = self.seen - count
        if self.state["position"].shape[2] < self.seen or self.needs_weights or not left:
            super().forget_last(count)
        for name in ("keys", "values", "position"):
            self.state[name] = self.state[name][:, :, :left]

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: choose(t) for name, t in self.state.items()}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.state.values())

    def clear(self) -> None:
        self.state = {}


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather slots [batch, key heads, m] of [batch, key heads, n, d]; -1 takes any."""
    return x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))


class WindowCache(ChoosingCache):
    """Keep the first tokens and the last ones.

    Equivalent to `[*tokens[:sinks], *tokens[sinks:][-(budget - sinks):]]` of every sequence.

    Args:
        budget: tokens kept, more than `sinks`.
        sinks: first tokens that are never dropped.

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: StreamingLLM, arXiv 2309.17453, except that keys keep their positions.
    """

    def __init__(self, budget: int, *, sinks: int = 4) -> None:
        check_count("sinks", sinks, 0)
        check_count("budget", budget, sinks + 1)
        super().__init__(partial(_WindowLayer, budget, sinks), 0)


class _WindowLayer(EvictingLayer):
    def __init__(self, budget: int, sinks: int) -> None:
        super().__init__()
        self.budget = budget
        self.sinks = sinks

    def choose(self, real: Tensor) -> Tensor | None:
        position = self.state["position"]
        sink = position < self.state["first"][:, None, None] + self.sinks
        return self.best(self.budget, position.float().masked_fill(sink, torch.inf), real)


class HeavyHitterCache(ChoosingCache):
    """Keep the last tokens and those that received most attention so far.

    Equivalent to dropping, at every token beyond `budget` and in each key head, the one of lowest
    `weights.sum(queries)` that is not among the last `recent`.

    Args:
        budget: tokens kept, at least 2.
        recent: last tokens that are never dropped; half the budget by default.

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: H2O, arXiv 2306.14048.
    """

    def __init__(self, budget: int, *, recent: int | None = None) -> None:
        check_count("budget", budget, 2)
        recent = budget // 2 if recent is None else recent
        check_count("recent", recent, 0)
        check_count("budget", budget, recent)
        super().__init__(partial(_HeavyHitterLayer, budget, recent), 0)


class _HeavyHitterLayer(EvictingLayer):
    needs_weights = True

    def __init__(self, budget: int, recent: int) -> None:
        super().__init__()
        self.budget = budget
        self.last = recent

    def observe(self, weights: Tensor) -> None:
        received = weights.sum(2)
        if "received" in self.state:
            before = self.state["received"]
            received[:, :, : before.shape[2]] += before
        self.state["received"] = received

    def choose(self, real: Tensor) -> Tensor | None:
        rank = self.state["received"].masked_fill(self.recent(self.last), torch.inf)
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

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: arXiv 2406.11430, which leaves the first two layers whole.
    """

    def __init__(self, budget: int, *, recent: int = 1, whole_layers: int = 2) -> None:
        check_count("budget", budget, 2)
        check_count("recent", recent, 1)
        check_count("budget", budget, recent)
        check_count("whole_layers", whole_layers, 0)
        super().__init__(partial(_NormLayer, budget, recent), whole_layers)


class _NormLayer(EvictingLayer):
    def __init__(self, budget: int, recent: int) -> None:
        super().__init__()
        self.budget = budget
        self.last = recent

    def choose(self, real: Tensor) -> Tensor | None:
        norm = torch.linalg.vector_norm(self.state["keys"].float(), dim=3)
        return self.best(self.budget, (-norm).masked_fill(self.recent(self.last), torch.inf), real)
