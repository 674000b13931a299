"""Every sample once an epoch: what is drawn, and that exploration stops while norms go on."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from manifold_sde import DirectionDiffusion, Problem, SamplingNoise, WeightDecaySDE, problems, rng
from manifold_sde.errors import ArgumentError, NoiseError
from manifold_sde.noise.sampling import draws
from manifold_sde.solvers import predict_sgd, run_sgd
from manifold_sde.solvers.sgd import _Run
from manifold_sde.verification import verify
from manifold_sde.verification.exact import CircleDiffusion

DIM, PATHS = 6, 200


def circle(noise: SamplingNoise, samples: int) -> Problem:
    """Gradients of the samples on L = |(y_3, ..., y_D)|^2 / 2 that sum to 0 and have trace 1."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(samples, DIM, generator=generator, dtype=torch.float64)
    z = z - z.mean(0)
    square = z.T @ z / samples + 1e-9 * torch.eye(DIM, dtype=torch.float64)  # few samples: singular
    z = z @ torch.linalg.inv(torch.linalg.cholesky(square)).T / DIM**0.5

    def losses(x: Tensor) -> Tensor:
        y = x / (x * x).sum().sqrt()
        return 0.5 * (y[2:] * y[2:]).sum() + z.to(x) @ y

    return Problem(losses, DIM, noise, rank=DIM - 2)


START = torch.eye(DIM, dtype=torch.float64)[0]


def drawn(noise: SamplingNoise, samples: int, steps: Any, paths: int, **options: Any) -> list[Any]:
    """The samples of each of the steps, (b, n)."""
    dtype = options.get("dtype", torch.float64)
    numbers = noise.step_numbers(
        circle(noise, samples).pointwise,
        rng.seed_key(options.get("seed", 0)),
        torch.arange(paths),
        torch.as_tensor(steps),
        dtype,
    )
    return [draws(uniforms, samples) for _, uniforms in numbers]


# What is drawn.


