"""One spec, compiled with PAMM, and every invariant checked on it.

Three runs are compared, with equal weights, inputs and random numbers:

- exact: the joint graph before the pass, unpartitioned, operator by operator;
- ours: the parts of the rewritten graph, operator by operator, so that X, C, f and α are at hand;
- oracle: the plain module in eager mode, in which every compressed product has its weight gradient
  computed from X̂ = α·C[f] by definition. It knows nothing of graphs.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import assume
from torch import Tensor
from torch.fx import GraphModule

from pamm_compile.driver import make_pipeline
from pamm_compile.options import Options
from pamm_compile.report import GraphReport
from pamm_compile.sites.reasons import Reason
from pamm_testing.fuzz.blocks import Model, build, inputs
from pamm_testing.fuzz.expected import expect
from pamm_testing.fuzz.products import Product
from pamm_testing.fuzz.recording import Recording, Site
from pamm_testing.fuzz.spec import Spec
from pamm_testing.graphs import Captured, capturing_backend, check_saved, memory_budget
from pamm_testing.options import make_options

# Relative, of norms: what rounding in the spec's dtype may do to a gradient.
_ROUNDING = {
    "float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1, "autocast": 1e-1,
}  # fmt: skip


def _rounding(spec: Spec) -> float:
    """Return what rounding may do; some parts compute in fp32, whatever the dtype."""
    in_fp32 = spec.attention == "math_fp32" or spec.norm == "rms_fp32"
    return _ROUNDING["float32" if in_fp32 and spec.dtype == "float64" else spec.dtype]


@dataclass
class Arms:
    """One capture: its graphs, and what they were given and returned when they last ran."""

    captured: Captured = field(default_factory=Captured)
    recording: Recording = field(default_factory=Recording)
    graphs: int = 0


def _backend(arms: Arms, options: Options, decompose: bool) -> Callable[..., Any]:
    ours = capturing_backend(
        arms.captured, options, decompose=decompose, run=arms.recording.compiler
    )

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        arms.graphs += 1
        compiled: Callable[..., Any] = ours(gm, example_inputs)
        return compiled

    return backend


@dataclass
class Run:
    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor]


def _run(spec: Spec, model: Model, call: Callable[..., Any], batch: dict[str, Tensor]) -> Run:
    model.zero_grad(set_to_none=True)
    for tensor in batch.values():
        tensor.grad = None
    torch.manual_seed(spec.seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=spec.dtype == "autocast"):
        outputs = call(**batch)
    loss = outputs[0]
    if spec.returned in ("hidden_used", "input_used"):
        loss = loss + outputs[1].float().mean()
    loss.backward()
    leaves = {**dict(model.named_parameters()), **batch}
    grads = {n: p.grad.clone() for n, p in leaves.items() if p.grad is not None}
    return Run(tuple(out.detach().clone() for out in outputs), grads)


def options_of(spec: Spec) -> Options:
    targets: Any = spec.targets
    return make_options(
        ratio=spec.ratio, epsilon=spec.epsilon, sampling=spec.sampling,  # type: ignore[arg-type]
        min_generators=spec.min_generators, min_tokens=spec.min_tokens, seed=spec.seed, goal="any",
        targets=targets if targets in ("qkv", "linear") else re.compile(targets),
    )  # fmt: skip


def runs_exactly(spec: Spec) -> bool:
    """Tell whether torch compiles and runs a spec without us."""
    torch._dynamo.reset()
    model = build(spec)
    try:
        _run(spec, model, torch.compile(model, backend="aot_eager", fullgraph=True), inputs(spec))
    except RuntimeError:
        return False
    return True


def check(spec: Spec) -> Captured:
    """Build, compile, run and check a spec; an AssertionError names what does not hold."""
    torch._dynamo.reset()
    model, batch, arms = build(spec), inputs(spec), Arms()
    compiled = torch.compile(
        model,
        backend=_backend(arms, options_of(spec), spec.decompose),
        dynamic=spec.dynamic,
        fullgraph=True,
    )
    with memory_budget(spec.budget):
        _check_run(spec, model, compiled, batch, arms)
        longer = inputs(spec, longer=3)
        # Dynamo takes one generator for a constant, as it does every size of one.
        if spec.dynamic and _single_generators(spec, batch) == _single_generators(spec, longer):
            graphs = arms.graphs
            _check_run(spec, model, compiled, longer, arms)
            assert arms.graphs == graphs, "a second shape compiled again"
    _check_graphs(spec, arms.captured)
    _check_report(spec, model, arms.captured)
    return arms.captured


def _generators(spec: Spec, tokens: int) -> int:
    return min(tokens, max(spec.min_generators, math.ceil(tokens / spec.ratio)))


def _single_generators(spec: Spec, batch: dict[str, Tensor]) -> list[bool]:
    return [_generators(spec, batch[name][..., 0].numel()) == 1 for name in ("x", "memory")]


def _check_run(
    spec: Spec, model: Model, compiled: Callable[..., Any], batch: dict[str, Tensor], arms: Arms
) -> None:
    ours = _run(spec, model, compiled, batch)
    exact = arms.recording.exact(arms.captured, {**dict(model.named_parameters()), **batch})
    reports = [site for site in arms.captured.report.sites if site.compressed]
    sites = arms.recording.sites()
    assert len(sites) == len(reports)
    for site, report in zip(sites, reports, strict=True):
        site.parameters = report.parameters
        _check_site(spec, site)

    compressed = {name for site in sites for name in site.parameters}
    outputs = arms.recording.outputs[: len(exact.outputs)]
    for a, b in zip(exact.outputs, outputs, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "a forward output changed"
    assert exact.grads.keys() == ours.grads.keys()
    assert compressed <= ours.grads.keys()
    # Where the exact gradients overflow there is nothing to compare.
    assume(all(grad.isfinite().all() for grad in exact.grads.values()))
    for name, grad in exact.grads.items():
        assert name in compressed or torch.equal(grad, ours.grads[name]), f"{name} changed"

    tolerance = _rounding(spec)
    scale = tolerance * max(grad.double().norm() for grad in exact.grads.values())
    if spec.ratio == 1:
        for name in compressed:
            _assert_close(ours.grads[name], exact.grads[name], tolerance, scale, name)
    # Decomposed, dropout draws its numbers in another way than in eager mode.
    if compressed and not (spec.decompose and (spec.dropout or spec.lora_dropout)):
        with _oracle(spec, model, sites) as used:
            wanted = _run(spec, model, model, batch)
        assert used == set(range(len(sites))), "a site whose input is no compressed product's"
        with _oracle(spec, model, sites, exact=True):
            control = _run(spec, model, model, batch)
        for name in compressed:
            # Where rounding alone takes the oracle far from the exact graph, so it may from ours.
            own = (exact.grads[name].double() - control.grads[name].double()).norm()
            allowed = scale + 2 * own
            _assert_close(ours.grads[name], wanted.grads[name], tolerance, allowed, name)


def _assert_close(ours: Tensor, wanted: Tensor, rtol: float, atol: Tensor, name: str) -> None:
    error = (ours.double() - wanted.double()).norm()
    bound = rtol * wanted.double().norm() + atol
    assert error <= bound, f"gradient of {name} is off by {error:.3g}, allowed are {bound:.3g}"


# One site, by definition -------------------------------------------------------------------------


def _check_site(spec: Spec, site: Site) -> None:
    x, generators = site.x.double(), site.generators.double()
    tokens = x.shape[0]
    k = _generators(spec, tokens)
    assert generators.shape == (k, x.shape[1])
    half = site.x.dtype == torch.float16
    if half:
        # Multiplied by powers of two: as long as rows are, nearly. Subnormal results are rounded.
        large = site.generators.abs() >= torch.finfo(torch.float16).smallest_normal
        ratios = (site.generators.double() / x[site.rows])[large]
        assert torch.equal(ratios.log2().frac(), torch.zeros_like(ratios)), "not rows of X"
    else:
        assert torch.equal(site.generators, site.x[site.rows])
    rows = site.rows.tolist()
    if spec.sampling == "uniform" or tokens % k == 0:
        assert len(set(rows)) == k
    if spec.sampling == "stratified":
        assert all(j * tokens // k <= row <= (j + 1) * tokens / k for j, row in enumerate(rows))

    unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines = (unit @ (generators / generators.norm(dim=1, keepdim=True).clamp_min(1e-30)).T).abs()
    chosen = cosines.gather(1, site.index.long()[:, None])[:, 0]
    # A choice among equals is decided by rounding in fp32.
    rounding = 1e-9 if spec.dtype == "float64" else 1e-5
    assert (chosen >= cosines.amax(dim=1) - rounding).all(), "not the closest generator"

    picked = generators[site.index.long()]
    alpha = (x * picked).sum(1) / picked.square().sum(1).clamp_min(1e-30)
    if spec.epsilon is not None and spec.epsilon < 1:
        gate = chosen**2 - (1 - spec.epsilon**2)
        is_generator = torch.zeros(tokens, dtype=torch.bool).index_fill(0, site.rows, True)
        kept = (gate >= 0) | is_generator
        # Rounding decides about rows on the threshold; take the graph's word there.
        close = (gate.abs() < rounding) & ~is_generator
        kept = torch.where(close, site.scale != 0, kept)
        beta = tokens / int(kept.sum())
        if half:
            site.beta = beta
        alpha = torch.where(kept, alpha * (1 if half else beta), 0.0)
    # Norms near the smallest number of the dtype are no measure.
    error = (site.scale.double() - alpha).abs()
    relative = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-3}.get(spec.dtype, 1e-2)
    assert (error <= relative * (alpha.abs() + 1e-3)).all(), "α is not that of the definition"


# The gradients, by definition --------------------------------------------------------------------


class _Compressed(torch.autograd.Function):
    """x·Wᵀ whose weight gradient is dZᵀ·X̂."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, reconstruction: Tensor) -> Tensor:
        ctx.save_for_backward(weight, reconstruction)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, reconstruction = ctx.saved_tensors
        return grad @ weight, (grad.double().T @ reconstruction).to(weight.dtype), None


