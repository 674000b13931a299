"""Public callables, a good call of each, and odd values for their arguments.

One argument at a time is replaced by a value that nobody should give, or that somebody does. What
comes of it is one of four outcomes:

- "named": an error of the toolkit's, with received, expected and hint;
- "signature": a TypeError of the call itself, which Python raises;
- "taken": a result;
- "raw": anything else, such as an AttributeError from inside, which is a fault of the toolkit.

A value of the set :data:`WRONG` of its kind must not be taken, either, where it is not
:data:`RIGHT`.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, nn

from manifold_sde import (
    CustomNoise,
    DirectionDiffusion,
    FixedRatioDiffusion,
    Geometry,
    GroupDirectionDiffusion,
    LabelNoise,
    LeastSquaresProblem,
    LimitingDiffusion,
    Problem,
    SamplingNoise,
    SphericalNoise,
    TimeScale,
    WeightDecaySDE,
    networks,
    problems,
)
from manifold_sde.errors import ManifoldSDEError, ManifoldSDEWarning
from manifold_sde.solvers import (
    BrownianPath,
    Solution,
    extrapolate,
    finite_lr_error,
    multilevel,
    predict_sgd,
    run_sgd,
    solve,
)
from manifold_sde.verification import (
    MinimiserManifold,
    Picture,
    Reference,
    Series,
    Subject,
    check_assumptions,
    exact,
    plot_picture,
    properties,
    verify,
)

NAN, INF = float("nan"), float("inf")
_PICTURE = Picture("title", "x", "y", (Series("a", (0.0, 1.0), (0.0, 1.0)),))
E1 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
DRAW = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)


def _tensors(**more: Any) -> dict[str, Any]:
    return {
        "None": None,
        "a word": "x",
        "a number": 3.0,
        "words": ["1", "0", "0"],
        "ragged lists": [[1.0, 0.0, 0.0], [1.0]],
        "an array of objects": np.array([None, None, None]),
        "NaN": torch.full((3,), NAN, dtype=torch.float64),
        "infinity": torch.full((3,), INF, dtype=torch.float64),
        "whole numbers": torch.ones(3, dtype=torch.int64),
        "booleans": torch.ones(3, dtype=torch.bool),
        "complex": torch.ones(3, dtype=torch.complex128),
        "half precision": torch.ones(3, dtype=torch.float16),
        "two coordinates": torch.ones(2, dtype=torch.float64),
        "no dimension": torch.tensor(1.0, dtype=torch.float64),
        "sparse": torch.ones(3, dtype=torch.float64).to_sparse(),
        "meta": torch.ones(3, dtype=torch.float64, device="meta"),
        **more,
    }


#: Values by the kind of an argument, each with its name. All of them have to be refused.
WRONG: dict[str, dict[str, Any]] = {
    "point": _tensors(zero=torch.zeros(3, dtype=torch.float64)),
    "vector": _tensors(),
    "tensor": _tensors(**{"a list": [1.0, 0.0, 0.0], "an array": np.ones(3)}),
    "number": {
        "None": None,
        "a word": "0.1",
        "NaN": NAN,
        "infinity": INF,
        "negative": -1.0,
        "complex": 1j,
        "a list": [0.1],
        "two numbers": torch.tensor([0.1, 0.2]),
        "a huge int": 10**400,
        "True": True,
    },
    "count": {
        "None": None,
        "a word": "3",
        "NaN": NAN,
        "half": 1.5,
        "negative": -1,
        "zero": 0,
        "a list": [3],
        "True": True,
        "huge": 10**18,
        "beyond 64 bits": 2**70,
    },
    "flag": {"a word": "no", "two": 2, "a list": [], "NaN": NAN},
    "problem": {
        "None": None,
        "a word": "problem",
        "a number": 3,
        "a function": lambda x: x.sum(),
        "a module": nn.Linear(3, 1),
        "the class": Problem,
    },
    "sde": {
        "None": None,
        "a problem": problems.great_circle(),
        "a word": "limiting",
        "a number": 3,
    },
    "noise": {"None": None, "a number": 0.3, "the class": SphericalNoise, "a word": "spherical"},
    "function": {
        "None": None,
        "a number": 3,
        "a word": "f",
        "one that returns None": lambda *_: None,
        "one that returns a word": lambda *_: "x",
        "one without arguments": lambda: 1.0,
        "one that raises": lambda *_: 1 / 0,
    },
    "choice": {"a number": 3, "another word": "nope", "no word": "", "a list": ["ito"]},
    "seed": {
        "None": None,
        "a word": "a",
        "half": 1.5,
        "negative": -1,
        "beyond 64 bits": 2**70,
        "NaN": NAN,
    },
    "times": {
        "None": None,
        "none": [],
        "a word": "abc",
        "NaN": [0.0, NAN],
        "infinity": [0.0, INF],
        "decreasing": [1.0, 0.0],
        "twice the same": [0.0, 1.0, 1.0],
        "nested": [[0.0, 1.0]],
        "complex": [0.0, 1j],
        "words": ["0", "1"],
    },
    "steps": {
        "None": None,
        "none": [],
        "a word": "abc",
        "half": [0, 1.5],
        "negative": [-1, 3],
        "decreasing": [3, 1],
        "NaN": [0, NAN],
        "beyond 64 bits": [0, 2**70],
    },
    "path": {"a number": 3, "no word": "", "a list": ["a"]},
    "moment": {
        "None": None,
        "a word": "x",
        "NaN": torch.tensor(NAN),
        "infinity": torch.tensor(INF),
        "complex": torch.tensor(1j),
        "sparse": torch.ones(1).to_sparse(),
        "a list": ["a"],
    },
}


_LARGE = {"huge", "beyond 64 bits"}
_SEVERAL = {"a list", "two numbers"}
#: Odd values that are right after all, by target and argument.
RIGHT: dict[tuple[str, str], set[str]] = {
    # None means (13), or the rates of (9).
    ("properties.norm_identity", "ratio"): {"None"},
    ("properties.stratonovich_tangency", "ratio"): {"None"},
    ("properties.reparametrisation", "C"): {"None"},
    # Sizes of several dimensions.
    ("LayerNorm", "shape"): {"a list"},
    # A path that was lost stays NaN, and a shape is known without values.
    ("Circle.angle", "x"): {"NaN", "infinity", "meta"},
    ("Circle.point", "angle"): {"NaN", "infinity"},
    # A number is a constant loss.
    ("from_sympy", "losses"): {"a number"},
    # Whether a batch fits the data is seen with the data, how long a run is, with the run.
    ("SamplingNoise", "batch_size"): {"huge"},
    ("LabelNoise", "batch_size"): {"huge"},
    ("label_noise_circle", "batch_size"): {"huge"},
    ("GhostBatchNorm", "size"): {"None", *_LARGE},
    ("Geometry", "max_steps"): _LARGE,
    ("Geometry", "memory"): {"a word", *_LARGE},
    ("multilevel", "max_paths"): _LARGE,
    ("at_steps", "batch_size"): {"None", "huge"},
    # None is the default.
    ("solve", "n_paths"): {"None"},
    ("solve", "dt"): {"None"},
    ("solve, adaptive", "rtol"): {"None"},
    ("run_sgd", "n_paths"): {"None"},
    ("predict_sgd", "n_paths"): {"None"},
    ("equilibrium", "burn_in"): {"None"},
    ("verify", "x_init"): {"None"},
    ("law_of", "start"): {"None"},
    ("invariant_groups", "x"): {"None"},
    ("scale_invariance_report", "x"): {"None"},
    ("problem.scale_invariance_violation", "x"): {"None"},
    ("problem.noise_violations", "x"): {"None"},
    ("problem.derivative_errors", "x"): {"None"},
    ("geometry.second_derivative", "covariance"): {"None"},
    # Several numbers at once, and sequences as schedules.
    ("TimeScale", "lr"): _SEVERAL,
    ("TimeScale", "weight_decay"): _SEVERAL,
    ("time_scale.radius", "t"): _SEVERAL,
    ("time_scale.tau", "t"): _SEVERAL,
    ("time_scale.tau_inverse", "T"): _SEVERAL,
    ("time_scale.steps", "T"): _SEVERAL,
    ("time_scale.equilibrium_norm", "noise_trace"): _SEVERAL,
    # A sequence of one number is that number.
    **{
        (f"{law}.{name}", argument): {"a list"}
        for law, name, argument in (
            ("AngleLaw", "at", "T"),
            ("AngleLaw", "at_clock", "u"),
            ("AngleLaw", "clock", "T"),
            ("AngleLaw", "norm", "T"),
            ("Reference", "compare", "bias"),
            ("SphereLaw", "mean", "u"),
            ("SphereLaw", "second_moment", "u"),
            ("SphereLaw", "clock", "T"),
            ("CircleDiffusion", "at", "t"),
            ("CircleDiffusion", "at", "ratio"),
            ("CircleDiffusion", "at", "norm"),
            ("CircleDiffusion", "at_clock", "u"),
            ("CircleDiffusion", "joint_equilibrium", "ratio"),
        )
    },
    ("CircleDiffusion.expectation", "clock"): _SEVERAL,
    # Angles and orders have a sign; the harmonic of degree 0 is constant; no draws are a sample.
    ("WrappedNormal", "mean"): {"negative"},
    ("AngleLaw", "start"): {"negative"},
    ("PeriodicLaw.moment", "order"): {"negative", "zero"},
    ("WrappedNormal.moment", "order"): {"negative", "zero"},
    ("SphereLaw.rate", "degree"): {"zero"},
    ("SphereLaw.zonal", "degree"): {"zero"},
    ("WrappedNormal.sample", "size"): {"zero", "a list"},
    # Coordinates are looked up in any vector, and zero weights can be loaded.
    ("problem.part", "x"): {"NaN", "infinity", "meta", "zero"},
    ("problem.load_into", "x"): {"zero"},
    **{
        # Shapes alone travel on the device meta.
        (f"problem.{name}", "x"): {"meta"}
        for name in (
            "loss",
            "gradient",
            "hessian",
            "noise_factor",
            "noise_covariance",
            "noise_trace",
            "sgd_noise",
        )
    },
    ("geometry.limit_map", "x"): {"meta"},
    ("geometry.retract", "x"): {"meta"},
    ("geometry.log_pseudo_determinant", "y"): {"meta"},
    # NaN is the state of a path that was lost.
    **{
        (f"{sde}.{name}", argument): {"NaN", "infinity"}
        for sde in ("WeightDecaySDE", "LimitingDiffusion", "DirectionDiffusion")
        for name in ("f", "g", "g_prod", "f_and_g_prod")
        for argument in ("y", "v")
    },
}


@dataclass
class Target:
    """A public callable with a good call.

    Attributes:
        function: The callable.
        good: Arguments of a good call.
        kinds: Kinds of the arguments that are replaced.
    """

    function: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, str]


def _linear(x: Tensor) -> Tensor:
    return torch.stack([x[2] / x.norm(), (x[2] / x.norm()) * 2.0])


def _cosine(y: Tensor) -> Tensor:
    return y[..., 0] / y.norm(dim=-1)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return (h @ (self.w / self.w.norm()))[:, None]


def _of_laws(of: Callable[..., Target]) -> dict[str, Target]:
    """The exact laws, and what makes them."""
    linear, curve, sphere = (
        problems.normalized_linear(design="orthogonal"),
        problems.varying_circle(),
        problems.great_sphere(),
    )
    angle = exact.AngleLaw.of(linear)
    circle = exact.CircleDiffusion.of(curve, nodes=33)
    ball = exact.SphereLaw.of(sphere)
    periodic, normal = circle.at_clock(1.0), angle.at_clock(1.0)
    traced = exact.TracedCurve.of(curve, curve.minimizer)
    reversible = exact.ReversibleLaw.of(curve, nodes=33)
    found = {
        f"{law.__name__}.of": of(law.of, {"problem": made}, problem="problem")
        for law, made in (
            (exact.AngleLaw, linear),
            (exact.SphereLaw, sphere),
            (exact.ReversibleLaw, curve),
            (exact.CircleDiffusion, curve),
        )
    }
    numbers = {
        "AngleLaw.at": (angle.at, {"T": 1.0}),
        "AngleLaw.at_clock": (angle.at_clock, {"u": 1.0}),
        "AngleLaw.clock": (angle.clock, {"T": 1.0}),
        "AngleLaw.norm": (angle.norm, {"T": 1.0}),
        "SphereLaw.mean": (ball.mean, {"u": 1.0}),
        "SphereLaw.second_moment": (ball.second_moment, {"u": 1.0}),
        "SphereLaw.clock": (ball.clock, {"T": 1.0}),
        "CircleDiffusion.at": (circle.at, {"t": 1.0, "ratio": 0.5, "norm": 1.0}),
        "CircleDiffusion.at_clock": (circle.at_clock, {"u": 1.0}),
        "CircleDiffusion.joint_equilibrium": (circle.joint_equilibrium, {"ratio": 0.5}),
        "WrappedNormal": (exact.WrappedNormal, {"mean": 0.5, "variance": 1.0}),
        "AngleLaw": (
            exact.AngleLaw,
            {"start": 0.5, "radius": 0.5, "noise_scale": 0.3, "noise_trace": 0.2},
        ),
    }
    for name, (function, good) in numbers.items():
        found[name] = of(function, good, **dict.fromkeys(good, "number"))
    return found | {
        "SphereLaw.rate": of(ball.rate, {"degree": 2}, degree="count"),
        "SphereLaw.zonal": of(ball.zonal, {"degree": 2, "cosine": 0.5}, degree="count"),
        "AngleLaw.at_steps": of(
            angle.at_steps,
            {"lr": 0.01, "weight_decay": 0.05, "steps": 10},
            lr="number",
            weight_decay="number",
            steps="steps",
        ),
        "CircleDiffusion.at_steps": of(
            circle.at_steps,
            {"lr": 0.01, "weight_decay": 0.05, "steps": 10},
            lr="number",
            weight_decay="number",
            steps="steps",
        ),
        "CircleDiffusion.expectation": of(
            circle.expectation, {"f": np.cos, "clock": 1.0}, f="function", clock="number"
        ),
        "CircleDiffusion.nodes": of(
            exact.CircleDiffusion.of, {"problem": curve, "nodes": 33}, nodes="count"
        ),
        "CircleDiffusion": of(
            exact.CircleDiffusion,
            {"drift": circle.drift, "variance": circle.variance, "trace": circle.trace},
            drift="tensor",
            variance="tensor",
            trace="tensor",
        ),
        "PeriodicLaw.expectation": of(periodic.expectation, {"f": np.cos}, f="function"),
        "PeriodicLaw.moment": of(periodic.moment, {"order": 1}, order="count"),
        "WrappedNormal.moment": of(normal.moment, {"order": 1}, order="count"),
        "WrappedNormal.sample": of(
            normal.sample, {"size": 3, "seed": 0}, size="count", seed="seed"
        ),
        "ReversibleLaw.expectation": of(
            reversible.expectation, {"f": lambda y: y[..., 0]}, f="function"
        ),
        "TracedCurve.of": of(
            exact.TracedCurve.of,
            {"problem": curve, "start": curve.minimizer},
            problem="problem",
            start="point",
        ),
        "TracedCurve.angle": of(traced.angle, {"x": curve.minimizer}, x="point"),
        "convergence": of(
            exact.convergence,
            {"problem": problems.varying_circle(0.2), "nodes": 17},
            problem="problem",
            nodes="count",
        ),
    }


def _of_properties(of: Callable[..., Target]) -> dict[str, Target]:
    """The functions that return a defect; their arguments have the same names everywhere."""
    problem = problems.great_circle()
    good = {"problem": problem, "x": E1 + 0.1 * DRAW, "y": E1, "alpha": 2.0, "lr": 0.01}
    good |= {"weight_decay": 0.05, "C": 5.0, "ratio": 0.5, "order": 1}
    kinds = dict.fromkeys(("lr", "weight_decay", "C", "ratio"), "number")
    kinds |= {"problem": "problem", "x": "point", "y": "point", "order": "count"}
    found = {}
    for name in properties.__all__:
        function = getattr(properties, name)
        if isinstance(function, types.FunctionType):
            names = [n for n in inspect.signature(function).parameters if n in good]
            given, odd = ({n: v[n] for n in names if n in v} for v in (good, kinds))
            found[f"properties.{name}"] = of(function, given, **odd)
    return found


def targets(folder: Path) -> dict[str, Target]:
    """All public callables.

    Args:
        folder: Where files may be written.
    """
    problem = problems.great_circle()
    curve = problems.varying_circle()
    geometry = Geometry(problem)
    direction, limiting = DirectionDiffusion(problem), LimitingDiffusion(problem)
    run = solve(direction, E1, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], n_paths=24, dt=0.2, compile=False)
    sgd = run_sgd(problem, E1, 0.01, 0.01, [0, 4], n_paths=8, compile=False)
    sgd_file = folder / "sgd.npz"
    sgd.save(sgd_file)
    scale = TimeScale(0.01, 0.05)
    h = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = Problem.from_module(_Net(), nn.MSELoss(), h, h[:, :1], SphericalNoise(0.1))
    x1, x2, x3 = sympy.symbols("x1:4", real=True)
    report = verify(problem, checks=["Euler's theorem"])
    level, entry = MinimiserManifold(problem), Reference.of("great_circle")
    batch = E1[None]
    brownian = BrownianPath(0, 2, 4)
    facts = problem.facts

    def of(target: Callable[..., Any], good: dict[str, Any], /, **kinds: str) -> Target:
        return Target(target, good, kinds)

    found = {
        "Problem": of(
            Problem,
            {"loss": lambda x: _linear(x) ** 2, "dim": 3, "noise": SphericalNoise(0.3)},
            loss="function",
            dim="count",
            noise="noise",
        ),
        "LeastSquaresProblem": of(
            LeastSquaresProblem,
            {"residuals": _linear, "dim": 3, "noise": SphericalNoise(0.3)},
            residuals="function",
            dim="count",
            noise="noise",
        ),
        "from_sympy": of(
            Problem.from_sympy,
            {
                "losses": x3**2 / (x1**2 + x2**2 + x3**2),
                "symbols": (x1, x2, x3),
                "noise": SphericalNoise(0.3),
            },
            noise="noise",
            losses="function",
            symbols="function",
        ),
        "from_module": of(
            Problem.from_module,
            {
                "module": _Net(),
                "criterion": nn.MSELoss(),
                "inputs": h,
                "targets": h[:, :1],
                "noise": SphericalNoise(0.1),
            },
            module="function",
            criterion="function",
            inputs="tensor",
            targets="tensor",
            noise="noise",
        ),
        "SphericalNoise": of(SphericalNoise, {"scale": 0.3}, scale="number"),
        "SamplingNoise": of(
            SamplingNoise,
            {"batch_size": 2, "replacement": True, "drop_last": False},
            batch_size="count",
            replacement="flag",
            drop_last="flag",
        ),
        "LabelNoise": of(
            LabelNoise, {"scale": 0.3, "batch_size": 1}, scale="number", batch_size="count"
        ),
        "CustomNoise": of(
            lambda factor: Problem(lambda x: _linear(x) ** 2, 3, CustomNoise(factor)),
            {"factor": lambda x: torch.eye(3, dtype=x.dtype) / x.norm()},
            factor="function",
        ),
        "Geometry": of(
            Geometry,
            {
                "problem": problem,
                "method": "dense",
                "rtol": 1e-10,
                "max_steps": 100,
                "compile": False,
                "memory": 1 << 20,
            },
            problem="problem",
            method="choice",
            rtol="number",
            max_steps="count",
            compile="flag",
            memory="count",
        ),
        "TimeScale": of(
            TimeScale, {"lr": 0.01, "weight_decay": 0.05}, lr="number", weight_decay="number"
        ),
        "WeightDecaySDE": of(
            WeightDecaySDE,
            {"problem": problem, "lr": 0.01, "weight_decay": 0.05, "calculus": "ito"},
            problem="problem",
            lr="number",
            weight_decay="number",
            calculus="choice",
        ),
        "FixedRatioDiffusion": of(
            FixedRatioDiffusion,
            {"problem": problem, "ratio": 0.5, "calculus": "ito", "geometry": geometry},
            problem="problem",
            ratio="number",
            calculus="choice",
            geometry="choice",
        ),
        "GroupDirectionDiffusion": of(
            GroupDirectionDiffusion,
            {
                "problem": problem,
                "calculus": "ito",
                "geometry": geometry,
                "groups": [list(range(problem.dim))],
            },
            problem="problem",
            calculus="choice",
            geometry="choice",
            groups="choice",
        ),
        "BrownianPath": of(
            BrownianPath,
            {"seed": 0, "n_components": 2, "paths": 4, "cell": 1.0, "antithetic": False},
            seed="seed",
            n_components="count",
            paths="count",
            cell="number",
            antithetic="flag",
        ),
        "solve": of(
            solve,
            {
                "sde": direction,
                "y0": E1,
                "ts": [0.0, 0.5],
                "n_paths": 4,
                "method": "euler",
                "dt": 0.25,
                "seed": 0,
                "compile": False,
                "observables": {"f": _cosine},
            },
            sde="sde",
            y0="point",
            ts="times",
            n_paths="count",
            method="choice",
            dt="number",
            seed="seed",
            compile="flag",
            observables="choice",
        ),
        "solve, adaptive": of(
            solve,
            {"sde": direction, "y0": E1, "ts": [0.0, 0.2], "n_paths": 2, "rtol": 1e-2},
            rtol="number",
        ),
        "solve, checkpoint": of(
            solve,
            {
                "sde": direction,
                "y0": E1,
                "ts": [0.0, 0.2],
                "n_paths": 2,
                "checkpoint": folder / "solve",
            },
            checkpoint="path",
        ),
        "run_sgd": of(
            run_sgd,
            {
                "problem": problem,
                "x0": E1,
                "lr": 0.01,
                "weight_decay": 0.05,
                "steps": [0, 3],
                "n_paths": 4,
                "seed": 0,
                "compile": False,
            },
            problem="problem",
            x0="point",
            lr="number",
            weight_decay="number",
            steps="steps",
            n_paths="count",
            seed="seed",
            compile="flag",
        ),
        "run_sgd, checkpoint": of(
            run_sgd,
            {
                "problem": problem,
                "x0": E1,
                "lr": 0.01,
                "weight_decay": 0.05,
                "steps": [0, 3],
                "checkpoint": folder / "sgd",
            },
            checkpoint="path",
        ),
        "predict_sgd": of(
            predict_sgd,
            {
                "problem": problem,
                "x0": E1,
                "lr": 0.01,
                "weight_decay": 0.05,
                "steps": [0, 30],
                "n_paths": 4,
                "seed": 0,
            },
            problem="problem",
            x0="point",
            lr="number",
            weight_decay="number",
            steps="steps",
            n_paths="count",
            seed="seed",
        ),
        "extrapolate": of(
            extrapolate,
            {
                "sde": direction,
                "y0": E1,
                "ts": [0.0, 0.5],
                "function": _cosine,
                "n_paths": 8,
                "dt": 0.25,
            },
            sde="sde",
            y0="point",
            ts="times",
            function="function",
            n_paths="count",
        ),
        "multilevel": of(
            multilevel,
            {
                "sde": direction,
                "y0": E1,
                "time": 0.5,
                "function": _cosine,
                "tolerance": 0.5,
                "dt": 0.25,
            },
            sde="sde",
            y0="point",
            time="number",
            dt="number",
            function="function",
            tolerance="number",
            max_paths="count",
        ),
        "finite_lr_error": of(
            finite_lr_error,
            {
                "problem": problem,
                "x0": E1,
                "lr": 0.01,
                "weight_decay": 0.05,
                "steps": 20,
                "f": _cosine,
                "n_paths": 32,
            },
            problem="problem",
            x0="point",
            lr="number",
            weight_decay="number",
            f="function",
            n_paths="count",
        ),
        "Solution": of(
            Solution,
            {"ts": run.ts, "ys": run.ys, "clock": run.clock},
            ts="tensor",
            ys="tensor",
            clock="tensor",
        ),
        "Solution.load": of(Solution.load, {"path": sgd_file}, path="path"),
        "Solution.save": of(sgd.save, {"path": folder / "run"}, path="path"),
        "expectation": of(sgd.expectation, {"function": _cosine}, function="function"),
        "equilibrium": of(
            run.equilibrium,
            {"function": _cosine, "burn_in": 0.1},
            function="function",
            burn_in="number",
        ),
        "at": of(
            run.at,
            {"ratio": 0.5, "times": [0.0, 0.1], "norm": 1.0},
            ratio="number",
            times="times",
            norm="number",
        ),
        "at_steps": of(
            run.at_steps,
            {"lr": 0.01, "weight_decay": 0.05, "steps": [0, 20], "norm": 1.0, "batch_size": 1},
            lr="number",
            weight_decay="number",
            steps="steps",
            norm="number",
            batch_size="count",
        ),
        "verify": of(
            lambda **keywords: verify(**{"checks": ["Euler's theorem"], **keywords}),
            {"problem": problem, "seed": 0, "effort": "quick", "x_init": E1},
            problem="problem",
            seed="seed",
            effort="choice",
            x_init="point",
            checks="choice",
        ),
        "check_assumptions": of(
            check_assumptions, {"problem": problem, "seed": 0}, problem="problem", seed="seed"
        ),
        "Report.save": of(report.save, {"path": folder / "report.json"}, path="path"),
        "Reference.of": of(Reference.of, {"name": "great_circle"}, name="choice"),
        "Reference.compare": of(
            entry.compare,
            {"states": torch.from_numpy(entry.draws(8)), "bias": 1e-3},
            states="point",
            bias="number",
        ),
        "Reference.draws": of(entry.draws, {"n": 8, "seed": 0}, n="count", seed="seed"),
        "MinimiserManifold": of(MinimiserManifold, {"problem": problem}, problem="problem"),
        "random_point": of(level.random_point, {"n_samples": 2}, n_samples="count"),
        "law_of": of(
            exact.law_of,
            {"problem": curve, "start": curve.minimizer},
            problem="problem",
            start="point",
        ),
        "curve_of": of(exact.curve_of, {"problem": curve}, problem="problem"),
        "invariant_groups": of(
            networks.invariant_groups, {"problem": net, "x": DRAW}, problem="problem", x="point"
        ),
        "batch_law": of(
            networks.batch_law, {"problem": net, "x": DRAW}, problem="problem", x="point"
        ),
        "RandomBatches": of(
            networks.RandomBatches,
            {"size": 4, "count": 5, "seed": 0},
            size="count",
            count="count",
            seed="seed",
        ),
        "scale_invariance_report": of(
            networks.scale_invariance_report,
            {"problem": net, "x": DRAW},
            problem="problem",
            x="point",
        ),
        "great_circle": of(problems.great_circle, {"noise_scale": 0.3}, noise_scale="number"),
        "great_sphere": of(
            problems.great_sphere, {"dim": 4, "noise_scale": 0.3}, dim="count", noise_scale="number"
        ),
        "varying_circle": of(
            problems.varying_circle,
            {"amplitude": 0.5, "noise_scale": 0.3},
            amplitude="number",
            noise_scale="number",
        ),
        "mixed_noise_circle": of(
            problems.mixed_noise_circle,
            {"amplitude": 0.5, "tilt": 0.3, "height": 0.6},
            amplitude="number",
        ),
        "label_noise_circle": of(
            problems.label_noise_circle,
            {"amplitude": 0.5, "label_scale": 0.3, "batch_size": 1},
            amplitude="number",
            label_scale="number",
            batch_size="count",
        ),
        "normalized_linear": of(
            problems.normalized_linear,
            {"dim": 5, "n_samples": 3, "noise_scale": 0.3, "seed": 0, "design": "gaussian"},
            dim="count",
            n_samples="count",
            noise_scale="number",
            seed="seed",
            design="choice",
        ),
        "GhostBatchNorm": of(networks.GhostBatchNorm, {"size": 4}, size="count"),
        "NormalizedMLP": of(
            networks.NormalizedMLP,
            {"widths": (3, 4, 2), "norm": "layer"},
            widths="choice",
            norm="choice",
        ),
        "ScaleInvariantPreResNet": of(
            networks.ScaleInvariantPreResNet,
            {"depth": 8, "width": 2, "norm": "layer"},
            depth="count",
            width="count",
            norm="choice",
        ),
    }
    found |= _of_laws(of) | _of_properties(of)
    found |= {
        "BrownianPath.between": of(
            brownian.between,
            {"ta": torch.zeros(4, dtype=torch.float64), "tb": torch.ones(4, dtype=torch.float64)},
            ta="moment",
            tb="moment",
        ),
        "BrownianPath.increments": of(
            brownian.increments,
            {"level": 0, "first": 0, "count": 2},
            level="seed",
            first="seed",
            count="count",
        ),
        "LayerNorm": of(networks.LayerNorm, {"shape": 4}, shape="count"),
        "GroupNorm": of(
            networks.GroupNorm, {"groups": 2, "channels": 4}, groups="count", channels="count"
        ),
        "WeightNorm": of(
            networks.WeightNorm, {"layer": nn.Linear(3, 2, bias=False)}, layer="problem"
        ),
        "Subject": of(Subject.of, {"problem": problem, "seed": 0}, problem="problem", seed="seed"),
        "plot_picture": of(plot_picture, {"picture": _PICTURE}, picture="problem"),
        "Circle.angle": of(facts.circle.angle, {"x": E1}, x="point"),
        "Circle.point": of(facts.circle.point, {"angle": torch.tensor(0.3)}, angle="moment"),
    }
    for name in ("loss", "gradient", "hessian", "noise_factor", "noise_covariance", "noise_trace"):
        found[f"problem.{name}"] = of(getattr(problem, name), {"x": E1}, x="point")
    for name in ("scale_invariance_violation", "noise_violations", "derivative_errors"):
        found[f"problem.{name}"] = of(getattr(problem, name), {"x": E1}, x="point")
    found |= {
        "problem.third_derivative": of(
            problem.third_derivative,
            {"x": E1, "a": DRAW, "b": DRAW},
            x="point",
            a="vector",
            b="vector",
        ),
        "problem.noise_product": of(
            problem.noise_product, {"x": E1, "w": DRAW}, x="point", w="vector"
        ),
        "problem.noise_correction": of(
            problem.noise_correction,
            {"x": E1, "projection": torch.eye(3, dtype=torch.float64)},
            x="point",
            projection="tensor",
        ),
        "problem.sgd_noise": of(
            problem.sgd_noise, {"x": E1, "seed": 0, "step": 0}, x="point", seed="seed", step="seed"
        ),
        "problem.part": of(net.part, {"x": DRAW, "name": "w"}, x="point", name="choice"),
        "problem.load_into": of(
            net.load_into, {"module": _Net(), "x": DRAW}, module="problem", x="point"
        ),
        "problem.describe": of(problem.describe, {"seed": 0}, seed="seed"),
        "problem.with_noise": of(problem.with_noise, {"noise": SphericalNoise(0.1)}, noise="noise"),
    }
    for name in ("limit_map", "retract", "rank", "spectral_gap", "log_pseudo_determinant"):
        argument = "x" if name in ("limit_map", "retract") else "y"
        found[f"geometry.{name}"] = of(
            getattr(geometry, name), {argument: E1}, **{argument: "point"}
        )
    found |= {
        "geometry.tangent_projection": of(
            geometry.tangent_projection, {"y": E1, "v": DRAW}, y="point", v="vector"
        ),
        "geometry.second_derivative": of(
            geometry.second_derivative,
            {"y": E1, "covariance": torch.eye(3, dtype=torch.float64)},
            y="point",
            covariance="tensor",
        ),
    }
    for name, sde in (
        ("WeightDecaySDE", WeightDecaySDE(problem, 0.01, 0.05)),
        ("LimitingDiffusion", limiting),
        ("DirectionDiffusion", direction),
    ):
        t = torch.tensor(0.0)
        found |= {
            f"{name}.f": of(sde.f, {"t": t, "y": batch}, y="point"),
            f"{name}.g": of(sde.g, {"t": t, "y": batch}, y="point"),
            f"{name}.g_prod": of(
                sde.g_prod, {"t": t, "y": batch, "v": DRAW[None]}, y="point", v="vector"
            ),
            f"{name}.f_and_g_prod": of(
                sde.f_and_g_prod, {"t": t, "y": batch, "v": DRAW[None]}, y="point", v="vector"
            ),
            f"{name}.with_calculus": of(
                sde.with_calculus, {"calculus": "stratonovich"}, calculus="choice"
            ),
        }
    for name, argument in (
        ("radius", "t"),
        ("tau", "t"),
        ("tau_inverse", "T"),
        ("steps", "T"),
        ("accumulated", "k"),
        ("effective_lr", "k"),
        ("shrinkage", "k"),
        ("equilibrium_norm", "noise_trace"),
    ):
        found[f"time_scale.{name}"] = of(
            getattr(scale, name), {argument: 1.0 if argument != "k" else 3}, **{argument: "number"}
        )
    return found


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    """What comes of a call, and the result or the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ManifoldSDEWarning)
            warnings.simplefilter("ignore", UserWarning)
            return "taken", function(**arguments)
    except ManifoldSDEError as error:
        return "named", error
    except TypeError as error:
        trace = error.__traceback__
        # Raised by the call itself, not from inside.
        deeper = trace is not None and trace.tb_next is not None
        return ("raw" if deeper else "signature"), error
    except Exception as error:
        return "raw", error


def odd_calls(target: Target) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Argument, value's name and arguments of each odd call of a target."""
    for argument, kind in target.kinds.items():
        for name, value in WRONG[kind].items():
            yield argument, name, {**target.good, argument: value}
