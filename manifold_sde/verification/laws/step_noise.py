r"""What the steps of SGD really did: shrinkage and noise, read off a run.

As :math:`\langle x, \nabla L_\xi(x)\rangle = 0`, a step shrinks the weights by
:math:`\langle x_k, x_{k+1}\rangle / \|x_k\|^2`, and what else it does is
:math:`-\eta(\nabla L + \sigma e_k)`, from which :math:`e_k = \sigma^\dagger(\cdot)` follows: the
increment of Z that this step used, as far as sigma shows it. What sigma does not show (its kernel)
is filled up with noise of our own, so that the whole has the covariance that the lemmas speak of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from manifold_sde.errors import NoiseError
from manifold_sde.noise import SamplingNoise
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.laws.engine import Array, mean_and_error, mean_p_value
from manifold_sde.verification.subject import Subject

#: Steps, in as many blocks.
STEPS, BLOCKS = 128, 4
#: Rates: eta / (2 lambda) = 1/10 and 4 eta lambda STEPS = 1, so that R falls from 1 by a third.
LR = math.sqrt(1.0 / (4.0 * STEPS * 5.0))
WEIGHT_DECAY = 5.0 * LR
#: Components of the noise that are tested, at most.
_COMPONENTS = 4
#: Part of the largest eigenvalue of Sigma below which one counts as 0.
_RANK = 1e-10
#: Constant of Berry and Esseen's theorem (Shevtsova 2011).
_BERRY_ESSEEN = 0.4748
#: Largest eta / |x|^2, times lambda_max(H).
STABILITY = 0.2


@dataclass(frozen=True)
class StepNoise:
    """Noise and shrinkage of the steps of a run of SGD.

    Attributes:
        lr: Learning rate.
        weight_decay: Weight decay.
        shrinkage: What each step left of the weights, (K, n).
        increments: e_k as far as sigma shows it, (K, n, m).
        ranks: Rank of sigma, which is the mean of |e_k|^2, (K, n).
        components: Components of e_k, filled up, on directions that the limit of Z has, (K, n, p).
        outside: Largest part of a step's noise that is outside the range of sigma, in units of
            the mean size of the noise.
        gaussian: Whether the steps' noise is normal, as that of (18).
        dimension: Number Xi, or m, of components of Z.
    """

    lr: float
    weight_decay: float
    shrinkage: Tensor
    increments: Tensor
    ranks: Tensor
    components: Tensor
    outside: float
    gaussian: bool
    dimension: int

    @classmethod
    def of(cls, subject: Subject, effort: Effort, runs: int) -> StepNoise:
        """Read off a run of SGD that keeps all its steps; made once for a system under test.

        Raises:
            NoiseError: If there is no noise at the start.
        """
        key = (cls, runs, effort.step_size)
        return subject.once(key, lambda: cls._read_off(subject, effort, runs))

    @classmethod
    def _read_off(cls, subject: Subject, effort: Effort, runs: int) -> StepNoise:
        problem, start = subject.problem, subject.start
        sharpness = float(torch.linalg.eigvalsh(problem.hessian(start))[-1])
        step = min(effort.step_size, STABILITY / sharpness)
        run = subject.run_sgd(
            problem,
            start * math.sqrt(LR / step),
            LR,
            WEIGHT_DECAY,
            list(range(STEPS + 1)),
            n_paths=runs,
            seed=((subject.seed << 8) % 2**63) + 124,
        )
        before, after = run.ys[:-1], run.ys[1:]
        shrinkage = (before * after).sum(-1) / before.square().sum(-1)
        noise = (shrinkage[..., None] * before - after) / LR - problem.gradient(before)
        factor = problem.noise_factor(before)
        values, vectors = torch.linalg.eigh(factor @ factor.mT)
        seen = values > _RANK * values[..., -1:]
        if not bool((values[..., -1] > 0).all()):
            raise NoiseError(
                "the steps of SGD have no noise here",
                received="sigma = 0 on the way",
                expected="noise on the manifold of minimisers",
                remedy="with interpolation SGD stands still, and there is nothing to test",
            )
        inverse = torch.where(seen, 1.0 / values.clamp(min=1e-300), 0.0)
        along = (vectors.mT @ noise[..., None])[..., 0]
        lifted = (vectors @ (inverse * along)[..., None])[..., 0]
        increments = (factor.mT @ lifted[..., None])[..., 0]
        missed = torch.where(seen, 0.0, along).norm(dim=-1) / noise.norm(dim=-1).mean()
        m = factor.shape[-1]
        axes = _axes(subject, m, isinstance(problem.noise, SamplingNoise))
        fill = subject.normals(125, STEPS, runs, m)
        # V V^T of sigma = U S V^T takes from our own noise what sigma shows of it.
        shown = (vectors.mT @ (factor @ fill[..., None]))[..., 0]
        shown = (vectors @ (inverse * shown)[..., None])[..., 0]
        fill = fill - (factor.mT @ shown[..., None])[..., 0]
        return cls(
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            shrinkage=shrinkage,
            increments=increments,
            ranks=seen.sum(-1).to(values),
            components=(increments + fill) @ axes,
            outside=float(missed.max()),
            gaussian=problem.noise.draw_counts(problem.pointwise)[1] == 0,
            dimension=m,
        )

    def blocks(self, weights: Array, variances: Array) -> Tensor:
        """Standardised increments of Z over the blocks, (n, BLOCKS * p).

        Args:
            weights: What the increments of the steps are multiplied by, (K,).
            variances: Variance that the limit gives to each block, (BLOCKS,).
        """
        weighted = self.components * torch.from_numpy(weights)[:, None, None]
        sums = weighted.unflatten(0, (BLOCKS, -1)).sum(1)
        scaled = sums / torch.from_numpy(variances).sqrt()[:, None, None]
        return scaled.movedim(0, 1).flatten(1)


def _axes(subject: Subject, m: int, centred: bool) -> Tensor:
    """Orthonormal directions (m, p) of Z's limit: of all of R^m, or of what is orthogonal to 1."""
    count = min(_COMPONENTS, m - 1 if centred else m)
    directions = subject.normals(126, m, count)
    if centred:
        directions = directions - directions.mean(0)
    axes: Tensor = torch.linalg.qr(directions)[0]
    return axes


