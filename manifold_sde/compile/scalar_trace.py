"""Tracing a function of one point to a program of scalar operations.

A tensor is represented by an integer tensor of its shape that holds the numbers of its values in
the program. What only moves numbers (views, slices, concatenation, writing in place) is torch's own
operation on these integers; what computes has a rule here, or is decomposed by torch into what has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile import scalar_algebra, scalar_places
from manifold_sde.compile.recording import (
    Operation,
    Recording,
    Ref,
    Unsupported,
    mapped,
    record,
)
from manifold_sde.compile.scalar_program import ScalarProgram
from manifold_sde.compile.scalar_rules import (
    ENTRYWISE,
    FILLED,
    MOVES,
    NOTHING,
    RULES,
    Numbers,
    table,
)

aten, prims = torch.ops.aten, torch.ops.prims

#: Most operations of a program, and numbers that it takes of a point: beyond, it wants loops.
MOST_OPERATIONS = 60_000
MOST_INPUTS = 4096

_RULES = RULES | scalar_places.RULES | scalar_algebra.RULES


@dataclass(frozen=True)
class Traced:
    """A function of one point as a program.

    Attributes:
        program: The program; its outputs are the results' entries, in order.
        shapes: Shapes of the results for one point.
        single: Whether the function returns one tensor and no tuple.
        given: Tensors that the function holds.
    """

    program: ScalarProgram
    shapes: list[tuple[int, ...]]
    single: bool
    given: list[Tensor]


def scalar_program(function: Callable[..., Any], point: tuple[Tensor, ...]) -> Traced:
    """Program of a function of one point.

    Args:
        function: Function of tensors; may use ``torch.func`` freely.
        point: Example tensors, of one floating dtype.

    Raises:
        Unsupported: If an operation has no rule, or there are too many.
    """
    dtype = point[0].dtype
    if any(a.dtype != dtype or not a.is_floating_point() for a in point):
        raise Unsupported("arguments of several dtypes")
    if sum(a.numel() for a in point) > MOST_INPUTS:
        raise Unsupported("too many numbers")
    run = _Scalars(record(function, point), dtype)
    inputs = []
    for k, tensor in enumerate(point):
        values = [run.program.value(("input", k, i)) for i in range(tensor.numel())]
        inputs.append(Numbers(table(values, tensor.shape), dtype))
    results = run.run(inputs)
    single = not isinstance(results, (tuple, list))
    results = [run.numbers(r) for r in ([results] if single else results)]
    if any(r.dtype != dtype for r in results):
        raise Unsupported("results of another dtype")
    run.program.outputs = [r.values.flatten().tolist() for r in results]
    shapes = [tuple(r.values.shape) for r in results]
    return Traced(run.program.with_reciprocals(), shapes, single, run.given)


class _Scalars:
    """Runs what was recorded at one point on the numbers of values."""

    def __init__(
        self, recording: Recording, dtype: torch.dtype, parent: _Scalars | None = None
    ) -> None:
        self.recording = recording
        self.dtype = dtype
        self.program: ScalarProgram = ScalarProgram() if parent is None else parent.program
        self.given: list[Tensor] = [] if parent is None else parent.given
        self.known: dict[int, Any] = {}

    def run(self, inputs: Sequence[Numbers]) -> Any:
        """The results for these arguments."""
        known = self.known
        known |= dict(zip(self.recording.inputs, inputs, strict=True))
        known |= {number: self.held(tensor) for number, tensor in self.recording.held.items()}

        def look_up(value: Any) -> Any:
            return mapped(lambda ref: known[ref.number], Ref, value)

        for operation in self.recording.needed():
            kwargs = look_up(operation.kwargs)
            found = self.call(operation, list(look_up(operation.args)), kwargs)
            _keep(known, operation.result, found)
        return look_up(self.recording.results)

    # Tensors.

    def numbers(self, value: Any) -> Numbers:
        """A tensor or a number as values of the program."""
        if isinstance(value, Numbers):
            return value
        if isinstance(value, Tensor):
            if value.numel() > MOST_OPERATIONS or value.is_complex():
                raise Unsupported("a large constant")
            entries = [self.program.constant(a) for a in value.flatten().tolist()]
            return Numbers(table(entries, value.shape), value.dtype)
        if isinstance(value, (bool, int, float)):
            kind = torch.bool if isinstance(value, bool) else self.dtype
            return Numbers(torch.tensor(self.program.constant(value)), kind)
        raise Unsupported(f"a {type(value).__name__}")

    def held(self, value: Tensor) -> Any:
        """A tensor that the function holds: its numbers are read when the program runs."""
        if not value.is_floating_point():
            return value
        if value.numel() > MOST_OPERATIONS:
            raise Unsupported("a large tensor")
        same = (k for k, other in enumerate(self.given) if is_same(other, value))
        k = next(same, None)
        if k is None:
            k = len(self.given)
            self.given.append(value.detach())
        entries = [self.program.value(("given", k, i)) for i in range(value.numel())]
        return Numbers(table(entries, value.shape), value.dtype)

    def call(self, operation: Operation, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Apply an operation."""
        if len(self.program.operations) > MOST_OPERATIONS:
            raise Unsupported("too many operations")
        target, name = operation.target, operation.name
        if name in FILLED:
            return self._filled(name, args, kwargs)
        if not _has_numbers(args) and not _has_numbers(list(kwargs.values())):
            return target(*args, **kwargs)
        if name == "copy_to":
            return self._in_place(target, "copy", args, kwargs)
        if operation.in_place and hasattr(aten, name[:-1]):
            packet = getattr(aten, name[:-1])
            target = getattr(packet, target._overloadname, packet)
            return self._in_place(target, name[:-1], args, kwargs)
        return self.compute(target, name, args, kwargs)

    def compute(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Apply an operation that returns something new."""
        if name in scalar_places.PLACES and isinstance(args[2], Numbers):
            return scalar_places.PLACES[name](self, *args, **kwargs)
        if name in MOVES:
            return self._move(target, args, kwargs)
        if name in scalar_places.LINEAR:
            return scalar_places.linear(self, target, args, kwargs)
        if name in NOTHING:
            return self.numbers(args[0])
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, *args, **kwargs)
        if name in ENTRYWISE:
            return self.entrywise(ENTRYWISE[name], *args)
        return self._decomposed(target, args, kwargs)

    # Kinds of operations.

    def entrywise(self, function: Callable[..., int], *args: Any, dtype: Any = None) -> Numbers:
        """A function of values, entry by entry."""
        parts = [self.numbers(a) for a in args]
        arrays = torch.broadcast_tensors(*(p.values for p in parts))
        if arrays[0].numel() > MOST_OPERATIONS:
            raise Unsupported("too many operations")
        columns = (a.flatten().tolist() for a in arrays)
        entries = [function(self.program, *row) for row in zip(*columns, strict=True)]
        truth = bool(entries) and self.program.kind(entries[0]) == "b"
        kind = dtype or (torch.bool if truth else self.floating(*args, otherwise=torch.int64))
        return Numbers(table(entries, arrays[0].shape), kind)

    def floating(self, *args: Any, otherwise: Any) -> Any:
        """The floating dtype of what is made of arguments; another where all are whole."""
        tensors = [a.dtype for a in args if isinstance(a, (Tensor, Numbers))]
        found = [d for d in tensors if d.is_floating_point]
        whole = any(d not in (torch.bool, self.dtype) for d in tensors) and not any(
            isinstance(a, float) for a in args
        )
        return found[0] if found else otherwise if whole else self.dtype

    def reduce(
        self, x: Any, dims: Any, keep: bool, function: Callable[[list[int]], int]
    ) -> Numbers:
        """A function of the values along some dimensions."""
        x = self.numbers(x)
        rank = x.values.dim()
        if dims is None or dims == []:
            dims = list(range(rank))
        dims = [d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)]
        rest = [d for d in range(rank) if d not in dims]
        shape = [x.values.shape[d] for d in rest]
        rows = x.values.permute([*rest, *dims] if rank else []).reshape(*shape, -1)
        flat = rows.reshape(-1, rows.shape[-1]).tolist()
        found = table([function(row) for row in flat], shape)
        if keep:
            for d in sorted(dims):
                found = found.unsqueeze(d)
        return x.like(found)

    def product(self, a: Any, b: Any) -> Numbers:
        """Product of matrices or vectors, with batch dimensions or without."""
        a, b = self.numbers(a), self.numbers(b)
        left = a.values if a.values.dim() > 1 else a.values[None]
        right = b.values if b.values.dim() > 1 else b.values[:, None]
        if left.numel() * right.shape[-1] > MOST_OPERATIONS:
            raise Unsupported("a large product")
        pairs = self.entrywise(
            lambda p, x, y: p.apply("mul", x, y),
            a.like(left.unsqueeze(-1)),
            b.like(right.unsqueeze(-3)),
        )
        found = self.reduce(pairs, -2, False, self.program.total)
        values = found.values
        if a.values.dim() == 1:
            values = values.squeeze(-2)
        if b.values.dim() == 1:
            values = values.squeeze(-1)
        return found.like(values)

    def _move(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Torch's own operation, on the numbers of values."""
        if any(isinstance(a, Numbers) and not a.dtype.is_floating_point for a in args[1:]):
            raise Unsupported("a place that depends on the point")
        first = next(a for a in _flat(args) if isinstance(a, Numbers))

        def inner(a: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return type(a)(inner(b) for b in a)
            if isinstance(a, Tensor) and a.is_floating_point():
                a = self.numbers(a)
            return a.values if isinstance(a, Numbers) else a

        moved = [inner(a) for a in args]
        try:
            found = target(*moved, **{k: inner(v) for k, v in kwargs.items()})
        except RuntimeError:
            # These numbers lie in another order than torch's, so that a view of them is a copy.
            if getattr(target, "overloadpacket", None) not in (aten.view, aten._unsafe_view):
                raise
            found = moved[0].reshape(moved[1])
        if isinstance(found, (list, tuple)):
            return [first.like(a) for a in found]
        return first.like(found)

    def _filled(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """A new tensor of one number, which may be written to."""
        like = args[0] if args and isinstance(args[0], (Tensor, Numbers)) else None
        if name == "_new_zeros_with_same_feature_meta":
            batch = _shape(like)[: kwargs.get("self_num_batch_dims", 0)]
            shape, rest = (*batch, *_shape(args[1])), []
        elif name.endswith("_like"):
            shape, rest = _shape(like), args[1:]
        elif name == "new_empty_strided":
            shape, rest = args[1], []
            if list(args[2]) != list(torch.empty(tuple(shape), device="meta").stride()):
                raise Unsupported("a tensor of other strides")
        elif name.startswith("new_"):
            shape, rest = args[1], args[2:]
        else:
            shape, rest = args[0], args[1:]
        number = 1.0 if "ones" in name else rest[0] if "full" in name else 0.0
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else None)
        if dtype is None:
            dtype = torch.bool if isinstance(number, bool) else self.dtype
            if "full" in name and isinstance(number, int) and not isinstance(number, bool):
                dtype = torch.int64
        if not dtype.is_floating_point:
            return torch.full(tuple(shape), number, dtype=dtype)
        value = self.numbers(number).values
        return Numbers(torch.zeros(tuple(shape), dtype=torch.int64) + value, dtype)

    def _in_place(self, operation: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Write what the operation gives to its first argument."""
        target = args[0]
        if not isinstance(target, Numbers):
            target = self._to_write_to(target)
        if name in MOVES:  # another view of the same numbers
            target.values = self._move(operation, args, kwargs).values
            return target
        if name == "copy":
            result = self.numbers(args[1])
        elif name in ("zero", "fill"):
            result = self.numbers(0.0 if name == "zero" else args[1])
        else:
            result = self.compute(operation, name, args, kwargs)
        target.values.copy_(result.values)
        return target

    def _to_write_to(self, constant: Tensor) -> Numbers:
        """A constant as numbers from here on, where nothing else is a view of it."""
        memory = constant.untyped_storage().data_ptr()
        held = [
            number
            for number, value in self.known.items()
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory
        ]
        if any(self.known[number] is not constant for number in held):
            raise Unsupported("writing to a view of a constant")
        numbers = self.numbers(constant)
        self.known |= dict.fromkeys(held, numbers)
        return numbers

    def _decomposed(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """An operation by the simpler ones that torch writes it with."""
        rule = _decompositions().get(target)
        if rule is None:
            raise Unsupported(f"no C code for {target}")
        places: list[Numbers] = []

        def example(a: Any) -> Any:
            if isinstance(a, Numbers):
                places.append(a)
                return _Place(len(places) - 1)
            if isinstance(a, (list, tuple)):  # torch's own lists cannot be written to
                return (tuple if isinstance(a, tuple) else list)(example(b) for b in a)
            return a

        held, named = example(args), example(list(kwargs.values()))

        def function(*tensors: Tensor) -> Any:
            def filled(a: Any) -> Any:
                if isinstance(a, _Place):
                    return tensors[a.number]
                return type(a)(filled(b) for b in a) if isinstance(a, (list, tuple)) else a

            return rule(*filled(held), **dict(zip(kwargs, filled(named), strict=True)))

        examples = tuple(torch.full(p.values.shape, 0.5, dtype=p.dtype) for p in places)
        recording = record(function, examples)
        if any(operation.target is target for operation in recording.operations):
            raise Unsupported(f"no C code for {target}")
        return _Scalars(recording, self.dtype, self).run(places)


@dataclass(frozen=True)
class _Place:
    number: int


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import core_aten_decompositions, decomposition_table

    return {**decomposition_table, **core_aten_decompositions()}


def _keep(known: dict[int, Any], result: Any, found: Any) -> None:
    """Keep what an operation returned under the numbers of its results."""
    if isinstance(result, Ref):
        known[result.number] = found
    elif isinstance(result, (list, tuple)):
        for one, part in zip(result, found, strict=True):
            _keep(known, one, part)


def _flat(args: Any) -> Any:
    for a in args:
        if isinstance(a, (list, tuple)):
            yield from _flat(a)
        else:
            yield a


def _shape(a: Any) -> tuple[int, ...]:
    return tuple((a.values if isinstance(a, Numbers) else a).shape)


def _has_numbers(args: list[Any]) -> bool:
    return any(isinstance(a, Numbers) for a in _flat(args))


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one view of the same memory."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )
