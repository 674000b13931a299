"""The training clock: norms, directions and mixing of a network in training."""

from manifold_sde.training.expected import ExpectedClock, expected_clock

__all__ = ["ExpectedClock", "expected_clock"]
