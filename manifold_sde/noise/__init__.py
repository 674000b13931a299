"""The gradient noise of SGD: what each step adds to the gradient, and its factor sigma."""

from manifold_sde.noise.base import Noise
from manifold_sde.noise.custom import CustomNoise
from manifold_sde.noise.label import LabelNoise
from manifold_sde.noise.sampling import SamplingNoise
from manifold_sde.noise.spherical import SphericalNoise

__all__ = ["CustomNoise", "LabelNoise", "Noise", "SamplingNoise", "SphericalNoise"]
