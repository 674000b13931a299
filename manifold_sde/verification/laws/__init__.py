"""The laws of the theory, each put to the test by statistics on runs that they share.

The limit theorems of sections 3 and 4 and Theorem 5.5 are tested over short times, from one start;
the equilibrium of section 5 at the end of long runs, from starts that are far apart.
"""

from manifold_sde.verification.check import Check
from manifold_sde.verification.laws import equilibrium, groups, integrators, known_laws, limits

__all__ = ["EQUILIBRIUM", "LIMIT_THEOREMS"]

#: The checks of the limit theorems, in the order in which they are made.
LIMIT_THEOREMS: tuple[Check, ...] = (
    integrators.LEMMA_3_1,
    integrators.LEMMA_4_3,
    limits.SGD_AT_FIXED_RATIO,
    limits.SGD_IN_GENERAL,
    limits.SDE_IN_GENERAL,
    limits.DIFFUSIONS_AT_TWO_RATIOS,
    limits.SGD_WITHOUT_WEIGHT_DECAY,
    limits.SGD_AT_TWO_RATES,
    limits.NORM_LAW,
    limits.EQUILIBRIUM_NORM,
)

#: The checks of the equilibrium, in the order in which they are made.
EQUILIBRIUM: tuple[Check, ...] = (
    known_laws.EXACT_LAW,
    equilibrium.INDEPENDENCE,
    equilibrium.ONE_EQUILIBRIUM,
    equilibrium.MIXED_CHAINS,
    equilibrium.TIME_AVERAGES,
    known_laws.VOLUME_OF_HESSIAN,
    known_laws.NORM_AT_REST,
    equilibrium.SGD_AT_REST,
    groups.EQUILIBRIUM_OF_GROUPS,
)
