"""The backend: Dynamo's graph in, Inductor with our joint-graph pass, compiled code out."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.environment import options_from_environment
from pamm_compile.methods.pamm import triton
from pamm_compile.methods.pamm.compression import Sampling
from pamm_compile.options import Base, Options, Targets, unknown_option
from pamm_compile.private import aot, inductor
from pamm_compile.recorded import RecordedReport
from pamm_compile.report import Report
from pamm_compile.sites.joint_pass import JointPass, PassChain, check_strict

log = logging.getLogger("pamm_compile")

_PREFIX = "pamm."


class Backend:
    """What `backend` returns; torch.compile calls it with every graph that Dynamo captures.

    Attributes:
        options: what was chosen.
        report: what was compiled so far, shared by everything compiled with these options.
    """

    def __init__(
        self, options: Options, mode: str | None = None, settings: tuple[tuple[str, Any], ...] = ()
    ) -> None:
        self.options = options
        self.report = Report()
        self.__name__ = "pamm"
        self._mode = mode
        self._settings = settings

    def __repr__(self) -> str:
        return f"pamm_compile.backend({self.options})"

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: list[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph; torch.compile passes its own `mode` and `options` on."""
        mode, settings = mode or self._mode, {**dict(self._settings), **(options or {})}
        inductor_options = inductor_settings(mode, settings)
        joint_pass = JointPass(self.options, parameter_names(gm))
        recorded = RecordedReport(gm, joint_pass, example_inputs)
        if self.options.base == "aot_eager":
            compiled = compile_eager(gm, example_inputs, joint_pass)
        else:
            compiled = compile_inductor(gm, example_inputs, joint_pass, inductor_options)
        report = recorded.settle(joint_pass.report)
        self.report.add(report)
        log.info("%s", report.summary())
        if report.sites or report.notes:
            log.debug("\n%s", Report([report]))
        inductor.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "pamm_compile_report", "encoding": "json"},
            payload_fn=lambda: json.dumps(report.to_dict()),
        )
        if self.options.strict:
            check_strict(report)
        return compiled


