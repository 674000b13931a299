"""Operations whose places depend on the point, or that put many numbers together, in scalars.

A place that depends on the point is a whole number of the program. What stands there is chosen by
comparison with every place that it can be, so that all points go through the same operations.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile.recording import Unsupported
from manifold_sde.compile.scalar_program import ScalarProgram
from manifold_sde.compile.scalar_rules import Numbers, scatter, table

#: Most comparisons or products of one operation.
MOST = 60_000


def _rows(x: Numbers, dim: int) -> tuple[list[list[int]], tuple[int, ...]]:
    """The values along a dimension, a row for each of the rest, and the shape of all rows."""
    values = x.values if x.values.dim() else x.values[None]
    moved = values.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1]).tolist(), tuple(moved.shape)


def _of_rows(rows: list[list[int]], shape: tuple[int, ...], dim: int) -> Tensor:
    """What :func:`_rows` takes apart, of rows of another length."""
    return table(rows, (*shape[:-1], len(rows[0]) if rows else 0)).movedim(-1, dim)


def _check(count: int) -> None:
    if count > MOST:
        raise Unsupported("too many operations")


def _at(program: ScalarProgram, row: list[int], place: int) -> int:
    """The value of a row at a place of the program."""
    found = row[0]
    for k, value in enumerate(row[1:], start=1):
        here = program.apply("eq", place, program.constant(float(k)))
        found = program.apply("where", here, value, found)
    return found


def _order(program: ScalarProgram, row: list[int], descending: bool) -> list[int]:
    """The place of each value of a row in its order; equal ones stay in theirs."""
    one = program.constant(1.0)
    places: list[int] = [0] * len(row)
    for i, j in itertools.combinations(range(len(row)), 2):
        pair = (row[j], row[i]) if descending else (row[i], row[j])
        first = program.number(program.apply("le", *pair))
        places[j] = program.apply("add", places[j], first)
        places[i] = program.apply("add", places[i], program.apply("sub", one, first))
    return places


def _sorted(run: Any, x: Any, dim: int, descending: bool, kept: Any = slice(None)) -> Any:
    """Values in order and their places, those kept of them."""
    x = run.numbers(x)
    rows, shape = _rows(x, dim)
    _check(len(rows) * shape[-1] ** 2)
    program, ranks = run.program, [run.program.constant(float(k)) for k in range(shape[-1])]
    values, places = [], []
    for row in rows:
        order = _order(program, row, descending)
        value_row, place_row = [], []
        for rank in ranks[kept]:
            value, place = row[0], 0
            for i in range(1, len(row)):
                here = program.apply("eq", order[i], rank)
                value = program.apply("where", here, row[i], value)
                place = program.apply("where", here, ranks[i], place)
            value_row.append(value)
            place_row.append(place)
        values.append(value_row)
        places.append(place_row)
    found = _of_rows(values, shape, dim), _of_rows(places, shape, dim)
    return x.like(found[0]), Numbers(found[1], torch.int64)


def _sort(
    run: Any, x: Any, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> Any:
    return _sorted(run, x, dim, descending)


def _topk(
    run: Any, x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    return _sorted(run, x, dim, largest, slice(0, k))


def _ranked(run: Any, x: Any, rank: int, dim: int, keepdim: bool) -> Any:
    pair = _sorted(run, x, dim, False, slice(rank, rank + 1))
    return pair if keepdim else tuple(a.like(a.values.squeeze(dim)) for a in pair)


def _median(run: Any, x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    x = run.numbers(x)
    if dim is None:
        flat = x.like(x.values.flatten())
        return _ranked(run, flat, (flat.values.numel() - 1) // 2, 0, False)[0]
    return _ranked(run, x, (x.values.shape[dim] - 1) // 2, dim, keepdim)


def _kthvalue(run: Any, x: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return _ranked(run, x, k - 1, dim, keepdim)


def _extreme(
    run: Any, x: Any, dim: int | None, keepdim: bool, name: str
) -> tuple[Numbers, Numbers]:
    """The largest or smallest values along a dimension, and the first places of them."""
    x = run.numbers(x)
    if dim is None:
        x, keepdim = x.like(x.values.flatten()), False
    along, program = dim or 0, run.program
    rows, shape = _rows(x, along)
    values, places = [], []
    for row in rows:
        value, place = row[0], 0
        for i, other in enumerate(row[1:], start=1):
            pair = (value, other) if name == "max" else (other, value)
            better = program.apply("lt", *pair)
            value = program.apply(name, value, other)
            place = program.apply("where", better, program.constant(float(i)), place)
        values.append([value])
        places.append([place])
    found = [_of_rows(part, shape, along) for part in (values, places)]
    if not keepdim:
        found = [part.squeeze(along) for part in found]
    return x.like(found[0]), Numbers(found[1], torch.int64)


def _largest(name: str) -> Callable[..., Any]:
    def rule(run: Any, x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
        pair = _extreme(run, x, dim, keepdim, name)
        return pair[0] if dim is None else pair

    return rule


def _first_place(name: str) -> Callable[..., Any]:
    def rule(run: Any, x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
        return _extreme(run, x, dim, keepdim, name)[1]

    return rule


def _gather(run: Any, x: Any, dim: int, index: Numbers, sparse_grad: bool = False) -> Numbers:
    x = run.numbers(x)
    places, shape = _rows(index, dim)
    first = x.values.movedim(dim, -1)[tuple(slice(n) for n in shape[:-1])]
    rows = first.reshape(-1, first.shape[-1]).tolist()
    _check(len(rows) * shape[-1] * first.shape[-1])
    found = [
        [_at(run.program, row, place) for place in some]
        for row, some in zip(rows, places, strict=True)
    ]
    return x.like(_of_rows(found, shape, dim))


def _index_select(run: Any, x: Any, dim: int, index: Numbers) -> Numbers:
    x = run.numbers(x)
    shape = list(x.values.shape)
    shape[dim] = index.values.numel()
    along = [1] * len(shape)
    along[dim] = -1
    return _gather(run, x, dim, index.like(index.values.reshape(along).expand(shape)))


def _index_add(
    run: Any, x: Any, dim: int, index: Numbers, source: Any, *, alpha: Any = 1
) -> Numbers:
    source = run.entrywise(lambda p, a, b: p.apply("mul", a, b), source, alpha)
    along = [1] * source.values.dim()
    along[dim] = -1
    places = index.like(index.values.reshape(along).expand(source.values.shape))
    return _scatter(run, x, dim, places, source, add=True)


def _scatter(run: Any, x: Any, dim: int, index: Any, values: Any, *, add: bool) -> Numbers:
    if not isinstance(index, Numbers):
        return scatter(run, x, dim, index, values, add=add)
    x, values = run.numbers(x), run.numbers(values)
    places, shape = _rows(index, dim)
    source = values.values.expand(index.values.shape) if not values.values.dim() else values.values
    source = source[tuple(slice(n) for n in index.values.shape)]
    new, _ = _rows(values.like(source), dim)
    moved = x.values.clone().movedim(dim, -1)
    part = moved[tuple(slice(n) for n in shape[:-1])]
    rows = part.reshape(-1, part.shape[-1]).tolist()
    _check(len(rows) * shape[-1] * part.shape[-1])
    program = run.program
    for row, some, those in zip(rows, places, new, strict=True):
        for place, value in zip(some, those, strict=True):
            for k, old in enumerate(row):
                here = program.apply("eq", place, program.constant(float(k)))
                written = program.apply("add", old, value) if add else value
                row[k] = program.apply("where", here, written, old)
    part.copy_(table(rows, part.shape))
    return x.like(moved.movedim(-1, dim).contiguous())


#: Rules of operations on places that depend on the point.
PLACES: dict[str, Callable[..., Any]] = {
    "gather": _gather,
    "index_select": _index_select,
    "index_add": _index_add,
}


# Sums of products.


def _products(
    run: Any, count: int, places: Tensor, a: Numbers, b: Numbers, pairs: tuple[Tensor, Tensor]
) -> list[int]:
    """Sums of products of entries of a and b, each at its place of the result."""
    left, right = a.values.flatten().tolist(), b.values.flatten().tolist()
    terms: list[list[int]] = [[] for _ in range(count)]
    for place, i, j in zip(places.tolist(), *(p.tolist() for p in pairs), strict=True):
        terms[place].append(run.program.apply("mul", left[i], right[j]))
    return [run.program.total(some) for some in terms]


def _windows(
    large: tuple[int, ...],
    weight: tuple[int, ...],
    steps: list[list[int]],
    groups: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """Entries of the image, the weight and the result of a convolution that belong together."""
    stride, padding, dilation = steps
    n, channels, *sizes = large
    out, per_group, *kernel = weight
    rank = len(kernel)
    edges = [p for pad in reversed(padding) for p in (pad, pad)]
    image = torch.arange(n * channels * int(torch.tensor(sizes).prod())).reshape(large)
    image = torch.nn.functional.pad(image, edges, value=-1)
    for d in range(rank):
        span = dilation[d] * (kernel[d] - 1) + 1
        image = image.unfold(2 + d, span, stride[d])[..., :: dilation[d]]
    spatial = image.shape[2 : 2 + rank]
    _check(image.numel() * out // groups)
    shape = (n, groups, out // groups, per_group, *spatial, *kernel)
    image = image.reshape(n, groups, 1, per_group, *spatial, *kernel).expand(shape)
    result = (n, out, *spatial)
    count = torch.Size(result).numel()
    ones = [1] * rank
    found = torch.arange(count).reshape(n, groups, out // groups, 1, *spatial, *ones).expand(shape)
    weights = torch.arange(torch.Size(weight).numel())
    weights = weights.reshape(1, groups, out // groups, per_group, *ones, *kernel).expand(shape)
    inside = (image >= 0).flatten()
    parts = tuple(a.flatten()[inside] for a in (image, weights, found))
    return (parts[0], parts[1], parts[2]), result


def _whole(values: Any, rank: int) -> list[int]:
    numbers = [int(v) for v in values]
    return numbers * rank if len(numbers) == 1 else numbers


def _convolution(
    run: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Numbers:
    x, weight = run.numbers(x), run.numbers(weight)
    rank = x.values.dim() - 2
    steps = [_whole(v, rank) for v in (stride, padding, dilation, output_padding)]
    if transposed:  # the transpose of the convolution from the result to x
        sizes = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, k, s, p, d, o in zip(
                x.values.shape[2:], weight.values.shape[2:], *steps, strict=True
            )
        ]
        shape: tuple[int, ...] = (len(x.values), weight.values.shape[1] * groups, *sizes)
        (to, j, i), _ = _windows(shape, tuple(weight.values.shape), steps[:3], groups)
    else:
        (i, j, to), shape = _windows(
            tuple(x.values.shape), tuple(weight.values.shape), steps[:3], groups
        )
    found = table(_products(run, torch.Size(shape).numel(), to, x, weight, (i, j)), shape)
    if bias is None:
        return x.like(found)
    along = run.numbers(bias).values.reshape(1, -1, *[1] * rank)
    return run.entrywise(lambda p, a, b: p.apply("add", a, b), x.like(found), x.like(along))


def _convolution_backward(
    run: Any,
    slope: Any,
    x: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
) -> list[Numbers | None]:
    slope, x, weight = (run.numbers(a) for a in (slope, x, weight))
    rank = x.values.dim() - 2
    steps = [_whole(v, rank) for v in (stride, padding, dilation)]
    large = slope if transposed else x
    (image, j, out), _ = _windows(
        tuple(large.values.shape), tuple(weight.values.shape), steps, groups
    )
    at_x, at_slope = (out, image) if transposed else (image, out)
    found: list[Numbers | None] = [None, None, None]
    for k, (like, to, a, b, pairs) in enumerate(
        ((x, at_x, slope, weight, (at_slope, j)), (weight, j, slope, x, (at_slope, at_x)))
    ):
        if mask[k]:
            values = _products(run, like.values.numel(), to, a, b, pairs)
            found[k] = like.like(table(values, like.values.shape))
    if mask[2]:
        found[2] = run.reduce(slope, [0, *range(2, 2 + rank)], False, run.program.total)
    return found


def _trilinear(
    run: Any,
    a: Any,
    b: Any,
    c: Any,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    dims: list[int],
    unroll_dim: int = 1,
) -> Numbers:
    parts = []
    for part, places in ((a, expand_a), (b, expand_b), (c, expand_c)):
        numbers = run.numbers(part)
        values = numbers.values
        for d in sorted(places):
            values = values.unsqueeze(d)
        parts.append(numbers.like(values))
    _check(torch.broadcast_shapes(*(p.values.shape for p in parts)).numel())
    whole = run.entrywise(lambda p, *v: p.apply("mul", p.apply("mul", v[0], v[1]), v[2]), *parts)
    found: Numbers = run.reduce(whole, list(dims), False, run.program.total)
    return found


RULES: dict[str, Callable[..., Any]] = {
    "sort": _sort,
    "topk": _topk,
    "median": _median,
    "kthvalue": _kthvalue,
    "max": _largest("max"),
    "min": _largest("min"),
    "argmax": _first_place("max"),
    "argmin": _first_place("min"),
    "scatter": functools.partial(_scatter, add=False),
    "scatter_add": functools.partial(_scatter, add=True),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_trilinear": _trilinear,
}

#: Operations that are linear in their first argument, whatever the others are.
LINEAR = {
    *("avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d"),
    *("_adaptive_avg_pool2d_backward", "upsample_linear1d", "upsample_linear1d_backward"),
    *("upsample_bilinear2d", "upsample_bilinear2d_backward"),
}


def linear(run: Any, operation: Any, args: list[Any], kwargs: dict[str, Any]) -> Numbers:
    """An operation that is linear in its first argument, by the matrix that it is."""
    x = run.numbers(args[0])
    count = x.values.numel()
    _check(count * count)
    # Of other tensors the shapes alone matter.
    rest = [
        torch.zeros(a.values.shape, dtype=a.dtype) if isinstance(a, Numbers) else a for a in args
    ]
    columns = []
    for unit in torch.eye(count, dtype=torch.float64):
        columns.append(operation(unit.reshape(x.values.shape), *rest[1:], **kwargs))
    entries, values = torch.stack([c.flatten() for c in columns], 1), x.values.flatten().tolist()
    found = [
        run.program.total(
            run.program.apply("mul", values[i], run.program.constant(float(row[i])))
            for i in row.nonzero()[:, 0].tolist()
        )
        for row in entries
    ]
    return x.like(table(found, columns[0].shape))
