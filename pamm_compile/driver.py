"""One way to compile a graph with our passes: run it, partition it only, or look only.

RUN        Inductor's code, or with base="aot_eager" the rewritten graphs operator by operator
PARTITION  traced, rewritten and partitioned as for Inductor; the parts run operator by operator
LOOK       nothing is rewritten; the exact graphs run operator by operator
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile import methods
from pamm_compile.checks import unknown_option
from pamm_compile.devices import device_named
from pamm_compile.graph.dynamo import differentiates, has_nested_graphs
from pamm_compile.graph.pipeline import GraphPass, PassChain, Pipeline
from pamm_compile.names import Names, names_of
from pamm_compile.options import Options
from pamm_compile.private import aot, inductor
from pamm_compile.report import GraphReport, Note, State, brief
from pamm_compile.sites.compress import CompressInputs
from pamm_compile.sites.reasons import Reason

Compiled = Callable[..., Any]

PREFIX = "pamm."
"""Of our options among torch.compile's."""


class Mode(enum.Enum):
    """What is to happen to a graph."""

    RUN = enum.auto()
    PARTITION = enum.auto()
    LOOK = enum.auto()


def make_pipeline(
    options: Options,
    names: dict[str, str],
    further: Sequence[GraphPass] = (),
    *,
    gm: GraphModule | None = None,
    device: str | None = None,
    apply: bool = True,
    memories: int | None = None,
) -> Pipeline:
    """Return our passes over the joint graph of one Dynamo graph.

    Args:
        options: what the user chose.
        names: name of every parameter, by its input key.
        further: passes of the user's, behind ours.
        gm: the graph, to say more of it if it has no backward pass.
        device: GPU whose times count, see `devices.device_named`; None for that at hand.
        apply: False only reports.
        memories: the input from which on the graph takes what methods remember, if it does.

    Returns:
        A pass of Inductor's.
    """
    by_name = options.selects_by_name
    gpu = None if device is None else device_named(device)
    passes = [CompressInputs(options, gpu, memories), *further]
    alone = None
    if gm is not None and differentiates(gm):
        note = Note(Reason.OWN_GRADIENTS.name, "gradients")
        alone = GraphReport(notes=(note,), state=State.OWN_GRADIENTS)
    return Pipeline(
        passes,
        names,
        names_matter=by_name,
        left_alone=alone,
        apply=apply,
        cacheable=options.is_cacheable,
    )


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    pipeline: Pipeline | None,
    *,
    mode: Mode = Mode.RUN,
    base: str = "inductor",
    settings: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one graph that Dynamo captured.

    Args:
        gm: the graph.
        inputs: its inputs.
        pipeline: our passes; None compiles exactly.
        mode: what is to happen.
        base: "inductor" or "aot_eager", for `Mode.RUN`.
        settings: of Inductor, by name.

    Returns:
        The graph as a function.
    """
    if mode is Mode.LOOK or (mode is Mode.RUN and base == "aot_eager"):
        # A look is to see the graph that Inductor would get.
        return _operator_by_operator(gm, inputs, pipeline, decompose=mode is Mode.LOOK)
    return _inductor(gm, inputs, pipeline, dict(settings or {}), codegen=mode is Mode.RUN)


def _inductor(
    gm: GraphModule,
    inputs: Sequence[Any],
    pipeline: Pipeline | None,
    settings: dict[str, Any],
    *,
    codegen: bool,
) -> Compiled:
    methods.register_lowerings()
    there = settings.get("joint_custom_pre_pass", inductor.config.joint_custom_pre_pass)
    earlier = list(there) if isinstance(there, list | tuple) else [there] if there else []
    if pipeline is not None:
        chain = PassChain([*earlier, pipeline]) if earlier else pipeline
        settings = {**settings, "joint_custom_pre_pass": chain}
    inner = {} if codegen else {"inner_compile": inductor.run_eagerly}
    # Inductor takes the buffers that a backward pass may overwrite for those of regions inside it
    # too, by position: with our tensors saved in front of others, gradients come out wrong.
    nested = pipeline is not None and has_nested_graphs(gm)
    with aot.without_donated_buffers() if nested else contextlib.nullcontext():
        compiled: Compiled = inductor.compile_fx(gm, inputs, config_patches=settings, **inner)
    return compiled


def _operator_by_operator(
    gm: GraphModule, inputs: Sequence[Any], pipeline: Pipeline | None, *, decompose: bool
) -> Compiled:
    @functools.wraps(aot.min_cut_rematerialization_partition)
    def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
        if pipeline is not None:
            pipeline(joint.graph)
            joint.recompile()
        return aot.min_cut_rematerialization_partition(joint, *args, **kwargs)

    compiled: Compiled = aot.aot_autograd(
        fw_compiler=aot.boxed_nop,
        bw_compiler=aot.boxed_nop,
        decompositions=aot.select_decomp_table() if decompose else None,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )(gm, inputs)
    return compiled


def found(pipeline: Pipeline) -> GraphReport:
    """Return what a pipeline that has run found; one that did not run had no backward pass."""
    return pipeline.report or pipeline.left_alone


def with_names_told_apart(report: GraphReport, names: Names, options: Options) -> GraphReport:
    """Add a note to the report of a graph that may run for other parameters than it names.

    Args:
        report: what was found.
        names: of the graph's parameters.
        options: what the user chose.

    Returns:
        The report, with a note of the parameters that it lists, or of all if rules go by name.
    """
    listed = {name for site in report.sites for name in site.parameters}
    meant = [
        brief(others)
        for name, others in names.others.items()
        if options.selects_by_name or name in listed
    ]
    if not meant or report.state is not State.TRAINING:
        return report
    note = Note(Reason.AMBIGUOUS_NAME.name, ", ".join(meant))
    return replace(report, notes=(*report.notes, note))


def visit(
    model: torch.nn.Module,
    call: Callable[[torch.nn.Module], Any],
    compile_one: Callable[[GraphModule, Sequence[Any], Names], Compiled],
) -> Any:
    """Call a model once, every graph of it compiled by a function, and leave no trace.

    Nothing compiled is shared with what the user compiles: like `torch._dynamo.explain` it resets
    Dynamo, before and after.

    Args:
        model: any module; a compiled one is unwrapped.
        call: gets the module compiled, and calls it.
        compile_one: gets a graph, its inputs and the names of its parameters.

    Returns:
        What `call` returned.
    """
    model = getattr(model, "_orig_mod", model)
    known = {id(parameter): name for name, parameter in model.named_parameters()}

    def backend(gm: GraphModule, inputs: list[Any]) -> Compiled:
        return compile_one(gm, inputs, names_of(gm, known))

    torch.compiler.reset()
    try:
        with torch.enable_grad(), aot.without_autograd_cache():
            compiled: Any = torch.compile(model, backend=backend)
            return call(compiled)
    finally:
        torch.compiler.reset()


def inductor_settings(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the Inductor settings that a mode and options stand for.

    Args:
        mode: as torch.compile's.
        options: as torch.compile's.

    Returns:
        Settings by name.

    Raises:
        InvalidOptionError: a name is unknown.
    """
    allowed = inductor.inductor_setting_names()
    for name in options or {}:
        if name.replace("-", "_") not in allowed:
            # What is meant may be ours, without its prefix.
            near = [f"{PREFIX}{name}"] if name in Options.names() else allowed
            raise unknown_option(name, near)
    return inductor.inductor_settings(mode, options)
