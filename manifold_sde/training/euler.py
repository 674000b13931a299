"""Euler's sums <w, grad f> of all tensors of a module, from a few backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError, DTypeError, NonFiniteError
from manifold_sde.number_arrays import Array
from manifold_sde.training.homogeneity import Degrees

_PERTURBED, _VECTORS = 0.1, 0.3
_CASTS = {"torch.float64": "double", "torch.float32": "float", "torch.float16": "half"} | {
    "torch.bfloat16": "bfloat16"
}
Forward = Callable[[nn.Module, Any], Any]


def call(module: nn.Module, inputs: Any) -> Any:
    """The module's outputs: a tuple is its arguments, a mapping its keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def floating(outputs: Any) -> list[Tensor]:
    """The tensors of real numbers in nested outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for each in outputs for tensor in floating(each)]
    return []


def _named(name: str, values: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of real numbers in nested values, each with where it is."""
    if isinstance(values, Tensor) and values.is_floating_point():
        yield name, values.detach()
    elif isinstance(values, Mapping):
        for key, each in values.items():
            yield from _named(f"{name}[{key!r}]", each)
    elif isinstance(values, (tuple, list)):
        for i, each in enumerate(values):
            yield from _named(f"{name}[{i}]" if len(values) > 1 else name, each)


class Sums:
    """What backward passes say of one tensor.

    The arrays are there before the first pass: small ones made between the large ones of a pass
    would keep these from being given back.

    Args:
        weight: The tensor.
        passes: Number of passes.

    Attributes:
        along: For its first and second dimension, <w, grad f> of each row (passes, rows).
        squares: The sums of the squares of the terms, in the same form.
    """

    def __init__(self, weight: Tensor, passes: int) -> None:
        rows = weight.shape[:2] or (1,)
        self.along, self.squares = ([np.zeros((passes, n)) for n in rows] for _ in range(2))

    def add(self, count: int, weight: Tensor, gradient: Tensor | None) -> None:
        """Set what a pass says."""
        if gradient is None:
            return
        terms = weight.detach() * gradient
        for axis, (along, squares) in enumerate(zip(self.along, self.squares, strict=True)):
            rows = terms.transpose(0, axis) if terms.dim() > 1 else terms
            rows = rows.reshape(along.shape[1], -1)
            along[count] = rows.sum(1, dtype=torch.float64).cpu()
            squares[count] = (rows * rows).sum(1, dtype=torch.float64).cpu()

    def blocks(self, axis: int, size: int) -> tuple[Array, Array]:
        """Sums and squares of blocks of ``size`` rows each: (passes, blocks)."""
        sums, squares = self.along[axis], self.squares[axis]
        shape = (len(sums), -1, size)
        return sums.reshape(shape).sum(2), squares.reshape(shape).sum(2)

    @property
    def total(self) -> tuple[Array, Array]:
        """Sums and squares of the whole tensor: (passes,)."""
        return self.along[0].sum(1), self.squares[0].sum(1)


@dataclass
class Measured:
    """Euler's sums of all tensors, and where they came from.

    Attributes:
        sums: Of each tensor, by name.
        values: <cotangent, f> of each pass, (passes,).
        degrees: The equations that the graph gives.
        epsilon: Rounding of the numbers, of the tensors and in between.
    """

    sums: dict[str, Sums]
    values: Array
    degrees: Degrees
    epsilon: float


