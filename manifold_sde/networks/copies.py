"""Copies of modules that hold anything, and calls that leave nothing behind in them.

A module may keep tensors that are neither parameters nor buffers: activations, or the weights that
the hooks of ``torch.nn.utils.weight_norm`` and ``prune`` compute anew at every call. torch copies
no tensor that has a history, and what a call under ``torch.func`` leaves is dead after it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manifold_sde.errors import ArgumentError
from manifold_sde.remedies import first_line

_Module = TypeVar("_Module", bound=nn.Module)
#: What torch itself keeps in a module.
_OWN = frozenset(vars(nn.Module()))


class _AsConstants(TorchFunctionMode):
    """Copies tensors that are no parameters as constants."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or not args[0].requires_grad:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


def independent_copy(module: _Module, what: str) -> _Module:
    """A copy of a module in which nothing requires a gradient.

    Args:
        module: The module.
        what: What it is, for messages.

    Raises:
        ArgumentError: If something in it cannot be copied.
    """
    try:
        with _AsConstants():
            return copy.deepcopy(module).requires_grad_(False)
    except Exception as error:
        raise ArgumentError(
            f"the {what} cannot be copied",
            received=f"a {type(module).__name__}: {first_line(error)}",
            expected=f"a {what} that copy.deepcopy copies",
            remedy="keep files, locks and generators out of it, or make them where they are used",
        ) from error


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Afterwards the module holds the attributes that it held before.

    Lists, dictionaries and sets among them get their former content back.
    """
    before = [(own, dict(own)) for own in map(vars, module.modules())]
    values = [v for _, own in before for name, v in own.items() if name not in _OWN]
    kept = [(value, value.copy()) for value in _containers(values)]
    try:
        yield
    finally:
        for own, attributes in before:
            if own.keys() != attributes.keys() or any(own[n] is not attributes[n] for n in own):
                own.clear()
                own.update(attributes)
        for value, content in kept:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """The lists, dictionaries and sets among values, and those inside of them."""
    for value in values:
        if type(value) in (list, dict, set):
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value)
