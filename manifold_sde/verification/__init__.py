"""Is it true: exact laws, and the statistics that compare samples with them."""

from manifold_sde.verification import exact

__all__ = ["exact"]
