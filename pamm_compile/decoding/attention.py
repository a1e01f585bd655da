"""How a cache decides what a query attends to: one attention function, one kind of cache layer.

Transformers hands keys and values to `Cache.update` and the result to an attention function. A
cache that chooses by the query acts in the second place: `update` leaves the layer in the keyword
arguments that both calls share, and the function registered here lets it attend. What `update`
returns may only be handed on: a model that does anything else with it is refused there and then.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pamm_compile.errors import CacheStateError, InvalidOptionError, UnsupportedModelError

ATTENTION = "pamm_decoding"


def cache_bytes(cache: Cache) -> int:
    """Count the bytes that a cache holds for keys, values and what it chooses by.

    Equivalent to the sum of `tensor.nbytes` over the tensors of its layers, spare room included, of
    any cache of Transformers or of this package.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, AttendingLayer):
            total += layer.nbytes
        else:
            total += sum(t.nbytes for t in vars(layer).values() if isinstance(t, Tensor))
    return total


class Call(NamedTuple):
    """What an attention function was given beside keys and values."""

    module: nn.Module
    query: Tensor
    """[batch, heads, q, d]."""
    mask: Tensor | None
    """[batch, 1, q, seen], bool, True where attention is allowed; None: causal."""
    scaling: float
    sinks: Tensor | None = None
    """[heads], scores of a token that has no value; None: there is none."""

    def over(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to keys and values [batch, key heads or heads, n, d] where `mask` allows.

        The mask is [batch, 1 or heads, q, n], bool; None: causal, or all for a single query. Gives
        [batch, q, heads, d_v].
        """
        heads, queries = self.query.shape[1:3]
        if self.sinks is not None:
            if mask is None and queries > 1:
                keys, values = keys[:, :, :queries], values[:, :, :queries]
                mask = keys.new_ones(1, 1, queries, queries, dtype=torch.bool).tril()
            # A key of zeros scores its bias, and a value of zeros adds nothing.
            bias = self.sinks[:, None, None].expand(-1, queries, keys.shape[2] + 1)
            bias = bias.to(self.query.dtype).expand(len(keys), -1, -1, -1).clone()
            bias[..., :-1] = 0
            if mask is not None:
                bias[..., :-1].masked_fill_(~mask, -torch.inf)
            keys, values, mask = pad(keys, (0, 0, 0, 1)), pad(values, (0, 0, 0, 1)), bias
        like: Any = SimpleNamespace(num_key_value_groups=heads // keys.shape[1], is_causal=True)
        output: Tensor = sdpa_attention_forward(
            like, self.query, keys, values, mask, scaling=self.scaling
        )[0]
        return output


class Held:
    """Keys or values on their way to the attention function; `refusal` is for whoever else asks."""

    def __init__(self, tensor: Tensor, refusal: Exception) -> None:
        self.held = (tensor, refusal)

    def __getattr__(self, name: str) -> NoReturn:
        raise self.__dict__["held"][1]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        flat = [x for a in args for x in (a if isinstance(a, list | tuple) else (a,))]
        raise next(x for x in [*flat, *(kwargs or {}).values()] if isinstance(x, Held)).held[1]


def _refuse_operator(self: Held, *other: Any) -> NoReturn:
    raise self.held[1]


# Python looks operators up on the type.
for _name in ("getitem", "matmul", "rmatmul", "add", "radd", "mul", "rmul", "len", "iter"):
    setattr(Held, f"__{_name}__", _refuse_operator)


class AttendingLayer(CacheLayerMixin):
    """A cache layer that attends itself; `attach` must have been called on the model.

    Of the `seen` tokens the first `prompt_length` belong to a prompt, however they came. `home` is
    the list of layers that this one is in, and where.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **options: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = self.prompt_length = 0
        self.home: tuple[list[Any], int] = ([self], 0)
        self._waiting = False
        vars(self).update(options)

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shared = kwargs.get("kwargs")
        if shared is None:
            raise UnsupportedModelError(
                "the attention module does not pass its keyword arguments on to Cache.update, as "
                "Llama's does; caches that choose cannot reach its queries"
            )
        if self._waiting:
            raise CacheStateError(
                f"{type(self).__name__} was given keys twice without being asked to attend, as "
                "after a forward pass that was interrupted: reset() the cache"
            )
        self._waiting = True
        self.is_initialized = True
        self.append(key_states, value_states)
        self.seen += key_states.shape[-2]
        shared["cache_layer"] = self
        refusal = self.refusal()
        return Held(key_states, refusal), Held(value_states, refusal)

    def refusal(self) -> Exception:
        """What to raise when keys go anywhere but to `attend`."""
        return CacheStateError(
            f"the model does not ask {type(self).__name__} to attend: call "
            "pamm_compile.decoding.attach(model) once before, which says where a model cannot be"
        )

    def attend(self, call: Call, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """Attend with the queries of the tokens given to `update` last, [batch, q, heads, d_v].

        `window` is how many tokens the module sees, the query's own included; None: all.
        """
        self.answered()
        mask = call.mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            raise UnsupportedModelError(
                "caches that choose take masks of allowed tokens, [batch, 1, q, seen] of bool; got "
                f"{list(mask.shape)} of {mask.dtype}"
            )
        if window is not None:
            # A layer that sees a window has nothing to choose, and keeps no more than that.
            layers, index = self.home
            layers[index] = DynamicSlidingWindowLayer(window)
            layers[index].update(key, value)
            return call.over(key, value, mask)
        return self.choose_and_attend(call)

    def answered(self) -> None:
        """Take keys that came without queries for attended to."""
        self._waiting = False

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> None:
        """Store new keys and values, [batch, key heads, q, d] each; `seen` is without them."""

    @abstractmethod
    def choose_and_attend(self, call: Call) -> Tensor:
        """Attend to what is kept; as `attend`."""

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
        self.seen = self.prompt_length = 0
        self._waiting = False
        self.is_initialized = False
        self.clear()

    def offload(self) -> None:
        """Stay: tensors are where they belong."""

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


def check_count(least: int, **values: Any) -> None:
    """Refuse anything but integers of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidOptionError(
                f"{name} must be an integer of at least {least}, got {value!r}"
            )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cache_layer: AttendingLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(module, query, attention_mask, scaling, kwargs.pop("s_aux", None))
    if cache_layer is not None:
        return _attend(cache_layer, call, key, value, dropout, kwargs), None
    if call.sinks is not None:
        if dropout:
            raise UnsupportedModelError("sinks with dropout: set attention_dropout to 0")
        return call.over(key, value, attention_mask), None
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


@torch.compiler.disable
def _attend(
    layer: AttendingLayer, call: Call, key: Any, value: Any, dropout: float, more: dict[str, Any]
) -> Tensor:
    for name in ("softcap", "position_bias"):
        if more.get(name) is not None:
            raise UnsupportedModelError(
                f"the attention function is given `{name}`, which caches that choose cannot heed"
            )
    if not getattr(call.module, "is_causal", True):
        raise UnsupportedModelError("its attention is not causal, as an encoder's is not")
    if dropout:
        raise CacheStateError("caches that choose are for generation: call model.eval() first")
    if not (isinstance(key, Held) and isinstance(value, Held)):
        raise layer.refusal()
    return layer.attend(call, key.held[0], value.held[0], more.get("sliding_window"))


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
