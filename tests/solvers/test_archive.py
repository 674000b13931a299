"""Files of runs: written whole or not at all, and never read when they are damaged."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold_sde.errors import CheckpointError
from manifold_sde.solvers.archive import SUFFIX, prepare_folder, read_archive, write_archive

HEADER = {"position": 3, "name": "run"}
ARRAYS = {"x": np.arange(12.0).reshape(3, 4), "empty": np.zeros((0, 2)), "n": np.array(7)}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("archive") / f"a{SUFFIX}"
    write_archive(path, "run", HEADER, ARRAYS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archive") / f"b{SUFFIX}"


def same(path: Path) -> bool:
    header, arrays = read_archive(path, "run")
    return (
        header == HEADER
        and arrays.keys() == ARRAYS.keys()
        and all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    )


@given(data=st.data())
def test_a_cut_file_is_refused(content: bytes, place: Path, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(content) - 1))
    place.write_bytes(content[:length])
    with pytest.raises(CheckpointError, match="corrupted"):
        read_archive(place, "run")


@given(data=st.data())
def test_a_changed_byte_is_found_or_does_not_matter(
    content: bytes, place: Path, data: st.DataObject
) -> None:
    """Some bytes of a zip file, such as its dates, are not read."""
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    place.write_bytes(bytes(changed))
    with contextlib.suppress(CheckpointError):
        assert same(place)


@pytest.mark.parametrize("bit", range(8))
def test_every_byte_of_the_directory_is_watched(content: bytes, place: Path, bit: int) -> None:
    """The last bytes say what a zip file holds: no array may go missing, or seem encrypted."""
    for position in range(content.index(b"PK\x01\x02"), len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        place.write_bytes(bytes(changed))
        with contextlib.suppress(CheckpointError):
            assert same(place), position


@given(st.binary(max_size=200))
def test_noise_is_refused(place: Path, noise: bytes) -> None:
    place.write_bytes(noise)
    with pytest.raises(CheckpointError):
        read_archive(place, "run")


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder"):
        read_archive(tmp_path, "run")


def test_a_folder_is_made_and_freed_of_what_killed_runs_left(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    prepare_folder(folder)
    write_archive(folder / f"chunk-000000{SUFFIX}", "run", HEADER, ARRAYS)
    (folder / f".chunk-000001{SUFFIX}.a1b2c3d4").write_bytes(b"half")
    (folder / "notes.txt").touch()
    prepare_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["chunk-000000.npz", "notes.txt"]
    assert same(folder / f"chunk-000000{SUFFIX}")


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        prepare_folder(tmp_path / "file" / "below")
