"""What the documents show runs: code blocks of README and docs, and the examples."""

import ast
import io
import os
import re
import subprocess
import tokenize
import tomllib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread, imsave

from tests.warm import Program, warning_options
from tools.documents import PAGES, Made, run_page, same_output, write_page

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REFRESH = "`make pages` writes it anew"


def stale(made: Made) -> list[str]:
    """What a page shows and its code does not make."""
    faults = [
        f"shown:\n{shown}printed:\n{printed}"
        for _, shown, printed in made.outputs
        if not same_output(shown, printed)
    ]
    for file, place in made.pictures:
        here, there = (imread(path)[..., :3] for path in (file, place))
        # Glyphs differ by versions of FreeType, in few pixels.
        if here.shape != there.shape or float(abs(here - there).mean()) > 0.02:
            faults.append(f"{place.name} is another picture")
    return faults


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_in_documents_runs_and_makes_what_is_shown(path: Path, tmp_path: Path) -> None:
    faults = stale(run_page(path, tmp_path))
    assert not faults, f"{REFRESH}:\n" + "\n".join(faults)


def test_tables_are_those_of_the_code() -> None:
    made = [path for path in PAGES if "<!-- table: " in path.read_text(encoding="utf-8")]
    assert {path.name for path in made} >= {"paper_in_code.md", "solve.md", "verify.md"}
    # Of the code as a reader imports it, whatever other tests of this process have registered.
    program = (
        "import sys, pathlib; from tools.documents import with_tables\n"
        "for name in sys.argv[1:]:\n"
        "    text = pathlib.Path(name).read_text(encoding='utf-8')\n"
        "    if with_tables(text) != text: print(name)"
    )
    done = Program("-c", program, *made).wait()
    assert (done.returncode, done.stdout) == (0, ""), f"{done.stdout}{REFRESH} {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_in_quick_form(path: Path, tmp_path: Path) -> None:
    done = run_example(path, tmp_path)
    assert done.returncode == 0, done.stderr


#: Longest example, in lines of code; the one that has a whole network of its own in it is longer.
LONGEST, WITH_A_NETWORK = 60, "plot_vision_transformer"


def lines_of_code(text: str) -> int:
    """Lines of a program that are neither empty nor comments nor in its docstring."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*empty, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    first = ast.parse(text).body[0]
    return len(lines - set(range(first.lineno, (first.end_lineno or first.lineno) + 1)))


def test_examples_are_short() -> None:
    sizes = {path.stem: lines_of_code(path.read_text(encoding="utf-8")) for path in EXAMPLES}
    assert len(sizes) >= 14
    assert [name for name, size in sizes.items() if size > LONGEST] == [WITH_A_NETWORK]
    assert lines_of_code('"""Text."""\n\n# said\nx = (\n    1,\n)\n') == 3


#: Runs an example as the gallery does: block by block, and figures are saved and closed after each.
AS_THE_GALLERY = """
import re, sys, types
import matplotlib.pyplot as plt

def show():
    assert plt.get_fignums(), "no figure of pyplot is here to be shown: give the plot an ax"

plt.show, closed = show, []
example = sys.modules["__main__"] = types.ModuleType("__main__")
with open(sys.argv[1], encoding="utf-8") as file:
    text = file.read()
for start in [0, *(found.start() for found in re.finditer("^# %%", text, re.M))]:
    block = re.split("^# %%", text[start + 1:], maxsplit=1, flags=re.M)[0]
    code = "\\n" * text.count("\\n", 0, start) + text[start] + block
    exec(compile(code, sys.argv[1], "exec"), example.__dict__)
    for figure in map(plt.figure, plt.get_fignums()):
        figure.stale = False
        closed.append(figure)
    plt.close("all")
assert not any(figure.stale for figure in closed), "drawn in a figure of an earlier block"
"""


def run_example(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example as the gallery does, in a folder of its own, with warnings as errors."""
    environment = {**os.environ, "MANIFOLD_SDE_QUICK": "1", "MPLBACKEND": "Agg"}
    return Program("-c", AS_THE_GALLERY, path, folder=folder, environment=environment).wait()


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def test_blocks_share_a_namespace_and_what_they_print_is_shown_below(tmp_path: Path) -> None:
    text = "```python\nx = 1\nprint('a')\n```\ntext\n```\nnot python\n```\n"
    text += "```python\ny = x + 1\nprint(1.001)\n```\n<!-- output -->\n```text\na\n1.0\n```\n"
    made = run_page(page(tmp_path, text), tmp_path)
    assert made.namespace["y"] == 2
    assert stale(made) == []


