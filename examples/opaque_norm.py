"""Measure what is saved for backward where the norm before Q, K and V is an opaque kernel.

    python examples/opaque_norm.py
    python examples/opaque_norm.py --layers 4 --hidden 256 --batch 8

Liger's RMSNorm and others like it are one operator to the compiler. It cannot recompute the norm's
output X from its input, whatever the memory budget, and saves X for the weight gradients of Q, K
and V. The norm here is such an operator in plain PyTorch; its backward pass reads the norm's input,
as Liger's does, and so does not need X. Graphs are partitioned as for Inductor; no code is
generated, and no tensor has memory.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import torch
import torch._functorch.config as functorch_config
from common import precision
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from pamm_compile.inspect.predict import predict_saved


@torch.library.custom_op("pamm_example::rms_norm", mutates_args=())
def opaque_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


@opaque_norm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pamm_example::rms_norm_backward", mutates_args=())
def opaque_norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    normal, inner = x * scale, grad * weight
    to_x = scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    return to_x, (grad * normal).flatten(0, -2).sum(0)


@opaque_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return opaque_norm_backward(grad.contiguous(), *ctx.saved_tensors)


opaque_norm.register_autograd(_backward, setup_context=_setup)


class OpaqueNorm(nn.Module):
    """RMSNorm as one operator."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return opaque_norm(x, self.weight)


def replace_norms(model: nn.Module) -> int:
    """Put opaque norms in place of a LLaMA's own; return how many."""
    found = [name for name, each in model.named_modules() if type(each).__name__ == "LlamaRMSNorm"]
    for name in found:
        model.set_submodule(name, OpaqueNorm(model.get_submodule(name)))
    return len(found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=256.0, help="default: 256")
    parser.add_argument("--budget", type=float, default=0.99, help="default: 0.99")
    common.add_model_options(parser)
    common.add_backend_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.model != "llama":
        raise SystemExit("--model must be llama, whose norms are replaced")
    device = common.prepare(args)
    common.announce(args)
    columns: dict[str, list[str]] = {}
    for norm in ("plain", "opaque"):
        # Bytes do not depend on values: nothing is computed.
        with FakeTensorMode(), device:
            model = common.build(args)
            count = replace_norms(model) if norm == "opaque" else 0
            ids = torch.zeros(args.batch, args.sequence, dtype=torch.int64)
            backend = common.make_backend(args, args.ratio)
            for name, using in (("compile", None), ("PAMM", backend)):
                for budget in (1.0, args.budget):
                    with functorch_config.patch(activation_memory_budget=budget), precision(args):
                        found = predict_saved(model, input_ids=ids, labels=ids, using=using)
                    arm = name if budget == 1 else f"{name} + budget {budget:g}"
                    columns.setdefault(arm, []).append(common.mebibytes(found.saved_bytes))
        print(f"{norm:13} {count} norms replaced; {found.report.graphs[0].summary()}")
    rows = [(arm, *found) for arm, found in columns.items()]
    header = ("saved for backward, MiB", "plain norms", "opaque norms")
    print(f"\n{common.table(header, rows)}")


if __name__ == "__main__":
    common.run(main)
