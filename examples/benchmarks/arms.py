"""The ways to run a training step that are compared."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, nn

import pamm_compile
from examples.benchmarks.models import Case, precision
from pamm_compile.options import Goal

REFERENCE = "compile"
"""The arm that step times are divided by."""
PAPER = "qkv=pamm:{ratio:g}"
"""The paper's method on the paper's projections; `ratio` is the case's."""
WHOLE = "linear=subspace"
"""Every linear layer, by the method whose loss allows it, at its defaults."""
SHORT = "linear=subspace:0.0625"
"""The same with half the directions."""
UNEVEN = "/lm_head/=exact, /down_proj/=subspace:96:bits=None, linear=subspace:0.0625:bits=None"
"""Of blocks only; not rounded, half the directions, and more at down, whose input has most."""
DRAWN = {
    name: UNEVEN.replace("bits=None", f"bits=None:candidates={options}")
    for name, options in (("1.5", "1.5"), ("1.5, fewer rows", "1.5:rows=8"), ("2", "2"))
}
"""The same number of directions, drawn in each step of so many times as many."""
PEER = {
    "activation_quantization_aten_pass": {
        # Torch's pass leaves smaller tensors alone; 100 are its default.
        "size_in_mb": 1,
        "quant_type": "torch.float8_e4m3fn",
        "use_scaling": True,
        # Parameters, which exist with or without a backward pass, would be kept once more.
        "exclude_primals": True,
    }
}
"""Torch's own quantization of what is saved, as Inductor's `post_grad_fusion_options`."""


NEARLY_EXACT: dict[str, dict[str, Any]] = {
    "8 bits": {"rules": "linear=quantized:8"},
    "4 bits": {"rules": "linear=quantized:4"},
    "gradient subspace": {"rules": "linear=gradients"},
    "torch's 8 bits": {"peer": True},
}
"""What differs from compile, of arms that keep most of what gradients are made of."""


@dataclass(frozen=True)
class Arm:
    """One way to run a training step."""

    name: str
    compiled: bool = True
    rules: str = ""
    """As `pamm_compile.backend(rules=…)`; none for an exact arm."""
    budget: float = 1.0
    """Fraction of activation memory to keep; 1 is torch's default."""
    aggressive: bool = False
    checkpointed: bool = False
    """Every block of the model is checkpointed."""
    peer: bool = False
    """Torch's own pass keeps all that is saved in bfloat16 in float8, with a scale a token."""
    goal: Goal | None = None
    """As `pamm_compile.backend(goal=…)`; None for what `backend_of` says."""
    mode: str | None = None
    """As torch.compile's."""
    float8: bool = False
    """Forward and for dX the blocks multiply in float8, for dW in 16 bits."""
    compresses: frozenset[str] = frozenset()
    """Projections whose inputs it compresses in every layer; none if the name says nothing."""
    may_compress: frozenset[str] = frozenset()
    """Others that it may compress: where the model of the time decides."""

    @property
    def approximates(self) -> bool:
        """Whether weight gradients are approximate."""
        return bool(self.rules)

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set torch.compile as this arm is compiled."""
        with (
            functorch_config.patch(
                activation_memory_budget=self.budget, aggressive_recomputation=self.aggressive
            ),
            inductor_config.patch(post_grad_fusion_options=PEER if self.peer else {}),
        ):
            yield


ARMS = (
    Arm(REFERENCE),
    Arm("PAMM", rules=PAPER),
    Arm("whole model", rules=WHOLE),
    Arm("compile + budget 0.99", budget=0.99),
    Arm("PAMM + budget 0.99", rules=PAPER, budget=0.99),
    Arm("whole model + budget 0.99", rules=WHOLE, budget=0.99),
    Arm("whole model, rank 1/16", rules=SHORT),
    Arm("whole model, rank 1/16 + budget 0.99", rules=SHORT, budget=0.99),
    Arm("whole model, not rounded", rules=UNEVEN),
    *(Arm(f"whole model, drawn of {name}", rules=rules) for name, rules in DRAWN.items()),
    Arm("compile + budget 0.5", budget=0.5),
    Arm("PAMM + budget 0.5", rules=PAPER, budget=0.5),
    Arm("whole model + budget 0.5", rules=WHOLE, budget=0.5),
    *(
        Arm(f"{name}{at}", budget=budget, **options)
        for at, budget in (("", 1.0), (" + budget 0.99", 0.99), (" + budget 0.5", 0.5))
        for name, options in NEARLY_EXACT.items()
    ),
    Arm("compile + checkpointing", checkpointed=True),
    Arm("eager", compiled=False),
    Arm("compile + budget 0.8", budget=0.8),
    Arm("PAMM + budget 0.8", rules=PAPER, budget=0.8),
    Arm("compile + aggressive recomputation", aggressive=True),
)
"""What matters most first: a run whose time ends has that."""

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
BLOCK = QKV | {"gate_proj", "up_proj", "down_proj"}
"""Those whose inputs nothing else saves for the backward pass."""
IN_GRAPHS = "reduce-overhead"
"""The mode of torch.compile that captures CUDA graphs."""
_BLOCKS = "/lm_head/=exact, linear={}"
_GRADIENTS = Arm("gradients", rules=_BLOCKS.format("gradients"), goal="any", compresses=BLOCK)
_SUBSPACE = Arm("Subspace", rules=_BLOCKS.format("subspace"), goal="any", compresses=BLOCK)
_PAMM = Arm("PAMM, Q, K, V", rules=PAPER, compresses=QKV)
GPU_ARMS = (
    _GRADIENTS,
    *(
        dataclasses.replace(arm, name=f"{arm.name}, CUDA graphs", mode=IN_GRAPHS)
        for arm in (Arm(REFERENCE), _GRADIENTS)
    ),
    _SUBSPACE,
    dataclasses.replace(_SUBSPACE, name="Subspace, CUDA graphs", mode=IN_GRAPHS),
    dataclasses.replace(
        _GRADIENTS, name="gradients, rank 1/16", rules=_BLOCKS.format("gradients:0.0625")
    ),
    Arm(
        "recommended",
        rules="linear=gradients",
        goal="speed",
        compresses=BLOCK,
        may_compress=frozenset({"o_proj", "lm_head"}),
    ),
    _PAMM,
    *(
        dataclasses.replace(arm, name=f"{arm.name}, float8", float8=True)
        for arm in (Arm(REFERENCE), _GRADIENTS)
    ),
)
"""What a session on a GPU times. Goal "any": what a model of the time thinks of them is in question
there."""
EVERY_ARM = (*ARMS, *GPU_ARMS)


def by_name(name: str) -> Arm:
    """Return one of EVERY_ARM."""
    return next(arm for arm in EVERY_ARM if arm.name == name)


def variant(arm: Arm, model: nn.Module) -> nn.Module:
    """Return the model as an arm runs it, uncompiled: with the same parameters, not copies."""
    if not (arm.checkpointed or arm.float8):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    if arm.float8:
        return _in_float8(model)
    # Transformers renamed it within its fifth major release.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def _in_float8(model: nn.Module) -> nn.Module:
    """Convert the linear layers of the blocks that float8 matmuls have sizes for."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    on_cpu = next(model.parameters()).device.type == "cpu"
    fits = lambda module, name: (  # noqa: E731
        name != "lm_head" and module.in_features % 16 == 0 == module.out_features % 16
    )
    return convert_to_float8_training(
        model, config=dataclasses.replace(config, emulate=on_cpu), module_filter_fn=fits
    )


