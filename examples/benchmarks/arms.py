"""The ways to run a training step that are compared."""

from __future__ import annotations

import copy
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


def by_name(name: str) -> Arm:
    """Return one of ARMS."""
    return next(arm for arm in ARMS if arm.name == name)


def variant(arm: Arm, model: nn.Module) -> nn.Module:
    """Return the model as an arm runs it, uncompiled: with the same parameters, not copies."""
    if not arm.checkpointed:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    # Transformers renamed it within its fifth major release.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def backend_of(arm: Arm, case: Case, goal: Goal | None = None) -> pamm_compile.Backend:
    """Return the backend of an arm that approximates; the same one for the same case.

    Args:
        arm: one with rules.
        case: the model.
        goal: default: "speed" for the whole model, whose matmuls save time also where X stays saved
            anyway, and else "memory". What scratch.py trains leaves no input of a block exact, also
            where finding directions takes longer than the exact gradient, and is timed so.
    """
    usual: Goal = "memory"
    if arm.rules in (WHOLE, SHORT):
        usual = "speed"
    elif arm.rules in (UNEVEN, *DRAWN.values()):
        usual = "any"
    return pamm_compile.backend(
        rules=arm.rules.format(ratio=case.ratio),
        goal=goal or usual,
        min_tokens=case.min_tokens,
        base=case.base,
    )


def compile_arm(arm: Arm, model: nn.Module, case: Case) -> nn.Module:
    """Compile a model as an arm asks for."""
    model = variant(arm, model)
    if not arm.compiled:
        return model
    compiled: nn.Module = torch.compile(model, backend=_ArmBackend(arm, case), dynamic=False)
    return compiled


class _ArmBackend:
    """A backend of its own for each arm, since Dynamo shares compiled code by backend."""

    def __init__(self, arm: Arm, case: Case) -> None:
        self._arm = arm
        self._compile: Callable[..., Any] = (
            backend_of(arm, case) if arm.approximates else torch._dynamo.lookup_backend(case.base)
        )

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
