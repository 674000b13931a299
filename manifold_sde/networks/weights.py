"""The trained parameters of a module as one vector."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError, DTypeError, ShapeError


@dataclass(frozen=True)
class ParameterBlock:
    """A parameter and its place in x.

    Attributes:
        name: Name in the module, such as ``"stem.weight"``.
        shape: Its shape.
        start: The first of its coordinates in x.
        stop: The one after the last.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def index(self) -> slice:
        """The coordinates, as a slice of the last dimension of x."""
        return slice(self.start, self.stop)


class Weights:
    """Which parameters of a module make up x (D,), in which order.

    Args:
        module: The module.
        frozen: Names of parameters, or of submodules, that are constants; those that do not
            require a gradient are constants anyway.

    Attributes:
        parameters: The trained parameters by their names, in the order of x. A parameter that is
            used under several names appears once, under the first.
        frozen: Names of the constant parameters.
        shared: The further names of parameters that have several.
        dim: Their number D of coordinates.

    Raises:
        ArgumentError: If a name is unknown, or nothing is left to train.
    """

    def __init__(self, module: nn.Module, frozen: str | Iterable[str] = ()) -> None:
        named = dict(module.named_parameters())
        self.shared = _further_names(module, named)
        requested = _frozen_names(module, self.shared, frozen)
        self.frozen = tuple(n for n, p in named.items() if n in requested or not p.requires_grad)
        blocks, start = {}, 0
        for name, parameter in named.items():
            if name in self.frozen:
                continue
            stop = start + parameter.numel()
            blocks[name] = ParameterBlock(name, tuple(parameter.shape), start, stop)
            start = stop
        if not blocks:
            raise ArgumentError(
                "the module has no trained parameters",
                received=f"{len(named)} parameters, of which {len(self.frozen)} are frozen",
                expected="at least one parameter that requires a gradient and is not in frozen",
                remedy="module.requires_grad_(True), and only the last layer in frozen",
            )
        self._blocks = blocks
        self.dim = start

    @property
    def parameters(self) -> Mapping[str, ParameterBlock]:
        """The trained parameters by their names, in the order of x."""
        return MappingProxyType(self._blocks)

    def __str__(self) -> str:
        parts = [f"trained: {len(self._blocks)} tensors"]
        if self.frozen:
            parts.append(f"frozen: {', '.join(self.frozen)}")
        parts += [f"{', '.join(v)} shared with {k}" for k, v in self.shared.items()]
        return "; ".join(parts)

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters of one vector x (D,), by name."""
        # One split: the gradient of slices would be a sum of as many vectors as there are.
        parts = x.split([b.stop - b.start for b in self._blocks.values()])
        named = zip(self._blocks.items(), parts, strict=True)
        return {name: part.reshape(b.shape) for (name, b), part in named}

    def vector(self, module: nn.Module) -> Tensor:
        """The trained parameters of a module as a vector x (D,), a copy.

        Raises:
            ArgumentError, ShapeError: If the module has other parameters.
        """
        named = self._parameters_of(module)
        return torch.cat([named[name].detach().flatten() for name in self._blocks])

    def load(self, module: nn.Module, x: Tensor, constants: Mapping[str, Tensor]) -> None:
        """Write x (D,) into the trained parameters of a module, in place.

        Args:
            module: The module.
            x: Point (D,).
            constants: The values that its frozen parameters need to have.

        Raises:
            ArgumentError, ShapeError, NonFiniteError: If they do not fit together.
        """
        named = self._parameters_of(module)
        x = check_point(x, self.dim, allow_zero=True, values=True)
        if x.dim() != 1:
            raise ShapeError(
                "one point is loaded into a module",
                received=str(tuple(x.shape)),
                expected=f"({self.dim},)",
                remedy="load_into(module, x[i]) for one of a batch",
            )
        for name in self.frozen:
            there, here = named[name].detach(), constants[name].to(named[name])
            if not torch.allclose(there, here, rtol=1e-5, atol=1e-8):
                raise ArgumentError(
                    f"the frozen parameter {name!r} of the module is not that of the problem",
                    received="other values: the module would not compute the problem's function",
                    expected="the values that it had when the problem was made",
                    remedy="load into that module, or into copy.deepcopy(module) of it",
                )
        with torch.no_grad():
            for name, value in self.unflatten(x).items():
                named[name].copy_(value)

    def part(self, x: Tensor, name: str) -> Tensor:
        """The coordinates of a parameter, or of all of a submodule: (..., D) -> (..., n).

        Raises:
            ArgumentError: If nothing trained has this name.
        """
        blocks = [b for n, b in self._blocks.items() if is_below(n, str(name))]
        if not blocks:
            raise _unknown_name(str(name), self._blocks, "of a trained parameter or its module")
        return torch.cat([x[..., b.index] for b in blocks], dim=-1)

    def _parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        if not isinstance(module, nn.Module):
            raise DTypeError(
                "the weights belong to a module",
                received=type(module).__name__,
                expected="a torch.nn.Module like the one that the problem was made from",
                remedy="problem.vector(module), problem.load_into(module, x)",
            )
        named = dict(module.named_parameters())
        wanted = {*self._blocks, *self.frozen}
        if set(named) != wanted:
            differing = sorted(set(named) ^ wanted)
            raise ArgumentError(
                "the module is not like the one that the problem was made from",
                received=f"parameters that only one of them has: {', '.join(differing[:4])}",
                expected="a module of the same class, built in the same way",
                remedy="copy.deepcopy(module) of the original",
            )
        for name, block in self._blocks.items():
            if tuple(named[name].shape) != block.shape:
                raise ShapeError(
                    f"the parameter {name!r} has another shape",
                    received=str(tuple(named[name].shape)),
                    expected=str(block.shape),
                    remedy="a module built in the same way as the original",
                )
        return named


def is_below(name: str, prefix: str) -> bool:
    """Whether a name is this one, or that of something inside the submodule of this name."""
    return name == prefix or name.startswith(f"{prefix.removesuffix('.')}.")


def _further_names(
    module: nn.Module, named: Mapping[str, nn.Parameter]
) -> dict[str, tuple[str, ...]]:
    """The further names of parameters that have several, by the first."""
    first = {id(parameter): name for name, parameter in named.items()}
    further: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:
            further.setdefault(first[id(parameter)], []).append(name)
    return {name: tuple(names) for name, names in further.items()}


def _frozen_names(
    module: nn.Module, shared: Mapping[str, Sequence[str]], frozen: str | Iterable[str]
) -> set[str]:
    """First names of the parameters that the user freezes."""
    if not isinstance(frozen, Iterable):
        raise DTypeError(
            "frozen are no names",
            received=type(frozen).__name__,
            expected="names of parameters or of submodules",
            remedy="frozen=['head']",
        )
    wanted = [frozen] if isinstance(frozen, str) else list(frozen)
    first = {further: name for name, names in shared.items() for further in names}
    every = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    for prefix in wanted:
        matches = [name for name in every if is_below(name, str(prefix))]
        if not matches:
            modules = [
                n for n, m in module.named_modules() if n and next(m.parameters(), None) is not None
            ]
            raise _unknown_name(str(prefix), [*every, *modules], "in frozen")
        found |= {first.get(name, name) for name in matches}
    return found


def _unknown_name(name: str, known: Iterable[str], where: str) -> ArgumentError:
    names = list(known)
    close = difflib.get_close_matches(name, names)
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return ArgumentError(
        f"no parameter has the name {where}",
        received=repr(name),
        expected=f"the name of a parameter or of a module with parameters: {shown}",
        remedy=f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "dict(module.named_parameters()) has the names",
    )


def describe_size(shape: Sequence[int]) -> str:
    """A shape in words: ``"16 x 3 x 3 x 3"``, or ``"()"``."""
    return " x ".join(map(str, shape)) if math.prod(shape) and shape else str(tuple(shape))
