"""Files of runs: written whole or not at all, and never read when they are damaged."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold_sde.errors import CheckpointError, WriteError
from manifold_sde.solvers.archive import SUFFIX, held_folder, read_archive, write_archive
from manifold_sde.verification import Report
from manifold_sde.writing import replacing, write_text

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
    with held_folder(folder):
        write_archive(folder / f"chunk-000000{SUFFIX}", "run", HEADER, ARRAYS)
        (folder / f".chunk-000001{SUFFIX}.a1b2c3d4").write_bytes(b"half")
        (folder / "notes.txt").touch()
    with held_folder(folder):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["chunk-000000.npz", "notes.txt"]
    assert same(folder / f"chunk-000000{SUFFIX}")


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with (
            pytest.raises(CheckpointError, match="cannot be written"),
            held_folder(tmp_path / place),
        ):
            pass


# Files that lie.


def forged(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, ",
        "{'descr': '<f8', 'fortran_order': False, 'shape': '''(2,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (), }\n",
        "(" * 5000 + "\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }\n",
    ],
    ids=["huge", "negative", "unclosed", "unclosed text", "objects", "deep", "short"],
)
def test_a_header_that_lies_is_refused_before_anything_is_read(place: Path, header: str) -> None:
    forged(place, {"x.npy": npy(header, b"12345678")})
    with pytest.raises(CheckpointError, match="corrupted"):
        read_archive(place, "run")


def bomb(path: Path) -> None:
    """Compressed a thousandfold: a sound array of 64 MB in less than 100 kB."""
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (8000000,), }\n"
    forged(path, {"x.npy": npy(header, bytes(64_000_000))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000


def test_a_small_file_that_unpacks_to_a_large_one_is_refused_unread(place: Path) -> None:
    bomb(place)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="corrupted"):
            read_archive(place, "run")
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_broken_twin_a_reader_that_trusts_the_file_unpacks_it(place: Path) -> None:
    """What np.load takes without a word: the limits are not numpy's own."""
    bomb(place)
    with np.load(place, allow_pickle=False) as file:
        assert file["x"].nbytes == 64_000_000


# Places that cannot be written.

SAVERS: dict[str, Callable[[Path], object]] = {
    "archive.npz": lambda path: write_archive(path, "run", HEADER, ARRAYS),
    "text.txt": lambda path: write_text(path, "a text"),
    "report.json": lambda path: Report("a toy", ()).save(path),
    "report.html": lambda path: Report("a toy", ()).save(path),
}


def raising(number: int) -> Callable[..., None]:
    """A call of the system that fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", SAVERS)
def test_a_full_disk_leaves_what_was_there_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    SAVERS[name](path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(errno.ENOSPC))
        with pytest.raises(WriteError, match="cannot be written") as caught:
            SAVERS[name](path)
    assert caught.value.errno == errno.ENOSPC
    assert "No space left on device" in caught.value.received
    assert "make room" in caught.value.remedy
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error as the system raises it."""
    device = Path("/dev/full").open("wb")  # noqa: SIM115
    monkeypatch.setattr("manifold_sde.writing.Path.open", lambda *_: device)
    with pytest.raises(WriteError, match="No space left"):
        write_text(tmp_path / "text.txt", "a text")
    assert device.closed


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    monkeypatch.setattr("manifold_sde.writing.Path.open", raising(number))
    with pytest.raises(WriteError, match="cannot be written") as caught:
        SAVERS[name](tmp_path / name)
    assert "this user may write" in caught.value.remedy
    assert str(tmp_path / name) in caught.value.received


@pytest.mark.parametrize("name", SAVERS)
def test_what_is_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / name).mkdir()
    for path in (tmp_path / "file" / name, tmp_path / name):
        with pytest.raises(WriteError, match="cannot be written") as caught:
            SAVERS[name](path)
        assert "stands where" in caught.value.remedy
    assert sorted(os.listdir(tmp_path)) == sorted(["file", name])


def test_files_have_the_permissions_of_others(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_archive(tmp_path / "a.npz", "run", HEADER, ARRAYS)
    assert (tmp_path / "a.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


# One run at a time.


def test_a_folder_in_use_is_refused_and_names_the_other_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from manifold_sde.solvers.archive import held_folder\n"
        "with held_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with (
                pytest.raises(CheckpointError, match="another run writes") as caught,
                held_folder(tmp_path),
            ):
                pass
            assert f"process {other.pid} on {socket.gethostname()}" in caught.value.received
        finally:
            other.kill()
    # The lock of a process that was killed does not stop anybody.
    assert (tmp_path / ".lock").exists()
    with held_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    with held_folder(tmp_path):
        with pytest.raises(CheckpointError, match="this one"), held_folder(tmp_path):
            pass
        with held_folder(tmp_path / "another"):
            pass


def test_where_nothing_can_be_written_a_finished_run_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifold_sde.writing.Path.open", raising(errno.EROFS))
    with pytest.raises(WriteError, match="Read-only"), held_folder(tmp_path):
        pass
    (tmp_path / f"chunk-000000{SUFFIX}").touch()
    with held_folder(tmp_path):
        pass


def test_a_file_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    """A writer holds its unfinished file; one that nobody holds is removed by the next."""
    path = tmp_path / "text.txt"
    left = tmp_path / ".text.txt.a1b2c3d4"
    left.touch()
    with replacing(path) as file:
        file.write(b"slow")
        assert not left.exists()
        write_text(path, "fast")
    assert path.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [path]
