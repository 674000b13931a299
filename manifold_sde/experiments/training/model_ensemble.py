"""Networks of one architecture that are trained side by side, each on its own batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from manifold_sde.networks.data import Images
from manifold_sde.networks.weights import Weights
from manifold_sde.paper import implements

#: Images that are evaluated together; batch normalisation averages over them.
EVALUATED = 500


class ModelEnsemble:
    """K networks of one architecture, whose gradients are computed together.

    Each has its own trained weights, a row of x (K, D), and its own frozen ones. Small networks
    cost mostly the calls of torch, so that K at once are several times faster than one by one.

    Args:
        make: Makes the network of a seed.
        seeds: The seeds of the networks, one for each.
        images: Images for training and testing.
        device: Where torch computes.

    Attributes:
        start: Initial weights (K, D).
        images: As given, on the device.
    """

    def __init__(
        self,
        make: Callable[[int], nn.Module],
        seeds: Sequence[int],
        images: Images,
        device: str = "cpu",
    ) -> None:
        modules = [make(seed).to(device) for seed in seeds]
        self.images = dataclasses.replace(
            images,
            inputs=images.inputs.to(device),
            targets=images.targets.to(device),
            test_inputs=images.test_inputs.to(device),
            test_targets=images.test_targets.to(device),
        )
        self.module = modules[0]
        self.weights = Weights(self.module, ())
        self.start = torch.stack([self.weights.vector(module) for module in modules])
        frozen = [
            {name: p for name, p in module.named_parameters() if not p.requires_grad}
            for module in modules
        ]
        self.frozen = {
            name: torch.stack([row[name].detach() for row in frozen]) for name in frozen[0]
        }

    def gradients(self, x: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (K,) of each network on its batch, and the gradients (K, D).

        Batches are images (K, B, channels, height, width) and their classes (K, B).
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            losses = vmap(self._loss)(x, self.frozen, inputs, targets)
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), gradient

    def _loss(
        self, x: Tensor, frozen: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> Tensor:
        return F.cross_entropy(self._outputs(x, frozen, inputs), targets)

    def _outputs(self, x: Tensor, frozen: dict[str, Tensor], inputs: Tensor) -> Tensor:
        values = self.weights.unflatten(x) | frozen
        outputs: Tensor = functional_call(self.module, values, (inputs,))
        return outputs

    @torch.no_grad()
    def evaluate(self, x: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and mean cross-entropy of each network, (K,) each, on the same images."""
        right = x.new_zeros(len(x))
        loss = x.new_zeros(len(x))
        for batch, wanted in zip(inputs.split(EVALUATED), targets.split(EVALUATED), strict=True):
            outputs = vmap(self._outputs, in_dims=(0, 0, None))(x, self.frozen, batch)
            right += (outputs.argmax(-1) == wanted).sum(-1)
            losses = F.cross_entropy(outputs.flatten(0, 1), wanted.repeat(len(x)), reduction="none")
            loss += losses.reshape(len(x), -1).sum(-1)
        return right / len(targets), loss / len(targets)

    def subset(self, rows: Sequence[int]) -> ModelEnsemble:
        """Some of the networks, each as often as it is named."""
        other = copy.copy(self)
        index = torch.as_tensor(list(rows), device=self.start.device)
        other.start = self.start[index]
        other.frozen = {name: value[index] for name, value in self.frozen.items()}
        return other


@implements("Equation (1)")
def step(x: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> Tensor:
    """A step of SGD with weight decay, x - lr (gradient + weight_decay x)."""
    return x * (1 - lr * weight_decay) - lr * gradient


def batches(n_samples: int, batch_size: int, *key: int) -> Tensor:
    """The batches of an epoch (batches, batch_size): all samples once, in a new order.

    Those left over are left out. The order depends on the integers of ``key`` alone.
    """
    order = np.random.default_rng(key).permutation(n_samples)
    count = n_samples // batch_size
    return torch.from_numpy(order[: count * batch_size].reshape(count, batch_size))


def augmented(inputs: Tensor, shifts: Tensor, most: int, fill: Tensor) -> Tensor:
    """Images (..., channels, H, W) shifted by some pixels and mirrored.

    Args:
        inputs: The images.
        shifts: Rows and columns to shift by, from 0 (``most`` down, or right) to 2 ``most``, and
            whether to mirror, as 0 or 1: integers (..., 3).
        most: The largest shift, in pixels.
        fill: What comes in from outside, for each channel (channels,).
    """
    height, width = inputs.shape[-2:]
    channels = fill[:, None, None]
    flat = F.pad(inputs.flatten(0, -4) - channels, (most,) * 4) + channels
    down, right, mirror = shifts.flatten(0, -2).unbind(-1)
    columns = torch.arange(width, device=inputs.device).expand(len(flat), -1)
    columns = torch.where(mirror[:, None] == 1, columns.flip(1), columns) + right[:, None]
    rows = torch.arange(height, device=inputs.device) + down[:, None]
    number = torch.arange(len(flat), device=inputs.device)
    # Indexing by arrays puts the channels last.
    taken = flat.movedim(1, -1)[number[:, None, None], rows[:, :, None], columns[:, None, :]]
    return taken.movedim(-1, 1).reshape(inputs.shape)
