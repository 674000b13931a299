"""What a module does to the numbers that pass through it, seen operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from manifold_sde import derivatives, reverse_mode
from manifold_sde.errors import DifferentiationError, DTypeError, ManifoldSDEError
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.torch_norms import ElementaryFunction, Recorder

#: The arguments of the functions that look rows up.
_LOOKUPS: dict[Any, tuple[str, ...]] = {
    functional.embedding: (
        *("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
        "sparse",
    ),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
}
_TO_INTEGERS = ("int", "long", "short", "char", "byte", "to", "type")
_FAKE_QUANTISATION = ("fake_quantize", "_fake_quantize", "fused_moving_avg_obs_fake_quant")


class Observer(Recorder):
    """Refuses operations that round the weights, or whose derivative is not that of their value.

    In force while a network runs on weights that require a gradient: what depends on them does so,
    too.

    Args:
        network: The network that runs.

    Raises:
        DTypeError: If something that depends on the weights is rounded to lower precision.
        DifferentiationError: If a derivative is not that of the value by intent.
    """

    def __init__(self, network: NetworkFunction) -> None:
        super().__init__()
        self.network = network
        self.layers: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        self._refuse_derivatives(func, args, kwargs or {})
        result = super().__torch_function__(func, types, args, kwargs)
        made = args[:1] if _name(func) == "__setitem__" else tree_leaves(result)
        self._refuse_rounding(func, [leaf for leaf in given if _floating(leaf)], made)
        return result

    def _where(self) -> str:
        if not self.layers:
            return f"the criterion {self.network.criterion.name}"
        return describe_layer(self.network.module, self.layers[-1])

    def _refuse_rounding(self, func: Any, given: list[Tensor], made: Any) -> None:
        before = [t.dtype for t in given if t.requires_grad]
        if not before:
            return
        finest = min(before, key=lambda dtype: torch.finfo(dtype).eps)
        for value in made:
            # Where no graph is recorded, as in a custom autograd.Function, nothing else is known.
            if _name(func) in _TO_INTEGERS and not _floating(value):
                raise self._wrong_derivative(
                    f"{_name(func)}, which rounds {finest} to {value.dtype}: the weights change "
                    "nothing there, until they jump",
                    "comparisons and torch.where, whose branches have derivatives; "
                    'orthogonal_map="cayley" or "matrix_exp" for orthogonal',
                )
            depends = _floating(value) and (value.requires_grad or not torch.is_grad_enabled())
            if depends and torch.finfo(value.dtype).eps > torch.finfo(finest).eps:
                raise DTypeError(
                    f"{self._where()} computes in lower precision than its weights have",
                    received=f"{finest} becomes {value.dtype} in {_name(func)}",
                    expected=f"{finest} from the weights to the losses: higher "
                    "derivatives of rounded numbers are no derivatives",
                    remedy="leave .float(), .half(), .to(torch.float32), dtype=torch.float32 and "
                    "torch.autocast out of the forward pass: everything follows the dtype of x; "
                    "layers that do not convert, such as nn.RMSNorm",
                )

    def _refuse_derivatives(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        name = _name(func)
        if name == "register_hook":
            raise self._wrong_derivative(
                "a gradient hook, register_hook",
                "no gradient hooks in the forward pass",
            )
        if name.startswith(_FAKE_QUANTISATION):
            raise self._wrong_derivative(
                f"{name}, which is differentiated as if it did not round",
                "the module without fake quantisation: quantise it after the run",
            )
        if func in _LOOKUPS:
            self._refuse_lookup(dict(zip(_LOOKUPS[func], args, strict=False)) | kwargs)

    def _refuse_lookup(self, given: dict[str, Any]) -> None:
        rows, numbers = given["weight"], given.get("input", given.get("indices"))
        padding = given.get("padding_idx")
        if not rows.requires_grad:
            return
        if given.get("max_norm") is not None:
            raise self._wrong_derivative(
                "max_norm of an embedding, which changes the weights in the forward pass",
                "nn.Embedding without max_norm",
            )
        if given.get("scale_grad_by_freq"):
            raise self._wrong_derivative(
                "scale_grad_by_freq of an embedding, which divides gradients by frequencies",
                "nn.Embedding without scale_grad_by_freq",
            )
        if padding is not None and "input" in given:
            padding %= len(rows)
        if padding is not None and bool((numbers == padding).any()):
            raise self._wrong_derivative(
                f"padding_idx={padding} of an embedding: the loss depends on row {padding}, and "
                "its gradient is set to 0",
                f"nn.Embedding without padding_idx, times (tokens != {padding})[..., None]: then "
                "padding is 0, and so is its gradient",
            )

    def _wrong_derivative(self, received: str, way_out: str) -> DifferentiationError:
        return DifferentiationError(
            f"{self._where()} has a gradient that is not the derivative of what it computes",
            received=received,
            expected="the derivative of the loss, which SGD and its limit share",
            remedy=way_out,
        )


def observe(network: NetworkFunction, x: Tensor) -> None:
    """Run a network once under an :class:`Observer`.

    Args:
        network: The network, on the data to look at.
        x: Point (D,).

    Raises:
        DTypeError, DifferentiationError: With the layer and the operation.
    """
    observer = Observer(network)

    def enter(name: str, *_: Any) -> None:
        observer.layers.append(name)

    def leave(name: str, *_: Any) -> None:
        observer.layers.pop()

    with torch.enable_grad(), _hooked(network.module, enter, leave), observer:
        network.losses(x.detach().requires_grad_())


def describe_layer(module: nn.Module, name: str) -> str:
    """A layer of a module in words."""
    kind = type(module.get_submodule(name)).__name__
    return f"layer {name} ({kind})" if name else f"the module {kind}"


@contextmanager
def _hooked(
    module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]
) -> Iterator[None]:
    """Have the calls of all layers told, with their names first, until it is left."""
    handles = []
    for name, layer in module.named_modules():
        handles.append(
            layer.register_forward_pre_hook(lambda *given, name=name: enter(name, *given))
        )
        handles.append(
            layer.register_forward_hook(
                lambda *given, name=name: leave(name, *given), with_kwargs=True, always_call=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_not_finite(network: NetworkFunction, x: Tensor, order: int) -> str:
    """The first layer whose value, or derivative of an order, is not finite, in words.

    Args:
        network: The network, on the samples to look at.
        x: Point (D,).
        order: Order of the derivative, 0 for the value.
    """
    calls: list[tuple[str, Any, Any]] = []

    def leave(name: str, layer: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        calls.append((name, (args, kwargs), made))

    x = x.detach().requires_grad_()
    values = network.weights.unflatten(x) | network.constants_for(x)
    with torch.enable_grad(), _hooked(network.module, lambda *_: None, leave):
        ElementaryFunction(network.outputs)(x)
    for name, given, made in calls:
        if order == 0:
            bad = not all(_finite(v) for v in tree_leaves(made)) and all(
                _finite(v) for v in tree_leaves(given)
            )
        else:
            layer = network.module.get_submodule(name)
            prefix = f"{name}." if name else ""
            own = {n[len(prefix) :]: v for n, v in values.items() if n.startswith(prefix)}
            bad = not _derivative_finite(layer, own, given, order)
        if bad:
            return f"in {describe_layer(network.module, name)}"
    return f"in the criterion {network.criterion.name}"


def _derivative_finite(layer: nn.Module, own: dict[str, Tensor], given: Any, order: int) -> bool:
    """Whether the derivative of a layer is finite, by what depends on the weights."""
    leaves, shape = tree_flatten((own, given))
    moving = [i for i, v in enumerate(leaves) if _floating(v) and v.requires_grad]
    leaves = [v.detach() if isinstance(v, Tensor) else v for v in leaves]
    if not moving:
        return True
    sizes = [leaves[i].numel() for i in moving]

    def total(z: Tensor) -> Tensor:
        parts = list(leaves)
        for i, part in zip(moving, z.split(sizes), strict=True):
            parts[i] = part.reshape(leaves[i].shape)
        values, (args, kwargs) = tree_unflatten(parts, shape)
        made = tree_leaves(functional_call(layer, values, args, kwargs))
        flat = torch.cat([v.flatten() for v in made if _floating(v)])
        return flat @ fixed_directions(len(flat), 1)[0].to(flat)

    function = ElementaryFunction(total)
    z = torch.cat([leaves[i].flatten() for i in moving])
    try:
        if order == 1:
            return _finite(reverse_mode.gradient(function, z))
        v = torch.ones_like(z)
        if order == 3:
            return _finite(derivatives.third_derivative(function, z, v, v))
        ways = derivatives.hessian_product, reverse_mode.hessian_product
        return all(_finite(way(function, z, v)) for way in ways)
    except (RuntimeError, ManifoldSDEError):
        return True


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _finite(value: Any) -> bool:
    return not _floating(value) or bool(torch.isfinite(value).all())


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
