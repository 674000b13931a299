"""Several groups of weights: Theorem 5.4 is not said to hold; what takes its place is tested."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from manifold_sde import problems
from manifold_sde.solvers import solve
from manifold_sde.verification import Effort, Subject
from manifold_sde.verification.effort import QUICK
from manifold_sde.verification.laws.equilibrium import ONE_EQUILIBRIUM
from manifold_sde.verification.laws.groups import EQUILIBRIUM_OF_GROUPS, GroupRuns
from tests.verification.ergodic import on_another, run, two_groups, with_solver

#: Some dozens of runs: a check takes a quarter of a minute.
COARSE = Effort("coarse", points=8, departure=0.5)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(two_groups(second=1.5))


@pytest.mark.twin(
    "one equilibrium from every start", "two groups of weights that can be scaled separately"
)
def test_several_groups_never_satisfy_the_theorem(subject: Subject) -> None:
    found = run(ONE_EQUILIBRIUM, subject)
    assert found.verdict == "fails"
    assert "2 groups of weights" in found.meaning


@pytest.fixture
def known_relaxation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the pilot, which finds 6.5 at the seed of the subject."""
    monkeypatch.setattr(GroupRuns, "relaxation", lambda _: 6.5)


@pytest.mark.slow
@pytest.mark.paper("Theorem 5.4")
@pytest.mark.usefixtures("known_relaxation")
def test_directions_and_norms_of_groups_come_to_one_law(subject: Subject) -> None:
    found = run(EQUILIBRIUM_OF_GROUPS, subject, COARSE)
    assert found.verdict == "holds", found.detail
    assert "takes the place" in found.meaning


@pytest.mark.thorough
def test_the_relaxation_time_is_found_by_a_pilot(subject: Subject) -> None:
    found = run(EQUILIBRIUM_OF_GROUPS, subject, COARSE)
    assert found.verdict == "holds", found.detail


@pytest.mark.slow
@pytest.mark.usefixtures("known_relaxation")
@pytest.mark.twin(
    "equilibrium of several groups", "a solver that keeps the share of the norm that each group had"
)
def test_norms_that_do_not_forget_are_rejected(subject: Subject) -> None:
    def frozen(sde: Any, y0: Any, ts: Any, dt: float, **options: Any) -> Any:
        # The steps are for the norms of the starts, which inside settle at once.
        found = solve(sde, y0, ts, dt=4.0 * dt, **options)
        ys = torch.cat(
            [
                part / part.norm(dim=-1, keepdim=True) * start.norm(dim=-1, keepdim=True)
                for part, start in ((found.ys[..., g], y0[..., g]) for g in ([0, 1, 2], [3, 4, 5]))
            ],
            -1,
        )
        return dataclasses.replace(found, ys=ys)

    found = run(EQUILIBRIUM_OF_GROUPS, with_solver(subject.problem, frozen), COARSE)
    assert found.verdict == "fails", found.detail
    assert "norm of group" in found.detail


@pytest.mark.slow
@pytest.mark.usefixtures("known_relaxation")
@pytest.mark.twin("equilibrium of several groups", "a solver with one common norm for all groups")
def test_one_common_norm_is_rejected(subject: Subject) -> None:
    def common(sde: Any, y0: Any, ts: Any, **options: Any) -> Any:
        found = solve(sde, y0, ts, **options)
        whole = found.ys.norm(dim=-1, keepdim=True) * 0.5**0.5
        parts = found.ys[..., :3], found.ys[..., 3:]
        ys = torch.cat([whole * part / part.norm(dim=-1, keepdim=True) for part in parts], -1)
        return dataclasses.replace(found, ys=ys)

    found = run(EQUILIBRIUM_OF_GROUPS, with_solver(subject.problem, common), COARSE)
    assert found.verdict == "fails", found.detail
    assert "balance" in found.detail


@pytest.mark.slow
@pytest.mark.usefixtures("known_relaxation")
@pytest.mark.twin("equilibrium of several groups", "a solver with twice the variance of the noise")
def test_norms_out_of_balance_are_rejected(subject: Subject) -> None:
    louder = on_another(two_groups(scale=0.5 * 2.0**0.5, second=1.5))
    found = run(EQUILIBRIUM_OF_GROUPS, with_solver(subject.problem, louder), COARSE)
    assert found.verdict == "fails", found.detail
    assert "balance" in found.detail


def test_the_quick_form_leaves_it_to_the_thorough_one(subject: Subject) -> None:
    found = run(EQUILIBRIUM_OF_GROUPS, subject, QUICK)
    assert found.verdict == "undecided"
    assert "asked for effort='thorough'" in found.detail


def test_one_group_is_not_asked(subject: Subject) -> None:
    assert EQUILIBRIUM_OF_GROUPS(Subject.of(problems.great_circle()), COARSE) == []
