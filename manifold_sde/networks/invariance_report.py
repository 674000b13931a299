"""Which weights of a network are scale-invariant, and which layers break it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_point, kind_of
from manifold_sde.errors import DTypeError, ShapeError, printable
from manifold_sde.loss import Loss
from manifold_sde.networks import measurement
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.measurement import TOLERANCE
from manifold_sde.networks.module_checks import RUNNING
from manifold_sde.networks.weights import ParameterBlock, describe_size
from manifold_sde.paper import implements
from manifold_sde.scale_invariance import require_true_derivatives
from manifold_sde.torch_norms import ElementaryFunction

_NORMS = (RUNNING, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WIDTH = 80
#: Causes whose remedies an error shows.
_REMEDIES = 3


@runtime_checkable
class NetworkProblem(Protocol):
    """What is asked here of a :class:`~manifold_sde.Problem`, which stands above networks."""

    @property
    def name(self) -> str | None:
        """Name used in messages."""

    @property
    def pointwise(self) -> Loss:
        """The loss."""

    def require_network(self) -> NetworkFunction:
        """The network on its data."""

    def require_scale_invariance(self, x: Tensor | None = None) -> None:
        """Refuse the problem if its losses are not scale-invariant."""


@dataclass(frozen=True)
class ParameterInvariance:
    """What was measured of one parameter.

    Attributes:
        name: Its name.
        shape: Its shape.
        violation: The largest |<x_g, grad_g L_xi>|, relative to the largest |x_g| |grad_g L_xi|.
        row_violations: The same for each row (filter), (rows,); one row for a vector.
        breaks: Whether it is at fault that the weights are not scale-invariant together.
        has_effect: Whether the loss depends on it.
    """

    name: str
    shape: tuple[int, ...]
    violation: float
    row_violations: Tensor
    breaks: bool
    has_effect: bool

    @property
    def invariant_rows(self) -> int:
        """Number of rows that are scale-invariant by themselves."""
        return int((self.row_violations <= TOLERANCE).sum())

    @property
    def verdict(self) -> str:
        """In words, what it is scale-invariant with."""
        rows = len(self.row_violations)
        if not self.has_effect:
            return "no effect on the loss"
        if self.breaks:
            return "BREAKS IT"
        if self.violation > TOLERANCE:
            return "with others"
        if rows > 1 and self.invariant_rows == rows:
            return f"each of {rows} rows"
        if rows > 1 and self.invariant_rows:
            return f"by itself, {self.invariant_rows} of {rows} rows"
        return "by itself"


@dataclass(frozen=True)
class Cause:
    """A reason why the weights are not scale-invariant together.

    Attributes:
        name: Name of the layer or parameter.
        kind: ``"bias"``, ``"affine"``, ``"eps"``, ``"fixed statistics"``, ``"last layer"``,
            ``"constant"`` or ``"not normalised"``.
        remedy: How to mend it.
    """

    name: str
    kind: str
    remedy: str


@dataclass(frozen=True)
class ScaleInvarianceReport:
    """Scale invariance of a network, jointly and of each parameter.

    Attributes:
        name: Name of the problem.
        violation: The largest |<x, grad L_xi>|, relative to the largest |x| |grad L_xi|, of all
            trained weights together.
        parameters: What was measured of each parameter, in the order of x.
        causes: The layers that break joint invariance, with a hint.
        notes: What else to know: frozen and shared parameters.
    """

    name: str
    violation: float
    parameters: tuple[ParameterInvariance, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the weights are scale-invariant together, to rounding."""
        return self.violation <= TOLERANCE

    def __str__(self) -> str:
        verdict = "scale-invariant" if self.passed else "NOT scale-invariant"
        width = max(len("parameter"), *(len(p.name) for p in self.parameters))
        sizes = [describe_size(p.shape) for p in self.parameters]
        wide = max(len("shape"), *map(len, sizes))
        width = min(width, _WIDTH - wide - 36)
        lines = [
            f"{self.name}: all trained weights together are {verdict}",
            f"|<x, grad L>| / (|x| |grad L|) = {self.violation:.2g}, at most {TOLERANCE:g} allowed",
            "",
            f"{'parameter':{width}}  {'shape':{wide}}  {'violation':>9}  scale-invariant",
        ]
        for p, size in zip(self.parameters, sizes, strict=True):
            name = p.name if len(p.name) <= width else f"…{p.name[1 - width :]}"
            lines.append(f"{name:{width}}  {size:{wide}}  {p.violation:9.1e}  {p.verdict}")
        if self.causes:
            lines += ["", "what breaks it"]
            for c in self.causes:
                lines += _wrapped(f"{c.name} ({c.kind}): {c.remedy}")
        if self.notes:
            lines += ["", *(line for note in self.notes for line in _wrapped(note))]
        return printable("\n".join(lines))


