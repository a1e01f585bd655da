"""The layers of every cache, step by step, against plain loops over rows, heads and tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pamm_testing.decoding_models import random_policy
from torch import Tensor
from torch.nn.functional import normalize

from pamm_compile import decoding
from pamm_compile.decoding.attention import AttendingLayer, Call
from pamm_compile.errors import CacheStateError, InvalidOptionError

HEADS, KEY_HEADS, WIDTH, VALUES = 4, 2, 8, 6
MODULE: Any = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)
SCALING = 0.7
PROMPT = 40
PADDED = 9
# Chosen so that something is left out from the first new token on, and clusters are made of new
# tokens too.
CACHES: dict[str, Callable[[], Any]] = {
    "clusters": lambda: decoding.ClusterCache(
        16, sinks=3, tokens_per_cluster=4, interval=5, whole_layers=0
    ),
    "clusters offloaded": lambda: decoding.ClusterCache(
        16, sinks=3, tokens_per_cluster=4, interval=5, whole_layers=0, offload=True
    ),
    "clusters of a sample": lambda: decoding.ClusterCache(
        16, sinks=3, tokens_per_cluster=4, interval=5, sample=14, whole_layers=0
    ),
    "pages": lambda: decoding.PageCache(16, page=4, whole_layers=0),
    "window": lambda: decoding.WindowCache(16, sinks=3),
    "heavy hitters": lambda: decoding.HeavyHitterCache(16, recent=5),
    "norms": lambda: decoding.NormCache(16, recent=5, whole_layers=0),
    "keydiff": lambda: decoding.KeyDiffCache(16, recent=5, interval=1),
    "policy": lambda: decoding.EvictionCache(random_policy(), budget=16, interval=4),
}
KEEPING = ("clusters", "clusters offloaded", "clusters of a sample", "pages")
EVICTING = ("window", "heavy hitters", "norms", "keydiff", "policy")


def layer(name: str) -> AttendingLayer:
    made: AttendingLayer = CACHES[name]()._make()
    return made


class Stream:
    """Random queries, keys and values of a batch, with padding before the second row."""

    def __init__(self, tokens: int = 60, padded: int = PADDED, dtype: Any = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(heads: int, width: int) -> Tensor:
            x = torch.randn(2, heads, tokens, width, generator=generator)
            # Neighbours are alike, as in text, so that there is something to cluster.
            drift = torch.randn(2, heads, tokens // 5, width, generator=generator)
            return (x + 2 * drift.repeat_interleave(5, 2)).to(dtype)

        self.query = random(HEADS, WIDTH)
        self.key = random(KEY_HEADS, WIDTH)
        self.value = random(KEY_HEADS, VALUES)
        self.valid = torch.ones(2, tokens, dtype=torch.bool)
        self.valid[1, :padded] = False

    def rows(self, index: list[int]) -> Stream:
        other = Stream.__new__(Stream)
        for name, tensor in vars(self).items():
            setattr(other, name, tensor[index])
        return other

    def feed(self, to: AttendingLayer, start: int, end: int) -> Tensor:
        """Give the layer tokens from `start` to `end`, as a model with `attach` would."""
        part = slice(start, end)
        shared: dict[str, Any] = {}
        key, value = to.update(self.key[:, :, part], self.value[:, :, part], kwargs=shared)
        mask = None
        if not self.valid.all():
            order = torch.arange(end)
            causal = order <= torch.arange(start, end)[:, None]
            mask = (causal & self.valid[:, None, :end])[:, None]
        assert shared["cache_layer"] is to
        call = Call(MODULE, self.query[:, :, part], mask, SCALING)
        return to.attend(call, key.held[0], value.held[0])

    def attention(self, row: int, head: int, token: int, seen: list[int]) -> Tensor:
        """What one query gets from the tokens in `seen`."""
        key_head = head // (HEADS // KEY_HEADS)
        query = self.query[row, head, token].double()
        weights = (self.key[row, key_head, seen].double() @ query * SCALING).softmax(0)
        return weights @ self.value[row, key_head, seen].double()


class PlainClusters:
    """`ClusterCache`, one head of one row."""

    def __init__(self, sample: int = 100) -> None:
        self.clusters: list[tuple[Tensor, list[int]]] = []
        self.done = 0
        self.sample = sample

    def chosen(self, s: Stream, row: int, head: int, token: int) -> list[int]:
        key_head = head // (HEADS // KEY_HEADS)
        real = [t for t in range(token) if s.valid[row, t]]
        sinks = real[:3]
        if not self.done or token + 1 - self.done > 5:
            new = [t for t in real[3:] if t >= self.done]
            keys = s.key[row, key_head, new].float()
            index, means = self.kmeans(keys, -(-len(new) // 4))
            for j, mean in enumerate(means):
                self.clusters.append((mean, [t for t, i in zip(new, index, strict=True) if i == j]))
            self.done = token
        query = s.query[row, head, token].float()
        order = sorted(self.clusters, key=lambda c: -float(c[0] @ query))
        members = [t for _, tokens in order for t in tokens][: 16 - 3]
        return [*sinks, *members, *range(self.done, token + 1)]

    def kmeans(self, keys: Tensor, count: int) -> tuple[list[int], list[Tensor]]:
        unit = normalize(keys.double(), dim=1)
        few = min(len(keys), max(count, self.sample))
        fitted = unit[[j * len(keys) // few for j in range(few)]]
        centres = fitted[[j * few // count for j in range(count)]]
        for _ in range(8):
            index = (fitted @ centres.T).argmax(1)
            centres = torch.stack(
                [
                    normalize(fitted[index == j].sum(0), dim=0) if (index == j).any() else c
                    for j, c in enumerate(centres)
                ]
            )
        index = (unit @ centres.T).argmax(1)
        means = [keys[index == j].sum(0) / max(1, int((index == j).sum())) for j in range(count)]
        return index.tolist(), means


class PlainPages:
    def chosen(self, s: Stream, row: int, head: int, token: int) -> list[int]:
        key = s.key[row, head // (HEADS // KEY_HEADS)].float()
        query = s.query[row, head, token].float()
        scores = {}
        for page in range(token // 4):
            tokens = key[4 * page : 4 * page + 4]
            if s.valid[row, 4 * page : 4 * page + 4].any():
                tokens = tokens[s.valid[row, 4 * page : 4 * page + 4]]
                bound = torch.maximum(query * tokens.amin(0), query * tokens.amax(0)).sum()
                scores[page] = float(bound)
        best = sorted(scores, key=lambda p: -scores[p])[:3]
        tokens = [4 * p + i for p in best for i in range(4)] + list(
            range(token // 4 * 4, token + 1)
        )
        return [t for t in tokens if s.valid[row, t]]


class PlainEviction:
    """A rule that drops tokens from what was kept before, one head of one row."""

    def __init__(self) -> None:
        self.kept: list[int] | None = None
        self.received: dict[int, float] = {}

    def chosen(self, s: Stream, row: int, head: int, token: int) -> list[int]:
        if self.kept is None:
            self.kept = [t for t in range(token) if s.valid[row, t]]
            for query in range(token):
                self.note(s, row, head, query, [t for t in self.kept if t <= query])
            self.evict(s, row, head, token - 1)
        seen = [*self.kept, token]
        self.note(s, row, head, token, seen)
        self.kept = seen
        self.evict(s, row, head, token)
        return seen

    def note(self, s: Stream, row: int, head: int, query: int, seen: list[int]) -> None:
        group = HEADS // KEY_HEADS
        key_head = head // group
        for member in range(key_head * group, (key_head + 1) * group):
            keys = s.key[row, key_head, seen].float()
            scores = keys @ s.query[row, member, query].float() * SCALING
            for t, weight in zip(seen, scores.softmax(0).tolist(), strict=True):
                self.received[t] = self.received.get(t, 0.0) + weight / group

    def evict(self, s: Stream, row: int, head: int, last: int) -> None:
        assert self.kept is not None
        key = s.key[row, head // (HEADS // KEY_HEADS)]
        ranked = sorted(self.kept, key=lambda t: -self.rank(s, row, key, t, last))
        self.kept = sorted(ranked[:16])

    def rank(self, s: Stream, row: int, key: Tensor, t: int, last: int) -> float:
        raise NotImplementedError


class PlainWindow(PlainEviction):
    def rank(self, s: Stream, row: int, key: Tensor, t: int, last: int) -> float:
        first = int(s.valid[row].int().argmax())
        return float("inf") if t < first + 3 else t


class PlainHeavyHitters(PlainEviction):
    def rank(self, s: Stream, row: int, key: Tensor, t: int, last: int) -> float:
        return float("inf") if t > last - 5 else self.received[t]


class PlainNorms(PlainEviction):
    def rank(self, s: Stream, row: int, key: Tensor, t: int, last: int) -> float:
        return float("inf") if t > last - 5 else -float(key[t].float().norm())


class PlainKeyDiff(PlainEviction):
    def rank(self, s: Stream, row: int, key: Tensor, t: int, last: int) -> float:
        tokens = [k for k in range(last + 1) if s.valid[row, k]]
        mean = normalize(key[tokens].float(), dim=1).mean(0)
        likeness = normalize(key[t].float(), dim=0) @ normalize(mean, dim=0)
        return float("inf") if t > last - 5 else -float(likeness)


PLAIN: dict[str, Callable[[], Any]] = {
    "clusters": PlainClusters,
    "clusters offloaded": PlainClusters,
    "clusters of a sample": lambda: PlainClusters(sample=14),
    "pages": PlainPages,
    "window": PlainWindow,
    "heavy hitters": PlainHeavyHitters,
    "norms": PlainNorms,
    "keydiff": PlainKeyDiff,
}


def compare(name: str, s: Stream, until: int, tolerance: float) -> None:
    made = layer(name)
    prompt = s.feed(made, 0, PROMPT)
    for row, head, token in ((0, 0, 5), (0, 3, 39), (1, 2, 39)):
        seen = [t for t in range(token + 1) if s.valid[row, t]]
        expected = s.attention(row, head, token, seen)
        got = prompt[row, token, head].double()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    plain = {(row, head): PLAIN[name]() for row in range(2) for head in range(HEADS)}
    left_out = 0
    for token in range(PROMPT, until):
        output = s.feed(made, token, token + 1)
        assert output.shape == (2, 1, HEADS, VALUES)
        for (row, head), reference in plain.items():
            seen = reference.chosen(s, row, head, token)
            left_out += int(s.valid[row, : token + 1].sum()) - len(seen)
            expected = s.attention(row, head, token, seen)
            got = output[row, 0, head].double()
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert left_out > 0


@pytest.mark.parametrize("padded", [0, PADDED])
@pytest.mark.parametrize("name", PLAIN)
def test_against_plain_loops(name: str, padded: int) -> None:
    compare(name, Stream(padded=padded), 60, 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", PLAIN)
def test_half_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    compare(name, Stream(dtype=dtype), PROMPT + 1, tolerance)


@pytest.mark.parametrize("name", CACHES)
def test_reordered_rows_go_on_as_if_they_had_always_been_so(name: str) -> None:
    s = Stream()
    for order in ([1, 0], [1, 1]):
        first, second = layer(name), layer(name)
        s.feed(first, 0, PROMPT)
        s.feed(first, PROMPT, PROMPT + 1)
        first.reorder_cache(torch.tensor(order))
        reordered = s.rows(order)
        reordered.feed(second, 0, PROMPT)
        reordered.feed(second, PROMPT, PROMPT + 1)
        for token in range(PROMPT + 1, 50):
            a, b = (reordered.feed(x, token, token + 1) for x in (first, second))
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("name", KEEPING)
def test_cropped_goes_on_as_if_the_tokens_had_never_come(name: str, count: int) -> None:
    s = Stream()
    first, second = layer(name), layer(name)
    s.feed(first, 0, PROMPT)
    for token in range(PROMPT, PROMPT + 8):
        s.feed(first, token, token + 1)
    assert first.get_seq_length() == PROMPT + 8
    first.crop(-count)
    end = PROMPT + 8 - count
    assert first.get_seq_length() == end
    if count == 7:
        # Clusters that lost members are made anew of all tokens, as those of a prompt are.
        s.feed(second, 0, end)
    else:
        s.feed(second, 0, PROMPT)
        for token in range(PROMPT, end):
            s.feed(second, token, token + 1)
    for token in range(end, end + 3):
        torch.testing.assert_close(
            s.feed(first, token, token + 1), s.feed(second, token, token + 1)
        )


@pytest.mark.parametrize("name", EVICTING)
def test_evicted_tokens_cannot_be_cropped_back(name: str) -> None:
    made = layer(name)
    Stream().feed(made, 0, PROMPT)
    Stream().feed(made, PROMPT, PROMPT + 1)
    made.crop(0)
    with pytest.raises(CacheStateError, match="evicted tokens for good"):
        made.crop(-1)
    with pytest.raises(InvalidOptionError, match="minus the number"):
        made.crop(5)
    assert made.get_seq_length() == PROMPT + 1


@pytest.mark.parametrize("name", CACHES)
def test_a_prompt_in_pieces_is_one_prompt(name: str) -> None:
    """The last piece is one token, which only whoever generates can tell from a new one."""
    s, whole, pieces = Stream(), layer(name), layer(name)
    pieces.prompt_length = PROMPT
    expected = s.feed(whole, 0, PROMPT)
    ends = [0, 13, 26, PROMPT - 1, PROMPT]
    got = [s.feed(pieces, a, b) for a, b in pairwise(ends)]
    torch.testing.assert_close(torch.cat(got, dim=1)[:1], expected[:1])
    for token in range(PROMPT, PROMPT + 5):
        torch.testing.assert_close(
            s.feed(pieces, token, token + 1), s.feed(whole, token, token + 1)
        )


@pytest.mark.parametrize("name", CACHES)
def test_several_queries_at_once(name: str) -> None:
    """A further turn sees all that is kept, and itself causally."""
    s = Stream()
    one, many = layer(name), layer(name)
    for each in (one, many):
        s.feed(each, 0, PROMPT)
        s.feed(each, PROMPT, PROMPT + 1)
    together = s.feed(many, PROMPT + 1, PROMPT + 5)
    if name in KEEPING:
        expected = s.attention(1, 2, PROMPT + 2, list(range(PADDED, PROMPT + 3)))
        torch.testing.assert_close(together[1, 1, 2].double(), expected, rtol=1e-4, atol=1e-4)
    else:
        first = s.feed(one, PROMPT + 1, PROMPT + 2)
        torch.testing.assert_close(together[:, :1], first)
    s.feed(many, PROMPT + 5, PROMPT + 6)


@pytest.mark.parametrize("name", CACHES)
def test_reset_forgets_everything(name: str) -> None:
    s = Stream()
    made = layer(name)
    s.feed(made, 0, PROMPT)
    first = s.feed(made, PROMPT, PROMPT + 1)
    made.reset()
    assert made.get_seq_length() == 0
    assert made.nbytes == 0
    s.feed(made, 0, PROMPT)
    torch.testing.assert_close(s.feed(made, PROMPT, PROMPT + 1), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["window", "heavy hitters", "norms", "keydiff"])
def test_evicting_bounds_the_bytes(name: str) -> None:
    s = Stream(padded=0)
    made = layer(name)
    s.feed(made, 0, PROMPT)
    s.feed(made, PROMPT, PROMPT + 1)
    held = 2 * KEY_HEADS * 16 * (WIDTH + VALUES) * 4
    extra = 2 * KEY_HEADS * 16 * 8 + 2 * 4 + (2 * KEY_HEADS * 16 * 4) * (name == "heavy hitters")
    extra += (2 * KEY_HEADS * WIDTH * 4) * (name == "keydiff")
    assert made.nbytes == held + extra


def test_hits_on_the_device_are_counted() -> None:
    s = Stream(padded=0)
    # The same query twice recalls the same clusters.
    s.query[:, :, PROMPT + 1] = s.query[:, :, PROMPT]
    cache = CACHES["clusters offloaded"]()
    cache.layers.append(cache._make())
    s.feed(cache.layers[0], 0, PROMPT)
    s.feed(cache.layers[0], PROMPT, PROMPT + 1)
    assert cache.hit_rate == 0
    s.feed(cache.layers[0], PROMPT + 1, PROMPT + 2)
    assert cache.hit_rate == 0.5
    with pytest.raises(InvalidOptionError, match="offload=True"):
        _ = CACHES["clusters"]().hit_rate
