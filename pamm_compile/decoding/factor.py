"""Factored keys: thin keys out of a trained model, out of nothing, and out of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pamm_compile.decoding.thin import LateRotaryAttention, ThinGPT2Attention, ThinRotaryAttention
from pamm_compile.errors import InvalidOptionError, UnsupportedModelError

Rotary = Literal["before", "pairs"]
_ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
_THIN = (ThinGPT2Attention, ThinRotaryAttention, LateRotaryAttention)
_Model = TypeVar("_Model", bound=PreTrainedModel)
_Thin = ThinGPT2Attention | ThinRotaryAttention | LateRotaryAttention


def factor_keys(model: _Model, rank: int, *, rotary: Rotary = "before") -> _Model:
    """Give a trained model thin keys: a truncated SVD of every head's key projection.

    Equivalent to, per key head, with W the rows of that head's key projection ([d, inputs]):

        u, s, v = torch.linalg.svd(W)
        W = u[:, :rank] @ (s[:rank, None] * v[:rank])       # keys: the second factor
        query = query @ u[:, :rank]                         # absorbed, where nothing stands between

    Without rotary positions (GPT-2) the first factor is absorbed into the query projection, and
    nothing but the truncation changes any score. Rotary positions stand between the two factors, so
    that they do not commute with a change of basis across frequencies. Two ways are offered:

    - "before": the cache holds the keys' r coordinates before rotation; when read, whole keys are
      rebuilt and rotated. Scores are exactly those of the truncated projection. The cache is as
      small as without rotary positions, the arithmetic of a step grows by r multiplications for
      each number of a whole key.
    - "pairs": in place of singular directions each head keeps the r/2 rotary frequencies with the
      largest product of its key's and its queries' norms. Scores are exactly those of the model
      without the other frequencies; queries and keys are thin, nothing is rebuilt.

    At `rank` equal to the head's width all of them give the model's own scores up to rounding.

    Args:
        model: a causal language model of Transformers with Llama's, Mistral's, Qwen2's or GPT-2's
            attention; changed in place.
        rank: r, dimensions of a cached key and head; from 1 to the width of a head, even for
            "pairs".
        rotary: "before" or "pairs"; without meaning for GPT-2.

    Returns:
        `model`, for chaining. `config.thin_keys` says what was done, and goes with a checkpoint.

    Raises:
        InvalidOptionError: a value is not allowed, or the keys are thin already.
        UnsupportedModelError: no attention module known here, or one that was changed.

    Source: arXiv 2603.04427.
    """
    with torch.no_grad():
        for original, thin in _replace(model, rank, rotary):
            if isinstance(thin, ThinGPT2Attention):
                _factor_gpt2(original, thin)
            elif isinstance(thin, ThinRotaryAttention):
                _choose_pairs(original, thin)
            else:
                _factor_before(original, thin)
    return model


def thin_keys(model: _Model, rank: int, *, rotary: Rotary = "pairs") -> _Model:
    """Give a model that is yet to be trained queries and keys of r dimensions a head.

    Equivalent to a model class whose query and key projections have r outputs a head, the values d;
    with rotary positions of r dimensions.

    Args:
        model: as in `factor_keys`, with fresh weights; changed in place.
        rank: r, dimensions of a query and of a key; the paper trains with a quarter of the head.
        rotary: as in `factor_keys`.

    Returns:
        `model`, its query and key projections drawn anew as the configuration says.

    Raises:
        InvalidOptionError: a value is not allowed, or the keys are thin already.
        UnsupportedModelError: no attention module known here, or one that was changed.

    Source: arXiv 2603.04427, models trained from scratch.
    """
    deviation = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for original, thin in _replace(model, rank, rotary):
            for projection in (thin.q_proj, thin.k_proj):
                nn.init.normal_(projection.weight, std=deviation)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            if isinstance(thin, ThinGPT2Attention):
                _copy_values(original, thin)
    return model


def train_queries_and_keys(model: PreTrainedModel) -> list[nn.Parameter]:
    """Freeze everything but what makes queries and keys, as the fine-tuning after factoring does.

    Equivalent to `requires_grad_(False)` on the model and `requires_grad_(True)` on its query and
    key projections.

    Args:
        model: a model with thin keys; changed in place.

    Returns:
        The parameters left to train, for an optimiser.

    Raises:
        UnsupportedModelError: the model has no thin keys.

    Source: arXiv 2603.04427, QK fine-tuning.
    """
    modules = [m for m in model.modules() if isinstance(m, _THIN)]
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no thin keys; call factor_keys or thin_keys first"
        )
    model.requires_grad_(False)
    chosen: list[nn.Parameter] = []
    for module in modules:
        chosen += [*module.q_proj.parameters(), *module.k_proj.parameters()]
        if isinstance(module, LateRotaryAttention):
            chosen += [p for p in (module.key_basis, module.key_bias) if p is not None]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def load_thin(path: str | os.PathLike[str], **config: Any) -> PreTrainedModel:
    """Load a model with thin keys from a folder that `save_pretrained` wrote.

    Equivalent to `AutoModelForCausalLM.from_pretrained(path)` for a class that had thin keys.
    Transformers' own loader refuses such a folder, since its shapes are others.

    Args:
        path: a local folder.
        config: values of the configuration to override, as `AutoConfig.from_pretrained` takes them.

    Returns:
        The model, in evaluation mode, in the dtype it was saved in.

    Raises:
        UnsupportedModelError: the folder's configuration has no `thin_keys`.
        InvalidOptionError: there are no weights in the folder, or others than the model's.
    """
    settings: Any = AutoConfig.from_pretrained(path, **config)
    thin = getattr(settings, "thin_keys", None)
    if thin is None:
        raise UnsupportedModelError(
            f"{path} holds no model with thin keys: its configuration has no `thin_keys`; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    # Left in, `_replace` would take the model for one that is thin already.
    del settings.thin_keys
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(settings, dtype=settings.dtype)
    thin_keys(model, thin["rank"], rotary=thin["rotary"])
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights.update(load_file(file))
    found = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    missing = set(found.missing_keys) - set(model.all_tied_weights_keys)
    if missing or found.unexpected_keys:
        raise InvalidOptionError(
            f"{path} does not hold the weights of {type(model).__name__} with thin keys: missing "
            f"{sorted(missing)}, unexpected {found.unexpected_keys}"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _replace(model: PreTrainedModel, rank: int, rotary: str) -> Iterator[tuple[Any, _Thin]]:
    """Check all of the model, then put thin modules in place, each with the one it replaces."""
    if rotary not in ("before", "pairs"):
        raise InvalidOptionError(f"rotary must be 'before' or 'pairs', got {rotary!r}")
    if getattr(model.config, "thin_keys", None) is not None:
        raise InvalidOptionError(f"the keys are thin already: {model.config.thin_keys}")
    found: list[tuple[nn.Module, str, Any, Callable[[], _Thin]]] = []
    for parent in model.modules():
        for name, child in parent.named_children():
            kind: Any = child
            if type(child).__name__ in _ROTARY:
                _check_rotary(kind, rank, rotary)
                embedding = getattr(model.base_model, "rotary_emb", None)
                found.append((parent, name, child, _rotary_maker(kind, rank, rotary, embedding)))
            elif type(child).__name__ == "GPT2Attention" and not kind.is_cross_attention:
                _check_gpt2(kind, rank)
                found.append((parent, name, child, partial(ThinGPT2Attention, kind, rank)))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention module that keys can be factored in; known "
            f"are {', '.join(_ROTARY)} and GPT2Attention"
        )
    for parent, name, child, make in found:
        thin = make()
        setattr(parent, name, thin)
        yield child, thin
    model.config.thin_keys = {"rank": rank, "rotary": rotary}


def _rotary_maker(
    original: Any, rank: int, rotary: str, embedding: nn.Module | None
) -> Callable[[], _Thin]:
    if rotary == "pairs":
        return partial(ThinRotaryAttention, original, rank)
    kind = getattr(embedding, "rope_type", None)
    if embedding is None or kind in (None, "dynamic", "longrope"):
        raise UnsupportedModelError(
            "keys cached before rotation need one set of rotary frequencies for all positions, and "
            f"this model's are of type {kind!r}, which change with the length; use rotary='pairs'"
        )
    return partial(LateRotaryAttention, original, rank, embedding)


def _check_rank(rank: int, width: int) -> None:
    if not isinstance(rank, int) or not 1 <= rank <= width:
        raise InvalidOptionError(
            f"rank counts the dimensions of a head's keys: an integer from 1 to {width} here, got "
            f"{rank!r}"
        )


def _check_rotary(module: Any, rank: int, rotary: str) -> None:
    _check_rank(rank, module.head_dim)
    if rotary == "pairs" and rank % 2:
        raise InvalidOptionError(f"rotary='pairs' keeps pairs: rank must be even, got {rank}")
    for name in ("q_proj", "k_proj"):
        _check_type(module, name, nn.Linear)


def _check_gpt2(module: Any, rank: int) -> None:
    _check_rank(rank, module.head_dim)
    _check_type(module, "c_attn", Conv1D)
    if module.reorder_and_upcast_attn:
        raise UnsupportedModelError(
            "GPT-2 with reorder_and_upcast_attn=True has an attention of its own; set it to False"
        )


def _check_type(module: Any, name: str, expected: type) -> None:
    if type(getattr(module, name)) is not expected:
        raise UnsupportedModelError(
            f"{type(module).__name__}.{name} is a {type(getattr(module, name)).__name__}, not a "
            f"plain {expected.__name__}; merge adapters and dequantise before factoring keys"
        )


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split [heads, d, inputs] into bases [heads, d, r] and coordinates [heads, r, inputs]."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[..., :rank], s[..., :rank, None] * v[..., :rank, :]


def _factor_before(original: Any, thin: LateRotaryAttention) -> None:
    weight = _wide(original.k_proj.weight).unflatten(0, (thin.key_heads, thin.head_dim))
    basis, coordinates = _truncate(weight, thin.rank)
    thin.k_proj.weight.copy_(coordinates.flatten(0, 1))
    thin.key_basis.copy_(basis.transpose(1, 2))
    if thin.key_bias is not None:
        thin.key_bias.copy_(original.k_proj.bias.view_as(thin.key_bias))
    thin.q_proj.weight.copy_(original.q_proj.weight)
    if thin.q_proj.bias is not None:
        thin.q_proj.bias.copy_(original.q_proj.bias)


def _factor_gpt2(original: Any, thin: ThinGPT2Attention) -> None:
    heads = (thin.num_heads, thin.head_dim)
    query, key, _ = _wide(original.c_attn.weight).T.chunk(3)
    query_bias = original.c_attn.bias.chunk(3)[0]
    basis, coordinates = _truncate(key.unflatten(0, heads), thin.rank)
    absorb = basis.transpose(1, 2)
    thin.k_proj.weight.copy_(coordinates.flatten(0, 1))
    thin.q_proj.weight.copy_((absorb @ query.unflatten(0, heads)).flatten(0, 1))
    thin.q_proj.bias.copy_((absorb @ _wide(query_bias).view(*heads, 1)).flatten())
    _copy_values(original, thin)


def _copy_values(original: Any, thin: ThinGPT2Attention) -> None:
    thin.c_attn.weight.copy_(original.c_attn.weight.chunk(3, dim=1)[2])
    thin.c_attn.bias.copy_(original.c_attn.bias.chunk(3)[2])


def _choose_pairs(original: Any, thin: ThinRotaryAttention) -> None:
    heads, groups, d = thin.key_heads, thin.num_key_value_groups, thin.head_dim
    # [key heads, queries of the head or 1, 2, frequencies, inputs (and a bias)]
    views = {}
    for name, members in (("q_proj", groups), ("k_proj", 1)):
        projection = getattr(original, name)
        weight = projection.weight
        if projection.bias is not None:
            weight = torch.cat([weight, projection.bias[:, None]], dim=1)
        views[name] = _wide(weight).view(heads, members, 2, d // 2, -1)
    energy = views["k_proj"].square().sum((1, 2, 4)) * views["q_proj"].square().sum((1, 2, 4))
    pairs = energy.topk(thin.rank // 2, dim=-1).indices.sort(dim=-1).values
    thin.pairs.copy_(pairs)
    for name, view in views.items():
        index = pairs[:, None, None, :, None].expand(-1, *view.shape[1:3], -1, view.shape[4])
        rows = view.gather(3, index).reshape(-1, view.shape[4])
        projection = getattr(thin, name)
        projection.weight.copy_(rows[:, : projection.in_features])
        if projection.bias is not None:
            projection.bias.copy_(rows[:, -1])