def _wrapped(text: str) -> list[str]:
    """Lines of at most 80 columns, the first of them with a hyphen."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


@implements("Definition 2.2")
def scale_invariance_report(
    problem: NetworkProblem, x: Tensor | None = None
) -> ScaleInvarianceReport:
    """Which weights of a network are scale-invariant, and what breaks it, by measurement.

    By Euler's theorem (Lemma 2.5), weights x_g are scale-invariant if <x_g, grad_g L_xi> = 0
    everywhere. It is measured at x and at generic points around it, on a few samples, and for all
    weights together at x on every sample. The parameters at fault are those in no scaling that
    leaves the losses alone. What is wrong with them is seen from the change when it is mended: no
    eps, statistics of the batch, no biases and affine parameters.

    Args:
        problem: A problem that was made from a module.
        x: Point (D,); by default the weights that the module had then.

    Returns:
        The report; ``print`` shows it.

    Raises:
        DTypeError, ArgumentError: If the problem is none, or was not made from a module.
        ShapeError: If x is not one point.
        DifferentiationError: If it is the gradient that is wrong, and not the network.
    """
    if not isinstance(problem, NetworkProblem):
        raise DTypeError(
            "the problem is not a Problem",
            received=kind_of(problem),
            expected="a Problem, which has a loss and a noise",
            remedy="Problem.from_module(module, criterion, inputs, targets, noise)",
        )
    whole = problem.require_network()
    x = whole.start if x is None else check_point(x, whole.weights.dim, values=True)
    if x.dim() != 1:
        raise ShapeError(
            "the report is made at one point",
            received=str(tuple(x.shape)),
            expected=f"({whole.weights.dim},)",
            remedy="scale_invariance_report(problem, x[i])",
        )
    name = whole.__name__ if problem.name is None else problem.name
    network = whole.few(measurement.SAMPLES)
    points = measurement.points_near(x, measurement.points_needed(network))
    measured = measurement.measure(network, points)
    violation = max(
        measured.joint(), _over_all_samples(problem.pointwise, points[0]) / (measured.size or 1)
    )
    if violation > TOLERANCE:
        require_true_derivatives(problem.pointwise, points[0], name)
    breaking = measured.breaking()
    parameters = tuple(
        ParameterInvariance(
            name=name,
            shape=block.shape,
            violation=float(measured.own[i]),
            row_violations=measured.rows[i],
            breaks=bool(breaking[i]),
            has_effect=bool(measured.effect[i] > 0),
        )
        for i, (name, block) in enumerate(whole.weights.parameters.items())
    )
    causes = _causes(network, points, breaking) if bool(breaking.any()) else ()
    return ScaleInvarianceReport(
        name=name,
        violation=violation,
        parameters=parameters,
        causes=causes,
        notes=_notes(whole),
    )


def breaking_parameters(
    problem: NetworkProblem, x: Tensor
) -> tuple[tuple[int, ...], str, str] | None:
    """Coordinates of the parameters that break scale invariance, the layers at fault, the way out.

    Args:
        problem: A problem that was made from a module.
        x: Point (D,).

    Returns:
        The three, or ``None`` where none are found near x.
    """
    report = scale_invariance_report(problem, x)
    layers = problem.require_network().weights.parameters
    breaking = [layers[p.name] for p in report.parameters if p.breaks]
    if not breaking:
        return None
    coordinates = tuple(i for block in breaking for i in range(block.start, block.stop))
    causes = [f"{cause.name} ({cause.kind})" for cause in report.causes]
    shown = ", ".join(causes or [block.name for block in breaking])
    ways = [f"{cause.name}: {cause.remedy}" for cause in report.causes[:_REMEDIES]]
    remedy = "; ".join([*ways, "MixingClock of manifold_sde.training follows it trained as it is"])
    return coordinates, f"{shown}; scale_invariance_report(problem) says more", remedy


def _over_all_samples(loss: Loss, x: Tensor) -> float:
    """The largest |<x, grad L_xi>| over all samples, by one forward mode."""
    if loss.n_samples is None:
        return float((loss.gradient(x) @ x).abs())
    return float(loss.sample_derivatives(x, x).abs().max())


def _notes(network: NetworkFunction) -> tuple[str, ...]:
    weights = network.weights
    notes = []
    if weights.frozen:
        notes.append(f"frozen, constants of the loss: {', '.join(weights.frozen)}")
    for name, further in weights.shared.items():
        notes.append(f"shared, counted once: {name} is also {', '.join(further)}")
    if network.block > 1 and network.samples:
        notes.append(f"a sample of the noise is a ghost batch of {network.block} samples")
    return tuple(notes)


def _causes(network: NetworkFunction, points: Tensor, breaking: Tensor) -> tuple[Cause, ...]:
    blocks = list(network.weights.parameters.values())
    is_vector = torch.tensor([len(b.shape) <= 1 for b in blocks])
    neutral = _neutral_points(blocks, points, network.start)
    mended = measurement.measure(measurement.mended(network), points)
    faults = mended.breaking()
    left = measurement.measure(measurement.mended(network), neutral).breaking(~is_vector)
    causes = [
        _vector_cause(network, block.name)
        for block, here, there, vector in zip(blocks, breaking, faults, is_vector, strict=True)
        if bool(here & there & vector)
    ]
    # What is scale-invariant once all is mended, with biases of 0 and with any.
    trials = [(neutral[:2], ~is_vector & ~left)]
    if mended.joint(~faults) <= TOLERANCE:
        trials.append((points[:2], ~faults))
    causes += _layer_causes(network, trials)
    causes += _weight_causes(network, neutral, [int(i) for i in left.nonzero()[:, 0]])
    return tuple(causes)


def _neutral_points(blocks: list[ParameterBlock], points: Tensor, start: Tensor) -> Tensor:
    """The points with biases of 0, and other vectors as they were in the module."""
    points = points.clone()
    for block in blocks:
        if len(block.shape) <= 1:
            is_bias = block.name.rpartition(".")[2] == "bias"
            points[:, block.index] = 0.0 if is_bias else start[block.index].to(points)
    return points


def _vector_cause(network: NetworkFunction, name: str) -> Cause:
    owner = network.module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.LayerNorm, nn.RMSNorm)):
        return Cause(name, "affine", "elementwise_affine=False in the normalisation")
    if isinstance(owner, _NORMS):
        return Cause(name, "affine", "affine=False in the normalisation")
    if name.rpartition(".")[2] == "bias":
        return Cause(name, "bias", f"bias=False in the {type(owner).__name__} layer")
    return Cause(name, "affine", f"leave this parameter out, or frozen=[{name!r}]")


def _layer_causes(network: NetworkFunction, trials: list[tuple[Tensor, Tensor]]) -> list[Cause]:
    """Layers whose eps or running statistics break the invariance of weights that have it.

    Args:
        network: The network.
        trials: Points, and the parameters that are scale-invariant together there without any eps
            and running statistics, as a mask.
    """

    def breaks(changed: NetworkFunction) -> bool:
        return any(
            measurement.measure(changed, points).joint(columns) > TOLERANCE
            for points, columns in trials
        )

    causes = []
    for name, module in network.module.named_modules():
        if measurement.has_eps(module) and breaks(measurement.mended(network, eps=[name])):
            remedy = f"eps={module.eps:g} is added to the variance: the layers of "
            causes.append(Cause(name, "eps", remedy + "manifold_sde.networks have none"))
        if measurement.has_fixed_statistics(module) and breaks(
            measurement.mended(network, statistics=[name])
        ):
            remedy = "running statistics do not follow the weights: GhostBatchNorm, LayerNorm or "
            causes.append(Cause(name, "fixed statistics", remedy + "GroupNorm in its place"))
    return causes


def _weight_causes(network: NetworkFunction, points: Tensor, left: list[int]) -> list[Cause]:
    """Weights that nothing normalises, whatever else is mended."""
    blocks = list(network.weights.parameters.values())
    mended = measurement.mended(network)
    linear = [i for i in left if _scales_outputs(mended, points[-1], blocks[i])]
    causes = []
    for i in left:
        name = blocks[i].name
        if linear and i == linear[-1]:
            remedy = f"the outputs scale with it: frozen=[{name!r}], or WeightNorm around it"
            causes.append(Cause(name, "last layer", remedy))
        elif _fades(mended, points, i):
            remedy = "a constant such as an eps is added in the forward pass to what it feeds: "
            causes.append(Cause(name, "constant", remedy + "the layers of manifold_sde.networks"))
        else:
            remedy = "normalise what it feeds, by a layer of manifold_sde.networks behind it or "
            causes.append(Cause(name, "not normalised", remedy + "WeightNorm around it"))
    return causes


def _scales_outputs(network: NetworkFunction, x: Tensor, block: ParameterBlock) -> bool:
    """Whether the outputs double with a parameter."""
    scaled = x.clone()
    scaled[block.index] *= 2.0
    before, after = (ElementaryFunction(network.outputs)(z) for z in (x, scaled))
    return bool((after - 2.0 * before).abs().max() <= 1e-9 * before.abs().max())


def _fades(network: NetworkFunction, points: Tensor, column: int) -> bool:
    """Whether the violation falls with the square of the weights' size, as that of an eps does."""
    near, far = (
        float(measurement.measure(network, scale * points[:2]).own[column]) for scale in (5.0, 50.0)
    )
    return 0.5e-2 * near < far < 2e-2 * near
