"""Measure on a batch how close methods come to a model's weight gradients."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pamm_compile import checks
from pamm_compile.driver import Compiled, Mode, compile_graph, visit
from pamm_compile.errors import InvalidOptionError, MeasurementError
from pamm_compile.graph.pipeline import Pipeline
from pamm_compile.inspect.arguments import refuse_options
from pamm_compile.inspect.observe import Observation, ObserveSites
from pamm_compile.inspect.tokens import Tokens, flat, made
from pamm_compile.inspect.undisturbed import refuse_without_values, undisturbed
from pamm_compile.methods.base import Method, Remembering
from pamm_compile.names import Names
from pamm_compile.rules import Rule, make_rules
from pamm_compile.sites.cost import saved_time
from pamm_compile.size import exact_cost
from pamm_compile.targets import TARGETS

_LOSS_HINT = "pass loss=lambda output: … that makes a scalar of what the model returns."


@dataclass(frozen=True)
class SiteFidelity:
    """One input of projections stored by one method."""

    parameters: tuple[str, ...]
    target: str
    """The first named target that holds the projections."""
    method: str
    described: str
    """What the method makes of this site, such as "k = 64"."""
    shape: tuple[int, int]
    """Of X, (tokens, features)."""
    error: float
    """‖dŴ − dW‖ / ‖dW‖ of one draw, all projections together; root mean square over draws."""
    bias: float
    """The part of it that stays when draws are averaged: error² = bias² + noise²."""
    noise: float
    cosine: float
    """Of dŴ and dW, mean over draws."""
    lasting: float
    """The share that is kept of what gradients of different tokens have in common: ⟨dŴ, dW′⟩ by
    ⟨dW, dW′⟩, with dW and dW′ each of a third of the tokens. Most of the gradient of one batch is
    noise of its own, which a method may lose for nothing. NaN where they have nothing in common."""
    bytes_exact: int
    bytes_stored: int
    flops_saved: float
    """As a share of those of the exact weight gradients; below 0 where there are more."""
    flops_exact: int
    time: float
    """Of making the weight gradients, by a model of it, as a multiple of exactly."""


class Fidelity:
    """What `fidelity` measured; printing it gives the table of `text()`.

    Attributes:
        sites: a row a site and method, in graph order.
        draws: how many the figures are from.
    """

    def __init__(self, sites: Sequence[SiteFidelity], draws: int) -> None:
        self.sites = tuple(sites)
        self.draws = draws

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Fidelity({len(self.sites)} rows, {self.draws} draws)"

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods compared."""
        return tuple(dict.fromkeys(row.method for row in self.sites))

    @property
    def targets(self) -> tuple[str, ...]:
        """Named targets found, in the order in which rules have to name them."""
        found = {row.target for row in self.sites}
        return tuple(target for target in TARGETS if target in found)

    def by_target(self) -> dict[tuple[str, str], list[SiteFidelity]]:
        """Return the rows of every (target, method)."""
        found: dict[tuple[str, str], list[SiteFidelity]] = {}
        for row in self.sites:
            found.setdefault((row.target, row.method), []).append(row)
        return found

    def text(self, *, sites: bool = True) -> str:
        """Return a table, a line a site and method, or a line a target and method."""
        parts = ("error", "bias", "noise", "cosine", "lasting", "stored", "FLOPs saved")
        header = ("site", "method", *parts)
        if sites:
            lines = [_line(", ".join(row.parameters), [row]) for row in self.sites]
        else:
            lines = [_line(target, rows) for (target, _), rows in self.by_target().items()]
        return _table(header, lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"draws": self.draws, "sites": [asdict(row) for row in self.sites]}

    def to_json(self) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def plot(self, path: str | None = None) -> Any:
        """Draw error over bytes stored, a panel a target and a point a method.

        Args:
            path: where to save the picture; None saves nothing.

        Returns:
            The Matplotlib figure.

        Raises:
            MeasurementError: Matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MeasurementError(
                "plot() needs Matplotlib, which is not installed: pip install matplotlib."
            ) from error
        targets = self.targets
        figure: Any = Figure(figsize=(1 + 3 * max(1, len(targets)), 3.6), layout="constrained")
        axes = figure.subplots(1, max(1, len(targets)), sharey=True, squeeze=False)[0]
        for axis, target in zip(axes, targets, strict=False):
            for method in self.methods:
                rows = self.by_target().get((target, method), [])
                if rows:
                    tokens = sum(row.shape[0] for row in rows)
                    stored = sum(row.bytes_stored for row in rows) / tokens
                    axis.plot(
                        stored, root_mean_square(row.error for row in rows), "o", label=method
                    )
            axis.set(title=target, xlabel="bytes a token", xscale="log")
        axes[0].set_ylabel("error of the weight gradients")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def fidelity(
    model: torch.nn.Module,
    *args: Any,
    rules: Mapping[Any, Method | None] | str | None = None,
    methods: Sequence[Method] | None = None,
    draws: int = 4,
    loss: Callable[[Any], Tensor] | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Fidelity:
    """Measure how close methods come to the exact weight gradients, on a real batch.

    Equivalent to running forward and backward once, exactly, and comparing at every input X of
    projections `method.weight_gradients(method.store(X, seed), [dZ])` with dZᵀX for several seeds.
    A method that remembers does so of the first third of the tokens, and is compared on the others.
    Everything that this changes is restored. Hooks of modules run once, hooks on gradients of
    parameters do not run. Like `explain` it resets Dynamo.

    Args:
        model: any module; a compiled one is unwrapped.
        args: what to call it with.
        rules: {target: method}, or text, as `backend` takes them: every site by its own method.
        methods: to compare at every site of the model, in place of `rules`.
        draws: of every method; 2 or more separate bias from noise.
        loss: makes a scalar of what the model returns; by default its `loss`, or a scalar itself.
        progress: whether to show a bar, where tqdm is installed; None does in a terminal.
        kwargs: what to call it with.

    Returns:
        The figures: print them, or use `sites`, `to_json()` and `plot()`.

    Raises:
        InvalidOptionError: not exactly one of `rules` and `methods` is given, draws < 1, or an
            option would go to the model.
        MeasurementError: the model returns no loss, nothing was found, or the model is fake or on
            the meta device.
        MethodError: a method broke a rule of methods.
    """
    refuse_options(model, kwargs, "What is compared is given as rules=… or methods=….")
    if (rules is None) == (methods is None) or (methods is not None and not methods):
        raise InvalidOptionError(
            "fidelity() needs either rules, a method for every target, or methods, to compare "
            'everywhere. For example methods=[Pamm(64), Subspace(0.1)] or rules="linear=subspace".'
        )
    checks.integer("draws", draws, 1, "More of them tell the noise from the bias.")
    refuse_without_values("fidelity()", model, (args, kwargs))
    compared = list(methods or [])
    chosen = make_rules(rules) if rules is not None else (Rule("linear", compared[0]),)
    rows: list[tuple[int, SiteFidelity]] = []
    bar = _Bar(progress)

    def measure(observation: Observation) -> None:
        for method in compared or [observation.method]:
            rows.append((observation.place, _compare(observation, method, draws)))
        bar.advance()

    def observe(gm: GraphModule, inputs: Sequence[Any], names: Names) -> Compiled:
        step = ObserveSites(chosen, measure)
        compiled = compile_graph(gm, inputs, Pipeline([step], names.by_key), mode=Mode.LOOK)
        bar.expect(step.sites)
        return compiled

    def run(compiled: torch.nn.Module) -> None:
        scalar = _loss_of(compiled(*args, **kwargs), loss)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Not backward(), whose gradients would be of no use.
        torch.autograd.grad(scalar, trained, allow_unused=True)

    with undisturbed(model, (args, kwargs)), bar:
        visit(model, run, observe)
    if not rows:
        raise MeasurementError(
            "nothing to compare: the rules hold no projection whose weight gradient is made. "
            "pamm_compile.explain(model, …) says what was found."
        )
    return Fidelity([row for _, row in sorted(rows, key=lambda pair: pair[0])], draws)


def _compare(observation: Observation, method: Method, draws: int) -> SiteFidelity:
    size, all_tokens = observation.size, Tokens(observation.x, observation.gradients)
    before, now, later = all_tokens.thirds()
    # What is remembered has to be of other tokens than those it is used for.
    first = len(before.x) if isinstance(method, Remembering) else 0
    compared = Tokens(all_tokens.x[first:], [grad[first:] for grad in all_tokens.grads])
    exact, other = flat(compared.exact()), flat(later.exact())
    norm = exact.norm()
    squares, cosines, total, common = [], [], torch.zeros_like(exact), []
    for draw in range(draws):
        found = made(method, compared, size, draw, before)
        total += found
        squares.append(_ratio((found - exact).norm(), norm) ** 2)
        cosines.append(_ratio(found @ exact, found.norm() * norm))
        common.append(float(made(method, now, size, draw, before) @ other))
    error, of_mean = statistics.fmean(squares), _ratio((total / draws - exact).norm(), norm) ** 2
    # The mean of D draws still has 1/D of the noise: E‖mean − exact‖² = bias² + noise²/D.
    noise = max(0.0, error - of_mean) * draws / (draws - 1) if draws > 1 else math.nan
    in_common = float(flat(now.exact()) @ other)
    return SiteFidelity(
        parameters=observation.parameters,
        target=observation.target,
        method=str(method),
        described=method.describe(size),
        shape=(size.tokens, size.features),
        error=error**0.5,
        bias=max(0.0, error - noise) ** 0.5 if draws > 1 else math.nan,
        noise=noise**0.5,
        cosine=statistics.fmean(cosines),
        lasting=statistics.fmean(common) / in_common if in_common > 0 else math.nan,
        bytes_exact=size.bytes,
        bytes_stored=method.stored_bytes(size),
        flops_saved=1 - method.cost(size).flops / exact_cost(size).flops,
        flops_exact=exact_cost(size).flops,
        time=1 - saved_time(method, size),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    # A gradient of zeros, met exactly, is no error.
    return 0.0 if part == 0 and whole == 0 else float(part / whole)


def _loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    found: Any
    if loss is not None:
        found = loss(output)
    elif isinstance(output, Mapping):
        found = output.get("loss")
    else:
        found = getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise MeasurementError(
            f"the model returned {type(output).__name__} and no loss: {_LOSS_HINT}"
        )
    if not found.requires_grad:
        raise MeasurementError(f"the loss has no gradient: train a parameter, or {_LOSS_HINT}")
    scalar: Tensor = found.reshape(())
    return scalar


def root_mean_square(errors: Iterable[float]) -> float:
    """Return √ of the mean of squares."""
    return math.sqrt(statistics.fmean(error**2 for error in errors))


def _median(shares: Iterable[float]) -> float:
    """Return the median of what is known; NaN of nothing."""
    known = [share for share in shares if not math.isnan(share)]
    return statistics.median(known) if known else math.nan


def _line(name: str, rows: Sequence[SiteFidelity]) -> tuple[str, ...]:
    stored, exact = sum(r.bytes_stored for r in rows), sum(r.bytes_exact for r in rows)
    return (
        name,
        rows[0].method if len(rows) > 1 else f"{rows[0].method} ({rows[0].described})",
        *(
            f"{root_mean_square(getattr(row, part) for row in rows):.3f}"
            for part in ("error", "bias", "noise")
        ),
        f"{statistics.fmean(row.cosine for row in rows):.3f}",
        f"{_median(row.lasting for row in rows):.2f}",
        f"{stored / exact:.2%}",
        f"{statistics.fmean(row.flops_saved for row in rows):.0%}",
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )


class _Bar:
    """A bar of tqdm's, where it is installed; else nothing."""

    def __init__(self, shown: bool | None) -> None:
        self._bar: Any = None
        self._shown = shown

    def __enter__(self) -> _Bar:
        try:
            tqdm: Any = importlib.import_module("tqdm.auto").tqdm
        except ImportError:
            return self
        # tqdm's None is "in a terminal".
        disable = None if self._shown is None else not self._shown
        self._bar = tqdm(total=0, desc="fidelity", unit="site", disable=disable)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, sites: int) -> None:
        """Count sites to come."""
        if self._bar is not None:
            self._bar.total += sites

    def advance(self) -> None:
        """Count one done."""
        if self._bar is not None:
            self._bar.update()