def tests_of_sums(noise: StepNoise, sums: Array, steps: int) -> dict[str, float]:
    """P-values of what the sums over blocks of steps have to be: standard normals, independent.

    Args:
        noise: The noise of the steps.
        sums: Standardised sums (n, q): rows are runs, columns blocks and components.
        steps: Steps in a block.

    Returns:
        P-values by name. Those of mean, variances and correlations are exact for normal noise;
        that of normality allows what Berry and Esseen's theorem allows to sums of other noise.
    """
    n, q = sums.shape
    # Sums of noise with heavier tails have squares that spread more, like fewer normals.
    heavy = 0.0 if noise.gaussian else float(_excess(noise).clamp(min=0.0)) / steps
    share = 2.0 / (2.0 + heavy)
    found = {
        "mean": float(stats.chi2.sf(n * (sums.mean(0) ** 2).sum(), q)),
        "quadratic variation": _squares(float((sums**2).sum()), n * q, share),
        "covariance": _covariance(sums, share),
    }
    gap = float(stats.kstest(sums.ravel(), "norm").statistic)
    allowed = 0.0
    if not noise.gaussian:
        third = float(noise.components.abs().pow(3).mean((0, 1)).max())
        allowed = _BERRY_ESSEEN * third / math.sqrt(steps)
    beyond = gap - allowed
    found["normality"] = 1.0 if beyond <= 0.0 else float(stats.kstwo.sf(beyond, n * q))
    return found


def tests_of_steps(noise: StepNoise) -> dict[str, float]:
    """P-values of the noise of single steps: its size, and that none of it is drawn twice."""
    e, ranks = noise.increments, noise.ranks
    wanted = ranks.mean(0)
    mean, error = mean_and_error((e.square().sum(-1).mean(0) - wanted).numpy())
    rounding = 1e-7 * float(wanted.mean())
    mean = 0.0 if abs(mean) <= rounding else mean
    return {
        "size of the steps' noise": mean_p_value(mean, error, rounding=rounding),
        "independence of runs": _most_alike(e.movedim(1, 0).flatten(1), ranks.sum(0)),
        "independence of steps": _most_alike(e.flatten(1), ranks.sum(1)),
    }


def _two_sided(law: stats.rv_frozen, value: float) -> float:
    return float(min(1.0, 2.0 * min(law.sf(value), law.cdf(value))))


def _squares(total: float, count: int, share: float) -> float:
    """P-value of a sum of squares of standard normals, or of sums with heavier tails."""
    return _two_sided(stats.chi2(count * share), total * share)


def _excess(noise: StepNoise) -> Tensor:
    """Largest excess kurtosis of the components of a step."""
    fourth = noise.components.pow(4).mean((0, 1))
    return (fourth / noise.components.square().mean((0, 1)).square() - 3.0).max()


def _covariance(sums: Array, share: float) -> float:
    """Smallest p-value of all variances and correlations, times their number."""
    n, q = sums.shape
    variances = [_squares(float(v), n, share) for v in (sums**2).sum(0)]
    sizes = np.sqrt((sums**2).sum(0))
    correlations = ((sums.T @ sums) / np.outer(sizes, sizes))[np.triu_indices(q, 1)]
    strongest = float(np.abs(correlations).max()) if len(correlations) else 0.0
    t = strongest * math.sqrt((n - 1) / max(1.0 - strongest**2, 1e-300))
    count = len(correlations) + q
    return float(min(1.0, count * min(*variances, float(2.0 * stats.t.sf(t, n - 1)))))


def _most_alike(rows: Tensor, ranks: Tensor) -> float:
    """P-value of the largest correlation of two rows of independent noise.

    Args:
        rows: Rows (a, b).
        ranks: Number of independent components in each row, (a,).
    """
    sizes = rows.norm(dim=1)
    products = rows @ rows.T / (sizes[:, None] * sizes[None]).clamp(min=1e-300)
    products.fill_diagonal_(0.0)
    largest = float(products.abs().max())
    pairs = len(rows) * (len(rows) - 1) / 2
    z = largest * math.sqrt(float(ranks.min()))
    return float(min(1.0, pairs * 2.0 * stats.norm.sf(z)))
