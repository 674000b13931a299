"""Torch code for a graph: one function, every node computed once, few passes over memory.

The code takes tensors with any leading batch, broadcasts them, keeps their dtype and device, and
uses nothing but plain torch operations, so that it can be traced, batched and differentiated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from manifold_sde.symbolic.functions import torch_call
from manifold_sde.symbolic.graph import Array, Graph, Node, ancestors, is_selection
from manifold_sde.symbolic.jacobian import Term, terms_of

#: Largest exponent that is written out as a chain of products.
_LONGEST_CHAIN = 16


def generate(
    name: str,
    graph: Graph,
    output: Node,
    inputs: Sequence[str],
    event: tuple[int, ...],
    *,
    symmetry: str | None = None,
) -> Callable[..., Tensor]:
    """Function of tensors (..., size) that computes a node.

    Args:
        name: Name of the function.
        graph: Graph of the node.
        output: What is returned.
        inputs: Names of the inputs, in the order of the arguments.
        event: Shape of the result without the batch: (), (size,) or (D, size).
        symmetry: "half" if the matrix is to be added to its transpose; "upper" if it is symmetric
            and only its upper half is to be computed, entry by entry.

    Returns:
        The function; its attribute ``source`` is its code.
    """
    printer = _Printer(graph, output)
    if symmetry == "upper":
        result = printer.symmetric(output)
    else:
        result = printer.matrix(output) if output.kind == "terms" else printer.tensor(output)
    if symmetry == "half":
        result = printer.assign(f"{result} + {result}.mT")
    if event == ():
        result = f"{result}.squeeze(-1)"
    constants = [
        f"    k{i} = torch.as_tensor(constants[{i}], dtype=x.dtype, device=x.device)"
        for i in range(len(printer.constants))
    ]
    source = "\n".join(
        [
            f"def {name}({', '.join(inputs)}):",
            *constants,
            *(f"    {line}" for line in printer.lines),
            f"    return expand({result}, {event}, {', '.join(inputs)})\n",
        ]
    )
    namespace = {"torch": torch, "constants": tuple(printer.constants), "expand": _expand}
    exec(compile(source, f"<generated {name}>", "exec"), namespace)
    function: Callable[..., Tensor] = namespace[name]  # type: ignore[assignment]
    function.source = source  # type: ignore[attr-defined]
    return function


def _expand(value: Tensor, event: tuple[int, ...], *inputs: Tensor) -> Tensor:
    """Give a result that does not depend on all inputs the batch of all of them."""
    batch = inputs[0].shape[:-1]
    if any(i.shape[:-1] != batch for i in inputs[1:]):
        batch = torch.broadcast_shapes(*(i.shape[:-1] for i in inputs))
    shape = (*batch, *event)
    return value if value.shape == shape else value.expand(shape).contiguous()


class _Printer:
    """Emits assignments; methods return code of a value, a name or a literal."""

    def __init__(self, graph: Graph, output: Node) -> None:
        self.graph = graph
        self.lines: list[str] = []
        self.constants: list[Array] = []
        nodes = ancestors([output])
        self._uses = Counter(a for node in nodes for a in node.args)
        #: Blocks with the inverse of the square root among their powers.
        self._rooted = {
            part
            for node in nodes
            if node.kind == "product"
            for part, exponent in zip(node.args, node.data, strict=True)
            if exponent < 0 and exponent.denominator == 2
        }
        self._names: dict[Node, str] = {}
        self._known: dict[str, str] = {}
        self._constant_names: dict[tuple[tuple[int, ...], bytes], str] = {}

    def assign(self, code: str) -> str:
        """Name of a variable that holds the value; the same code is emitted once."""
        if code.isidentifier():
            return code
        name = self._known.get(code)
        if name is None:
            name = self._known[code] = f"t{len(self._known)}"
            self.lines.append(f"{name} = {code}")
        return name

    def constant(self, values: Array) -> str:
        """Name of a tensor of numbers."""
        values = np.ascontiguousarray(values, dtype=np.float64)
        key = (values.shape, values.tobytes())
        if key not in self._constant_names:
            self._constant_names[key] = f"k{len(self.constants)}"
            self.constants.append(values)
        return self._constant_names[key]

    # Blocks: tensors (..., size).

    def tensor(self, node: Node) -> str:
        """Name of the variable that holds a block."""
        if node not in self._names:
            self._names[node] = self.assign(getattr(self, f"_{node.kind}")(node))
        return self._names[node]

    def _input(self, node: Node) -> str:
        return str(node.data)

    def _constant(self, node: Node) -> str:
        return self.constant(node.data)

    def _call(self, node: Node) -> str:
        return torch_call(node.data, self.tensor(node.args[0]))

    def _linear(self, node: Node) -> str:
        (part,) = node.args
        value, matrix = self.tensor(part), node.data
        if is_selection(matrix):
            columns = matrix.argmax(1)
            start, stop = int(columns[0]), int(columns[-1]) + 1
            if np.array_equal(columns, np.arange(start, stop)):
                return f"{value}[..., {start}:{stop}]"
        return f"{value} @ {self.constant(matrix.T)}"

    def _product(self, node: Node) -> str:
        factors = self._factors(node)
        return " * ".join((self._fold(factors[:-1]), factors[-1])) if factors[1:] else factors[0]

    def _fold(self, factors: Sequence[str]) -> str:
        """Product of some factors, from the left, so that beginnings are shared."""
        product = factors[0]
        for factor in factors[1:]:
            product = self.assign(f"{product} * {factor}")
        return product

    def _factors(self, node: Node) -> list[str]:
        """Codes whose product a node is, numbers a point before longer blocks."""
        if node.kind != "product":
            return [self.tensor(node)]
        pairs = sorted(zip(node.args, node.data, strict=True), key=lambda p: p[0].size > 1)
        if len(pairs) == 1 and pairs[0][1] == 2:
            return [self.tensor(pairs[0][0])] * 2
        return [self._power(part, exponent) for part, exponent in pairs]

    def _power(self, node: Node, exponent: Fraction) -> str:
        base = self.tensor(node)
        if exponent == 1:
            return base
        if exponent.denominator > 2 or abs(exponent) > _LONGEST_CHAIN:
            return self.assign(f"{base} ** {float(exponent)!r}")
        if exponent < 0 and node in self._rooted:
            return self._chain(self.assign(f"{base}.rsqrt()"), int(-2 * exponent))
        if exponent.denominator == 1:
            root = base if exponent > 0 else self.assign(f"{base}.reciprocal()")
            return self._chain(root, abs(int(exponent)))
        whole = self._chain(base, int(exponent)) if exponent > 1 else None
        root = self.assign(f"{base}.sqrt()")
        return self.assign(f"{whole} * {root}") if whole else root

    def _chain(self, base: str, exponent: int) -> str:
        if exponent == 1:
            return base
        half = self._chain(base, exponent // 2)
        square = self.assign(f"{half} * {half}")
        return self.assign(f"{square} * {base}") if exponent % 2 else square

    def _sum(self, node: Node) -> str:
        terms, offset = self._flat(node)
        plain = [(c, t) for c, t in terms if not self._inlined(t)]
        fused = [(c, self._factors(t)) for c, t in terms if self._inlined(t)]
        plain.sort(key=lambda term: (term[0] != 1.0, -term[1].size))
        if plain:
            coefficient, first = plain.pop(0)
            total = self.tensor(first)
            if coefficient != 1.0:
                total = f"{coefficient!r} * {total}"
        else:
            fused.sort(key=lambda term: term[0] != 1.0)
            coefficient, factors = fused.pop(0)
            if coefficient != 1.0:
                # The first factor is the shortest block.
                factors = [self.assign(f"{coefficient!r} * {factors[0]}"), *factors[1:]]
            total = " * ".join((self._fold(factors[:-1]), factors[-1]))
        for coefficient, term in plain:
            total = _add(self.assign(total), coefficient, self.tensor(term))
        for coefficient, factors in fused:
            total = self._add_product(self.assign(total), coefficient, factors)
        return f"{self.assign(total)} + {offset!r}" if offset else total

    def _flat(self, node: Node) -> tuple[list[tuple[float, Node]], float]:
        """Terms of a sum, with the sums in it that nobody else uses opened."""
        coefficients, offset = node.data
        terms: list[tuple[float, Node]] = []
        for coefficient, part in zip(coefficients, node.args, strict=True):
            if part.kind == "sum" and self._uses[part] == 1 and part.size == node.size:
                inner, number = self._flat(part)
                terms += [(coefficient * c, t) for c, t in inner]
                offset += coefficient * number
            else:
                terms.append((coefficient, part))
        return terms, offset

    def _inlined(self, node: Node) -> bool:
        """Whether a block is a product that only one sum uses."""
        if node.kind != "product" or self._uses[node] != 1 or node in self._names:
            return False
        return len(node.args) > 1 or node.data[0] == 2

    def _add_product(self, total: str, coefficient: float, factors: Sequence[str]) -> str:
        value = "" if coefficient == 1.0 else f", value={coefficient!r}"
        return f"torch.addcmul({total}, {self._fold(factors[:-1])}, {factors[-1]}{value})"

    # Matrices: tensors (..., D, size).

    def matrix(self, node: Node) -> str:
        """Name of the variable that holds a matrix."""
        if node not in self._names:
            code = self._matmul(node) if node.kind == "matmul" else self._terms(node)
            self._names[node] = self.assign(code)
        return self._names[node]

    def _matmul(self, node: Node) -> str:
        return f"{self.matrix(node.args[0])} @ {self.constant(node.data)}"

    def _terms(self, node: Node) -> str:
        def cost(term: Term) -> int:
            return 2 if term.core is None else int(isinstance(term.core, Node))

        total = ""
        for term in sorted(terms_of(node), key=cost):
            number, factors = self._matrix_factors(term)
            if total and len(factors) > 1:
                total = self._add_product(self.assign(total), number, factors)
            elif total:
                total = _add(self.assign(total), number, factors[0])
            else:
                if number != 1.0:
                    factors = [self.assign(f"{number!r} * {factors[0]}"), *factors[1:]]
                first = [self._fold(factors[:-1]), factors[-1]] if factors[1:] else factors
                total = " * ".join(first)
        return total or self.constant(np.zeros((1, node.size)))

    def _matrix_factors(self, term: Term) -> tuple[float, list[str]]:
        number, factors = 1.0, []
        for block, dim in ((term.left, -1), (term.right, -2)):
            if block.kind == "constant" and block.size == 1:
                number *= float(block.data[0])
            else:
                factors.append(self.assign(f"{self.tensor(block)}.unsqueeze({dim})"))
        if isinstance(term.core, Node):
            factors.append(self.matrix(term.core))
        elif term.core is not None:
            factors.append(self.constant(term.core))
        elif not factors:
            factors.append(self.constant(np.ones((1, 1))))
        return number, factors

    # Small symmetric matrices, entry by entry: tensors (...).

    def symmetric(self, node: Node) -> str:
        """Name of the variable that holds a symmetric matrix, from its upper half."""
        dim = node.size
        terms = terms_of(node)
        upper = {(i, j): self._entry(terms, i, j) for i in range(dim) for j in range(i, dim)}
        entries = [upper[min(i, j), max(i, j)] for i in range(dim) for j in range(dim)]
        return self.assign(f"torch.stack([{', '.join(entries)}], -1).unflatten(-1, ({dim}, {dim}))")

    def _entry(self, terms: list[Term], row: int, column: int) -> str:
        parts = []
        for term in terms:
            number, factors = 1.0, []
            if isinstance(term.core, Node):
                place = column if term.core.size > 1 else 0
                factors.append(self.assign(f"{self.matrix(term.core)}[..., {row}, {place}]"))
            elif term.core is not None:
                number = float(term.core[row, column])
            for block, index in ((term.left, row), (term.right, column)):
                if number != 0.0:
                    coefficient, code = self._element(block, index)
                    number *= coefficient
                    factors += code
            parts.append((number, factors))
        return self._total(parts) or "torch.zeros_like(x[..., 0])"

    def _element(self, node: Node, index: int) -> tuple[float, list[str]]:
        """A number and codes whose product is an entry of a block."""
        if node.kind == "constant":
            return float(node.data[index if node.size > 1 else 0]), []
        if node.size == 1:
            return 1.0, [self.assign(f"{self.tensor(node)}.squeeze(-1)")]
        if node.kind == "product" and any(n.kind == "constant" for n in node.args):
            number, factors = 1.0, []
            for part, exponent in zip(node.args, node.data, strict=True):
                if part.kind == "constant":
                    number *= float(part.data[index])
                elif part.size == 1:
                    power = self._power(part, exponent)
                    factors.append(self.assign(f"{power}.squeeze(-1)"))
                else:
                    factors.append(self.assign(f"{self._power(part, exponent)}[..., {index}]"))
            return (number, factors) if number else (0.0, [])
        if node.kind == "sum" and any(self._masked(n) for n in node.args):
            parts = [
                (c * number, factors)
                for c, part in zip(node.data[0], node.args, strict=True)
                for number, factors in [self._element(part, index)]
            ]
            total = self._total([*parts, (node.data[1], [])])
            return (1.0, [total]) if total else (0.0, [])
        return 1.0, [self.assign(f"{self.tensor(node)}[..., {index}]")]

    def _masked(self, node: Node) -> bool:
        """Whether a block has constant factors, which may be zero."""
        return node.kind == "constant" or any(self._masked(a) for a in node.args if a.size > 1)

    def _total(self, parts: list[tuple[float, list[str]]]) -> str:
        """Sum of products, each a number times codes; empty if it is zero."""
        offset = sum(number for number, factors in parts if not factors)
        moving = [(n, f) for n, f in parts if n != 0.0 and f]
        if not moving:
            return self.assign(f"torch.full_like(x[..., 0], {offset!r})") if offset else ""
        moving.sort(key=lambda part: (part[0] != 1.0, len(part[1])))
        number, factors = moving.pop(0)
        first = self._fold(factors)
        total = first if number == 1.0 else self.assign(f"{number!r} * {first}")
        for number, factors in moving:
            if len(factors) == 1:
                total = self.assign(_add(total, number, factors[0]))
            else:
                total = self.assign(self._add_product(total, number, factors))
        return self.assign(f"{total} + {offset!r}") if offset else total


def _add(total: str, coefficient: float, term: str) -> str:
    if coefficient == 1.0:
        return f"{total} + {term}"
    if coefficient == -1.0:
        return f"{total} - {term}"
    return f"torch.add({total}, {term}, alpha={coefficient!r})"
