"""The audit of runs whose norms are known, of runs that are off for a known reason, and of logs."""

import csv
import json
import math
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from manifold_sde.errors import (
    ArgumentError,
    DataFileError,
    DTypeError,
    MixingClockError,
    MixingClockWarning,
    NonFiniteError,
)
from manifold_sde.training import AuditReport, MixingClock, ScaleGroup, audit, expected_clock
from manifold_sde.training import clock as clock_module
from manifold_sde.training.freshness import BatchNoise
from manifold_sde.training.group_audit import short

PATHS, DIM = 40, 200


class Rows(nn.Module):
    """Rows whose gradients are noise tangent to each: fresh, repeated, or of changing sign."""

    def __init__(self, noise: str = "fresh") -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        start = torch.randn(PATHS, DIM, generator=self.generator, dtype=torch.float64)
        self.weight = nn.Parameter(start / start.norm(dim=1, keepdim=True))
        self.noise, self.steps, self.z = noise, 0, torch.zeros(0)
        self.group = ScaleGroup("rows", ("weight",), 0, 1, None, PATHS, PATHS * DIM, 0.0)

    def fill(self) -> None:
        x = self.weight.detach()
        if self.noise == "fresh" or self.steps % 20 == 0:
            self.z = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        self.z = -self.z if self.noise == "opposite" else self.z
        self.steps += 1
        z = self.z - x * ((x * self.z).sum(1, keepdim=True) / x.square().sum(1, keepdim=True))
        self.weight.grad = z / (math.sqrt(DIM - 1) * x.norm(dim=1, keepdim=True))


def run(
    steps: int, noise: str = "fresh", *, between: Any = None, adam: bool = False, **options: Any
) -> tuple[Rows, MixingClock]:
    rows = Rows(noise)
    optimizer: torch.optim.Optimizer
    if adam:
        optimizer = torch.optim.AdamW([rows.weight], eps=1e-20, **options)
    else:
        optimizer = torch.optim.SGD([rows.weight], **{"lr": 0.01, "momentum": 0.9, **options})
    clock = MixingClock(rows, optimizer, [rows.group], sampling="iid")
    for _ in range(steps):
        rows.fill()
        optimizer.step()
        if between is not None:
            between(rows)
    return rows, clock


@pytest.mark.paper("Equation (10)")
def only(report: AuditReport) -> Any:
    (row,) = report
    return row


def test_a_run_of_noise_is_as_predicted() -> None:
    _, clock = run(600, weight_decay=0.05)
    report = audit(clock)
    row = only(report)
    assert row.verdict == "as predicted"
    assert report.passed
    assert row.norm == pytest.approx(row.predicted, rel=0.02)
    assert row.norm == pytest.approx(row.equilibrium, rel=0.03)
    assert row.norm == pytest.approx((0.1 / 0.1) ** 0.25, rel=0.02)  # (ηe V / 2λ)^(1/4)
    assert row.rotation == pytest.approx(row.expected_rotation, rel=0.05)
    assert row.alignment == pytest.approx(0.9474, abs=0.01)
    assert row.pure_alignment == pytest.approx(0.9474, abs=1e-4)
    assert row.gradient_ratio == pytest.approx(1.0 / row.norm**2, rel=0.02)  # |g| is 1/|x|
    assert report.to_dict()["groups"][0]["gradient_ratio"] == row.gradient_ratio
    assert row.decay + row.growth == pytest.approx(row.change, abs=1e-12)
    assert report.closing < 1e-12
    assert row.cosine < 1e-12


