r"""The long-run variance of updates whose size does not follow the gradient's.

Such an optimizer moves x by η d, where d has a size of its own. Over many steps the direction
moves as if the updates were independent, of variance U^2 summed over the coordinates:

.. math::

    v = \ln\Bigl(1 + \frac{U^2}{\|x_0\|^2} \sum_j \eta_j^2 / a_{j+1}^2\Bigr), \qquad
    dv = \eta^2 U^2 / \|x\|^2, \qquad \|x\|^2_{eq} = \eta U^2 / (2\lambda).

U^2 is not |d|^2: updates next to each other are alike, and the clock read off the rotation of
single steps is 13 times (sign of a momentum of .9) to 46 times (Lion) too slow. The functions here
give U^2 by the number D of coordinates, for gradients of independent noise.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import Array

_MUON_SIDE, _MUON_DRAWS = 24, 48
_SHORT_TAIL = 1e-9


def adam_variance(
    betas: tuple[float, float],
    *,
    kurtosis: float = 3.0,
    noise_share: float = 1.0,
) -> float:
    """U^2 / D of Adam and AdamW.

    v of the optimizer follows the gradients, so that large ones are divided by more.

    Args:
        betas: Both betas.
        kurtosis: Kurtosis of a coordinate of the gradient, 3 if it is Gaussian.
        noise_share: Share f of E g^2 that is noise, the rest being the square of a mean that stays
            for much longer than v remembers; on shorter times it is f itself.

    Raises:
        ArgumentError: If (kurtosis - 1)(1 - beta2) > .3, where the expansion fails.

    Source: second order in 1 - beta2 (.9806(98) and .9901 measured, .9900 expected); with signal,
    of the order 0 in 1 - beta2 (.1966(20) measured, .1875 expected at f = .5).

    >>> round(adam_variance((0.9, 0.999)), 4), round(adam_variance((0.9, 0.95)), 3)
    (0.999, 0.978)
    """
    first, second = betas
    excess = (kurtosis - 1.0) * (1.0 - second)
    if excess > 0.3:
        raise ArgumentError(
            "the size of Adam's updates is not known for gradients of such heavy tails",
            received=f"(kurtosis - 1)(1 - beta2) = {excess:.3g}",
            expected="at most 0.3",
            remedy="a larger beta2; or measure the clock on the run with MixingClock",
        )
    lag = (1.0 - first) / (1.0 - first * second)
    turn = (1.0 - first) * (1.0 + first * second) / ((1.0 + first) * (1.0 - first * second))
    noise = 1.0 - excess * (lag - (3.0 + turn) / (4.0 * (1.0 + second)))
    f = noise_share
    return noise * (f**3 + (kurtosis - 1.0) * (1.0 - f) * f**2 / 4.0 if f < 1.0 else 1.0)


def signum_variance(momentum: float) -> float:
    """U^2 / D of the sign of a running average: 1 for the sign of the gradient itself.

    Source: exact for Gaussian noise (arcsine law); about 2 ln 2 / (-ln β).

    >>> round(signum_variance(0.9), 2), signum_variance(0.0)
    (13.28, 1.0)
    """
    if momentum == 0.0:
        return 1.0
    lags = np.arange(1, 1 + math.ceil(math.log(_SHORT_TAIL) / math.log(momentum)))
    return 1.0 + 4.0 / math.pi * float(np.arcsin(momentum**lags).sum())


def lion_variance(betas: tuple[float, float]) -> float:
    """U^2 / D of Lion.

    Source: exact for Gaussian noise: the sign of an average with the weights 1 - beta1 for the
    newest gradient and beta1 (1 - beta2) beta2^(j-1) for the j-th before it.

    >>> round(lion_variance((0.9, 0.99)), 2), round(lion_variance((0.95, 0.98)), 2)
    (45.93, 58.08)
    """
    first, second = betas
    size = math.ceil(math.log(_SHORT_TAIL) / math.log(second)) if second > 0.0 else 1
    lags = np.arange(1, size + 1)
    own, past = 1.0 - first, first * (1.0 - second)
    square = own**2 + past**2 / (1.0 - second**2)
    shared = past * second ** (lags - 1.0) * (own + past * second / (1.0 - second**2))
    return 1.0 + 4.0 / math.pi * float(np.arcsin(shared / square).sum())


def averaged_variance(momentum: float) -> float:
    """U^2 of a running average divided by its own norm, (1 + β)/(1 - β) (LAMB, Hyperball).

    Source: exact as D grows.
    """
    return (1.0 + momentum) / (1.0 - momentum)


@functools.lru_cache(maxsize=64)
def muon_variance(shape: tuple[int, int], momentum: float) -> float:
    """U^2 of Muon on a matrix: the polar factor of a running average.

    U^2 = min(p, q) (1 + 2 sum_l f(β^l)), where f(ρ) = E tr(O O') / min(p, q) for the polar factors
    of two Gaussian matrices of correlation ρ. f depends on the ratio of the sides; it is measured
    on small matrices of that ratio, from a fixed seed.

    Args:
        shape: The matrix's.
        momentum: β of the running average.

    Source: about 2 % (square: 14.7 min at β = .9, and not (1 + β)/(1 - β) = 19).
    """
    short, long = sorted(shape)
    ratio = long / short
    small = min(short, _MUON_SIDE)
    rng = np.random.default_rng(20220)
    nodes = np.sin(np.linspace(0.0, math.pi / 2.0, 9))
    pairs = rng.standard_normal((2, _MUON_DRAWS, round(small * ratio), small))

    def polar(z: Array) -> Array:
        left, _, right = np.linalg.svd(z, full_matrices=False)
        return np.asarray(left @ right)

    ahead = polar(pairs[0])
    alike = [
        float((ahead * polar(c * pairs[0] + math.sqrt(1.0 - c * c) * pairs[1])).sum())
        / (_MUON_DRAWS * small)
        for c in nodes[1:-1]
    ]
    values = np.array([0.0, *alike, 1.0])
    # f is odd and smooth up to ρ near 1: an odd polynomial through both ends.
    odd = np.stack([nodes**j - nodes for j in (3, 5, 7)], axis=1)
    fitted, *_ = np.linalg.lstsq(odd, values - nodes, rcond=None)
    if momentum == 0.0:
        return float(short)
    lags = np.arange(1, 1 + math.ceil(math.log(_SHORT_TAIL) / math.log(momentum)))
    c = momentum**lags
    f = c + sum(w * (c**j - c) for w, j in zip(fitted, (3, 5, 7), strict=True))
    return float(short * (1.0 + 2.0 * f.sum()))


def average_norm(lr: float, weight_decay: float, average: float) -> float:
    """Squared norm of an exponential moving average of the weights, relative to theirs.

    Args:
        lr: Learning rate.
        weight_decay: Weight decay.
        average: α of the average, near 1; its clock runs α / (1 - α) steps behind.

    Raises:
        ArgumentError: If ηλ / (1 - α) > .1: the average is over weights that have turned.

    Source: exact for pure noise in equilibrium, otherwise a lower bound.

    >>> round(average_norm(0.1, 0.01, 0.99), 3)
    0.91
    """
    turned = lr * weight_decay / (1.0 - average)
    if turned > 0.1:
        raise ArgumentError(
            "the moving average of the weights is over directions that have turned",
            received=f"lr * weight_decay / (1 - average) = {turned:.3g}",
            expected="at most 0.1",
            remedy="a shorter average",
        )
    kept = math.exp(-lr * weight_decay)
    alone = (1.0 - average) * (1.0 + average * kept)
    return alone / ((1.0 + average) * (1.0 - average * kept))
