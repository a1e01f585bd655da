"""Calling a method, and refusing what methods may not do.

Whoever writes a method sees no graph, so that what it does wrong must be said in its own terms: a
write to X would change the forward pass, a result of another shape another gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from pamm_compile.errors import MethodError
from pamm_compile.methods.base import Method, Remembering
from pamm_compile.private import aot, memory

T = TypeVar("T")


def store(method: Method, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
    """Return what a method stores.

    Equivalent to: `method.store(x, seed, outputs)`.

    Args:
        method: any.
        x: [b, n], floating point.
        seed: 0-dimensional int64 tensor in [0, 2³¹).
        outputs: m_p, columns of each projection's output.

    Returns:
        At least one tensor.

    Raises:
        MethodError: the method failed, wrote to its arguments, or returned something else.
    """
    name = _name(method, "store")
    given = {"x": x, "seed": seed}
    return _tensors(name, _call(name, given, lambda: method.store(x, seed, outputs)))


def store_along(method: Method, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
    """Return what a method that remembers stores, as `store` does.

    Raises:
        MethodError: the method failed, wrote to its arguments, or returned something else.
    """
    assert isinstance(method, Remembering)
    name = _name(method, "store_along")
    given = {"x": x, "memory": memory}
    return _tensors(name, _call(name, given, lambda: method.store_along(x, memory)))


def _tensors(name: str, stored: Any) -> tuple[Tensor, ...]:
    if not isinstance(stored, tuple | list) or not stored:
        raise MethodError(
            f"{name} returned {_described(stored)}. It must return a tuple of at least one tensor: "
            "write `return (tensor,)` for a single one."
        )
    for each in stored:
        if not isinstance(each, Tensor):
            raise MethodError(
                f"{name} returned {_described(each)} in its tuple, which must hold tensors only."
            )
        if any(aot.size_hint(size) is None for size in each.shape):
            raise MethodError(
                f"{name} returned a tensor whose size depends on values of x, as of a boolean "
                "index. Sizes may depend on the shape of x only: use torch.where or torch.topk."
            )
    return tuple(stored)


def weight_gradients(
    method: Method,
    stored: Sequence[Tensor],
    grads: Sequence[Tensor],
    transposed: Sequence[bool],
    features: int,
) -> list[Tensor]:
    """Return the weight gradients that a method makes.

    Equivalent to: `method.weight_gradients(stored, grads, transposed)`.

    Args:
        method: any.
        stored: what `store` returned.
        grads: dZ_p, [b, m_p] each.
        transposed: per projection, whether [n, m_p] is wanted.
        features: n.

    Returns:
        One matrix per projection, of the dtype of its dZ.

    Raises:
        MethodError: the method failed, wrote to its arguments, or returned something else.
    """
    name = _name(method, "weight_gradients")
    given = _numbered("stored", stored) | _numbered("grads", grads)
    made: Any = _call(name, given, lambda: method.weight_gradients(stored, grads, transposed))
    return _matrices(name, made, grads, transposed, features)


def weight_gradients_along(
    method: Method,
    stored: Sequence[Tensor],
    grads: Sequence[Tensor],
    transposed: Sequence[bool],
    features: int,
) -> list[Tensor]:
    """Return the weight gradients of a method that remembers, as `weight_gradients` does.

    Args:
        stored: what `store_along` returned, and the memory behind it.

    Raises:
        MethodError: the method failed, wrote to its arguments, or returned something else.
    """
    assert isinstance(method, Remembering)
    name = _name(method, "weight_gradients_along")
    *kept, memory = stored
    given = _numbered("stored", kept) | {"memory": memory} | _numbered("grads", grads)
    made: Any = _call(
        name, given, lambda: method.weight_gradients_along(kept, memory, grads, transposed)
    )
    return _matrices(name, made, grads, transposed, features)


def _matrices(
    name: str, made: Any, grads: Sequence[Tensor], transposed: Sequence[bool], features: int
) -> list[Tensor]:
    if not isinstance(made, tuple | list) or len(made) != len(grads):
        count = f"{len(made)} results" if isinstance(made, tuple | list) else _described(made)
        raise MethodError(
            f"{name} returned {count} for {len(grads)} projection(s). It must return a list of one "
            "matrix per projection."
        )
    for place, (each, grad, flip) in enumerate(zip(made, grads, transposed, strict=True)):
        shape = (features, grad.shape[1]) if flip else (grad.shape[1], features)
        same = isinstance(each, Tensor) and _sizes(each.shape) == _sizes(shape)
        if not same or each.dtype != grad.dtype or each.device != grad.device:
            raise MethodError(
                f"{name} returned {_described(each)} for projection {place}, whose weight gradient "
                f"is {_listed(shape)} of {grad.dtype} on {grad.device}, the dtype of grads[{place}]"
                f"{', and wanted transposed' if flip else ''}."
            )
    return list(made)


def _numbered(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{number}]": each for number, each in enumerate(tensors)}


def _call(name: str, given: Mapping[str, Tensor], call: Callable[[], T]) -> T:
    names = {memory.storage_address(tensor): argument for argument, tensor in given.items()}

    def written(operator: str, tensor: Tensor) -> None:
        if argument := names.get(memory.storage_address(tensor)):
            raise MethodError(
                f"{name} writes to {argument} in place ({operator}), which others read. Work on a "
                f"copy: `{argument}.clone()`, or operators that return a new tensor."
            )

    try:
        with aot.WatchWrites(written):
            return call()
    except MethodError:
        raise
    except aot.DEPENDS_ON_VALUES as error:
        raise MethodError(
            f"{name} depends on values of a tensor ({_first_line(error)}): `.item()`, `int()`, "
            "`if`, `while` and boolean indices are not allowed, since it is traced once for all "
            "values. Use torch.where, masks, or sizes."
        ) from error
    except Exception as error:
        raise MethodError(f"{name} raised {type(error).__name__}: {_first_line(error)}") from error


def _name(method: Method, function: str) -> str:
    return f"{type(method).__name__}.{function}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {_listed(value.shape)} of {value.dtype} on {value.device}"
    return f"an empty {type(value).__name__}" if value in ((), []) else f"a {type(value).__name__}"


def _listed(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _sizes(shape: Sequence[Any]) -> list[Any]:
    # Compared as expressions, which adds no guard.
    return [aot.size_key(size) for size in shape]
