"""What a model's attention offers, found by running it on three tokens; and `attach`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from pamm_compile.decoding.attention import ATTENTION, Call
from pamm_compile.decoding.store import ChoosingCache, WholeLayer
from pamm_compile.errors import UnsupportedModelError

_Model = TypeVar("_Model", bound=PreTrainedModel)


def attach(model: _Model) -> _Model:
    """Let a model's caches choose what its queries attend to.

    Equivalent to `model.set_attn_implementation("sdpa")`, until a cache of this package is passed.
    The model runs on three tokens, which shows whether its attention lets a cache choose.

    Args:
        model: a decoder of Transformers; changed in place. Layers with a sliding window keep it.

    Returns:
        `model`, for chaining.

    Raises:
        UnsupportedModelError: its attention does not offer what a cache needs, with the reason.
    """
    base = _base(model)
    name = type(base).__name__
    if all(seen.window is not None for seen in examine(model)):
        raise UnsupportedModelError(
            f"every layer of {name} has a sliding window, so that a cache has nothing to choose "
            "(config.sliding_window = None makes it full attention)"
        )
    base.set_attn_implementation(ATTENTION)
    if (own := getattr(type(base), "prepare_inputs_for_generation", None)) is not None:
        # Generation knows what is prompt; its last chunk may be one token, as every new token is.
        prepare: Any = partial(_prepare, base)
        prepare.__signature__ = inspect.signature(own)
        vars(base)["prepare_inputs_for_generation"] = prepare
    return model


def _prepare(model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Tell the cache which tokens are prompt, then do what the model's class does."""
    cache = kwargs.get("cache")
    if isinstance(cache, ChoosingCache) and kwargs.get("is_first_iteration"):
        new = kwargs.get("next_sequence_length") or input_ids.shape[1]
        cache.prompt_length = cache.get_seq_length() + new
    return type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)


class Seen(NamedTuple):
    """What one attention module did with three tokens."""

    call: Call
    key: Tensor
    value: Tensor
    window: int | None


def examine(model: nn.Module) -> list[Seen]:
    """Run a decoder, with adapters of PEFT or not, on three tokens with a cache that watches.

    Returns:
        An entry for every attention module that gave keys to the cache, in order.

    Raises:
        UnsupportedModelError: it cannot be run so, or a cache could not choose; with the reason.
    """
    base = _base(model)
    name = type(base).__name__
    types = _check_kind(base, name)
    watching = ChoosingCache(_WatchingLayer, 0)
    before = base.config._attn_implementation
    modes = [(module, module.training) for module in base.modules()]
    base.set_attn_implementation(ATTENTION)
    base.eval()
    here = next(p.device for p in base.parameters() if not p.is_meta)
    try:
        with torch.no_grad():
            base(input_ids=torch.tensor([[1, 2, 3]], device=here), cache=watching, use_cache=True)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    finally:
        base.set_attn_implementation(before)
        for module, training in modes:
            module.training = training
    found = [layer.witnessed for layer in watching.layers if isinstance(layer, _WatchingLayer)]
    if not found or None in found:
        raise UnsupportedModelError(
            f"{name} does not call its attention through Transformers' attention interface"
        )
    seen = [each for each in found if each is not None]
    if [each.window is not None for each in seen] != [t == "sliding_attention" for t in types]:
        raise UnsupportedModelError(
            f"the layers of {name} see other windows than its configuration says: {types}"
        )
    return seen


def _base(model: nn.Module) -> Any:
    """The model of Transformers inside the wrapper of PEFT."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _check_kind(base: Any, name: str) -> list[str]:
    """Refuse what is no decoder of layers known here; gives the types of its layers."""
    parameters = inspect.signature(base.forward).parameters
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is no decoder of Transformers; only those are treated")
    if not {"input_ids", "cache"} <= set(parameters):
        raise UnsupportedModelError(f"{name}.forward takes no `input_ids` or no `cache`")
    if all(p.is_meta for p in base.parameters()):
        raise UnsupportedModelError(f"{name} has its weights on the meta device; load them first")
    config = base.config.get_text_config(decoder=True)
    types = get_layer_types_and_kwargs(config)[0]
    if other := set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(sorted(other))}; caches that choose hold layers "
            "of full attention and of sliding windows"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{name} caps its attention scores, which SDPA cannot do")
    return types


class _WatchingLayer(WholeLayer):
    witnessed: Seen | None = None

    def refusal(self) -> Exception:
        return UnsupportedModelError(
            "what Cache.update returns is not handed to the attention function as it is: the cache "
            "holds latents, as with MLA, or the attention is one of the model's own"
        )

    def attend(self, call: Call, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        self.witnessed = Seen(call, key, value, window)
        return super().attend(call, key, value, None)
