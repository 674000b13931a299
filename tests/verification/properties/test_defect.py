"""Defects: which point is the worst, what is undecided, and what is raised."""

from __future__ import annotations

import math

import pytest
import torch

from manifold_sde import problems
from manifold_sde.errors import ManifoldSDEError, PropertyError
from manifold_sde.verification import properties
from manifold_sde.verification.effort import QUICK
from manifold_sde.verification.properties import differences
from manifold_sde.verification.properties.defect import Defect, property_check
from manifold_sde.verification.subject import Subject


def test_the_worst_point_is_that_of_the_largest_share_of_its_tolerance() -> None:
    values = torch.tensor([1e-3, 1e-8, 1e-9])
    defect = Defect.of(values, torch.tensor([5e-3, 1e-9, 1e-5]), "x = y")
    assert (defect.value, defect.tolerance) == pytest.approx((1e-8, 1e-9))
    assert defect.verdict == "fails"
    assert Defect.of(values[:1], 5e-3, "x = y").verdict == "holds"


def test_points_that_cannot_be_decided_are_left_out_and_counted() -> None:
    values = torch.tensor([0.5, 1e-9, math.nan])
    defect = Defect.of(values, torch.tensor([0.6, 1e-8, math.inf]), "x = y")
    assert defect.verdict == "holds"
    assert defect.undecided == 2
    assert "2 points too ill-conditioned" in str(defect)
    alone = Defect.of(values[:1], 0.6, "x = y")
    assert alone.verdict == "undecided"
    with pytest.raises(PropertyError, match="cannot be decided"):
        alone.require()
    alone.require(decided=False)


def test_what_is_not_a_number_fails() -> None:
    defect = Defect.of(torch.tensor([1e-9, math.nan]), 1e-6, "x = y")
    assert (defect.verdict, defect.value) == ("fails", math.inf)


def test_a_defect_is_an_assertion_error_with_the_numbers() -> None:
    with pytest.raises(AssertionError) as caught:
        Defect(0.25, 1e-9, "x = y").require()
    assert isinstance(caught.value, ManifoldSDEError)
    assert "0.25" in caught.value.received
    assert "1e-09" in caught.value.expected
    assert caught.value.remedy
    assert Defect(1e-10, 1e-9, "x = y").require() is None


def test_a_check_takes_the_worst_of_its_defects_and_is_undecided_only_if_all_are() -> None:
    good, bad, vague = (
        Defect(1e-12, 1e-9, "good"),
        Defect(1e-3, 1e-9, "bad"),
        Defect(0.5, 1.0, "vague"),
    )
    subject = Subject.of(problems.great_circle())

    def result(*defects: Defect) -> tuple[str, str]:
        check = property_check("a check", (), lambda s, e: defects, "it is broken")
        (found,) = check(subject, QUICK)
        return found.verdict, found.meaning

    assert result(good) == ("holds", "")
    assert result(good, bad, vague) == ("fails", "it is broken")
    assert result(good, vague)[0] == "holds"
    assert result(vague)[0] == "undecided"
    assert property_check("none", (), lambda s, e: [], "")(subject, QUICK) == []


def differences_of_a_sine(c: float) -> list[tuple[float, float]]:
    """Error and bound of the first and second derivatives of sin(c x) along the coordinates."""
    y, v = torch.zeros(1, 3, dtype=torch.float64) + 0.4, torch.eye(3, dtype=torch.float64)[None]
    exact = (c * torch.cos(c * y[0]), -(c**2) * torch.sin(c * y[0]))
    found = []
    for function, value in zip(
        (differences.derivative, differences.second_derivative), exact, strict=True
    ):
        measured, bound = function(lambda x: torch.sin(c * x), y, v, 1e-12)
        error = (measured[0] - torch.diag_embed(value)).norm(dim=1)
        found.append((float((error / bound[0]).max()), float(bound.max())))
    return found


@pytest.mark.parametrize("c", [1.0, 5.0, 20.0, 60.0, 300.0])
def test_difference_quotients_are_within_their_bounds(c: float) -> None:
    """At several scales, the last of them much shorter than the largest step."""
    for error, bound in differences_of_a_sine(c):
        assert error <= 1.0
        assert bound <= 1e-6 * max(c, 10.0) ** 2


def test_differences_in_long_steps_alone_have_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "_HALVINGS", 0)
    assert differences_of_a_sine(300.0)[1][0] > 10.0


def test_unbatched_points_and_batches_give_the_same() -> None:
    problem = problems.varying_circle()
    x = torch.tensor([[0.3, -1.0, 0.2], [2.0, 0.5, -0.4]], dtype=torch.float64)
    alpha = torch.tensor([0.5, 3.0], dtype=torch.float64)
    both = properties.limit_map_degree(problem, x, alpha)
    assert len(both.values) == 2
    for row in range(2):
        alone = properties.limit_map_degree(problem, x[row], float(alpha[row]))
        assert alone.verdict == "holds"
        assert len(alone.values) == 1
    assert len(properties.euler(problem, x[None, :, None]).values) == 2
