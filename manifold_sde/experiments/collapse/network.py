"""The network, its digits, its minimiser, and the test functions that are followed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError, LimitMapError, PartialError
from manifold_sde.experiments.experiment import Array
from manifold_sde.experiments.settings.collapse import PIXELS, Settings
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.near_limit import flow_steps, near_limit
from manifold_sde.networks import NormalizedMLP
from manifold_sde.networks.data import digits
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import Problem
from manifold_sde.solvers.step_sizes import STABLE

#: Test functions, and how they are called in words.
FUNCTIONS = {
    "cosine": "cosine with the start",
    "accuracy": "test accuracy",
    "log_pdet": "log pdet H",
    "trace": "tr H",
    "smallest_group": "smallest share of a layer's norm",
}
#: What is recorded beside them: the largest eigenvalue of H at norm 1.
SHARPNESS = "sharpness"
_TRAINING_STEPS = 1000
#: Loss, relative to that of outputs 0, up to which training is on its way to loss 0.
_TRAINED = 1e-5


@dataclass(frozen=True)
class Task:
    """What SGD is run on.

    Attributes:
        problem: The network on its digits, least squares, with the noise of (18) of trace 1.
        geometry: Its geometry, by products.
        start: A minimiser of norm 1, (D,).
        rank: Rank of the Hessian there.
        module: A module of the same kind, into which weights are loaded.
        images, labels: What the test accuracy is measured on.
        layers: Names of the hidden layers, which the loss can be scaled by separately.
        flow: Steps of gradient flow that bring SGD's weights onto the manifold.
    """

    problem: Problem
    geometry: Geometry
    start: Tensor
    rank: int
    module: nn.Module
    images: Tensor
    labels: Tensor
    layers: tuple[str, ...]
    flow: tuple[float, ...]

    @torch.no_grad()
    def evaluate(self, points: Tensor) -> dict[str, Array]:
        """The test functions at minimisers (n, D), of their directions: (n,) each."""
        directions = points / points.norm(dim=1, keepdim=True)
        products = self.geometry.products
        assert products is not None
        values = products.eigenvalues(directions)[:, -self.rank :]
        shares = [self.problem.part(directions, name).norm(dim=1) for name in self.layers]
        found = {
            "cosine": directions @ self.start,
            "accuracy": torch.stack([self._accuracy(point) for point in directions]),
            "log_pdet": values.log().sum(1),
            "trace": values.sum(1),
            "smallest_group": torch.stack(shares).amin(0),
            SHARPNESS: values[:, -1],
        }
        return {name: value.numpy() for name, value in found.items()}

    def _accuracy(self, point: Tensor) -> Tensor:
        self.problem.load_into(self.module, point)
        right = self.module(self.images).argmax(1) == self.labels
        return right.to(point.dtype).mean()

    def onto_manifold(self, x: Tensor) -> tuple[Tensor, int]:
        """Phi of weights of SGD (n, D), to plotting accuracy, and how many needed the limit map.

        Raises:
            LimitMapError: If the limit map does not arrive either.
        """
        try:
            return near_limit(self.geometry, x, self.flow), 0
        except PartialError as error:
            failed, partial = error.failed, error.partial
            if failed is None or partial is None:
                raise
        points = partial.clone()
        points[failed] = self.geometry.limit_map(x[failed])
        return points, int(failed.sum())


def make_task(settings: Settings) -> Task:
    """The task of these settings; made once, as making a problem checks its derivatives.

    Raises:
        ArgumentError: If the learning rates are too large for the curvature at the start.
        LimitMapError: If training finds no minimiser.
        MissingDependencyError: If scikit-learn, which has the digits, is not installed.
    """
    task = _task(
        settings.widths,
        settings.n_samples,
        settings.head_scale,
        settings.test_images,
        settings.network_seed,
    )
    sharpness = float(task.evaluate(task.start[None])[SHARPNESS][0])
    largest = settings.largest_step * sharpness
    if largest >= STABLE:
        raise ArgumentError(
            "SGD is unstable at these rates",
            received=f"eta / |x|^2 up to {settings.largest_step:.3g}, times the largest "
            f"eigenvalue {sharpness:.3g} of H at norm 1: {largest:.3g}",
            expected=f"below {STABLE:g}, and small for a good agreement with the diffusion",
            remedy="smaller learning rates or weight decays, or a smaller head_scale",
        )
    return task


@functools.lru_cache(maxsize=2)
def _task(
    widths: tuple[int, ...], n_samples: int, head_scale: float, test_images: int, seed: int
) -> Task:
    data = digits(n_samples, seed=seed, test=test_images)
    module = NormalizedMLP(widths, seed=seed).double()
    with torch.no_grad():
        # Orthogonal rows: random ones make a Hessian whose condition number is ten times larger.
        rows = torch.linalg.qr(module.head.weight.T)[0].T
        module.head.weight.copy_(head_scale * rows)
    free = Problem.from_module(
        module,
        nn.MSELoss(),
        data.inputs,
        head_scale * data.one_hot().double(),
        SphericalNoise(1.0),
        name=f"MLP on {n_samples} digits",
    )
    problem = free.with_noise(SphericalNoise((free.dim - 1) ** -0.5))
    geometry = Geometry(problem, method="matrix_free")
    start = _train(problem, geometry, head_scale)
    assert geometry.products is not None
    rank = int(geometry.rank(start))
    values = geometry.products.eigenvalues(start[None])[0, -rank:]
    return Task(
        problem,
        geometry,
        start,
        rank,
        module,
        data.test_inputs.reshape(-1, PIXELS),
        data.test_targets,
        tuple(f"hidden.{i}" for i in range(len(widths) - 2)),
        tuple(flow_steps(float(values[-1]), float(values[0]))),
    )


def _train(problem: Problem, geometry: Geometry, head_scale: float) -> Tensor:
    """A minimiser of norm 1: L-BFGS from the network's first weights, and gradient flow."""
    x = problem.vector()
    x = (x / x.norm()).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=_TRAINING_STEPS,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    trained = x.detach()
    loss = float(problem.loss(trained))
    if not loss < _TRAINED * head_scale**2:  # NaN too
        raise LimitMapError(
            "training found no minimiser with loss 0",
            received=f"loss {loss:.3g} after {_TRAINING_STEPS} steps of L-BFGS",
            expected="residuals that all vanish: far fewer of them than weights",
            remedy="fewer n_samples, larger widths, or another network_seed",
        )
    return geometry.limit_map(trained / trained.norm())
