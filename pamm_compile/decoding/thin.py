"""Attention whose keys have fewer dimensions than its values: subclasses of Transformers' own."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from pamm_compile.errors import CacheStateError


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + r/2) of the last dimension of [..., r] by angles [..., r/2].

    Equivalent to `x * cat([cos, cos], -1) + rotate_half(x) * cat([sin, sin], -1)` in Transformers.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def split(projected: Tensor, width: int) -> Tensor:
    """Cut [batch, tokens, heads * width] into [batch, heads, tokens, width]."""
    heads: Tensor = projected.unflatten(-1, (-1, width)).transpose(1, 2)
    return heads


def normed(module: Any, name: str, x: Tensor) -> Tensor:
    """Normalise heads [batch, heads, tokens, d] as a module does that has a norm of that name.

    Qwen3's norm is of each head, OLMo 2's of all heads together; Llama has none.
    """
    norm = getattr(module, name, None)
    if norm is None:
        return x
    tokens = x.transpose(1, 2)
    if norm.weight.numel() != x.shape[-1]:
        return cast(Tensor, norm(tokens.flatten(2))).view(tokens.shape).transpose(1, 2)
    return cast(Tensor, norm(tokens)).transpose(1, 2)


def angles(module: Any, position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines [batch or 1, 1, tokens, d/2], of which some models give two halves."""
    cos, sin = (t[:, None, :, : module.head_dim // 2] for t in position_embeddings)
    return cos, sin


@functools.cache
def thin_class(original: Any) -> Any:
    """The subclass of an attention class of Transformers that attends with thin keys."""
    name = f"Thin{original.__name__}"
    return type(name, (ThinAttention, original), {"__module__": __name__})


def _revive(original: Any) -> Any:
    return thin_class(original).__new__(thin_class(original))


class ThinAttention(nn.Module):
    """Attention with thin keys in the place of GPT-2's, Llama's, and those that differ little.

    Equivalent, by `way`, to the attention it replaces with

    - "absorbed" (no rotary positions): a key projection of rank r; queries and keys have r
      dimensions;
    - "before": the key projection `A.T @ B` with B the `key_basis` of a head and A.T the rows of
      `k_proj`. The cache holds the r coordinates, from which whole keys are rebuilt, normalised
      where the model does, and rotated;
    - "pairs": queries and keys without the rotary frequencies that are not in `pairs`.

    Attributes:
        rank: r, dimensions of a cached key and head.
        keeps: whether it may keep coordinates in a cache rather than whole keys.
        leads: whether it is the first of those, which keeps the angles.
        key_basis: [key heads, r, d].
        key_bias: [key heads, d], or None where the model has none.
        pairs: [key heads, r/2], int64; the frequencies kept, 0 the fastest.
    """

    config: Any
    rank: int
    way: str
    keeps: bool
    leads: bool
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    key_basis: Tensor
    key_bias: Tensor | None
    pairs: Tensor

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (type(self).__bases__[1],), self.__dict__

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        me: Any = self
        # GPT-2's values keep the name of its fused projection: its own class then refuses the
        # checkpoint for a shape, where a name that is missing would be filled at random.
        gpt2 = hasattr(self, "c_attn")
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        value = split((me.c_attn if gpt2 else me.v_proj)(hidden_states), self.head_dim)
        later = False
        if self.way == "before":
            cos, sin = angles(self, position_embeddings)
            query = rotate(normed(self, "q_norm", split(query, self.head_dim)), cos, sin)
            key = split(key, self.rank)
            later = cache is not None and self._keeps_coordinates(cache)
            if not later:
                key = self._rebuild(key, cos, sin)
        elif self.way == "pairs":
            query, key = self._pairs(query, key, position_embeddings)
        else:
            query, key = split(query, self.rank), split(key, self.rank)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            if later:
                key = self._rebuild(key, *self._angles(cache, cos, sin, key))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # Mistral reads its window from the configuration, Qwen2 from the layer.
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        kwargs = {"sliding_window": window, **kwargs, "scaling": self.scaling}
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = function(
            self, query, key, value, attention_mask, dropout=dropout, **kwargs
        )
        output = output.flatten(2)
        return me.resid_dropout(me.c_proj(output)) if gpt2 else me.o_proj(output), weights

    def _pairs(self, query: Tensor, key: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        cos, sin = angles(self, position_embeddings)
        groups = self.num_key_value_groups
        turned = []
        for name, x, members in (("q_norm", query, groups), ("k_norm", key, 1)):
            pairs = self.pairs.repeat_interleave(members, 0)
            if hasattr(self, name):
                # A norm is of a whole head, so that dropping comes after it.
                whole = normed(self, name, split(x, self.head_dim))
                index = torch.cat([pairs, pairs + self.head_dim // 2], dim=-1)[None, :, None]
                x = whole.gather(-1, index.expand(len(whole), -1, whole.shape[2], -1))
            else:
                x = split(x, self.rank)
            # [batch or 1, heads, tokens, r/2]
            kept = (t[:, 0][..., pairs].transpose(1, 2) for t in (cos, sin))
            turned.append(rotate(x, *kept))
        return turned[0], turned[1]

    def _rebuild(self, coordinates: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Whole keys, rotated, [batch, key heads, n, d]."""
        key = torch.matmul(coordinates, self.key_basis)
        if self.key_bias is not None:
            key = key + self.key_bias[:, None]
        return rotate(normed(self, "k_norm", key), cos, sin)

    def _keeps_coordinates(self, cache: Cache) -> bool:
        """Whether the cache hands all that it was given back in order; else it holds whole keys."""
        layers: list[Any] = cache.layers
        kind: Any = cache.layer_class_to_replicate
        if self.layer_idx < len(layers):
            kind = type(layers[self.layer_idx])
        in_order = issubclass(kind, DynamicLayer | StaticLayer)
        return self.keeps and in_order and not issubclass(kind, StaticSlidingWindowLayer)

    def _angles(self, cache: Cache, cos: Tensor, sin: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of all cached keys, [batch, 1, length, d/2].

        They are one more layer of the cache, after the model's own, so that whatever reorders,
        crops or resets the cache does the same to them.
        """
        layers: list[Any] = cache.layers
        after = self.config.num_hidden_layers
        if self.leads:
            while len(layers) < after:
                layers.append(cast(Any, cache.layer_class_to_replicate)())
            if len(layers) == after:
                own = layers[self.layer_idx]
                static = isinstance(own, StaticLayer)
                layers.append(StaticLayer(own.max_cache_len) if static else DynamicLayer())
            wide = (t.expand(len(key), -1, -1, -1) for t in (cos, sin))
            cos, sin = layers[after].update(*wide)
        else:
            cos, sin = (t.to(key.device) for t in (layers[after].keys, layers[after].values))
        length = key.shape[2]
        if cos.shape[2] < length:
            raise CacheStateError(
                f"the cache holds {length} keys but the positions of {cos.shape[2]}: it was filled "
                "by other means than this model, whose keys are cached before rotation"
            )
        return cos[:, :, -length:], sin[:, :, -length:]
