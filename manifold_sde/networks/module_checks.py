"""What a module has to do before its loss is taken for a function of its weights.

Everything is told before any run: a forward pass that is random, that changes buffers, or in which
samples depend on each other would otherwise give wrong numbers without an error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manifold_sde.arguments import integer, kind_of
from manifold_sde.errors import (
    ArgumentError,
    DifferentiationError,
    DTypeError,
    ManifoldSDEError,
    NoiseError,
    NonFiniteError,
    ShapeError,
)
from manifold_sde.loss_trials import equal_to_rounding
from manifold_sde.networks.copies import unchanged
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.layers import GhostBatchNorm, require_ghost_batches
from manifold_sde.networks.observation import layer_not_finite
from manifold_sde.networks.randomness import Generators
from manifold_sde.networks.sample_checks import SAME
from manifold_sde.noise import LabelNoise, SamplingNoise
from manifold_sde.noise.base import Noise
from manifold_sde.remedies import first_line
from manifold_sde.torch_norms import ElementaryFunction

_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
#: Numbers of the data that are looked at together.
_NUMBERS = 1 << 24
#: The base class of batch and instance normalisation.
RUNNING = nn.modules.batchnorm._NormBase


def check_module(module: object) -> None:
    """Refuse what is no module, is random, or changes its buffers.

    Raises:
        DTypeError, ArgumentError: With the names of the layers and a hint.
    """
    if not isinstance(module, nn.Module):
        raise DTypeError(
            "the module is not a module",
            received=kind_of(module),
            expected="a torch.nn.Module",
            remedy="Net() with brackets; a plain function of x goes into Problem(loss, dim, noise)",
        )
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise ArgumentError(
            "the module has parameters without a shape",
            received="lazy layers that have not seen an input",
            expected="parameters with their shapes",
            remedy="module(inputs), once, before the problem is made",
        )
    random = [n for n, m in module.named_modules() if isinstance(m, _DROPOUT) and m.training if m.p]
    if random:
        raise ArgumentError(
            "the loss is random: dropout is on",
            received=f"in training mode: {', '.join(random)}",
            expected="a fixed function of the weights",
            remedy="module.eval(), or p=0 (module.eval() also fixes the statistics of batch norm)",
        )
    _refuse_without_values(module)
    running = [
        name
        for name, m in module.named_modules()
        if isinstance(m, RUNNING) and m.training and m.track_running_stats
    ]
    if running:
        raise ArgumentError(
            "the loss would change at every evaluation: running statistics are updated",
            received=f"in training mode: {', '.join(running)}",
            expected="buffers that stay as they are",
            remedy="batches=RandomBatches(size, count) of manifold_sde.networks for random "
            "batches, as in training; GhostBatchNorm in their place; track_running_stats=False for "
            "statistics of the whole batch; module.eval() for fixed statistics, which are "
            "not scale-invariant",
        )
    hooked = [n or "the module" for n, m in module.named_modules() if _has_gradient_hooks(m)]
    hooked += [n for n, p in module.named_parameters() if _has_gradient_hooks(p)]
    if hooked:
        raise DifferentiationError(
            "hooks look at gradients or change them",
            received=f"gradient hooks of {', '.join(hooked)}",
            expected="gradients that are the derivatives of the loss",
            remedy="handle.remove() for each hook, or the module before they were registered",
        )


def _has_gradient_hooks(owner: nn.Module | nn.Parameter) -> bool:
    kinds = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(owner, kind, None) for kind in kinds)


def _refuse_without_values(module: nn.Module) -> None:
    """Refuse modules that cannot be called with other weights, or have none."""
    compiled = [n for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if compiled:
        raise ArgumentError(
            "the module was compiled by torch.jit, and cannot be called with other weights",
            received=f"compiled: {', '.join(compiled[:4]) if all(compiled) else 'all of it'}",
            expected="a module in Python",
            remedy="the module that torch.jit.script or torch.jit.trace was given; "
            "module.load_state_dict(scripted.state_dict()) gives it the weights",
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ArgumentError(
            "the module is a wrapper that spreads samples over devices",
            received=type(module).__name__,
            expected="the module that computes the outputs",
            remedy="module.module",
        )
    tensors = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, value in tensors if value.is_meta]
    if empty:
        raise ArgumentError(
            "the module has parameters or buffers without values",
            received=f"on the device meta: {', '.join(empty[:4])}",
            expected="tensors with values",
            remedy='module.to_empty(device="cpu"), then load_state_dict or initialise it',
        )


def check_data(inputs: object, targets: object) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs and targets as tensors that belong together.

    Args:
        inputs: A tensor (N, ...), or several for a module of several arguments.
        targets: A tensor (N, ...).

    Returns:
        The inputs as a tuple, and the targets.

    Raises:
        DTypeError, ShapeError, NonFiniteError: With a hint.
    """
    several = tuple(inputs) if isinstance(inputs, (tuple, list)) and inputs else (inputs,)
    named = [("inputs", value) for value in several] + [("targets", targets)]
    tensors = []
    for name, value in named:
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise DTypeError(
                f"the {name} are not a tensor of samples",
                received=type(value).__name__ if not isinstance(value, Tensor) else "one number",
                expected="a tensor (N, ...), a sample a row",
                remedy="torch.as_tensor(array); a Dataset as inputs, with targets=None",
            )
        if value.layout is not torch.strided or value.is_meta or value.is_complex():
            raise DTypeError(
                f"the {name} have no values"
                if value.is_meta
                else f"the {name} are not dense real tensors",
                received="a tensor on the device meta"
                if value.is_meta
                else f"{value.layout}, {value.dtype}",
                expected="a dense tensor (N, ...) of real numbers",
                remedy="make the data outside of `with torch.device('meta')`"
                if value.is_meta
                else "value.to_dense(); real and imaginary parts as two columns",
            )
        rows = value.reshape(len(value), -1) if value.numel() else value.new_zeros(1, 1)
        parts = rows.split(max(1, _NUMBERS // rows.shape[1]))
        bad = torch.cat([(~torch.isfinite(part)).any(1) for part in parts])
        if bool(bad.any()):
            raise NonFiniteError(
                f"the {name} hold NaN or infinity",
                received=f"{int(bad.sum())} of {len(value)} samples, the first number "
                f"{int(bad.nonzero()[0])}",
                expected="finite numbers",
                remedy="leave these samples out; look for a division by a deviation of 0",
            )
        tensors.append(value.detach().contiguous())  # torch.func wants the usual layout
    counts = {len(value) for value in tensors}
    if len(counts) > 1 or counts == {0}:
        raise ShapeError(
            "inputs and targets are not of the same samples",
            received=" and ".join(str(tuple(value.shape)) for value in tensors),
            expected="one number of samples, at least 1, in the first dimension",
            remedy="the same rows of both",
        )
    return tuple(tensors[:-1]), tensors[-1]


def block_of(module: nn.Module, ghost_size: int | None, n_samples: int) -> int:
    """The number of samples in a ghost batch, 1 where there are none.

    Raises:
        ArgumentError: If ghost batches have several sizes.
        ShapeError: If the samples do not divide into them.
    """
    sizes = {m.size for m in module.modules() if isinstance(m, GhostBatchNorm) and m.size}
    if ghost_size is not None:
        sizes.add(integer(ghost_size) or 0)
    if len(sizes) > 1 or min(sizes, default=1) < 1:
        raise ArgumentError(
            "the ghost batches have several sizes",
            received=" and ".join(map(str, sorted(sizes))),
            expected="one size, at least 1, in all layers: a ghost batch is one sample loss",
            remedy="the same size in all GhostBatchNorm layers; leave ghost_size out",
        )
    block = sizes.pop() if sizes else 1
    require_ghost_batches(n_samples, block)
    return block


def check_forward(function: NetworkFunction, generators: Generators) -> Tensor:
    """The outputs at a test point, after it is known that the forward pass is a fixed function.

    Args:
        function: The network on its data.
        generators: The generators that it must not move.

    Raises:
        ArgumentError: If the module raises, is random or changes its buffers.
        DTypeError, ShapeError, NonFiniteError: If its outputs cannot be used.
    """
    x = function.test_point
    constants = function.constants_for(x)
    after = _clones(constants)
    try:
        with generators.unmoved_by("the module"), unchanged(function.module):
            outputs = ElementaryFunction(lambda z: function.call(z, after))(x)
            again = ElementaryFunction(lambda z: function.call(z, _clones(constants)))(x)
    except ManifoldSDEError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"the module {function.__name__} raised",
            received=first_line(error),
            expected="outputs for these inputs, and weights and inputs in float64",
            remedy="module(inputs) by itself first; tensors that the module keeps have to be "
            "buffers (register_buffer) or follow the dtype of the input: Z.to(x)",
        ) from error
    n_samples = len(function.targets)
    if not isinstance(outputs, Tensor):
        raise DTypeError(
            "the module does not return a tensor",
            received=type(outputs).__name__,
            expected="outputs (Xi, ...)",
            remedy="a module around it that returns the outputs alone",
        )
    if outputs.dim() == 0 or len(outputs) != n_samples:
        raise ShapeError(
            "the module does not return an output for each sample",
            received=f"{tuple(outputs.shape)} for {n_samples} samples",
            expected=f"({n_samples}, ...)",
            remedy="samples in the first dimension of inputs and outputs",
        )
    changed = [n for n, value in constants.items() if not _same(value, after[n])]
    if changed:
        raise ArgumentError(
            "the forward pass changes buffers of the module",
            received=f"changed by one forward pass: {', '.join(changed)}",
            expected="buffers that are constants of the loss",
            remedy="module.eval(), where that leaves them alone",
        )
    if not equal_to_rounding(outputs, again):
        raise ArgumentError(
            "the module is random",
            received="outputs that differ at the same weights by "
            f"{float((outputs - again).abs().nan_to_num(nan=0.0).max()):.3g}",
            expected="the same outputs at every call",
            remedy="module.eval() switches dropout off; draw random constants outside",
        )
    finite = torch.isfinite(outputs).reshape(n_samples, -1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero()[:, 0]
        one = function if function.block > 1 else function.subset(bad[:1])
        raise NonFiniteError(
            "the outputs of the module are not finite",
            received=f"NaN or infinity for {len(bad)} of {n_samples} samples, the first number "
            f"{int(bad[0])}, {layer_not_finite(one, x, 0)}",
            expected="finite outputs at all weights other than 0",
            remedy="leave these samples out if they are blank; the layers of "
            "manifold_sde.networks map groups without variance to 0",
        )
    return outputs


def _same(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.allclose(
        value, other, rtol=0.0, atol=0.0, equal_nan=True
    )


def _clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def coupled(function: NetworkFunction, outputs: Tensor) -> bool:
    """Whether the outputs of a block of samples depend on the data of other blocks.

    Every second block, and each half of them, is replaced by another one, and the outputs of the
    rest looked at.

    Args:
        function: The network on its data.
        outputs: Its outputs there.
    """
    blocks = torch.arange(len(outputs)).reshape(-1, function.block)
    count = len(blocks)
    if count < 2:
        return False
    x = function.test_point
    number = torch.arange(count)
    for mask in (number % 2 == 0, number < count // 2):
        for replaced in (mask, ~mask):
            order = blocks.clone()
            order[replaced] = blocks[~replaced][:1]
            there = blocks[~replaced].flatten()
            changed = ElementaryFunction(function.subset(order.flatten()).outputs)(x)
            if changed.shape != outputs.shape:
                return True
            change = (changed[there] - outputs[there]).abs().max()
            if float(change) > SAME * float(outputs.abs().max()):
                return True
    return False


def require_uncoupled_noise(function: NetworkFunction, noise: Noise) -> None:
    """Refuse the noise of single samples for a network in which samples depend on each other.

    Raises:
        NoiseError: With the layers that may couple them.
    """
    if not isinstance(noise, (SamplingNoise, LabelNoise)):
        return
    names = [
        n
        for n, m in function.module.named_modules()
        if (isinstance(m, RUNNING) and m.training) or (isinstance(m, GhostBatchNorm) and not m.size)
    ]
    batch = "" if function.block == 1 else f" of the ghost batches of {function.block}"
    raise NoiseError(
        "the samples have no losses of their own: the output of one depends on the others",
        received=f"{type(noise).__name__}, and outputs{batch} that change with other samples"
        + (f", through {', '.join(names)}" if names else ""),
        expected="outputs of a sample that depend on that sample, or on its ghost batch",
        remedy="batches=RandomBatches(size, count) of manifold_sde.networks for random batches, as "
        "in training; GhostBatchNorm(size), LayerNorm or GroupNorm; ghost_size=B for a module with "
        "ghost batches of its own; SphericalNoise or "
        "CustomNoise, which need no samples",
    )