@pytest.mark.parametrize("adam", [False, True])
def test_steps_to_go_are_the_steps_that_it_takes(adam: bool) -> None:
    options = {"lr": 0.004, "weight_decay": 0.1} if adam else {"weight_decay": 0.01}
    keywords: dict[str, Any] = {"optimizer": "adamw", "size": DIM} if adam else {"momentum": 0.9}
    _, clock = run(60, adam=adam, **options)
    row = only(audit(clock))
    assert row.verdict == "not yet in equilibrium"
    lr = options.get("lr", 0.01)
    norms = expected_clock(lr, 20000, weight_decay=options["weight_decay"], **keywords).norms
    assert row.equilibrium == pytest.approx(norms[-1], rel=0.03)
    there = int(np.argmax(np.abs(norms / norms[-1] - 1.0) < 0.05))
    assert row.steps_to_go == pytest.approx(there - 60, rel=0.2)
    assert "steps to go" in str(audit(clock))


def test_no_decay_is_no_equilibrium() -> None:
    row = only(audit(run(60)[1]))
    assert row.verdict == "no equilibrium"
    assert row.steps_to_go == math.inf
    assert math.isnan(row.equilibrium)
    assert "without decay" in row.reason


@pytest.mark.parametrize("adam", [False, True])
def test_a_schedule_that_ended_at_0_is_as_predicted(adam: bool) -> None:
    options = {"lr": 0.01, "weight_decay": 0.05}
    rows, clock = run(200, adam=adam, **options)
    before = only(audit(clock))
    clock.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(10):
        rows.fill()
        clock.optimizer.step()
    row = only(audit(clock))
    assert row.verdict == "as predicted"
    assert "learning rate is 0" in row.reason
    assert row.equilibrium == pytest.approx(before.equilibrium, rel=0.05)
    assert max(len(line) for line in str(audit(clock)).splitlines()) <= 80


@pytest.mark.parametrize("adam", [False, True])
def test_the_expected_turn_is_of_the_same_steps_under_a_schedule(adam: bool) -> None:
    """The turn is a mean of many steps; at the present rate of a cosine it is half or a tenth."""
    rows, clock = run(0, lr=0.01, weight_decay=0.05, adam=adam)
    (group,) = clock.optimizer.param_groups
    for k in range(600):
        group["lr"] = 0.005 * (1.0 + math.cos(math.pi * k / 600))
        rows.fill()
        clock.optimizer.step()
        if k in (450, 590):
            row = only(audit(clock))
            assert row.rotation == pytest.approx(row.expected_rotation, rel=0.03)
            assert row.verdict != "off"
            # Broken twin: the present rate, at the present norm.
            now = group["lr"] / row.norm * math.sqrt((0.1 / 1.9) * DIM if adam else 1 / 0.19)
            assert (now if adam else now / row.norm) < 0.7 * row.rotation


def test_the_whole_is_all_groups_as_one_vector() -> None:
    model = network()
    clock = classifier(model, ["0.weight", "3.weight"])
    report = audit(clock)
    whole, parts = report.whole, list(report)
    assert whole is not None
    joint = torch.cat([model[0].weight.flatten(), model[3].weight.flatten()])
    assert whole.norm == pytest.approx(float(joint.detach().norm()), rel=1e-5)
    assert whole.decay + whole.growth == pytest.approx(whole.change, abs=1e-9)
    assert whole.clock == clock.time
    assert min(r.rotation for r in parts) < whole.rotation < max(r.rotation for r in parts)
    assert whole.verdict in [row.verdict for row in parts]
    assert "the whole: " in str(report)
    assert "the whole" in report.to_html()
    assert report.to_dict()["whole"]["norm"] == whole.norm
    assert audit(run(30)[1]).whole is None


@pytest.mark.parametrize(
    ("noise", "reason"),
    [("repeated", "successive gradients agree"), ("opposite", "successive gradients undo")],
)
def test_gradients_that_are_not_independent(noise: str, reason: str) -> None:
    report = audit(run(600, noise, weight_decay=0.02)[1])
    row = only(report)
    assert row.verdict == "off"
    assert reason in row.reason
    assert not report.passed


