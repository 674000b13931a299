"""The benchmark of the diffusion: its biases are right, and what is not the same is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_diffusion, memory_use, rows, work_precision
from benchmarks.bench_diffusion import check_landings, check_law, check_moves, setting
from benchmarks.diffusion_programs import Ours, TorchSde, paired_difference, without_retraction
from benchmarks.rows import Timing
from benchmarks.weak_errors import Setting, bias, fewest_steps, our_step
from manifold_sde import LimitingDiffusion, problems

needs_jax = pytest.mark.skipif(
    not (rows.installed("jax") and rows.installed("diffrax")),
    reason="no JAX or diffrax (make bench-environment)",
)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Points of the circle of section 6.1 turned by angles: (D, n), (n,) -> (D, n)."""
    circle = setting().circle
    norms = x.norm(dim=0)
    return norms * circle.point(circle.angle(x.T) + angle).T


def tangent_noise(x: Tensor, dw: Tensor) -> Tensor:
    """The increment along the circle, (n,)."""
    circle = setting().circle
    angle = circle.angle(x.T)
    plane = circle.basis @ dw
    return torch.cos(angle) * plane[1] - torch.sin(angle) * plane[0]


def exact_in_clock(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
    """The exact law of the direction: the angle is a Brownian motion of variance s^2 u / r^2."""
    return turned(x, setting().scale / setting().circle.radius * tangent_noise(x, dw))


def tangent_in_clock(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
    """A step along the tangent, and back to the circle by the shortest way."""
    return turned(x, torch.atan(setting().scale / setting().circle.radius * tangent_noise(x, dw)))


def exact_norm(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
    """The norm by its equation, and the angle by the clock's speed at the start of the step."""
    norm = x.norm(dim=0)
    after = (setting().trace + (norm**4 - setting().trace) * math.exp(-2 * h)) ** 0.25
    spread = setting().scale / setting().circle.radius / norm**2
    return turned(x, spread * tangent_noise(x, dw)) * (after / norm)


# Biases.


def test_the_exact_law_has_no_bias() -> None:
    found = bias(setting(), exact_in_clock, 3, clock=True, flows=1, rule=12)
    assert abs(found.value) < 1e-9
    assert found.lost == pytest.approx(0.0, abs=1e-12)


def test_bias_of_a_step_in_closed_form() -> None:
    """E cos(atan(a xi)) = E (1 + a^2 xi^2)^{-1/2}, by a fine sum over the normal density."""
    steps = 4
    h = setting().clock / steps
    a = setting().scale / setting().circle.radius * math.sqrt(h)
    xi = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * xi**2)
    each = float((density / (1 + (a * xi) ** 2).sqrt()).sum() / density.sum())
    found = bias(setting(), tangent_in_clock, steps, clock=True, flows=1, rule=20)
    assert found.value == pytest.approx(each**steps - setting().exact, abs=1e-6)


def test_bias_where_the_norm_moves() -> None:
    steps, trace = 5, setting().trace
    variance = sum(
        setting().scale ** 2
        / setting().circle.radius ** 2
        / (trace + (1 - trace) * math.exp(-2 * k / steps))
        / steps
        for k in range(steps)
    )
    found = bias(setting(), exact_norm, steps, clock=False, flows=1, rule=12)
    assert found.value == pytest.approx(math.exp(-0.5 * variance) - setting().exact, abs=1e-7)


def test_lost_paths_are_counted_and_left_out() -> None:
    """Half of the paths are lost in one step; the others keep their law."""

    def half_lost(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
        moved = exact_in_clock(x, dw, extra, h)
        return torch.where(tangent_noise(x, dw) > 0, moved, torch.nan)

    found = bias(setting(), half_lost, 1, clock=True, flows=1, rule=12)
    assert found.lost == pytest.approx(0.5, abs=1e-9)
    assert found.value == pytest.approx(0.0, abs=1e-6)


def test_our_scheme_converges_to_the_law_and_its_twin_does_not() -> None:
    """At these steps Euler has the order one; with the Ito drift halved it keeps its bias."""
    here = Setting("varying", problems.varying_circle(noise_scale=0.6), 15)
    step = our_step(here.problem, here.problem.minimizer, "euler", clock=True, compiled=False)
    found = [bias(here, step, k, clock=True, flows=1, rule=8).value for k in (16, 32)]
    assert abs(found[1]) < 0.65 * abs(found[0]) < 0.02
    drift = LimitingDiffusion(here.problem)

    def twin(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
        away = drift.f(torch.zeros(()), x.T).T
        return step(x - 0.5 * h * away, dw, extra, h)

    assert abs(bias(here, twin, 32, clock=True, flows=1, rule=8).value) > 3.0 * abs(found[1])


def test_the_fewest_steps() -> None:
    assert fewest_steps(lambda n: 0.7 / n, 1e-3) == 700
    assert fewest_steps(lambda n: 1e-4, 1e-3) == 1
    assert fewest_steps(lambda n: 0.5 / n - 1 / n**2 if n > 1 else 0.0, 1e-2) == 48
    with pytest.raises(AssertionError, match="4096 steps do not"):
        fewest_steps(lambda n: math.nan, 1e-3)


def test_paired_difference_is_that_of_the_means() -> None:
    same = paired_difference(setting(), exact_norm, exact_norm, 3, 16)
    assert same == (0.0, 0.0)
    wider, error = paired_difference(
        setting(), lambda x, dw, e, h: exact_norm(x, 2.0 * dw, e, h), exact_norm, 3, 2000
    )
    assert error < 0.02
    assert wider < -5.0 * error


# Peers that compute something else.


def rowwise(step: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda x, dw, h: step(x.T.contiguous(), dw.T.contiguous(), dw.T.contiguous(), h).T


def test_the_step_of_torchsde_and_its_twins() -> None:
    step = rowwise(without_retraction(setting().problem, compiled=False))
    check_moves(step, 8)
    with pytest.raises(AssertionError, match="not close"):
        check_moves(lambda x, dw, h: step(x, dw, 1.001 * h), 8)
    with pytest.raises(AssertionError, match="not close"):
        check_moves(lambda x, dw, h: step(x, 1.001 * dw, h), 8)
    with pytest.raises(AssertionError, match="off the manifold"):
        check_landings(step, 8)


def test_the_landing_and_its_twin() -> None:
    problem = setting().problem
    ours = rowwise(our_step(problem, problem.minimizer, "euler", clock=False, compiled=False))
    check_landings(ours, 8)
    with pytest.raises(AssertionError, match="the steps differ by"):
        check_landings(lambda x, dw, h: ours(x, dw + 0.01 * h**0.5, h), 8)


def test_torchsde_takes_our_brownian_paths() -> None:
    """Two steps of it are two steps by hand."""
    program = TorchSde(setting(), 2, 3, ours=True)
    source = program._source(5)
    step = rowwise(without_retraction(setting().problem, compiled=False))
    x = program.x
    for k in range(2):
        x = step(x, source(0.5 * k, 0.5 * (k + 1)), 0.5)  # type: ignore[operator]
    torch.testing.assert_close(program.end(5), x, rtol=0.0, atol=1e-12)


class _Fixed:
    """A program whose end is given."""

    name = "somebody"

    def __init__(self, end: Tensor) -> None:
        self._end = end

    def run(self, seed: int) -> object:
        return self._end

    def end(self, seed: int) -> Tensor:
        return self._end


def test_another_law_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 400, dtype=torch.float64, generator=generator)
    norms = 1.0 + 0.01 * torch.randn(2, 400, 1, dtype=torch.float64, generator=generator)
    one, two = setting().circle.point(draws) * norms
    check_law(_Fixed(one), _Fixed(two))
    with pytest.raises(AssertionError, match="another law"):
        check_law(_Fixed(one), _Fixed(setting().circle.point(1.5 * draws[1]) * norms[1]))
    with pytest.raises(AssertionError, match="another law"):
        check_law(_Fixed(one), _Fixed(two * 1.01))


@needs_jax
def test_the_scan_in_jax_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import jax_diffusion

    monkeypatch.setattr(jax_diffusion, "_fastest", lambda candidates, repeats: "forward mode")
    loss, rank, scale, *others = bench_diffusion.jax_arguments(64, 2)
    check_landings(jax_diffusion.EulerMaruyama(loss, rank, scale, *others).step)
    twin = jax_diffusion.EulerMaruyama(loss, rank, 1.01 * scale, *others)
    with pytest.raises(AssertionError, match="the steps differ by"):
        check_landings(twin.step)


@needs_jax
def test_diffrax_takes_the_same_steps() -> None:
    from benchmarks import jax_diffusion

    arguments = bench_diffusion.jax_arguments(64, 2)
    check_landings(jax_diffusion.Diffrax(*arguments).step)
    check_moves(jax_diffusion.Diffrax(*arguments, retracted=False).step)


@needs_jax
def test_diffrax_has_the_law_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its Brownian tree; the scan over a quarter of the time has another law."""
    from benchmarks import jax_diffusion

    monkeypatch.setattr(jax_diffusion, "_fastest", lambda candidates, repeats: "forward mode")
    arguments = bench_diffusion.jax_arguments(512, 8)
    peer = jax_diffusion.Diffrax(*arguments, source="VirtualBrownianTree")
    check_law(jax_diffusion.EulerMaruyama(*arguments), peer)
    twin = jax_diffusion.EulerMaruyama(*arguments[:-1], 0.25 * arguments[-1])
    with pytest.raises(AssertionError, match="another law"):
        check_law(twin, peer)


@needs_jax
def test_the_equation_in_jax_has_the_noise_of_samples() -> None:
    """Drift, and covariance of the noise, at a point of the circle with mixed noise."""
    jax = pytest.importorskip("jax")
    from benchmarks import jax_equation
    from benchmarks.jax_peers import to_jax, to_torch

    problem = problems.mixed_noise_circle()
    y = 1.2 * problem.facts.circle.point(torch.tensor(0.7, dtype=torch.float64))
    sde = LimitingDiffusion(problem)
    factor = sde.g(torch.zeros(()), y[None])[0]
    wanted = sde.f(torch.zeros(()), y[None])[0], factor @ factor.T

    @jax.jit
    def coefficients(tilt: Any, x: Any) -> tuple[Any, Any]:
        loss = jax_equation.mixed_noise_circle(0.5, tilt, 0.6)
        equation = jax_equation.Equation(loss, 3, 1, None, "gradient of a trace")
        frame = equation.frame(x)
        noise = jax.vmap(lambda w: equation.diffusion(frame, w))(jax.numpy.eye(4))
        return equation.drift(x, frame), noise.T @ noise

    def found(tilt: float) -> tuple[Tensor, ...]:
        return tuple(map(to_torch, coefficients(tilt, to_jax(y))))

    torch.testing.assert_close(found(0.3), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found(0.303), wanted, rtol=1e-9, atol=1e-12)


def test_ours_ends_where_it_should() -> None:
    whole = Ours(setting(), "midpoint", 2, 3, clock=True, compiled=False).end(0)
    part = Ours(setting(), "midpoint", 2, 3, clock=True, compiled=False, timed_steps=1)
    assert part.times == [0.0, 0.5 * setting().clock]
    assert whole.shape == (3, 10)
    split = Ours(setting(), "split", 2, 3, clock=False, compiled=False).end(0)
    norm = (setting().trace + (1 - setting().trace) * math.exp(-2)) ** 0.25
    torch.testing.assert_close(split.norm(dim=1), torch.full((3,), norm, dtype=torch.float64))


# Timing, memory, and the picture.


def test_a_peer_timed_on_a_part_of_its_work() -> None:
    assert Timing(1.0, 2.0, 0.5, 0.25, 0.75).with_peer_times(10.0) == Timing(
        1.0, 20.0, 0.05, 0.025, 0.075
    )


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    held = torch.ones(64, 1 << 20)  # 256 MB that the other process does not have
    assert memory_use.peak() > 256.0
    assert 32.0 < memory_use.measured(2, 1) < memory_use.peak()
    assert held.numel() == 1 << 26


def test_the_picture_and_its_numbers(tmp_path: Path) -> None:
    names = [work_precision.scheme_name(m, c) for m, c, _ in work_precision.OURS]
    curves = [
        work_precision.Curve(name, [1.0, 2.0], [1e-2, 1e-3], [0.0, 1e-4 * (k % 2)])
        for k, name in enumerate([*names, *work_precision.PEERS])
    ]
    panels = [(s, curves) for s in work_precision.settings(quick=True)]
    output = tmp_path / "results" / "picture.png"
    work_precision.draw(panels, output)
    assert output.stat().st_size > 10_000
    numbers = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [c["name"] for c in numbers["section 6.1, D = 10"]] == [c.name for c in curves]


def test_the_curves_of_a_problem() -> None:
    here = work_precision.settings(quick=True)[0]
    found = work_precision.curves(here, work_precision.QUICK, compiled=False, jax_there=False)
    assert [c.name for c in found][-1] == "torchsde"
    assert len({c.name for c in found}) == len(work_precision.OURS) + 1
    for curve in found:
        assert len(curve.microseconds) == len(curve.error) == len(curve.spread)
        assert all(value > 0 for value in curve.microseconds)
