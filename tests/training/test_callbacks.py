"""The clock as a callback, in stand-ins of Lightning's and Hugging Face's trainers.

The stand-ins call the hooks in the order, and with the arguments, of Lightning 2 and transformers 4
and 5; where the packages are installed, the real trainers are tried too.
"""

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError, MissingDependencyError, MixingClockWarning
from manifold_sde.training import MixingClock, audit, lightning_callback, trainer_callback

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, LABELS = (
    torch.randn(96, 6, generator=GENERATOR),
    torch.randint(3, (96,), generator=GENERATOR),
)
BATCHES = [(INPUTS[i : i + 8], LABELS[i : i + 8]) for i in range(0, 96, 8)]


class Module(nn.Module):
    """A small network, with what both trainers call of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3))
        self.logged: list[dict[str, float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(inputs)
        return out

    def log_dict(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def by_hand() -> MixingClock:
    """The clock of a plain loop over the batches."""
    model = Module()
    optimizer = optimizer_of(model)
    clock = MixingClock(model, optimizer, inputs=INPUTS[:8], sampling="reshuffled")
    for batch in BATCHES:
        train_step(model, optimizer, batch)
    return clock


class LightningTrainer:
    """As Lightning's: callbacks are loaded first, the optimizers when the fit has begun."""

    log_every_n_steps = 5
    accumulate_grad_batches = 1

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.global_step = 0

    def fit(self, module: Module, batches: Any, checkpoint: Any = None) -> dict[str, Any]:
        if checkpoint:
            module.load_state_dict(checkpoint["model"])
            self.callback.load_state_dict(checkpoint["callback"])
        self.optimizers = [optimizer_of(module)]
        if checkpoint:
            self.optimizers[0].load_state_dict(checkpoint["optimizer"])
            self.global_step = checkpoint["step"]
        self.callback.on_train_start(self, module)
        for number, batch in enumerate(batches):
            self.callback.on_train_batch_start(self, module, batch, number)
            if (number + 1) % self.accumulate_grad_batches == 0:
                train_step(module, self.optimizers[0], batch)
                self.global_step += 1
            self.callback.on_train_batch_end(self, module, None, batch, number)
        found = {
            "model": module.state_dict(),
            "callback": self.callback.state_dict(),
            "optimizer": self.optimizers[0].state_dict(),
            "step": self.global_step,
        }
        self.callback.on_train_end(self, module)
        return copy.deepcopy(found)


