"""One path of SGD on a network against ``torch.optim.SGD`` on the module itself."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.rows import Row, in_turns, one_thread
from manifold_sde import Problem, SamplingNoise, rng
from manifold_sde.noise.sampling import draws
from manifold_sde.solvers import run_sgd

TITLE = "One path of SGD on a network, random data, 32 samples a step: one step"
PEERS: tuple[str, ...] = ()
LR, WEIGHT_DECAY, BATCH = 1e-2, 0.05, 32
#: Times a step of torch's that one of ours may take.
TARGET = 1.5


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72 * width, 10),
    )


class Torch:
    """The loop that one would write down.

    Args:
        module: The module; a copy is trained.
        inputs: Inputs (N, ...).
        targets: Classes (N,).
    """

    def __init__(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.module, self.inputs, self.targets = copy.deepcopy(module), inputs, targets
        self._optimiser = torch.optim.SGD(
            self.module.parameters(), lr=LR, weight_decay=WEIGHT_DECAY
        )
        self._generator = torch.Generator().manual_seed(1)

    def step(self, drawn: Tensor) -> None:
        """One step on the samples of these numbers."""
        self._optimiser.zero_grad()
        cross_entropy(self.module(self.inputs[drawn]), self.targets[drawn]).backward()
        self._optimiser.step()

    def run(self, steps: int) -> None:
        """So many steps on samples drawn with replacement."""
        for _ in range(steps):
            self.step(torch.randint(len(self.targets), (BATCH,), generator=self._generator))


def drawn(step: int, n_samples: int, dtype: torch.dtype) -> Tensor:
    """The samples that a step of path 0 of seed 0 draws."""
    path, number = torch.zeros(1, dtype=torch.int64), torch.tensor(step)
    uniforms = rng.uniforms(rng.seed_key(0), rng.STREAM_SGD_UNIFORM, path, number, BATCH, dtype)
    return draws(uniforms[:, 0], n_samples)


def check_same(problem: Problem, start: Tensor, peer: Torch) -> None:
    """Check that three steps of the peer on the samples that we draw lead where ours do.

    Raises:
        AssertionError: If they do not, up to rounding.
    """
    ours = run_sgd(problem, start, LR, WEIGHT_DECAY, 3).ys[-1]
    for step in range(3):
        peer.step(drawn(step, len(peer.targets), start.dtype))
    torch.testing.assert_close(problem.vector(peer.module), ours)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Small networks and few steps: it shows that everything runs.
    """
    steps, rounds, n_samples = (2, 1, 40) if quick else (200, 7, 1000)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (n_samples,), generator=generator)
    found = []
    for dtype in (torch.float64, torch.float32):
        inputs = torch.randn(n_samples, 1, 28, 28, dtype=dtype, generator=generator)
        for name, make, width in (("MLP 784-{}-10", mlp, 256), ("CNN of width {}", cnn, 8)):
            width = 2 if quick else width
            with torch.random.fork_rng(), one_thread():
                torch.manual_seed(2)
                module = make(width).to(dtype)
                problem = Problem.from_module(
                    module, nn.CrossEntropyLoss(), inputs, targets, SamplingNoise(BATCH)
                )
                x, peer = problem.vector(module), Torch(module, inputs, targets)
                check_same(problem, x, peer)
                timing = in_turns(
                    lambda problem=problem, x=x: run_sgd(problem, x, LR, WEIGHT_DECAY, steps),  # type: ignore[misc]
                    lambda peer=peer: peer.run(steps),  # type: ignore[misc]
                    rounds,
                )
            note = f"{str(dtype).removeprefix('torch.')}, {problem.dim} weights"
            name = f"{name.format(width)}, {torch.finfo(dtype).bits} bits"
            found.append(timing.row(name, "torch", per=steps, target=TARGET, note=note))
    return found
