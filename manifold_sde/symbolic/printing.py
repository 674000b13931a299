"""Torch code of blocks of numbers: every value is computed once, in few operations.

A block stands for ``size`` numbers a point, in torch a tensor (..., size). The code takes a tensor
with any leading batch, keeps its dtype and device, and uses nothing but plain torch operations, so
that it can be traced, batched and differentiated.

Numbers are float64 here, rounded once from SymPy's exact ones; exponents stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.symbolic import gamma
from manifold_sde.symbolic.functions import torch_call

Array = NDArray[np.float64]

#: Largest exponent that is written out as a chain of products.
_LONGEST_CHAIN = 16


@dataclass(frozen=True)
class Block:
    """A variable of the code.

    Attributes:
        name: Its name.
        size: Length of its last dimension; 1 also for a longer block whose entries are all equal.
    """

    name: str
    size: int


class Writer:
    """Writes a function of one tensor ``x``, an assignment after the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._constants: list[Array] = []
        #: The variable that holds the value of some code.
        self._known: dict[object, str] = {}

    def _assign(self, code: str) -> str:
        """Name of a variable that holds the value; the same code is written once."""
        if code.isidentifier():
            return code
        if code not in self._known:
            self._known[code] = f"t{len(self._lines)}"
            self._lines.append(f"{self._known[code]} = {code}")
        return self._known[code]

    def _constant(self, values: Array) -> str:
        """Name of a tensor of numbers."""
        key = values.shape, values.tobytes()
        if key not in self._known:
            self._known[key] = f"k{len(self._constants)}"
            self._constants.append(np.ascontiguousarray(values))
        return self._known[key]

    def call(self, name: str, block: Block) -> Block:
        """Elementwise function of a block."""
        return Block(self._assign(torch_call(name, block.name)), block.size)

    def linear(self, matrix: Array, block: Block) -> tuple[float, Block]:
        """A constant matrix (rows, block.size) times a block, as a number times a block."""
        rows, columns = matrix.shape
        entries = matrix[matrix != 0]
        scale = float(entries[0]) if len(entries) else 0.0
        if columns == 1 and (matrix == scale).all():
            return scale, block
        if columns == 1:
            return 1.0, Block(self._assign(f"{block.name} * {self._constant(matrix[:, 0])}"), rows)
        first = int(np.argmax(matrix[0] != 0))
        last = first + rows
        if last <= columns and np.array_equal(matrix, scale * np.eye(rows, columns, first)):
            if rows == columns:
                return scale, block
            return scale, Block(self._assign(f"{block.name}[..., {first}:{last}]"), rows)
        if rows == columns and np.array_equal(matrix, np.diag(np.diag(matrix))):
            code = f"{block.name} * {self._constant(np.diag(matrix))}"
        else:
            code = f"{block.name} @ {self._constant(matrix.T)}"
        return 1.0, Block(self._assign(code), rows)

    def sum(self, terms: Iterable[tuple[float, Block]], offsets: Array) -> Block:
        """Linear combination of blocks, plus a number for each entry."""
        kept = sorted(
            ((c, b) for c, b in terms if c != 0.0), key=lambda t: (t[0] != 1.0, -t[1].size)
        )
        number = float(offsets[0]) if (offsets == offsets[0]).all() else None
        size = max([b.size for _, b in kept] + [1 if number is not None else len(offsets)])
        shift = repr(number) if number is not None else self._constant(offsets)
        if not kept:
            return Block(self._constant(offsets[:size]), size)
        (coefficient, first), *rest = kept
        code = first.name if coefficient == 1.0 else f"{coefficient!r} * {first.name}"
        for coefficient, block in rest:
            code = _add(self._assign(code), coefficient, block.name)
        if number != 0.0:
            code = _add(self._assign(code), 1.0, shift)
        return Block(self._assign(code), size)

    def product(self, factors: Iterable[tuple[Block, Fraction]]) -> Block:
        """Product of powers of blocks, entry by entry; numbers a point come first."""
        ordered = sorted(factors, key=lambda factor: factor[0].size > 1)
        names = [self._power(block.name, exponent) for block, exponent in ordered]
        product = names[0]
        for name in names[1:]:
            product = self._assign(f"{product} * {name}")
        return Block(product, max(block.size for block, _ in ordered))

    def _power(self, base: str, exponent: Fraction) -> str:
        if exponent.denominator > 2 or abs(exponent) > _LONGEST_CHAIN:
            return self._assign(f"{base} ** {float(exponent)!r}")
        if exponent < 0 and (exponent.denominator == 2 or f"{base}.rsqrt()" in self._known):
            return self._chain(self._assign(f"{base}.rsqrt()"), int(-2 * exponent))
        if exponent.denominator == 1:
            root = base if exponent > 0 else self._assign(f"{base}.reciprocal()")
            return self._chain(root, abs(int(exponent)))
        root = self._assign(f"{base}.sqrt()")
        return (
            self._assign(f"{self._chain(base, int(exponent))} * {root}") if exponent > 1 else root
        )

    def _chain(self, base: str, exponent: int) -> str:
        if exponent == 1:
            return base
        half = self._chain(base, exponent // 2)
        square = self._assign(f"{half} * {half}")
        return self._assign(f"{square} * {base}") if exponent % 2 else square

    def function(self, result: Block, count: int) -> Callable[[Tensor], Tensor]:
        """The function: (..., D) -> (..., count); its attribute ``source`` is its code."""
        source = "\n".join(
            [
                "def value(x):",
                *(f"    k{i} = like(constants[{i}], x)" for i in range(len(self._constants))),
                *(f"    {line}" for line in self._lines),
                f"    return expand({result.name}, x, {count})\n",
            ]
        )
        namespace: dict[str, Any] = {
            "torch": torch,
            "constants": [(values, torch.from_numpy(values)) for values in self._constants],
            "expand": _expand,
            "like": _like,
            "gamma": gamma,
        }
        exec(compile(source, "<generated value>", "exec"), namespace)
        function: Callable[[Tensor], Tensor] = namespace["value"]
        function.source = source  # type: ignore[attr-defined]
        return function


def _like(constant: tuple[Array, Tensor], x: Tensor) -> Tensor:
    """Numbers in the dtype and on the device of a tensor.

    Fake tensors do not mix with real ones, and dynamo loses track of arrays within ``torch.func``.
    """
    values, tensor = constant
    if torch.compiler.is_compiling():
        return tensor.to(x)
    return torch.as_tensor(values, dtype=x.dtype, device=x.device)


def _expand(value: Tensor, x: Tensor, count: int) -> Tensor:
    """Give values that do not depend on the point, or are all equal, their full shape."""
    shape = (*x.shape[:-1], count)
    return value if value.shape == shape else value.expand(shape).contiguous()


def _add(total: str, coefficient: float, term: str) -> str:
    if abs(coefficient) == 1.0:
        return f"{total} {'+' if coefficient > 0 else '-'} {term}"
    return f"torch.add({total}, {term}, alpha={coefficient!r})"
