"""The object that torch.compile calls, and its two entry points."""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never

from torch.fx import GraphModule

from pamm_compile.checks import unknown_option
from pamm_compile.driver import (
    PREFIX,
    compile_graph,
    found,
    inductor_settings,
    make_pipeline,
    with_names_told_apart,
)
from pamm_compile.environment import options_from_environment
from pamm_compile.errors import NothingMatchedError, UnknownReportError
from pamm_compile.graph.pipeline import GraphPass
from pamm_compile.methods.base import Method
from pamm_compile.methods.sampling import Sampling
from pamm_compile.names import names_of
from pamm_compile.options import ONE_RULE, Base, Goal, Options, without_absent
from pamm_compile.private import aot, inductor
from pamm_compile.recorded import RecordedReport
from pamm_compile.remembering import period, with_memories
from pamm_compile.report import GraphReport, Report, State
from pamm_compile.rules import Target

log = logging.getLogger("pamm_compile")


class Backend:
    """What `backend` returns; torch.compile calls it with every graph that Dynamo captures.

    Backends of equal options compare equal, so that Dynamo lets what one compiled serve another.

    Attributes:
        options: what was chosen.
        passes: of the user's, over the joint graph, behind ours.
        report: of every graph that was compiled with this object, or that ran under it though an
            equal one had compiled it.
    """

    def __init__(
        self,
        options: Options,
        mode: str | None = None,
        settings: tuple[tuple[str, Any], ...] = (),
        passes: tuple[GraphPass, ...] = (),
    ) -> None:
        self.options = options
        self.passes = passes
        self.report = Report()
        self.__name__ = "pamm"
        self._mode = mode
        self._settings = settings
        own = [f"{each.name} {each.fingerprint}" for each in passes]
        self._key = "\n".join([options.fingerprint, repr((mode, settings)), *own])
        # What the report holds already.
        self._shown: set[object] = set()
        with _lock:
            _made[self._key] += 1

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Backend) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

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
        chosen = inductor_settings(mode, settings)
        names = names_of(gm)
        pipeline = make_pipeline(self.options, names.by_key, self.passes, gm=gm)
        # Without Inductor no cache answers in the passes' place.
        cached = self.options.base == "inductor" and pipeline.cacheable
        recorded = RecordedReport(gm, pipeline, example_inputs) if cached else None
        # Compiling changes the graph, of which another one may be made.
        untouched = aot.with_further_inputs(gm, ()) if period(self.options) > 1 else gm
        compiled = compile_graph(
            gm, example_inputs, pipeline, base=self.options.base, settings=chosen
        )
        report = recorded.settle(pipeline.report) if recorded else found(pipeline)
        compiled = with_memories(
            compiled,
            untouched,
            example_inputs,
            report,
            self.options,
            names.by_key,
            self.passes,
            chosen,
        )
        report = with_names_told_apart(report, names, self.options)
        log.info("%s", report.summary())
        if report.sites or report.notes:
            log.debug("\n%s", Report([report]))
        inductor.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "pamm_compile_report", "encoding": "json"},
            payload_fn=lambda: json.dumps(report.to_dict()),
        )
        run = self._shown_where_it_runs(compiled, report)
        if self.options.strict:
            check_strict(report)
        return run

    def _shown_where_it_runs(
        self, compiled: Callable[..., Any], report: GraphReport
    ) -> Callable[..., Any]:
        """Let a compiled graph add its report to that of every equal backend that it runs under."""
        graph = object()
        self._show(graph, report)

        @functools.wraps(compiled)
        def run(*args: Any) -> Any:
            if _made[self._key] > 1:
                user = aot.backend_in_use()
                if isinstance(user, Backend) and user is not self and user == self:
                    user._show(graph, report)
            return compiled(*args)

        return run

    def _show(self, graph: object, report: GraphReport) -> None:
        if graph in self._shown:
            return
        with _lock:
            if graph not in self._shown:
                self._shown.add(graph)
                self.report.add(report)


# Dynamo lets one thread compile at a time, but any number may make backends and run compiled code.
# One lock for all backends, since one of a backend's own could not be copied with it.
_lock = threading.RLock()

# How many backends there are of each kind: where there is one, nobody else can be in use.
_made: Counter[str] = Counter()


