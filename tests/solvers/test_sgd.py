"""SGD itself: exact relations path by path, the norm law, and bad input."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    TimeScale,
    problems,
)
from manifold_sde.errors import (
    ArgumentError,
    DTypeError,
    LostPathsWarning,
    NonFiniteError,
    ShapeError,
    TimeScaleError,
    ZeroVectorError,
)
from manifold_sde.solvers import run_sgd

F64 = torch.float64


def residual_problem(noise) -> LeastSquaresProblem:
    """A least-squares problem with curved residuals, not at interpolation off its minimiser."""
    generator = torch.Generator().manual_seed(3)
    linear = torch.randn(4, 6, generator=generator, dtype=F64)
    quadratic = torch.randn(4, 6, 6, generator=generator, dtype=F64) / 6

    def residuals(x):
        u = x / x.norm()
        return linear.to(x) @ u + torch.einsum("kij,i,j->k", quadratic.to(x), u, u) - 0.3

    return LeastSquaresProblem(residuals, 6, noise, name="curved residuals")


def twisted(x):
    """A factor of degree -1 with sigma^T x = 0 that is no gradient."""
    u = x / x.norm()
    shift = torch.roll(torch.eye(6, dtype=x.dtype), 1, 0)
    columns = (shift - shift.T) @ torch.diag(1.0 + u**2)
    return 0.1 * (columns - u[:, None] * (u @ columns)) / x.norm()


NOISES = [
    SphericalNoise(0.3),
    SamplingNoise(),
    SamplingNoise(3),
    SamplingNoise(2, replacement=False),
    LabelNoise(0.4, 2),
    CustomNoise(twisted),
]


def plain_sgd(problem, x0, lrs, decays, seed, path):
    """SGD for one path in a plain loop, with the same noise: the independent twin."""
    x = x0.clone()
    states = [x]
    for k, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
        batch = x.expand(path + 1, -1)
        noise = problem.sgd_noise(batch, seed=seed, step=k)[path]
        x = (1 - lr * decay) * x - lr * (problem.gradient(x) + noise)
        states.append(x)
    return torch.stack(states)


class TestStep:
    @pytest.mark.paper("Equation (1)", "Equation (2)", "Equation (18)")
    @pytest.mark.parametrize("noise", NOISES, ids=repr)
    def test_agrees_with_a_plain_loop(self, noise):
        problem = residual_problem(noise)
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        lrs = [0.1, 0.05, 0.2, 0.1, 0.02, 0.3]
        decays = [0.1, 0.0, 0.2, 0.3, 0.1, 0.05]
        run = run_sgd(problem, x0, lrs, decays, range(7), n_paths=5, seed=11, compile=False)
        for path in (0, 4):
            twin = plain_sgd(problem, x0, lrs, decays, 11, path)
            torch.testing.assert_close(run.ys[:, path], twin, rtol=1e-12, atol=1e-13)

    def test_clock_is_that_of_the_states(self):
        problem = residual_problem(SphericalNoise(0.3))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        lrs, decays = np.linspace(0.1, 0.3, 20), np.linspace(0.2, 0.1, 20)
        run = run_sgd(problem, x0, lrs, decays, range(21), n_paths=3, compile=False)
        norms = run.norms[:-1].numpy()
        steps = lrs[:, None] ** 2 / ((1 - lrs * decays)[:, None] ** 2 * norms**4)
        np.testing.assert_allclose(run.clock[1:], np.cumsum(steps, axis=0), rtol=1e-12)
        assert (run.clock[0] == 0).all()

    def test_the_gradient_has_no_radial_part(self):
        # ||x_{k+1}||^2 = (1 - eta lambda)^2 ||x_k||^2 + eta^2 ||g_k||^2: never below the first.
        problem = residual_problem(SamplingNoise())
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        run = run_sgd(problem, x0, 0.3, 0.2, range(50), n_paths=8, compile=False)
        shrunk = (1 - 0.3 * 0.2) * run.ys[:-1]
        gradients = run.ys[1:] - shrunk
        radial = (gradients * run.ys[:-1]).sum(-1)
        assert radial.abs().max() < 1e-13


def assert_equation_9(problem, lr, decay, seed):
    """Equation (9): the same directions at (sqrt(eta lambda), sqrt(eta lambda)), same samples."""
    x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
    scale, factor = TimeScale(lr, decay).reparametrised()
    rates = (scale.lr, scale.weight_decay)
    one = run_sgd(problem, x0, lr, decay, 30, n_paths=3, seed=seed, compile=False)
    other = run_sgd(problem, factor * x0, *rates, 30, n_paths=3, seed=seed, compile=False)
    torch.testing.assert_close(one.directions, other.directions, rtol=0, atol=1e-11)
    torch.testing.assert_close(factor * one.norms, other.norms, rtol=1e-11, atol=0)


class TestReparametrisation:
    @pytest.mark.paper("Equation (9)")
    @hypothesis.given(
        lr=st.floats(1e-3, 0.5), decay=st.floats(1e-3, 0.5), seed=st.integers(0, 2**32)
    )
    @hypothesis.settings(max_examples=15, deadline=None)
    def test_equation_9_path_by_path(self, lr, decay, seed):
        assert_equation_9(residual_problem(SamplingNoise()), lr, decay, seed)

    def test_a_loss_that_is_not_quite_scale_invariant_is_rejected(self):
        def residuals(x):
            u = x / (x * x).sum().add(1e-3).sqrt()
            return u[:3] - 0.5

        problem = LeastSquaresProblem(residuals, 6, SphericalNoise(0.3))
        with pytest.raises(AssertionError):
            assert_equation_9(problem, 0.01, 0.3, 0)

    @pytest.mark.paper("Remark 3.3")
    @hypothesis.given(
        lrs=st.lists(st.floats(1e-3, 0.5), min_size=25, max_size=25),
        decays=st.lists(st.floats(0.0, 0.8), min_size=25, max_size=25),
        noise=st.sampled_from(NOISES),
    )
    @hypothesis.settings(max_examples=15, deadline=None)
    def test_weight_decay_is_an_effective_learning_rate(self, lrs, decays, noise):
        problem = residual_problem(noise)
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        scale = TimeScale(lrs, decays)
        effective = scale.effective_lr(np.arange(25))
        kept = [5, 25]
        decayed = run_sgd(problem, x0, lrs, decays, kept, n_paths=3, compile=False)
        plain = run_sgd(problem, x0, effective, 0.0, kept, n_paths=3, compile=False)
        shrinkage = torch.as_tensor(scale.shrinkage(np.array(kept)))[:, None]
        torch.testing.assert_close(
            decayed.ys / shrinkage[..., None], plain.ys, rtol=1e-9, atol=1e-10
        )
        # The clock is the same, for it does not see how the norm came about.
        torch.testing.assert_close(decayed.clock, plain.clock, rtol=1e-9, atol=0)

    def test_a_wrong_effective_learning_rate_is_rejected(self):
        problem = residual_problem(SphericalNoise(0.3))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        lrs, decays = np.full(25, 0.2), np.full(25, 0.3)
        scale = TimeScale(list(lrs), list(decays))
        shrinkage = scale.shrinkage(np.arange(26))
        wrong = lrs / shrinkage[:-1] ** 2
        decayed = run_sgd(problem, x0, lrs, decays, 25, n_paths=3, compile=False)
        plain = run_sgd(problem, x0, wrong, 0.0, 25, n_paths=3, compile=False)
        assert (decayed.directions - plain.directions).abs().max() > 1e-3


class TestNormLaw:
    """Equation (10), for constant trace, at two learning rates.

    False-alarm rate below 1e-4: the standard error is multiplied by 4.5, and the bias of SGD
    against the limit, O(eta / |x|^2), is allowed for with the constant 1. The fault that has to
    be found is a trace of D in place of D - 1, or a decay of e^{-2 eta lambda t}.
    """

    @staticmethod
    def deviation(lr: float, trace: float, rate: float = 4.0) -> tuple[float, float]:
        """Mean of |x|^4 against (10), relative, and what is allowed."""
        decay, steps = 0.05, int(0.75 / (lr * 0.05))
        problem = problems.great_sphere(8, 0.5)
        run = run_sgd(problem, problem.minimizer, lr, decay, steps, n_paths=400, compile=False)
        fourth = run.norms[-1] ** 4
        rest = lr * trace / (2 * decay)
        expected = rest + math.exp(-rate * lr * decay * steps) * (1 - rest)
        error = float(fourth.std() / 400**0.5) / expected
        return abs(float(fourth.mean()) / expected - 1), 4.5 * error + lr / math.sqrt(expected)

    @pytest.mark.paper("Equation (10)")
    @pytest.mark.parametrize("lr", [0.02, 0.01])
    def test_holds(self, lr):
        deviation, allowed = self.deviation(lr, trace=0.25 * 7)
        assert deviation < allowed

    @pytest.mark.parametrize("wrong", [{"trace": 0.25 * 8}, {"trace": 0.25 * 7, "rate": 2.0}])
    def test_rejects_a_wrong_law(self, wrong):
        deviation, allowed = self.deviation(0.02, **wrong)
        assert deviation > allowed

    def test_time_scale_states_the_same_law(self):
        expected = TimeScale(0.02, 0.5).norm(30.0, initial_norm=1.0, noise_trace=1.75) ** 4
        rest = 0.02 * 1.75
        assert expected == pytest.approx(rest + math.exp(-4 * 0.01 * 30) * (1 - rest), rel=1e-13)


class TestIndependenceOfTheBatch:
    def test_a_path_is_the_same_among_more(self):
        problem = residual_problem(SamplingNoise(2))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        few = run_sgd(problem, x0, 0.2, 0.1, [10, 40], n_paths=3, compile=False)
        many = run_sgd(problem, x0, 0.2, 0.1, [10, 40], n_paths=100, compile=False)
        torch.testing.assert_close(few.ys, many.ys[:, :3], rtol=1e-12, atol=1e-13)

    def test_chunks_do_not_show(self, monkeypatch):
        problem = residual_problem(SphericalNoise(0.2))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        whole = run_sgd(problem, x0, 0.2, 0.1, [3, 20], n_paths=50, compile=False)
        monkeypatch.setattr("manifold_sde.solvers.sgd._CHUNK", 16)
        parts = run_sgd(problem, x0, 0.2, 0.1, [3, 20], n_paths=50, compile=False)
        torch.testing.assert_close(whole.ys, parts.ys, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(whole.clock, parts.clock, rtol=1e-12, atol=0)

    def test_what_is_kept_does_not_matter(self):
        problem = residual_problem(SphericalNoise(0.2))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        rare = run_sgd(problem, x0, 0.2, 0.1, [30], n_paths=4, compile=False)
        often = run_sgd(problem, x0, 0.2, 0.1, range(31), n_paths=4, compile=False)
        assert torch.equal(rare.ys[-1], often.ys[-1])
        assert torch.equal(often.ys[0], x0.expand(4, -1))

    def test_seeds_and_paths_differ(self):
        problem = residual_problem(SphericalNoise(0.2))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        one = run_sgd(problem, x0, 0.2, 0.1, 5, n_paths=40, seed=1, compile=False).ys[-1]
        two = run_sgd(problem, x0, 0.2, 0.1, 5, n_paths=40, seed=2, compile=False).ys[-1]
        apart = torch.cdist(torch.cat([one, two]), torch.cat([one, two]))
        assert (apart + torch.eye(80, dtype=F64)).min() > 1e-6


@pytest.mark.compile
class TestCompiled:
    @pytest.mark.parametrize("noise", [SphericalNoise(0.3), SamplingNoise(2)], ids=repr)
    def test_agrees_with_the_plain_run(self, noise):
        problem = residual_problem(noise)
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        schedule = [0.2 / (1 + k) for k in range(40)]
        plain = run_sgd(problem, x0, schedule, 0.1, [0, 7, 40], n_paths=20, compile=False)
        fast = run_sgd(problem, x0, schedule, 0.1, [0, 7, 40], n_paths=20, compile=True)
        assert fast.stats["compiled"]
        torch.testing.assert_close(plain.ys, fast.ys, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(plain.clock, fast.clock, rtol=1e-11, atol=0)

    def test_paths_are_bit_for_bit_the_same_in_any_company(self):
        problem = residual_problem(SphericalNoise(0.3))
        x0 = torch.linspace(1.0, 2.0, 6, dtype=F64)
        few = run_sgd(problem, x0, 0.2, 0.1, 50, n_paths=3, compile=True)
        many = run_sgd(problem, x0, 0.2, 0.1, 50, n_paths=100, compile=True)
        assert torch.equal(few.ys, many.ys[:, :3])


class TestShapes:
    def test_one_path_has_no_path_dimension(self):
        problem = problems.great_circle()
        run = run_sgd(problem, problem.minimizer, 0.1, 0.1, [0, 5], compile=False)
        assert run.ys.shape == (2, 3)
        assert run.clock.shape == (2,)

    def test_one_path_asked_for_has_one(self):
        problem = problems.great_circle()
        run = run_sgd(problem, problem.minimizer, 0.1, 0.1, 5, n_paths=1, compile=False)
        assert run.ys.shape == (1, 1, 3)

    def test_a_start_for_each_path(self):
        problem = problems.great_circle()
        starts = torch.eye(3, dtype=F64) + 0.1
        run = run_sgd(problem, starts, 0.1, 0.1, [0, 5], compile=False)
        assert run.ys.shape == (2, 3, 3)
        assert torch.equal(run.ys[0], starts)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_is_kept(self, dtype):
        problem = problems.great_circle()
        run = run_sgd(problem, problem.minimizer.to(dtype), 0.1, 0.1, 5, n_paths=2, compile=False)
        assert run.ys.dtype == dtype
        assert torch.isfinite(run.ys).all()

    def test_single_precision_stays_near_double(self):
        problem = problems.great_circle(noise=CustomNoise(tiny_noise))
        x0 = torch.tensor([1.0, 0.0, 0.5], dtype=F64)
        double = run_sgd(problem, x0, 0.1, 0.1, 100, compile=False).ys
        single = run_sgd(problem, x0.float(), 0.1, 0.1, 100, compile=False).ys
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)

    def test_a_path_that_blows_up_is_counted_and_said(self):
        problem = problems.great_circle(noise=CustomNoise(exploding))
        kept = [0, 1, 20, 50]
        with pytest.warns(LostPathsWarning, match="3 of 3 runs .* of step 20") as said:
            run = run_sgd(problem, problem.minimizer, 0.1, 0.1, kept, n_paths=3, compile=False)
        assert run.stats["non_finite_paths"] == 3
        assert said[0].filename == __file__
        assert not torch.isfinite(run.ys[2:]).any()


def tiny_noise(x):
    """Noise of 1e-6: single and double precision draw different normals."""
    return 1e-6 * torch.eye(3, dtype=x.dtype)


def exploding(x):
    """A noise that grows with the square of the norm."""
    return 1e3 * (x * x).sum() * torch.eye(3, dtype=x.dtype)


class TestBadInput:
    problem = problems.great_circle()
    good = torch.tensor([1.0, 0.0, 0.0], dtype=F64)

    def run(self, x0=good, lr=0.1, decay=0.1, steps=3, **options):
        return run_sgd(self.problem, x0, lr, decay, steps, compile=False, **options)

    @pytest.mark.parametrize(
        ("x0", "error"),
        [
            (torch.ones(4, dtype=F64), ShapeError),
            (torch.zeros(3, dtype=F64), ZeroVectorError),
            (torch.tensor([1.0, math.nan, 0.0]), NonFiniteError),
            (torch.ones(3, dtype=torch.int64), DTypeError),
            (["1", "0", "0"], DTypeError),
            (torch.ones(2, 2, 3, dtype=F64), ArgumentError),
        ],
    )
    def test_start(self, x0, error):
        with pytest.raises(error) as caught:
            self.run(x0)
        assert caught.value.received
        assert caught.value.remedy

    @pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "fast", 1j])
    def test_learning_rate(self, lr):
        with pytest.raises(TimeScaleError, match="lr"):
            self.run(lr=lr)

    @pytest.mark.parametrize("decay", [-0.1, math.nan, "some"])
    def test_weight_decay(self, decay):
        with pytest.raises(TimeScaleError, match="weight_decay"):
            self.run(decay=decay)

    def test_weight_decay_that_turns_the_weights_round(self):
        with pytest.raises(TimeScaleError, match="lr \\* weight_decay"):
            self.run(lr=10.0, decay=0.2)

    def test_a_schedule_that_ends(self):
        with pytest.raises(TimeScaleError, match="ends before"):
            self.run(lr=[0.1, 0.1])

    def test_a_schedule_that_breaks(self):
        with pytest.raises(TimeScaleError, match="step 2"):
            self.run(lr=lambda k: 0.1 if k < 2 else math.nan)

    @pytest.mark.parametrize(
        "steps", [[], [3, 2], [1, 1], -1, 1.5, [0, 1.5], "many", None, [True], 2**48]
    )
    def test_steps(self, steps):
        with pytest.raises(ArgumentError, match="steps"):
            self.run(steps=steps)

    @pytest.mark.parametrize("n_paths", [0, -1, 2.0, True, "60"])
    def test_number_of_paths(self, n_paths):
        with pytest.raises(ArgumentError, match="n_paths"):
            self.run(n_paths=n_paths)

    def test_starts_and_number_of_paths_disagree(self):
        with pytest.raises(ArgumentError, match="n_paths=3"):
            self.run(torch.ones(2, 3, dtype=F64), n_paths=3)

    @pytest.mark.parametrize("seed", [-1, 1.0, 2**64, "seed", True])
    def test_seed(self, seed):
        with pytest.raises(ArgumentError, match="seed"):
            self.run(seed=seed)

    def test_mode_of_compiling(self):
        with pytest.raises(ArgumentError, match="compil"):
            run_sgd(self.problem, self.good, 0.1, 0.1, 3, compile="fast")

    def test_not_a_problem(self):
        with pytest.raises(DTypeError, match="problem"):
            run_sgd(lambda x: x.sum(), self.good, 0.1, 0.1, 3)  # type: ignore[arg-type]


def test_a_scalar_loss_has_no_sampling_noise():
    from manifold_sde.errors import NoiseError

    with pytest.raises(NoiseError, match="samples"):
        Problem(lambda x: (x[0] / x.norm()) ** 2, 3, SamplingNoise())


def test_two_runs_of_one_problem_at_once() -> None:
    """In threads: each has its own rates, whoever is interrupted."""
    problem = problems.great_circle(noise_scale=0.3)

    def run(lr: float) -> Tensor:
        return run_sgd(problem, problem.minimizer, lr, 0.05, 400, n_paths=8, compile=True).ys

    rates = (1e-2, 2e-2, 3e-2, 4e-2)
    alone = [run(lr) for lr in rates]
    with ThreadPoolExecutor(len(rates)) as executor:
        together = list(executor.map(run, rates))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
