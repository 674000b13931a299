"""What `Problem.from_module` admits: plain SGD as the truth, and what would be a wrong number."""

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_sde import Problem, SamplingNoise, SphericalNoise, derivatives, errors, reverse_mode
from manifold_sde.networks import LayerNorm, scale_invariance_report
from manifold_sde.networks.randomness import Generators

N = 12
GENERATOR = torch.Generator().manual_seed(7)
INPUTS = torch.randn(N, 6, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(3, (N,), generator=GENERATOR)
ROWS = torch.randn(N, 3, dtype=torch.float64, generator=GENERATOR)
WORDS = torch.randint(1, 5, (N, 3), generator=GENERATOR)
WEIGHTS = torch.linspace(0.1, 3.0, N, dtype=torch.float64)
CE = nn.CrossEntropyLoss()


def sequence(*layers: nn.Module, bias: bool = True) -> nn.Sequential:
    return generic(nn.Sequential(nn.Linear(6, 4, bias=bias), *layers, nn.Linear(4, 3)))


def generic(module: nn.Module) -> Any:
    """A module in double precision, whose weights do not depend on torch's global generator."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def made(
    module: nn.Module | None = None,
    criterion: Any = CE,
    inputs: Any = INPUTS,
    targets: Tensor = CLASSES,
    noise: Any = None,
) -> Problem:
    module = sequence(nn.Tanh()) if module is None else module
    return Problem.from_module(module, criterion, inputs, targets, noise or SamplingNoise())


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values)


def assert_steps_of_sgd(
    problem: Problem, module: nn.Module, loss: Callable[[Tensor], Tensor]
) -> None:
    """Loss, and steps of ``torch.optim.SGD`` on all samples and on mini-batches of them.

    Args:
        problem: The problem.
        module: Its module.
        loss: What is minimised, given the numbers of the samples of a batch.
    """
    x, everything = problem.vector(module), torch.arange(N)
    whole = loss(everything).detach()
    torch.testing.assert_close(problem.loss(x), whole, rtol=1e-13, atol=0.0)
    for drawn in (everything, torch.tensor([2, 0, 5]), torch.tensor([7]), torch.tensor([4, 4])):
        other = copy.deepcopy(module)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01)
        optimiser.zero_grad()
        loss(drawn).backward()
        optimiser.step()
        step = 0.1 * (problem.pointwise.drawn_gradient(x, drawn) + 0.01 * x)
        torch.testing.assert_close(problem.vector(module), x - step, rtol=1e-12, atol=1e-14)
        module.load_state_dict(other.state_dict())


# The loss is the value of the criterion, or refused.


class WeightedSquares(nn.MSELoss):
    """Squares of which the entries have weights: a subclass that computes something else."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = (outputs - targets) ** 2 * torch.tensor([1.0, 2.0, 3.0]).to(outputs)
        return losses if self.reduction == "none" else losses.mean()


class Words(nn.Module):
    """Logits (N, classes, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.rows(words))).transpose(1, 2)


TAGS = WORDS % 3
HONOURED: dict[str, tuple[nn.Module, Tensor, Callable[[], nn.Module], Tensor]] = {
    "batchmean": (
        nn.KLDivLoss(reduction="batchmean"),
        ROWS.softmax(1),
        lambda: sequence(nn.Tanh()).append(nn.LogSoftmax(1)),
        INPUTS,
    ),
    "divergence of entries": (
        nn.KLDivLoss(reduction="mean"),
        ROWS.softmax(1),
        lambda: sequence(nn.Tanh()).append(nn.LogSoftmax(1)),
        INPUTS,
    ),
    "equal class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([2.0, 2.0, 2.0]).double()),
        CLASSES,
        lambda: sequence(nn.Tanh()),
        INPUTS,
    ),
    "weights of probabilities": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double()),
        ROWS.softmax(1),
        lambda: sequence(nn.Tanh()),
        INPUTS,
    ),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        CLASSES,
        lambda: sequence(nn.Tanh()),
        INPUTS,
    ),
    "weights of entries": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()),
        (ROWS > 0).double(),
        lambda: sequence(nn.Tanh()),
        INPUTS,
    ),
    "a subclass": (WeightedSquares(), ROWS, lambda: sequence(nn.Tanh()), INPUTS),
    "squares": (nn.MSELoss(), ROWS, lambda: sequence(nn.Tanh()), INPUTS),
    "words": (nn.CrossEntropyLoss(), TAGS, lambda: generic(Words()), WORDS),
    "words of which the same number counts": (
        nn.CrossEntropyLoss(ignore_index=-1),
        torch.where(torch.arange(3) == torch.arange(N)[:, None] % 3, -1, TAGS),
        lambda: generic(Words()),
        WORDS,
    ),
}


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:reduction. 'mean' divides"
)
@pytest.mark.parametrize("which", HONOURED)
def test_the_loss_is_the_criterions_value_in_every_batch(which: str) -> None:
    criterion, targets, module, inputs = HONOURED[which]
    network = module()
    problem = made(network, criterion, inputs, targets)
    assert_steps_of_sgd(problem, network, lambda i: criterion(network(inputs[i]), targets[i]))


def test_a_sum_is_refused_and_the_way_out_takes_the_same_steps() -> None:
    """For B samples of K targets, the sum with lr and weight decay is B K times the mean."""
    with pytest.raises(errors.ArgumentError, match="lr B K and weight_decay"):
        made(criterion=nn.MSELoss(reduction="sum"), targets=ROWS)
    network = sequence(nn.Tanh())
    problem = made(network, nn.MSELoss(), targets=ROWS)
    x, drawn = problem.vector(), torch.tensor([2, 0, 5, 7])
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, weight_decay=0.12)
    nn.MSELoss(reduction="sum")(network(INPUTS[drawn]), ROWS[drawn]).backward()
    optimiser.step()
    lr, decay = 1e-3 * 4 * 3, 0.12 / (4 * 3)
    step = lr * (problem.pointwise.drawn_gradient(x, drawn) + decay * x)
    torch.testing.assert_close(problem.vector(network), x - step, rtol=1e-13, atol=1e-15)


def test_the_ways_out_of_ignored_targets_and_class_weights() -> None:
    ignored = torch.where(torch.arange(N) % 3 == 0, -100, CLASSES)
    with pytest.raises(errors.ArgumentError, match="leave these samples out"):
        made(targets=ignored)
    network, keep = sequence(nn.Tanh()), ignored != -100
    problem = made(network, inputs=INPUTS[keep], targets=ignored[keep])
    want = float(CE(network(INPUTS), ignored).detach())
    assert float(problem.loss(problem.vector())) == pytest.approx(want, rel=1e-13)
    w = torch.tensor([1.0, 2.0, 5.0]).double()
    with pytest.raises(errors.ArgumentError, match=r"w.to\(outputs\)\[targets\]"):
        made(criterion=nn.CrossEntropyLoss(weight=w))

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return w.to(outputs)[targets] * F.cross_entropy(outputs, targets, reduction="none")

    problem = made(network, weighted)
    assert_steps_of_sgd(problem, network, lambda i: weighted(network(INPUTS[i]), CLASSES[i]).mean())


class OverBatch(nn.Module):
    """A criterion whose mean is over more than the samples."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses if self.reduction == "none" else losses.sum() / (len(losses) + 1)


# A sample's place.


class Masked(nn.Module):
    def __init__(self, full: bool, count: int = N) -> None:
        super().__init__()
        self.full = full
        self.register_buffer("mask", torch.linspace(0.2, 2.0, count)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.mask if self.full else self.mask[: len(x)])


class MaskOfItsOwn(nn.Module):
    """The same, with the mask as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x) * mask)


def test_the_way_out_of_a_mask_in_the_batch() -> None:
    """The mask as an input, and weights as a column of the targets: against plain SGD."""
    network, mask = generic(MaskOfItsOwn()), torch.linspace(0.2, 2.0, N)[:, None].double()
    problem = made(network, inputs=(INPUTS, mask))
    assert_steps_of_sgd(problem, network, lambda i: CE(network(INPUTS[i], mask[i]), CLASSES[i]))

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets[:, 0].long(), reduction="none")
        return targets[:, 1] * losses

    columns, network = torch.stack([CLASSES.double(), WEIGHTS], 1), sequence(nn.Tanh())
    problem = made(network, weighted, targets=columns)
    assert_steps_of_sgd(problem, network, lambda i: weighted(network(INPUTS[i]), columns[i]).mean())


# Derivatives of every sample.


class StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (10.0 * x).round() / 10.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent


class OnOneSample(nn.Module):
    """Another function for the samples that are marked in the first column of the inputs."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.rest = sequence(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.rest(x)
        return torch.where(x[:, :1] > 9.0, self.function(outputs), outputs)


@pytest.mark.parametrize("number", [3, 79, 144])
def test_a_derivative_that_is_wrong_for_one_sample_of_150(number: int) -> None:
    inputs = INPUTS.repeat(13, 1)[:150].clone()
    inputs[number, 0] = 10.0
    targets = CLASSES.repeat(13)[:150]
    for wrong in (StraightThrough.apply, lambda outputs: outputs.detach() * outputs):
        with pytest.raises(errors.DifferentiationError, match=f"at sample {number}\n"):
            made(OnOneSample(wrong), inputs=inputs, targets=targets)
    assert made(OnOneSample(torch.sin), inputs=inputs, targets=targets).n_samples == 150


class Bag(nn.Module):
    """Embedded words, their mean, normalised: scale-invariant in the embedding alone."""

    def __init__(self, embedding: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.rows, self.padding = embedding, padding
        self.norm = LayerNorm(6)
        self.head = nn.Linear(6, 3, bias=False).requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        rows = self.rows(words)
        if self.padding is not None:
            rows = rows * (words != self.padding)[..., None]
        return self.head(self.norm(rows.mean(1)))


class OwnLookup(nn.Module):
    """Looks rows up by a function, and counts the padding from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(5, 3))

    def forward(self, words: Tensor) -> Tensor:
        return F.embedding(words, self.rows, padding_idx=-5).mean(1)


def test_padding_where_the_first_samples_have_none_and_the_way_out() -> None:
    """The gradient of a padding row is set to 0; with the padding masked it is 0."""
    words = WORDS.clone()
    words[[1, 2, 3, 7, 8], 2] = 0
    padded = generic(Bag(nn.Embedding(5, 6, padding_idx=0)))
    with torch.no_grad():
        padded.rows.weight[0] = 0.0
    with pytest.raises(errors.DifferentiationError, match=r"(?s)layer rows.*padding_idx=0"):
        made(padded, inputs=words)
    assert made(padded, inputs=WORDS).n_samples == N
    masked = Bag(nn.Embedding(5, 6), 0).double()
    masked.load_state_dict(padded.state_dict())
    problem = made(masked, inputs=words)
    assert_steps_of_sgd(problem, padded, lambda i: CE(padded(words[i]), CLASSES[i]))
    problem.require_scale_invariance()
    assert scale_invariance_report(problem).passed


def test_a_gradient_that_is_wrong_is_not_called_a_lack_of_scale_invariance() -> None:
    """Away from the points where problems are checked, a norm loses its derivative."""

    def cut(x: Tensor) -> Tensor:
        size = x.norm()
        size = torch.where(size > 2.0, size.detach(), size)
        return (x[0] / size) ** 2 + (x[1] / size) ** 4

    x = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    problem = Problem(cut, 3, SphericalNoise(0.1))
    problem.require_scale_invariance()
    with pytest.raises(errors.DifferentiationError, match="where L changes by"):
        problem.require_scale_invariance(x)
    twin = Problem(lambda z: (z[0] / z.norm()) ** 2 + 1e-3 * z[1] ** 2, 3, SphericalNoise(0.1))
    with pytest.raises(errors.ScaleInvarianceError):
        twin.require_scale_invariance(x)


def hooked(register: Callable[[nn.Sequential], Any]) -> nn.Module:
    module = sequence(nn.Tanh())
    register(module)
    return module


def doubled(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: 2.0 * gradient)
    return x


# Random numbers.


class Drop(nn.Module):
    """Leaves its input out, but rarely."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x if float(self.draw()) < 0.1 else x


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x if torch.rand((), generator=self.generator) < 1e-9 else x


RANDOM = np.random.default_rng(3)
DRAWS: dict[str, tuple[Callable[[], Any], str]] = {
    "numpy": (lambda: np.random.rand(), "numpy.random"),  # noqa: NPY002
    "Python": (lambda: random.random(), "Python's random"),
    "torch": (lambda: torch.rand(()), "torch's generator"),
    "a generator of the program": (lambda: RANDOM.random(), "a Generator of its own"),
}


def states() -> tuple[str, ...]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    theirs = numpy, random.getstate(), RANDOM.bit_generator.state, torch.get_rng_state().tolist()
    return tuple(map(str, theirs))


@pytest.mark.parametrize("which", DRAWS)
def test_a_layer_that_draws_is_refused_at_every_try(which: str) -> None:
    """Left out one time in ten, it is the same in two passes more often than not."""
    draw, words = DRAWS[which]
    gc.unfreeze()  # which hides generators of a program; tests freeze what was collected
    module = sequence(Drop(draw))
    before = states()
    for _ in range(5):
        with pytest.raises(errors.ArgumentError, match=f"the module is random\n.*{words}"):
            made(module)
    assert states() == before
    with pytest.raises(errors.ArgumentError, match="the criterion <lambda> is random"):
        made(criterion=lambda o, t: (1.0 + 0.0 * draw()) * F.cross_entropy(o, t, reduction="none"))


def test_generators_are_looked_at_on_cuda_where_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [torch.zeros(16, dtype=torch.uint8)]

    def set_states(given: list[Tensor]) -> None:
        states[:] = given

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [s.clone() for s in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", set_states)
    generators = Generators()
    with generators.unmoved_by("nothing"):
        pass
    with (
        pytest.raises(errors.ArgumentError, match="for CUDA"),
        generators.unmoved_by("the module"),
    ):
        states[0].add_(1)
    assert int(states[0].sum()) == 0


# NaN, and numbers that are rounded.

BLANK = INPUTS.clone()
BLANK[5] = 0.0


class RMSNormInSingle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class InSingle(torch.autograd.Function):
    """Rounds inside, where no graph is recorded."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.float().double()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def at_the_end(function: Callable[[Tensor], Any]) -> nn.Module:
    return sequence(nn.Tanh()).append(Apply(function))


def blank(layer: nn.Module) -> Problem:
    return made(sequence(layer, bias=False), inputs=BLANK)


def squares_with_a_hook() -> nn.Module:
    criterion = nn.MSELoss()
    criterion.register_forward_hook(lambda module, args, value: 2.0 * value)
    return criterion


A, D, X = errors.ArgumentError, errors.DTypeError, errors.DifferentiationError
NAN = errors.NonFiniteError
REFUSED: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "sum": (A, lambda: made(criterion=nn.CrossEntropyLoss(reduction="sum")), "sum over"),
    "words ignored": (
        A,
        lambda: made(generic(Words()), CE, WORDS, torch.where(WORDS == 1, -100, TAGS)),
        "samples of one length",
    ),
    "all ignored": (A, lambda: made(targets=CLASSES * 0 - 100), "leave these samples out"),
    "smoothing with class weights": (
        A,
        lambda: made(
            criterion=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 5]), label_smoothing=0.1)
        ),
        "with class weights",
    ),
    "over the batch": (A, lambda: made(criterion=OverBatch()), "no mean over the samples"),
    "mask": (A, lambda: made(sequence(Masked(False))), r"(?s)outputs.*place.*inputs=\(X, mask\)"),
    "mask of squares": (
        A,
        lambda: made(sequence(Masked(False)), nn.MSELoss(), targets=ROWS),
        "the place of a sample",
    ),
    "mask, other noise": (
        A,
        lambda: made(sequence(Masked(False)), noise=SphericalNoise(0.1)),
        "the place of a sample",
    ),
    "full mask": (A, lambda: made(sequence(Masked(True))), "the place of a sample"),
    "full mask that is constant": (
        A,
        lambda: made(sequence(Apply(lambda h: h * torch.ones(N, 1).to(h)))),
        r"(?s)outputs.*number of samples.*shape \(12, 3\) in place of \(1, 3\)",
    ),
    "number": (A, lambda: made(sequence(Apply(lambda h: h / len(h)))), "the number of samples"),
    "position of two": (
        A,
        lambda: made(sequence(Masked(False, 2)), inputs=INPUTS[:2], targets=CLASSES[:2]),
        "the place of a sample",
    ),
    "weights of the criterion": (
        A,
        lambda: made(
            criterion=lambda o, t: WEIGHTS[: len(t)] * F.cross_entropy(o, t, reduction="none")
        ),
        "(?s)criterion <lambda>.*place.*column of the targets",
    ),
    "all weights of the criterion": (
        A,
        lambda: made(criterion=lambda o, t: WEIGHTS * F.cross_entropy(o, t, reduction="none")),
        "(?s)criterion <lambda>.*place",
    ),
    "number in the criterion": (
        A,
        lambda: made(criterion=lambda o, t: F.cross_entropy(o, t, reduction="none") / len(t)),
        "(?s)criterion <lambda>.*number of samples",
    ),
    "padding of a function": (
        X,
        lambda: made(generic(OwnLookup()), inputs=WORDS - 1),
        "(?s)the module OwnLookup.*padding_idx=0",
    ),
    "frequencies": (
        X,
        lambda: made(generic(Bag(nn.Embedding(5, 6, scale_grad_by_freq=True))), inputs=WORDS),
        "scale_grad_by_freq",
    ),
    "largest norm": (
        X,
        lambda: made(generic(Bag(nn.Embedding(5, 6, max_norm=1.0))), inputs=WORDS),
        "max_norm",
    ),
    "fake quantisation": (
        X,
        lambda: made(
            sequence(Apply(lambda h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127)))
        ),
        "(?s)layer 1.*fake_quantize",
    ),
    "hook in the pass": (X, lambda: made(sequence(Apply(doubled))), "(?s)layer 1.*register_hook"),
    "hook of a parameter": (
        X,
        lambda: made(hooked(lambda m: m[0].weight.register_hook(lambda g: 2.0 * g))),
        r"(?s)0\.weight.*handle\.remove",
    ),
    "hook of a layer": (
        X,
        lambda: made(hooked(lambda m: m[2].register_full_backward_hook(lambda *_: None))),
        r"hooks of 2\n",
    ),
    "checkpointing": (
        X,
        lambda: made(
            sequence(
                Apply(
                    lambda h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False)
                )
            )
        ),
        "call the layers themselves",
    ),
    "generator": (A, lambda: made(sequence(OwnGenerator())), r"a torch\.Generator"),
    "leaky in training": (A, lambda: made(sequence(nn.RReLU())), "torch's generator"),
    "normalised blank": (
        NAN,
        lambda: blank(Apply(lambda h: F.normalize(h, dim=-1))),
        r"(?s)second derivative of the loss of sample 5 .*layer 1 \(Apply\)",
    ),
    "blank without eps": (
        NAN,
        lambda: blank(nn.LayerNorm(4, eps=0.0)),
        r"(?s)outputs.*first number 5, in layer 1 \(LayerNorm\)",
    ),
    "root of blank": (
        NAN,
        lambda: blank(Apply(lambda h: h.abs().sqrt())),
        r"(?s)first derivative of the loss of sample 5 .*layer 1 \(Apply\)",
    ),
    "third derivative of blank": (
        NAN,
        lambda: blank(Apply(lambda h: h.abs() ** 2.5)),
        r"(?s)third derivative of the loss of sample 5 .*layer 1 \(Apply\)",
    ),
    "NaN of the criterion": (
        NAN,
        lambda: made(criterion=lambda o, t: (o[:, 0] - 1e3).log()),
        "(?s)value of the loss of sample 0 .*in the criterion <lambda>",
    ),
    "derivative of the criterion": (
        NAN,
        lambda: made(criterion=lambda o, t: (o[:, 0] - o[:, 0]).sqrt() + o[:, 1] ** 2),
        "(?s)first derivative of the loss of sample 0 .*in the criterion <lambda>",
    ),
    "norm in single": (
        D,
        lambda: made(sequence(RMSNormInSingle())),
        r"(?s)layer 1 \(RMSNormInSingle\).*float64 becomes torch.float32 in float\n",
    ),
    "outputs in single": (D, lambda: made(at_the_end(lambda h: h.float())), r"layer 3 \(Apply\)"),
    "there and back": (D, lambda: made(at_the_end(lambda h: h.float().double())), "layer 3"),
    "half": (D, lambda: made(at_the_end(lambda h: h.half().double())), "float16 in half"),
    "dtype of a function": (
        D,
        lambda: made(sequence(Apply(lambda h: F.softmax(h, -1, dtype=torch.float32).to(h.dtype)))),
        "float32 in softmax",
    ),
    "within a function": (
        D,
        lambda: made(sequence(Apply(InSingle.apply))),
        "float32 in float\n",
    ),
    "written into single": (
        D,
        lambda: made(sequence(Apply(lambda h: torch.zeros(len(h), 4).copy_(h).double()))),
        "float32 in copy_",
    ),
    "autocast of single": (
        D,
        lambda: made(sequence(Autocast()).float()),
        r"(?s)layer 1.layer \(Linear\).*float32 becomes torch.bfloat16 in linear",
    ),
    "squares with a hook": (
        A,
        lambda: made(criterion=squares_with_a_hook(), targets=ROWS),
        "no mean over the samples",
    ),
    "criterion in single": (
        D,
        lambda: made(criterion=lambda o, t: F.cross_entropy(o.float(), t, reduction="none")),
        "the criterion <lambda>",
    ),
    "criterion there and back": (
        D,
        lambda: made(
            criterion=lambda o, t: F.cross_entropy(o.float(), t, reduction="none").double()
        ),
        "the criterion <lambda>",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_wrong_numbers_are_refused_with_the_way_out(which: str) -> None:
    kind, call, words = REFUSED[which]
    with pytest.raises(kind, match=words) as caught:
        call()
    assert isinstance(caught.value, errors.ManifoldSDEError)
    assert caught.value.remedy


ADMITTED: dict[str, Callable[[], Problem]] = {
    "constants in single": lambda: made(
        sequence(Apply(lambda h: h * torch.tensor([1.0, 2.0, 3.0, 4.0]) / 3))
    ),
    "autocast, which leaves double alone": lambda: made(sequence(Autocast())),
    "numbers of the largest": lambda: made(
        sequence(Apply(lambda h: h * (h >= h.topk(2, dim=1).values[:, -1:]).float()))
    ),
    "complex numbers": lambda: made(
        sequence(Apply(lambda h: torch.fft.fft(h, dim=-1).real + torch.fft.fft(h, dim=-1).imag))
    ),
    "blank with a bias": lambda: made(sequence(nn.LayerNorm(4)), inputs=BLANK),
    "blank and a layer without eps": lambda: blank(LayerNorm(4)),
    "a frozen padded embedding": lambda: made(frozen_embedding(), inputs=WORDS - 1),
    "kinks": lambda: made(
        nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 3)).double(),
        inputs=INPUTS.repeat(30, 1) + torch.linspace(0.0, 1.0, 360).double()[:, None],
        targets=CLASSES.repeat(30),
    ),
}


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x)


def frozen_embedding() -> nn.Module:
    module = generic(Bag(nn.Embedding(5, 6, padding_idx=0)))
    module.rows.weight.requires_grad_(False)
    module.head.requires_grad_(True)
    return module


@pytest.mark.parametrize("which", ADMITTED)
def test_what_rounds_or_depends_on_nothing_is_admitted(which: str) -> None:
    problem = ADMITTED[which]()
    x = problem.vector()
    for product in (derivatives.hessian_product, reverse_mode.hessian_product):
        assert bool(torch.isfinite(product(problem.pointwise.loss, x, x.flip(0))).all())
