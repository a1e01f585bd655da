"""A tiny LLaMA with torchtitan's module names, its tensor-parallel plans, and what PAMM must give.

The forward pass follows the usual structure: root-mean-square norms, grouped queries, SDPA, SwiGLU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import pamm_compile
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm.compression import compress, weight_gradients
from pamm_compile.methods.sampling import content_seed, site_seed
from pamm_compile.methods.subspace.method import Subspace

VOCABULARY, WIDTH, HEADS, KEY_HEADS, HIDDEN, LAYERS = 64, 32, 4, 2, 64, 2
BATCH, LENGTH = 4, 32
RATIO = 8
PROJECTIONS = ("wq", "wk", "wv")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        narrow = WIDTH // HEADS * KEY_HEADS
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, narrow, bias=False)
        self.wv = nn.Linear(WIDTH, narrow, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        # Of the projections, not of x: under sequence parallelism x is a shard of the sequence.
        batch, length, _ = q.shape
        q, k, v = (z.view(batch, length, -1, WIDTH // HEADS).transpose(1, 2) for z in (q, k, v))
        k, v = (z.repeat_interleave(HEADS // KEY_HEADS, dim=1) for z in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.feed_forward = FeedForward()
        self.attention_norm = Norm()
        self.ffn_norm = Norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm()
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        # Scaled as Gemma's. Under tensor parallelism an embedding returns a collective still under
        # way, and torch 2.13 loses a gradient's DTensor where a compiled block is what waits for
        # it; with any operator between, all is well.
        x = self.tok_embeddings(ids) * WIDTH**0.5
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def build(seed: int = 0, device: str = "cpu") -> Model:
    torch.manual_seed(seed)
    return Model().to(device)


def tokens(seed: int, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length + 1), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def parallelize(model: Model, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Apply torchtitan's plan for tensor parallelism, with or without sequence parallelism."""
    shard, whole = Shard(1) if sequence else Replicate(), Replicate()
    gather = PrepareModuleInput(input_layouts=(shard,), desired_input_layouts=(whole,))
    outer = {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=shard),
        "output": ColwiseParallel(input_layouts=shard, output_layouts=whole),
    }
    inner = {
        **{f"attention.{name}": ColwiseParallel() for name in PROJECTIONS},
        "attention.wo": RowwiseParallel(output_layouts=shard),
        **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
        "feed_forward.w2": RowwiseParallel(output_layouts=shard),
    }
    if sequence:
        outer |= {"norm": SequenceParallel()}
        inner |= {"attention": gather, "feed_forward": gather}
        inner |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
    parallelize_module(model, mesh, outer)
    for layer in model.layers:
        parallelize_module(layer, mesh, inner)


SUBSPACE = Subspace(rank=8)


def pamm(**options: object) -> pamm_compile.Backend:
    rule = {} if "rules" in options else {"ratio": RATIO}
    backend = pamm_compile.backend(**{**rule, "min_tokens": 1, "base": "aot_eager", **options})
    backend.report.clear()
    return backend


# ---------------------------------------------------------------------------------------------
# What a run gives
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The losses and gradients of one rank."""

    losses: list[Tensor] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    """Local shards, by the model's own names."""
    full: dict[str, Tensor] = field(default_factory=dict)


def own_name(name: str) -> str:
    """Strip what wrappers put into a name."""
    for wrapper in ("module.", "_orig_mod.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def collect(model: nn.Module, losses: list[Tensor]) -> Run:
    """Read the gradients of a model; on all ranks at once, since shards are gathered."""
    run = Run([loss.detach().clone() for loss in losses])
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        full = grad.full_tensor() if isinstance(grad, DTensor) else grad
        run.grads[own_name(name)] = local.clone()
        run.full[own_name(name)] = full.clone()
    return run


def step(model: nn.Module, batches: Sequence[Tensor]) -> Run:
    """Run forward and backward on every batch, accumulating gradients."""
    model.zero_grad(set_to_none=True)
    losses = []
    for ids in batches:
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss)
    return collect(model, losses)