class Probe:
    """A module that is run at perturbed weights, and is left as it was.

    Args:
        module: The module, in the mode (``train``, ``eval``) in which it is meant.
        inputs: What it is called with.
        forward: How, if not ``module(inputs)``.
        seed: Of perturbations, cotangents and what the module itself draws.
    """

    def __init__(self, module: nn.Module, inputs: Any, forward: Forward | None, seed: int) -> None:
        self.module, self.inputs, self.seed = module, inputs, seed
        self.forward = forward or call
        self.tensors = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.tensors:
            raise ArgumentError(
                "no parameter of the module is trained",
                received=f"{type(module).__name__} of {sum(1 for _ in module.parameters())} "
                "parameters, none with requires_grad",
                expected="a module with parameters that require a gradient",
                remedy="module.requires_grad_(True)",
            )

    @contextmanager
    def restored(self) -> Iterator[dict[str, Tensor]]:
        """Give copies of the tensors, and put them and all buffers back at the end."""
        saved = {name: p.detach().clone() for name, p in self.tensors.items()}
        buffers = [(b, b.detach().clone()) for b in self.module.buffers()]
        try:
            yield saved
        finally:
            with torch.no_grad():
                for name, p in self.tensors.items():
                    p.copy_(saved[name])
                for buffer, value in buffers:
                    buffer.copy_(value)

    def perturb(self, saved: dict[str, Tensor], count: int) -> None:
        """Move the tensors a tenth of their size away, in a way of each pass.

        Vectors are moved by .3 at least: a bias near 0, beside a gain of 1, must be seen.
        """
        generator = torch.Generator().manual_seed(self.seed + 1000003 * (count + 1))
        with torch.no_grad():
            for name, p in self.tensors.items():
                size = _PERTURBED * float(saved[name].double().square().mean().sqrt())
                if p.dim() < 2:
                    size = max(size, _VECTORS)
                z = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
                p.copy_(saved[name] + (size or _PERTURBED) * z)

    def outputs(self) -> list[Tensor]:
        """The outputs, with the random numbers of the same seed each time."""
        devices = sorted({p.device.index or 0 for p in self.tensors.values() if p.is_cuda})
        torch.clear_autocast_cache()  # weights in half precision, as they were before they changed
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            try:
                found = floating(self.forward(self.module, self.inputs))
            except RuntimeError as error:
                if (other := self._other_dtype(error)) is not None:
                    raise other from None
                raise
        if not found:
            raise ArgumentError(
                "the module gives no tensor of real numbers",
                received=f"outputs of {type(self.module).__name__}",
                expected="a tensor, or a tuple or mapping that has some",
                remedy="forward=lambda module, inputs: ... that returns the tensor to look at",
            )
        return found

    def _other_dtype(self, error: RuntimeError) -> DTypeError | None:
        """What to say where a forward pass failed for the dtype of the inputs."""
        given = {tensor.dtype for _, tensor in _named("inputs", self.inputs)}
        weights = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        if "type" not in str(error) or given <= weights:
            return None
        one, other = (str(min(kinds, key=str)) for kinds in (given - weights, weights))
        return DTypeError(
            "the inputs do not have the dtype of the weights",
            received=f"inputs of {one}, weights of {other}",
            expected="one dtype for both",
            remedy=f"inputs.{_CASTS.get(other, other)}(), or model.{_CASTS.get(one, one)}()",
        )

    def _not_finite(
        self, saved: dict[str, Tensor], what: str, named: Iterable[tuple[str, Tensor]]
    ) -> NonFiniteError:
        """What to say of outputs or gradients that are not finite: the first cause and place."""
        weights = (*saved.items(), *self.module.named_buffers())
        for source, tensors, remedy in (
            ("weights", weights, "a checkpoint of before they were so"),
            ("inputs", _named("inputs", self.inputs), "torch.nan_to_num(inputs), or another batch"),
            (what, named, "a batch of typical size, or a forward= that gives what is finite"),
        ):
            for name, tensor in tensors:
                places = (~torch.isfinite(tensor)).nonzero()
                if len(places):
                    at = places[0].tolist()
                    return NonFiniteError(
                        f"the {source} are not finite",
                        received=f"{tensor[tuple(at)].item()} in {name} at {at}, "
                        f"the first of {len(places)}",
                        expected="finite numbers",
                        remedy=remedy,
                    )
        return NonFiniteError(
            f"the {what} are not finite",
            received="NaN or infinity in their sums",
            expected="finite numbers",
            remedy="smaller weights, or a wider dtype: model.float()",
        )

    def measure(self, saved: dict[str, Tensor], passes: int) -> Measured:
        """Euler's sums at perturbed weights, with a random cotangent a pass."""
        sums = {name: Sums(tensor, passes) for name, tensor in self.tensors.items()}
        values = np.zeros(passes)
        degrees: Degrees | None = None
        for count in range(passes):
            self.perturb(saved, count)
            outputs = [out for out in self.outputs() if out.grad_fn is not None]
            if not outputs:
                raise ArgumentError(
                    "the module's outputs do not depend on its parameters",
                    received="outputs without a graph",
                    expected="outputs through which gradients flow",
                    remedy="no torch.no_grad() inside the module or forward",
                )
            if degrees is None:
                degrees = Degrees(outputs, self.tensors)
            cotangents = self._cotangents(outputs, count)
            value = sum(
                (c * out.detach()).sum(dtype=torch.float64)
                for c, out in zip(cotangents, outputs, strict=True)
            )
            values[count] = float(value)
            if not math.isfinite(values[count]):
                raise self._not_finite(saved, "outputs", _named("outputs", outputs))
            gradients = torch.autograd.grad(
                outputs, list(self.tensors.values()), cotangents, allow_unused=True
            )
            for (name, tensor), gradient in zip(self.tensors.items(), gradients, strict=True):
                sums[name].add(count, tensor, gradient)
                if gradient is not None and not np.isfinite(sums[name].along[0][count]).all():
                    raise self._not_finite(saved, "gradients", [(name, gradient)])
            del outputs, gradients
        assert degrees is not None
        return Measured(sums, values, degrees, self._rounding())

    @torch.no_grad()
    def _rounding(self) -> float:
        """The coarsest rounding of the weights, and of what any layer gives: less in autocast."""
        dtypes = {p.dtype for p in self.tensors.values()}

        def look(module: nn.Module, args: Any, outputs: Any) -> None:
            dtypes.update(tensor.dtype for tensor in floating(outputs))

        hooks = [layer.register_forward_hook(look) for layer in self.module.modules()]
        try:
            self.outputs()
        finally:
            for hook in hooks:
                hook.remove()
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _cotangents(self, outputs: Sequence[Tensor], count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * (count + 1))
        return [
            torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out)
            for out in outputs
        ]
