"""The page of a report in a real browser, without a screen."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifold_sde.training import AuditReport, GroupAudit
from tests.verification.reports import FAILS, HOLDS, UNDECIDED, report

AUDIT = AuditReport(
    "a run",
    (GroupAudit("blocks.0.weight", 12, 1.5, 1.6, 1.7, 0.01, 0.01, decay=-0.1, growth=0.1),),
    ("a note",),
    steps=np.arange(3),
    norms={"blocks.0.weight": np.array([1.0, 1.2, 1.5])},
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [380, 1280])
def test_the_page_shows_what_it_says(browser: Any, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    far = replace(FAILS, reach="T = 0.0947, way 0.097 of a run of SGD")
    report(HOLDS, UNDECIDED, far).save(path, audit=AUDIT)
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", screen
    )  # a window is not so narrow
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    assert "a toy <x>" in browser.title
    # Nothing is wider than the window.
    inner, outer = browser.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert inner <= outer == width
    # Every plot is really drawn.
    sizes = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt])"
    )
    assert len(sizes) == 3
    assert all(done and size > 100 and alt for done, size, alt in sizes)
    # A table that is too wide scrolls by itself.
    assert "as predicted" in browser.find_element("tag name", "table").text
    # What failed lies open, what holds opens on a click.
    shown = browser.find_element("tag name", "body").text
    assert FAILS.detail in shown
    assert UNDECIDED.meaning in shown
    assert HOLDS.detail not in shown
    assert HOLDS.number in shown  # the number that decides is in the row itself
    browser.find_element("css selector", "details:not([open]) summary").click()
    assert HOLDS.detail in browser.find_element("tag name", "body").text
    button = browser.find_element("id", "all")
    for count, text in ((4, "Close all"), (0, "Open all")):  # the audit's ledger is closed at first
        button.click()
        opened = browser.find_elements("css selector", "details[open]")
        assert (len(opened), button.text) == (count, text)


def test_a_quick_report_is_printed_on_two_pages(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    kinds = ("assumption",) * 12 + ("property",) * 14 + ("statistics",) * 21
    rows = [replace(HOLDS, name=f"{HOLDS.name} {k}", kind=kind) for k, kind in enumerate(kinds)]
    report(*rows).save(path)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(path.as_uri())
    printed = base64.b64decode(browser.print_page())
    assert 1 <= len(re.findall(rb"/Type /Page\b", printed)) <= 2
