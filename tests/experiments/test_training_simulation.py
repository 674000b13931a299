"""The runs behind Figures 1 and 3: SGD as it is written, resumed, decayed, and its noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manifold_sde import Problem, SamplingNoise
from manifold_sde.errors import ArgumentError, CheckpointError, DataFileError, NonFiniteError
from manifold_sde.experiments.training import Settings, TrainingRun, simulation, train
from manifold_sde.experiments.training.model_ensemble import ModelEnsemble, augmented, batches
from tests.networks.test_data import write

TINY: dict[str, Any] = {
    "n_train": 40,
    "n_test": 60,
    "width": 3,
    "shift": 0,
    "epochs": 4,
    "decays": 3,
    "decay_epochs": 2,
    "runs": 2,
    "branches_side_by_side": 4,
}


def tiny(**changes: Any) -> Settings:
    return Settings.quick(**{**TINY, **changes})


@pytest.fixture(scope="module")
def run() -> TrainingRun:
    return train(tiny())


def by_hand(settings: Settings, seed: int, epochs: int) -> list[nn.Module]:
    """The networks before each epoch, trained one by one with torch's own SGD."""
    images, module = settings.images(), settings.network(seed)
    weights = [p for p in module.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    found = []
    for epoch in range(epochs + 1):
        copy = settings.network(seed)
        copy.load_state_dict(module.state_dict())
        found.append(copy)
        for index in batches(len(images.inputs), settings.batch_size, seed, 0, 0, epoch):
            sgd.zero_grad()
            nn.functional.cross_entropy(
                module(images.inputs[index]), images.targets[index]
            ).backward()
            sgd.step()
    return found


def norm(module: nn.Module) -> float:
    squares = [p.detach().square().sum() for p in module.parameters() if p.requires_grad]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.paper("Equation (1)", "Figure 1")
def test_runs_are_those_of_torchs_sgd() -> None:
    # At a small rate, where roundings do not grow.
    settings = tiny(lr=0.1, decay_lr=0.01)
    run = train(settings)
    images = settings.images()
    for row, seed in enumerate(settings.seeds):
        networks = by_hand(settings, seed, settings.epochs)
        assert run.norm[row] == pytest.approx([norm(m) for m in networks], rel=1e-4)
        with torch.no_grad():
            accuracies = [
                float((m(images.test_inputs).argmax(1) == images.test_targets).float().mean())
                for m in networks
            ]
        at = [accuracies[e] for e in settings.records]
        assert run.test_accuracy[row] == pytest.approx(at, abs=1.01 / len(images.test_targets))
    assert len(set(run.norm[:, 0])) == 2  # the runs have starts of their own


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    first, second = (batches(43, 10, 7, 0, 0, epoch) for epoch in (0, 1))
    assert first.shape == (4, 10)
    assert len(set(first.flatten().tolist())) == 40
    assert not torch.equal(first, second)
    assert torch.equal(first, batches(43, 10, 7, 0, 0, 0))
    assert not torch.equal(first, batches(43, 10, 7, 1, 0, 0))


@pytest.mark.paper("Figure 3")
def test_branches_start_where_the_run_was_and_go_on_at_the_small_rate(run: TrainingRun) -> None:
    settings = run.settings
    at = np.searchsorted(settings.records, settings.decay_times)
    assert np.array_equal(run.branch_test[:, :, 0], run.test_accuracy[:, at])
    assert np.array_equal(run.branch_train[:, :, 0], run.train_accuracy[:, at])
    # |x'|^2 >= (1 - lr wd)^2 |x|^2 a step, with little more at a small rate.
    still = train(tiny(decay_lr=1e-6))
    before = run.norm[:, settings.decay_times]
    assert still.branch_norm == pytest.approx(before, rel=1e-5)
    assert np.array_equal(still.branch_test[..., -1], still.branch_test[..., 0])
    assert np.array_equal(still.norm, run.norm)
    assert run.branch_train[..., -1].mean() > run.branch_train[..., 0].mean()


def test_branches_at_the_large_rate_are_not_the_small_ones(run: TrainingRun) -> None:
    large = train(tiny(decay_lr=0.499))
    assert not np.allclose(large.branch_norm, run.branch_norm, rtol=1e-3)


@pytest.mark.parametrize("stop", [3, 16, 22, 38])
def test_a_stopped_run_goes_on_to_the_same_bits(
    run: TrainingRun, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in training (16 steps), and in the branches (8 steps, two blocks)."""
    monkeypatch.setattr(simulation, "_CHECKPOINT_SECONDS", 0.0)
    taken = 0
    step = simulation.step

    def counting(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == stop:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(simulation, "step", counting)
    total = 16 + 2 * 8
    if stop <= total:
        with pytest.raises(KeyboardInterrupt):
            train(run.settings, folder=tmp_path)
        assert any(tmp_path.glob("*.ckpt"))
    again = train(run.settings, folder=tmp_path)
    assert taken <= total + 1
    for name, value in run.arrays().items():
        assert np.array_equal(value, again.arrays()[name]), name
    assert not any(tmp_path.glob("*.ckpt"))
    before = taken
    assert train(run.settings, folder=tmp_path).norm.tobytes() == run.norm.tobytes()
    assert taken == before


def test_training_is_kept_when_the_decay_is_another(
    run: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation._Group, "branches", stop)
    with pytest.raises(KeyboardInterrupt):
        train(run.settings, folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(simulation._Group, "_noise", stop)  # training would measure
    other = train(tiny(decay_lr=0.01), folder=tmp_path)
    assert other.norm.tobytes() == run.norm.tobytes()
    assert not np.array_equal(other.branch_norm, run.branch_norm)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(lr=0.4), folder=tmp_path)


def test_runs_do_not_depend_on_their_neighbours(run: TrainingRun) -> None:
    alone = train(tiny(seed=1, runs=1, side_by_side=1))
    assert alone.norm[0] == pytest.approx(run.norm[1], rel=1e-4)


@pytest.mark.paper("Equation (10)")
def test_trace_is_that_of_the_noise(run: TrainingRun) -> None:
    """Batches of one sample: the trace of equation (2), as the problem of the network has it."""
    settings = tiny(batch_size=1, epochs=1, decays=2, decay_epochs=1, n_train=12, runs=1)
    found = train(settings)
    images, module = settings.images(), settings.network(0)
    problem = Problem.from_module(
        module, nn.CrossEntropyLoss(), images.inputs, images.targets, SamplingNoise()
    )
    x = problem.vector(module).double()
    square = float(x.square().sum())
    assert found.trace[0, 0] == pytest.approx(square * float(problem.noise_trace(x)), rel=1e-3)
    gradient = float(problem.gradient(x).square().sum())
    assert found.mean_square[0, 0] == pytest.approx(square * gradient, rel=1e-3)


def test_saved_runs_are_found_again_if_they_are_the_same(run: TrainingRun, tmp_path: Path) -> None:
    path = tmp_path / "training.npz"
    assert TrainingRun.saved(path, run.settings) is None
    run.save(path)
    again = TrainingRun.saved(path, tiny())
    assert again is not None
    assert again.settings == run.settings
    assert again.norm.tobytes() == run.norm.tobytes()
    for other in (tiny(lr=0.9), tiny(seed=1), tiny(runs=1), tiny(decay_epochs=1)):
        assert TrainingRun.saved(path, other) is None
    path.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="corrupted"):
        TrainingRun.load(path)


def test_runs_that_blow_up_are_named() -> None:
    with pytest.raises(NonFiniteError, match="blew up"):
        train(tiny(lr=1e42, weight_decay=1e-46, epochs=2, decays=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "mnist"}, "no such data"),
        ({"data": "cifar10"}, "folder of CIFAR-10"),
        ({"lr": 0.0}, "do not make Figures 1 and 3"),
        ({"lr": 100.0, "weight_decay": 0.1}, "do not make Figures 1 and 3"),
        ({"decay_lr": 2.0}, "do not make Figures 1 and 3"),
        ({"decays": 1}, "do not make Figures 1 and 3"),
        ({"shift": -1}, "do not make Figures 1 and 3"),
        ({"weight_decay": float("nan")}, "do not make Figures 1 and 3"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Settings(**changes)


@pytest.mark.parametrize("changes", [{"n_train": 5}, {"n_train": 1797}, {"n_test": 0}])
def test_too_few_images(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        tiny(**changes).images()


def test_shifts_move_and_mirror() -> None:
    images = torch.arange(2 * 3 * 5 * 6, dtype=torch.float32).reshape(2, 3, 5, 6)
    fill = torch.tensor([-1.0, -2.0, -3.0])
    kept = augmented(images, torch.tensor([[4, 4, 0], [4, 4, 1]]), 4, fill)
    assert torch.equal(kept[0], images[0])
    assert torch.equal(kept[1], images[1].flip(-1))
    shifts = torch.tensor([[[3, 6, 0], [8, 0, 0]]])
    moved = augmented(images[None], shifts, 4, fill)[0]
    assert torch.equal(moved[0, :, 1:, :4], images[0, :, :-1, 2:])
    assert torch.equal(moved[0, :, 0], fill[:, None].expand(3, 6))
    assert torch.equal(moved[0, :, :, 4:], fill[:, None, None].expand(3, 5, 2))
    assert torch.equal(moved[1, :, :1, 4:], images[1, :, 4:, :2])


def test_shifts_are_drawn_anew_in_each_epoch_and_run() -> None:
    group = simulation._Group(tiny(shift=1, mirror=True), [0, 1])
    first, second = (group._shifts([(0, 0, 0), (1, 0, 0)], epoch) for epoch in (0, 1))
    assert first is not None
    assert second is not None
    assert first.shape == (2, 4, 10, 3)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    values = first.reshape(-1, 3).T.tolist()
    assert [set(v) for v in values] == [{0, 1, 2}, {0, 1, 2}, {0, 1}]
    assert group._shifts([(0, 0, 0)], 0) is not None
    assert simulation._Group(tiny(), [0])._shifts([(0, 0, 0)], 0) is None
    assert bool((group.fill == group.models.images.inputs.min()).all())


def test_published_setting_runs_on_a_folder_of_cifar10(tmp_path: Path) -> None:
    write(tmp_path / "cifar-10-batches-bin", binary=True)
    small: dict[str, Any] = {"depth": 8, "width": 3, "epochs": 2, "decays": 2, "decay_epochs": 1}
    settings = Settings.published(str(tmp_path), batch_size=8, **small)
    assert (settings.lr, settings.weight_decay, settings.norm) == (0.8, 5e-4, "batch")
    run = train(settings)
    assert (run.settings.shift, run.settings.mirror) == (4, True)
    assert all(np.isfinite(value).all() for value in run.arrays().values())
    assert Settings.published(str(tmp_path)).network(0).norm.size is None  # type: ignore[union-attr]
    with pytest.raises(DataFileError, match="no such folder"):
        train(Settings.published(str(tmp_path / "nothing")))


def test_an_ensemble_of_some_networks(run: TrainingRun) -> None:
    settings = run.settings
    models = ModelEnsemble(settings.network, [0, 1], settings.images())
    twice = models.subset([1, 1, 0])
    inputs = models.images.inputs[:10]
    batch = inputs.expand(3, *inputs.shape), models.images.targets[:10].expand(3, -1)
    losses, gradients = twice.gradients(twice.start, *batch)
    assert losses.shape == (3,)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])
    assert float((gradients * twice.start).sum(-1).abs().max()) < 1e-4