class HuggingFaceTrainer:
    """As transformers': its optimizer may be wrapped by Accelerate; callbacks get the logs."""

    def __init__(self, callback: Any, folder: Path) -> None:
        self.callback = callback
        self.args = SimpleNamespace(output_dir=str(folder))
        self.state = SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True)

    def train(self, model: nn.Module, batches: Any, resume: Any = None) -> None:
        optimizer = optimizer_of(model)
        if resume is not None:
            saved = torch.load(resume / "trainer.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.state.global_step = saved["step"]
        control = SimpleNamespace()
        shared = {
            "model": model,
            "optimizer": SimpleNamespace(optimizer=optimizer),
            "processing_class": None,
            "lr_scheduler": None,
        }
        self.callback.on_train_begin(self.args, self.state, control, **shared)
        for batch in batches:
            logs = {"loss": train_step(model, optimizer, batch)}
            self.state.global_step += 1
            if self.state.global_step % 5 == 0:
                self.state.log_history.append({**logs, "step": self.state.global_step})
                self.callback.on_log(self.args, self.state, control, logs=logs, **shared)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**saved, "step": self.state.global_step}, folder / "trainer.pt")
        self.callback.on_save(self.args, self.state, control, **shared)
        logs = {"train_runtime": 1.0}
        self.state.log_history.append(dict(logs))
        self.callback.on_log(self.args, self.state, control, logs=logs, **shared)
        self.callback.on_train_end(self.args, self.state, control, **shared)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that have the bases of callbacks, and nothing else."""

    class Callback:
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...

    class TrainerCallback:
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None: ...

    for name, base in (("lightning.pytorch", Callback), ("transformers", TrainerCallback)):
        module = ModuleType(name)
        setattr(module, base.__name__, base)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))


@pytest.mark.usefixtures("packages")
def test_lightning_has_the_clock_of_a_plain_loop() -> None:
    callback: Any = lightning_callback(sampling="reshuffled")
    assert isinstance(callback, sys.modules["lightning.pytorch"].Callback)
    module = Module()
    LightningTrainer(callback).fit(module, BATCHES)
    assert callback.clock.values() == by_hand().values()
    assert len(module.logged) == 2  # of steps 5 and 10
    assert module.logged[-1]["clock/steps"] == 10.0
    assert audit(callback.clock)["net.0.weight"].verdict != "off"


@pytest.mark.usefixtures("packages")
def test_lightning_logs_steps_and_not_batches() -> None:
    callback: Any = lightning_callback(sampling="reshuffled")
    module, trainer = Module(), LightningTrainer(callback)
    trainer.accumulate_grad_batches = 2
    trainer.fit(module, BATCHES)
    assert [numbers["clock/steps"] for numbers in module.logged] == [5.0]


@pytest.mark.usefixtures("packages")
def test_lightning_goes_on_from_a_checkpoint() -> None:
    first: Any = lightning_callback(sampling="reshuffled")
    saved = LightningTrainer(first).fit(Module(), BATCHES[:7])
    second: Any = lightning_callback(sampling="reshuffled")
    LightningTrainer(second).fit(Module(), BATCHES[7:], saved)
    assert second.clock.steps == len(BATCHES)
    assert second.clock.time == pytest.approx(by_hand().time, rel=1e-12)
    # Broken twin: a checkpoint without the callback's state.
    third: Any = lightning_callback(sampling="reshuffled")
    with pytest.warns(MixingClockWarning, match="has made steps before"):
        LightningTrainer(third).fit(Module(), BATCHES[7:], {**saved, "callback": {}})
    assert third.clock.steps == len(BATCHES) - 7


@pytest.mark.usefixtures("packages")
def test_hugging_face_has_the_clock_of_a_plain_loop(tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    callback: Any = trainer_callback(
        {"inputs": INPUTS[:8]}, report=reported.append, sampling="reshuffled"
    )
    assert isinstance(callback, sys.modules["transformers"].TrainerCallback)
    trainer = HuggingFaceTrainer(callback, tmp_path)
    trainer.train(Module(), BATCHES)
    assert callback.clock.values() == by_hand().values()
    history = trainer.state.log_history
    assert [row.get("clock/steps") for row in history] == [5.0, 10.0, None]
    assert [row["clock/v"] for row in reported] == [row["clock/v"] for row in history[:2]]


@pytest.mark.usefixtures("packages")
def test_hugging_face_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def callback() -> Any:
        return trainer_callback({"inputs": INPUTS[:8]}, sampling="reshuffled")

    HuggingFaceTrainer(callback(), tmp_path).train(Module(), BATCHES[:7])
    folder, second = tmp_path / "checkpoint-7", callback()
    HuggingFaceTrainer(second, tmp_path).train(Module(), BATCHES[7:], folder)
    assert second.clock.steps == len(BATCHES)
    assert second.clock.time == pytest.approx(by_hand().time, rel=1e-12)
    # Broken twin: a checkpoint of a run that had no clock.
    (folder / "mixing_clock.pt").unlink()
    with pytest.warns(MixingClockWarning, match="has made steps before"):
        HuggingFaceTrainer(callback(), tmp_path / "other").train(Module(), BATCHES[7:], folder)


@pytest.mark.usefixtures("packages")
def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="neither inputs nor groups"):
        trainer_callback()
    with pytest.raises(ArgumentError, match="does not have this optimizer"):
        LightningTrainer(lightning_callback(optimizer=1)).fit(Module(), BATCHES)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    make: Any = lightning_callback if name == "lightning" else trainer_callback
    with pytest.raises(MissingDependencyError) as caught:
        make(INPUTS)
    assert f'pip install "manifold_sde[{name}]"' in caught.value.remedy


def test_the_real_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Real(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Module().net

        def forward(self, inputs: Tensor) -> Any:
            return self.net(inputs)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    callback: Any = lightning_callback(sampling="reshuffled")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path
    )
    trainer.fit(Real(), BATCHES)
    assert callback.clock.time == pytest.approx(by_hand().time, rel=1e-6)


def test_the_real_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Real(Module):
        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
            scores = self.net(inputs)
            if labels is None:
                return {"logits": scores}
            return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}

    rows = [{"inputs": x, "labels": y} for x, y in zip(INPUTS, LABELS, strict=True)]
    callback: Any = trainer_callback({"inputs": INPUTS[:8]}, sampling="reshuffled")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model=Real(), args=arguments, train_dataset=rows, callbacks=[callback]
    )
    trainer.train()
    assert callback.clock.steps == len(BATCHES)
    assert any("clock/v" in row for row in trainer.state.log_history)
