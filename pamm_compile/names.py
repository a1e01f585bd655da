"""Names of the parameters of a graph that Dynamo captured."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from pamm_compile.private import aot


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
