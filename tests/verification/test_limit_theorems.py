"""The checks of the limit theorems hold for sound problems, and reject broken parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from manifold_sde import SamplingNoise, SphericalNoise, problems
from manifold_sde.verification import Subject
from manifold_sde.verification.check import Check
from manifold_sde.verification.laws.integrators import (
    LEMMA_3_1,
    LEMMA_4_3,
    distance_from_line,
    order,
)
from manifold_sde.verification.laws.limits import (
    DIFFUSIONS_AT_TWO_RATIOS,
    EQUILIBRIUM_NORM,
    NORM_LAW,
    SDE_IN_GENERAL,
    SGD_AT_FIXED_RATIO,
    SGD_AT_TWO_RATES,
    SGD_IN_GENERAL,
    SGD_WITHOUT_WEIGHT_DECAY,
)
from manifold_sde.verification.limit_theorems import CHECKS
from tests.verification import limit_theorem_twins as twins
from tests.verification.limit_theorem_twins import (
    CIRCLE,
    CORRELATED,
    FAR,
    SMALL,
    at,
    found,
    verdict,
)

WELL = problems.normalized_linear(design="orthogonal")
SPHERE = problems.great_sphere()
MIXED = problems.mixed_noise_circle()

#: The subjects that several tests share, with the runs that their checks have made.
SUBJECTS = {
    "well": Subject.of(WELL),
    "sphere": Subject.of(SPHERE),
    "circle": Subject.of(CIRCLE, x_init=at(CIRCLE, 1.5), seed=1),
    "correlated": Subject.of(CORRELATED, x_init=at(CORRELATED, 2.0), seed=1),
    "mixed": Subject.of(MIXED),
}


def broken(subject: Subject, **parts: object) -> Subject:
    return replace(subject, **parts)  # type: ignore[arg-type]


# All is well.


@pytest.mark.paper("Lemma 3.1", "Lemma 4.3", "Theorem 3.2", "Theorem 4.1", "Theorem 4.4")
@pytest.mark.paper("Remark 3.3", "Theorem 5.5", "Equation (10)", "Remark 6.1", "Definition 2.9")
@pytest.mark.paper("Equation (7)", "Equation (15)", "Equation (16)", "Equation (17)")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_sound_problems_hold(check: Check) -> None:
    results = check(SUBJECTS["sphere"], SMALL)
    assert results
    for result in results:
        assert result.verdict == "holds", f"{result.name}: {result.detail}"
        assert result.meaning == ""
        assert not result.statistic > result.limit


@pytest.mark.thorough
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("name", ["well", "mixed", "circle", "correlated"])
def test_other_sound_problems_hold(name: str, check: Check) -> None:
    """The last two are run far enough for the drift of the limit to show."""
    for result in check(SUBJECTS[name], FAR if name in ("circle", "correlated") else SMALL):
        assert result.verdict == "holds", f"{result.name}: {result.detail}"


def test_designs_are_declared() -> None:
    for check in CHECKS:
        result = found(check, SUBJECTS["sphere"])
        assert result.design is not None
        assert result.design.false_alarm == SMALL.false_alarm
        assert result.design.sample_size >= 64
        assert "%" in result.design.departure
        assert result.p_value is not None


def test_without_a_diffusion_the_law_is_undecided() -> None:
    result = found(SGD_AT_FIXED_RATIO, Subject.of(problems.label_noise_circle()))
    assert result.verdict == "undecided"
    assert "no diffusion" in result.detail


# The uniform metric.


@pytest.mark.paper("Definition 2.9")
def test_the_uniform_metric_by_hand() -> None:
    """One jump of 3 at 2.5 against 0: 0 on [0, 1) and [0, 2), cut at 1 from T = 3 on."""
    assert distance_from_line(np.array([2.5]), np.array([3.0]), 0.0) == pytest.approx(0.25)
    # Against t / 2: sup on [0, 1) is 1/2, on [0, 2) it is 1, and 1 from there on.
    assert distance_from_line(np.array([2.5]), np.array([0.0]), 0.5) == pytest.approx(0.75)
    # A jump at T itself is outside [0, T).
    assert distance_from_line(np.array([1.0]), np.array([1.0]), 0.0) == pytest.approx(0.5)


def test_the_order_of_powers() -> None:
    steps = np.array([0.4, 0.2, 0.1])
    assert order(steps, 3.0 * steps**2) == pytest.approx(2.0)


# Broken twins: SGD.

Z_OF_7 = "Z of (7) tends to a Brownian motion"
B_OF_7 = "A and B of (7)"
Z_OF_17 = "Z of (15) to (17) tends to a Brownian motion"
B_OF_16 = "A and B of (15) to (17)"
FINE = replace(SMALL, name="fine", departure=0.1, step_size=0.02)


@pytest.mark.twin(Z_OF_7, "noise of SGD scaled by 1.05")
@pytest.mark.twin(Z_OF_17, "noise of SGD scaled by 1.05")
def test_noise_scaled_by_a_twentieth() -> None:
    run = twins.other_problem(SPHERE.with_noise(SphericalNoise(1.05 * 0.3)))
    subject = broken(SUBJECTS["sphere"], run_sgd=run)
    for check in (LEMMA_3_1, LEMMA_4_3):
        assert verdict(check, subject, FINE) == "fails"


@pytest.mark.twin(Z_OF_7, "random numbers that come again: after 16 steps, in other runs")
@pytest.mark.twin(Z_OF_17, "random numbers that come again: after 16 steps, in other runs")
@pytest.mark.parametrize("again", [{"every": 16}, {"every": 100}, {"runs": 128}])
@pytest.mark.parametrize("name", ["sphere", "mixed"])
def test_random_numbers_that_repeat(name: str, again: dict[str, int]) -> None:
    subject = broken(SUBJECTS[name], run_sgd=twins.repeating(**again))
    for check in (LEMMA_3_1, LEMMA_4_3):  # they share the run
        assert verdict(check, subject) == "fails"


@pytest.mark.twin(Z_OF_7, "samples that are drawn with replacement, not without")
def test_samples_drawn_with_replacement() -> None:
    subject = Subject.of(MIXED.with_noise(SamplingNoise(2, replacement=False)))
    drawn = MIXED.with_noise(SamplingNoise(2, replacement=True))
    assert verdict(LEMMA_3_1, subject) == "holds"
    assert verdict(LEMMA_3_1, broken(subject, run_sgd=twins.other_problem(drawn))) == "fails"


class WrongBatchFactor(SamplingNoise):
    """The covariance of one sample for every batch."""

    def variance_factor(self, n_samples: int) -> float:
        return 1.0


@pytest.mark.twin(Z_OF_7, "covariance of one sample for batches of two")
def test_wrong_batch_factor() -> None:
    assert verdict(LEMMA_3_1, Subject.of(MIXED.with_noise(WrongBatchFactor(2)))) == "fails"


@pytest.mark.thorough
@pytest.mark.twin(
    "SGD at a fixed ratio tends to (8)", "covariance of one sample for batches of two"
)
def test_the_law_of_sgd_tells_the_batch_factor() -> None:
    subject = Subject.of(MIXED.with_noise(WrongBatchFactor(2)))
    assert verdict(SGD_AT_FIXED_RATIO, subject, replace(SMALL, runs=512)) == "fails"


@pytest.mark.twin(B_OF_7, "weight decay off by 5 %")
@pytest.mark.twin(B_OF_16, "weight decay off by 5 %")
def test_weight_decay_off_by_a_twentieth() -> None:
    subject = broken(SUBJECTS["sphere"], run_sgd=twins.other_rates(decay=1.05))
    for check in (LEMMA_3_1, LEMMA_4_3):
        assert [r.verdict for r in check(subject, SMALL)] == ["fails", "holds"]


@pytest.mark.twin("SGD at a fixed ratio tends to (8)", "weight decay off by 5 %")
@pytest.mark.twin("SGD in the time tau tends to (13)", "weight decay off by 5 %")
@pytest.mark.twin("norm of SGD's weights", "weight decay off by 5 %")
def test_weight_decay_off_shows_in_the_norm() -> None:
    subject = broken(SUBJECTS["sphere"], run_sgd=twins.other_rates(decay=1.05))
    for check in (SGD_AT_FIXED_RATIO, SGD_IN_GENERAL, NORM_LAW):
        assert verdict(check, subject) == "fails"


@pytest.mark.twin(
    "equilibrium norm of SGD's weights", "weight decay off by 20 %, noise scaled by 1.1"
)
@pytest.mark.parametrize("what", ["decay", "noise"])
def test_equilibrium_norm_of_other_rates(what: str) -> None:
    run = twins.other_rates(decay=1.2)
    if what == "noise":
        run = twins.other_problem(SPHERE.with_noise(SphericalNoise(1.1 * 0.3)))
    assert verdict(EQUILIBRIUM_NORM, broken(SUBJECTS["sphere"], run_sgd=run), FINE) == "fails"


@pytest.mark.twin("SGD at a fixed ratio tends to (8)", "noise of SGD scaled by 1.05")
@pytest.mark.twin("norm of SGD's weights", "noise of SGD scaled by 1.05")
def test_the_norm_of_sgd_tells_the_scale_of_the_noise() -> None:
    run = twins.other_problem(SPHERE.with_noise(SphericalNoise(1.05 * 0.3)))
    subject = broken(SUBJECTS["sphere"], run_sgd=run)
    for check in (SGD_AT_FIXED_RATIO, NORM_LAW):
        assert verdict(check, subject, FINE) == "fails"


@pytest.mark.twin(
    "SGD without weight decay comes later", "learning rate off where there is weight decay"
)
def test_learning_rate_that_depends_on_weight_decay() -> None:
    run = twins.faster_with_decay
    assert verdict(SGD_WITHOUT_WEIGHT_DECAY, broken(SUBJECTS["sphere"], run_sgd=run)) == "fails"


# Broken twins: the time scale.


@pytest.mark.twin(
    "SGD in the time tau tends to (13)", "R of (11) squared; tau of (12) without one half"
)
@pytest.mark.twin(
    "the SDE of SGD in the time tau tends to (13)",
    "R of (11) squared; tau of (12) without one half",
)
@pytest.mark.twin(B_OF_16, "R of (11) squared; tau of (12) without one half")
@pytest.mark.parametrize("scale", [twins.WrongRadius, twins.WrongTau])
def test_wrong_time_scales(scale: type) -> None:
    subject = broken(SUBJECTS["sphere"], time_scale=scale)
    for check in (SGD_IN_GENERAL, SDE_IN_GENERAL):
        assert verdict(check, subject) == "fails"
    assert "fails" in [r.verdict for r in LEMMA_4_3(subject, SMALL)]


@pytest.mark.twin("SGD at two pairs of rates has one law", "steps as if there were no weight decay")
def test_steps_without_weight_decay() -> None:
    scale = twins.WithoutWeightDecay
    assert verdict(SGD_AT_TWO_RATES, broken(SUBJECTS["sphere"], time_scale=scale)) == "fails"


# Broken twins: the diffusions.


@pytest.mark.twin(
    "weight decay changes time and norm of (8)", "time changed by e^{2Ct} instead of e^{4Ct}"
)
def test_square_time_change() -> None:
    subject = broken(SUBJECTS["sphere"], solve=twins.square_time_change)
    assert verdict(DIFFUSIONS_AT_TWO_RATIOS, subject) == "fails"


@pytest.mark.thorough
@pytest.mark.twin(
    "SGD at a fixed ratio tends to (8)", "nearest point in place of Phi, in the limit"
)
@pytest.mark.twin(
    "SGD in the time tau tends to (13)", "nearest point in place of Phi, in the limit"
)
@pytest.mark.parametrize("check", [SGD_AT_FIXED_RATIO, SGD_IN_GENERAL], ids=["(8)", "(13)"])
def test_nearest_point_in_the_limit(check: Check) -> None:
    """The nearest point of a great circle does not see how the curvature varies along it."""
    solver = twins.on(problems.great_circle(noise_scale=1.0))
    assert verdict(check, broken(SUBJECTS["circle"], solve=solver), FAR) == "fails"


#: What is added to the Stratonovich drift of the limit on the circle with mixed noise.
FAULTS = {
    "mixed term dropped": twins.mixed_term,
    "second derivative of Phi with the other sign": lambda y: (
        twins.mixed_term(y) + twins.third_term(y)
    ),
    "derivative of sigma dropped": lambda y: 0.5 * twins.sigma_term(y),
}


@pytest.mark.thorough
@pytest.mark.twin(
    "SGD at a fixed ratio tends to (8)", "second derivative of Phi with the other sign"
)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_drift(fault: str) -> None:
    subject = broken(SUBJECTS["correlated"], solve=twins.with_drift(FAULTS[fault]))
    assert verdict(SGD_AT_FIXED_RATIO, subject, FAR) == "fails"
