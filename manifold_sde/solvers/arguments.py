"""Arguments of ``solve`` and its companions: what each may be, and what is said where it is not."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import (
    Points,
    check_count,
    check_path,
    integer,
    kind_of,
    real,
    require_norms,
)
from manifold_sde.compile import QUICK_DIM
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.errors import ArgumentError, DTypeError, NoDiffusionWarning
from manifold_sde.geometry.tangent_noise import measure_diffusion
from manifold_sde.group_sdes import direction_diffusion
from manifold_sde.points import point_of
from manifold_sde.problem import Problem
from manifold_sde.sdes import DirectionDiffusion, FixedRatioDiffusion, WeightDecaySDE
from manifold_sde.solvers.adaptive import ADAPTIVE, Tolerance
from manifold_sde.solvers.chunk import CHUNK
from manifold_sde.solvers.limits import check_length, require_memory
from manifold_sde.solvers.moments import Observable, evaluate
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.step_choice import ACCURACY
from manifold_sde.solvers.torchsde_schemes import TORCHSDE, refuse_unsound, scheme_named

BACKENDS = ("loky", "dask")
#: Tolerance of adaptive steps where none is given.
_RTOL = 1e-3


def require_equation(sde: object) -> StochasticEquation:
    """Check that something is an equation of the toolkit.

    Raises:
        DTypeError: If it is none.
    """
    if isinstance(sde, StochasticEquation):
        return sde
    raise DTypeError(
        "the equation is not one of this toolkit",
        received=kind_of(sde),
        expected="DirectionDiffusion(problem), LimitingDiffusion(problem), ...",
        remedy="DirectionDiffusion(problem); torchsde.sdeint is for SDEs of your own",
    )


def choose(
    sde: StochasticEquation, method: str, *, adaptive: bool = False
) -> tuple[str, StochasticEquation]:
    """Name of the method and the equation that its scheme integrates.

    Args:
        sde: The given equation.
        method: Name, or "auto".
        adaptive: Whether steps are adaptive.

    Raises:
        ArgumentError: If there is no such method, or it does not fit the equation.
    """
    ambient = isinstance(sde, WeightDecaySDE)
    allowed = ("euler", "heun", "midpoint", *TORCHSDE) if ambient else (*SCHEMES, "split")
    if method == "auto":
        if ambient and adaptive:
            return "heun", sde.with_calculus("stratonovich")
        if ambient:
            return ("euler" if sde.calculus == "ito" else "heun"), sde
        method = "split"
    if method not in allowed:
        refuse_unsound(str(method))
        raise ArgumentError(
            f"there is no such method for {type(sde).__name__}",
            received=repr(method),
            expected=", ".join(repr(m) for m in allowed if m not in TORCHSDE),
            remedy='leave it at "auto"'
            + ", or torchsde:euler, heun, midpoint, euler_heun" * ambient,
        )
    if method == "walk" and not isinstance(sde, DirectionDiffusion):
        raise ArgumentError(
            '"walk" steps directions, and leaves the norm alone',
            received=type(sde).__name__,
            expected="a DirectionDiffusion",
            remedy='"split": the direction by itself, and the norm by its own equation',
        )
    if adaptive:
        require_adaptive_scheme(method)
    if method == "split":
        assert isinstance(sde, ManifoldEquation)
        if isinstance(sde, FixedRatioDiffusion):
            return method, direction_diffusion(sde.problem, sde.geometry, sde.groups)
        return method, sde.with_calculus("stratonovich")
    calculus = scheme_named(method).calculus
    if calculus is not None and calculus != sde.calculus:
        raise ArgumentError(
            f"{method!r} does not integrate the form of the equation that it was given",
            received=f"the {sde.calculus} form",
            expected=f"the {calculus} form: the drifts differ",
            remedy=f"sde.with_calculus({calculus!r}), the same process",
        )
    return method, sde


def require_start(
    sde: StochasticEquation, equation: StochasticEquation, start: Tensor
) -> float | None:
    """Check that starts are on the manifold, where the equation that is integrated lives on it.

    Returns:
        The part of the noise along the manifold there; ``None`` in the whole space.

    Raises:
        NotOnManifoldError, RankError, NoiseError: If one is not, or the noise vanishes there.

    Warns:
        NoDiffusionWarning: If the noise has no part along the manifold.
    """
    if not isinstance(equation, ManifoldEquation):
        return None
    # Where the direction is simulated for an equation with a norm, it is that of the start.
    own = type(equation) is type(sde)
    equation.require_on_manifold(start if own else start / start.norm(dim=1, keepdim=True))
    share, statement = measure_diffusion(equation.geometry, equation.space, start)
    if statement is not None:
        warnings.warn(
            f"{statement}. Way out: noise along the manifold (SphericalNoise, SamplingNoise of "
            "samples that disagree); if a flow is meant, one path is enough",
            NoDiffusionWarning,
            stacklevel=4,
        )
    sde.problem.noise_along = share
    return share


def check_starts(
    sde: StochasticEquation, y0: Points, n_paths: int | None
) -> tuple[Tensor, int, bool]:
    """The one start of all paths (1, D), or each its own (n, D); n; and whether ys has paths."""
    y0 = point_of(sde.problem, y0, name="y0", values=True)
    count = integer(n_paths)
    if count is not None and count > 2**32:
        raise ArgumentError(
            "there are too many paths",
            received=f"n_paths={n_paths}",
            expected="at most 2**32 paths of a seed",
            remedy="a few thousand paths have a small standard error; multilevel for more digits",
        )
    if count is not None and count > 0 and y0.dim() == 1:
        start, _ = starts(sde.problem, y0, None, name="y0")
        return start, count, True
    start, batched = starts(sde.problem, y0, n_paths, name="y0")
    return start, len(start), batched


def check_chunks(chunk_size: object, n_paths: int, antithetic: bool) -> int:
    """The number of paths that are stepped together.

    Raises:
        ArgumentError: If it is none, or does not fit pairs of paths.
    """
    even = ", even, as pairs stay together" if antithetic else ""
    size = check_count("chunk_size", chunk_size, "paths", f"leave it out: {CHUNK}", even=even)
    if antithetic and n_paths % 2:
        raise ArgumentError(
            "antithetic paths come in pairs",
            received=f"{n_paths} paths",
            expected="an even number of paths",
            remedy=f"n_paths={n_paths + 1}",
        )
    return size


def check_folder(checkpoint: object) -> Path | None:
    """The folder of the checkpoints."""
    if checkpoint is None:
        return None
    folder = check_path("checkpoint", checkpoint)
    if folder.is_file():
        raise ArgumentError(
            "checkpoint is not a folder",
            received=f"{checkpoint}, a file",
            expected="the path of a folder, to which a file for each chunk is written",
            remedy='checkpoint="run" (the checkpoint of run_sgd, in contrast, is a file)',
        )
    return folder


def check_observables(observables: object, start: Tensor) -> dict[str, Observable] | None:
    """The observables, each tried on the start."""
    if observables is None:
        return None
    names = list(observables) if isinstance(observables, Mapping) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            "observables are not functions with names",
            received=repr(observables)[:80],
            expected="a mapping of one or more names to functions of states (n, D)",
            remedy='observables={"first": lambda y: y[:, 0]}',
        )
    assert isinstance(observables, Mapping)
    with torch.no_grad():
        for name, function in observables.items():
            rows = start[:1].expand(3 if start.shape[1] == 2 else 2, -1).contiguous()
            evaluate(f"the observable {name!r}", function, rows)
    return dict(observables)


def check_times(ts: object) -> tuple[float, ...]:
    """Times as numbers.

    Raises:
        ArgumentError: If they do not increase.
    """
    numbers = [
        float(t) if isinstance(t, (int, float, np.number)) and not isinstance(t, bool) else math.nan
        for t in listed("times", ts)
    ]
    increasing = all(a < b for a, b in itertools.pairwise(numbers))
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or not increasing:
        raise ArgumentError(
            "ts are not times to solve for",
            received=repr(ts.tolist() if isinstance(ts, (Tensor, np.ndarray)) else ts)[:80],
            expected="two or more finite numbers, increasing; the first is the start",
            remedy="ts=[0.0, 1.0], or torch.linspace(0, 1, 11)",
        )
    return tuple(numbers)


def listed(name: str, values: object) -> list[Any]:
    """A sequence as a list, and anything else as a list of one.

    Raises:
        ArgumentError: If it is too long to be written down.
    """
    check_length(name, values)
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    sequence = isinstance(values, Iterable) and not isinstance(values, (str, bytes))
    return list(values) if sequence else [values]  # type: ignore[call-overload]


def check_step(dt: object, times: tuple[float, ...]) -> float | None:
    """A step, or ``None``.

    Raises:
        ArgumentError: If it is none.
    """
    if dt is None:
        return None
    step = real(dt)
    if 0 < step < math.inf and (times[-1] - times[0]) / step < 2**40:
        return step
    raise ArgumentError(
        "dt is not a step",
        received=repr(dt),
        expected="a positive number, not below 2^-40 of the time span",
        remedy="leave dt out, and look at solution.config['dt']",
    )


def check_accuracy(accuracy: object, chooses: bool) -> float:
    """A weak error that is asked for; by default :data:`ACCURACY`.

    Args:
        accuracy: The error, or ``None``.
        chooses: Whether a step is chosen for it.

    Raises:
        ArgumentError: If it is none, or no step is chosen for it.
    """
    if accuracy is None:
        return ACCURACY
    number = real(accuracy)
    if not chooses or not 0.0 < number < 1.0:
        raise ArgumentError(
            "accuracy cannot be used" if chooses else "no step can be chosen for an accuracy",
            received=f"accuracy={accuracy!r}",
            expected='a number between 0 and 1, method "auto" or "weak2" for a direction, at most '
            f"{QUICK_DIM} weights, and neither dt nor rtol",
            remedy="dt=..., or rtol=... for each path's own steps",
        )
    return number


def check_steps(steps: object) -> list[int]:
    """Step counts.

    Raises:
        ArgumentError: If they are none, or do not increase.
    """
    counts = [integer(k) for k in listed("steps", steps)]
    whole = [k for k in counts if k is not None and k >= 0]
    if not counts or len(whole) < len(counts) or sorted(set(whole)) != whole:
        raise ArgumentError(
            "steps are not step counts to keep",
            received=repr(steps.tolist() if isinstance(steps, Tensor) else steps)[:80],
            expected="a count, or increasing counts from 0 on",
            remedy="steps=1000, or steps=[0, 100, 1000]; TimeScale(...).steps(T) gives counts",
        )
    if whole[-1] >= 2**48:
        raise ArgumentError(
            "there are too many steps",
            received=str(whole[-1]),
            expected="fewer than 2**48",
            remedy="the limiting diffusion reaches such times",
        )
    return whole


def starts(
    problem: Problem, x0: Points, n_paths: int | None, *, name: str = "x0"
) -> tuple[Tensor, bool]:
    """Start of each path, (n, D), and whether the result has a path dimension.

    Raises:
        ArgumentError, DTypeError: If a start cannot be used, or their number is another one.
    """
    x0 = point_of(problem, x0, name=name, values=True).detach()
    require_norms(x0, name=name)
    remedy = "n_paths=60, as in Figure 2"
    count = None if n_paths is None else check_count("n_paths", n_paths, "paths", remedy)
    if x0.dim() == 1:
        require_memory(float(count or 1) * len(x0), x0.element_size(), "a smaller n_paths")
        return x0.expand(count or 1, -1).clone(), count is not None
    if x0.dim() != 2 or not len(x0) or count not in (None, len(x0)):
        raise ArgumentError(
            "the starts do not fit the number of paths",
            received=f"{name} of shape {tuple(x0.shape)}, n_paths={n_paths}",
            expected="one start (D,), or (B, D) with n_paths left out",
            remedy=f"{name}.reshape(-1, D), or repeat each start as often as it is wanted",
        )
    return x0.clone(), True


def check_tolerance(
    rtol: object, atol: object, adaptive: object, dt: object, dt_min: object, dt_max: object
) -> Tolerance | None:
    """The tolerance of a run, or ``None`` for steps of one size.

    Raises:
        ArgumentError: If the arguments contradict each other, or one is not a positive number.
    """
    if adaptive not in (None, True, False):
        raise ArgumentError(
            "adaptive must be True, False or None",
            received=repr(adaptive),
            expected="True, False, or None: adaptive where rtol or atol is given",
            remedy="adaptive=True, rtol=1e-3",
        )
    given = {"rtol": rtol, "atol": atol, "dt_min": dt_min, "dt_max": dt_max}
    named = [name for name, value in given.items() if value is not None]
    if adaptive is False or (adaptive is None and rtol is None and atol is None):
        if named:
            raise ArgumentError(
                "steps of one size have no tolerance and no limits",
                received=", ".join(f"{name}={given[name]!r}" for name in named),
                expected="adaptive=True beside them, or none of them",
                remedy="rtol=1e-3 for adaptive steps, dt=... for steps of one size",
            )
        return None
    if dt is not None and adaptive is None:
        raise ArgumentError(
            "a step and a tolerance were given",
            received=f"dt={dt!r} beside {', '.join(named)}",
            expected="dt for steps of one size, or rtol and atol for adaptive ones",
            remedy="adaptive=True makes dt the first step",
        )
    numbers = {name: _positive(name, value) for name, value in given.items()}
    low, high = numbers["dt_min"], numbers["dt_max"]
    if low is not None and high is not None and low > high:
        raise ArgumentError(
            "dt_min is larger than dt_max",
            received=f"dt_min={low:g}, dt_max={high:g}",
            expected="dt_min <= dt_max",
            remedy="leave one of them out",
        )
    relative, absolute = numbers["rtol"], numbers["atol"]
    if relative is None:
        relative = _RTOL if absolute is None else 0.0
    return Tolerance(relative, absolute or 0.0, low, high)


def _positive(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = real(value)
    if not 0.0 < number < math.inf:
        raise ArgumentError(
            f"{name} is not a positive number",
            received=repr(value),
            expected="a finite number above 0",
            remedy=f"{name}=1e-3" if "tol" in name else f"leave {name} out",
        )
    return number


def require_adaptive_scheme(method: str) -> None:
    """Check that a scheme converges with adaptive steps.

    Raises:
        ArgumentError: If it does not.
    """
    if method in ("split", *ADAPTIVE):
        return
    why = "sizes that depend on the noise bias an Ito scheme: it converges to another process"
    if method not in SCHEMES:
        why = "torchsde has one error for all the paths of a batch"
    elif SCHEMES[method].calculus == "stratonovich":
        why = "it draws numbers beside the Brownian path, so that halves of a step do not refine it"
    raise ArgumentError(
        f"{method!r} has no adaptive steps",
        received=f"method={method!r} with adaptive steps; {why}",
        expected=", ".join(repr(name) for name in ("auto", "split", *ADAPTIVE)),
        remedy='method="heun" with sde.with_calculus("stratonovich"), the same process; or dt=...',
    )


def check_workers(workers: object, backend: object) -> int | None:
    """The number of workers, or ``None``.

    Raises:
        ArgumentError: If this is no number of workers, or no backend.
    """
    remedy = "leave workers out to run in this process"
    count = None if workers is None else check_count("workers", workers, "processes", remedy)
    if backend not in BACKENDS:
        raise ArgumentError(
            "there is no such backend",
            received=repr(backend),
            expected='"loky", processes on this machine, or "dask", those of your Client',
            remedy='leave it at "loky"',
        )
    return count