@pytest.mark.parametrize(("batch", "drop_last"), [(1, False), (3, False), (3, True), (4, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_sample_comes_once_an_epoch(batch: int, drop_last: bool, dtype: Any) -> None:
    """Batches are those of a DataLoader; the order is of its own for each path and epoch."""
    samples, epochs, paths = 11, 4, 5
    noise = SamplingNoise(batch, replacement="epoch", drop_last=drop_last)
    loader = torch.utils.data.DataLoader(range(samples), batch, drop_last=drop_last, shuffle=True)
    sizes = [len(b) for b in loader]
    assert noise.batch_sizes(samples) == sizes
    found = drawn(noise, samples, range(epochs * len(sizes)), paths, dtype=dtype)
    assert [len(b) for b in found] == epochs * sizes
    orders = torch.cat(found).reshape(epochs, sum(sizes), paths)
    for order in orders.movedim(-1, 1).reshape(-1, sum(sizes)):
        assert len(order.unique()) == sum(sizes)
    assert len({tuple(o.tolist()) for o in orders.movedim(-1, 1).flatten(0, 1)}) == epochs * paths


def test_a_step_depends_on_seed_path_and_step_alone() -> None:
    noise = SamplingNoise(3, replacement="epoch")
    found = drawn(noise, 11, range(12), 5)
    for step in (0, 3, 4, 11):
        assert torch.equal(drawn(noise, 11, [step], 2)[0], found[step][:, :2])
    # In single precision it is the same order.
    for a, b in zip(found, drawn(noise, 11, range(12), 5, dtype=torch.float32), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(torch.cat(drawn(noise, 11, range(12), 5, seed=1)), torch.cat(found))


ALARM = 1e-4


def p_value(noise: SamplingNoise) -> float:
    """The two batches of an epoch of 5 samples, as sets, against those of torch.randperm.

    30,000 epochs of each; chi-square over the 30 pairs of disjoint batches and the rest in one.
    False alarm 1e-4. Batches independent of each other share no sample in 3 epochs of 10 alone.
    """
    count, sets = 30_000, {pair: i for i, pair in enumerate(itertools.combinations(range(5), 2))}
    generator = torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(5, generator=generator)[:4] for _ in range(count)], 1)
    ours = torch.cat(drawn(noise, 5, range(2), count))

    def cells(order: Tensor) -> list[int]:
        found = [0] * len(sets) ** 2
        for a, b, c, d in order.T.tolist():
            first, second = ((min(p), max(p)) for p in ((a, b), (c, d)))
            found[len(sets) * sets[first] + sets[second]] += 1
        return found

    table = [pair for pair in zip(cells(ours), cells(orders), strict=True) if sum(pair)]
    return float(stats.chi2_contingency(table).pvalue)


def test_batches_have_the_law_of_random_permutations() -> None:
    assert p_value(SamplingNoise(2, replacement="epoch", drop_last=True)) > ALARM


def test_independent_batches_do_not() -> None:
    """Broken twin: without replacement within a batch alone."""

    class Independent(SamplingNoise):
        def step_numbers(self, loss: Any, *arguments: Any) -> Any:
            for _, uniforms in super().step_numbers(loss, *arguments):
                order = uniforms.argsort(stable=True, dim=0)[:2]
                yield uniforms[:0], (order + 0.5) / 5

    assert p_value(Independent(2, replacement=False)) < 1e-9


@pytest.mark.parametrize(
    ("batch", "drop_last", "samples"),
    [(1, False, 4), (2, False, 4), (2, False, 5), (2, True, 5), (4, False, 5), (3, True, 5)],
)
def test_what_is_left_of_an_epoch(batch: int, drop_last: bool, samples: int) -> None:
    """Over all orders: the variance of the sum of an epoch's gradients, and that of its steps."""
    noise = SamplingNoise(batch, replacement="epoch", drop_last=drop_last)
    z = torch.arange(samples, dtype=torch.float64).square()
    z = z - z.mean()
    sums, squares = [], []
    for order in itertools.permutations(range(samples)):
        ends = itertools.pairwise([0, *itertools.accumulate(noise.batch_sizes(samples))])
        means = [z[list(order[i:j])].mean() for i, j in ends]
        sums.append(sum(means))
        squares.append(sum(m**2 for m in means))
    left = torch.tensor(sums).square().mean() / torch.tensor(squares).mean()
    want = float(left)
    assert noise.lasting_share(circle(noise, samples).pointwise) == pytest.approx(want, abs=1e-12)
    assert SamplingNoise(batch).lasting_share(circle(noise, samples).pointwise) == 1.0


# Runs.


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_is_a_plain_loop(drop_last: bool) -> None:
    noise = SamplingNoise(3, replacement="epoch", drop_last=drop_last)
    problem, lr, decay, steps = circle(noise, 11), 0.05, 0.1, 10
    run = run_sgd(problem, START, lr, decay, [0, 5, steps], n_paths=2, seed=4)
    assert run.stats["compiled"] is False
    for path in range(2):
        x = START.clone()
        for step, batch in enumerate(drawn(noise, 11, range(steps), 2, seed=4)):
            gradients = problem.pointwise.sample_gradients(x)
            extra = problem.sgd_noise(x.expand(2, DIM), seed=4, step=step)[path]
            own = gradients[batch[:, path]].mean(0)
            torch.testing.assert_close(own - gradients.mean(0), extra, rtol=1e-10, atol=1e-12)
            x = (1 - lr * decay) * x - lr * own
        torch.testing.assert_close(run.ys[-1, path], x, rtol=1e-10, atol=1e-12)


class Stop(Exception):
    """Stands for a run that is stopped."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_stopped_within_an_epoch_goes_on_with_the_same_bits(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr("manifold_sde.solvers.stopping._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("manifold_sde.solvers.sgd._CHUNK", 16)
    problem = circle(SamplingNoise(3, replacement="epoch"), 11)

    def run(file: Any = None) -> Any:
        return run_sgd(problem, START, 0.05, 0.1, [0, 6, 13], n_paths=20, checkpoint=file)

    whole, writes, save = run(), 0, _Run._save

    def counting(*arguments: Any) -> None:
        nonlocal writes
        save(*arguments)
        writes += 1
        if writes == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_save", counting)
        with pytest.raises(Stop):
            run(tmp_path / "run.ckpt")
    resumed = run(tmp_path / "run.ckpt")
    assert torch.equal(whole.ys, resumed.ys)
    assert torch.equal(whole.clock, resumed.clock)


# What the theory has to say of it.


class PartlyFresh(SamplingNoise):
    """Epochs in which a share of the noise is new at each visit, as augmentation makes it."""

    share = 0.3

    def draw_counts(self, loss: Any) -> tuple[int, int]:
        return self.n_components(loss), self.batch_size

    def stochastic_gradient(self, loss: Any, x: Any, normals: Any, uniforms: Any) -> Tensor:
        mean = loss.gradient(x)
        seen = super().stochastic_gradient(loss, x, normals, uniforms) - mean
        new = self.product(loss, x, normals)
        return mean + math.sqrt(1 - self.share) * seen + math.sqrt(self.share) * new


def explored(noise: SamplingNoise, samples: int, epochs: int) -> tuple[float, float, float, float]:
    """Variance of the angle over s^2 u, its standard error; the mean clock u and norm."""
    problem = circle(noise, samples)
    sizes = noise.batch_sizes(samples)
    number = len(sizes) if len(sizes) > 1 else samples // noise.batch_size
    run = run_sgd(problem, START, 0.05, 0.01, epochs * number, n_paths=PATHS)
    x, u = run.ys[-1], float(run.clock[-1].mean())
    # The mean trace of a step's noise over that of one sample, (Xi - b) / (b (Xi - 1)).
    factor = sum((samples - b) / (b * (samples - 1)) for b in sizes) / len(sizes)
    ratio = float(torch.atan2(x[:, 1], x[:, 0]).var()) / (u / DIM * factor)
    return ratio, ratio * math.sqrt(2 / PATHS), u, float(x.norm(dim=1).mean())


def test_exploration_stops_while_norm_and_clock_go_on() -> None:
    """A ratio of variances over 200 paths has a standard error of 10 %: factors are seen, not more.

    Broken twin: the clock of independent steps for that of epochs.
    """
    iid, error, u, norm = explored(SamplingNoise(1), 32, 15)
    assert abs(iid - 1.0) < 4 * error
    epoch, error, other_u, other_norm = explored(SamplingNoise(1, replacement="epoch"), 32, 15)
    assert 0.0 < epoch < iid / 200
    assert not abs(epoch - 1.0) < 4 * error
    assert other_u == pytest.approx(u, rel=0.02)
    assert other_norm == pytest.approx(norm, rel=0.01)
    fresh, error, other_u, _ = explored(PartlyFresh(1, replacement="epoch"), 32, 15)
    assert abs(fresh - PartlyFresh.share) < 4 * error + epoch
    assert other_u == pytest.approx(u, rel=0.02)


@pytest.mark.parametrize(("batch", "drop_last"), [(9, False), (18, True)])
def test_batches_that_do_not_divide_explore_a_little(batch: int, drop_last: bool) -> None:
    noise = SamplingNoise(batch, replacement="epoch", drop_last=drop_last)
    share = noise.lasting_share(circle(noise, 64).pointwise)
    assert 0.05 < share < 0.6
    ratio, error, _, _ = explored(noise, 64, 40)
    assert abs(ratio - share) < 4 * error + 0.01


def test_the_limits_refuse_it() -> None:
    problem = problems.mixed_noise_circle(noise=SamplingNoise(1, replacement="epoch"))
    y = problem.minimizer
    for make in (
        lambda: DirectionDiffusion(problem),
        lambda: WeightDecaySDE(problem, 0.1, 0.1),
        lambda: predict_sgd(problem, y, 0.01, 0.05, [10], n_paths=2),
        lambda: CircleDiffusion.of(problem),
    ):
        with pytest.raises(NoiseError, match="run_sgd takes this noise as it is") as caught:
            make()
        assert ": 0 of it outlasts an epoch" in caught.value.received
    report = verify(problem, checks=["properties of the noise"])
    assert not report.passed


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="'epoch'"):
        SamplingNoise(2, replacement="epochs")
    with pytest.raises(NoiseError, match="drop_last belongs to epochs"):
        SamplingNoise(2, drop_last=True)
    with pytest.raises(NoiseError, match="smaller than the data"):
        circle(SamplingNoise(8, replacement="epoch"), 8)
    again = SamplingNoise(2, replacement="epoch", drop_last=True)
    assert repr(again) == "SamplingNoise(batch_size=2, replacement='epoch', drop_last=True)"
