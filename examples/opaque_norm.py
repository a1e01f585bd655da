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

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile


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


def build(args: argparse.Namespace, *, opaque: bool) -> nn.Module:
    """Build a LLaMA, with opaque norms in place of its own if asked to."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=352 * args.hidden // 128,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    norms = [name for name, each in model.named_modules() if type(each).__name__ == "LlamaRMSNorm"]
    for name in norms if opaque else ():
        model.set_submodule(name, OpaqueNorm(model.get_submodule(name)))
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=256)
    parser.add_argument("--budget", type=float, default=0.99)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    args = parse()
    backend = pamm_compile.backend(ratio=args.ratio)
    rows: dict[str, list[float]] = {}
    for opaque in (False, True):
        # Bytes do not depend on values: nothing is computed.
        with FakeTensorMode():
            model = build(args, opaque=opaque)
            ids = torch.zeros(args.batch, args.sequence, dtype=torch.int64)
            for name, using in (("compile", "exact"), ("PAMM", backend)):
                for budget in (1.0, args.budget):
                    with functorch_config.patch(activation_memory_budget=budget):
                        found = pamm_compile.predict_saved(
                            model, input_ids=ids, labels=ids, using=using
                        )
                    arm = name if budget == 1 else f"{name} + budget {budget:g}"
                    rows.setdefault(arm, []).append(found.saved_bytes / 2**20)
    print(f"{'saved for backward, MiB':24}  {'plain norms':>12}  {'opaque norms':>12}")
    for arm, (plain, opaque_) in rows.items():
        print(f"{arm:24}  {plain:12.2f}  {opaque_:12.2f}")


if __name__ == "__main__":
    main()
