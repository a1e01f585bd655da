"""Runs in a process of its own, with Triton interpreting: the kernels on CPU tensors.

Nothing here imports Triton before `prepare` has chosen the interpreter.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def prepare() -> None:
    """Make this process interpret Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[2]))
    torch.set_num_threads(1)
    _correct_scalars()
    _correct_bfloat16()


def _correct_scalars() -> None:
    """Triton 3.6 makes an int of an array of one element, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def correct(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = correct


def _correct_bfloat16() -> None:
    """Triton 3.6 to 3.9 interpret bfloat16 as its raw bits in a matmul, and truncate to it."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def is_bfloat16(value: Any) -> bool:
        return bool(value.dtype.scalar == tl.bfloat16)

    def wide(value: Any) -> Any:
        bits = np.ascontiguousarray(value.data).astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def correct_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (wide(value) if is_bfloat16(value) else value for value in (a, b))
        return dot(self, a, b, *rest)

    def correct_cast(self: Any, value: Any, dtype: Any) -> Any:
        if is_bfloat16(value):
            return cast(self, wide(value), dtype)
        if dtype.scalar != tl.bfloat16:
            return cast(self, value, dtype)
        rounded = torch.from_numpy(np.array(value.data, dtype=np.float32)).bfloat16()
        return handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    builder.create_dot, builder.cast_impl = correct_dot, correct_cast
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, lambda self, value, dtype: self.cast_impl(value, dtype))


