"""In notebooks: as a module, by %run and by !python in a real kernel, and what the module gives without one."""
import gc
import html
import importlib
import json
import os
import re
import signal
import sys
import threading
import types
import warnings
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

QUICK = {"data": "offline", "device": "cpu", "report": "minimal", "limit": 100, "width": 64, "epochs": 2}


@pytest.fixture(scope="module")
def run(finished):
    return {task: dld.load(folder) for task, folder in finished.items()}


# -- in a kernel ------------------------------------------------------------------------------------------------------

README = """```python
!python deep_learning_deliverable.py --task mnist
```

```python
%run deep_learning_deliverable.py --task mnist
```

```python
import deep_learning_deliverable as dld
run = dld.train("mnist", epochs=3)
run
```

```python
run.figures["training_curves"]
```

```python
run.report
```

```python
import numpy as np
run.predict(np.zeros((28, 28), np.uint8), explain=True)
```

```python
run = dld.load("outputs/mnist")
run.metrics["test_accuracy"]
```
"""
CHECKS = {  # name -> cell
    "wrong flag": "%run deep_learning_deliverable.py --task mnist --epochs 0",
    "wrong keyword": "dld.train('mnist', epoch=3)",
    "no picture": "run.predict('cat.png')",
    "no figure": "run.figures['training_curve']",
    "interrupted": """
import signal
kept = dld.after_epoch
def interrupt(*asked):
    kept(*asked)
    signal.raise_signal(signal.SIGINT)
dld.after_epoch = interrupt
dld.train("mnist", data="offline", epochs=3, limit=100, output_dir="later", report="minimal")""",
    "gone on": """
import importlib
dld = importlib.reload(dld)
dld.train(resume="later/mnist-offline-digits").metrics["epochs"]""",
    "again": """
import torch
one, two = (torch.load(f"{place}/mnist-offline-digits/model.pt")["weights"] for place in ("outputs", "again"))
all(torch.equal(one[key], two[key]) for key in one)""",
    "bar": """
import time
with dld.progress_bar(200, " samples") as bar:
    bar.start_t -= 9  # as if it had taken long
    for step in range(200):
        bar.update(1)
        time.sleep(0.005)
        if step % 50 == 0:
            print("epoch", step)
print("end")""",
    "own figure": "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"}


class ThisPython(KernelSpecManager):
    """The only kernel is the Python that runs the tests, whatever is registered on this machine."""

    def get_kernel_spec(self, kernel_name):
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                          display_name="tests", language="python")


def execute(cells, folder):
    """The outputs of each cell, all run by one kernel in this folder, which writes nowhere else."""
    own = {name: str(folder / ".jupyter") for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR",
                                                       "JUPYTER_RUNTIME_DIR")}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # what `!python` means
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        manager = AsyncKernelManager(kernel_spec_manager=ThisPython(), connection_file=str(folder / "kernel.json"))
        NotebookClient(notebook, km=manager, timeout=100, allow_errors=True, coalesce_streams=True,
                       resources={"metadata": {"path": str(folder)}}).execute(env={**os.environ, "PATH": path})
    nbformat.validate(notebook)
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """What each cell left behind: those of the README, on little data, then our own."""
    folder = tmp_path_factory.mktemp("notebook")
    script = SCRIPT.read_text("utf-8")
    assert (less := script.replace("(24, 12, 4)", "(2, 1, 1)")) != script  # figures that are quickly drawn
    (folder / SCRIPT.name).write_text(less, "utf-8")
    short = {"--task mnist": "--task mnist --data offline --dry-run --report minimal --output-dir shell",
             '"mnist", epochs=3': '"mnist", data="offline", epochs=1, limit=100, report="minimal"',
             '"outputs/mnist"': '"outputs/mnist-offline-digits"'}
    readme = re.findall(r"```python\n(.*?)```", README, re.S)
    for whole, less in short.items():
        readme = [cell.replace(whole, less) for cell in readme]
    # The settings of "again" are those of the README's training: the second one in this kernel.
    checks = {**CHECKS, "again": re.sub(r"(?s)^.*?(dld\.train.*?)\)\n.*", r'\1, output_dir="again")', readme[2])
              + CHECKS["again"]}
    outputs = execute([*readme, *checks.values()], folder)
    names = ("!python", "%run", "train", "figure", "report", "predict", "load", *checks)
    return dict(zip(names, outputs, strict=True))


def said(outputs, stream="stdout"):
    return "".join(each.text for each in outputs if each.output_type == "stream" and each.name == stream)


def test_no_cell_shows_a_traceback_or_writes_to_stderr(cells):
    for name, outputs in cells.items():
        for each in outputs:
            assert each.output_type != "error" or len("\n".join(each.traceback).splitlines()) == 1, name
        assert said(outputs, "stderr") == "" or name == "wrong flag", name


def test_the_command_line_works_from_a_cell(cells):
    shell, = cells["!python"]
    assert "Test accuracy" in shell.text and "\x1b" not in shell.text
    assert not re.search(r"\r(?!\n)", shell.text), "a bar that stays"
    *_, shown = cells["%run"]
    assert "Test accuracy" in said(cells["%run"])
    assert shown.output_type == "display_data" and shown.data["text/html"].count("<img") >= 7


def test_results_show_themselves(cells):
    *before, shown = cells["train"]
    assert shown.data["text/html"].count("data:image/png;base64,") >= 7 and "mlp on offline digits" in shown.data[
        "text/plain"] and len(shown.data["text/plain"]) < 150
    assert "epoch 1/1" in said(before) and "%run deep_learning_deliverable.py --predict" in said(before)
    assert len(before) == 1, "lines, and no rest of a bar"
    figure, = cells["figure"]
    assert len(figure.data["image/png"]) > 10_000 and "text/html" not in figure.data, "not twice"
    page, = cells["report"]
    assert page.data["text/html"].startswith("<iframe srcdoc=") and len(page.data["text/html"]) > 300_000
    told, = cells["predict"]
    assert "<table>" in told.data["text/html"] and "saliency" in told.data["text/html"]
    number, = cells["load"]
    assert 0 <= float(number.data["text/plain"]) <= 1


def test_a_problem_is_one_line(cells):
    wrong, = cells["wrong flag"]
    assert wrong.text == "error: --epochs 0: must be at least 1 and at most 1000000\n"
    for name, line in (("wrong keyword", "error: train has no epoch= (did you mean epochs?)"),
                       ("no picture", "error: predict cat.png: no such file; this run's model reads pictures")):
        problem, = cells[name]
        assert problem.traceback == [line]
    problem, = cells["no figure"]
    assert problem.traceback[0].startswith("error: no figure 'training_curve' (did you mean training_curves?); there are ")


def test_an_interrupted_training_goes_on(cells):
    *_, problem = cells["interrupted"]
    assert problem.traceback == ['interrupted; go on with train(resume="later/mnist-offline-digits")']
    assert "Stopped after" in said(cells["interrupted"])
    *lines, epochs = cells["gone on"]
    assert "epoch 3/3" in said(lines) and "epoch 1/3" not in said(lines) and epochs.data["text/plain"] == "3"


def test_a_second_training_leaves_the_same_weights_and_the_users_figures_work(cells):
    *_, same = cells["again"]
    assert same.data["text/plain"] == "True"
    figure, = cells["own figure"]
    assert figure.output_type == "display_data" and "image/png" in figure.data


def test_of_a_bar_a_saved_notebook_keeps_an_empty_line(cells):
    lines, bar = cells["bar"]
    assert (lines.text, bar.data) == ("epoch 0\nepoch 50\nepoch 100\nepoch 150\nend\n", {"text/plain": ""})
