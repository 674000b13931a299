"""Which tensors can be scaled together, read off the graph of a forward pass.

Each operation says of which degree its result is when its inputs are homogeneous of some degree in
the weights: a product adds degrees, a sum needs them equal, a normalisation gives degree 0, and
what has no rule must be given what does not change. These are linear equations for the exponents
with which the tensors are scaled. Their solutions are guesses, which measurement has to confirm:
the eps of a normalisation, say, is not seen here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from manifold_sde.number_arrays import Array

# Results of the degree of the first input.
_KEEP = set(
    """View ReshapeAlias UnsafeView T Transpose Permute Expand Slice Select Clone ToCopy Copy Copies
    CopySlices Unsqueeze Squeeze Sum Mean Neg Relu LeakyRelu Prelu Threshold MaxPool2DWithIndices
    MaxPool3DWithIndices MaxPool1DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D MeanDim
    AdaptiveMaxPool2D ConstantPadNd ReflectionPad1D ReflectionPad2D ReplicationPad2D Index Gather
    IndexSelect Split SplitWithSizes Unbind Chunk Abs NativeDropout FusedDropout Embedding Amax Amin
    Max Min Repeat RepeatInterleave Roll Flip UpsampleNearest2D UpsampleBilinear2D Std
    LinalgVectorNorm Norm ClampMin Diagonal Tril Triu Unfold Im2Col AsStrided Alias Detach Cumsum Unflatten
    Flatten PixelShuffle PixelUnshuffle""".split()
)
_SUM_OF = {"Mul", "Mm", "Bmm", "Mv", "Dot", "Vdot", "Linear", "Matmul", "Ger", "Addr"}
_EQUAL = {"Add", "Sub", "Cat", "Stack", "Where", "Maximum", "Minimum"}
_NORMALIZE = {
    "NativeLayerNorm",
    "NativeGroupNorm",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "FusedRmsNorm",
    "RmsNorm",
}
_INNER = {"Rsqrt", "Sqrt", "Pow"}
_NUMBER = re.compile(r"Backward\d*$")


def _kind(node: Any) -> str:
    return _NUMBER.sub("", node.name().rsplit("::", 1)[-1])


class Degrees:
    """The equations on the exponents with which tensors may be scaled.

    Args:
        outputs: What the module gives, in no degree of the weights where all equations hold.
        tensors: The tensors, by name.

    Attributes:
        names: The tensors' names.
        rows: The equations' coefficients, (equations, tensors).
        labels: What each equation is about, in words.
    """

    def __init__(self, outputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
        self.names = list(tensors)
        self._index = {id(tensor): i for i, tensor in enumerate(tensors.values())}
        self._zero = np.zeros(len(tensors))
        self._rows: list[Array] = []
        self.labels: list[str] = []
        self._degree: dict[Any, Array] = {}
        starts = [out.grad_fn for out in outputs if out.grad_fn is not None]
        order = _sorted(starts)
        self._consumers: dict[Any, set[str]] = {}
        for node in order:
            for child, _ in node.next_functions:
                self._consumers.setdefault(child, set()).add(_kind(node))
        for node in order:
            self._degree[node] = self._of(node)
        for start in starts:
            self._require(self._degree[start], "the output changes with it")
        self.rows = np.array(self._rows).reshape(len(self._rows), len(tensors))

    def broken_by(self, names: Iterable[str]) -> str | None:
        """The first equation that scaling these tensors alone breaks, in words, or ``None``."""
        wanted = set(names)
        exponents = np.array([float(name in wanted) for name in self.names])
        broken = np.nonzero(np.abs(self.rows @ exponents) > 1e-9)[0]
        return self.labels[int(broken[0])] if len(broken) else None

    def joint_sets(self, left: Sequence[str]) -> list[tuple[str, ...]]:
        """Smallest sets of tensors that can be scaled together, each tensor in one at most.

        Args:
            left: The tensors of which they are to be made.
        """
        from scipy.optimize import linprog

        columns = [self.names.index(name) for name in left]
        matrix = self.rows[:, columns]
        matrix = np.unique(matrix[np.abs(matrix).max(axis=1, initial=0.0) > 0.0], axis=0)
        count = len(columns)
        if not count or not len(matrix):
            return []
        # Which tensors are in any set: the most of min(c, 1) with c >= 0 that solves the equations.
        bounds = [(0.0, None)] * count + [(0.0, 1.0)] * count
        most = linprog(
            np.concatenate([np.zeros(count), -np.ones(count)]),
            A_ub=np.hstack([-np.eye(count), np.eye(count)]),
            b_ub=np.zeros(count),
            A_eq=np.hstack([matrix, np.zeros_like(matrix)]),
            b_eq=np.zeros(len(matrix)),
            bounds=bounds,
        )
        if most.status != 0:
            return []
        free = [i for i in range(count) if most.x[count + i] > 1e-6]
        sets: list[tuple[int, ...]] = []
        taken: set[int] = set()
        known: dict[int, tuple[int, ...]] = {}
        while True:
            for i in free:
                if i not in taken and (i not in known or taken & set(known[i])):
                    known[i] = _smallest(matrix, i, taken)
            choices = [known[i] for i in free if i not in taken and len(known[i]) > 1]
            if not choices:
                return [tuple(left[j] for j in members) for members in sets]
            sets.append(min(choices, key=lambda members: (len(members), members)))
            taken |= set(sets[-1])

    def _require(self, degree: Array, label: str) -> None:
        if degree.any():
            self._rows.append(degree)
            self.labels.append(label)

    def _of(self, node: Any) -> Array:
        """The degree of a node's results, with the equations that it needs."""
        kind = _kind(node)
        inputs = [child for child, _ in node.next_functions]
        degrees = [self._zero if c is None else self._degree[c] for c in inputs]
        first = degrees[0] if degrees else self._zero
        if kind == "AccumulateGrad":
            degree = self._zero.copy()
            index = self._index.get(id(node.variable))
            if index is not None:
                degree[index] = 1.0
            return degree
        if kind in _KEEP:
            return first
        if kind in _EQUAL:
            return self._equal(node, kind, inputs, degrees)
        if kind in _SUM_OF:
            return np.asarray(sum(degrees, self._zero))
        if kind in ("Addmm", "Baddbmm", "Addmv"):
            product = degrees[1] + degrees[2]
            if inputs[0] is not None:
                self._require(product - first, "its bias stays")
            return np.asarray(product)
        if kind in ("Convolution", "ConvolutionOverrideable", "MkldnnConvolution", "SlowConv2D"):
            product = degrees[0] + degrees[1]
            if len(inputs) > 2 and inputs[2] is not None:
                self._require(product - degrees[2], "its bias stays")
            return np.asarray(product)
        if kind in _NORMALIZE:
            return self._normalize(node, inputs, degrees)
        return self._elementwise(node, kind, degrees)

    def _normalize(self, node: Any, inputs: list[Any], degrees: list[Array]) -> Array:
        affine = [d for c, d in zip(inputs[1:], degrees[1:], strict=True) if c is not None]
        for other in affine[1:]:
            self._require(affine[0] - other, "its affine bias stays")
        gain = affine[0] if affine else self._zero
        if getattr(node, "_saved_training", True):
            return gain
        self._require(degrees[0], "a normalisation with fixed statistics")
        return gain

    def _equal(self, node: Any, kind: str, inputs: list[Any], degrees: list[Array]) -> Array:
        moving = [d for c, d in zip(inputs, degrees, strict=True) if c is not None]
        if not moving:
            return self._zero
        constant = len(moving) < len(inputs) or len(inputs) == 1
        # A constant under a root is an eps, whose size only measurement tells.
        eps = kind in ("Add", "Sub") and self._consumers.get(node, set()) <= {*_INNER, "Div"}
        if constant and kind != "Where" and not (eps and self._consumers.get(node)):
            self._require(moving[0], "added to a constant or the input")
        for other in moving[1:]:
            self._require(moving[0] - other, "added to a skip or a bias")
        return moving[0]

    def _elementwise(self, node: Any, kind: str, degrees: list[Array]) -> Array:
        first = degrees[0] if degrees else self._zero
        if kind == "Div":
            return first - degrees[1] if len(degrees) > 1 else first
        if kind == "Reciprocal":
            return -first
        if kind == "Sqrt":
            return 0.5 * first
        if kind == "Rsqrt":
            return -0.5 * first
        if kind == "Var":
            return 2.0 * first
        if kind == "Pow" and isinstance(getattr(node, "_saved_exponent", None), (int, float)):
            return float(node._saved_exponent) * first
        if kind == "WeightNormInterface":  # v, g
            return degrees[1] if len(degrees) > 1 else self._zero
        if kind.startswith("ScaledDotProduct"):
            self._require(degrees[0] + degrees[1], "passes attention's softmax")
            return degrees[2]
        name = "a softmax" if "oftmax" in kind else kind
        for degree in degrees:
            self._require(degree, f"passes {name}, not homogeneous")
        return self._zero


def _smallest(matrix: Array, start: int, without: set[int]) -> tuple[int, ...]:
    """The smallest set with a tensor in it whose equal scaling solves the equations, or none."""
    from scipy.optimize import linprog

    count = matrix.shape[1]
    limits = [(0.0, 0.0 if j in without else None) for j in range(count)]
    limits[start] = (1.0, 1.0)
    found = linprog(np.ones(count), A_eq=matrix, b_eq=np.zeros(len(matrix)), bounds=limits)
    if found.status != 0:
        return ()
    members = tuple(j for j in range(count) if found.x[j] > 1e-6)
    return members if np.allclose(found.x[list(members)], 1.0, atol=1e-6) else ()


def _sorted(starts: Sequence[Any]) -> list[Any]:
    """The nodes of a graph, each after those it is computed from."""
    order: list[Any] = []
    done: set[Any] = set()
    stack = [(start, False) for start in starts]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack += [(c, False) for c, _ in node.next_functions if c is not None and c not in done]
    return order
