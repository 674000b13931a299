"""Write into the pages what is made of the code: tables, outputs, pictures.

Usage: ``python -m tools.documents [PAGE.md ...]`` (default: README and all of docs)

A page marks what is made:

- ``<!-- table: NAME -->`` before a table of :mod:`tools.tables`, and ``<!-- end of table -->``;
- ``<!-- output -->`` before a block of text: what the blocks of Python since the last one print;
- ``<!-- picture: FILE -->`` before a picture: the file of this name that the blocks have written.

The tests fail where a page is not what this command would make of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PARTS = re.compile(
    r"^```python\n(?P<code>.*?)^```$"
    r"|^<!-- output -->\n+```text\n(?P<output>.*?)^```$"
    r"|^<!-- picture: (?P<made>\S+) -->\n+!\[[^]]*\]\((?P<picture>\S+?)\)",
    re.MULTILINE | re.DOTALL,
)
_MADE = re.compile(r"^<!-- (output|picture: \S+) -->$", re.MULTILINE)
_TABLE = re.compile(
    r"^<!-- table: (?P<name>\S+) -->\n(?P<table>.*?)^<!-- end of table -->$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
#: How far numbers may differ from machine to machine, relative to the larger one.
_TOLERANCE = 0.03
#: From here on a number is one over rounding.
_HUGE = 1e12


@dataclass
class Made:
    """What the blocks of a page make.

    Attributes:
        namespace: What they define.
        outputs: For each output, where it stands in the page, what is there, and what is printed.
        pictures: For each picture, the file that was made and where the page has it.
    """

    namespace: dict[str, Any]
    outputs: list[tuple[tuple[int, int], str, str]] = field(default_factory=list)
    pictures: list[tuple[Path, Path]] = field(default_factory=list)


def run_page(path: Path, folder: Path) -> Made:
    """Run a page's blocks of Python one after the other, in one namespace and in a folder."""
    text = path.read_text(encoding="utf-8")
    made = Made({"__name__": path.stem})
    printed = io.StringIO()
    for part in _PARTS.finditer(text):
        if part["code"] is not None:
            line = text.count("\n", 0, part.start("code"))
            code = compile("\n" * line + part["code"], path, "exec")  # tracebacks show the line
            with contextlib.redirect_stdout(printed), contextlib.chdir(folder):
                exec(code, made.namespace)
        elif part["output"] is not None:
            made.outputs.append((part.span("output"), part["output"], printed.getvalue()))
            printed = io.StringIO()
        else:
            made.pictures.append((folder / part["made"], path.parent / part["picture"]))
    return made


def with_tables(text: str) -> str:
    """A page with its tables made anew."""
    from tools.tables import TABLES

    def made(part: re.Match[str]) -> str:
        name = part["name"]
        return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n\n<!-- end of table -->"

    return _TABLE.sub(made, text)


def same_output(shown: str, printed: str) -> bool:
    """Whether two outputs are the same but for rounding: the words, and the numbers nearly.

    Spaces do not count, as numbers of other lengths move them.

    >>> same_output("mean 0.561 of 1000", "mean  0.563 of 1000"), same_output("a 1", "a 2")
    (True, False)
    """
    numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (shown, printed)]
    words = [" ".join(_NUMBER.sub("#", text).split()) for text in (shown, printed)]
    if words[0] != words[1] or len(numbers[0]) != len(numbers[1]):
        return False
    return all(
        abs(a - b) <= _TOLERANCE * max(abs(a), abs(b), 0.1) for a, b in zip(*numbers, strict=True)
    )


def write_page(path: Path) -> Iterator[Path]:
    """Write tables, outputs and pictures of a page; the files that changed are returned."""
    before = path.read_text(encoding="utf-8")
    text = before
    with tempfile.TemporaryDirectory() as folder:
        made = run_page(path, Path(folder)) if _MADE.search(text) else Made({})
        for (start, end), shown, printed in reversed(made.outputs):
            if not same_output(shown, printed):
                text = text[:start] + printed + text[end:]
        for file, place in made.pictures:
            shutil.copyfile(file, place)
            yield place
    text = with_tables(text)
    if text != before:
        path.write_text(text, encoding="utf-8")
        yield path


def main(names: Sequence[str]) -> None:
    """Write the pages that are named, or all that have something made."""
    for page in map(Path, names) if names else PAGES:
        if "<!-- " in page.read_text(encoding="utf-8"):
            for changed in write_page(page.resolve()):
                print(os.path.relpath(changed))


if __name__ == "__main__":
    main(sys.argv[1:])
