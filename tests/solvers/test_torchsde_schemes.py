"""The SDE (3) by torchsde's own methods: path by path what our schemes of these formulas give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchsde
from torch import Tensor

from manifold_sde import LimitingDiffusion, Problem, WeightDecaySDE, problems
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers import BrownianPath, Solution, solve
from manifold_sde.solvers.torchsde_schemes import TORCHSDE

PROBLEM = problems.mixed_noise_circle()


def sde(calculus: str, problem: Problem = PROBLEM) -> WeightDecaySDE:
    return WeightDecaySDE(problem, 0.05, 0.1, calculus)


def solved(method: str, times: list[float], **options: object) -> Solution:
    calculus = "ito" if method.endswith(":euler") or method == "euler" else "stratonovich"
    given = {"dt": 0.5, "n_paths": 5, "seed": 3, **options}
    return solve(sde(calculus), PROBLEM.minimizer, times, method=method, **given)  # type: ignore[arg-type]


@pytest.mark.paper("Equation (3)")
@pytest.mark.parametrize("name", ["euler", "heun", "midpoint"])
def test_paths_are_ours_to_rounding(name: str) -> None:
    """On grid points, between them, and in blocks of more than 64 steps; the clock too."""
    times = [0.0, 1.0, 2.75, 40.0]
    theirs, ours = solved(f"torchsde:{name}", times), solved(name, times)
    torch.testing.assert_close(theirs.ys, ours.ys, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(theirs.clock, ours.clock, rtol=1e-10, atol=0.0)
    assert theirs.stats["steps"] == ours.stats["steps"] == 80


def test_euler_heun_is_another_scheme_of_the_same_equation() -> None:
    """Drift by Euler: it is near Heun by as much as the drift's step makes it, and no nearer."""
    times = [0.0, 8.0]
    found = [
        float(
            (solved("torchsde:euler_heun", times, dt=h).ys - solved("heun", times, dt=h).ys).norm()
        )
        for h in (0.5, 0.25)
    ]
    assert 1e-6 < found[1] < 0.7 * found[0] < 0.1


def test_torchsde_is_what_is_called() -> None:
    """The same call by hand, on the same Brownian paths."""
    equation = sde("stratonovich")
    path = BrownianPath(3, equation.n_noise, 5)
    start = PROBLEM.minimizer.expand(5, -1).contiguous()
    times = torch.arange(9, dtype=torch.float64)
    by_hand = torchsde.sdeint(equation, start, times, bm=path, dt=1.0, method="midpoint")
    found = solved("torchsde:midpoint", [0.0, 3.0, 8.0], dt=1.0)
    torch.testing.assert_close(found.ys, by_hand[[0, 3, 8]], rtol=0.0, atol=1e-12)


def test_times_between_steps_are_no_chords_and_leave_the_path_alone() -> None:
    few = solved("torchsde:heun", [0.0, 6.0])
    many = solved("torchsde:heun", [0.0, 2.5, 2.7, 3.0, 6.0])
    torch.testing.assert_close(few.ys[-1], many.ys[-1], rtol=0.0, atol=1e-13)
    chord = 0.6 * many.ys[1] + 0.4 * many.ys[3]
    assert float((many.ys[2] - chord).abs().max()) > 1e-4


def test_chunks_checkpoints_and_observables_are_those_of_solve(tmp_path: Path) -> None:
    whole = solved("torchsde:heun", [0.0, 4.0])
    parts = solved("torchsde:heun", [0.0, 4.0], chunk_size=2, checkpoint=tmp_path)
    torch.testing.assert_close(parts.ys, whole.ys, rtol=0.0, atol=1e-12)
    again = solved("torchsde:heun", [0.0, 4.0], chunk_size=2, checkpoint=tmp_path)
    assert torch.equal(again.ys, parts.ys)
    seen = solved("torchsde:heun", [0.0, 4.0], observables={"first": lambda y: y[:, 0]})
    torch.testing.assert_close(seen.observed["first"][0], whole.ys[..., 0].mean(1))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    solved("torchsde:euler", [0.0, 1.0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_single_precision_stays_single() -> None:
    start = PROBLEM.minimizer.float()
    found = solve(sde("ito"), start, [0.0, 2.25], method="torchsde:euler", dt=0.5, n_paths=3)
    assert found.ys.dtype == torch.float32
    wide = solve(sde("ito"), start.double(), [0.0, 2.25], method="euler", dt=0.5, n_paths=3)
    torch.testing.assert_close(found.ys, wide.ys.float(), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("method", sorted(TORCHSDE))
def test_the_other_calculus_is_refused(method: str) -> None:
    wrong = "stratonovich" if TORCHSDE[method].calculus == "ito" else "ito"
    with pytest.raises(ArgumentError, match="does not integrate the form"):
        solve(sde(wrong), PROBLEM.minimizer, [0.0, 1.0], method=method)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("reversible_heun", "unstable"),
        ("log_ode", "Levy areas"),
        ("milstein", "commutes"),
        ("srk", "diagonal"),
    ],
)
def test_unsound_methods_are_refused_by_their_reason(name: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        solve(sde("stratonovich"), PROBLEM.minimizer, [0.0, 1.0], method=f"torchsde:{name}")


@pytest.mark.parametrize("method", sorted(TORCHSDE))
def test_adaptive_steps_of_torchsde_are_refused(method: str) -> None:
    with pytest.raises(ArgumentError, match="has no adaptive steps"):
        solve(
            sde(TORCHSDE[method].calculus),
            PROBLEM.minimizer,
            [0.0, 1.0],
            method=method,
            rtol=1e-3,
        )


def test_unknown_methods_and_diffusions_on_the_manifold_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no such method"):
        solve(sde("ito"), PROBLEM.minimizer, [0.0, 1.0], method="torchsde:magic")
    limiting = LimitingDiffusion(PROBLEM)
    with pytest.raises(ArgumentError, match="no such method for LimitingDiffusion"):
        solve(limiting, PROBLEM.minimizer, [0.0, 1.0], method="torchsde:euler")


def test_reversible_heun_does_leave_where_a_drift_contracts() -> None:
    """Why it is refused: for dx = -x dt + 0.1 dW it blows up at every step size."""

    class Contracting:
        noise_type, sde_type = "general", "stratonovich"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.1 * torch.ones(len(y), 1, 1, dtype=y.dtype)

    start = torch.ones(20, 1, dtype=torch.float64)
    times = torch.tensor([0.0, 20.0], dtype=torch.float64)
    for dt in (0.25, 0.125):
        spread = {
            method: float(
                torchsde.sdeint(
                    Contracting(), start, times, bm=BrownianPath(0, 1, 20), dt=dt, method=method
                )[-1].std()
            )
            for method in ("heun", "reversible_heun")
        }
        assert spread["heun"] < 0.12
        assert spread["reversible_heun"] > 100.0
