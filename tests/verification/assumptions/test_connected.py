"""Connectedness in two dimensions and more: how often a connected manifold is said not to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manifold_sde.verification import Effort, Subject
from manifold_sde.verification.assumptions.connected import (
    Separation,
    check_connectedness,
    walk_apart,
)
from manifold_sde.verification.assumptions.survey import Survey
from tests.verification.assumptions.connected_problems import Known, connected, separated

SMALL = Effort("small", points=8, departure=0.25)
#: Connected problems: none may be said to have two components. A rate of false findings of 6 % or
#: more would be noticed with a probability of 0.96.
PROBLEMS = 54


def verdict(known: Known, seed: int) -> tuple[str, Survey]:
    subject = Subject.of(known.problem, seed=seed)
    found = check_connectedness(Survey.of(subject, SMALL))
    return found.verdict, Survey.of(subject, SMALL)


def cut(known: Known, survey: Survey) -> list[Separation]:
    """Walks from two sides of the neck, as if no path had been found through it."""
    nodes = torch.cat([survey.points[:1], survey.restarts])
    height = known.height(nodes)
    labels = (height > (0.0 if known.kind == "quadric" else height.median())).long().numpy()
    assert set(labels.tolist()) == {0, 1}
    return walk_apart(survey.subject, nodes, labels)


@pytest.mark.thorough
def test_connected_manifolds_are_not_said_to_be_in_pieces() -> None:
    """Neither by the whole check, nor where no path between their two sides was found."""
    wrong = []
    fewest = np.inf
    for seed in range(PROBLEMS):
        known = connected(seed)
        found, survey = verdict(known, seed)
        sides = cut(known, survey)
        fewest = min(fewest, *(side.crossings for side in sides))
        wrong += [seed] if found == "fails" or any(side.apart for side in sides) else []
    assert wrong == []
    assert fewest >= 20, "a walk in thirteen crosses at least: far from none"


@pytest.mark.thorough
@pytest.mark.twin("connectedness", "random manifolds of two components")
def test_two_components_are_found() -> None:
    assert [verdict(separated(seed), seed)[0] for seed in range(4)] == ["fails"] * 4


@pytest.mark.parametrize(
    ("seen", "apart"),
    [
        (Separation(128, 0, 0.5, 0.7), True),
        (Separation(128, 1, 0.5, 0.7), False),  # one walk crosses
        (Separation(128, 0, 0.1, 0.7), False),  # walks do not get around within
        (Separation(128, 0, 0.5, 0.1), False),  # sheets a step apart
    ],
)
def test_what_counts_as_apart(seen: Separation, apart: bool) -> None:
    assert seen.apart is apart
    assert seen.passage == pytest.approx(0.072, abs=1e-3)
