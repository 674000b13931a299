"""Results, reports, and what is printed and written of them."""

from __future__ import annotations

import html
import json
import math
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from manifold_sde import errors, problems
from manifold_sde.html_page import svg_address
from manifold_sde.verification import Design, Effort, Result, Subject, plot_picture, verify
from manifold_sde.verification.check import Check
from manifold_sde.verification.plain_names import PLAIN_NAMES
from manifold_sde.verification.suite import all_checks
from tests.verification.reports import DESIGN, FAILS, HOLDS, PICTURE, UNDECIDED, report


@pytest.mark.parametrize(
    ("results", "verdict", "passed"),
    [
        ((), "holds", True),
        ((HOLDS,), "holds", True),
        ((HOLDS, UNDECIDED), "undecided", True),
        ((UNDECIDED, FAILS, HOLDS), "fails", False),
    ],
)
def test_the_verdict_is_the_worst(results: tuple[Result, ...], verdict: str, passed: bool) -> None:
    made = report(*results)
    assert (made.verdict, made.passed) == (verdict, passed)
    assert list(made) == list(results)
    assert len(made) == len(results)


def test_what_is_printed_fits_a_terminal_and_says_all() -> None:
    made = replace(report(HOLDS, UNDECIDED, FAILS), problem="a problem of many words " * 9)
    short, text = str(made), made.text(full=True)
    for printed in (short, text):
        assert max(map(len, printed.splitlines())) <= 80
    assert HOLDS.detail not in short
    assert "Euler's theorem [Lemma 2.5] 1.2e-16 <= 1e-12" in " ".join(short.split())
    assert "p = 2e-09" in short
    flat = " ".join(text.split())
    for result in (HOLDS, UNDECIDED, FAILS):
        assert result.detail in flat
        assert result.meaning in flat
    assert "3 checks: 1 holds, 1 undecided, 1 fails" in flat
    assert "does not hold as it stands" in flat
    assert "false alarm with probability 0.0001" in " ".join(str(report(FAILS_NOT)).split())


def test_rows_are_in_plain_words_and_say_how_far_they_reached() -> None:
    """Beside the paper's number; the name of the check finds the row, and so do its words."""
    name = "SGD in the time tau tends to (13)"
    words = "SGD's direction after T against the limiting law"
    result = Result(
        name,
        "holds",
        "",
        p_value=0.3,
        statements=("Theorem 4.4",),
        kind="statistics",
        reach="T = 1.2, way 0.34",
    )
    made = report(result)
    lines = str(made).splitlines()
    (row,) = [k for k, line in enumerate(lines) if words in line]
    assert lines[row].endswith("[Theorem 4.4],  p = 0.3")
    assert lines[row + 1].strip() == "T = 1.2, way 0.34"
    assert made[name] is made[words] is result
    assert html.escape(words) in made._repr_html_()
    page = made.to_html()
    assert f'<span title="{name}">{html.escape(words)}</span>' in page
    assert "T = 1.2, way 0.34; p = 0.3" in page
    assert result.to_dict()["plain_name"] == words


def test_no_row_is_called_by_an_equation_alone() -> None:
    names = {check.name for check in all_checks()}
    assert len(set(PLAIN_NAMES.values())) == len(PLAIN_NAMES)
    equations = ("(7)", "(15) to (17)")
    rows = {f"Z of {e} tends to a Brownian motion" for e in equations}
    rows |= {f"A and B of {e}" for e in equations}
    assert set(PLAIN_NAMES) - names == rows
    numbered = {name for name in names if re.search(r"\(\d+\)|Remark|Phi", name)}
    # The two of the integrators have rows of other names.
    assert numbered - set(PLAIN_NAMES) == {"integrators of (7)", "integrators of (15) to (17)"}
    assert not any(re.search(r"\(\d+\)|Phi|tau", words) for words in PLAIN_NAMES.values())