def backend_of(arm: Arm, case: Case, goal: Goal | None = None) -> pamm_compile.Backend:
    """Return a backend of an arm that approximates.

    Args:
        arm: one with rules.
        case: the model.
        goal: default: the arm's; of those that have none "speed" for the whole model, whose matmuls
            save time also where X stays saved anyway, and else "memory". What scratch.py trains
            leaves no input of a block exact, also where finding directions takes longer than the
            exact gradient, and is timed so.
    """
    usual: Goal = "memory"
    if arm.rules in (WHOLE, SHORT):
        usual = "speed"
    elif arm.rules in (UNEVEN, *DRAWN.values()):
        usual = "any"
    return pamm_compile.backend(
        rules=arm.rules.format(ratio=case.ratio),
        goal=goal or arm.goal or usual,
        min_tokens=case.min_tokens,
        base=case.base,
        mode=arm.mode,
    )


def compile_arm(arm: Arm, model: nn.Module, case: Case) -> tuple[nn.Module, pamm_compile.Report]:
    """Compile a model as an arm asks for.

    Returns:
        The model, and the report of what will be compiled with it; empty of an exact arm.
    """
    model = variant(arm, model)
    if not arm.compiled:
        return model, pamm_compile.Report()
    backend = _ArmBackend(arm, case)
    compiled: nn.Module = torch.compile(model, backend=backend, dynamic=False)
    return compiled, backend.report


class _ArmBackend:
    """A backend of its own for each arm, since Dynamo shares compiled code by backend."""

    def __init__(self, arm: Arm, case: Case) -> None:
        self._arm = arm
        self.report = pamm_compile.Report()
        self._compile: Callable[..., Any]
        if arm.approximates:
            self._compile = ours = backend_of(arm, case)
            self.report = ours.report
        else:
            self._compile = torch._dynamo.lookup_backend(case.base)
            if arm.mode == IN_GRAPHS and case.base == "inductor":
                settings = {"triton.cudagraphs": True}
                self._compile = functools.partial(self._compile, config_patches=settings)

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with self._arm.settings():
            compiled: Callable[..., Any] = self._compile(gm, inputs)
            return compiled


def loss_function(model: nn.Module, batch: dict[str, Tensor], case: Case) -> Callable[[], Tensor]:
    """Return the forward pass of a step."""

    def loss() -> Tensor:
        with precision(case):
            result: Tensor = model(**batch).loss
        return result

    return loss


def train_step(loss: Callable[[], Tensor], model: nn.Module) -> None:
    """Run forward and backward; gradients are made anew, as after `zero_grad()`."""
    loss().backward()
    model.zero_grad(set_to_none=True)
