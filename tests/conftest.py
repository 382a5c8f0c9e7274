"""Shared by all tests: the program under test, and a few small finished runs."""
import dataclasses
import functools
import json
import os
import subprocess
import sys
import typing
from collections.abc import Mapping
from pathlib import Path

import pytest
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "deep_learning_deliverable.py"
sys.path.insert(0, str(ROOT))
os.environ.pop("DLD_DATA_DIR", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests may run two at a time

import deep_learning_deliverable as dld  # noqa: E402

# Figures with fewer samples and pixels are drawn sooner.
dld.ImageData.shown = dld.TextData.shown = (6, 3, 2)
dld.FIGURE_DPI = 50
for name, task in dld.TASKS.items():  # built-in data is made once
    if task.offline:
        dld.TASKS[name] = dataclasses.replace(task, offline=functools.cache(task.offline))

SAVEFIG = Figure.savefig
SMALL = {"cifar10": {"width": 16, "batch_size": 100}, "mnist": {"width": 128}}  # networks for tests


def program(*arguments, cwd, timeout=120):
    """Run the script as a user does, in a process of its own."""
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd,
                          timeout=timeout, capture_output=True, text=True, encoding="utf-8",
                          check=False)


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text("utf-8"))


def small(task, **settings):
    """A quick run's config on offline data."""
    given = {"task": task, "data": "offline", "precision": "fp32", "device": "cpu",
             **SMALL.get(task, {}), **settings}
    return dld.resolve_config(given, stand_in=True)


@pytest.fixture(scope="session")
def shapes():
    return dld.make_shapes(600, 200)


@pytest.fixture(scope="session")
def reviews():
    return dld.make_reviews(600, 200)


@pytest.fixture(scope="session")
def digits():
    return dld.make_digits()


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of something else: figures are built, but an empty picture is saved of each."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **more: (
        Image.new("L", (8, 8)).save(file, "png")))


class Finished(Mapping):
    """Short real trainings, one a task: name -> run folder; made when first asked for, and once
    for all processes of a test command."""

    # Few tokens, because exporting an LSTM takes a while for each.
    GIVEN: typing.ClassVar = {"cifar10": {"limit": 500, "width": 8, "batch_size": 25},
                              "mnist": {"limit": 900, "width": 128},
                              "sentiment": {"limit": 200, "max_tokens": 12}}

    def __init__(self, place):
        self.place = place

    def __getitem__(self, task):
        given = {"task": task, "data": "offline", "device": "cpu", "epochs": 2,
                 "output_dir": str(self.place), **self.GIVEN[task]}
        with FileLock(self.place / f"{task}.lock"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", SAVEFIG)  # these are drawn, whoever asks for them
            for run in self.place.glob(f"{task}-*"):
                return run
            return dld.train_run(given, dld.Log())

    def __iter__(self):
        return iter(self.GIVEN)

    def __len__(self):
        return len(self.GIVEN)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place
    (place / "finished").mkdir(exist_ok=True)
    return Finished(place / "finished")
