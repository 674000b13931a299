"""Digits with many labels each, and copies of a normalised network that are trained on them.

Several people have labelled each image, and some of them at random. A network with more weights
than there are residuals fits the mean label of every image; those weights are a manifold, on which
the gradient of a single label does not vanish.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from manifold_sde.errors import LimitMapError, NotOnManifoldError
from manifold_sde.experiments.experiment import Array
from manifold_sde.experiments.settings.collapse import CLASSES, PIXELS
from manifold_sde.experiments.settings.optimizers import Settings
from manifold_sde.networks.data import digits

#: Test functions, and how they are called in words.
FUNCTIONS = {
    "cosine": "cosine with the start",
    "accuracy": "test accuracy",
    "test_loss": "test loss",
    "trace": "tr H",
}
#: Steps of L-BFGS to weights that fit, and where there are none.
_TRAINING_STEPS, _ROUGH_STEPS = 3000, 50
_TRAINED = 1e-10
_NEWTON_STEPS, _FITTED = 6, 1e-6


class Copies(nn.Module):
    """Networks of one hidden layer, normalised and without bias, with one frozen last layer.

    Args:
        start: Weights (hidden, pixels) of all copies.
        head: The last layer, (classes, hidden).
        count: Number n of copies.
    """

    head: Tensor

    def __init__(self, start: Tensor, head: Tensor, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.expand(count, -1, -1).clone())
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, B, pixels) of each copy -> outputs (n, B, classes)."""
        return self.outputs(torch.bmm(images, self.weight.mT))

    def outputs(self, z: Tensor) -> Tensor:
        """Inputs of the normalisation (n, B, hidden) -> outputs (n, B, classes)."""
        z = z - z.mean(-1, keepdim=True)
        z = z / z.square().mean(-1, keepdim=True).sqrt()
        return torch.tanh(z) @ self.head.T


@dataclass(frozen=True)
class Task:
    """What the optimizers are run on.

    Attributes:
        images, targets: Samples, (N, pixels) and (N, classes): an image for each of its labels.
        unique, means: The images, and the means of their labels.
        test_images, test_labels: What the network is tested on.
        start: First weights, of norm 1: (hidden, pixels).
        head: The last layer.
    """

    images: Tensor
    targets: Tensor
    unique: Tensor
    means: Tensor
    test_images: Tensor
    test_labels: Tensor
    start: Tensor
    head: Tensor

    def copies(self, count: int) -> Copies:
        """Networks at the start."""
        return Copies(self.start, self.head, count)

    def loss(self, copies: Copies, chosen: Tensor) -> Tensor:
        """Sum over the copies of their losses, on samples (n, B) of each."""
        residuals = copies(self.images[chosen]) - self.targets[chosen]
        return 0.5 * residuals.square().sum(-1).mean(-1).sum()

    def noise(self, batch_size: int) -> float:
        """Trace of the covariance of a batch's gradient at the start."""
        one = self.copies(1)
        each = torch.stack(
            [
                torch.autograd.grad(self.loss(one, torch.tensor([[i]])), one.weight)[0].flatten()
                for i in range(len(self.images))
            ]
        )
        return float((each - each.mean(0)).square().sum(1).mean()) / batch_size

    @torch.no_grad()
    def evaluate(self, copies: Copies) -> dict[str, Array]:
        """The test functions of each copy, (n,) each."""
        flat = copies.weight.flatten(1)
        out = copies(self.test_images.expand(len(flat), -1, -1))
        wanted = one_hot(self.test_labels, CLASSES).to(out)
        slopes, _ = self._slopes(copies)
        products = slopes.square().sum((-2, -1)) * self.unique.square().sum(-1)
        found = {
            "cosine": flat @ self.start.flatten() / flat.norm(dim=1),
            "accuracy": (out.argmax(-1) == self.test_labels).to(out).mean(-1),
            "test_loss": 0.5 * (out - wanted).square().sum(-1).mean(-1),
            # tr J J^T / N at norm 1, which is tr H where all residuals vanish
            "trace": products.mean(-1) * flat.square().sum(1),
        }
        return {name: value.numpy() for name, value in found.items()}

    @torch.no_grad()
    def fitted(self, copies: Copies) -> Copies:
        """The copies, moved by Newton's method until they fit the mean labels of all images.

        The Jacobian J of an output in the weights is its slope times the image, so that J J^T and
        J^T r need no J.

        Raises:
            NotOnManifoldError: If some do not arrive.
        """
        moved = Copies(self.start, self.head, len(copies.weight))
        moved.weight.copy_(copies.weight / copies.weight.flatten(1).norm(dim=1)[:, None, None])
        gram = self.unique @ self.unique.T
        count = len(self.unique) * CLASSES
        for _ in range(_NEWTON_STEPS):
            slopes, out = self._slopes(moved)
            rows = slopes.flatten(1, 2)
            pairs = gram.repeat_interleave(CLASSES, 0).repeat_interleave(CLASSES, 1)
            residuals = (out - self.means).reshape(-1, count, 1)
            solved = torch.linalg.solve((rows @ rows.mT) * pairs, residuals)
            step = torch.einsum("nic,nich,ip->nhp", solved.view_as(out), slopes, self.unique)
            moved.weight.sub_(step)
        left = (moved(self.unique.expand(len(out), -1, -1)) - self.means).abs().amax((1, 2))
        if not float(left.max()) < _FITTED:  # NaN too
            raise NotOnManifoldError(
                "Newton's method did not find weights that fit all images",
                received=f"residuals of up to {float(left.max()):.3g}",
                expected=f"less than {_FITTED:g} after {_NEWTON_STEPS} steps",
                remedy="smaller rates: the weights are too far from the manifold",
            )
        return moved

    def _slopes(self, copies: Copies) -> tuple[Tensor, Tensor]:
        """Derivatives of the outputs in z, (n, images, classes, hidden), and the outputs."""
        images = self.unique.expand(len(copies.weight), -1, -1)
        with torch.enable_grad():
            z = torch.bmm(images, copies.weight.detach().mT).requires_grad_()
            out = copies.outputs(z)
            rows = [torch.autograd.grad(o.sum(), z, retain_graph=True)[0] for o in out.unbind(-1)]
        return torch.stack(rows, 2), out.detach()


