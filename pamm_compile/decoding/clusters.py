"""Recallable clusters: keys grouped by direction, recalled by the groups that suit a query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pamm_compile.decoding.attention import check_count
from pamm_compile.decoding.store import ChoosingCache, RecallLayer
from pamm_compile.errors import InvalidOptionError
from pamm_compile.methods.pamm import assign, contract, index_dtype


class ClusterCache(ChoosingCache):
    """Attend to the clusters of keys that suit each query best, up to a number of tokens.

    Equivalent to attention over the sinks, the tokens not clustered yet, and the first
    `budget - sinks` tokens of the clusters sorted by the inner product of the query with their
    means, each head for itself. Nothing is thrown away: another query recalls other clusters.

        decoding.attach(model)
        model.generate(ids, past_key_values=ClusterCache(budget=1024))

    Args:
        budget: tokens that a query recalls, sinks included, at least `sinks` + 1. With no more
            tokens than that, attention is over all of them.
        sinks: first tokens of a sequence that are always attended to.
        tokens_per_cluster: average size of a cluster.
        interval: new tokens that are gathered, all of them attended to beside the budget, before
            they are divided into clusters of their own.
        iterations: of k-means.
        sample: keys, evenly spaced, that k-means iterates on where a prompt has more; all keys are
            then assigned once, which takes an eightieth of the prompt's own attention.
        whole_layers: layers, from the first, that attend to everything.
        offload: hold keys and values in the host's memory, and on the device what the last step
            recalled.

    Attributes:
        hit_rate: share of the recalled tokens that were on the device already (`offload` only).

    Source: arXiv 2412.03213; its defaults (16 sinks, 80 tokens a cluster, 320 new tokens, two whole
    layers).
    """

    def __init__(
        self,
        budget: int,
        *,
        sinks: int = 16,
        tokens_per_cluster: int = 80,
        interval: int = 320,
        iterations: int = 8,
        sample: int = 8192,
        whole_layers: int = 2,
        offload: bool = False,
    ) -> None:
        check_count(0, sinks=sinks, iterations=iterations, whole_layers=whole_layers)
        check_count(sinks + 1, budget=budget)
        check_count(1, tokens_per_cluster=tokens_per_cluster, interval=interval, sample=sample)
        options = {"sinks": sinks, "iterations": iterations, "interval": interval, "sample": sample}
        options |= {"budget": budget, "tokens_per_cluster": tokens_per_cluster}
        super().__init__(partial(ClusterLayer, host=offload, **options), whole_layers)
        self._offload = offload

    @property
    def hit_rate(self) -> float:
        if not self._offload:
            raise InvalidOptionError("hits are counted with offload=True only")
        layers = [layer for layer in self.layers if isinstance(layer, ClusterLayer)]
        recalled = sum(layer.recalled for layer in layers)
        return sum(layer.hits for layer in layers) / recalled if recalled else float("nan")


class ClusterLayer(RecallLayer):
    """One layer of a `ClusterCache`, whose arguments it takes.

    Attributes:
        means: [batch, key heads, clusters, d], float32.
        sizes: [batch, key heads, clusters], int64.
        starts: [batch, key heads, clusters], int64; where in `members` a cluster begins.
        members: [batch, key heads, n], int64; token numbers, cluster by cluster.
        clustered: how many tokens, from the first, are sinks, padding or members.
    """

    sinks: int
    tokens_per_cluster: int
    interval: int
    iterations: int
    sample: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hits = self.recalled = 0
        self._forget_clusters()

    def _forget_clusters(self) -> None:
        self.clustered = 0
        self.state: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def choose(self, query: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pending = self.seen - self.clustered
        # The token of this very step is not clustered with the prompt it ends.
        if not self.state or pending > self.interval:
            self._cluster(self.seen - 1, allowed, query.device)
        index, usable = self._recall(query)
        heads = query.shape[1]
        batch, sinks = self.state["first"].shape
        recent = torch.arange(self.clustered, self.seen, device=query.device)
        parts = [
            self.state["first"][:, None].expand(-1, heads, -1),
            index,
            recent.expand(batch, heads, -1),
        ]
        usable_first = self.state["usable_first"]
        if usable is not None or not bool(usable_first.all()):
            usable = torch.ones_like(index, dtype=torch.bool) if usable is None else usable
            usable = pad(usable, (sinks, recent.numel()), value=True)
            usable[:, :, :sinks] = usable_first[:, None]
        self._cluster_slots = slice(sinks, sinks + index.shape[2])
        return torch.cat(parts, dim=2), usable

    def _recall(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens of the best clusters, [batch, heads, n], and which of them are there."""
        means, sizes, starts, members = (
            self.state[name] for name in ("means", "sizes", "starts", "members")
        )
        key_heads, clusters = means.shape[1:3]
        grouped = query.float().unflatten(1, (key_heads, -1))
        score = torch.matmul(grouped, means.transpose(2, 3))
        best = torch.where(sizes[:, :, None] > 0, score, -torch.inf).argsort(-1, descending=True)
        size = sizes[:, :, None].expand_as(best).gather(3, best)
        ends = size.cumsum(-1)
        total = sizes.sum(-1)
        count = min(self.budget - self.sinks, int(total.max()))
        slots = torch.arange(count, device=query.device).expand(*best.shape[:3], -1)
        # In which of the sorted clusters a slot falls, and where in it.
        rank = torch.searchsorted(ends, slots.contiguous(), right=True).clamp(max=clusters - 1)
        start = starts[:, :, None].expand_as(best).gather(3, best.gather(3, rank))
        place = start + slots - (ends - size).gather(3, rank)
        place = place.clamp(max=members.shape[-1] - 1)
        index = members[:, :, None].expand(-1, -1, best.shape[2], -1).gather(3, place)
        usable = None
        if int(total.min()) < count:
            usable = (slots < total[:, :, None, None]).flatten(1, 2)
        return index.flatten(1, 2), usable

    def _cluster(self, end: int, allowed: Tensor | None, device: torch.device) -> None:
        """Divide the tokens from `clustered` to `end` into clusters, beside those there are."""
        keys = self.store.keys[:, :, self.clustered : end].to(device)
        batch, key_heads, length, _ = keys.shape
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        if allowed is not None:
            valid &= allowed[:, self.clustered : end]
        if not self.state:
            order = valid.cumsum(1)
            is_sink = valid & (order <= self.sinks)
            row, token = is_sink.nonzero().unbind(1)
            slot = order[row, token] - 1
            # A row of fewer tokens than sinks has slots that stay unusable.
            self.state["first"] = token.new_zeros(batch, self.sinks)
            self.state["first"][row, slot] = token
            self.state["usable_first"] = torch.zeros_like(self.state["first"], dtype=torch.bool)
            self.state["usable_first"][row, slot] = True
            valid &= ~is_sink
        members = [row.nonzero()[:, 0] for row in valid]
        longest = max(1, *(int(tokens.numel()) for tokens in members))
        parts: dict[str, list[Tensor]] = {n: [] for n in ("means", "sizes", "starts", "members")}
        for head_keys, tokens in zip(keys, members, strict=True):
            for of_head in head_keys:
                for name, part in self._divide(of_head, tokens, longest).items():
                    parts[name].append(part)
        new = {n: torch.stack(p).unflatten(0, (batch, key_heads)) for n, p in parts.items()}
        if "members" in self.state:
            new["starts"] += self.state["members"].shape[2]
            new = {name: torch.cat([self.state[name], part], dim=2) for name, part in new.items()}
        self.state.update(new)
        self.clustered = end

    def _divide(self, keys: Tensor, tokens: Tensor, longest: int) -> dict[str, Tensor]:
        """Cluster the keys [n, d] numbered in `tokens`, filled up to what `longest` tokens need."""
        count = -(-int(tokens.numel()) // self.tokens_per_cluster)
        clusters = -(-longest // self.tokens_per_cluster)
        means = keys.new_zeros(clusters, keys.shape[1], dtype=torch.float32)
        sizes = tokens.new_zeros(clusters)
        members = tokens.new_zeros(longest)
        if count:
            index, means[:count], sizes[:count] = cosine_kmeans(
                keys[tokens], count, self.iterations, self.sample
            )
            members[: tokens.numel()] = tokens[index.argsort(stable=True)] + self.clustered
        return {
            "means": means,
            "sizes": sizes,
            "starts": sizes.cumsum(0) - sizes,
            "members": members,
        }

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        if not self.store.host:
            return super().fetch(index)
        keys, values = self._fetch_from_host(index)
        self._last = (index, keys, values)
        return keys, values

    def _fetch_from_host(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Take from the device what the last step recalled, the rest from the host."""
        if self._last is None:
            self.recalled += index[:, :, self._cluster_slots].numel()
            keys, values = self.store.gather(index)
            return keys, values
        last, *held = self._last
        where = index.new_full((*index.shape[:2], self.seen), -1)
        where.scatter_(2, last, torch.arange(last.shape[2], device=index.device).expand_as(last))
        slot = where.gather(2, index)
        hit = slot >= 0
        self.hits += int(hit[:, :, self._cluster_slots].sum())
        self.recalled += hit[:, :, self._cluster_slots].numel()
        missed = self.store.rows(index)[~hit].to(self.store.buffers[0].device)
        taken = []
        for buffer, kept in zip(self.store.buffers, held, strict=True):
            from_device = slot.clamp(min=0)[..., None].expand(-1, -1, -1, kept.shape[3])
            part = kept.gather(2, from_device)
            part[~hit] = buffer.flatten(0, 2).index_select(0, missed).to(part.device)
            taken.append(part)
        return taken[0], taken[1]

    def forget_last(self, count: int) -> None:
        super().forget_last(count)
        self._last = None
        if self.seen - count < self.clustered:
            # Clusters that lost members are made anew, when next a query asks for them.
            self._forget_clusters()

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().select_rows(choose)
        self.state = {name: choose(t) for name, t in self.state.items()}
        if self._last is not None:
            index, keys, values = (choose(t) for t in self._last)
            self._last = (index, keys, values)

    @property
    def nbytes(self) -> int:
        on_device = () if self._last is None else self._last
        total: int = sum(t.nbytes for t in (*self.state.values(), *on_device))
        return total + self.store.nbytes

    def clear(self) -> None:
        super().clear()
        self.hits = self.recalled = 0
        self._forget_clusters()


def cosine_kmeans(
    x: Tensor, count: int, iterations: int, sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide rows x [n, d] into `count` clusters, each row to the centroid of largest cosine.

    Equivalent to, with `fitted` at most `sample` evenly spaced rows of `unit`, starting from
    `count` of those:

        unit = normalize(x.float())
        for _ in range(iterations):
            index = (fitted @ centres.T).argmax(1)
            centres = stack([normalize(fitted[index == j].sum(0)) for j in range(count)])
        index = (unit @ centres.T).argmax(1)
        means = stack([x[index == j].float().mean(0) for j in range(count)])

    A cluster that lost all its rows keeps its direction, and has a mean of zero. `pamm::assign`
    looks for the largest |cosine|; one more feature of 1 turns a cosine c into (1 + c) / 2, which
    is never negative and has the same order. Gives index [n], means [count, d] of the rows as they
    are, since scores are inner products, and sizes [count].

    Source: arXiv 2412.03213 §III.
    """
    rows = x.shape[0]
    unit = normalize(x.float(), dim=1)
    extended = pad(unit, (0, 1), value=1.0)
    few = min(rows, max(count, sample))
    fitted, fitted_unit = _evenly(extended, few), _evenly(unit, few)
    ones = extended.new_ones(rows)
    centres = _evenly(fitted_unit, count)
    for _ in range(iterations):
        index, _, _ = assign(fitted, pad(centres, (0, 1), value=1.0), index_dtype(count))
        sums = contract(index, ones[:few], [fitted_unit], count)
        norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        centres = torch.where(norm > 0, sums / norm, centres)
    index, _, _ = assign(extended, pad(centres, (0, 1), value=1.0), index_dtype(count))
    sizes = torch.bincount(index.long(), minlength=count)
    means = contract(index, ones, [x.float()], count) / sizes.clamp(min=1)[:, None]
    return index.long(), means, sizes


def _evenly(x: Tensor, count: int) -> Tensor:
    """Take `count` evenly spaced rows: no generator is advanced, and neighbours are alike."""
    return x[torch.arange(count, device=x.device) * x.shape[0] // count]
