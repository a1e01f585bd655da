"""Attention modules whose keys have fewer dimensions than their values: what the cache then holds.

Each takes the place of one attention module of Transformers, with the same call and the same names
of what it keeps. None changes the model around it.
"""

from __future__ import annotations

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
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from pamm_compile.errors import CacheStateError, UnsupportedModelError


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    eager: Any,
    more: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Call the attention function that the model's configuration names, as Transformers does."""
    implementation = cast(Any, module).config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **more
    )
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + r/2) of the last dimension by the angles given.

    Equivalent to `x * cat([cos, cos], -1) + rotate_half(x) * cat([sin, sin], -1)` in Transformers.

    Args:
        x: [..., r], r even.
        cos: [..., r/2], broadcast against a half of `x`.
        sin: as `cos`.

    Returns:
        [..., r], dtype of `x`.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _RotaryBase(nn.Module):
    """What Llama's, Mistral's and Qwen2's attention share once their keys are thin."""

    def __init__(self, original: Any, rank: int, query_width: int, key_bias: bool) -> None:
        super().__init__()
        self.config = original.config
        self.layer_idx: int = original.layer_idx
        self.head_dim: int = original.head_dim
        self.rank = rank
        self.num_key_value_groups: int = original.num_key_value_groups
        self.scaling: float = original.scaling
        self.attention_dropout: float = original.attention_dropout
        self.is_causal = True
        # Mistral reads its window from the configuration, Qwen2 from the layer.
        self.options: dict[str, Any] = {}
        if type(original).__name__ == "MistralAttention":
            self.options["sliding_window"] = getattr(self.config, "sliding_window", None)
        elif type(original).__name__ == "Qwen2Attention":
            self.options["sliding_window"] = original.sliding_window

        hidden = original.q_proj.in_features
        heads = original.q_proj.out_features // self.head_dim
        self.key_heads = heads // self.num_key_value_groups
        like = {"device": original.k_proj.weight.device, "dtype": original.k_proj.weight.dtype}
        self.q_proj = nn.Linear(
            hidden, heads * query_width, bias=original.q_proj.bias is not None, **like
        )
        self.k_proj = nn.Linear(hidden, self.key_heads * rank, bias=key_bias, **like)
        self.v_proj = original.v_proj
        self.o_proj = original.o_proj
        self.train(original.training)

    def _split(self, projected: Tensor, width: int) -> Tensor:
        heads: Tensor = projected.unflatten(-1, (-1, width)).transpose(1, 2)
        return heads

    def _finish(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        more: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout,
            self.scaling,
            modeling_llama.eager_attention_forward,
            {**self.options, **more},
        )
        projected: Tensor = self.o_proj(output.flatten(2))
        return projected, weights


