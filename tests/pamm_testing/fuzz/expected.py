"""What the architecture of a spec says about each of its projections, without looking at graphs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from pamm_testing.fuzz.blocks import Attention, Block, Model
from pamm_testing.fuzz.products import LoRA
from pamm_testing.fuzz.spec import Spec


@dataclass(frozen=True)
class Expected:
    """The outcome per weight, and how many inputs are compressed (None if that is open)."""

    outcomes: dict[str, str]
    """ "compressed" or the name of a Reason."""
    sites: int | None


@dataclass
class _Stream:
    """An input of projections: who reads it, and whether another gradient does too."""

    tokens: int
    weights: list[tuple[str, bool]]
    shared: bool


def expect(spec: Spec, model: Model) -> Expected | None:
    """Return the outcome of every projection of attention; None where the rules below are silent.

    Args:
        spec: with `targets="qkv"`, and a residual stream; for others the result is None.
        model: built from it.
    """
    if spec.targets != "qkv" or spec.order == "bare" or spec.has_products_of_elements:
        return None
    if spec.tail != "none":
        # Some attend too, to what the last block made.
        return None
    if spec.norm == "layer_plain" and spec.decompose:
        # Its backward pass computes what it returned again, in some dtypes by the same calls.
        return None
    names = {id(p): n for n, p in model.named_parameters()}
    streams: dict[object, _Stream] = {}
    outcomes: dict[str, set[str]] = defaultdict(set)

    def add(key: object, tokens: int, shared: bool, module: nn.Module) -> None:
        stream = streams.setdefault(key, _Stream(tokens, [], False))
        stream.shared |= shared
        for name, parameter in module.named_parameters():
            if "bias" not in name:
                stream.weights.append((names[id(parameter)], parameter.requires_grad))

    def add_projection(
        key: object, number: int, tokens: int, shared: bool, module: nn.Module
    ) -> None:
        if not isinstance(module, LoRA):
            add(key, tokens, shared, module)
            return
        add(key, tokens, shared, module.base)
        if module.dropout:
            # Each use draws a mask of its own.
            add((key, number, id(module)), tokens, False, module.a)
        else:
            add(key, tokens, shared, module.a)
        trained = module.b.weight.requires_grad
        outcomes[names[id(module.b.weight)]].add("NARROW_INPUT" if trained else "NO_WEIGHT_GRAD")

    order = [*model.blocks, *([model.blocks[0]] if spec.shared == "block_twice" else [])]
    for number, block in enumerate(order):
        assert isinstance(block, Block)
        for part in (block.attention, block.cross):
            if part is None:
                continue
            key, shared = _input_of(spec, block, number, part)
            crosses = part is block.cross or block.crosses
            # named_children() would pass over the second of two roles that are one module.
            for role, module in part.project._modules.items():
                assert module is not None
                if crosses and role != "q":
                    add_projection("memory", number, spec.batch * spec.memory_length, False, module)
                else:
                    add_projection(key, number, spec.batch * spec.length, shared, module)

    compressed = 0
    for stream in streams.values():
        outcome = _outcome(spec, stream)
        compressed += outcome == "compressed"
        for name, trained in stream.weights:
            if trained or outcome != "compressed":
                outcomes[name].add(outcome)
    if any(len(found) > 1 for found in outcomes.values()):
        # A shared weight may be compressed at one of its inputs and exact at the other.
        return None
    single = {name: found.pop() for name, found in outcomes.items()}
    # A product may read the same elements through another chain of views than its neighbour.
    mixed = spec.order.startswith("parallel") and spec.cross == "after_self"
    return Expected(single, None if mixed else compressed)


def _input_of(spec: Spec, block: Block, number: int, part: Attention) -> tuple[object, bool]:
    """Return what identifies the input of an attention, and whether another gradient reads it."""
    second = part is block.cross
    parallel = spec.order in ("parallel", "parallel_norms")
    key = (number, second and not parallel)
    mlp_trained = block.mlp is not None and block.mlp.up.weight.requires_grad
    same_input = spec.order == "parallel" or (
        # Not two norms that compute the same: the compiler makes one of them.
        spec.order == "parallel_norms"
        and (spec.norm in ("none", "layer_plain") or spec.shared == "norm")
    )
    with_mlp = same_input and mlp_trained
    # The backward pass of tanh and relu reads what they returned.
    activation = spec.norm in ("tanh", "relu")
    raw = spec.order == "post" and number == 0 and not second
    differentiated = (
        spec.input_grad
        or spec.projected
        or number > 0
        or "norm" not in spec.frozen
        or (second and not parallel)
    )
    return key, with_mlp or (activation and not raw and differentiated)


def _outcome(spec: Spec, stream: _Stream) -> str:
    if not any(trained for _, trained in stream.weights):
        return "NO_WEIGHT_GRAD"
    if spec.checkpoint:
        return "RECOMPUTED"
    if stream.tokens < spec.min_tokens:
        return "TOO_FEW_TOKENS"
    return "SHARED_INPUT" if stream.shared else "compressed"