def in_pairs(count: int, rare: float, opposite: bool) -> Any:
    """The audit of AdamW on tangent noise that turns pairs of coordinates, few of them at a time.

    Args:
        count: Steps.
        rare: The probability that a pair has a gradient in a step.
        opposite: Whether each gradient is undone by the next.
    """
    rows = Rows()
    optimizer = torch.optim.AdamW(
        [rows.weight], lr=0.003, weight_decay=0.05, betas=(0.9, 0.99), eps=1e-20
    )
    clock = MixingClock(rows, optimizer, [rows.group], sampling="iid")
    drawn = torch.zeros(PATHS, DIM // 2, 1, dtype=torch.float64)
    for step in range(count):
        x = rows.weight.detach()
        if step % 2 == 0 or not opposite:
            drawn.normal_(generator=rows.generator)
            drawn *= torch.rand(drawn.shape, generator=rows.generator) < rare
        sign = -1.0 if opposite and step % 2 else 1.0
        pairs = torch.stack([x[:, 1::2], -x[:, ::2]], -1)
        rows.weight.grad = (sign * drawn * pairs / x.square().sum(1)[:, None, None]).flatten(1)
        optimizer.step()
    return only(audit(clock))


def test_rare_gradients_under_adam_are_no_fault_of_the_run() -> None:
    """Independent ones: large ones are divided by more, which the prediction does not know.

    Those that undo each other are told from them, and even ones are as predicted.
    """
    rare = in_pairs(1000, 0.01, opposite=False)
    assert rare.norm < 0.85 * rare.predicted
    assert rare.verdict == "off"
    assert "rare, or of heavy tails" in rare.reason
    undone = in_pairs(1000, 1.0, opposite=True)
    assert undone.verdict == "off"
    assert "undo each other" in undone.reason
    even = in_pairs(300, 1.0, opposite=False)
    assert even.verdict == "not yet in equilibrium"
    assert even.reason == ""


def test_alignment_of_momentum_is_not_taken_for_signal() -> None:
    """A rule by which an alignment of .95 is signal would reject every run with momentum."""
    row = only(audit(run(300, weight_decay=0.05)[1]))
    assert row.alignment > 0.9
    assert row.verdict != "off"


def test_alignment_of_nesterovs_momentum() -> None:
    """At momentum .5: .594, where that of plain momentum, 2β/(1 + β), is .667."""
    row = only(audit(run(400, momentum=0.5, nesterov=True, weight_decay=0.05, lr=0.05)[1]))
    assert row.alignment == pytest.approx(row.pure_alignment, abs=0.01)
    assert row.rotation == pytest.approx(row.expected_rotation, rel=0.03)
    assert abs(row.alignment - 2 / 3) > 0.03


def test_weights_that_others_change() -> None:
    def shrink(rows: Rows) -> None:
        rows.weight.data.mul_(0.99)

    row = only(audit(run(200, weight_decay=0.02, between=shrink)[1]))
    assert row.verdict == "off"
    assert "outside of optimizer.step()" in row.reason


def classifier(
    model: nn.Module, groups: Any, *, clip: float = 0.0, freeze: str = ""
) -> MixingClock:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    clock = MixingClock(model, optimizer, groups, inputs=x)
    for name, p in model.named_parameters():
        p.requires_grad_(name != freeze)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return clock


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16, bias=False),
        nn.LayerNorm(16),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
    )


def test_what_is_not_scale_invariant_is_seen() -> None:
    report = audit(classifier(network(), ["0.weight", "5.weight"]))
    assert report["5.weight"].verdict == "off"
    assert "it is not scale-invariant" in report["5.weight"].reason
    assert report["0.weight"].cosine < 1e-3


def test_an_eps_that_is_seen() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(0.02)
    clock = classifier(model, ["0.weight"])
    assert "eps" in audit(clock)["0.weight"].sentence


def test_frozen_and_clipped() -> None:
    report = audit(classifier(network(), None, clip=1e-3, freeze="0.weight"))
    assert report["0.weight"].reason == "frozen, it had no gradient"
    assert any("are clipped" in note for note in report.notes)
    assert not any("are clipped" in note for note in audit(classifier(network(), None)).notes)