# ---------------------------------------------------------------------------------------------
# What PAMM must give
# ---------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """X and dZ of one projection on this rank, as matrices."""

    x: Tensor
    dz: Tensor | None = None


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """Record what the projections of a model that is not compiled read, and their dZ."""
    seen: dict[str, Seen] = {}
    handles = []

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].to_local() if isinstance(args[0], DTensor) else args[0]
        seen[name] = Seen(x.detach().clone().flatten(0, -2))
        out.register_hook(lambda dz: setattr(seen[name], "dz", dz.detach().clone().flatten(0, -2)))

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            name = own_name(f"{name}.weight")
            # Behind the hooks of tensor parallelism, which redistribute the input.
            handles.append(module.register_forward_hook(functools.partial(hook, name)))
    yield seen
    for handle in handles:
        handle.remove()


def backend_with(method: Method | None) -> pamm_compile.Backend:
    return pamm() if method is None else pamm(rules={"qkv": method})


def expected(
    seen: dict[str, Seen], *, one_graph: bool, ratio: int = RATIO, method: Method | None = None
) -> dict[str, Tensor]:
    """Compute the compressed weight gradients from this rank's rows.

    Args:
        seen: of one forward and backward pass.
        one_graph: whether all layers were compiled as one graph, which has one content seed.
        ratio: tokens per generator.
        method: another than PAMM.

    Returns:
        Gradients of this rank, by parameter.
    """
    grads: dict[str, Tensor] = {}
    names = [f"layers.{i}.attention.{p}.weight" for i in range(LAYERS) for p in PROJECTIONS]
    sites = [names[i : i + len(PROJECTIONS)] for i in range(0, len(names), len(PROJECTIONS))]
    for number, site in enumerate(sites):
        first, number = (sites[0], number) if one_graph else (site, 0)
        seed = site_seed(content_seed(seen[first[0]].x, 0), number)
        x, dz = seen[site[0]].x, [seen[name].dz for name in site]
        flips = [False] * len(site)
        if method is None:
            results = weight_gradients(compress(x, seed, ratio=Fraction(ratio)), dz, flips)
        else:
            stored = method.store(x, seed, [each.shape[1] for each in dz])
            results = method.weight_gradients(stored, dz, flips)
        grads |= dict(zip(site, results, strict=True))
    return grads


def mean(grads: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Average over the ranks of a group, as data parallelism does."""
    result = {}
    for name, grad in grads.items():
        total = grad.float().clone()
        dist.all_reduce(total, group=group)
        result[name] = total / dist.get_world_size(group)
    return result


def gathered(grads: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Put the row shards of column-parallel weights together."""
    result = {}
    for name, grad in grads.items():
        parts = [torch.empty_like(grad) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, grad.contiguous(), group=group)
        result[name] = torch.cat(parts)
    return result


# ---------------------------------------------------------------------------------------------
# Assertions
# ---------------------------------------------------------------------------------------------


def assert_only_matched_differ(exact: Run, ours: Run, matched: set[str]) -> None:
    """Check losses and all other gradients bitwise, and that the matched ones did change."""
    for a, b in zip(exact.losses, ours.losses, strict=True):
        assert torch.equal(a, b), (a, b)
    assert exact.grads.keys() == ours.grads.keys()
    assert matched <= exact.grads.keys(), matched - exact.grads.keys()
    for name, grad in exact.grads.items():
        if name in matched:
            assert not torch.equal(exact.full[name], ours.full[name]), name
        else:
            assert torch.equal(ours.grads[name], grad), (
                name,
                (ours.grads[name] - grad).abs().max(),
            )


def assert_matched(ours: Run, wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Check the matched gradients against the reference, relative to the norm."""
    for name, want in wanted.items():
        error = (ours.full[name].float() - want.float()).norm() / want.float().norm()
        assert error < tolerance, (name, error.item())


def assert_ranks_agree(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks of a group hold the same parameters, sharded ones gathered."""
    for name, parameter in model.named_parameters():
        mine = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        mine = mine.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        assert all(torch.equal(part, parts[0]) for part in parts), name
        assert mine.isfinite().all(), name


MATCHED = {f"layers.{i}.attention.{p}.weight" for i in range(LAYERS) for p in PROJECTIONS}
