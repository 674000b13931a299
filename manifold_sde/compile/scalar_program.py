"""A function of one point as a program of scalar operations, from its traced graph.

Every number of every tensor is a value of the program: shapes, views and products of matrices are
gone, and so is what derivatives multiply by zero or one. Values that are computed alike are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Kinds of values.
FLOAT, BOOL = "f", "b"

#: Functions of constants, by operation.
_FOLD: dict[str, Callable[..., float | bool]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "max": max,
    "min": min,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
}
_COMMUTATIVE = {"add", "mul", "max", "min", "eq", "ne", "and", "or"}
#: Operations whose result is a truth value.
TRUTHS = {"lt", "le", "eq", "ne", "and", "or", "not"}
#: Largest whole power that is written as products.
_LARGEST_POWER = 16

#: An operation and the values, or what else, it is applied to.
Operation = tuple[Any, ...]


@dataclass
class ScalarProgram:
    """Operations on numbers, each made once; a value is its number in the list.

    Attributes:
        operations: ("const", value), ("input", k, i) for number i of argument k, ("given", k, i)
            for number i of tensor k that the function holds, or an operation on earlier values.
        outputs: Values of each result, in order.
    """

    operations: list[Operation] = field(default_factory=lambda: [("const", 0.0)])
    outputs: list[list[int]] = field(default_factory=list)
    _known: dict[Operation, int] = field(default_factory=lambda: {("const", 0.0): 0})

    def value(self, operation: Operation) -> int:
        """The value of an operation, made if it is new."""
        if operation[0] == "const":  # -0.0 == 0.0 and 1 == 1.0 == True, but they are not the same
            key: Operation = ("const", repr(operation[1]))
            if operation[1] == 0 and operation[1] is not False:
                return 0
        else:
            key = operation
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.operations)
            self.operations.append(operation)
        return found

    def constant(self, value: float | bool) -> int:
        """A number that is known."""
        return self.value(("const", value if isinstance(value, bool) else float(value)))

    def known(self, a: int) -> float | bool | None:
        """The number that a value is, where it is known."""
        operation = self.operations[a]
        return operation[1] if operation[0] == "const" else None

    def kind(self, a: int) -> str:
        """Whether a value is a number or a truth."""
        operation = self.operations[a]
        if operation[0] == "where":
            return self.kind(int(operation[2]))
        truth = operation[0] in TRUTHS or isinstance(self.known(a), bool)
        return BOOL if truth else FLOAT

    # Operations.

    def apply(self, name: str, *values: int) -> int:
        """The value of an operation on values, simplified; truths count as 1 and 0."""
        values = self._suited(name, values)
        fold = _FOLD.get(name)
        if fold is not None:
            known = [self.known(a) for a in values]
            if all(k is not None for k in known):
                try:
                    return self.constant(fold(*known))
                except (ArithmeticError, ValueError):
                    pass  # left to the machine, which has infinities
        simpler = getattr(self, f"_{name}", None)
        found: int | None = None if simpler is None else simpler(*values)
        if found is not None:
            return found
        if name in _COMMUTATIVE:
            values = tuple(sorted(values))
        return self.value((name, *values))

    def _suited(self, name: str, values: tuple[int, ...]) -> tuple[int, ...]:
        """The values as the operation takes them: as numbers or as truths."""
        if name in ("and", "or", "not"):
            return tuple(map(self._truth, values))
        if name == "where":
            condition, *both = values
            if {self.kind(a) for a in both} == {BOOL}:
                return (self._truth(condition), *both)
            return (self._truth(condition), *map(self.number, both))
        return tuple(map(self.number, values))

    def number(self, a: int) -> int:
        """A value as a number."""
        if self.kind(a) == FLOAT:
            return a
        known = self.known(a)
        if known is not None:
            return self.constant(float(known))
        return self.value(("where", a, self.constant(1.0), 0))

    def _truth(self, a: int) -> int:
        return a if self.kind(a) == BOOL else self.apply("ne", a, 0)

    def _negated(self, a: int) -> int | None:
        operation = self.operations[a]
        return int(operation[1]) if operation[0] == "neg" else None

    def _add(self, a: int, b: int) -> int | None:
        if a == 0 or b == 0:
            return a + b
        for one, other in ((a, b), (b, a)):
            inside = self._negated(other)
            if inside is not None:
                return self.apply("sub", one, inside)
        return None

    def _sub(self, a: int, b: int) -> int | None:
        if b == 0:
            return a
        if a == 0:
            return self.apply("neg", b)
        if (inside := self._negated(b)) is not None:
            return self.apply("add", a, inside)
        if (inside := self._negated(a)) is not None:
            return self.apply("neg", self.apply("add", inside, b))
        return None

    def _mul(self, a: int, b: int) -> int | None:
        if a == 0 or b == 0:
            return 0
        for one, other in ((a, b), (b, a)):
            if (number := self.known(one)) is not None and abs(number) == 1.0:
                return other if number > 0 else self.apply("neg", other)
            if (inside := self._negated(one)) is not None:
                return self.apply("neg", self.apply("mul", inside, other))
        return None

    def _div(self, a: int, b: int) -> int | None:
        if a == 0:
            return 0
        if (number := self.known(b)) is not None and number != 0 and math.isfinite(1.0 / number):
            return self.apply("mul", a, self.constant(1.0 / number))
        for one in (a, b):
            if (inside := self._negated(one)) is not None:
                pair = (inside, b) if one == a else (a, inside)
                return self.apply("neg", self.apply("div", *pair))
        return None

    def _neg(self, a: int) -> int | None:
        if (inside := self._negated(a)) is not None:
            return inside
        if self.operations[a][0] == "sub":
            return self.apply("sub", int(self.operations[a][2]), int(self.operations[a][1]))
        return None

    def _where(self, condition: int, a: int, b: int) -> int | None:
        known = self.known(condition)
        if known is not None:
            return a if known else b
        return a if a == b else None

    def power(self, a: int, exponent: float) -> int:
        """A power with a known exponent."""
        whole = int(exponent) if math.isfinite(exponent) and exponent == int(exponent) else None
        if whole is not None and abs(whole) <= _LARGEST_POWER:
            found, square, left = self.constant(1.0), a, abs(whole)
            while left:
                if left % 2:
                    found = self.apply("mul", found, square)
                left //= 2
                if left:
                    square = self.apply("mul", square, square)
            return found if whole >= 0 else self.apply("div", self.constant(1.0), found)
        if abs(exponent) in (0.5, 1.5, 2.5):
            root = self.apply("sqrt", a)
            found = self.apply("mul", root, self.power(a, abs(exponent) - 0.5))
            return found if exponent > 0 else self.apply("div", self.constant(1.0), found)
        return self.apply("pow", a, self.constant(exponent))

    def total(self, values: Iterable[int], name: str = "add") -> int:
        """Sum, or another operation, of values by halves; 0 for none."""
        left = list(values)
        if not left:
            return 0
        while len(left) > 1:
            pairs = [self.apply(name, *left[k : k + 2]) for k in range(0, len(left) - 1, 2)]
            left = pairs + left[len(pairs) * 2 :]
        return left[0]

    def order(self, roots: Sequence[int]) -> list[int]:
        """The operations that roots need, each after what it needs, close to where it is used."""
        found: list[int] = []
        seen: set[int] = set()
        stack = [(root, False) for root in reversed(roots)]
        while stack:
            a, ready = stack.pop()
            if ready:
                found.append(a)
            elif a not in seen:
                seen.add(a)
                stack.append((a, True))
                stack.extend((b, False) for b in reversed(self.needs(a)) if b not in seen)
        return found

    def needs(self, a: int) -> tuple[int, ...]:
        """The values that an operation is applied to."""
        name, *rest = self.operations[a]
        return () if name in ("const", "input", "given") else tuple(map(int, rest))

    def with_reciprocals(self) -> ScalarProgram:
        """The same, where a number that divides several is inverted once."""
        order = self.order([a for out in self.outputs for a in out])
        divisors: dict[int, int] = {}
        for a in order:
            if self.operations[a][0] == "div":
                b = int(self.operations[a][2])
                divisors[b] = divisors.get(b, 0) + 1
        other = ScalarProgram()
        new: dict[int, int] = {}
        one = other.constant(1.0)
        for a in order:
            operation = self.operations[a]
            parts = [new[b] for b in self.needs(a)]
            if not parts:
                new[a] = other.value(operation)
            elif operation[0] == "div" and divisors[int(operation[2])] > 1:
                new[a] = other.apply("mul", parts[0], other.value(("div", one, parts[1])))
            else:
                new[a] = other.apply(str(operation[0]), *parts)
        other.outputs = [[new[a] for a in out] for out in self.outputs]
        return other
