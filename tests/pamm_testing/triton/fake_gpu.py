"""An H100 that is not there: Inductor's code generation for CUDA in a CPU build of torch."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutputLayout
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


_getitem = torch.Tensor.__getitem__


def _index(tensor: Tensor, item: Any) -> Tensor:
    """Indexing without the device guard that a CPU build does not have."""
    if not (isinstance(tensor, FakeTensor) and tensor.device.type == "cuda"):
        return _getitem(tensor, item)
    items = item if isinstance(item, tuple) else (item,)
    missing = tensor.dim() - sum(i is not None and i is not Ellipsis for i in items)
    dim, picks = 0, []
    for i in items:
        if i is Ellipsis:
            dim += missing
            picks += [None] * missing
        elif i is None:
            tensor = tensor.unsqueeze(dim)
            dim += 1
            picks.append(None)
        elif isinstance(i, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, i.start, i.stop, i.step or 1)
            dim += 1
            picks.append(None)
        elif isinstance(i, Tensor):
            dim += 1
            picks.append(i)
        else:
            tensor = tensor.select(dim, i)
    if any(pick is not None for pick in picks):
        tensor = torch.ops.aten.index.Tensor(tensor, picks)
    return tensor


@contextlib.contextmanager
def fake_h100() -> Iterator[None]:
    """Make Inductor believe in an H100, and index fake CUDA tensors."""
    with contextlib.ExitStack() as stack:
        replace = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        replace(driver, "_active", _Driver())
        properties = staticmethod(lambda device=None: H100)
        replace(CudaInterface, "get_device_properties", properties)
        replace(CudaInterface.Worker, "get_device_properties", properties)
        replace(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90))
        replace(CudaInterface, "is_available", staticmethod(lambda: True))
        replace(CudaInterface, "current_device", staticmethod(lambda: 0))
        replace(torch.cuda, "get_device_properties", lambda device=None: H100)
        replace(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        replace(torch.cuda, "current_device", lambda: 0)
        replace(Tensor, "__getitem__", _index)
        replace(Tensor, "__invert__", lambda tensor: torch.bitwise_not(tensor))
        # assert_indirect_indexing: device_assert does nothing but lengthen the code here.
        # Answers given before, and those given now, hold on their own side only.
        has_triton.cache_clear()
        stack.callback(has_triton.cache_clear)
        stack.enter_context(config.patch(compile_threads=1, assert_indirect_indexing=False))
        yield


@dataclass(frozen=True)
class Kernel:
    """What one kernel reads and writes in main memory at best, as Inductor counts it."""

    operators: tuple[str, ...]
    """Of the graph, in no order."""
    is_library: bool
    """Whether it is none of Inductor's own, but a matmul, say."""
    reads: dict[str, int]
    """Bytes, by buffer; what the kernel wrote itself is still in a cache, and left out."""
    writes: dict[str, int]
    dtypes: dict[str, torch.dtype]
    """Of the buffers."""

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass
class Generated:
    """The wrappers that Inductor wrote, and their first arguments, by what they are for."""

    wrappers: dict[str, str] = field(default_factory=dict)
    calls: dict[str, list[Any]] = field(default_factory=dict)
    moved: dict[str, list[Kernel]] = field(default_factory=dict)
    """What each kernel moves, in order."""

    def kernels(self, which: str) -> dict[str, str]:
        """Name and source of every Triton kernel of a wrapper."""
        return dict(
            re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", self.wrappers[which], re.S)
        )

    def launches(self, which: str) -> list[str]:
        """Kernel launches of a wrapper in order: "name.run(…)" and "extern_kernels.name(…)"."""
        return re.findall(
            r"^ +(?:\w+ = )?((?:\w+\.run|extern_kernels\.\w+|torch\.ops\.\w+\S+)\(.*)$",
            self.wrappers[which],
            re.M,
        )


def _codegen(
    gm: torch.fx.GraphModule, inputs: list[Any], is_backward: bool
) -> tuple[str, list[Kernel]]:
    fake_mode = next(i.fake_mode for i in inputs if isinstance(i, FakeTensor))
    with V.set_fake_mode(fake_mode), V.set_debug_handler(DebugContext()):
        graph = GraphLowering(
            gm, example_inputs=inputs, shape_env=fake_mode.shape_env, is_backward=is_backward
        )
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            code = graph.codegen()[0]
            kernels = [_kernel(node, graph) for node in graph.scheduler.nodes]
    return str(getattr(code, "value", code)), kernels


def _kernel(node: Any, graph: GraphLowering) -> Kernel:
    reads = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
    writes = node.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    reads = {name: count for name, count in reads.items() if name not in writes}
    origins = {origin for each in node.get_nodes() for origin in each.node.origins}
    operators = tuple(str(origin.target) for origin in origins)
    # A call of several outputs stands for itself beside them, and has no dtype.
    several = {
        n for n, b in graph.name_to_buffer.items() if isinstance(b.layout, MultiOutputLayout)
    }
    dtypes = {name: graph.get_dtype(name) for name in (reads | writes).keys() - several}
    return Kernel(operators, node.is_extern(), reads, writes, dtypes)


def generate(fn: Callable[..., Any], inputs: list[Tensor], **settings: Any) -> Generated:
    """Generate code for a function of fake CUDA tensors, without autograd."""
    with fake_h100(), inputs[0].fake_mode, config.patch(settings):  # type: ignore[attr-defined]
        gm = make_fx(fn, select_decomp_table(), tracing_mode="real")(*inputs)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        code, kernels = _codegen(gm, inputs, False)
        return Generated({"graph": code}, moved={"graph": kernels})


def _moved(gm: torch.fx.GraphModule, inputs: list[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A graph traced on the CPU, as it is on the GPU: autograd refuses fake CUDA tensors."""
    gm = copy.deepcopy(gm)
    gpu = torch.device("cuda", 0)
    for node in gm.graph.nodes:
        swap = lambda arg: gpu if isinstance(arg, torch.device) else arg  # noqa: E731
        node.args = torch.fx.node.map_aggregate(node.args, swap)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, swap)
    gm.recompile()
    fake_mode = next(i.fake_mode for i in inputs if isinstance(i, FakeTensor))
    with fake_mode:
        inputs = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=gpu)
            if isinstance(i, Tensor)
            else i
            for i in inputs
        ]
    FakeTensorProp(gm, fake_mode).propagate_dont_convert_inputs(*inputs)
    record_original_output_strides(gm)
    return gm, inputs


@contextlib.contextmanager
def recording(**settings: Any) -> Iterator[Generated]:
    """Within, what our backend compiles runs eagerly on the CPU; its GPU code is recorded."""
    generated = Generated()

    def inner(gm: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        is_backward = bool(kwargs.get("is_backward"))
        which = "backward" if is_backward else "forward"
        with fake_h100(), config.patch(settings):
            code, kernels = _codegen(*_moved(gm, inputs), is_backward)
            generated.wrappers[which], generated.moved[which] = code, kernels

        def run(args: list[Any]) -> Any:
            generated.calls.setdefault(which, list(args))
            outputs = gm(*args)
            args.clear()
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    inductor = functools.partial(compile_fx, inner_compile=inner)
    with (
        mock.patch("pamm_compile.private.inductor.compile_fx", inductor),
        torch._functorch.config.patch(enable_autograd_cache=False),
        config.patch(force_disable_caches=True),
    ):
        yield generated


def fake_inputs(make: Callable[[], list[Tensor]], shape_env: Any = None) -> list[Tensor]:
    """Tensors of a fake mode; use device="cuda" freely."""
    with FakeTensorMode(shape_env=shape_env):
        return make()