def make_task(settings: Settings, case: str) -> Task:
    """The task of a case.

    Raises:
        LimitMapError: If training finds no weights that fit all images, where it should.
        MissingDependencyError: If scikit-learn, which has the digits, is not installed.
    """
    crowded = case == "crowded"
    count, labels = (settings.crowd, 1) if crowded else (settings.n_images, settings.n_labels)
    data = digits(count, seed=settings.network_seed, test=settings.test_images)
    generator = torch.Generator().manual_seed(settings.network_seed)
    right = data.targets.repeat_interleave(labels)
    drawn = torch.randint(CLASSES, right.shape, generator=generator)
    if crowded:
        wrong = torch.rand(right.shape, generator=generator) < settings.wrong
    else:  # so many of each image
        wrong = (torch.arange(labels) < round(settings.wrong * labels)).repeat(count)
    unique = data.inputs.flatten(1)
    targets = one_hot(torch.where(wrong, drawn, right), CLASSES).to(unique)
    first = torch.randn(settings.hidden, PIXELS, generator=generator, dtype=unique.dtype)
    rows = torch.randn(settings.hidden, CLASSES, generator=generator, dtype=unique.dtype)
    task = Task(
        unique.repeat_interleave(labels, 0),
        targets,
        unique,
        targets.view(count, labels, CLASSES).mean(1),
        data.test_inputs.flatten(1),
        data.test_targets,
        first / first.norm(),
        settings.head_scale * torch.linalg.qr(rows)[0].T.contiguous(),
    )
    return task if case == "untrained" else _trained(task, fits=not crowded)


def _trained(task: Task, *, fits: bool) -> Task:
    """The task from a minimum of the loss on the mean labels, found by L-BFGS.

    Where not all images can be fitted, training is short: without end, the weights go to where the
    normalisation divides by nothing.
    """
    one = task.copies(1)
    optimizer = torch.optim.LBFGS(
        one.parameters(),
        max_iter=_TRAINING_STEPS if fits else _ROUGH_STEPS,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (one(task.unique[None])[0] - task.means).square().sum(-1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = float(closure().detach())
    if fits and not loss < _TRAINED:  # NaN too
        raise LimitMapError(
            "training found no weights that fit the mean labels of all images",
            received=f"loss {loss:.3g} after {_TRAINING_STEPS} steps of L-BFGS",
            expected="residuals that all vanish: far fewer of them than weights",
            remedy="fewer n_images, more hidden units, or another network_seed",
        )
    weight = one.weight.detach()[0]
    return Task(**{**vars(task), "start": weight / weight.norm()})