@pytest.mark.parametrize(
    ("statistic", "limit", "p_value", "number"),
    [
        (2.0, 1.0, None, "2 > 1"),
        (0.5, 1.0, None, "0.5 <= 1"),
        (-2.0, -0.75, None, "2 >= 0.75"),
        (-0.5, -0.75, None, "0.5 < 0.75"),
        (3.0, math.nan, None, "3"),
        (math.nan, math.nan, None, ""),
        (2.0, 1.0, 0.31, "p = 0.31"),
    ],
)
def test_the_number_and_its_limit(
    statistic: float, limit: float, p_value: float | None, number: str
) -> None:
    assert Result("x", "holds", "y", statistic, limit, p_value).number == number


def test_what_is_tolerated_has_a_word_of_its_own() -> None:
    """A p-value of 1 that is so because nothing is left beyond a tolerance is no p-value."""
    result = Result("law", "holds", "detail", p_value=1.0, within_tolerance=True)
    assert result.number == "within tolerance"
    assert "within tolerance" in str(report(result))
    assert Result("law", "holds", "detail", p_value=1.0).number == "p = 1"


FAILS_NOT = Result("law", "holds", "p = 0.3", p_value=0.3, kind="statistics", design=DESIGN)


def test_the_report_as_data() -> None:
    made = report(HOLDS, FAILS)
    data = json.loads(made.to_json())
    assert data["verdict"] == "fails"
    assert data["results"][0]["statistic"] == HOLDS.statistic
    assert data["results"][1]["design"]["sample_size"] == 2000
    assert data["results"][1]["statements"] == ["Theorem 3.2", "Equation (8)"]
    assert json.loads(report(UNDECIDED).to_json())["results"][0]["statistic"] is None
    assert data["versions"]["torch"]
    assert made["Euler's theorem"] is HOLDS
    with pytest.raises(errors.ArgumentError, match="no check of this name"):
        made["nothing"]


def test_json_has_no_numbers_that_json_does_not_know() -> None:
    """Broken twin: json.dumps by itself writes NaN and Infinity, which no other reader takes."""

    def unknown(name: str) -> None:
        raise ValueError(name)

    odd = replace(HOLDS, statistic=math.inf, limit=-math.inf, tests={"a": math.nan, "b": 0.5})
    made = replace(report(odd), seconds=math.nan)
    with pytest.raises(ValueError, match="NaN"):
        json.loads(json.dumps(made.to_dict()), parse_constant=unknown)
    data = json.loads(made.to_json(), parse_constant=unknown)
    (result,) = data["results"]
    assert float(result["statistic"]) == math.inf
    assert float(result["limit"]) == -math.inf
    assert result["tests"] == {"a": None, "b": 0.5}
    assert data["seconds"] is None


def test_names_do_not_rule_the_terminal() -> None:
    made = replace(report(HOLDS), problem="a\x1b[2J\x07b")
    for text in (str(made), made.text(full=True)):
        assert r"a\x1b[2J\x07b" in text
        assert "\x1b" not in text
    error = errors.ArgumentError("no", received="a\x1b[2J name\nof two lines")
    assert str(error) == "no\n  received: a\\x1b[2J name\nof two lines"


def test_files(tmp_path: Path) -> None:
    made = report(HOLDS, FAILS)
    for name in ("a/report.html", "report.json", "report.txt"):
        made.save(tmp_path / name)
        assert "a toy" in (tmp_path / name).read_text(encoding="utf-8")
    with pytest.raises(errors.ArgumentError, match="form of the report"):
        made.save(tmp_path / "report.pdf")


def test_the_page_holds_everything_and_names_no_other_place() -> None:
    page = report(HOLDS, UNDECIDED, FAILS).to_html()
    assert page.count("<script>") == page.count("<script") == 1  # its own, and none from elsewhere
    assert "http" not in page
    assert "law of the direction &lt;b&gt;" in page
    assert page.count("<details open") == 2
    assert page.count("<details>") == 1
    assert page.count("<img ") == 2
    body = page[page.index("<main>") : page.index("</main>") + len("</main>")]
    assert len(list(xml.etree.ElementTree.fromstring(body).iter("details"))) == 3


