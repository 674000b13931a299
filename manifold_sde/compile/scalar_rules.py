"""What operations of torch are in scalars: a rule for each, by its name.

A rule takes the interpreter, which applies functions of values entry by entry or along dimensions,
and the operation's own arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile.recording import Unsupported
from manifold_sde.compile.scalar_program import ScalarProgram


@dataclass(eq=False)
class Numbers:
    """A tensor whose entries are values of a program.

    Attributes:
        values: Their numbers in the program, int64.
        dtype: Dtype of the tensor that it stands for.
    """

    values: Tensor
    dtype: torch.dtype

    def like(self, values: Tensor) -> Numbers:
        """Other numbers of the same dtype."""
        return Numbers(values, self.dtype)


def table(values: Any, shape: Any) -> Tensor:
    """Numbers of values as a tensor of a shape."""
    return torch.tensor(values, dtype=torch.int64).reshape(tuple(shape))


def _apply(name: str) -> Callable[..., int]:
    return lambda program, *values: program.apply(name, *values)


def _scaled(name: str) -> Callable[..., Numbers]:
    def rule(run: Any, a: Any, b: Any, *rest: Any, alpha: Any = None) -> Numbers:
        alpha = rest[0] if rest else 1 if alpha is None else alpha
        if alpha != 1:
            b = run.entrywise(_apply("mul"), b, alpha)
        return run.entrywise(_apply(name), a, b)

    return rule


def _div(run: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Numbers:
    if rounding_mode is None:
        return run.entrywise(_apply("div"), a, b, dtype=run.floating(a, b, otherwise=run.dtype))
    if run.floating(a, b, otherwise=None) is not None or rounding_mode != "floor":
        raise Unsupported("a rounded quotient")
    half = run.entrywise(_apply("add"), a, 0.5)  # the quotient of whole numbers may be rounded down
    return run.entrywise(
        lambda p, x, y: p.apply("floor", p.apply("div", x, y)), half, b, dtype=torch.int64
    )


def _pow(run: Any, a: Any, b: Any) -> Numbers:
    if isinstance(b, (int, float)):
        return run.entrywise(lambda p, x: p.power(x, float(b)), a)

    def power(program: ScalarProgram, x: int, y: int) -> int:
        known = program.known(y)
        return program.apply("pow", x, y) if known is None else program.power(x, float(known))

    return run.entrywise(power, a, b)


def _sum(run: Any, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return run.reduce(x, dims, keepdim, run.program.total)


def _mean(run: Any, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    def mean(values: list[int]) -> int:
        count = run.program.constant(1.0 / len(values))
        return run.program.apply("mul", run.program.total(values), count)

    return run.reduce(x, dims, keepdim, mean)


def _extreme(name: str) -> Callable[..., Any]:
    def rule(run: Any, x: Any, dims: Any = None, keepdim: bool = False) -> Any:
        return run.reduce(x, dims, keepdim, lambda v: run.program.total(v, name))

    return rule


def _prod(run: Any, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return run.reduce(x, dim, keepdim, lambda v: run.program.total(v, "mul"))


def _norm(
    run: Any, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    program, order = run.program, float(ord)
    if order == 0:
        raise Unsupported("a norm that counts")

    def norm(values: list[int]) -> int:
        if order == 2:
            return program.apply("sqrt", program.total(program.apply("mul", a, a) for a in values))
        sizes = [program.apply("abs", a) for a in values]
        if math.isinf(order):
            return program.total(sizes, "max" if order > 0 else "min")
        return program.power(program.total(program.power(a, order) for a in sizes), 1.0 / order)

    return run.reduce(x, dim, keepdim, norm)


def _cumulative(name: str) -> Callable[..., Any]:
    def rule(run: Any, x: Any, dim: int, dtype: Any = None) -> Any:
        moved = run.numbers(x).values.movedim(dim, -1)
        rows = []
        for row in moved.reshape(-1, moved.shape[-1]).tolist():
            found = row[:1]
            for a in row[1:]:
                found.append(run.program.apply(name, found[-1], a))
            rows.append(found)
        values = table(rows, moved.shape).movedim(-1, dim)
        return run.numbers(x).like(values)

    return rule


def _var(
    run: Any,
    x: Any,
    dims: Any = None,
    correction: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Any:
    if isinstance(dims, bool):  # all entries, biased or not
        dims, correction = None, dims
    correction = 1.0 if correction is None else float(correction)

    def variance(values: list[int]) -> int:
        program, count = run.program, len(values)
        mean = program.apply("mul", program.total(values), program.constant(1.0 / count))
        apart = [program.apply("sub", a, mean) for a in values]
        total = program.total(program.apply("mul", a, a) for a in apart)
        return program.apply("div", total, program.constant(count - correction))

    return run.reduce(x, dims, keepdim, variance)


def _index_put(run: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Numbers:
    if any(isinstance(i, Numbers) for i in indices):
        raise Unsupported("an index that depends on the point")
    x = run.numbers(x)
    where = tuple(slice(None) if i is None else i for i in indices)
    return _written(run, x, _places(x)[where], values, accumulate)


def scatter(run: Any, x: Any, dim: int, index: Tensor, values: Any, *, add: bool) -> Numbers:
    """Write values, or add them, to places that are known."""
    x = run.numbers(x)
    places = _places(x).gather(dim, index)
    if isinstance(values, Numbers):  # of which the first are taken
        values = values.like(values.values[tuple(slice(n) for n in index.shape)])
    return _written(run, x, places, values, add)


def _places(x: Numbers) -> torch.Tensor:
    return torch.arange(x.values.numel()).reshape(x.values.shape)


def _written(run: Any, x: Numbers, places: torch.Tensor, values: Any, accumulate: bool) -> Numbers:
    entries = x.values.flatten().tolist()
    new = run.numbers(values).values.expand(places.shape).flatten()
    for place, value in zip(places.flatten().tolist(), new.tolist(), strict=True):
        old = entries[place]
        entries[place] = run.program.apply("add", old, value) if accumulate else value
    return x.like(table(entries, x.values.shape))


def _broadcast_in_dim(run: Any, x: Any, shape: Any, dims: Any) -> Numbers:
    x = run.numbers(x)
    expanded = [1] * len(shape)
    for d, size in zip(dims, x.values.shape, strict=True):
        expanded[d] = size
    return x.like(x.values.reshape(expanded).expand(tuple(shape)))


def _cast(run: Any, x: Any, *args: Any, dtype: Any = None, **_: Any) -> Any:
    x = run.numbers(x)
    dtype = next((a for a in args if isinstance(a, torch.dtype)), dtype) or x.dtype
    if dtype == x.dtype:
        return x.like(x.values.clone())
    if dtype == torch.bool:
        return run.entrywise(_apply("ne"), x, 0.0)
    if not dtype.is_floating_point and x.dtype.is_floating_point:
        return run.entrywise(_apply("trunc"), x, dtype=dtype)
    if x.dtype == torch.bool:
        one, zero = run.program.constant(1.0), 0
        return run.entrywise(lambda p, a: p.apply("where", a, one, zero), x, dtype=dtype)
    if x.dtype.is_floating_point and torch.finfo(dtype).bits < torch.finfo(run.dtype).bits:
        raise Unsupported("a smaller dtype")
    return Numbers(x.values.clone(), dtype)


def _clamp(run: Any, x: Any, min: Any = None, max: Any = None) -> Any:
    if min is not None:
        x = run.entrywise(_apply("max"), x, min)
    if max is not None:
        x = run.entrywise(_apply("min"), x, max)
    return x


def _compare(name: str, *, turned: bool = False) -> Callable[..., int]:
    if turned:
        return lambda program, a, b: program.apply(name, b, a)
    return lambda program, a, b: program.apply(name, a, b)


def _sign(program: ScalarProgram, a: int) -> int:
    up, down = program.apply("lt", 0, a), program.apply("lt", a, 0)
    one, minus = program.constant(1.0), program.constant(-1.0)
    return program.apply("where", up, one, program.apply("where", down, minus, 0))


def _matmul(run: Any, a: Any, b: Any) -> Numbers:
    return run.product(a, b)


def _added(run: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Numbers:
    product = run.product(a, b)
    if alpha != 1:
        product = run.entrywise(_apply("mul"), product, alpha)
    if beta != 1:
        c = run.entrywise(_apply("mul"), c, beta)
    return run.entrywise(_apply("add"), c, product)


def _inverted(program: ScalarProgram, a: int) -> int:
    return program.apply("div", program.constant(1.0), a)


def _hypotenuse(program: ScalarProgram, a: int, b: int) -> int:
    squares = program.apply("mul", a, a), program.apply("mul", b, b)
    return program.apply("sqrt", program.apply("add", *squares))


def _remainder(program: ScalarProgram, a: int, b: int) -> int:
    whole = program.apply("floor", program.apply("div", a, b))
    return program.apply("sub", a, program.apply("mul", whole, b))


def _logistic(program: ScalarProgram, a: int) -> int:
    one = program.constant(1.0)
    exponential = program.apply("exp", program.apply("neg", a))
    return _inverted(program, program.apply("add", one, exponential))


def _tanh_backward(program: ScalarProgram, slope: int, y: int) -> int:
    rest = program.apply("sub", program.constant(1.0), program.apply("mul", y, y))
    return program.apply("mul", slope, rest)


def _sigmoid_backward(program: ScalarProgram, slope: int, y: int) -> int:
    rest = program.apply("sub", program.constant(1.0), y)
    return program.apply("mul", slope, program.apply("mul", y, rest))


RULES: dict[str, Callable[..., Any]] = {
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": lambda run, a, b, alpha=1: _scaled("sub")(run, b, a, alpha=alpha),
    "div": _div,
    "pow": _pow,
    "sum": _sum,
    "mean": _mean,
    "prod": _prod,
    "any": _extreme("or"),
    "all": _extreme("and"),
    "amax": _extreme("max"),
    "amin": _extreme("min"),
    "linalg_vector_norm": _norm,
    "cumsum": _cumulative("add"),
    "cumprod": _cumulative("mul"),
    "_to_copy": _cast,
    "convert_element_type": _cast,
    "clamp": _clamp,
    "broadcast_in_dim": _broadcast_in_dim,
    "var": _var,
    "index_put": _index_put,
    "mm": _matmul,
    "mv": _matmul,
    "bmm": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "addmm": _added,
    "addmv": _added,
    "baddbmm": _added,
}

#: Functions of values, entry by entry.
ENTRYWISE: dict[str, Callable[..., int]] = {
    **{
        name: _apply(name)
        for name in (
            *("mul", "neg", "sqrt", "exp", "log", "log1p", "expm1", "sin", "cos", "tan", "asin"),
            *("acos", "atan", "atan2", "sinh", "cosh", "tanh", "erf", "erfc", "abs", "floor"),
            *("ceil", "trunc", "where"),
        )
    },
    "reciprocal": _inverted,
    "rsqrt": lambda program, a: _inverted(program, program.apply("sqrt", a)),
    "square": lambda program, a: program.apply("mul", a, a),
    "hypot": _hypotenuse,
    "remainder": _remainder,
    "sigmoid": _logistic,
    "tanh_backward": _tanh_backward,
    "sigmoid_backward": _sigmoid_backward,
    "sign": _sign,
    "sgn": _sign,
    "relu": lambda program, a: program.apply("where", program.apply("lt", 0, a), a, 0),
    "masked_fill": lambda program, a, mask, b: program.apply("where", mask, b, a),
    "maximum": _apply("max"),
    "minimum": _apply("min"),
    "clamp_min": _apply("max"),
    "clamp_max": _apply("min"),
    "lt": _compare("lt"),
    "le": _compare("le"),
    "gt": _compare("lt", turned=True),
    "ge": _compare("le", turned=True),
    "eq": _apply("eq"),
    "ne": _apply("ne"),
    "logical_and": _apply("and"),
    "bitwise_and": _apply("and"),
    "logical_or": _apply("or"),
    "bitwise_or": _apply("or"),
    "logical_not": _apply("not"),
    "bitwise_not": _apply("not"),
    "isnan": lambda program, a: program.apply("ne", a, a),
}

#: Operations that only move numbers; where they fill up, it is by the value 0, which is zero.
MOVES = {
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze"),
    *("squeeze", "slice", "select", "diagonal", "split", "split_with_sizes", "unbind", "flip"),
    *("roll", "cat", "stack", "repeat", "index", "index_select", "gather", "tril", "triu"),
    *("diag_embed", "slice_scatter", "select_scatter", "diagonal_scatter", "as_strided"),
    *("clone", "contiguous", "movedim", "unfold", "rev", "select_backward", "slice_backward"),
    *("diagonal_backward", "swapaxes", "narrow", "squeeze_copy", "expand_copy"),
}
#: Operations that change nothing.
NOTHING = {"alias", "detach", "lift_fresh_copy", "lift_fresh", "_conj", "view_of"}
#: New tensors of one number.
FILLED = {
    *("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "_efficientzerotensor"),
    *("_new_zeros_with_same_feature_meta", "new_empty_strided"),
}
