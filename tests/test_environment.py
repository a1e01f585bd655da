"""Options that come from environment variables: what they mean, what is refused, who reads them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pamm_testing.forms import FusedQKV
from pamm_testing.options import make_options
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import nn

import pamm_compile
from pamm_compile.environment import environment_variables, options_from_environment
from pamm_compile.options import Options


@pytest.mark.parametrize(
    ("variable", "text", "option", "value"),
    [
        ("PAMM_COMPILE_RATIO", "64", "ratio", 64),
        ("PAMM_COMPILE_RATIO", "1.5", "ratio", 1.5),
        ("PAMM_COMPILE_EPSILON", "0.5", "epsilon", 0.5),
        ("PAMM_COMPILE_EPSILON", "inf", "epsilon", float("inf")),
        ("PAMM_COMPILE_SAMPLING", "uniform", "sampling", "uniform"),
        ("PAMM_COMPILE_MIN_GENERATORS", "32", "min_generators", 32),
        ("PAMM_COMPILE_MIN_TOKENS", "1", "min_tokens", 1),
        ("PAMM_COMPILE_TARGETS", "linear", "targets", "linear"),
        ("PAMM_COMPILE_TARGETS", r"mlp\.up", "targets", re.compile(r"mlp\.up")),
        ("PAMM_COMPILE_STRICT", "1", "strict", True),
        ("PAMM_COMPILE_STRICT", "TRUE", "strict", True),
        ("PAMM_COMPILE_STRICT", "false", "strict", False),
        ("PAMM_COMPILE_SEED", "3", "seed", 3),
        ("PAMM_COMPILE_BASE", "aot_eager", "base", "aot_eager"),
    ],
)
def test_what_a_variable_means(variable: str, text: str, option: str, value: object) -> None:
    given = options_from_environment({variable: text, "PAMM": "1", "OTHER_RATIO": "2"})
    assert list(given) == [option]
    assert given == {option: pytest.approx(value) if isinstance(value, float) else value} or (
        make_options(**given) == make_options(**{option: value})
    )


def test_every_option_has_a_variable() -> None:
    assert sorted(environment_variables().values()) == sorted(Options.names())
    assert environment_variables()["PAMM_COMPILE_MIN_GENERATORS"] == "min_generators"


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("PAMM_COMPILE_RATIO", "many", r"PAMM_COMPILE_RATIO=many: ratio='many' is not allowed"),
        ("PAMM_COMPILE_RATIO", "0", r"PAMM_COMPILE_RATIO=0: ratio=0 .* at least 1"),
        ("PAMM_COMPILE_RATIO", "", r"PAMM_COMPILE_RATIO=: ratio='' is not allowed"),
        ("PAMM_COMPILE_MIN_TOKENS", "1.5", r"PAMM_COMPILE_MIN_TOKENS=1\.5: .*an integer"),
        ("PAMM_COMPILE_SAMPLING", "stratifed", r"PAMM_COMPILE_SAMPLING=.*mean 'stratified'"),
        ("PAMM_COMPILE_STRICT", "yes", r"PAMM_COMPILE_STRICT=yes: .* True or False"),
        ("PAMM_COMPILE_TARGETS", "(", r"PAMM_COMPILE_TARGETS=\(: .*no regular expression.*'qkv'"),
        ("PAMM_COMPILE_TARGETS", "", r"PAMM_COMPILE_TARGETS=: targets='' is not allowed"),
        ("PAMM_COMPILE_BASE", "eager", r"PAMM_COMPILE_BASE=eager: .*'aot_eager'"),
        ("PAMM_COMPILE_RATOI", "64", r"'PAMM_COMPILE_RATOI' .*mean 'PAMM_COMPILE_RATIO'"),
        ("PAMM_COMPILE_", "64", r"'PAMM_COMPILE_' is not an option"),
    ],
)
def test_what_is_refused(variable: str, text: str, message: str) -> None:
    with pytest.raises(pamm_compile.InvalidOptionError, match=message):
        options_from_environment({variable: text})


def _run(model: nn.Module, **how: Any) -> None:
    torch.compile(model, **how)(torch.randn(BATCH, LENGTH, WIDTH))


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, text in {"RATIO": "4", "MIN_TOKENS": "1", "BASE": "aot_eager", "SEED": "17"}.items():
        monkeypatch.setenv(f"PAMM_COMPILE_{name}", text)
    return monkeypatch


def _generators(**options: Any) -> list[int]:
    """What was compiled by name with these options."""
    report = pamm_compile.by_name({f"pamm.{name}": v for name, v in options.items()}).report
    return [site.generators for site in report.compressed]


@pytest.mark.usefixtures("variables")
def test_the_named_backend_reads_them() -> None:
    _run(FusedQKV(), backend="pamm")
    assert _generators() == [BATCH * LENGTH // 4]


@pytest.mark.usefixtures("variables")
def test_options_in_the_code_win() -> None:
    _run(FusedQKV(), backend="pamm", options={"pamm.ratio": 8, "pamm.seed": 18})
    assert _generators(ratio=8, seed=18) == [BATCH * LENGTH // 8]


@pytest.mark.usefixtures("variables")
def test_a_backend_object_does_not_read_them() -> None:
    assert pamm_compile.backend().options == make_options()


def test_a_wrong_variable_stops_the_compilation(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("PAMM_COMPILE_RATOI", "4")
    with pytest.raises(Exception, match="mean 'PAMM_COMPILE_RATIO'") as error:
        _run(FusedQKV(), backend="pamm")
    inner = getattr(error.value, "inner_exception", error.value)
    assert isinstance(inner, pamm_compile.InvalidOptionError)


def test_torch_takes_a_mode_or_options_by_name_but_not_both() -> None:
    """So that with a mode, the options of the named backend are the environment's."""
    with pytest.raises(RuntimeError, match="Either mode or options"):
        _run(FusedQKV(), backend="pamm", mode="max-autotune", options={"pamm.ratio": 4})


@pytest.mark.usefixtures("variables")
def test_a_mode_reaches_the_named_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("pamm_compile.private.inductor.compile_fx", compile_fx)
    monkeypatch.setenv("PAMM_COMPILE_BASE", "inductor")
    _run(FusedQKV(), backend="pamm", mode="max-autotune-no-cudagraphs")
    (patches,) = seen
    assert patches["max_autotune"] is True
    assert patches["joint_custom_pre_pass"].passes[0].options == make_options(
        ratio=4, min_tokens=1, seed=17
    )
