"""What every test runs under: one thread a process, no window, repeatable examples."""

import gc
import os
import shutil
from collections.abc import Iterator

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import warm  # noqa: E402

torch.set_num_threads(1)

# "ci" draws the same examples on every run, here and in continuous integration. "dev" looks for new
# ones: HYPOTHESIS_PROFILE=dev.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "ci")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if item.get_closest_marker("compile") and not any(map(shutil.which, compilers)):
        pytest.skip("no C++ compiler")


# What is imported and collected stays. To look for garbage in it takes a quarter of the collection,
# and then some of every test.
gc.disable()


def pytest_collection_finish() -> None:
    """Leave alone what there is."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _programs_end_with_the_tests() -> Iterator[None]:
    yield
    warm.close()
