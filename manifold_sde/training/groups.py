"""Which weights of a module are scale-invariant, alone or together, and which are not, and why."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_count, check_integer, kind_of
from manifold_sde.errors import ArgumentError, DTypeError, MixingClockWarning, printable
from manifold_sde.number_arrays import Array
from manifold_sde.paper import implements
from manifold_sde.training.euler import Forward, Measured, Probe
from manifold_sde.training.rescaling import confirmed
from manifold_sde.training.scale_group import OtherTensor, ScaleGroup

INVARIANT, EPS_MATTERS = 1e-3, 2e-2
"""Euler's sum over the root of the sum of squares of its terms: up to the first, invariant; up to
the second, the eps of a normalisation is seen; above, not invariant."""
_MOST_PASSES = 20
_WIDTH = 80
_FIXED = (
    "Normalisations with running statistics (eval mode) make nothing scale-invariant: training "
    "does not use them. module.train() first, if this is not what is trained."
)


class ScaleGroups(Sequence[ScaleGroup]):
    """The scale-invariant groups of a module, and what is in none of them.

    Attributes:
        groups: The groups, none of which share weights.
        others: The trained tensors outside.
        module_name: Name of the module's class.
        fixed_statistics: Whether a layer normalised with running statistics, as in ``eval()``.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: tuple[ScaleGroup, ...],
        others: tuple[OtherTensor, ...],
        passes: int,
    ) -> None:
        self.groups, self.others, self.passes = groups, others, passes
        self.module_name = type(module).__name__
        self.fixed_statistics = any(
            getattr(m, "running_mean", None) is not None and not m.training
            for m in module.modules()
        )
        self.tensors = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ScaleGroup]:
        return iter(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            for group in self.groups:
                if index == group.name or index in group.parameters:
                    return group
            raise ArgumentError(
                "there is no scale-invariant group of this name",
                received=repr(index),
                expected="the name of a group, or of a tensor in one",
                remedy=", ".join(self.names[:6]) or "this module has none",
            )
        return self.groups[index]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(group.name for group in self.groups)

    @property
    def share(self) -> float:
        """Share of the trained weights that are in a group."""
        return sum(g.weights for g in self.groups) / sum(p.numel() for p in self.tensors.values())

    def optimizer_groups(
        self, lr: float | None = None, weight_decay: float = 0.0, **options: Any
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with decay on what is scale-invariant alone.

        A tensor of which only some rows are in a group gets no decay. Where none does, it warns.

        Args:
            lr: Learning rate of both, or ``None`` for the optimizer's.
            weight_decay: Weight decay of the scale-invariant tensors.
            **options: More options of both.

        Returns:
            Two parameter groups, or one where the other would be empty. Their ``"name"`` says which
            is which.

        >>> layers = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = scale_invariant_groups(layers, torch.randn(16, 4))
        >>> optimizer = torch.optim.AdamW(groups.optimizer_groups(lr=1e-3, weight_decay=0.1))
        >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
        [(1, 0.1), (4, 0.0)]
        """
        whole = {n for g in self.groups if g.rows is None for n in g.parameters}
        common = dict(options) if lr is None else {"lr": lr, **options}
        chosen = [
            {
                "params": [p for n, p in self.tensors.items() if (n in whole) is inside],
                "weight_decay": weight_decay if inside else 0.0,
                "name": "scale-invariant" if inside else "other",
                **common,
            }
            for inside in (True, False)
        ]
        if weight_decay and not chosen[0]["params"]:
            warnings.warn(
                "No whole tensor of this module is in a scale-invariant group, so that nothing "
                f"decays: weight_decay={weight_decay:g} is for none of its weights. "
                "print(groups) says why of each tensor; an optimizer of model.parameters() has "
                "decay on all.",
                MixingClockWarning,
                stacklevel=2,
            )
        return [group for group in chosen if group["params"]]

    def __repr__(self) -> str:
        return f"<{len(self)} scale-invariant groups of {self.module_name}>"

    def __str__(self) -> str:
        lines = [
            f"{self.module_name}: {len(self)} scale-invariant group{'s' * (len(self) != 1)}, "
            f"{100 * self.share:.3g} % of the trained weights"
        ]
        if not self.groups:
            lines.append(
                "No tensor, row or set of tensors can be scaled without a change of output."
            )
        else:
            lines += ["", f"{'group':36}  {'parts':>6}  {'weights':>9}  violation  scaled"]
        for group in self.groups:
            eps = " eps!" if group.eps_matters else ""
            row = f"{group.parts:6}  {group.weights:9}  {group.violation:9.1e}"
            lines += _row(group.name, 36, f"{row}  {group.described}{eps}")
            if more := group.parameters[1:]:
                rest = f" and {len(more) - 3} more" if len(more) > 3 else ""
                text = f"with {', '.join(more[:3])}{rest}"
                lines += textwrap.wrap(
                    text, _WIDTH, initial_indent="    ", subsequent_indent="      "
                )
        if self.fixed_statistics:
            lines += ["", *textwrap.wrap(_FIXED, _WIDTH)]
        if self.others:
            lines += ["", f"{'not scale-invariant':36}  violation  why"]
        for other in self.others:
            lines += _row(other.name, 36, f"{other.violation:9.1e}  {other.reason}")
        return printable("\n".join(lines))


def _row(name: str, width: int, rest: str) -> list[str]:
    """A row of the table; a name that is too long loses its start, and a long text runs on."""
    numbers, _, text = rest.rpartition("  ")
    room = _WIDTH - width - len(numbers) - 4
    first, *more = textwrap.wrap(text, room, break_on_hyphens=False)
    shown = name if len(name) <= width else f"…{name[1 - width :]}"
    indent = " " * (width + len(numbers) + 4)
    return [f"{shown:{width}}  {numbers}  {first}", *(indent + line for line in more)]


@implements("Definition 2.2", "Lemma 2.5")
def scale_invariant_groups(
    module: nn.Module,
    inputs: Any,
    *,
    forward: Forward | None = None,
    passes: int = 12,
    seed: int = 0,
) -> ScaleGroups:
    r"""Find which weights of a module are scale-invariant, by measurement.

    For a function of degree p in weights w, <w, grad f> = p f (Euler). A backward pass with a
    random cotangent gives these sums of all tensors, and of all their rows, at once; passes at
    weights that are moved a tenth of their size away tell an identity from an accident. Rows,
    blocks of rows (heads, channel groups) and columns are looked at, and sets of tensors of which
    the graph of the forward pass says that they scale together. What is found is scaled, to see
    that the outputs stay.

    The module is left as it was, and looked at in the mode that it is in: with ``eval()`` batch
    normalisation has fixed statistics, and makes nothing scale-invariant. Tensors that are frozen
    count as constants.

    Args:
        module: The module.
        inputs: What it is called with: a tensor, a tuple of arguments, or a mapping of keyword
            arguments; a batch of typical size.
        forward: How to call it, ``forward(module, inputs)``, if not like that.
        passes: Number of backward passes, 4 to 20.
        seed: Of the random numbers.

    Returns:
        The groups.

    Raises:
        ArgumentError: For a module without trained parameters, or without outputs to look at.
        NonFiniteError: If outputs or gradients are not finite.
        DTypeError: If the inputs do not have the dtype of the weights.

    Source: Lemma 2.5; exact to rounding, relative to the eps of the normalisations.

    Example:
        >>> layers = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = scale_invariant_groups(layers, torch.randn(16, 4))
        >>> groups.names, round(groups.share, 3)
        (('0.weight',), 0.485)
        >>> [other.reason for other in groups.others][-1]
        'a bias to what stays'
    """
    if not isinstance(module, nn.Module):
        raise DTypeError(
            "module is not a torch module",
            received=kind_of(module),
            expected="a torch.nn.Module",
            remedy="scale_invariant_groups(model, inputs)",
        )
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    count = check_count("passes", passes, "backward passes", "passes=12", least=4)
    check_integer("passes", count, 4, _MOST_PASSES, "more passes tell nothing new")
    probe = Probe(module, inputs, forward, check_integer("seed", seed, 0, 2**31))
    device = next(iter(probe.tensors.values())).device.type
    # In a training loop's autocast the sums of weights in single precision would be rounded.
    with torch.autocast(device, enabled=False), probe.restored() as saved:
        measured = probe.measure(saved, count)
        search = _Search(module, probe.tensors, measured)
        groups, search.failed = confirmed(probe, saved, search.candidates(), measured.epsilon)
    return ScaleGroups(module, tuple(groups), search.others(groups), count)


class _Search:
    """Groups by Euler's sums: of a tensor and its parts, then of sets of tensors."""

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, Tensor], measured: Measured
    ) -> None:
        self.module, self.tensors, self.measured = module, tensors, measured
        # In half precision the sums themselves are rounded.
        self.strict = max(INVARIANT, 8.0 * measured.epsilon)
        self.loose = max(EPS_MATTERS, 2.0 * self.strict)
        sizes = {n: float(np.sqrt(s.total[1].mean())) for n, s in measured.sums.items()}
        level = min(1e3 * measured.epsilon, 0.01) * max(sizes.values())
        self.idle = {name for name, size in sizes.items() if size <= level}
        self.failed: dict[str, float] = {}

    def violation(self, name: str) -> float:
        """Euler's sum of a whole tensor, relative to its terms."""
        sums, squares = self.measured.sums[name].total
        return float(np.sqrt((sums**2).sum() / max(squares.sum(), 1e-300)))

    def candidates(self) -> list[ScaleGroup]:
        """Groups by measurement, which scaling has to confirm."""
        groups: list[ScaleGroup] = []
        left: list[str] = []
        for name in self.tensors:
            if name in self.idle:
                continue
            found = self.parts((name,))
            groups += [found] if found else []
            if found is None:
                left.append(name)
        for names in self.measured.degrees.joint_sets(left):
            joint = self.parts(names)
            groups += [joint] if joint else []
        return groups

    def parts(self, names: tuple[str, ...]) -> ScaleGroup | None:
        """The finest parts of tensors, together, that are scale-invariant."""
        shapes = [self.tensors[n].shape for n in names]
        axes: tuple[int, ...] = tuple(range(min(2, len(shapes[0])))) if len(names) == 1 else (0,)
        rows = {shape[0] if len(shape) else 1 for shape in shapes}
        for whole in (True, False):
            if len(rows) == 1 and (whole or len(names) == 1):
                for axis in axes:
                    length = shapes[0][axis] if shapes[0] else 1
                    for size in _divisors(length)[:-1]:
                        group = self._cut(names, axis, size, length, whole)
                        if group:
                            return group
            if whole and (group := self._whole(names)):
                return group
        return None

    def _whole(self, names: tuple[str, ...]) -> ScaleGroup | None:
        totals = [self.measured.sums[n].total for n in names]
        sums, squares = (np.sum([t[i] for t in totals], axis=0) for i in (0, 1))
        violation = float(np.sqrt((sums**2).sum() / max(squares.sum(), 1e-300)))
        if not violation <= self.loose:
            return None
        weights = sum(self.tensors[n].numel() for n in names)
        return ScaleGroup(
            _name(names), names, 0, 0, None, 1, weights, violation, violation > self.strict
        )

    def _cut(
        self, names: tuple[str, ...], axis: int, size: int, length: int, whole: bool
    ) -> ScaleGroup | None:
        """The parts of ``size`` rows, if all are invariant, or else a stretch of them is."""
        blocks = [self.measured.sums[n].blocks(axis, size) for n in names]
        sums, squares = (np.sum([b[i] for b in blocks], axis=0) for i in (0, 1))
        power = squares.sum(0)
        alive = power > (30.0 * self.measured.epsilon) ** 2 * power.max()
        with np.errstate(invalid="ignore", divide="ignore"):
            violations: Array = np.sqrt((sums**2).sum(0) / power)
        passed = (violations <= self.loose) & alive
        if whole:
            if 2 * alive.sum() < len(alive) or not passed[alive].all():
                return None
            stretch = None
        else:
            ends = np.flatnonzero(passed)
            if (
                len(ends) < 2
                or not passed[ends[0] : ends[-1] + 1][alive[ends[0] : ends[-1] + 1]].all()
            ):
                return None
            stretch = (int(ends[0]) * size, (int(ends[-1]) + 1) * size)
        rows = length if stretch is None else stretch[1] - stretch[0]
        weights = sum(self.tensors[n].numel() for n in names) * rows // length
        worst = float(violations[passed].max())
        return ScaleGroup(
            _name(names),
            names,
            axis,
            size,
            stretch,
            rows // size,
            weights,
            worst,
            worst > self.strict,
        )

    def others(self, groups: Sequence[ScaleGroup]) -> tuple[OtherTensor, ...]:
        """The tensors in no group, each with a reason."""
        inside = {name for group in groups for name in group.parameters}
        partly = {g.parameters[0]: g for g in groups if g.rows is not None}
        found = []
        for name, tensor in self.tensors.items():
            if name in inside and name not in partly:
                continue
            degree, reason = self._reason(name)
            if name in partly:
                group = partly[name]
                assert group.rows is not None
                reason = f"the rows outside {group.rows[0]}:{group.rows[1]}: {reason}"
            found.append(OtherTensor(name, tensor.numel(), self.violation(name), degree, reason))
        return tuple(found)

    def _reason(self, name: str) -> tuple[float | None, str]:
        if name in self.failed:
            return None, (
                f"Euler's sum vanishes, but scaling changes the output by {self.failed[name]:.1e}"
            )
        if name in self.idle:
            return 0.0, "no effect on the output"
        sums, squares = self.measured.sums[name].total
        values = self.measured.values
        degree = float((sums * values).sum() / max((values**2).sum(), 1e-300))
        residual = ((sums - degree * values) ** 2).sum() / squares.sum()
        if residual <= self.strict**2 and abs(degree) > 0.05:
            return degree, f"output of degree {degree:.3g}"
        broken = self.measured.degrees.broken_by([name])
        owner = name.rpartition(".")[0]
        layer = type(self.module.get_submodule(owner)).__name__ if owner else ""
        if "Norm" in layer:
            return None, f"affine {name.rpartition('.')[2]} of a {layer}"
        if broken is not None and name.endswith("bias") and "bias" in broken:
            return None, "a bias to what stays"
        if broken is not None:
            return None, broken
        return None, "the eps of a normalisation is too large"


def _name(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} + {len(names) - 1} more"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
