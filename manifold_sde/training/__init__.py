"""The training clock: norms, directions and mixing of a network in training."""

from manifold_sde.training.records import Records, directions_of, logits_on, loss_on
from manifold_sde.training.relaxation_time import Relaxation, relaxation

__all__ = ["Records", "Relaxation", "directions_of", "logits_on", "loss_on", "relaxation"]