@contextlib.contextmanager
def _oracle(
    spec: Spec, model: Model, sites: list[Site], *, exact: bool = False
) -> Iterator[set[int]]:
    """Put PAMM's definition in the place of every product that is compressed, or X for its X̂."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    used: set[int] = set()

    def replaced(product: Product) -> Callable[[Tensor], Tensor]:
        plain = product.forward
        own = {n for p in product.parameters() if p.requires_grad for n in names[id(p)]}

        def forward(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            number = _find(spec, flat, own, sites)
            if number is None:
                return plain(x)
            used.add(number)
            weight, bias = product.matrix(), product.bias
            if spec.dtype == "autocast":
                flat, weight = flat.bfloat16(), weight.bfloat16()
            kept = flat.detach().double() if exact else sites[number].reconstruction()
            out = _Compressed.apply(flat, weight, kept)
            out = out.view(*x.shape[:-1], -1)
            return out if bias is None else out + bias.to(out.dtype)

        return forward

    products = [module for module in model.modules() if isinstance(module, Product)]
    for product in products:
        product.forward = replaced(product)  # type: ignore[method-assign]
    try:
        yield used
    finally:
        for product in products:
            del product.forward


def _find(spec: Spec, x: Tensor, names: set[str], sites: list[Site]) -> int | None:
    """Return the site that holds this input, by its values, of those with one of these weights."""
    for number, site in enumerate(sites):
        if names & set(site.parameters) and site.x.shape == x.shape:
            error = (site.x.double() - x.detach().double()).norm()
            if error <= _rounding(spec) * x.detach().double().norm():
                return number
    return None


# Graphs and report -------------------------------------------------------------------------------


def _check_graphs(spec: Spec, captured: Captured) -> None:
    compressed = [site for site in captured.report.sites if site.compressed]
    assert captured.joint is not None
    if not compressed:
        assert captured.before == captured.after, "nothing to compress, yet the graph changed"
        return
    check_saved(captured, len(compressed), spec.budget, recomputes_from_x=spec.budget < 1)
    once = str(captured.joint)
    make_pipeline(options_of(spec), {})(captured.joint)
    assert str(captured.joint) == once, "the pass is not idempotent"


def _check_report(spec: Spec, model: Model, captured: Captured) -> None:
    report = captured.report
    assert report.training
    reasons = Reason.__members__
    for site in report.sites:
        assert site.compressed == (site.reason is None)
        assert site.compressed or site.reason in reasons
    assert {note.reason for note in report.notes} <= reasons.keys()

    got = {
        name: "compressed" if site.compressed else site.reason
        for site in report.sites
        for name in site.parameters
    }
    _check_nothing_silent(spec, model, report)
    expected = expect(spec, model)
    if expected is not None:
        # A frozen weight that reads its input through views of its own is a site of its own.
        own = {n for n, p in model.named_parameters() if not p.requires_grad}
        own = {name for name in own if got.get(name) == "NO_WEIGHT_GRAD"}
        listed, wanted = (
            {n: how for n, how in d.items() if n not in own} for d in (got, expected.outcomes)
        )
        assert listed == wanted
        assert not report.notes
        if expected.sites is not None:
            assert sum(site.compressed for site in report.sites) == expected.sites
    elif spec.targets == "linear" and not spec.has_products_of_elements:
        # Whatever the architecture, every trained weight of a matmul is accounted for.
        names = {id(p): n for n, p in model.named_parameters()}
        for module in model.modules():
            if isinstance(module, Product):
                weights = [p for n, p in module.named_parameters() if "bias" not in n]
                missing = {names[id(p)] for p in weights if p.requires_grad} - got.keys()
                assert not missing, "a matmul was overlooked"
        if model.tail is not None and model.tail.w is not None:
            notes = {name for note in report.notes for name in note.what.split(", ")}
            assert "tail.w" in got.keys() | notes


def _check_nothing_silent(spec: Spec, model: Model, report: GraphReport) -> None:
    """Every trained weight that feeds attention is listed, whatever the block looks like."""
    if spec.targets != "qkv" or spec.has_products_of_elements:
        return
    listed = {name for site in report.sites for name in site.parameters}
    listed |= {name for note in report.notes for name in note.what.split(", ")}
    wanted = {
        name
        for name, parameter in model.named_parameters()
        if ".project." in name and "bias" not in name and parameter.requires_grad
    }
    assert wanted <= listed, f"silent: {sorted(wanted - listed)}"
