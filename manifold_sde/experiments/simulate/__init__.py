"""The law that the theory predicts for SGD's weights: ``manifold-sde simulate``."""
