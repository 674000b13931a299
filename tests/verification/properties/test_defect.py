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


def test_difference_quotients_are_within_their_bounds() -> None:
    """Of sin(c x), whose derivatives are known, at several scales; and the bounds fall with c."""
    y, v = torch.zeros(1, 3, dtype=torch.float64) + 0.4, torch.eye(3, dtype=torch.float64)[None]
    bounds = []
    for c in (1.0, 5.0, 20.0):
        first, bound = differences.derivative(lambda x, c=c: torch.sin(c * x), y, v, 1e-16)
        exact = torch.diag_embed(c * torch.cos(c * y[0]))
        assert ((first[0] - exact).norm(dim=1) <= bound[0]).all()
        second, bound = differences.second_derivative(lambda x, c=c: torch.sin(c * x), y, v, 1e-16)
        exact = torch.diag_embed(-(c**2) * torch.sin(c * y[0]))
        assert ((second[0] - exact).norm(dim=1) <= bound[0]).all()
        bounds.append(float(bound.max()))
    assert bounds[0] < 1e-6 < bounds[-1]


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
