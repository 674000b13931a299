"""Functions of one point as functions of many points, which are the last dimension of everything.

``vmap`` puts the points first wherever it can. A compiler then makes loops over the few coordinates
of a point the inner ones, which do not fill a vector register, and computes the factors of a matrix
product again for every entry of the product. Here the function is traced for one point, and its
graph is run on tensors with the points last: every inner loop is one over points, and the factors
of products lie in memory. Second derivatives of Phi take two thirds of
the time.

Operations without a rule here raise :class:`Unsupported`; the caller then takes ``vmap``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from manifold_sde.compile.recording import Unsupported

aten, prims = torch.ops.aten, torch.ops.prims

#: Largest inner dimension of a matrix product that is written out as multiply and add, so that
#: it fuses with its neighbours instead of calling a library for a few numbers.
LARGEST_PRODUCT = 32

#: Products of matrices and vectors.
PRODUCTS = (aten.mm, aten.mv, aten.bmm)


def batch_last(
    function: Callable[..., Any], arguments: tuple[Tensor, ...], decompositions: dict[Any, Any]
) -> Callable[..., Any]:
    """A function of one point for points in the last dimension.

    Args:
        function: Function of unbatched tensors; may use ``torch.func`` freely.
        arguments: Example tensors, the points last: (..., n).
        decompositions: What to write operations by simpler ones with.

    Returns:
        Function of tensors (..., n) that returns tensors (..., n).

    Raises:
        Unsupported: When the function is called, if an operation has no rule.
    """
    kept = {
        target: rule
        for target, rule in decompositions.items()
        if getattr(target, "overloadpacket", None) not in PRODUCTS
    }

    def plain(*inputs):  # type: ignore[no-untyped-def]
        return function(*inputs)

    point = [a[..., 0].clone() for a in arguments]
    # In two steps, because torch crashes where it simplifies operations inside its derivatives,
    # or on the special zeros that these contain.
    graph = make_fx(plain)(*point)
    for node in graph.graph.nodes:
        if node.target is aten._efficientzerotensor.default:
            node.target = aten.zeros.default
    graph.recompile()
    graph = make_fx(functionalize(graph), decomposition_table=kept)(*point)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return lambda *inputs: _BatchLast(graph, inputs[0].shape[-1]).run(*inputs)


class _BatchLast(Interpreter):
    """Runs the graph of one point on n points.

    Tensors that depend on the point have a last dimension more than in the graph; the others are
    as in the graph.
    """

    def __init__(self, graph: GraphModule, n: int) -> None:
        super().__init__(graph)
        self.n = n
        self.batched: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        """Run one node; only those that depend on the point need a rule."""
        if n.op == "placeholder":
            self.batched.add(n)
        if n.op == "output":
            return torch.fx.node.map_arg(n.args[0], lambda a: self._full(a, self.env[a]))
        if n.op != "call_function" or not any(a in self.batched for a in n.all_input_nodes):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self._checked(n, self._apply(n, list(args), kwargs))

    def _checked(self, node: Node, result: Any) -> Any:
        """The result in the dtype that one point has, which also has to have its shape."""
        known = node.meta.get("tensor_meta")
        if isinstance(result, Tensor) and known is not None:
            batched = node in self.batched
            if tuple(result.shape) != (*known.shape, *([self.n] if batched else [])):
                raise Unsupported(f"{node.target} of shape {tuple(result.shape)}")
            result = result.to(known.dtype)
        return result

    def _apply(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        target, nodes = node.target, node.args
        if target is operator.getitem:
            self.batched.add(node)
            return args[0][args[1]]
        packet = getattr(target, "overloadpacket", None)
        if packet in _SHAPE_ALONE:
            # The value does not depend on the point.
            points = zip(args, nodes, strict=True)
            first = [
                a[..., 0] if isinstance(a, Tensor) and b in self.batched else a for a, b in points
            ]
            return target(*first, **kwargs)  # type: ignore[operator]
        self.batched.add(node)
        if packet in PRODUCTS:
            left, right = (self._factor(b, a) for a, b in zip(args, nodes, strict=True))
            result = product(packet, left, right)
            if result is NotImplemented:
                raise Unsupported("a product over many numbers")
            return result
        if packet is aten.copy:
            shape = args[0].shape[:-1] if nodes[0] in self.batched else args[0].shape
            return self._aligned(nodes[1], args[1]).expand(*shape, self.n)
        if packet in (aten.cat, aten.stack):
            parts = [self._full(b, a) for a, b in zip(args[0], nodes[0], strict=True)]  # type: ignore[arg-type]
            rank = parts[0].dim() - 1 + (packet is aten.stack)
            return target(parts, _dim(args[1] if len(args) > 1 else 0, rank))  # type: ignore[operator]
        if packet in (aten.slice_scatter, aten.select_scatter):
            args[:2] = [self._full(b, a) for a, b in zip(args[:2], nodes[:2], strict=True)]
            dim = _dim(args[2] if len(args) > 2 else 0, args[0].dim() - 1)
            return target(*args[:2], dim, *args[3:], **kwargs)  # type: ignore[operator]
        if torch.Tag.pointwise in getattr(target, "tags", ()) or packet in _POINTWISE:
            args = [self._aligned(b, a) for a, b in zip(args, nodes, strict=True)]
            if target is aten.div.Tensor and isinstance(args[1], Tensor):
                return _quotient(*args)
            return target(*args, **kwargs)  # type: ignore[operator]
        if packet is aten.index_put and not self._depends(nodes[1]):
            parts = [self._full(b, a) for a, b in zip(args, nodes, strict=True)]
            return target(*parts, **kwargs)  # type: ignore[operator]
        rule = _RULES.get(packet)
        if rule is None or nodes[0] not in self.batched or self._depends(nodes[1:]):
            raise Unsupported(str(target))
        return rule(_Call(target, args[0], args[0].dim() - 1, self.n, args[1:], kwargs))

    def _depends(self, argument: Any) -> bool:
        """Whether an argument, or what is in it, depends on the point."""
        found: list[Node] = []
        torch.fx.node.map_arg(argument, found.append)
        return any(node in self.batched for node in found)

    def _aligned(self, node: Any, value: Any) -> Any:
        """A value that broadcasts against those with the points last."""
        if not isinstance(value, Tensor) or node in self.batched or value.dim() == 0:
            return value
        return value.unsqueeze(-1)

    def _full(self, node: Any, value: Any) -> Any:
        """A value with the points last."""
        if not isinstance(value, Tensor) or node in self.batched:
            return value
        return value.unsqueeze(-1).expand(*value.shape, self.n)

    def _factor(self, node: Any, value: Tensor) -> Tensor:
        return _in_memory(value) if node in self.batched else value.unsqueeze(-1)


def _in_memory(value: Tensor) -> Tensor:
    """The same values; a compiler has to store them, as it cannot take strides of a formula."""
    value = value.clone(memory_format=torch.contiguous_format)
    return value.as_strided(value.shape, value.stride())


def product(packet: Any, left: Tensor, right: Tensor) -> Tensor:
    """Product of matrices (or a matrix and a vector), multiplied out and added up.

    They may have the points last. Not implemented for a large inner dimension.
    """
    axis = 2 if packet is aten.bmm else 1
    if left.shape[axis] > LARGEST_PRODUCT:
        return NotImplemented
    if packet is aten.mv:
        return (left * right).sum(1)
    return (left.unsqueeze(axis + 1) * right.unsqueeze(axis - 1)).sum(axis)


def _quotient(a: Any, b: Tensor) -> Tensor:
    """A quotient; where one number divides many, its reciprocal is taken once."""
    if isinstance(a, Tensor) and a.is_floating_point() and b.is_floating_point():
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if b.numel() < shape.numel():
            return a * _in_memory(b.reciprocal())
    return torch.div(a, b)


def _dim(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def _dims(dims: Any, rank: int) -> list[int]:
    if isinstance(dims, int):
        return [_dim(dims, rank)]
    return [_dim(d, rank) for d in dims] if dims else list(range(rank))


@dataclass(frozen=True)
class _Call:
    """One operation whose first argument has the points last, and no other depends on the point.

    Attributes:
        operation: The operation.
        x: Its first argument.
        rank: The rank of x for one point.
        n: The number of points.
        rest: The arguments after the first.
        keywords: Those given by keyword.
    """

    operation: Any
    x: Tensor
    rank: int
    n: int
    rest: list[Any]
    keywords: dict[str, Any]


def _reduction(call: _Call) -> Any:
    f, x = call.operation, call.x
    if f is aten.prod.default or (call.rank == 0 and f.overloadpacket in (aten.var, aten.var_mean)):
        raise Unsupported(str(f))
    if call.rank == 0:
        return x
    if f is aten.sum.default:
        return aten.sum.dim_IntList(x, list(range(call.rank)), **call.keywords)
    if f is aten.mean.default:
        return aten.mean.dim(x, list(range(call.rank)), **call.keywords)
    if call.rest and isinstance(call.rest[0], int):
        return _along(call)
    dims = _dims(call.rest[0] if call.rest else None, call.rank)
    return f(x, dims, *call.rest[1:], **call.keywords)


def _along(call: _Call) -> Any:
    """Operations along one dimension, which is their second argument."""
    dim = _dim(call.rest[0] if call.rest else 0, call.rank)
    return call.operation(call.x, dim, *call.rest[1:], **call.keywords)


def _extreme(call: _Call) -> Tensor:
    if call.operation not in (aten.max.default, aten.min.default):
        raise Unsupported(str(call.operation))
    extreme = aten.amax if call.operation is aten.max.default else aten.amin
    return extreme(call.x, list(range(call.rank))) if call.rank else call.x


def _expand(call: _Call) -> Tensor:
    new = len(call.rest[0]) - call.rank
    return call.x.reshape(*([1] * new), *call.x.shape).expand(*call.rest[0], call.n)


def _squeeze(call: _Call) -> Tensor:
    dims = _dims(call.rest[0] if call.rest else None, call.rank)
    return call.x.squeeze(dims) if call.rank else call.x


def _split(call: _Call) -> Any:
    dim = call.rest[1] if len(call.rest) > 1 else 0
    return call.operation(call.x, call.rest[0], _dim(dim, call.rank))


def _diagonal(call: _Call) -> Tensor:
    given = dict(enumerate(call.rest))
    first, second = _dim(given.get(1, 0), call.rank), _dim(given.get(2, 1), call.rank)
    diagonal = call.x.diagonal(given.get(0, 0), first, second)
    return diagonal.transpose(-1, -2)


_RULES: dict[Any, Callable[[_Call], Any]] = {
    aten.alias: lambda c: c.x,
    aten.clone: lambda c: c.x,
    aten.detach: lambda c: c.x,
    aten.contiguous: lambda c: c.x,
    aten.sum: _reduction,
    aten.mean: _reduction,
    aten.amax: _reduction,
    aten.amin: _reduction,
    aten.var: _reduction,
    aten.var_mean: _reduction,
    aten.prod: _reduction,
    aten.max: _extreme,
    aten.min: _extreme,
    aten.cumsum: _along,
    aten.cumprod: _along,
    aten.index: lambda c: c.operation(c.x, *c.rest),
    prims.rev: lambda c: c.x.flip(_dims(c.rest[0], c.rank)),
    aten.view: lambda c: c.x.reshape(*c.rest[0], c.n),
    aten.reshape: lambda c: c.x.reshape(*c.rest[0], c.n),
    aten._unsafe_view: lambda c: c.x.reshape(*c.rest[0], c.n),
    aten.expand: _expand,
    aten.permute: lambda c: c.x.permute(*(_dim(d, c.rank) for d in c.rest[0]), c.rank),
    aten.transpose: lambda c: c.x.transpose(*(_dim(d, c.rank) for d in c.rest)),
    aten.t: lambda c: c.x.transpose(0, 1) if c.rank == 2 else c.x,
    aten.unsqueeze: lambda c: c.x.unsqueeze(_dim(c.rest[0], c.rank + 1)),
    aten.squeeze: _squeeze,
    aten.slice: _along,
    aten.select: _along,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.flip: lambda c: c.x.flip(_dims(c.rest[0], c.rank)),
    aten.diagonal: _diagonal,
    aten.constant_pad_nd: lambda c: c.operation(c.x, [0, 0, *c.rest[0]], *c.rest[1:]),
}

#: Operations entry by entry that torch does not mark as such.
_POINTWISE = {prims.convert_element_type, aten.where, aten._to_copy}
#: Operations whose result depends on shapes and dtypes alone.
_SHAPE_ALONE = {
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten._new_zeros_with_same_feature_meta,
}
