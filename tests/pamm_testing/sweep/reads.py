"""Which weights the products of a forward pass read, seen operator by operator in eager mode.

This shares nothing with the package's matching: it follows values, not a graph. A value that is
moved out of parameters alone (views, casts, rows picked, parts put together, scaled by what no
input enters) is still these parameters; a product that has one as a factor reads them. Weights that
are scaled by activations are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "_addmm_activation", "linear",
    "matmul", "_grouped_mm", "_scaled_mm", "_int_mm", "mkldnn_rnn_layer",
}  # fmt: skip
"""Operators of aten that multiply matrices."""

MOVES = {
    "_to_copy", "clone", "contiguous", "copy", "cat", "stack", "index", "index_select", "gather",
    "constant_pad_nd", "repeat", "flip", "roll", "take", "take_along_dim", "repeat_interleave",
    "_unsafe_index", "masked_select", "_reshape_copy", "_conj_physical", "lift_fresh",
}  # fmt: skip
"""Operators that move entries, besides views."""

ELEMENTWISE = {
    "mul", "div", "add", "sub", "neg", "rsub", "exp", "sigmoid", "tanh", "where", "masked_fill",
    "_weight_norm_interface", "reciprocal", "pow",
}  # fmt: skip
"""Operators that make a weight of a weight, where nothing that depends on the inputs enters."""

# An embedding is a move where its rows do not depend on the model's inputs, as of positions.
LOOKUPS = {"embedding"}


class Reads(TorchDispatchMode):
    """Records which parameters are factors of products, while it is entered.

    Attributes:
        found: of every parameter of two dimensions or more that a product reads beside something
            else than parameters, the operators.
        beside_weights: of those that are read beside parameters alone, as learned queries are.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}
        self.beside_weights: dict[str, set[str]] = {}
        self._kept: list[Tensor] = []
        self._of: dict[int, frozenset[str]] = {}
        self._dependent: set[int] = set()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                self._keep(parameter)
                self._of[_key(parameter)] = frozenset([name])
        for tensor in _tensors([inputs]):
            self._keep(tensor)
            self._dependent.add(_key(tensor))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = list(_tensors([args, kwargs or {}]))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS and torch.is_grad_enabled():
            factors = given[1:] if name in {"addmm", "baddbmm", "addbmm", "addmv"} else given
            alone = all(_key(factor) in self._of for factor in factors)
            found = self.beside_weights if alone else self.found
            for factor in factors:
                for parameter in self._of.get(_key(factor), ()):
                    found.setdefault(parameter, set()).add(name)
        self._follow(name, func, given, list(_tensors([result])))
        return result

    def _follow(self, name: str, func: Any, given: list[Tensor], results: list[Tensor]) -> None:
        dependent = any(_key(t) in self._dependent for t in given)
        lookup = name in LOOKUPS and not dependent
        values = [t for t in given if t.is_floating_point()]
        owners = [self._of.get(_key(t), frozenset()) for t in values]
        moved: frozenset[str] = frozenset()
        if all(owners) if name in MOVES or lookup else name in ELEMENTWISE and not dependent:
            moved = frozenset().union(*owners)
        for result in results:
            key = _key(result)
            if any(key == _key(t) for t in given):
                continue  # a view, or written in place: the storage is known
            self._keep(result)
            if dependent:
                self._dependent.add(key)
            if moved:
                self._of[key] = moved

    def _keep(self, tensor: Tensor) -> None:
        # A storage that is freed would lend its address to another.
        self._kept.append(tensor)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def compiled_parameters(
    model: nn.Module, inner: Callable[..., Any], seen: set[str]
) -> Callable[..., Any]:
    """Return a backend that notes which parameters enter graphs, and hands on to another."""
    from pamm_compile.private import aot

    names = {id(p): name for name, p in model.named_parameters()}

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        examples = [example for example, _ in aot.dynamo_inputs(gm)] + list(gm.parameters())
        seen.update(names[id(each)] for each in examples if id(each) in names)
        return inner(gm, inputs)

    return backend
