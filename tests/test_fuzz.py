"""Odd values for the arguments of all public callables: named errors, or right results."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import manifold_sde
from manifold_sde import networks, problems, solvers, verification
from manifold_sde.errors import ManifoldSDEError
from manifold_sde.verification import exact, properties
from tests.fuzz import RIGHT, Target, odd_calls, outcome, targets

NAMES = sorted({name for name, _ in RIGHT})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
def test_odd_values_are_refused_by_name(found: dict[str, Target]) -> None:
    """About 2000 calls, each with one odd value; the outcomes are counted."""
    count: Counter[str] = Counter()
    faults = []
    for name, target in found.items():
        made, result = outcome(target.function, target.good)
        assert made == "taken", f"the good call of {name}: {result}"
        for argument, value, arguments in odd_calls(target):
            what, result = outcome(target.function, arguments)
            right = value in RIGHT.get((name, argument), ())
            count[f"{what}, right" if right and what == "taken" else what] += 1
            if what == "raw" or (what == "taken" and not right):
                faults.append(f"{name}: {argument} = {value}: {what} {result!r:.80}")
    print(dict(count))
    assert not faults, "\n".join(faults)
    assert count["named"] > 1500
    assert count.keys() <= {"named", "signature", "taken, right"}


def test_every_error_says_what_was_received_and_the_way_out(found: dict[str, Target]) -> None:
    silent = []
    for name in ("solve", "run_sgd", "Problem", "Geometry", "LimitingDiffusion.g_prod"):
        for argument, value, arguments in odd_calls(found[name]):
            error = outcome(found[name].function, arguments)[1]
            if isinstance(error, ManifoldSDEError) and not (error.received and error.remedy):
                silent.append(f"{name}: {argument} = {value}: {error}")
    assert not silent, "\n".join(silent)


#: What is public and callable, and given no odd values: bases, and what functions return.
EXEMPT = {
    *("ManifoldSDEError", "VerificationTests"),
    *("Extrapolation", "FiniteLrError", "MultilevelEstimate", "Convergence", "CircleNormLaw"),
    *("SpectralGap",),
    *("Description", "Design", "Effort", "Picture", "Series", "Result", "Defect", "Facts"),
    *(
        "BatchLaw",
        "Cause",
        "InvariantGroups",
        "ParameterInvariance",
        "ScaleInvarianceReport",
        "WeightGroup",
    ),
}


def names_of(function: Any) -> set[str]:
    """Names of the public callables that a target calls."""
    plain = getattr(function, "__func__", function)
    owner = getattr(function, "__self__", None)
    names = {getattr(owner, "__name__", type(owner).__name__)}
    names |= set(getattr(plain, "__qualname__", "").split("."))
    code = getattr(plain, "__code__", None)
    return names | set(code.co_names if code is not None else ())


def test_every_public_callable_is_given_odd_values(found: dict[str, Target]) -> None:
    tried = set().union(*(names_of(target.function) for target in found.values()))
    missing, seen = [], set()
    for module in (manifold_sde, solvers, verification, networks, problems, exact, properties):
        for name in module.__all__:
            if name in EXEMPT or not callable(getattr(module, name)):
                seen.add(name)
            elif name not in tried:
                missing.append(f"{module.__name__}.{name}")
    assert missing == []
    assert seen >= EXEMPT


def test_targets_that_are_known_as_right_exist(found: dict[str, Target]) -> None:
    for name, argument in RIGHT:
        assert argument in found[name].kinds or name.endswith((".f", ".g")), (name, argument)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.nothing, "raw"),
        (lambda x: x + "1", "raw"),
        (lambda: 1, "signature"),
        (lambda x: x, "taken"),
    ],
)
def test_broken_twins_are_told(function: object, expected: str) -> None:
    assert outcome(function, {"x": 1})[0] == expected  # type: ignore[arg-type]


def test_a_path_that_is_none_is_named(tmp_path: Path) -> None:
    from manifold_sde import problems
    from manifold_sde.solvers import run_sgd

    problem = problems.great_circle()
    for checkpoint in ("", 3, b"run"):
        with pytest.raises(ManifoldSDEError, match="checkpoint"):
            run_sgd(problem, problem.minimizer, 0.01, 0.05, [0, 1], checkpoint=checkpoint)  # type: ignore[arg-type]


#: Points that only torchsde gives.
OF_TORCHSDE = (".f", ".g", ".g_prod", ".f_and_g_prod")
#: What takes a second and checks its point as the others do.
SLOW = ("law_of", "TracedCurve.of")


def _lasting(result: object) -> str:
    """What is shown of a result, without addresses and times."""
    return re.sub(r"0x\w+|seconds=[\d.e-]+|\b\d+ s\b", "", repr(result))


def test_points_are_taken_as_arrays_and_lists(found: dict[str, Target]) -> None:
    """Every point that a public callable takes, with the same result."""
    tried = 0
    for name, target in found.items():
        points = [k for k, kind in target.kinds.items() if kind == "point"]
        if not points or name.endswith(OF_TORCHSDE + SLOW):
            continue
        expected = _lasting(outcome(target.function, target.good)[1])
        for form in (Tensor.numpy, Tensor.tolist):
            given = {**target.good, **{k: form(target.good[k]) for k in points}}
            what, result = outcome(target.function, given)
            assert what == "taken", (name, form, result)
            assert _lasting(result) == expected, (name, form)
        tried += 1
    assert tried > 25
