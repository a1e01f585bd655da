"""What Inductor generates for a GPU, looked at and interpreted without one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from pamm_testing.triton import interpreter
from pamm_testing.triton.fake_gpu import fake_inputs, generate, recording
from torch import Tensor
from torch._inductor import select_algorithm

import pamm_compile
from pamm_compile.methods.pamm import assign, compression, contract, eager, index_dtype
from pamm_compile.methods.pamm import triton as lowering
from pamm_compile.methods.sampling import sample_rows

Interpret = Callable[..., Any]


@pytest.fixture(autouse=True)
def _registered() -> None:
    lowering.register()


def site(b: int, n: int, widths: list[int], dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """X and the output gradients of one site: columns of one matrix if fused."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, n, generator=generator).to(dtype)
    if fused:
        wide = torch.randn(b, sum(widths), generator=generator).to(dtype)
        return [x, *wide.split(widths, dim=1)]
    return [x] + [torch.randn(b, m, generator=generator).to(dtype) for m in widths]


def on_fake_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return fake_inputs(
        lambda: [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in tensors
        ]
    )


def both(k: int, with_cosine: bool) -> Callable[..., Any]:
    def run(x: Tensor, c: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        index, scale, cosine = assign(x, c, index_dtype(k))
        sums = contract(index, scale, list(grads), k)
        return (index, scale, cosine, sums) if with_cosine else (index, scale, sums)

    return run


@pytest.mark.parametrize(
    ("b", "n", "k", "widths", "fused", "with_cosine", "dtype"),
    [
        (200, 48, 12, [64, 32, 32], True, False, torch.float32),
        (130, 33, 20, [40, 17, 5], False, True, torch.float32),
        (96, 64, 40, [64], False, False, torch.float16),
        (300, 32, 270, [48, 24], False, True, torch.float32),
        (900, 32, 6, [24, 24], True, False, torch.float32),
    ],
)
def test_generated_kernels_compute_the_operators(
    interpret: Interpret,
    b: int,
    n: int,
    k: int,
    widths: list[int],
    fused: bool,
    with_cosine: bool,
    dtype: torch.dtype,
) -> None:
    x, *grads = site(b, n, widths, dtype, fused)
    inputs = [x, x[torch.arange(k) * b // k].clone(), *grads]
    generated = generate(both(k, with_cosine), on_fake_gpu(inputs))
    index, scale, *rest, sums = interpret(
        interpreter.run_wrapper, generated.wrappers["graph"], inputs
    )
    expected = eager.assign(x, inputs[1], index_dtype(k))
    # Random features leave no near-ties at this size, so the choice must be the reference's.
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(scale, expected[1])
    if with_cosine:
        torch.testing.assert_close(rest[0], expected[2])
    torch.testing.assert_close(sums, eager.contract(*expected[:2], grads, k))


@pytest.mark.parametrize("widths", [[32, 64, 32], [64, 32, 32, 64]])
def test_gradients_whose_strides_come_again(interpret: Interpret, widths: list[int]) -> None:
    """Each gradient is read at its own strides, whatever its predecessors' are."""
    x, *grads = site(70, 16, widths, torch.float32, False)
    inputs = [x, x[:9].clone(), *grads]
    code = generate(both(9, False), on_fake_gpu(inputs)).wrappers["graph"]
    index, scale, sums = interpret(interpreter.run_wrapper, code, inputs)
    torch.testing.assert_close(sums, eager.contract(index, scale, grads, 9))


@pytest.mark.parametrize("with_cosine", [True, False])
@pytest.mark.parametrize(("b", "k", "widths"), [(1, 1, [1]), (1, 20, [17]), (40, 1, [1])])
def test_outputs_of_one_element(
    interpret: Interpret, b: int, k: int, widths: list[int], with_cosine: bool
) -> None:
    """Inductor stores such an output from every lane: those past the end must agree."""
    x, *grads = site(b, 24, widths, torch.float32, False)
    c = torch.randn(k, 24, generator=torch.Generator().manual_seed(1))
    code = generate(both(k, with_cosine), on_fake_gpu([x, c, *grads])).wrappers["graph"]
    index, scale, *rest, sums = interpret(interpreter.run_wrapper, code, [x, c, *grads])
    expected = eager.assign(x, c, index_dtype(k))
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(scale, expected[1])
    if rest:
        torch.testing.assert_close(rest[0], expected[2])
    torch.testing.assert_close(sums, eager.contract(index, scale, grads, k))


def test_columns_far_apart(interpret: Interpret) -> None:
    """A column-major X of more than 2³¹ elements; only the pages that are read exist."""
    got, expected = interpret(interpreter.sparse_assign, _far_code(), 40, 18, 1 << 27)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _far_code() -> str:
    def make() -> list[Tensor]:
        half = {"dtype": torch.float16, "device": "cuda"}
        return [
            torch.empty_strided((40, 18), (1, 1 << 27), **half),
            torch.empty(5, 18, **half),
        ]

    def run(x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return assign(x, c, torch.uint8)

    return generate(run, fake_inputs(make)).wrappers["graph"]


def test_gated_site_computes_what_eager_does(interpret: Interpret) -> None:
    x, *grads = site(160, 32, [48, 16, 16], torch.float32, True)

    def run(x: Tensor, seed: Tensor, *grads: Tensor) -> list[Tensor]:
        compressed = compression.compress(x, seed, ratio=Fraction(10), epsilon=0.9)
        return compression.weight_gradients(compressed, grads, [False, True, False])

    inputs = [x, torch.tensor(5), *grads]
    code = generate(run, on_fake_gpu(inputs)).wrappers["graph"]
    for ours, theirs in zip(
        interpret(interpreter.run_wrapper, code, inputs), run(*inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def compressed_site(x: Tensor, seed: Tensor, *grads: Tensor) -> list[Tensor]:
    """A whole site: sampling, assignment, contraction, weight gradients."""
    compressed = compression.compress(x, seed, ratio=Fraction(256))
    return compression.weight_gradients(compressed, grads, [False] * len(grads))


def llama_site(b: int = 16384, n: int = 2048) -> list[Tensor]:
    def make() -> list[Tensor]:
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        grads = torch.empty(b, 3 * n, **bf16).split(n, dim=1)
        return [
            torch.empty(b, n, **bf16),
            torch.empty((), dtype=torch.int64, device="cuda"),
            *grads,
        ]

    return fake_inputs(make)


def test_launches_of_one_site() -> None:
    launches = generate(compressed_site, llama_site()).launches("graph")
    names = [re.sub(r"_\d+\b", "", launch.split("(")[0]) for launch in launches]
    # Inductor unrolls the sum of few splits.
    names = [re.sub("triton_(per|poi)_fused", "triton_sum", name) for name in names]
    # Forward: gather and norms, assignment. Backward: contraction, sum and cast, one matmul.
    assert names == [
        "triton_red_fused.run",
        "triton_tem_fused.run",
        "triton_tem_fused.run",
        "triton_sum.run",
        "extern_kernels.mm",
    ]


def test_no_large_buffer_and_no_copy() -> None:
    b, n = 16384, 2048
    code = generate(compressed_site, llama_site(b, n)).wrappers["graph"]
    sizes = re.findall(r"empty_strided_cuda\(\((.*?)\)", code)
    elements = [math.prod(int(part) for part in size.split(",") if part.strip()) for size in sizes]
    assert len(elements) >= 6
    weight = 3 * n * n
    partial_sums = 8 * (b // 256) * 3 * n
    # The gradient itself and the partial sums are the largest; no b×k, no copy of X or of dZ.
    assert max(elements) == weight
    assert sorted(elements)[-2] <= partial_sums < b * n
    assert b * (b // 256) not in elements
    assert "tl.atomic" not in code


def test_unused_cosine_is_not_computed() -> None:
    kernels = generate(compressed_site, llama_site(2048, 512)).kernels("graph")
    templates = [source for name, source in kernels.items() if name.startswith("triton_tem")]
    assert any("WITH_NORM : tl.constexpr = False" in source for source in templates)
    assert not any("COSINE" in source for source in templates)


@pytest.mark.parametrize(("precision", "expected"), [("high", "tf32"), ("highest", "ieee")])
def test_tf32_only_where_torch_may(precision: str, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, *grads = site(512, 64, [64], torch.float32, False)
        code = generate(both(8, False), on_fake_gpu([x, x[:8].clone(), *grads])).wrappers["graph"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(re.findall(r"PRECISION : tl.constexpr = '(\w+)'", code)) == {expected}


def _first_template(
    self: Any,
    name: str,
    inputs: Any,
    layout: Any,
    gens: Any,
    key: Any,
    choices: list[Any],
    *args: Any,
    **kwargs: Any,
) -> dict[Any, float]:
    for node, make in (gens or {}).items():
        del node, make
    return {choice: float(position) for position, choice in enumerate(choices)}


def _eager_first(
    self: Any,
    name: str,
    inputs: Any,
    layout: Any,
    gens: Any,
    key: Any,
    choices: list[Any],
    *args: Any,
    **kwargs: Any,
) -> dict[Any, float]:
    return {choice: -float(position) for position, choice in enumerate(choices)}


@pytest.mark.parametrize("k", [12, 270])
@pytest.mark.parametrize("winner", [_first_template, _eager_first])
def test_several_choices(
    interpret: Interpret, monkeypatch: pytest.MonkeyPatch, winner: Any, k: int
) -> None:
    seen: dict[str, list[str]] = {}

    def time(self: Any, name: str, *args: Any, **kwargs: Any) -> dict[Any, float]:
        timings = winner(self, name, *args, **kwargs)
        seen[name] = [type(choice).__name__ for choice in timings]
        return timings

    monkeypatch.setattr(select_algorithm.AlgorithmSelectorCache, "do_autotuning", time)
    x, *grads = site(300, 48, [64, 32, 32], torch.float32, True)
    inputs = [x, x[torch.arange(k)].clone(), *grads]
    generated = generate(
        both(k, True), on_fake_gpu(inputs), max_autotune=True, max_autotune_gemm=True
    )
    for name in ("pamm_assign", "pamm_contract"):
        assert seen[name].count("TritonTemplateCaller") >= 2
        assert seen[name].count("ExternKernelCaller") == 1
    templates = [name for name in generated.kernels("graph") if name.startswith("triton_tem")]
    operators = [launch for launch in generated.launches("graph") if "torch.ops.pamm" in launch]
    assert (len(templates), len(operators)) == ((0, 2) if winner is _eager_first else (2, 0))
    got = interpret(interpreter.run_wrapper, generated.wrappers["graph"], inputs)
    expected = eager.assign(*inputs[:2], index_dtype(k))
    for ours, theirs in zip(got, (*expected, eager.contract(*expected[:2], grads, k)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_index_beyond_32_bits() -> None:
    code = generate(compressed_site, llama_site(1 << 20, 4096)).wrappers["graph"]
    assert code.count("INDEX_DTYPE : tl.constexpr = tl.int64") == 2


def test_cpu_runs_the_eager_kernels() -> None:
    x, *grads = site(300, 24, [16, 8], torch.float32, False)
    inputs = [x, x[:12].clone(), *grads]
    run = both(12, True)
    torch.testing.assert_close(torch.compile(run)(*inputs), run(*inputs))


@pytest.mark.parametrize(("tokens", "k"), [((1 << 20) + 3, 4099), (2 * 46400 - 1, 46400)])
def test_sampling_does_not_overflow_32_bits(interpret: Interpret, tokens: int, k: int) -> None:
    # Inductor computes functions of an index in int32; tokens × k, and in the second case
    # k × (tokens mod k), are past its range.
    seed = torch.tensor(5)

    def rows(seed: Tensor) -> Tensor:
        return sample_rows(tokens, k, seed, "stratified")

    code = generate(rows, on_fake_gpu([seed])).wrappers["graph"]
    (got,) = interpret(interpreter.run_wrapper, code, [seed])
    assert torch.equal(got, rows(seed))


def test_dynamic_shapes_compute_what_eager_does(interpret: Interpret) -> None:
    def run(x: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        generators = x[::10]
        k = generators.shape[0]
        index, scale, cosine = assign(x, generators, index_dtype(k))
        return index, scale, cosine, contract(index, scale, list(grads), k)

    x, *grads = site(130, 24, [48, 16], torch.float32, True)
    with recording() as generated:
        backend = pamm_compile.backend(ratio=10)
        expected = torch.compile(run, backend=backend, dynamic=True)(x, *grads)
    sizes, code = generated.calls["forward"], generated.wrappers["forward"]
    assert any(isinstance(size, int) for size in sizes)
    for ours, theirs in zip(interpret(interpreter.run_wrapper, code, sizes), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
