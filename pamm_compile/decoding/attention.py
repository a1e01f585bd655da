"""How a cache decides what a query attends to: one attention function, one kind of cache layer.

Transformers hands keys and values to `Cache.update` and the result to an attention function. A
cache that chooses by the query has to act in the second place. `update` therefore leaves the layer
in the keyword arguments that Transformers passes on from the first call to the second, and the
function registered here lets the layer attend. Without such a layer it is Transformers' own SDPA
function.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pamm_compile.errors import CacheStateError, InvalidOptionError, UnsupportedModelError

ATTENTION = "pamm_decoding"
_Model = TypeVar("_Model", bound=PreTrainedModel)


def attach(model: _Model) -> _Model:
    """Let a model's caches choose what its queries attend to.

    Equivalent to `model.set_attn_implementation("sdpa")`, until a cache of this package is passed.

    Args:
        model: a decoder of Transformers whose layers all have full attention; changed in place.

    Returns:
        `model`, for chaining.

    Raises:
        UnsupportedModelError: a layer has a sliding window, a soft cap or another kind of state.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder and a decoder; caches that choose are for "
            "decoders alone"
        )
    types = sorted(set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"})
    if types:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of type {', '.join(types)}, which see part of the "
            "context only; choosing is for full attention (config.sliding_window = None)"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} caps its attention scores, which SDPA cannot do"
        )
    model.set_attn_implementation(ATTENTION)
    return model


def cache_bytes(cache: Cache) -> int:
    """Count the bytes that a cache holds for keys, values and what it chooses by.

    Equivalent to the sum of `tensor.nbytes` over the tensors of its layers, spare room included.

    Args:
        cache: any cache of Transformers or of this package, after use.

    Returns:
        Bytes, on all devices together.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, AttendingLayer):
            total += layer.nbytes
        else:
            total += sum(t.nbytes for t in vars(layer).values() if isinstance(t, Tensor))
    return total


class AttendingLayer(CacheLayerMixin):
    """A cache layer that attends itself; `attach` must have been called on the model.

    `update` gives the new keys and values back: all there are on the first call, when attention
    is over all of them in any case. A model that was not attached is therefore right so far, and
    the second call refuses to go on.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self._waiting = False

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        shared = kwargs.get("kwargs")
        if shared is None:
            raise UnsupportedModelError(
                "the attention module does not pass its keyword arguments on to Cache.update, as "
                "those of Transformers do; this cache cannot reach its queries"
            )
        if self._waiting:
            raise CacheStateError(
                f"{type(self).__name__} was given keys twice without being asked to attend: call "
                "pamm_compile.decoding.attach(model) once before generating, or reset() the cache "
                "if a forward pass was interrupted"
            )
        self._waiting = True
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        self.append(key_states, value_states)
        shared["cache_layer"] = self
        return key_states, value_states

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Attend with the queries of the tokens given to `update` last.

        Args:
            module: the attention module.
            query: [batch, heads, q, d].
            key: [batch, key heads, q, d], the new keys.
            value: [batch, key heads, q, d_v], the new values.
            mask: [batch, 1, q, seen], bool, True where attention is allowed; None: causal.
            scaling: factor of the scores.

        Returns:
            [batch, q, heads, d_v].
        """
        self.answered()
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            raise UnsupportedModelError(
                "caches that choose take masks of allowed tokens, [batch, 1, q, seen] of bool; got "
                f"{list(mask.shape)} of {mask.dtype}"
            )
        if self.seen == query.shape[2]:
            output = whole(module, query, key, value, mask, scaling)
            self.after_prompt(query, mask, scaling)
            return output
        return self.choose_and_attend(module, query, mask, scaling)

    def answered(self) -> None:
        """Say that the keys given last were attended to, for keys that came without queries."""
        self._waiting = False

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> None:
        """Store new keys and values, [batch, key heads, q, d] each."""

    def after_prompt(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Look at the first queries, which attended to everything."""

    @abstractmethod
    def choose_and_attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attend where there is something to choose; as `attend`."""

    @abstractmethod
    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply `choose` to every tensor whose first dimension is the batch."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors held."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all tokens."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CacheStateError(f"{type(self).__name__} cannot be initialised before its first keys")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen = 0
        self._waiting = False
        self.is_initialized = False
        self.clear()

    def offload(self) -> None:
        raise CacheStateError(f"{type(self).__name__} keeps its own tensors where they belong")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise InvalidOptionError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        removed = min(-tokens_to_remove, self.seen)
        if removed:
            self.forget_last(removed)
            self.seen -= removed

    def forget_last(self, count: int) -> None:
        """Undo the last `count` tokens, from 1 to `seen`."""
        raise CacheStateError(
            f"{type(self).__name__} has evicted tokens for good and cannot be cropped; assisted "
            "generation needs a cache that keeps everything"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(lambda t: t[indices.to(t.device)])


def whole(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attend to all keys given; shapes as in `AttendingLayer.attend`."""
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
    return output


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse anything but an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidOptionError(f"{name} must be an integer of at least {least}, got {value!r}")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cache_layer: AttendingLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if cache_layer is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    return _attend(
        cache_layer, module, query, key, value, attention_mask, dropout, scaling, kwargs
    ), None


@torch.compiler.disable
def _attend(
    layer: AttendingLayer,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    more: dict[str, Any],
) -> Tensor:
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise UnsupportedModelError(
                f"this model gives its attention function `{name}`, which caches that choose ignore"
            )
    if dropout:
        raise CacheStateError("caches that choose are for generation: call model.eval() first")
    return layer.attend(
        module, query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    )


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
