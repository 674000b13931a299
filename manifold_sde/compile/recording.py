"""The operations of a function of one point, derivatives included, as they are dispatched.

The function runs once, under a mode that sees every operation of torch after ``torch.func`` has
taken it apart. Nothing is proxied, so that this takes milliseconds where a graph of ``torch.fx``
takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Unsupported(RuntimeError):
    """A function that cannot be written as a program, or a value that is not to be looked at.

    Torch raises a ``RuntimeError``, too, where there is no value: a check of it is then left out.
    """


#: Operations whose result is a number of Python that may steer the function.
_READING = {"_local_scalar_dense", "equal", "is_nonzero", "allclose"}


@dataclass(frozen=True)
class Ref:
    """A tensor of a recording, by its number."""

    number: int

    def __repr__(self) -> str:
        return f"%{self.number}"


@dataclass(frozen=True)
class Operation:
    """One operation: tensors among arguments and results are :class:`Ref`.

    Attributes:
        target: The operation of torch.
        args: Its arguments.
        kwargs: Its named arguments.
        result: What it returns.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def __repr__(self) -> str:
        named = "".join(f", {k}={v!r}" for k, v in self.kwargs.items())
        return f"{self.result!r} = {self.target}{self.args!r}{named}"

    @property
    def name(self) -> str:
        """The name of the operation, without its overload."""
        return _name(self.target)

    @property
    def in_place(self) -> bool:
        """Whether it writes to an argument."""
        name = self.name
        return (name.endswith("_") and not name.startswith("_")) or name == "copy_to"


@dataclass
class Recording:
    """The operations of a function at one point.

    Attributes:
        operations: In their order.
        inputs: Numbers of the arguments.
        results: What the function returned, tensors as :class:`Ref`.
        held: Tensors that the function holds, by number.
    """

    operations: list[Operation] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    results: Any = None
    held: dict[int, Tensor] = field(default_factory=dict)

    def needed(self) -> list[Operation]:
        """The operations that write, or whose results are used."""
        used = {ref.number for ref in refs(self.results)}
        kept = []
        for operation in reversed(self.operations):
            if operation.in_place or any(r.number in used for r in refs(operation.result)):
                kept.append(operation)
                used |= {r.number for r in refs((operation.args, operation.kwargs))}
        return kept[::-1]


def record(function: Callable[..., Any], point: tuple[Tensor, ...]) -> Recording:
    """Record a function of tensors at a point.

    Args:
        function: Function of tensors; may use ``torch.func`` freely.
        point: Example tensors.

    Raises:
        Unsupported: If a number that depends on the arguments steers the function.
    """
    mode = _Recorder()
    arguments = tuple(a.clone() for a in point)
    for argument in arguments:
        mode.found.inputs.append(mode.new(argument).number)
        mode.depends.add(mode.found.inputs[-1])
    with torch.no_grad(), mode:
        results = function(*arguments)
    mode.found.results = mode.refer(results)
    return mode.found


class _Recorder(TorchDispatchMode):
    """Runs operations, and notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Recording()
        self.depends: set[int] = set()
        # A tensor is told by its address, which is its own as long as it lives.
        self._numbers: dict[int, Ref] = {}
        self._alive: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from loading a compiler to keep this mode away from it."""
        return False

    def new(self, tensor: Tensor) -> Ref:
        """The number of a tensor, a new one where it has none."""
        ref = self._numbers.get(id(tensor))
        if ref is None:
            ref = self._numbers[id(tensor)] = Ref(len(self._alive))
            self._alive.append(tensor)
        return ref

    def refer(self, value: Any) -> Any:
        """A value with numbers for tensors; those that nothing made are held by the function."""

        def number(tensor: Tensor) -> Ref:
            known = id(tensor) in self._numbers
            ref = self.new(tensor)
            if not known:
                self.found.held[ref.number] = tensor
            return ref

        return mapped(number, Tensor, value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        before, named = self.refer(tuple(args)), self.refer(kwargs)
        # Torch ends the process where a tensor of no storage is multiplied by a number in a mode.
        make = torch.zeros if func is torch.ops.aten._efficientzerotensor.default else func
        result = make(*args, **kwargs)
        depends = any(ref.number in self.depends for ref in refs((before, named)))
        if depends and _name(func) in _READING:
            raise Unsupported("a number that depends on the point")
        after = mapped(self.new, Tensor, result)
        self.found.operations.append(Operation(func, before, named, after))
        if depends:
            self.depends |= {ref.number for ref in refs(after)}
            # What is written to what was constant makes that depend on the point.
            if self.found.operations[-1].in_place:
                self.depends |= {ref.number for ref in refs(before[:1])}
        return result


def _name(target: Any) -> str:
    return str(target.overloadpacket).split(".")[-1]


def mapped(function: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """A nested value with a function applied to what is of a kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        # Results under names are tuples here.
        parts = [mapped(function, kind, part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {name: mapped(function, kind, part) for name, part in value.items()}
    return value


def refs(value: Any) -> Iterator[Ref]:
    """The tensors of a nested value."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from refs(part)
    elif isinstance(value, dict):
        yield from refs(tuple(value.values()))