class ThinRotaryAttention(_RotaryBase):
    """Attention over r/2 of a head's d/2 rotary frequencies: thin queries, thin rotated keys.

    Equivalent to the attention of Transformers' Llama with the rows of the query and the key
    projection that belong to the other frequencies set to zero.

    Args:
        original: the module that this one takes the place of.
        rank: r, dimensions of a key; even.

    Attributes:
        pairs: [key heads, r/2], int64; the frequencies kept, 0 the fastest.
    """

    def __init__(self, original: Any, rank: int) -> None:
        bias = original.k_proj.bias is not None
        super().__init__(original, rank, rank, bias)
        half = self.head_dim // 2
        # Frequencies i·d/r are those of a rotary embedding of r dimensions.
        even = torch.arange(rank // 2, device=original.k_proj.weight.device) * half // (rank // 2)
        self.pairs: Tensor
        self.register_buffer("pairs", even.expand(self.key_heads, -1).clone())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = self._split(self.q_proj(hidden_states), self.rank)
        key = self._split(self.k_proj(hidden_states), self.rank)
        value = self._split(self.v_proj(hidden_states), self.head_dim)
        half = self.head_dim // 2
        # [batch, key heads, tokens, r/2]
        cos, sin = (t[..., :half][..., self.pairs].transpose(1, 2) for t in position_embeddings)
        key = rotate(key, cos, sin)
        groups = self.num_key_value_groups
        query = rotate(query, cos.repeat_interleave(groups, 1), sin.repeat_interleave(groups, 1))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        return self._finish(query, key, value, attention_mask, kwargs)


class LateRotaryAttention(_RotaryBase):
    """Attention whose cache holds keys in r coordinates before rotation; whole keys are rebuilt.

    Equivalent to the attention of Transformers' Llama with the key projection `A.T @ B`, where B is
    `key_basis` of a head and A.T the rows of `k_proj`.

    Args:
        original: the module that this one takes the place of.
        rank: r, coordinates of a key.
        rotary: the model's rotary embedding, which gives the angles of any position.

    Attributes:
        key_basis: [key heads, r, d].
        key_bias: [key heads, d], or None where the model has none.
    """

    def __init__(self, original: Any, rank: int, rotary: nn.Module) -> None:
        super().__init__(original, rank, original.head_dim, False)
        like = {"device": original.k_proj.weight.device, "dtype": original.k_proj.weight.dtype}
        self.key_basis = nn.Parameter(torch.empty(self.key_heads, rank, self.head_dim, **like))
        self.key_bias = None
        if original.k_proj.bias is not None:
            self.key_bias = nn.Parameter(torch.zeros(self.key_heads, self.head_dim, **like))
        with torch.no_grad():
            for head in self.key_basis:
                head.copy_(nn.init.orthogonal_(torch.empty(rank, self.head_dim)))
        # In a tuple, so that the model's own module is not registered a second time.
        self._rotary = (rotary,)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        half = self.head_dim // 2
        query = self._split(self.q_proj(hidden_states), self.head_dim)
        key = self._split(self.k_proj(hidden_states), self.rank)
        value = self._split(self.v_proj(hidden_states), self.head_dim)
        cos, sin = (t[:, None, :, :half] for t in position_embeddings)
        query = rotate(query, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            cos, sin = self._angles(cache, key, position_ids, query)
        key = torch.matmul(key, self.key_basis)
        if self.key_bias is not None:
            key = key + self.key_bias[:, None]
        key = rotate(key, cos, sin)
        return self._finish(query, key, value, attention_mask, kwargs)

    def _angles(
        self, cache: Cache, key: Tensor, position_ids: Tensor | None, query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of all cached keys, [batch or 1, 1, length, d/2]."""
        if position_ids is None:
            raise UnsupportedModelError(
                "keys cached before rotation need `position_ids` to be passed on to the attention "
                "module, and this model does not pass them; use rotary='pairs'"
            )
        layer = cache.layers[self.layer_idx]
        length = key.shape[-2]
        if isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer):
            # Slots past the tokens seen get angles of no meaning; the mask hides them.
            last = layer.get_seq_length() - 1
        elif isinstance(layer, DynamicLayer):
            last = length - 1
        else:
            raise CacheStateError(
                f"keys cached before rotation cannot be read through a {type(layer).__name__}: "
                "they are rebuilt from the whole of a DynamicCache or a StaticCache; factor the "
                "keys with rotary='pairs' to use another cache"
            )
        # Tokens are cached in order, so the last one's position gives that of every other; padding
        # on the left gets positions of no meaning, which the mask hides as well.
        slots = torch.arange(length, device=key.device)
        positions = position_ids[:, -1:] + (slots - last)
        cos, sin = self._rotary[0](query, positions)
        half = self.head_dim // 2
        return cos[:, None, :, :half], sin[:, None, :, :half]


class ThinGPT2Attention(nn.Module):
    """GPT-2's self-attention with queries and keys of r dimensions a head.

    Equivalent to Transformers' `GPT2Attention` with queries and keys of another width than values.

    Args:
        original: the module that this one takes the place of.
        rank: r, dimensions of a query and of a key.
    """

    def __init__(self, original: Any, rank: int) -> None:
        super().__init__()
        self.config = original.config
        self.layer_idx: int = original.layer_idx
        self.num_heads: int = original.num_heads
        self.head_dim: int = original.head_dim
        self.rank = rank
        self.scaling: float = original.scaling
        self.is_causal = True
        width: int = original.embed_dim
        weight = original.c_attn.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        self.q_proj = nn.Linear(width, self.num_heads * rank, **like)
        # A bias of the keys adds the same to all scores of a query, which softmax takes out again.
        self.k_proj = nn.Linear(width, self.num_heads * rank, bias=False, **like)
        # The values keep the name of the fused projection: a checkpoint with thin keys then has a
        # weight of another shape than GPT2LMHeadModel.from_pretrained expects, and is refused there
        # where a missing name would only be filled at random.
        make_conv: Any = Conv1D
        self.c_attn: Any = make_conv(width, width).to(**like)
        self.c_proj = original.c_proj
        self.attn_dropout = original.attn_dropout
        self.resid_dropout = original.resid_dropout
        self.train(original.training)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.rank)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.rank)).transpose(1, 2)
        value = self.c_attn(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            self.attn_dropout.p if self.training else 0.0,
            self.scaling,
            modeling_gpt2.eager_attention_forward,
            kwargs,
        )
        return self.resid_dropout(self.c_proj(output.flatten(2))), weights