def backend(
    ratio: float | None = None,
    *,
    rules: Mapping[Any, Method | None] | str | None = None,
    epsilon: float | None = None,
    sampling: Sampling | None = None,
    min_generators: int | None = None,
    targets: Target | None = None,
    goal: Goal | None = None,
    siblings: bool = False,
    min_tokens: int = 256,
    strict: bool = False,
    seed: int = 0,
    base: Base = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    passes: Sequence[GraphPass] = (),
    **unknown: Never,
) -> Backend:
    """Return a torch.compile backend that compresses the inputs of projections.

    Equivalent to Inductor, except that the weight gradients of the projections, dW = dZᵀ·X, are
    computed from what a method stores in place of X, and that X is not saved:

        model = torch.compile(model, backend=pamm_compile.backend())
        rules = {"qkv": Pamm(ratio=256), "mlp": Pamm(ratio=64)}
        model = torch.compile(model, backend=pamm_compile.backend(rules=rules))

    Without rules, and without an option of one rule, it is what we recommend: rules
    "linear=gradients" (`GradientSubspace` for every linear layer), with the goal "speed".

    Every call gives an object whose `report` says what was matched. Objects of the same arguments
    compare equal, so that blocks compiled one by one share code.

    Args:
        ratio: b / k, tokens per generator, at least 1; k = ceil(b / ratio). Any of `ratio`,
            `epsilon`, `sampling`, `min_generators` and `targets` makes one rule, of `Pamm`; those
            left out are 256, ∞, "stratified", 1 and "qkv".
        rules: {target: method}, or text such as "qkv=pamm:256, mlp=pamm:64", in place of these. The
            first whose target holds a projection decides; the method None (in text "exact") leaves
            it exact.
        epsilon: drop tokens whose relative distance to their generator exceeds this, in [0, ∞],
            and rescale the rest; ∞ keeps all, the paper's best.
        sampling: "stratified" draws one generator in each of k equal intervals of tokens;
            "uniform" draws k of all, as the paper does.
        min_generators: lower bound of k; k, not the ratio alone, decides quality.
        targets: a name in `pamm_compile.targets.TARGETS`, such as "qkv", the projections that feed
            attention, or "linear", every matmul of an activation with a parameter; or a compiled
            regular expression, those of them whose parameter names it matches.
        goal: "memory" compresses an input only if it is then not saved; "speed" whenever weight
            gradients take less time, by a model of it; "any" is "memory" without weighing bytes,
            for tests and studies. Left out, it is "memory" where you name rules or an option of
            one rule.
        siblings: whether projections that no rule names join those that read the same input.
        min_tokens: inputs of fewer tokens stay exact.
        strict: raise if a training graph has nothing to compress.
        seed: another seed draws other samples from the same activations.
        base: "inductor"; "aot_eager" runs the rewritten graphs operator by operator, for
            debugging.
        mode: as torch.compile's.
        options: Inductor settings, as torch.compile's.
        passes: further passes over the joint graph, behind ours (`graph.pipeline.GraphPass`).

    Returns:
        A callable for torch.compile's `backend`.

    Raises:
        InvalidOptionError: a value is not allowed, or a name is unknown.

    Source: arXiv 2506.02939.
    """
    for name in unknown:
        raise unknown_option(name, [*Options.names(), "mode", "options", "passes"])
    chosen = Options.from_mapping(
        {
            "ratio": ratio,
            "rules": rules,
            "epsilon": epsilon,
            "sampling": sampling,
            "min_generators": min_generators,
            "targets": targets,
            "goal": goal,
            "siblings": siblings,
            "min_tokens": min_tokens,
            "strict": strict,
            "seed": seed,
            "base": base,
        }
    )
    inductor_settings(mode, options)
    return Backend(chosen, mode, tuple(sorted((options or {}).items())), tuple(passes))


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
    rest = {k: v for k, v in (options or {}).items() if not k.startswith(PREFIX)}
    return by_name(options)(gm, example_inputs, mode=mode, options=rest)


# Unbounded on purpose: a forgotten one would lose its report.
_BY_NAME: dict[str, Backend] = {}


def by_name(options: Mapping[str, Any] | None = None) -> Backend:
    """Return the backend that `backend="pamm"` compiles with, whose report says what it compiled.

    Equivalent to `backend(ratio=64)` for `by_name({"pamm.ratio": 64})`, except that the same
    options give the same object:

        torch.compile(model, backend="pamm", options=options)(x)
        print(pamm_compile.by_name(options).report)

    Args:
        options: as given to torch.compile; what they leave out comes from the environment, and else
            from the defaults. Inductor's are left aside.

    Returns:
        The backend.

    Raises:
        InvalidOptionError: a value is not allowed, or a name is unknown, here or in the
            environment.
    """
    prefixed = {k: v for k, v in (options or {}).items() if k.startswith(PREFIX)}
    ours = without_absent({k.removeprefix(PREFIX): v for k, v in prefixed.items()})
    around = options_from_environment()
    # Rules and what makes one rule stand for the same choice: the nearer one wins.
    if "rules" in ours or not ONE_RULE.isdisjoint(ours):
        around = {n: v for n, v in around.items() if n != "rules"}
    if "rules" in ours:
        around = {n: v for n, v in around.items() if n not in ONE_RULE}
    chosen = Options.from_mapping({**around, **ours})
    with _lock:
        if chosen.fingerprint not in _BY_NAME:
            _BY_NAME[chosen.fingerprint] = Backend(chosen)
        return _BY_NAME[chosen.fingerprint]


def check_strict(report: GraphReport) -> None:
    """Raise if a training graph has no compressed site.

    Args:
        report: of the graph.

    Raises:
        NothingMatchedError: listing why every candidate was declined.
        UnknownReportError: a cache returned the graph, and what is in it is not known.
    """
    if report.state is State.UNKNOWN:
        raise UnknownReportError(
            "strict=True, and a cache returned this graph without what was found in it when it was "
            "compiled: whether anything is compressed is unknown.\n"
            "Compile once with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 or in a new "
            "TORCHINDUCTOR_CACHE_DIR, or pass strict=False."
        )
    if report.state is State.INFERENCE or any(site.compressed for site in report.sites):
        return
    reasons = [(", ".join(s.parameters), s.reason, s.detail) for s in report.sites]
    reasons += [(n.what, n.reason, n.detail) for n in report.notes]
    listing = "".join(
        f"\n  {what}: {reason}{f' ({detail})' if detail else ''}"
        for what, reason, detail in reasons
    )
    raise NothingMatchedError(
        "strict=True, and no projection of this training graph could be compressed:"
        f"{listing or ' nothing was found in it'}\n"
        "Run pamm_compile.explain(model, ...) for the whole table, or pass strict=False."
    )