@pytest.mark.parametrize("shown", ["", "mean 0.56\n", "mean 0.61 here\n", "0.561\n"])
def test_broken_twin_output_of_another_day(tmp_path: Path, shown: str) -> None:
    text = "```python\nprint('mean', 0.561)\n```\n\n<!-- output -->\n```text\n{}```\n"
    assert bool(stale(run_page(page(tmp_path, text.format(shown)), tmp_path))) == (
        shown != "mean 0.56\n"
    )


def test_what_is_stale_is_written_anew(tmp_path: Path) -> None:
    text = "# A\n\n<!-- table: schemes -->\n\nold\n\n<!-- end of table -->\n"
    text += "```python\nprint(2)\nfrom pathlib import Path\nPath('a.png').write_text('new')\n```\n"
    text += "<!-- output -->\n```text\n1\n```\n<!-- picture: a.png -->\n![it](b.png)\n"
    path = page(tmp_path, text)
    assert [file.name for file in write_page(path)] == ["b.png", "page.md"]
    written = path.read_text()
    assert "```text\n2\n```" in written
    assert '| `"weak2"` |' in written
    assert "old" not in written
    assert (tmp_path / "b.png").read_text() == "new"


def test_broken_twin_another_picture(tmp_path: Path) -> None:
    for name, level in (("a.png", 0.0), ("b.png", 0.0), ("c.png", 0.2)):
        imsave(tmp_path / name, np.full((4, 4, 3), level))
    made = Made({}, pictures=[(tmp_path / "a.png", tmp_path / "b.png")])
    assert stale(made) == []
    made.pictures = [(tmp_path / "a.png", tmp_path / "c.png")]
    assert stale(made) == ["c.png is another picture"]


def test_broken_twin_block_that_fails(tmp_path: Path) -> None:
    document = page(tmp_path, "# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(document, tmp_path)
    assert caught.traceback[-1].lineno == 4  # counted from 0: line 5 of the document


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit(3)", ""),
        ("import warnings; warnings.warn('no')", "UserWarning"),
        (
            "# %%\nfrom matplotlib.figure import Figure\nFigure().subplots()\nplt.show()",
            "no figure",
        ),
        ("_, ax = plt.subplots()\n\n# %%\nax.plot([1, 2])", "figure of an earlier block"),
    ],
)
def test_broken_twin_example_that_fails(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plot_it.py"
    path.write_text(f"import matplotlib.pyplot as plt\n\n{text}\n")
    done = run_example(path, tmp_path)
    assert done.returncode != 0
    assert said in done.stderr


def test_an_example_that_shows_its_pictures(tmp_path: Path) -> None:
    path = tmp_path / "plot_it.py"
    text = '"""Text."""\n# %%\n# Words.\n\nimport matplotlib.pyplot as plt\n'
    path.write_text(text + "\n# %%\nplt.subplots()[1].plot([1, 2])\nplt.show()\n\n# %%\nprint(1)\n")
    done = run_example(path, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


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
    first, shown = BLOCK.search(text), text.find("<!-- output -->")
    assert first is not None
    assert len(first[1].splitlines()) <= 12
    assert 0 < shown - first.end() < 10  # what it prints stands under it


def test_pages_named_by_pages_are_there() -> None:
    links = re.compile(r"\]\((?!https?:)([^)#\s]+)")
    missing = [
        f"{path.name}: {link}"
        for path in PAGES
        for link in links.findall(path.read_text(encoding="utf-8"))
        if not (path.parent / link).exists()
    ]
    assert not missing


def test_pages_read_well_in_the_repository() -> None:
    """Names are written out in full, and the site makes links of them; roles stay as they are."""
    role = re.compile(r"\{(?:func|class|meth|attr|mod|obj|doc|ref|term|download)\}`")
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
    assert not [name for name, text in texts.items() if role.search(text)]
    assert role.search("{func}`~manifold_sde.solvers.solve`")