def test_a_picture_draws_each_of_its_series() -> None:
    axes = Figure().subplots()
    assert plot_picture(PICTURE, axes) is axes
    assert len(axes.lines) + len(axes.containers) >= 4
    assert axes.get_title() == PICTURE.title
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "exact",
        "counts",
        "runs",
    ]
    first, again = (svg_address(plot_picture(PICTURE).figure, PICTURE.title) for _ in range(2))
    assert first.startswith("data:image/svg+xml;base64,")
    assert first == again


@pytest.mark.parametrize(
    ("false_alarm", "miss", "runs"), [(0.0, 0.1, 10), (0.1, 1.0, 10), (0.1, 0.1, 0)]
)
def test_a_design_that_declares_nothing(false_alarm: float, miss: float, runs: int) -> None:
    with pytest.raises(errors.ArgumentError, match="not the design of a test"):
        Design("equal", false_alarm, "a tenth", miss, runs)


def test_results_name_statements_of_the_paper() -> None:
    with pytest.raises(errors.ArgumentError, match="not the result"):
        Result("x", "holds", "y", statements=("Lemma 99",))
    with pytest.raises(errors.ArgumentError, match="not the result"):
        Result("x", "passes", "y")  # type: ignore[arg-type]


# The suite.


def stops(subject: Subject, effort: Effort) -> list[Result]:
    raise errors.RankError("the rank jumps", received="1 and 2", remedy="another loss")


def breaks(subject: Subject, effort: Effort) -> list[Result]:
    raise ZeroDivisionError("float division by zero\nin the loss")


CHECKS = (
    Check("breaks", "property", (), breaks),
    Check("good", "property", ("Lemma 2.5",), lambda subject, effort: [HOLDS]),
    Check("stops", "assumption", ("Assumption 2.1",), stops),
    Check("nothing", "statistics", (), lambda subject, effort: []),
)


def test_what_stops_a_check_is_undecided_and_says_why() -> None:
    made = verify(problems.great_circle(), checks=CHECKS, seed=3)
    assert [result.verdict for result in made] == ["undecided", "holds", "undecided"]
    assert made["breaks"].detail == "stopped by ZeroDivisionError: float division by zero"
    found = made["stops"]
    assert "the rank jumps: 1 and 2" in found.detail
    assert "another loss" in found.meaning
    assert found.statements == ("Assumption 2.1",)
    assert (made.seed, made.effort) == (3, "quick")


def test_what_cannot_be_verified() -> None:
    problem = problems.great_circle()
    with pytest.raises(errors.DTypeError, match="not a Problem"):
        verify(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="no such effort"):
        verify(problem, effort="lazy", checks=())
    with pytest.raises(errors.ArgumentError, match="seed"):
        verify(problem, seed=-1, checks=())
    with pytest.raises(errors.ShapeError):
        verify(problem, x_init=problem.minimizer[:2], checks=())


def test_a_report_draws_how_far_each_check_is_from_its_limit() -> None:
    checks = (
        replace(HOLDS, statistic=1e-9, limit=1e-7),
        replace(FAILS, statistic=-0.1, limit=-0.3),  # a number below its lower bound
        replace(UNDECIDED, statistic=math.nan),
    )
    assert [check.distance for check in checks[:2]] == pytest.approx([0.01, 3.0])
    ax = report(*checks).plot()
    places = [float(line.get_xdata()[0]) for line in ax.lines[:3]]
    assert places[:2] == pytest.approx([0.01, 3.0])
    assert ax.lines[2].get_markerfacecolor() == "none"
    assert len({line.get_marker() for line in ax.lines[:3]}) == 3
    assert [text.get_text() for text in ax.get_yticklabels()] == [check.name for check in checks]
    own = Figure().subplots()
    assert report(*checks).plot(own) is own


def test_a_report_shows_itself_in_a_few_lines() -> None:
    lines = repr(report(HOLDS, FAILS)).splitlines()
    assert lines[-1].startswith(f"  FAILS {FAILS.name}")
    assert max(map(len, lines)) <= 80
    assert len(lines) < 8
    named = report(replace(FAILS, name="<b>"))._repr_html_()
    assert "<b>" not in named
    assert "&lt;b&gt;" in named