def assign(
    x: Tensor,
    generators: Tensor,
    index_dtype: torch.dtype,
    tile: tuple[int, int, int],
    with_norm: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the template of `pamm::assign` computes, through the plain kernel."""
    from pamm_testing.triton import launch

    (b, n), k = x.shape, generators.shape[0]
    rows, columns, depth = tile
    squares = generators.float().square().sum(1)
    inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
    inverse = torch.where(squares < float("inf"), inverse, -1.0)
    index = torch.full((b,), 77, dtype=index_dtype)
    scale, cosine = torch.full((b,), 77.0, dtype=x.dtype), torch.full((b,), 77.0)
    launch.assign_kernel[(-(-b // rows),)](
        *(x, generators, inverse, index, scale, cosine, b, k, n),
        *(x.stride(0), x.stride(1), generators.stride(0), generators.stride(1)),
        BLOCK_B=rows,
        BLOCK_K=columns,
        BLOCK_N=depth,
        EVEN_N=n % depth == 0,
        WITH_NORM=with_norm,
        PRECISION="ieee",
    )
    return index, scale, cosine


def contract(
    index: Tensor,
    scale: Tensor,
    grad: Tensor,
    k: int,
    tile: tuple[int, int, int],
    splits: int,
    is_sorted: bool,
    grad_left: bool,
) -> Tensor:
    """What the template of `pamm::contract` computes for one gradient, through the plain kernel."""
    from pamm_testing.triton import launch

    b, m = grad.shape
    rows, columns, depth = tile
    key, order = torch.sort(index, stable=True) if is_sorted else (index, index)
    offsets = torch.searchsorted(key.int(), torch.arange(k + 1, dtype=torch.int32))
    partial = torch.full((splits, m, k), 77.0)
    launch.contract_kernel[(-(-m // rows) * -(-k // columns) * splits,)](
        *(key, scale, order, offsets, grad, partial, b, k, m, grad.stride(0), grad.stride(1)),
        SPLITS=splits,
        BLOCK_K=columns,
        BLOCK_M=rows,
        BLOCK_T=depth,
        EVEN_M=m % rows == 0,
        SORTED=is_sorted,
        WIDE=scale.dtype != grad.dtype or grad.dtype == torch.float32,
        GRAD_LEFT=grad_left,
        PRECISION="ieee",
        K_TILES=1 << (-(-k // columns) - 1).bit_length(),
    )
    return partial.sum(0).T


class GuardedMemory:
    """Tensors that lie between margins: reading there gives NaN or -1, and writing is found."""

    _MARGIN = 1 << 16

    def __init__(self) -> None:
        self._storages: list[Tensor] = []

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stand in for `torch.empty_strided`; what is not written reads as NaN or -1."""
        span = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        count = 2 * self._MARGIN + span * dtype.itemsize
        storage = torch.full([count], 0xFF, dtype=torch.uint8)
        self._storages.append(storage)
        return storage.view(dtype).as_strided(size, stride, self._MARGIN // dtype.itemsize)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides; elements between its own read as NaN or -1."""
        target = self.empty(tensor.shape, tensor.stride(), tensor.dtype)
        if 0 in tensor.stride() and tensor.numel() > 1:
            shown = [slice(None) if step else slice(1) for step in tensor.stride()]
            target[tuple(shown)].copy_(tensor[tuple(shown)])
            return target
        return target.copy_(tensor)

    def check(self) -> None:
        """Raise if a margin was written."""
        for storage in self._storages:
            for margin in (storage[: self._MARGIN], storage[-self._MARGIN :]):
                if not bool((margin == 0xFF).all()):
                    raise AssertionError("a kernel wrote outside of its tensors")


class _Kernel:
    """One kernel of a generated wrapper, run by the interpreter in a few programs.

    A program costs far more here than what it computes; templates have tile sizes of their own.
    """

    def __init__(self, name: str, source: str) -> None:
        from torch._inductor.codecache import PyCodeCache

        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton)", "", source, flags=re.S)
        source = source.replace("triton_helpers.set_driver_to_gpu()\n", "")
        # The interpreter has no libdevice.
        source = source.replace("libdevice.rsqrt", "tl.rsqrt")
        self.fn = getattr(PyCodeCache.load(source), name)
        head = source[source.index(f"def {name}(") : source.index("):")]
        names = re.findall(r"(\w+)(?: ?: tl\.constexpr)?(?:,|$)", head.split("(", 1)[1])
        self.places = {argument: place for place, argument in enumerate(names)}
        self.blocks = re.findall(r"(\w+) ?: tl\.constexpr", head)

    def run(self, *args: Any, stream: object) -> None:
        del stream
        if not self.blocks:
            *args, x, y, z = args  # type: ignore[assignment]
            self.fn[(x, y, z)](*args)
            return
        blocks, grid = dict.fromkeys(self.blocks, 64), []
        for name in ("x", "y"):
            if f"{name}numel" in self.places:
                size = args[self.places[f"{name}numel"]]
                block = min(256, max(16, 1 << (size // 2).bit_length()))
                blocks[f"{name.upper()}BLOCK"] = block
                grid.append(-(-size // block))
        self.fn[tuple(grid)](*args, **blocks)


def run_wrapper(code: str, inputs: list[Tensor], guarded: bool = True) -> list[Tensor]:
    """Run a wrapper that Inductor made for a GPU on the CPU, its Triton kernels interpreted.

    Every tensor lies between guards: what is read outside of one is NaN or -1.

    Args:
        code: of the wrapper.
        inputs: CPU tensors of the shapes and strides it was made for.
        guarded: whether inputs are copied between guards first.

    Returns:
        What the wrapper returns.

    Raises:
        AssertionError: a kernel wrote outside of its tensors.
    """
    import pamm_compile.methods.pamm  # noqa: F401  # the wrapper may call the operators

    compiler = ModuleType("compiler")
    compiler.triton = lambda name, source, device_str: _Kernel(name, source)  # type: ignore[attr-defined]
    compiler.wait = lambda scope: None  # type: ignore[attr-defined]
    memory = GuardedMemory()
    code = code.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "")
    code = code.replace("async_compile = AsyncCompile()", "")
    code = code.replace("with torch.cuda._DeviceGuard(0):", "with contextlib.nullcontext():")
    code = code.replace("torch.cuda.set_device(0)", "pass")
    code = code.replace("torch._C._dynamo.guards._empty_strided_cuda", "guarded_empty")
    code = code.replace("device='cuda:0'", "device='cpu'")
    scope: dict[str, Any] = {
        "__name__": "wrapper",
        "contextlib": contextlib,
        "async_compile": compiler,
        "get_raw_stream": lambda index: index,
        "guarded_empty": memory.empty,
    }
    exec(code, scope)
    if guarded:
        inputs = [memory.copy(i) if isinstance(i, Tensor) else i for i in inputs]
    outputs = scope["call"](list(inputs))
    memory.check()
    return [output.clone() if isinstance(output, Tensor) else output for output in outputs]


def sparse_assign(
    code: str, b: int, n: int, column_stride: int
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Run a wrapper of `pamm::assign` on an X whose columns lie far apart, and the eager kernel.

    Memory is mapped for all of X, and used for what is touched: made here, as it cannot be sent.
    """
    import mmap

    from pamm_compile.methods.pamm import eager

    size = 2 * ((n - 1) * column_stride + b)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float16)
    x = storage.as_strided((b, n), (1, column_stride))
    made = torch.Generator().manual_seed(0)
    x.copy_(torch.randn(b, n, generator=made))
    c = torch.randn(5, n, generator=made).half()
    return run_wrapper(code, [x, c], guarded=False), eager.assign(x, c, torch.uint8)
