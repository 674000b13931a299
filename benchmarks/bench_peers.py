"""Products of matrix-free libraries on a network: curvlinops, hessian-eigenthings, torch.

All are given the same module, data and weights, in one process, and have to give the same before
anything is timed: products with the Hessian of the mean squared error, with J^T J, and the
gradients of all samples, for which there are torch.func and hooks like those of Opacus (whose
package brings another folder ``benchmarks``, and so cannot be installed beside this one). Peak
memory is that of a process of its own, beyond what it has before.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.memory_use import forget_peak, peak, resident
from benchmarks.network_problems import CLASSES, HIDDEN, network
from benchmarks.rows import Row, in_turns, installed, one_thread
from manifold_sde import Problem, SphericalNoise
from manifold_sde.networks import NormalizedMLP
from manifold_sde.networks.data import digits

TITLE = "Matrix-free products on digits, LayerNorm MLP, float64, against peers"
PEERS = ("curvlinops", "hessian_eigenthings")
#: Network, samples, vectors of a block, and rounds; those of the quick form.
FULL, QUICK = ("86k", 100, 32, 7), ("1k", 5, 4, 1)
#: Largest difference of what is computed, relative to its size.
SAME = 1e-9
Computation = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """A network on digits at a minimiser, for us and for the peers.

    Attributes:
        size: Of the network.
        samples: Number of digits.
        vectors: Vectors of a block.
    """

    size: str
    samples: int
    vectors: int

    @cached_property
    def module(self) -> nn.Module:
        """The module at the minimiser."""
        problem, y = network(self.size, self.samples)
        module = NormalizedMLP((64, *HIDDEN[self.size], CLASSES), seed=1).double()
        problem.load_into(module, y)
        return module

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs, and the outputs there, which are the targets."""
        inputs = digits(self.samples).inputs
        with torch.no_grad():
            return inputs, self.module(inputs)

    @cached_property
    def block(self) -> Tensor:
        """Vectors (k, D)."""
        dim = network(self.size, self.samples)[0].dim
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.vectors, dim, dtype=torch.float64, generator=generator)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]


def hessian(setting: Setting, who: str) -> Computation:
    """H V for a block of vectors: (k, D), of the mean over samples and outputs of the squares."""
    problem, y = network(setting.size, setting.samples)
    block = setting.block
    if who == "ours":
        return lambda: vmap(lambda v: problem.pointwise.hessian_product(y, v))(block)
    if who == "curvlinops":
        from curvlinops import HessianLinearOperator

        operator = HessianLinearOperator(
            setting.module,
            nn.MSELoss(),
            setting.trained,
            [setting.data],
            check_deterministic=False,
        )
        columns = block.T.contiguous()
        return lambda: (operator @ columns).T
    if who == "hessian_eigenthings":
        from hessian_eigenthings import HessianOperator, supervised_loss

        loss = supervised_loss(nn.MSELoss())
        theirs = HessianOperator(setting.module, [setting.data], loss)
        return lambda: torch.stack([theirs.matvec(v) for v in block])

    def plain() -> Tensor:
        """Reverse mode over reverse mode, with one graph of the gradient."""
        inputs, targets = setting.data
        loss = nn.functional.mse_loss(setting.module(inputs), targets)
        slopes = torch.autograd.grad(loss, setting.trained, create_graph=True)
        slope = torch.cat([s.reshape(-1) for s in slopes])
        products = [
            torch.autograd.grad(slope, setting.trained, v, retain_graph=True) for v in block
        ]
        return torch.stack([torch.cat([p.reshape(-1) for p in product]) for product in products])

    return plain


def gauss_newton(setting: Setting, who: str) -> Computation:
    """J^T J v / Xi of one vector, (D,)."""
    problem, y = network(setting.size, setting.samples)
    v, loss = setting.block[0], problem.pointwise
    if who == "ours":
        weight = 1.0 / setting.samples
        return lambda: weight * loss.residual_transposed_product(y, loss.residual_product(y, v))
    from curvlinops import GGNLinearOperator

    operator = GGNLinearOperator(
        setting.module, nn.MSELoss(), setting.trained, [setting.data], check_deterministic=False
    )
    return lambda: operator @ v


