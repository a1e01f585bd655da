"""A small LLaMA through the whole backend, to the CUDA code that Inductor writes for it."""

from __future__ import annotations

import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from pamm_testing.triton.fake_gpu import Generated, recording
from torch._inductor import select_algorithm
from torch._inductor.codecache import PyCodeCache
from torch._inductor.ir import ChoiceCaller
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pamm_compile
from pamm_compile.methods.pamm import triton as lowering

WIDTH, BATCH, LENGTH, RATIO = 256, 4, 256, 18
TOKENS = BATCH * LENGTH
K = -(-TOKENS // RATIO)


def generate(layers: int, dynamic: bool = False, max_autotune: bool = False) -> Generated:
    """The wrappers of a forward and a backward pass, and the operators' calls in them."""
    lowering.register()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        # The CPU's fused attention is another operator than the GPU's; this one is plain matmuls.
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.randint(0, 512, (BATCH, LENGTH))
    backend = pamm_compile.backend(ratio=RATIO, strict=True)
    settings = {"max_autotune": max_autotune, "max_autotune_gemm": max_autotune}
    # Fusions are decided by timing them, for which there is no GPU.
    settings |= {"benchmark_fusion": False, "benchmark_epilogue_fusion": False}
    with (
        mock.patch.object(select_algorithm.AlgorithmSelectorCache, "do_autotuning", _first),
        recording(**settings) as generated,
    ):
        compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return generated


def _first(*args: Any, **kwargs: Any) -> dict[Any, float]:
    """Timings in which the first choice wins."""
    choices = next(arg for arg in (*args[1:], *kwargs.values()) if _is_choices(arg))
    return {choice: float(place) for place, choice in enumerate(choices)}


def _is_choices(arg: object) -> bool:
    return isinstance(arg, list) and bool(arg) and isinstance(arg[0], ChoiceCaller)


def templates(generated: Generated, which: str) -> dict[str, str]:
    kernels = generated.kernels(which)
    return {name: source for name, source in kernels.items() if "pamm_" in source}


def multiplies(launch: str, buffer: str) -> bool:
    """Whether a launch is a matmul that reads the buffer as it is."""
    return (
        launch.startswith("extern_kernels.mm(") and re.search(rf"\b{buffer}\b", launch) is not None
    )


def compiled_cubin(name: str, source: str) -> bytes:
    """The kernel of a template as `torch.compile` would build it on an H100."""
    match = re.search(r"triton_meta=(\{.*\}),\ninductor_meta=", source)
    assert match
    meta = eval(match[1], {"DeviceProperties": lambda **fields: fields})
    stages, warps = (
        int(re.search(rf"num_{what}=(\d+)", source)[1]) for what in ("stages", "warps")
    )
    plain = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton)", "", source, flags=re.S)
    fn = getattr(PyCodeCache.load(plain), name)
    (attrs,) = meta["configs"]
    places = {argument: (fn.arg_names.index(argument),) for argument in meta["constants"]}
    constants = {places[argument]: value for argument, value in meta["constants"].items()}
    ast = ASTSource(fn, meta["signature"], constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["cubin"]


def check_compiles(generated: Generated) -> None:
    for which in ("forward", "backward"):
        found = templates(generated, which)
        assert found
        for name, source in found.items():
            assert compiled_cubin(name, source)


def test_llama() -> None:
    """Forward and backward run our kernels, on the buffers that were there, and compile."""
    generated = generate(2)
    forward, backward = generated.launches("forward"), generated.launches("backward")
    assigns, contracts = templates(generated, "forward"), templates(generated, "backward")

    used = [launch for launch in forward if launch.split(".")[0] in assigns]
    assert len(used) == 2
    for launch in used:
        x = launch.split("(")[1].split(",")[0]
        # No copy of X: it is the very buffer that the three projections multiply.
        assert sum(multiplies(other, x) for other in forward) == 3

    used = [launch for launch in backward if launch.split(".")[0] in contracts]
    assert len(used) == 2
    for launch in used:
        *_, partial, _, _, _, _ = launch.split("(")[1].split(", ")
        for grad in launch.split("(")[1].split(", ")[2:5]:
            # No copy of dZ: the gradient of X is computed from the same buffer.
            assert sum(multiplies(other, grad) for other in backward) == 1
        # Three launches: the contraction, the sum of its splits, and one matmul for dW.
        (sums,) = [other for other in backward if f"({partial}, " in other]
        total = sums.split("(")[1].split(", ")[1]
        assert sum(multiplies(other, total) for other in backward) == 1

    for wrapper in generated.wrappers.values():
        sizes = re.findall(r"empty_strided_cuda\(\((.*?)\)", wrapper)
        elements = [math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes]
        assert len(elements) > 20
        # No buffer of scores, and no atomics in ours.
        assert TOKENS * K not in elements
    assert not any("tl.atomic" in source for source in (assigns | contracts).values())
    check_compiles(generated)


@pytest.mark.everything
def test_llama_with_dynamic_shapes() -> None:
    generated = generate(1, dynamic=True)
    for which in ("forward", "backward"):
        (source,) = templates(generated, which).values()
        # The number of tokens is an argument of the kernel, not a number in it.
        assert re.search(r"def triton_tem\w+\(.*\bks\d+", source)
        assert str(TOKENS) not in source.split("def triton_tem")[1]
    check_compiles(generated)


@pytest.mark.everything
def test_llama_with_several_choices() -> None:
    check_compiles(generate(1, max_autotune=True))
