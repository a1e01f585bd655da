"""Methods of the kvpress package as caches, for budgets.py.

    pip install --no-deps kvpress
    pip install datasets requests "cachetools<6" "fire<0.7"

kvpress 0.5.5 asks for a Transformers before 5.3, where a cache went by another name, which is why
pip must not follow it; the scores and what is kept are its own. It drops tokens once, after the
prompt, and keeps all that come later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as hf
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_functions = dict(ALL_ATTENTION_FUNCTIONS.items())
import kvpress  # noqa: E402

# It wraps every attention function there is, for methods that are not among these.
for _name, _function in _functions.items():
    ALL_ATTENTION_FUNCTIONS[_name] = _function

PRESSES: dict[str, Callable[[float], Any]] = {
    "KeyDiff (kvpress)": kvpress.KeyDiffPress,
    "LeverageScore (kvpress)": kvpress.LeverageScorePress,
    "SnapKV (kvpress)": lambda ratio: kvpress.SnapKVPress(ratio, window_size=16),
    "ExpectedAttention (kvpress)": kvpress.ExpectedAttentionPress,
    "StreamingLLM (kvpress)": kvpress.StreamingLLMPress,
}


class PressCache(hf.DynamicCache):
    """A cache whose layers a press shortens once the prompt is in them.

    Args:
        press: from the share of tokens to drop, a press that scores them.
        budget: tokens kept.
    """

    def __init__(self, press: Callable[[float], Any], budget: int) -> None:
        super().__init__()
        self.press = press
        self.budget = budget

    def shorten(self, module: Any, inputs: dict[str, Any]) -> None:
        """Drop tokens of a module's layer after its first call, as a hook of kvpress does."""
        layer: Any = self.layers[module.layer_idx]
        length = layer.keys.shape[2]
        if length != inputs["hidden_states"].shape[1]:
            return
        # A half keeps rounding from dropping one token more.
        press = self.press(max(0.0, 1 - (self.budget + 0.5) / length))
        layer.keys, layer.values = press.compress(
            module, inputs["hidden_states"], layer.keys, layer.values, None, inputs
        )


def prepare(model: Any) -> None:
    """Let caches of this module see what attention modules are given."""

    def after(module: Any, args: tuple[Tensor, ...], inputs: dict[str, Any], output: Any) -> None:
        if isinstance(inputs.get("cache"), PressCache):
            inputs["cache"].shorten(module, inputs)

    for layer in model.model.layers:
        # Where the presses look for it, and no second module of the model.
        object.__setattr__(layer.self_attn, "rotary_emb", model.model.rotary_emb)
        layer.self_attn.register_forward_hook(after, with_kwargs=True)


METHODS: dict[str, Callable[[int], Any]] = {
    name: partial(PressCache, press) for name, press in PRESSES.items()
}