def sample_gradients(setting: Setting, who: str) -> Computation:
    """Gradients of the mean squared errors of all samples, (Xi, D)."""
    _, y = network(setting.size, setting.samples)
    inputs, targets = setting.data
    targets = targets + 1.0  # no gradient is zero
    module = setting.module
    if who == "ours":
        # Targets that are larger by one, as for the peers: no gradient is zero.
        shifted = Problem.from_module(module, nn.MSELoss(), inputs, targets, SphericalNoise(1.0))
        return lambda: shifted.pointwise.sample_gradients(y)
    if who == "torch.func":
        trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

        def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            output = functional_call(module, parameters, (x[None],))[0]
            return (output - target).square().mean()

        slopes = vmap(grad(loss), in_dims=(None, 0, 0))
        return lambda: torch.cat(
            [g.flatten(1) for g in slopes(trained, inputs, targets).values()], 1
        )
    return _by_hooks(module, inputs, targets)


def _by_hooks(module: nn.Module, inputs: Tensor, targets: Tensor) -> Computation:
    """Products of activations and of slopes on the way back, as Opacus' hooks form them."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    layers = [layer for layer in layers if layer.weight.requires_grad]

    def backward() -> Tensor:
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            made.register_hook(lambda slope: seen.update({layer: (given[0].detach(), slope)}))

        handles = [layer.register_forward_hook(keep) for layer in layers]
        loss = (module(inputs) - targets).square().mean(1).sum()
        for handle in handles:
            handle.remove()
        torch.autograd.grad(loss, [layer.weight for layer in layers])
        products = [torch.einsum("no,ni->noi", seen[a][1], seen[a][0]) for a in layers]
        return torch.cat([product.flatten(1) for product in products], 1)

    return backward


WORK: dict[str, tuple[Callable[[Setting, str], Computation], tuple[str, ...]]] = {
    "H V": (hessian, ("curvlinops", "hessian_eigenthings", "autograd")),
    "J^T J v": (gauss_newton, ("curvlinops",)),
    "sample gradients": (sample_gradients, ("torch.func", "hooks")),
}


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: A small network: it shows that everything runs.
    """
    size, samples, vectors, rounds = QUICK if quick else FULL
    found = []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers warn of their own use of torch
        for name, (work, peers) in WORK.items():
            setting = Setting(size, samples, vectors)
            ours = work(setting, "ours")
            for who in peers:
                if who in PEERS and not installed(who):
                    continue
                peer = work(Setting(size, samples, vectors), who)
                check_same(ours(), peer(), who)
                note = f"{len(setting.block[0])} parameters, {samples} digits"
                note += f", {vectors} vectors" if name == "H V" else ""
                timing = in_turns(ours, peer, rounds)
                found.append(timing.row(name, SHORT.get(who, who), unit="ms", note=note))
        found += _memory(size, samples, vectors)
    return found


SHORT = {"hessian_eigenthings": "eigenthings"}


def _memory(size: str, samples: int, vectors: int) -> list[Row]:
    """Peak memory of H V, ours over that of the peers."""
    who = [p for p in WORK["H V"][1] if p not in PEERS or installed(p)]
    used = {name: measured(size, samples, vectors, name) for name in ("ours", *who)}
    note = "beyond what a process has before it"
    return [
        Row(
            "H V, peak memory",
            used["ours"],
            used[name],
            SHORT.get(name, name),
            "MB",
            used["ours"] / used[name],
            note=note,
        )
        for name in who
    ]


def measured(size: str, samples: int, vectors: int, who: str) -> float:
    """Peak memory of H V in a process of its own, in megabytes."""
    arguments = [size, str(samples), str(vectors), who]
    command = [sys.executable, "-m", "benchmarks.bench_peers", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check_same(ours: Tensor, theirs: Tensor, who: str) -> None:
    """Check that a peer computes the same.

    Raises:
        AssertionError: If it does not.
    """
    off = float((ours - theirs).norm() / theirs.norm())
    assert off <= SAME, f"{who} is off by {off:.2g}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    small = hessian(Setting(sys.argv[1], int(sys.argv[2]), 1), sys.argv[4])
    small()  # what is imported and made once
    computation = hessian(Setting(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), sys.argv[4])
    before = resident()
    forget_peak()
    computation()
    print(f"{max(peak() - before, 0.1):.1f}")
