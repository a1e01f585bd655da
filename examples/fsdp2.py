"""Train a small byte-level LLaMA on several processes: FSDP2, tensor and sequence parallelism.

    torchrun --nproc-per-node 2 examples/fsdp2.py                       FSDP2 on CPUs or GPUs
    torchrun --nproc-per-node 2 examples/fsdp2.py --tensor-parallel 2   tensor + sequence parallel
    torchrun --nproc-per-node 4 examples/fsdp2.py --tensor-parallel 2   two-dimensional

Every block is compiled by itself and then sharded, as torchtitan does. Two models train side by
side from the same weights on the same batches, one of them with PAMM; every data-parallel rank
draws batches of its own. The text is the Python standard library's own sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import pamm_compile
from pamm_compile.inspect.measure import saved_storages

BYTES = 256
NEVER = 2**62


class Attention(nn.Module):
    """Causal attention without positions, which decoders can do without."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.head = args.hidden // args.heads
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(args.hidden, args.hidden, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        # Under tensor parallelism a rank has some of the heads only: their number is what is left.
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        inner = math.ceil(args.hidden * 8 / 3 / 32) * 32
        self.w1 = nn.Linear(args.hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, args.hidden, bias=False)
        self.w3 = nn.Linear(args.hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.hidden)
        self.ffn_norm = nn.RMSNorm(args.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(BYTES, args.hidden)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.hidden)
        self.output = nn.Linear(args.hidden, BYTES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        # Some operator must stand between an embedding under tensor parallelism and a compiled
        # block: torch 2.13 to 2.15 cannot run backward where the block waits for the collective.
        x = self.tok_embeddings(ids).mul(1.0)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="default: 1")
    parser.add_argument("--ratio", type=float, default=256.0, help="default: 256")
    parser.add_argument("--min-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="windows a rank and step")
    parser.add_argument("--sequence", type=int, default=256, help="bytes a window")
    parser.add_argument("--mixed-precision", action="store_true", help="bf16, reduced in fp32")
    parser.add_argument(
        "--memory-budget", type=float, default=1.0, help="of torch.compile, 0 to 1 (default: 1)"
    )
    parser.add_argument("--base", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def prepare(args: argparse.Namespace) -> DeviceMesh:
    """Join the process group that torchrun describes; return the mesh, data × tensor parallel."""
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun --nproc-per-node 2 examples/fsdp2.py")
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks % args.tensor_parallel:
        raise SystemExit(
            f"--tensor-parallel {args.tensor_parallel} does not divide the {ranks} processes"
        )
    for name in ("heads", "sequence"):
        if getattr(args, name) % args.tensor_parallel:
            raise SystemExit(
                f"--{name} {getattr(args, name)} is not a multiple of --tensor-parallel "
                f"{args.tensor_parallel}"
            )
    if args.hidden % args.heads:
        raise SystemExit(f"--hidden {args.hidden} is not a multiple of --heads {args.heads}")
    if args.device != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    functorch = torch._functorch.config
    functorch.activation_memory_budget = args.memory_budget
    # A budget below 1 weighs every input, and a block's graph has the mesh among them.
    if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):
        functorch.unsafe_treat_script_objects_as_zero_size = True
    shape = (ranks // args.tensor_parallel, args.tensor_parallel)
    return init_device_mesh(args.device, shape, mesh_dim_names=("dp", "tp"))


def distribute(model: Transformer, mesh: DeviceMesh, args: argparse.Namespace) -> None:
    """Split the weights over the tensor-parallel ranks, then shard what is left with FSDP2."""
    if args.tensor_parallel > 1:
        gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        outer = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        inner = {
            "attention_norm": SequenceParallel(),
            "attention": gather,
            **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "feed_forward": gather,
            **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(model, mesh["tp"], outer)
        for layer in model.layers:
            parallelize_module(layer, mesh["tp"], inner)
    policy = MixedPrecisionPolicy()
    if args.mixed_precision:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)


@dataclasses.dataclass
class Run:
    """One of the models that train side by side."""

    name: str
    model: Transformer
    optimizer: torch.optim.Optimizer
    backend: pamm_compile.Backend
    losses: list[float] = dataclasses.field(default_factory=list)
    saved_bytes: int = 0


def make_run(name: str, min_tokens: int, mesh: DeviceMesh, args: argparse.Namespace) -> Run:
    torch.manual_seed(args.seed)
    model = Transformer(args).to(args.device)
    backend = pamm_compile.backend(ratio=args.ratio, min_tokens=min_tokens, base=args.base)
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    distribute(model, mesh, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    return Run(name, model, optimizer, backend)


def loss_of(run: Run, batch: Tensor) -> Tensor:
    logits = run.model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train_step(run: Run, batch: Tensor, *, measure: bool) -> None:
    losses: list[Tensor] = []

    def forward() -> Tensor:
        losses.append(loss_of(run, batch))
        return losses[0]

    run.optimizer.zero_grad()
    if measure:
        run.saved_bytes = sum(each.bytes for each in saved_storages(forward, model=run.model))
    else:
        forward()
    losses[0].backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.losses.append(losses[0].item())


def standard_library() -> Tensor:
    """Return the standard library's own sources as bytes: text that needs no download."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def main() -> None:
    args = parse()
    mesh = prepare(args)
    exact = make_run("exact", NEVER, mesh, args)
    pamm = make_run(f"PAMM {args.ratio:g}", args.min_tokens, mesh, args)
    text = standard_library()
    # The ranks of one tensor-parallel group see the same batch.
    generator = torch.Generator().manual_seed(args.seed + mesh["dp"].get_local_rank())
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.sequence, (args.batch, 1), generator=generator)
        batch = text[starts + torch.arange(args.sequence + 1)].long()
        for run in (exact, pamm):
            train_step(run, batch.to(args.device), measure=step == args.steps - 1)
    if dist.get_rank() == 0:
        kind = f"{mesh.shape[0]} × {mesh.shape[1]}, data × tensor parallel"
        print(f"{dist.get_world_size()} ranks ({kind}), {args.device}")
        print(f"{args.batch * args.sequence:,} tokens a data-parallel rank and step")
        print(f"\n{pamm.backend.report}\n")
        print(f"{'run':12}  {'first loss':>10}  {'last loss':>10}  {'saved MiB a rank':>16}")
        for run in (exact, pamm):
            first, last, saved = run.losses[0], run.losses[-1], run.saved_bytes / 2**20
            print(f"{run.name:12}  {first:10.4f}  {last:10.4f}  {saved:16.2f}")
        print("loss: of rank 0's batches. The report is of one block; all share its code.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