def test_the_report(tmp_path: Path) -> None:
    _, clock = run(120, weight_decay=0.02)
    clock.values()
    report = audit(clock)
    text = str(report)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "ledger of |x|^2" in text
    report.save(tmp_path / "audit.json")
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["groups"][0]["norm"] == only(report).norm
    assert saved["passed"] is True
    ax = report.plot(Figure().subplots())
    assert ax.get_xlabel() == "steps"
    assert ax.get_title() == "measured, predicted (cross: at the end), at rest (dotted)"
    _, cross, rest = ax.lines
    assert (cross.get_marker(), rest.get_linestyle()) == ("x", ":")
    assert cross.get_xydata().tolist() == [[120.0, only(report).predicted]]
    judged = "as predicted: within 15 % of predicted; steps to go: until within 5 % of at rest"
    assert judged in text.splitlines()
    assert judged in report.to_html()
    clock.sampling = "reshuffled"
    assert any("comes back each epoch" in note for note in audit(clock).notes)
    clock.sampling, clock.noise = None, BatchNoise(1.0, 0.0, 0.0)  # measured; the order is not told
    assert any("If every sample comes once" in note for note in audit(clock).notes)


def test_the_page_holds_everything_and_names_no_other_place(tmp_path: Path) -> None:
    _, clock = run(120, weight_decay=0.02)
    report = audit(clock)
    rows = tuple(
        replace(only(report), group=f"<{verdict}>", verdict=verdict)
        for verdict in ("as predicted", "off", "not yet in equilibrium")
    )
    report = replace(report, rows=rows, norms={row.group: report.norms["rows"] for row in rows})
    page = report.to_html()
    report.save(tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == page + "\n"
    assert "<script" not in page
    assert "http" not in page
    body = ElementTree.fromstring(page[page.index("<main>") : page.index("</main>") + 7])
    table, ledger = body.iter("table")
    classes = [cell.get("class") for cell in table.iter("td") if cell.get("class")]
    assert classes == ["verdict", "verdict holds", "verdict fails", "verdict undecided"]
    names = ["<as predicted> (40 parts)", "<off> (40 parts)", "<not yet in equilibrium> (40 parts)"]
    assert [cell.text for cell in table.iter("th") if cell.get("scope") == "row"] == names
    for rows_of, numbers in ((table, rows[0].numbers), (ledger, rows[0].ledger)):
        row = list(rows_of.iter("tr"))[1]
        cells = [cell.text for cell in row.iter("td") if not cell.get("class")]
        assert cells == [short(number) for number in numbers.values()]
    assert len(list(body.iter("img"))) == 1
    conclusion = next(p for p in body.iter("p") if "conclusion" in (p.get("class") or ""))
    assert conclusion.get("class") == "conclusion fails"
    assert (
        "".join(conclusion.itertext())
        == "3 groups: 1 as predicted, 1 off, 1 not yet in equilibrium."
    )
    with pytest.raises(ArgumentError, match="form of the report"):
        report.save(tmp_path / "audit.pdf")


def _nan_weight(rows: Rows) -> None:
    rows.weight.data[3, 5] = math.nan


def _infinite_gradient(rows: Rows) -> None:
    assert rows.weight.grad is not None
    rows.weight.grad[3, 5] = math.inf


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("spoil", [_nan_weight, _infinite_gradient])
def test_a_run_that_is_not_finite_never_passes(spoil: Any, adam: bool) -> None:
    """One of 40 parts is enough; the medians of the others do not hide it."""
    rows, clock = run(20, adam=adam, lr=0.01, weight_decay=0.02)
    assert clock.not_finite_since is None
    assert "clock/not_finite_since" not in clock.values()
    rows.fill()
    spoil(rows)
    clock.optimizer.step()
    with pytest.warns(MixingClockWarning, match=r"since step 21 \(about\)") as told:
        assert clock.values()["clock/not_finite_since"] == 21
    for _ in range(3):
        rows.fill()
        clock.optimizer.step()
    assert clock.values()["clock/not_finite_since"] == 21
    assert len(told) == 1
    again = MixingClock(rows, clock.optimizer, [rows.group])
    again.load_state_dict(clock.state_dict())
    for one in (clock, again):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = audit(one)
        assert not report.passed
        assert only(report).sentence == "off: not finite since step 21 (about)"
        assert any("checkpoint of before" in note for note in report.notes)
        assert "since step 21" in report.title
        assert "it closes" not in str(report)
        assert report.to_dict()["passed"] is False
        assert "conclusion fails" in report.to_html()


def test_weights_outside_of_all_groups_are_looked_at_in_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The groups are finite until the next step, which is when the twin says it."""

    def spoilt() -> MixingClock:
        rows, head = Rows(), nn.Parameter(torch.ones(3))
        unused = nn.Parameter(torch.full((2,), math.nan), requires_grad=False)
        optimizer = torch.optim.SGD([rows.weight, head, unused], 0.01, weight_decay=0.02)
        clock = MixingClock(rows, optimizer, [rows.group])
        for bad in (False, True):
            rows.fill()
            head.grad = torch.tensor([1.0, math.nan if bad else 1.0, 1.0])
            optimizer.step()
            assert clock.not_finite_since == (2 if bad else None)
        return clock

    with pytest.warns(MixingClockWarning, match=r"since step 2 \(about\)"):
        clock = spoilt()
    assert not audit(clock).passed
    monkeypatch.setattr(clock_module, "look_at_others", lambda *_: None)
    with pytest.raises(AssertionError):
        spoilt()


def test_a_rate_that_is_not_finite_and_weights_that_are_0() -> None:
    rows, clock = run(20, weight_decay=0.02)
    clock.optimizer.param_groups[0]["lr"] = math.nan
    assert "rate or weight decay is not finite" in only(audit(clock)).reason
    rows = Rows()
    rows.weight.data[3] = 0.0  # a row that is padding has no direction, and no fault
    clock = MixingClock(rows, torch.optim.SGD([rows.weight], 0.01), [rows.group])
    for _ in range(5):
        rows.fill()
        rows.weight.grad[3] = 0.0  # type: ignore[index]
        clock.optimizer.step()
    assert audit(clock).passed
    assert clock.not_finite_since is None


def test_wrong_use_is_named() -> None:
    _, clock = run(0)
    with pytest.raises(MixingClockError, match="was not stepped"):
        audit(clock)
    with pytest.raises(DTypeError, match="nothing to audit"):
        audit(nn.Linear(2, 2))  # type: ignore[arg-type]
    _, clock = run(1)
    with pytest.raises(ArgumentError, match="knows its rates"):
        audit(clock, lr=0.1)


# Logs.

STEPS = 2000


def sgd_log(path: Path, *, jsonl: bool = False, every: int = 50, broken: bool = False) -> Path:
    """Norms of the theory with V = 2, at a rate that drops, with gaps and unsorted."""
    rates = np.where(np.arange(STEPS) < 1200, 0.02, 0.005)
    run_ = expected_clock(rates, weight_decay=0.01, momentum=0.9, noise=2.0)
    rows = []
    for k in range(0, STEPS + 1, every):
        norm = float(run_.norms[k]) * (2.5 if broken and k > 0.4 * STEPS else 1.0)
        rows.append({"step": k, "w/norm": norm, "lr": rates[min(k, STEPS - 1)], "loss": 1.0})
    rows = rows[::-1]
    if jsonl:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_log_of_norms(tmp_path: Path, jsonl: bool) -> None:
    path = sgd_log(tmp_path / "log", jsonl=jsonl)
    report = audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01)
    row = only(report)
    assert row.verdict == "not yet in equilibrium"
    assert row.norm == pytest.approx(row.predicted, rel=0.02)
    assert row.equilibrium == pytest.approx((0.05 * 2.0 / 0.02) ** 0.25, rel=0.02)
    rates = np.where(np.arange(STEPS) < 1200, 0.02, 0.005)
    whole = expected_clock(rates, weight_decay=0.01, momentum=0.9, noise=2.0)
    assert row.clock == pytest.approx(whole.total, rel=1e-6)  # the drop is at a row
    np.testing.assert_allclose(report.clocks["w/norm"], whole.clock[::50], rtol=1e-6, atol=1e-9)
    assert max(len(line) for line in str(report).splitlines()) <= 80
    assert report.predictions["w/norm"].shape == (41,)
    # A constant given as a number is another run, which takes less noise after the drop.
    wrong = only(audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01, lr=0.02))
    assert row.reason == ""
    assert "its noise has changed, from 2" in wrong.reason


def test_a_log_whose_learning_rate_ends_at_0(tmp_path: Path) -> None:
    path = sgd_log(tmp_path / "log.jsonl", jsonl=True)
    lines = path.read_text().splitlines()  # the last row comes first, and has no step behind it
    ended = [json.dumps({**json.loads(line), "lr": 0.0}) for line in lines[:2]]
    path.write_text("\n".join([*ended, *lines[2:]]))
    row = only(audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01))
    assert (row.verdict, "learning rate is 0" in row.reason) == ("as predicted", True)
    assert row.equilibrium == pytest.approx((0.05 * 2.0 / 0.02) ** 0.25, rel=0.02)


def test_a_log_that_is_off(tmp_path: Path) -> None:
    path = sgd_log(tmp_path / "log.csv", broken=True)
    row = only(audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01))
    assert row.verdict == "off"
    assert "something else changed the weights" in row.reason


def test_noise_that_changes_is_no_failure(tmp_path: Path) -> None:
    """V falls eightfold along the run; one number for it is off by more than 10 %."""
    x, rows = 1.0, []
    for k in range(3000):
        if k % 50 == 0:
            rows.append({"step": k, "lr": 0.02, "w/norm": x**0.25})
        noise = 4.0 * math.exp(-math.log(8.0) * k / 3000)
        x = x * (1.0 - 0.02 * 0.05) ** 4 + 2.0 * 0.02**2 * noise
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    row = only(audit(path, optimizer="sgd", weight_decay=0.05))
    assert row.verdict != "off"
    assert "its noise has changed" in row.reason
    assert row.predicted == pytest.approx(row.norm, rel=0.05)
    last = (0.02 * 0.5 / (2 * 0.05)) ** 0.25
    assert row.equilibrium == pytest.approx(last, rel=0.06)
    # Norms that nothing but another decay explains are off all the same.
    fallen = [{**r, "w/norm": 0.99**i} for i, r in enumerate(rows)]
    path.write_text("\n".join(json.dumps(r) for r in fallen))
    assert "not scale-invariant" in only(audit(path, optimizer="sgd", weight_decay=1e-4)).reason


FORMS = {
    "empty cells": lambda rows: _csv(rows, ",", ""),
    "semicolons": lambda rows: _csv(rows, ";", ""),
    "decimal commas": lambda rows: _csv(rows, ";", "").replace("0.", "0,").replace("1.", "1,"),
    "tabs": lambda rows: _csv(rows, "\t", "NaN"),
    "nulls": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "rows that lack it": lambda rows: "\n".join(
        json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows
    ),
    "an array": lambda rows: json.dumps(rows, indent=1),
    "a Trainer's state": lambda rows: json.dumps({"epoch": 2, "log_history": rows}, indent=1),
}


def _csv(rows: list[dict[str, Any]], separator: str, empty: str) -> str:
    lines = [separator.join(rows[0])]
    for row in rows:
        lines.append(separator.join(empty if v is None else str(v) for v in row.values()))
    return "\n".join(lines)


@pytest.mark.parametrize("form", FORMS)
def test_logs_as_people_have_them(tmp_path: Path, form: str) -> None:
    """Norms in each fourth row, rates in each second, gradients' norms beside, a step twice."""
    whole = expected_clock(0.02, 1000, weight_decay=0.01, momentum=0.9, noise=2.0)
    rows: list[dict[str, Any]] = []
    for i, k in enumerate([*range(0, 501, 25), *range(475, 1001, 25)]):
        rows.append(
            {
                "step": k,
                "lr": 0.02 if i % 2 == 0 else None,
                "w.norm": None if i % 4 else float(whole.norms[k]),
                "grad_norm": 1.0 + i % 3,
                "loss": None if i % 2 else 1.5,
            }
        )
    path = tmp_path / "log.txt"
    path.write_text(FORMS[form](rows))
    row = only(audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01))
    assert row.group == "w.norm"
    assert row.verdict != "off"
    assert row.equilibrium == pytest.approx((0.2 * 2.0 / 0.02) ** 0.25, rel=0.02)
    # The broken twin takes the norms of gradients for those of weights, as any "norm".
    twin = audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01, norms=["grad_norm"])
    assert not twin.passed


