"""Factored keys: thin keys out of a trained model, out of nothing, and out of a checkpoint."""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from typing import Any, Literal, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from pamm_compile.decoding.attach import Seen, examine
from pamm_compile.decoding.thin import (
    ThinAttention,
    angles,
    normed,
    rotate,
    split,
    thin_class,
)
from pamm_compile.errors import InvalidOptionError, UnsupportedModelError

Rotary = Literal["before", "pairs"]
# Granite's, Mixtral's and many more are the same code as one of these.
_ROTARY = ("Llama", "Mistral", "Olmo2", "Qwen2", "Qwen3", "SmolLM3")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Model = TypeVar("_Model", bound=PreTrainedModel)


def factor_keys(model: _Model, rank: int, *, rotary: Rotary = "before") -> _Model:
    """Give a trained model thin keys: a truncated SVD of every head's key projection.

    Equivalent to, per key head, with W the rows of that head's key projection ([d, inputs]):

        u, s, v = torch.linalg.svd(W)
        W = u[:, :rank] @ (s[:rank, None] * v[:rank])       # keys: the second factor
        query = query @ u[:, :rank]                         # absorbed, where nothing stands between

    Rotary positions, and norms of keys, stand between the two factors and do not commute with them;
    GPT-2 and some layers of SmolLM3 have none. At full `rank` the scores are the model's own.

    Args:
        model: a decoder of Transformers with GPT-2's attention, or with the code of Llama's,
            Mistral's, OLMo 2's, Qwen2's, Qwen3's or SmolLM3's; changed in place.
        rank: r, dimensions of a cached key and head; from 1 to the width of a head, even for
            "pairs".
        rotary: "before": the cache holds r coordinates before rotation, and the angles of each
            token's position once; when read, whole keys are rebuilt, normalised and rotated. A
            cache that does not hand back all it was given, in order, gets whole keys, as do layers
            with a sliding window beside layers without. "pairs": each head keeps the r/2 rotary
            frequencies with the largest product of its key's and its queries' norms; nothing is
            rebuilt.

    Returns:
        `model`. `config.thin_keys` says what was done, and goes with a checkpoint.

    Raises:
        InvalidOptionError: a value is not allowed, or the keys are thin already.
        UnsupportedModelError: the attention is another, was changed, or has no weights in memory.

    Source: arXiv 2603.04427.
    """
    with torch.no_grad():
        _check(model, rank, rotary)
        _replace(model, rank, rotary, factored=True)
    return model


def thin_keys(model: _Model, rank: int, *, rotary: Rotary = "pairs") -> _Model:
    """Give a model that is yet to be trained queries and keys of r dimensions a head.

    Equivalent to a model class with r outputs a head in both projections, drawn anew, and rotary
    positions of r dimensions. Arguments, result and errors are those of `factor_keys`.

    Source: arXiv 2603.04427, models trained from scratch, with a quarter of the head.
    """
    deviation = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        _check(model, rank, rotary)
        for thin in _replace(model, rank, rotary, factored=False):
            for projection in (thin.q_proj, thin.k_proj):
                nn.init.normal_(projection.weight, std=deviation)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            if getattr(thin, "way", None) == "before":
                for head in thin.key_basis:
                    head.copy_(nn.init.orthogonal_(torch.empty(rank, thin.head_dim)))
    return model


