"""Learned eviction: a small network reads how each token was attended to, and keeps or forgets."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils import parameters_to_vector, skip_init, vector_to_parameters

from pamm_compile.decoding.attention import check_count
from pamm_compile.decoding.eviction import EvictingLayer, take
from pamm_compile.decoding.store import ChoosingCache
from pamm_compile.errors import InvalidOptionError

# Queries of a frame, and between one and the next.
WINDOW, STRIDE = 32, 16
_FREQUENCIES = WINDOW // 2 + 1
_DECAY = 0.99
_AGES = 8
_SLOWEST = 50_000.0
_SMALLEST = 1e-6
_HIDDEN = 4
_SHIPPED = Path(__file__).with_name("policy.json")


class EvictionPolicy(nn.Module):
    """Score tokens by the spectrum of the attention they received; positive means keep.

    Equivalent to, with e the features of a head's tokens, in order, normalised over them:

        later = softmax(query(e) @ key(e).T / 2, over tokens not before) @ value(e)
        score = weight @ (e * (1 + out(later))).T + bias

    Attention looks backward in time, from every token to those after it, so that a token can be
    forgotten because a later one says the same.

    Args:
        parameters: the flat parameters to start with, `EvictionPolicy.size` numbers; zeros score
            everything 0.

    Raises:
        InvalidOptionError: another number of parameters.

    Source: arXiv 2410.13166 §3, with the sizes of its published code except the width of the
    attention, which is 4 here.
    """

    size = 463

    def __init__(self, parameters: Tensor | None = None) -> None:
        super().__init__()
        features = _FREQUENCIES + _AGES
        # Layers of nn draw their weights, which would move the global generator.
        self.query = skip_init(nn.Linear, features, _HIDDEN)
        self.key = skip_init(nn.Linear, features, _HIDDEN)
        self.value = skip_init(nn.Linear, features, _HIDDEN)
        self.out = skip_init(nn.Linear, _HIDDEN, features)
        self.score = skip_init(nn.Linear, features, 1)
        self.requires_grad_(False)
        self.set_flat(torch.zeros(self.size) if parameters is None else parameters)

    @classmethod
    def shipped(cls) -> EvictionPolicy:
        """Load the policy that comes with this package; docs/decoding.md says how it evolved."""
        return cls.load(_SHIPPED)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvictionPolicy:
        """Load what `save` wrote."""
        return cls(torch.tensor(json.loads(Path(path).read_text())["parameters"]))

    def save(self, path: str | os.PathLike[str], **about: Any) -> None:
        """Write the parameters as JSON, with whatever else is to be said of them."""
        numbers = [round(float(x), 5) for x in self.flat()]
        Path(path).write_text(json.dumps({**about, "parameters": numbers}, indent=None) + "\n")

    def flat(self) -> Tensor:
        """All parameters, [size]."""
        return parameters_to_vector(self.parameters())

    def set_flat(self, parameters: Tensor) -> None:
        """Replace all parameters by [size] others."""
        if parameters.shape != (self.size,):
            raise InvalidOptionError(
                f"a policy has {self.size} parameters, got {list(parameters.shape)}"
            )
        vector_to_parameters(parameters.clone(), self.parameters())

    def forward(self, spectrum: Tensor, age: Tensor, real: Tensor) -> Tensor:
        """Score tokens in the order of their positions, [..., n], float32.

        `spectrum` [..., n, 17] has averaged magnitudes of the frequencies of received attention,
        `age` [..., n] the tokens since; `real` [..., n] is False where a slot holds no token.
        """
        weight = real[..., None].float()
        count = weight.sum(-2, keepdim=True).clamp(min=1)
        logs = (spectrum + _SMALLEST).log()
        mean = (logs * weight).sum(-2, keepdim=True) / count
        spread = ((logs - mean).square() * weight).sum(-2, keepdim=True) / count
        e = torch.cat([(logs - mean) / (spread.sqrt() + _SMALLEST), _age(age)], dim=-1)
        tokens = e.shape[-2]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=e.device).triu()
        allowed = later & real[..., None, :]
        # A slot without a token looks at itself, so that no row is without weights.
        allowed = allowed | torch.eye(tokens, dtype=torch.bool, device=e.device)
        mixed = scaled_dot_product_attention(
            self.query(e), self.key(e), self.value(e), attn_mask=allowed
        )
        scores: Tensor = self.score(e * (1 + self.out(mixed)))[..., 0]
        return scores


def _age(age: Tensor) -> Tensor:
    """Sines and cosines of an age at four speeds, [..., 8]."""
    speed = torch.arange(_AGES // 2, device=age.device) * (-2 * math.log(_SLOWEST) / _AGES)
    angle = age[..., None].float() * speed.exp()
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class EvictionCache(ChoosingCache):
    """Keep the tokens that a learned policy wants to keep, in each key head.

    Equivalent to `tokens[policy(spectrum, age, real) > 0]`, after the prompt and then at every
    `interval` new tokens; the last token is always kept.

    Args:
        policy: scores the tokens of every layer and head; None: the one that ships.
        budget: keep at most this many, those of highest score; None: as many as the policy wants.
        interval: new tokens between two decisions, all kept meanwhile.
        whole_layers: layers, from the first, that drop nothing.

    Source: arXiv 2410.13166, which decides every 512 tokens of the prompt too.
    """

    def __init__(
        self,
        policy: EvictionPolicy | None = None,
        *,
        budget: int | None = None,
        interval: int = 512,
        whole_layers: int = 0,
    ) -> None:
        check_count(1, interval=interval, budget=1 if budget is None else budget)
        check_count(0, whole_layers=whole_layers)
        chosen = EvictionPolicy.shipped() if policy is None else policy
        layer = partial(PolicyLayer, policy=chosen, budget=budget, interval=interval)
        super().__init__(layer, whole_layers)


class PolicyLayer(EvictingLayer):
    """One layer of an `EvictionCache`, whose arguments it takes.

    Attributes:
        state: beside what every evicting layer holds:
            weights: [batch, key heads, n, m]; received from the last m queries, for later frames.
            spectrum: [batch, key heads, n, 17]; averaged over all frames so far.
    """

    needs_weights = True
    policy: EvictionPolicy

    def observe(self, weights: Tensor) -> None:
        received = weights.transpose(2, 3)
        slots = received.shape[2]
        before = self.state.get("weights")
        if before is None:
            # The first frame begins before the sequence does.
            before = received.new_zeros(*received.shape[:3], WINDOW - STRIDE)
            self.state["spectrum"] = received.new_zeros(*received.shape[:3], _FREQUENCIES)
        missing = slots - before.shape[2]
        series = torch.cat([pad(before, (0, 0, 0, missing)), received], dim=3)
        average = pad(self.state["spectrum"], (0, 0, 0, missing))
        frames = (series.shape[3] - WINDOW) // STRIDE + 1
        if frames > 0:
            window = torch.hann_window(WINDOW, device=series.device)
            spectra = torch.fft.rfft(series.unfold(3, WINDOW, STRIDE) * window).abs()
            decay = _DECAY ** torch.arange(frames - 1, -1, -1, device=series.device)
            new = torch.einsum("bhnfk,f->bhnk", spectra, decay) * (1 - _DECAY)
            average = average * _DECAY**frames + new
            series = series[..., frames * STRIDE :]
        self.state["weights"], self.state["spectrum"] = series, average

    def choose(self, real: Tensor) -> Tensor | None:
        score = self.policy(self.state["spectrum"], self.age, real)
        # No decision may leave a head without any token.
        score = score.masked_fill(self.age == 0, torch.inf)
        wanted = real & (score > 0)
        most = int(wanted.sum(2).max())
        if self.budget is not None:
            most = min(most, self.budget)
        rank = score.masked_fill(~wanted, -torch.inf)
        best = rank.topk(most, dim=2)
        # Unwanted slots of heads that want fewer go to the end, as slots without a token.
        unwanted = best.values == -torch.inf
        slots = best.indices.masked_fill(unwanted, real.shape[2])
        ordered: Tensor = slots.sort(dim=2).values
        return ordered.masked_fill(ordered == real.shape[2], -1)

    def evict_now(self) -> None:
        """Decide at once, whenever the last decision was."""
        self.decided = 0
        self._evict()

    def keep(self, index: Tensor) -> None:
        for name in ("weights", "spectrum"):
            self.state[name] = take(self.state[name], index)