def backend(
    ratio: float = 256,
    *,
    epsilon: float | None = None,
    sampling: Sampling = "stratified",
    min_generators: int = 1,
    min_tokens: int = 256,
    targets: Targets = "qkv",
    strict: bool = False,
    seed: int = 0,
    base: Base = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Backend:
    """Return a torch.compile backend that compresses the inputs of attention projections.

    Equivalent to Inductor, except that the weight gradients of the projections, dW = dZᵀ·X, are
    computed from k rows of X, an index and a scale per token, and that X is not saved:

        model = torch.compile(model, backend=pamm_compile.backend(ratio=256))

    The same arguments give the same object, so that blocks compiled one by one share code; its
    `report` says what was matched.

    Args:
        ratio: b / k, tokens per generator, at least 1; k = ceil(b / ratio).
        epsilon: drop tokens whose relative distance to their generator exceeds this, in [0, ∞),
            and rescale the rest; None (∞) keeps all, the paper's best.
        sampling: "stratified" draws one generator in each of k equal intervals of tokens;
            "uniform" draws k of all, as the paper does.
        min_generators: lower bound of k; k, not the ratio alone, decides quality.
        min_tokens: inputs of fewer tokens stay exact.
        targets: "qkv", the projections that feed attention; "linear" (experimental), every matmul
            of an activation with a parameter; a compiled regular expression, those of them whose
            parameter names it matches.
        strict: raise if a training graph has nothing to compress.
        seed: another seed draws other generators from the same activations.
        base: "inductor"; "aot_eager" runs the rewritten graphs operator by operator, for
            debugging.
        mode: as torch.compile's.
        options: Inductor settings, as torch.compile's.

    Returns:
        A callable for torch.compile's `backend`.

    Raises:
        InvalidOptionError: a value is not allowed, or a name is unknown.

    Source: arXiv 2506.02939.
    """
    chosen = {
        "ratio": ratio,
        "epsilon": epsilon,
        "sampling": sampling,
        "min_generators": min_generators,
        "min_tokens": min_tokens,
        "targets": targets,
        "strict": strict,
        "seed": seed,
        "base": base,
    }
    for name in unknown:
        raise unknown_option(name, (*chosen, "mode", "options"))
    checked = Options.from_mapping(chosen)
    inductor_settings(mode, options)
    return _shared(checked, mode, tuple(sorted((options or {}).items())))


# Unbounded on purpose: a forgotten backend would be made anew and its compiled code missed.
_BACKENDS: dict[str, Backend] = {}


def _shared(options: Options, mode: str | None, settings: tuple[tuple[str, Any], ...]) -> Backend:
    key = repr((options, mode, settings))
    return _BACKENDS.setdefault(key, Backend(options, mode, settings))


def named_backend(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile with `backend="pamm"`, taking our options as "pamm.ratio" and so on.

    Equivalent to: `torch.compile(model, backend=backend(ratio=…), options=…)` for
    `torch.compile(model, backend="pamm", options={"pamm.ratio": …, …})`. What `options` leave out
    comes from the environment, PAMM_COMPILE_RATIO and so on, and else from the defaults.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: as torch.compile's, which takes no options beside it.
        options: ours, prefixed with "pamm.", and Inductor's.

    Returns:
        The compiled graph.

    Raises:
        InvalidOptionError: a value is not allowed, or a name is unknown, here or in the
            environment.
    """
    ours = {k.removeprefix(_PREFIX): v for k, v in (options or {}).items() if k.startswith(_PREFIX)}
    rest = {k: v for k, v in (options or {}).items() if not k.startswith(_PREFIX)}
    chosen = Options.from_mapping({**options_from_environment(), **ours})
    return _shared(chosen, None, ())(gm, example_inputs, mode=mode, options=rest)


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
            raise unknown_option(name, allowed)
    return inductor.inductor_settings(mode, options)


def parameter_names(gm: GraphModule, known: Mapping[int, str] | None = None) -> dict[str, str]:
    """Return the name of every parameter of a graph that Dynamo captured, by its input key.

    Args:
        gm: as handed to a backend.
        known: names by `id` of the parameter, where the model is at hand; for others a name is
            read off the expression by which Dynamo reached the parameter.

    Returns:
        Names such as "model.layers.0.self_attn.q_proj.weight".
    """
    names = {}
    for position, (example, source) in enumerate(aot.dynamo_inputs(gm)):
        if isinstance(example, torch.nn.Parameter):
            read = _readable(source) or f"input {position}"
            names[aot.plain_input_key(position)] = (known or {}).get(id(example), read)
    for name, _ in gm.named_parameters():
        names[f"parameter:{name}"] = name
    return names


def _readable(source: str) -> str:
    """Turn Dynamo's expression for a parameter into the name that the module gives it."""
    # PEFT reads its wrapped model by attributes, which Dynamo follows through __dict__.
    name = re.sub(r"\.__dict__\['_(modules|parameters|buffers)'\]", "", source)
    name = re.sub(r"\.?_(modules|parameters|buffers)(?=\W)", "", name)
    name = re.sub(r"\[['\"]?([^]'\"]+)['\"]?\]", r".\1", name)
    name = re.sub(r"^[LG]\.", "", name)
    # A wrapper such as accelerate's autocast hands the module on in its own *args.
    name = re.sub(r"^(self|args\.0)\.", "", name)
    return re.sub(r"^_orig_mod\.|^fn\.", "", name)


def compile_inductor(
    gm: GraphModule,
    inputs: list[Any],
    joint_pass: JointPass | None,
    settings: dict[str, Any],
    *,
    generate_code: bool = True,
) -> Callable[..., Any]:
    """Compile a graph with Inductor, a pass of ours behind those that are there already.

    Args:
        gm: Dynamo's graph.
        inputs: its inputs.
        joint_pass: our pass; None compiles exactly.
        settings: of Inductor, by name.
        generate_code: False runs the partitioned graphs operator by operator.

    Returns:
        The graph as a function.
    """
    triton.register()
    there = settings.get("joint_custom_pre_pass", inductor.config.joint_custom_pre_pass)
    earlier = list(there) if isinstance(there, list | tuple) else [there] if there else []
    if joint_pass is not None:
        chain = PassChain([*earlier, joint_pass]) if earlier else joint_pass
        settings = {**settings, "joint_custom_pre_pass": chain}
    inner = {} if generate_code else {"inner_compile": inductor.run_eagerly}
    compiled: Callable[..., Any] = inductor.compile_fx(gm, inputs, config_patches=settings, **inner)
    return compiled


def compile_eager(
    gm: GraphModule, inputs: list[Any], joint_pass: JointPass, *, decompose: bool = False
) -> Callable[..., Any]:
    """Run a pass on a graph's joint graph, partition it, and run the parts operator by operator.

    Args:
        gm: Dynamo's graph.
        inputs: its inputs.
        joint_pass: our pass.
        decompose: trace with Inductor's decompositions, as the real compilation does.

    Returns:
        The graph as a function.
    """

    @functools.wraps(aot.min_cut_rematerialization_partition)
    def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
        joint_pass(joint.graph)
        joint.recompile()
        return aot.min_cut_rematerialization_partition(joint, *args, **kwargs)

    compiled: Callable[..., Any] = aot.aot_autograd(
        fw_compiler=aot.boxed_nop,
        bw_compiler=aot.boxed_nop,
        decompositions=aot.select_decomp_table() if decompose else None,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )(gm, inputs)
    return compiled
