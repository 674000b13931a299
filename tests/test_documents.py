"""What the documents show runs: code blocks of README and docs, and the examples."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """The line before each block of Python code, and the code."""
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(1)), match[1]


def run_blocks(path: Path) -> dict[str, Any]:
    """Run a document's blocks one after the other, in one namespace, which is returned."""
    namespace: dict[str, Any] = {"__name__": path.stem}
    for line, code in python_blocks(path.read_text(encoding="utf-8")):
        exec(compile("\n" * line + code, path, "exec"), namespace)  # tracebacks show the line
    return namespace


def warning_options() -> list[str]:
    """The project's warning filters, as options of ``python``."""
    filters = PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    return [option for entry in filters for option in ("-W", entry)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_in_documents_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_in_quick_form(path: Path, tmp_path: Path) -> None:
    done = run_example(path, tmp_path)
    assert done.returncode == 0, done.stderr


def run_example(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder of its own, without a window, with warnings as errors."""
    environment = {**os.environ, "MANIFOLD_SDE_QUICK": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, *warning_options(), str(path)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_blocks_share_a_namespace_and_tell_their_line(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "```python\nx = 1\n```\ntext\n```\nnot python\n```\n```python\ny = x + 1\n```\n"
    )
    assert run_blocks(document)["y"] == 2


def test_broken_twin_block_that_fails(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(document)
    assert caught.traceback[-1].lineno == 4  # counted from 0: line 5 of the document


@pytest.mark.parametrize("line", ["raise SystemExit(3)", "import warnings; warnings.warn('no')"])
def test_broken_twin_example_that_fails(tmp_path: Path, line: str) -> None:
    path = tmp_path / "plot_it.py"
    path.write_text(line)
    assert run_example(path, tmp_path).returncode != 0


def test_warning_filters_mean_the_same_to_pytest_and_python() -> None:
    """Pytest reads a filter's message as a regular expression, ``python -W`` as plain text."""
    for option in warning_options()[1::2]:
        message = option.split(":")[1] if ":" in option else ""
        assert re.sub(r"[^\w ,'`-]", "", message) == message


def test_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    module = (ROOT / "manifold_sde" / "__init__.py").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    assert f'__version__ = "{version}"' in module


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    first = next(python_blocks(text))[1]
    assert len(first.splitlines()) <= 12
