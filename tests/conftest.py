"""What all tests share: the folder of real data, process groups, one thread and a fixed seed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import samft.runtime.torchvision_compat  # noqa: F401  (before all that imports torchvision)
from helpers import REPOSITORY
from helpers.gloo_pool import GlooPool
from helpers.preloaded import preloading_context

# The commands that tests start, and the workers of loaders, share the cores with the tests.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell that is not interactive has what it starts in the background ignore Ctrl-C, and that is
# inherited: here, tests and the commands that they start get it as from a terminal.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before any test starts the server in another way.
preloading_context()

hypothesis.settings.register_profile("samft", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("samft")


TIERS = {"unit", "smoke", "run", "processes", "chaos"}
SEVERAL_PROCESSES = {"gloo2", "gloo3"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test one tier: its own mark, `processes` by its fixtures, else `unit`."""
    for item in items:
        if not TIERS & {mark.name for mark in item.iter_markers()}:
            in_a_group = SEVERAL_PROCESSES & set(getattr(item, "fixturenames", ()))
            item.add_marker("processes" if in_a_group else "unit")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Of this process and of all that it starts; a person's own cache stays as it is.
    os.environ["SAMFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: `SAMFT_DATA`, else `shared/data` beside the repository."""
    folder = Path(os.environ.get("SAMFT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set SAMFT_DATA)")
    return folder


@pytest.fixture(scope="session")
def gloo2() -> Iterator[GlooPool]:
    """Two processes in one gloo group: `gloo2.run(function, *args)` gives both results."""
    pool = GlooPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def gloo3() -> Iterator[GlooPool]:
    """Three processes in one gloo group, as `gloo2`."""
    pool = GlooPool(3)
    yield pool
    pool.stop()
