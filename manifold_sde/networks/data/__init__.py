"""Data sets of images: scikit-learn's digits, and CIFAR-10 from a folder of the user's."""

from manifold_sde.networks.data.cifar import cifar10
from manifold_sde.networks.data.handwritten import digits
from manifold_sde.networks.data.images import Images

__all__ = ["Images", "cifar10", "digits"]
