"""Assumptions are found to fail where a problem lacks them, and to hold where it has them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
import sympy
import torch

from manifold_sde import Problem, SphericalNoise, errors, problems
from manifold_sde.verification import Result, Subject, check_assumptions
from manifold_sde.verification.assumptions import CHECKS
from manifold_sde.verification.assumptions.analytic import check_analyticity
from manifold_sde.verification.effort import Effort
from tests.verification.assumptions import broken

Make = Callable[[], Problem]
#: A third of the points of the quick effort, which is enough to find what is broken here.
SMALL = Effort("small", points=12, departure=0.25)


@functools.cache
def subject_of(make: Make) -> Subject:
    """The subject of a problem: checks of the same one share what they have found."""
    return Subject.of(make())


def results(made: Subject, name: str) -> dict[str, Result]:
    """What the check of a name finds, with the results that it shares its work with."""
    check = next(check for check in CHECKS if check.name == name)
    return {result.name: result for result in check(made, SMALL)}


def result(made: Subject, name: str) -> Result:
    return results(made, name)[name]


def symbolic_circle() -> Problem:
    x1, x2, x3 = x = sympy.symbols("x1:4")
    norm = sympy.sqrt(x1**2 + x2**2 + x3**2)
    expression = (x3 / norm) ** 2 / 2 * (1 + x1**2 / norm**2)
    return Problem.from_sympy(expression, x, SphericalNoise(0.3))


@pytest.mark.paper("Assumption 2.1", "Assumption 2.3", "Assumption 5.1", "Assumption 5.2")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(problems.normalized_linear, marks=pytest.mark.thorough),
        lambda: problems.normalized_linear(6, 3, design="orthogonal"),
        problems.great_sphere,
        problems.varying_circle,
        pytest.param(problems.mixed_noise_circle, marks=pytest.mark.thorough),
    ],
    ids=["section 6.1", "sphere of dimension 2", "great sphere", "varying", "mixed"],
)
def test_all_holds_on_healthy_problems(make: Make) -> None:
    report = check_assumptions(make(), effort=SMALL)
    assert report.passed, str(report)
    undecided = [found.name for found in report if found.verdict == "undecided"]
    assert undecided == ["analyticity"]
    assert len(report) == 12
    assert report.title == "Assumptions"
    assert {found.kind for found in report} == {"assumption"}
    assert max(map(len, str(report).splitlines()[1:])) <= 80
    json.loads(report.to_json())


@pytest.mark.paper("Assumption 5.3")
def test_all_is_decided_on_a_symbolic_problem() -> None:
    report = check_assumptions(
        symbolic_circle(), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), effort=SMALL
    )
    assert report.verdict == "holds", str(report)
    assert report["analyticity"].statements == ("Assumption 5.3",)
    assert "100% within 0.001" in report["attraction set around the start"].detail


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(
            "scale invariance",
            broken.slightly_varying_along_rays,
            marks=pytest.mark.twin("scale invariance", "a part of 1e-3 that varies along rays"),
        ),
        pytest.param(
            "scale invariance",
            broken.normalised_with_eps,
            marks=pytest.mark.twin("scale invariance", "eps = 1e-3 in the normalisation"),
        ),
        pytest.param(
            "cone of minimisers",
            broken.circle_that_moves_with_the_norm,
            marks=pytest.mark.twin("cone of minimisers", "minimisers that move with the norm"),
        ),
        pytest.param(
            "four derivatives",
            broken.kink,
            marks=pytest.mark.twin("four derivatives", "a ReLU"),
        ),
        pytest.param(
            "four derivatives",
            broken.kink_of_third_order,
            marks=pytest.mark.twin("four derivatives", "a third derivative that jumps"),
        ),
        pytest.param(
            "constant rank of the Hessian",
            broken.flat_at_a_point,
            marks=pytest.mark.twin(
                "constant rank of the Hessian", "a rank that falls at one point"
            ),
        ),
        pytest.param(
            "constant rank of the Hessian",
            broken.of_two_ranks,
            marks=pytest.mark.twin(
                "constant rank of the Hessian", "minimisers of rank 1 and of rank 2"
            ),
        ),
        pytest.param(
            "local minimality",
            broken.maximum,
            marks=pytest.mark.twin("local minimality", "a maximum in place of a minimum"),
        ),
        pytest.param(
            "local minimality",
            broken.cubic_saddle,
            marks=pytest.mark.twin("local minimality", "a saddle of third order"),
        ),
        pytest.param(
            "connectedness",
            broken.two_circles,
            marks=pytest.mark.twin("connectedness", "two circles of minimisers"),
        ),
        pytest.param(
            "connectedness",
            broken.two_spheres,
            marks=pytest.mark.twin("connectedness", "two spheres of minimisers"),
        ),
        pytest.param(
            "connectedness",
            broken.two_points,
            marks=pytest.mark.twin("connectedness", "two isolated directions"),
        ),
        pytest.param(
            "connectedness",
            broken.of_two_ranks,
            marks=pytest.mark.twin("connectedness", "components of two dimensions"),
        ),
        pytest.param(
            "compactness",
            broken.singular,
            marks=pytest.mark.twin("compactness", "a singularity on the manifold"),
        ),
        pytest.param(
            "compactness",
            broken.two_groups,
            marks=pytest.mark.twin("compactness", "two scaling groups"),
        ),
        pytest.param(
            "one scaling group",
            broken.two_groups,
            marks=pytest.mark.twin("one scaling group", "two scaling groups"),
        ),
        pytest.param(
            "diffusion along the manifold",
            broken.interpolating,
            marks=pytest.mark.twin(
                "diffusion along the manifold", "sampling noise where every sample is fitted"
            ),
        ),
        pytest.param(
            "diffusion along the manifold",
            problems.label_noise_circle,
            marks=pytest.mark.twin("diffusion along the manifold", "label noise"),
        ),
        pytest.param(
            "controllability",
            problems.label_noise_circle,
            marks=pytest.mark.twin("controllability", "label noise"),
        ),
        pytest.param(
            "controllability",
            broken.interpolating,
            marks=pytest.mark.twin(
                "controllability", "sampling noise where every sample is fitted"
            ),
        ),
        pytest.param(
            "controllability",
            broken.missing_one_direction,
            marks=pytest.mark.twin("controllability", "noise in one of two dimensions"),
        ),
        pytest.param(
            "properties of the noise",
            broken.with_radial_noise,
            marks=pytest.mark.twin("properties of the noise", "a radial part"),
        ),
        pytest.param(
            "properties of the noise",
            broken.of_wrong_degree,
            marks=pytest.mark.twin("properties of the noise", "a noise of degree 0"),
        ),
    ],
)
@pytest.mark.paper("Assumption 2.1", "Assumption 2.3", "Assumption 5.1", "Assumption 5.2")
def test_broken_twins_fail(name: str, make: Make) -> None:
    found = result(subject_of(make), name)
    assert found.verdict == "fails", found
    assert found.meaning
    assert not found.statistic <= found.limit, found


@pytest.mark.twin("controllability", "sampling noise that vanishes at one point alone")
def test_noise_that_vanishes_at_a_point_is_found_and_named() -> None:
    found = result(Subject.of(broken.vanishing_at_a_point()), "controllability")
    assert found.verdict == "fails"
    assert "(0.54, 0.841, 0)" in found.detail


@pytest.mark.twin("local minimality", "a minimum that is flat of fourth order across")
@pytest.mark.thorough
def test_a_kernel_larger_than_the_tangent_space() -> None:
    found = result(Subject.of(broken.flat_across()), "local minimality")
    assert found.verdict == "fails"
    assert "ker H" in found.detail


@pytest.mark.twin("controllability", "two scaling groups, whose ratio no sample moves")
def test_several_groups_are_named_and_controlled_apart() -> None:
    report = check_assumptions(subject_of(broken.two_groups), effort=SMALL)
    fails = {found.name for found in report if found.verdict == "fails"}
    assert fails == {"one scaling group", "compactness", "controllability"}
    groups = report["one scaling group"]
    assert "coordinates 0-2; coordinates 3-4" in groups.detail
    assert groups.statements == ("Assumption 5.1", "Theorem 5.4")
    assert "Theorem 4.4" in groups.meaning
    assert "2 of the 3 dimensions" in report["controllability"].detail
    apart = report["controllability of the groups' directions"]
    assert apart.verdict == "holds"
    assert "along the 2 dimensions" in apart.detail


@pytest.mark.twin(
    "controllability of the groups' directions", "two groups, in one of which there is no noise"
)
def test_a_group_without_noise() -> None:
    def samples(x: torch.Tensor) -> torch.Tensor:
        a, b = x[:3] / x[:3].norm(), x[3:] / x[3:].norm()
        tilts = 0.3 * torch.stack([a[0], a[1]])
        return 0.5 * a[2] ** 2 * (1.0 + 0.2 * b[0]) + torch.cat([tilts, -tilts])

    problem = Problem(samples, 5, broken.SamplingNoise())
    found = results(Subject.of(problem), "controllability")[
        "controllability of the groups' directions"
    ]
    assert found.verdict == "fails"
    assert "1 of the 2 dimensions" in found.detail


def test_groups_that_the_noise_of_18_reaches() -> None:
    """It has a part along the radial vectors: 5.1 fails, and 5.2 does not."""
    problem = broken.two_groups().with_noise(SphericalNoise(0.3))
    subject = Subject.of(problem)
    assert result(subject, "controllability").verdict == "holds"
    assert result(subject, "one scaling group").verdict == "fails"


def test_a_higher_local_minimum_is_reported_and_no_fault() -> None:
    found = result(subject_of(broken.circle_and_higher_minimum), "connectedness")
    assert found.verdict == "holds"
    assert "end at higher loss" in found.detail


@pytest.mark.twin("attraction set around the start", "a start on a saddle")
def test_a_start_outside_the_attraction_set() -> None:
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    report = check_assumptions(problems.great_circle(), pole, effort=SMALL)
    assert [found.name for found in report if found.verdict == "fails"] == [
        "attraction set around the start"
    ]
    assert "saddle" in report["attraction set around the start"].detail


@pytest.mark.twin("attraction set around the start", "a start at the border of the attraction set")
def test_a_start_at_the_border_of_the_attraction_set() -> None:
    problem = broken.circle_and_higher_minimum()
    # Between the two circles, where the height has an unstable equilibrium.
    low, high = 0.2, 0.5
    for _ in range(10):
        middle = 0.5 * (low + high)
        x = torch.tensor([(1.0 - middle**2) ** 0.5, 0.0, middle], dtype=torch.float64)
        low, high = (middle, high) if float(problem.gradient(x)[2]) > 0 else (low, middle)
    found = result(Subject.of(problem, x_init=x), "attraction set around the start")
    assert found.verdict == "fails"
    assert "border" in found.meaning


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * x).sum(),
        lambda x: x.sum(),
        lambda x: torch.exp(-(x @ x)),
        lambda x: 0.0 * x[0] / x.norm(),
        lambda x: (x[0] / x.norm()) ** 4,
    ],
    ids=["a bowl", "a slope", "to infinity", "a constant", "flat"],
)
def test_what_is_no_such_problem_gets_a_report(function: Callable[..., torch.Tensor]) -> None:
    report = check_assumptions(Problem(function, 3, SphericalNoise(0.3)), effort=SMALL)
    assert report.verdict != "holds"
    assert len(report) >= 10
    str(report)


def test_of_components_that_no_start_comes_to_nothing_is_known() -> None:
    """A maximum has no restarts at its loss: the curve is not the point, and nothing is claimed."""
    found = result(subject_of(broken.maximum), "connectedness")
    assert found.verdict != "holds"


def test_a_start_is_one_point_and_of_any_precision() -> None:
    x = torch.tensor([1.0, 2.0, 0.5])
    assert Subject.of(problems.great_circle(), x_init=x).start.dtype == torch.float64
    with pytest.raises(errors.ShapeError, match="one point"):
        check_assumptions(problems.great_circle(), x.expand(2, 3))


@pytest.mark.paper("Assumption 5.3")
@pytest.mark.twin("analyticity", "a loss with |u|^5: four derivatives, and not analytic")
def test_a_loss_that_is_not_analytic_is_not_proved_to_be() -> None:
    x = sympy.symbols("x0:3", real=True)
    norm = sympy.sqrt(sum(z**2 for z in x))
    bent = sympy.Abs(x[2] / norm - sympy.Rational(1, 2)) ** 5
    loss = (x[2] / norm) ** 2 / 2 + bent / 100
    problem = Problem.from_sympy(loss, x, SphericalNoise(0.3))
    found = check_analyticity(Subject.of(problem), SMALL)
    assert found.verdict == "undecided"
    assert "no proof" in found.detail
