"""What a run is to be cited with: the software, the paper, and the methods that it used."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "references.bib"
_SOFTWARE = """@software{{manifold_sde,
  author    = {{{{the manifold_sde authors}}}},
  title     = {{manifold_sde: {{SGD}} with Normalisation and Weight Decay as a Diffusion}},
  version   = {{{version}}}
}}"""
#: The sources of the schemes.
_OF_SCHEMES = {
    "weak2": "NinomiyaNinomiya2009",
    "walk": "Schwarz2022",
    "phi_jet": "ArmstrongBrigo2016",
    "euler": "KloedenPlaten1992",
    "heun": "KloedenPlaten1992",
    "midpoint": "KloedenPlaten1992",
}


@functools.cache
def entries() -> dict[str, str]:
    """The entries of BibTeX that are known, by their keys."""
    found = re.split(r"\n(?=@)", FILE.read_text(encoding="utf-8").strip())
    return {re.match(r"@\w+\{(\w+),", text)[1]: text.strip() for text in found}  # type: ignore[index]


def cited(config: Mapping[str, Any]) -> str:
    """The entries of what made a solution with this configuration."""
    known = entries()
    version = config.get("versions", {}).get("manifold_sde", "")
    return "\n\n".join([_SOFTWARE.format(version=version), *(known[key] for key in _keys(config))])


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    yield "LiWangYu2022"
    method = str(config.get("method", ""))
    if not method:
        return
    yield "Salmon2011"
    if method == "sgd":
        return
    yield "LiWongChenDuvenaud2020"
    scheme = str(config.get("scheme", method)).removeprefix("torchsde:")
    if scheme in _OF_SCHEMES:
        yield _OF_SCHEMES[scheme]
    if "rtol" in config:
        yield from ("FosterJelincic2023", "GainesLyons1997")
