"""What casts to float8 move in code that Inductor generates for an H100, and in our model of it.

    PYTHONPATH=tests python -m pamm_testing.triton.casts --models llama-350m llama-1b

One block of a LLaMA is compiled for an H100 that is not there, and what its kernels read and write
is added up as Inductor counts it: every buffer once a kernel. A row is a kernel that writes codes,
or that reads X or dZ for their scales. Of a kernel that writes more than these, codes alone count
as the cast's. Below is what all casts move, and what the model of the time counts for them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile
from examples.benchmarks import device_model, tables
from examples.benchmarks.models import DEVICE_TOKENS, NAMES, SHAPES, Shape
from pamm_compile import Quantized
from pamm_testing.triton.fake_gpu import Generated, Kernel, recording

CODES = torch.float8_e4m3fn
METHOD = Quantized(8, float8=True)
"""As `float8=None` is on an H100: the graph is traced for a CPU."""
PASSES = ("forward", "backward")


def generate(shape: Shape, tokens: int, *, exact: bool = False) -> Generated:
    """Generate code of one block, and of the loss, of a model without memory."""
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        vocab_size=512,
        # The CPU's fused attention is another operator than the GPU's; this one is plain matmuls.
        attn_implementation="eager",
    )
    # Attention itself keeps the input of its output projection where it is one operator.
    rules = {re.compile("lm_head|o_proj"): None, "linear": None if exact else METHOD}
    backend = pamm_compile.backend(rules=rules, goal="any")
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), recording() as generated:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        ids = torch.zeros(tokens // shape.sequence, shape.sequence, dtype=torch.long)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return generated


def casting(generated: Generated, which: str) -> list[Kernel]:
    """Return the kernels of a pass that write codes, or nothing but scales or parts of these."""
    found = []
    for kernel in generated.moved[which]:
        kinds = {kernel.dtypes[name] for name in kernel.writes}
        scales = {"aten.abs.default", "aten.amax.default"} <= {*kernel.operators}
        if not kernel.is_library and (CODES in kinds or (scales and kinds == {torch.float32})):
            found.append(kernel)
    return found


def is_fused(kernel: Kernel) -> bool:
    """Tell whether a kernel makes something else too than codes and scales."""
    return any(kernel.dtypes[name] not in (CODES, torch.float32) for name in kernel.writes)


def moved(kernel: Kernel) -> int:
    """Return the bytes that a kernel moves for casts."""
    codes = sum(n for name, n in kernel.writes.items() if kernel.dtypes[name] == CODES)
    return codes if is_fused(kernel) else kernel.bytes


def counted(shape: Shape, tokens: int) -> int:
    """Return the bytes that the model of the time counts for casts to float8."""
    sizes = device_model.sizes(shape, tokens).values()
    # Others, as those of LLaMA-1B's down, are not multiplied in float8.
    multiplied = [s for s in sizes if METHOD.describe(replace(s, device="cpu")) == "float8"]
    return sum(METHOD._float8_casts(size).bytes for size in multiplied)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"


def report(name: str, tokens: int) -> list[str]:
    """Return the lines of a table of one model's casts, and a sentence on all of them."""
    generated = generate(SHAPES[name], tokens)
    rows, total = [], 0
    for which in PASSES:
        for kernel in casting(generated, which):
            total += moved(kernel)
            bytes_ = sum(kernel.reads.values()), sum(kernel.writes.values()), moved(kernel)
            operators = ", ".join(sorted({each.split(".")[1] for each in kernel.operators}))
            fused = "with what makes it" if is_fused(kernel) else "alone"
            rows.append([which, fused, *map(_mib, bytes_), operators])
    header = ["pass", "cast", "reads MiB", "writes MiB", "for casts MiB", "operators"]
    counts = _mib(counted(SHAPES[name], tokens))
    sentence = f"Casts move {_mib(total)} MiB; the model counts {counts} MiB."
    return [*tables.markdown(header, rows, left=2), "", sentence]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what casts move."""
    parser = argparse.ArgumentParser(description=__doc__)
    llamas = [name for name in SHAPES if name.startswith("llama")]
    parser.add_argument("--models", nargs="+", choices=llamas, default=llamas)
    parser.add_argument("--tokens", type=int, default=DEVICE_TOKENS)
    options = parser.parse_args(arguments)
    for name in options.models:
        print("\n".join([f"\n## {NAMES[name]}\n", *report(name, options.tokens)]))


if __name__ == "__main__":
    main()