def test_the_values_of_a_clock_are_a_log(tmp_path: Path) -> None:
    """A module may be called norm; of its values only the norms are norms."""
    rows, clock = run(0, weight_decay=0.05)
    lines = []
    for k in range(300):
        rows.fill()
        clock.optimizer.step()
        if k % 10 == 0:
            values = {n.replace("rows", "norm1"): v for n, v in clock.values().items()}
            lines.append(json.dumps({"step": k + 1, "lr": 0.01, **values}))
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    row = only(audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.05))
    assert (row.group, row.verdict) == ("norm1/norm", "as predicted")
    # Its clock starts at the first row, and knows of the buffer nothing before.
    assert row.clock == pytest.approx(only(audit(clock)).clock, rel=0.1)


def test_columns_that_were_logged_at_other_steps(tmp_path: Path) -> None:
    whole = expected_clock(0.02, 1000, weight_decay=0.01, momentum=0.9, noise=2.0)
    rows = [
        {"step": k, f"{name}/norm": float(whole.norms[k])}
        for name, every in (("a", 50), ("b", 70))
        for k in range(0, 1001, every)
    ]
    path = tmp_path / "log.json"
    path.write_text(json.dumps(rows))
    report = audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01, lr=0.02)
    assert report.passed
    assert len(report.steps) == len({row["step"] for row in rows})
    for name, every in (("a/norm", 50), ("b/norm", 70)):
        logged = np.isin(report.steps, np.arange(0, 1001, every))
        for series in (report.norms, report.predictions, report.clocks):
            np.testing.assert_array_equal(np.isfinite(series[name]), logged)
        assert report[name].clock == pytest.approx(whole.clock[1000 // every * every], rel=1e-3)
    assert report.to_dict()["predictions"]["a/norm"][0] == 1.0
    ax = report.plot(Figure().subplots())
    assert all(np.isfinite(line.get_ydata()).all() for line in ax.lines)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}  # type: ignore[dict-item]
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folder_of_checkpoints(tmp_path: Path, suffix: str) -> None:
    """AdamW, whose norms are known from the number of weights alone."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(20, 20)})
    w = model["layer"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.3, betas=(0.9, 0.99))
    for k in range(601):
        if k % 60 == 0:
            state = {n: t.clone() for n, t in model.state_dict().items()}
            file = tmp_path / f"run1_step{k:05d}{suffix}"
            if suffix == ".pt":
                torch.save({"model": state, "optimizer": optimizer.state_dict()}, file)
            else:
                write_safetensors(file, state)
        x = w.detach()
        z = torch.randn_like(x)
        w.grad = (z - x * (x * z).sum() / x.square().sum()) / x.norm()
        optimizer.step()
    rates: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.3, "betas": (0.9, 0.99)}
    row = only(audit(tmp_path, **rates))
    assert row.group == "layer.weight"
    assert row.verdict != "off"
    assert row.predicted == pytest.approx(row.norm, rel=0.05)
    assert only(audit(tmp_path, **rates | {"weight_decay": 0.0})).verdict == "off"
    with pytest.raises(ArgumentError, match="does not say the learning rate"):
        audit(tmp_path)
    with pytest.raises(DataFileError, match="no tensor 'other'"):
        audit(tmp_path, norms=["other"], **rates)


@pytest.mark.parametrize("end", ["nan", "inf", ""])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_log_that_ends_in_nan_never_passes(tmp_path: Path, end: str, backwards: bool) -> None:
    """Empty cells, and NaN between numbers as at the end, are steps that were not logged."""
    norms = expected_clock(0.02, 1000, weight_decay=0.01, momentum=0.9).norms
    options = {"lr": 0.02, "weight_decay": 0.01, "optimizer": "sgd", "momentum": 0.9}

    def audited(cell: Any, steps: range) -> AuditReport:
        rows = [f"{k},{norms[k]},{cell(k)}" for k in steps]
        path = tmp_path / "log.csv"
        path.write_text("\n".join(["step,a/norm,b/norm", *(rows[::-1] if backwards else rows)]))
        return audit(path, **options)

    report = audited(lambda k: norms[k] if k < 600 else end, range(0, 1001, 50))
    assert report.passed is (end == "")
    if end:
        assert report["b/norm"].sentence == "off: not finite since step 600 (about)"
        assert any("checkpoint of before" in note for note in report.notes)
        assert not audited(lambda k: end, range(0, 1001, 50)).passed
        report.plot()
    assert audited(lambda k: "nan" if k % 50 else norms[k], range(10, 990, 10)).passed


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = sgd_log(tmp_path / "log.csv")
    with pytest.raises(DataFileError, match="no column 'iteration'"):
        audit(path, step="iteration")
    with pytest.raises(DataFileError, match="cannot be read"):
        audit(tmp_path / "none.csv")
    with pytest.raises(ArgumentError, match="too few norms"):
        audit(path, norms=[])
    (tmp_path / "words.csv").write_text("step,norm,lr\n1,2,3\n2,two,3\n")
    with pytest.raises(DataFileError, match="no numbers"):
        audit(tmp_path / "words.csv")
    (tmp_path / "gradients.csv").write_text("step,grad_norm,lr\n1,2,3\n2,2,3\n3,2,3\n")
    with pytest.raises(ArgumentError, match="norms of gradients do not say it"):
        audit(tmp_path / "gradients.csv")
    (tmp_path / "no_rate.csv").write_text("step,norm,lr\n1,2,\n2,2,\n3,2,\n")
    with pytest.raises(ArgumentError, match="column of lr is empty"):
        audit(tmp_path / "no_rate.csv")
    (tmp_path / "rate.csv").write_text("step,norm,lr\n1,2,1\n2,2,inf\n3,2,1\n")
    with pytest.raises(NonFiniteError, match="inf at step 2"):
        audit(tmp_path / "rate.csv")
    for text in ("[1, 2]", '{"step": 1}\n{"step"', "[{]"):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(DataFileError, match="cannot be read"):
            audit(tmp_path / "broken.json")
    folder = tmp_path / "nan"
    folder.mkdir()
    for k in range(4):
        torch.save({"w": torch.full((3, 3), 1.0 if k < 2 else math.nan)}, folder / f"step_{k}.pt")
    report = audit(folder, lr=0.1)
    assert (report.passed, only(report).reason) == (False, "not finite since step 2 (about)")
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(DataFileError, match="no checkpoints"):
        audit(folder, lr=0.1)

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Harmful()}, folder / "step_1.pt")
    with pytest.raises(DataFileError, match="as weights alone"):
        audit(folder, lr=0.1)
    assert not (tmp_path / "ran").exists()