def train_queries_and_keys(model: PreTrainedModel) -> list[nn.Parameter]:
    """Freeze everything but what makes queries and keys, as the fine-tuning after factoring does.

    Equivalent to `requires_grad_(False)` on a model with thin keys and `requires_grad_(True)` on
    its query and key projections, which are returned for an optimiser.

    Raises:
        UnsupportedModelError: the model has no thin keys.

    Source: arXiv 2603.04427, QK fine-tuning.
    """
    modules: list[Any] = [m for m in model.modules() if isinstance(m, ThinAttention)]
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no thin keys; call factor_keys or thin_keys first"
        )
    model.requires_grad_(False)
    chosen: list[nn.Parameter] = []
    for module in modules:
        own = module.named_parameters()
        chosen += [p for name, p in own if name.startswith(("q_proj.", "k_proj.", "key_"))]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def load_thin(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a model with thin keys from a folder that `save_pretrained` wrote.

    Equivalent to `from_pretrained(path, **options)` of the class it was saved from, if that had
    thin keys; as it is, Transformers refuses the shapes.

    Raises:
        UnsupportedModelError: the configuration has no `thin_keys`.
        InvalidOptionError: the weights are others than the model's.
    """
    settings: Any = AutoConfig.from_pretrained(path)
    thin = getattr(settings, "thin_keys", None)
    if thin is None:
        raise UnsupportedModelError(
            f"{path} holds no model with thin keys: its configuration has no `thin_keys`; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    saved = (settings.architectures or [""])[0]
    auto: Any = AutoModelForCausalLM
    kind: Any = getattr(transformers, saved, None) or auto._model_mapping[type(settings)]

    def build(self: Any, config: Any, *args: Any, **more: Any) -> None:
        kind.__init__(self, config, *args, **more)
        with torch.no_grad():
            _replace(self, thin["rank"], thin["rotary"], factored=False)

    # Transformers loads into a class, in its own order: sizes first, then weights.
    thin_kind: Any = type(kind.__name__, (kind,), {"__init__": build, "__module__": __name__})
    model, report = thin_kind.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    wrong = {name: sorted(map(str, found)) for name, found in report.items() if found}
    if wrong:
        raise InvalidOptionError(
            f"{path} does not hold the weights of {kind.__name__} with thin keys: {wrong}"
        )
    model.__class__ = kind
    return cast(PreTrainedModel, model)


def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    """What a class computes in `forward`, whatever it and its helpers are called."""
    code = inspect.unwrap(kind.forward).__code__
    return code.co_code, code.co_names, code.co_varnames, code.co_consts[1:]


_KNOWN = {
    _code(getattr(import_module(f"transformers.models.{f.lower()}.modeling_{f.lower()}"), name))
    for f, name in ((family, f"{family}Attention") for family in _ROTARY)
}


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, GPT2Attention):
        return type(module) is GPT2Attention and not module.is_cross_attention
    return hasattr(module, "k_proj") and _code(type(module)) in _KNOWN


def _check(model: Any, rank: Any, rotary: str) -> None:
    """Refuse whatever could not be factored before anything is changed."""
    if rotary not in ("before", "pairs"):
        raise InvalidOptionError(f"rotary must be 'before' or 'pairs', got {rotary!r}")
    if getattr(model.config, "thin_keys", None) is not None:
        raise InvalidOptionError(f"the keys are thin already: {model.config.thin_keys}")
    known = [module for module in model.modules() if _is_known(module)]
    for module in known:
        _check_weights(module)
    given: dict[nn.Module, dict[str, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = {**dict(zip(("hidden_states",), args, strict=False)), **kwargs}

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in known]
    try:
        found = examine(model)
    finally:
        for hook in hooks:
            hook.remove()
    for seen in found:
        module = seen.call.module
        if module not in given:
            raise UnsupportedModelError(
                f"{type(module).__name__} is no attention that keys can be factored in; known are "
                f"GPT-2's, and what is the code of that of {', '.join(_ROTARY)}"
            )
        _check_rank(rank, module, rotary)
        if not isinstance(module, GPT2Attention):
            _check_formula(seen, **given[module])


def _check_rank(rank: Any, module: Any, rotary: str) -> None:
    if not isinstance(rank, int) or not 1 <= rank <= module.head_dim:
        raise InvalidOptionError(
            "rank counts the dimensions of a head's keys: an integer from 1 to "
            f"{module.head_dim} here, got {rank!r}"
        )
    if rotary == "pairs" and rank % 2 and not isinstance(module, GPT2Attention):
        raise InvalidOptionError(f"rotary='pairs' keeps pairs: rank must be even, got {rank}")


def _check_weights(module: Any) -> None:
    fused = isinstance(module, GPT2Attention)
    for name in ("c_attn",) if fused else ("q_proj", "k_proj"):
        found, expected = getattr(module, name), Conv1D if fused else nn.Linear
        what = f"{type(module).__name__}.{name}"
        if type(found) is not expected:
            raise UnsupportedModelError(
                f"{what} is a {type(found).__module__}.{type(found).__name__}, not a plain "
                f"{expected.__name__}; merge adapters (merge_and_unload) and dequantise before "
                "factoring keys"
            )
        weight = found.weight
        if weight.is_meta or type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
            where = "on the meta device or offloaded" if weight.is_meta else f"of {weight.dtype}"
            raise UnsupportedModelError(
                f"{what}.weight is a {type(weight).__name__} {where}; load the model whole, and "
                "dequantised, before factoring keys"
            )
    # Hooks of accelerate stand before the forward of the class; others stand in its place.
    replaced = "forward" in vars(module) and "_old_forward" not in vars(module)
    if replaced or (fused and module.reorder_and_upcast_attn):
        raise UnsupportedModelError(
            f"{type(module).__name__} has another forward than its class, or GPT-2's of "
            "reorder_and_upcast_attn; factor keys without that"
        )


def _check_formula(seen: Seen, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> None:
    """Hold what the module gave to what the thin modules take it to compute."""
    module: Any = seen.call.module
    d, rotates = module.head_dim, getattr(module, "use_rope", True)
    # One window of angles is for a whole head, in two equal halves or as one of them.
    fits = position_embeddings[0].shape[-1] in (d, d // 2) and seen.call.sinks is None
    if fits:
        pairs = [(seen.value, split(module.v_proj(hidden_states), d))]
        for name, given in (("q", seen.call.query), ("k", seen.key)):
            x = split(getattr(module, f"{name}_proj")(hidden_states), d)
            x = normed(module, f"{name}_norm", x)
            pairs.append((given, rotate(x, *angles(module, position_embeddings)) if rotates else x))
        allowed = 3e-2 if seen.key.dtype in (torch.float16, torch.bfloat16) else 1e-3
        fits = all(bool((a - b).norm() <= allowed * a.norm()) for a, b in pairs)
    if not fits:
        raise UnsupportedModelError(
            f"{type(module).__name__} makes its queries and keys in another way than Llama's "
            "projections, norms of heads and rotation of halves; its keys cannot be factored"
        )


def _replace(model: Any, rank: int, rotary: str, *, factored: bool) -> list[Any]:
    """Make the attention modules thin, of their own weights or with none that mean anything."""
    known: list[Any] = [module for module in model.modules() if _is_known(module)]
    windows = [
        getattr(m, "sliding_window", getattr(m.config, "sliding_window", None)) for m in known
    ]
    leads = True
    for module, window in zip(known, windows, strict=True):
        gpt2 = isinstance(module, GPT2Attention)
        kind: Any = type(module)
        module.__class__ = thin_class(kind)
        if "_old_forward" in vars(module):
            # Where accelerate's hooks have put themselves in front.
            module._old_forward = module.__class__.forward.__get__(module)
        module.rank = rank
        if gpt2:
            _unfuse(module)
        module.way = "absorbed" if gpt2 or not getattr(module, "use_rope", True) else rotary
        module.keeps = module.way == "before" and (window is None or None not in windows)
        module.leads = module.keeps and leads
        leads = leads and not module.keeps
        {"absorbed": _absorb, "before": _factor_before, "pairs": _choose_pairs}[module.way](
            module, rank, factored
        )
    model.config.thin_keys = {"rank": rank, "rotary": rotary}
    return known


def _linear(like: nn.Linear | Conv1D, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    weight = like.weight
    options = {"bias": bias, "device": weight.device, "dtype": weight.dtype}
    return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, **options))


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split [heads, d, inputs] into bases [heads, d, r] and coordinates [heads, r, inputs]."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[..., :rank], s[..., :rank, None] * v[..., :rank, :]


def _absorb(module: Any, rank: int, factored: bool) -> None:
    old_q, old_k, d = module.q_proj, module.k_proj, module.head_dim
    heads, members = old_k.out_features // d, old_q.out_features // d
    module.q_proj = _linear(old_q, old_q.in_features, members * rank, old_q.bias is not None)
    # A bias of the keys adds the same to all scores of a query, which softmax takes out again.
    module.k_proj = _linear(old_k, old_k.in_features, heads * rank, False)
    if factored:
        _fill_absorbed(module, _wide(old_k.weight), _wide(old_q.weight), old_q.bias)


def _fill_absorbed(module: Any, key: Tensor, query: Tensor, bias: Tensor | None) -> None:
    """Factor keys [key heads * d, inputs], and put the bases into queries [heads * d, inputs]."""
    key, query = (w.unflatten(0, (-1, module.head_dim)) for w in (key, query))
    basis, coordinates = _truncate(key, module.rank)
    absorb = basis.transpose(1, 2).repeat_interleave(len(query) // len(key), 0)
    module.k_proj.weight.copy_(coordinates.flatten(0, 1))
    module.q_proj.weight.copy_((absorb @ query).flatten(0, 1))
    if bias is not None:
        module.q_proj.bias.copy_((absorb @ _wide(bias).view(len(query), -1, 1)).flatten())


def _factor_before(module: Any, rank: int, factored: bool) -> None:
    old, d = module.k_proj, module.head_dim
    heads = old.out_features // d
    module.k_proj = _linear(old, old.in_features, heads * rank, False)
    module.key_basis = nn.Parameter(old.weight.new_empty(heads, rank, d))
    bias = None if old.bias is None else nn.Parameter(old.bias.detach().view(heads, d).clone())
    module.register_parameter("key_bias", bias)
    if factored:
        basis, coordinates = _truncate(_wide(old.weight).unflatten(0, (heads, d)), rank)
        module.k_proj.weight.copy_(coordinates.flatten(0, 1))
        module.key_basis.copy_(basis.transpose(1, 2))


def _choose_pairs(module: Any, rank: int, factored: bool) -> None:
    d, groups = module.head_dim, module.num_key_value_groups
    half, kept = d // 2, rank // 2
    heads = module.k_proj.out_features // d
    # Frequencies i·d/r are those of a rotary embedding of r dimensions.
    even = torch.arange(kept, device=module.k_proj.weight.device) * half // kept
    module.register_buffer("pairs", even.expand(heads, -1).clone())
    norms = getattr(module, "k_norm", None) is not None
    # [key heads, queries of the head or 1, 2, frequencies, inputs (and a bias)]
    views: dict[str, Tensor] = {}
    energy = torch.ones((), device=even.device)
    for name, members in (("q", groups), ("k", 1)):
        old = getattr(module, f"{name}_proj")
        weight = old.weight if old.bias is None else torch.cat([old.weight, old.bias[:, None]], 1)
        views[name] = _wide(weight).view(heads, members, 2, half, -1)
        scale = views[name].new_ones(1, 1, 2, half)
        if norms:
            scale = _wide(getattr(module, f"{name}_norm").weight).view(-1, 2, half)
            scale = scale.view(heads, members, 2, half) if len(scale) > 1 else scale[None]
        energy = energy * (views[name] * scale[..., None]).square().sum((1, 2, 4))
    if factored:
        module.pairs.copy_(energy.topk(kept, dim=-1).indices.sort(dim=-1).values)
    if norms:
        return
    for name, view in views.items():
        old, outputs = getattr(module, f"{name}_proj"), heads * view.shape[1] * rank
        thin = _linear(old, old.in_features, outputs, old.bias is not None)
        if factored:
            index = module.pairs[:, None, None, :, None].expand(
                -1, *view.shape[1:3], -1, view.shape[4]
            )
            rows = view.gather(3, index).reshape(outputs, -1)
            thin.weight.copy_(rows[:, : old.in_features])
            if thin.bias is not None:
                thin.bias.copy_(rows[:, -1])
        setattr(module, f"{name}_proj", thin)


def _unfuse(module: Any) -> None:
    """Give GPT-2's attention the projections that Llama's has."""
    old, width = module.c_attn, module.embed_dim
    module.num_key_value_groups, module.attention_dropout = 1, module.attn_dropout.p
    make_conv: Any = Conv1D
    module.c_attn = make_conv(width, width).to(device=old.weight.device, dtype=old.weight.dtype)
    weights, biases = old.weight.chunk(3, dim=1), old.bias.chunk(3)
    for name, weight, bias in zip(("q_proj", "k_proj"), weights, biases, strict=False):
        projection = _linear(old, width, width, True)
        projection.weight.copy_(weight.T)
        projection.bias.copy_(bias)
        setattr(module, name, projection)
    module.c_attn.weight.copy_(weights[2])
    module.c_attn.bias.copy_(biases[2])
