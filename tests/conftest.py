"""Shared by all tests: the program under test, and a few small finished runs."""
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "deep_learning_deliverable.py"
sys.path.insert(0, str(ROOT))
os.environ.pop("DLD_DATA_DIR", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests may run two at a time

import deep_learning_deliverable as dld  # noqa: E402

dld.ImageData.shown = dld.TextData.shown = (6, 3, 2)  # figures with fewer samples are drawn sooner
for name, task in dld.TASKS.items():  # built-in data is made once
    if task.offline:
        dld.TASKS[name] = dataclasses.replace(task, offline=functools.cache(task.offline))

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
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **more: (
        Image.new("L", (8, 8)).save(file, "png")))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Short real trainings, one a task: name -> run folder."""
    place = tmp_path_factory.mktemp("finished")
    runs = {}
    for task, settings in (("cifar10", {"limit": 300, "width": 16, "batch_size": 50}),
                           ("mnist", {"limit": 900, "width": 128}), ("sentiment", {"limit": 200})):
        given = {"task": task, "data": "offline", "device": "cpu", "epochs": 2,
                 "output_dir": str(place), **settings}
        runs[task] = dld.train_run(given, dld.Log())
    return runs
