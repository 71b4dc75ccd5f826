"""Fixtures for all tests: the folder of real PACS images, a small disk, configs composed in-process, launch.py."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

os.environ.pop("HYDRA_FULL_ERROR", None)  # the tests expect messages, not tracebacks
os.environ.pop("PYTHONUNBUFFERED", None)  # or a missing flush would not be seen
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: with more threads small networks are slower

import pytest
from omegaconf import DictConfig

pytest.register_assert_rewrite("helpers")  # before it is imported: its assertions then show their values
from helpers import REPOSITORY, SMALL, Launcher, photos  # noqa: E402


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out of `make check`")


def pytest_collection_modifyitems(config, items) -> None:
    """Each process begins with its share of the slow tests: else the last one is alone with tests of minutes.

    pytest-xdist gives every process an equal slice of the list, and those that are done take from the end of others'.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    items[:] = [item for i in range(workers) for group in (slow, fast) for item in _slice(group, i, workers)]


def _slice(items: list, i: int, n: int) -> list:
    """The i-th of n slices of equal length."""
    return items[len(items) * i // n : len(items) * (i + 1) // n]


@pytest.fixture(scope="session")
def pacs_root() -> Path:
    """The folder that contains PACS/: the parent of $GSDG_TEST_PACS, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("GSDG_TEST_PACS", REPOSITORY.parent / "shared" / "data" / "PACS"))
    if not root.is_dir():
        pytest.skip(f"real PACS images are not at {root} (set GSDG_TEST_PACS)")
    return root.parent


@pytest.fixture
def disk(tmp_path):
    """The mount point of a real file system of 4 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount_point)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    yield mount_point
    subprocess.run(["umount", "--recursive", str(mount_point)], check=True)


@pytest.fixture(autouse=True)
def restore_global_state():
    """Switch torch's determinism off after each test: a run in the test process switches it on."""
    yield
    torch = sys.modules.get("torch")
    if torch:
        torch.use_deterministic_algorithms(False)


@lru_cache(maxsize=512)
def _composed(*overrides: str) -> DictConfig:
    import hydra

    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return hydra.compose("config", list(overrides))


@pytest.fixture
def compose(tmp_path):
    """A function that composes the config of `python launch.py <overrides>`, with a temporary `runs_dir`."""

    def compose(*overrides: str) -> DictConfig:
        config = copy.deepcopy(_composed(*overrides))  # composing takes a hundred times as long
        if not any(override.startswith("runs_dir=") for override in overrides):
            config.runs_dir = str(tmp_path / "runs")
        return config

    return compose


@pytest.fixture
def train(compose, tmp_path):
    """A function that makes the run of SMALL and more overrides in this process, and returns its folder."""
    from gsdg.experiment import run
    from gsdg.plan import prepare

    def train(*overrides: str) -> Path:
        plan = prepare(compose(*SMALL, *overrides))
        run(plan)
        return tmp_path / "runs" / plan.run_id

    return train


@pytest.fixture(scope="session")
def finished_runs() -> dict:
    """The runs that `trained` has made so far in this test process: {overrides: folder}."""
    return {}


@pytest.fixture
def trained(compose, tmp_path, tmp_path_factory, finished_runs):
    """Like `train`, but equal overrides are trained once per test process: every test gets a copy of the run."""
    from gsdg.experiment import run
    from gsdg.plan import prepare

    def trained(*overrides: str) -> Path:
        if overrides not in finished_runs:
            plan = prepare(compose(*SMALL, *overrides, f"runs_dir={tmp_path_factory.mktemp('finished')}"))
            run(plan)
            finished_runs[overrides] = Path(plan.config["runs_dir"], plan.run_id)
        folder = tmp_path / "runs" / finished_runs[overrides].name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that differs in settings that are not part of the id
        return shutil.copytree(finished_runs[overrides], folder)

    return trained


def _few_photos(root: Path) -> tuple[str, ...]:
    photos(root / "photos", domains="abcd", each=4)
    data = ("dataset=image_folder", f"data_dir={root}", "dataset.root=photos", "dataset.domains=[a,b,c,d]")
    net = ("model=convnet_2ch", "model.backbone.channels=3", "model.mean=[0.5,0.4,0.3]", "model.std=[0.2,0.3,0.4]")
    return (*data, "split.target=b", *net, "trainer.metrics=[accuracy,nll]")


@pytest.fixture(scope="session")
def few_photos(tmp_path_factory) -> tuple[str, ...]:
    """Overrides of a data set with four domains of 8 photos, a small network, and losses in the records.

    A loss of few images is more exact than an accuracy of many. A run takes a tenth of the time of one on the digits.
    """
    return _few_photos(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own_photos(tmp_path) -> tuple[str, ...]:
    """The same with its images in tmp_path/photos, for a test that changes them."""
    return _few_photos(tmp_path)


@pytest.fixture
def launch(tmp_path) -> Launcher:
    """Runs launch.py, with the run folders in a temporary folder."""
    return Launcher(tmp_path / "runs")


@pytest.fixture
def launch_here(tmp_path, monkeypatch, capfd):
    """Runs `python launch.py <words>` in this process and in tmp_path, without the seconds of importing torch.

    The global state of Hydra and of logging is reset afterwards.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from gsdg import cli
    from gsdg.sweep.callback import SweepCallback

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)

    def launch_here(*words: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["launch.py", *words])
        capfd.readouterr()
        code = None
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            SweepCallback.folder = SweepCallback.size = None
        output, errors = capfd.readouterr()
        if isinstance(code, str):  # as Python does when the program ends
            errors, code = f"{errors}{code}\n", 1
        return subprocess.CompletedProcess(words, code or 0, output, errors)

    yield launch_here
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def desk(tmp_path):
    """A runs_dir with hand-made sweeps and runs, see tests/desk.py."""
    from desk import Desk

    desk = Desk(tmp_path / "runs")
    yield desk
    desk.clear()


@pytest.fixture
def users_class(monkeypatch) -> Callable[..., dict]:
    """A function: the node of a class that a test defines, as one of the user's module `mine`."""

    def users_class(kind: type, **settings: object) -> dict:
        module = ModuleType("mine")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, "mine", module)
        return {"_target_": f"mine.{kind.__name__}", **settings}

    return users_class
