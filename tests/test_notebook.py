"""In notebooks: as a module, by %run and by !python in a real kernel, and without a kernel."""
import gc
import html
import json
import os
import random
import re
import signal
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of
from PIL import Image

QUICK = {"data": "offline", "device": "cpu", "report": "minimal", "limit": 100, "width": 16,
         "epochs": 2}


@pytest.fixture(scope="module")
def run(finished):
    return {task: dld.load(finished[task]) for task in ("mnist", "sentiment")}


# -- in a kernel ---------------------------------------------------------------------------------

README = re.search(r"## Notebooks\n(.*?)\n## ",
                   (ROOT / "README.md").read_text("utf-8"), re.S)[1]
SHORTER = {  # what the README's cells say -> what is run, on little data
    '"mnist", epochs=3': '"mnist", data="offline", epochs=1, limit=100, width=16, report="minimal"'}
SHELL = ("deep_learning_deliverable.py --task mnist --data offline --dry-run --width 16 "
         "--report minimal --output-dir shell")
CHECKS = {  # name -> cell
    "!python": f"!python {SHELL}", "%run": f"%run {SHELL}",
    "figure": "run.figures['training_curves']", "report": "run.report",
    "load": "run = dld.load('outputs/mnist-offline-digits')\nrun.metrics['test_accuracy']",
    "wrong flag": "%run deep_learning_deliverable.py --task mnist --epochs 0",
    "wrong job": "%run deep_learning_deliverable.py --serve --run outputs/mnist-offline-digits",
    "wrong keyword": "dld.train('mnist', epoch=3)",
    "no picture": "run.predict('cat.png')",
    "no figure": "run.figures['training_curve']",
    "own figure": "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"}


def execute(cells, folder):
    """The outputs of each cell, all run by one kernel in this folder, which writes nowhere else."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(KernelSpecManager):
        """The only kernel is the Python that runs the tests, whatever is registered here."""

        def get_kernel_spec(self, kernel_name):
            return KernelSpec(language="python", display_name="tests", argv=[
                sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # of `!python`
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / ".jupyter"))
        manager = AsyncKernelManager(kernel_spec_manager=ThisPython(),
                                     connection_file=str(folder / "kernel.json"))
        nbclient.NotebookClient(
            notebook, km=manager, timeout=300, allow_errors=True, coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}}).execute(env={**os.environ, "PATH": path})
    nbformat.validate(notebook)
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """What each cell left behind: those of the README, on little data, then our own."""
    folder = tmp_path_factory.mktemp("notebook")
    script = SCRIPT.read_text("utf-8")
    for fine, coarse in (("(24, 12, 4)", "(2, 1, 1)"), ("FIGURE_DPI = 150", "FIGURE_DPI = 30"),
                         ('layout="constrained"', 'layout="none"')):  # quickly drawn
        assert fine in script
        script = script.replace(fine, coarse)
    (folder / SCRIPT.name).write_text(script, "utf-8")
    readme = re.findall(r"```python\n(.*?)```", README, re.S)
    for whole, less in SHORTER.items():
        assert any(whole in cell for cell in readme)
        readme = [cell.replace(whole, less) for cell in readme]
    names = ("train", "predict", *CHECKS)
    return dict(zip(names, execute([*readme, *CHECKS.values()], folder), strict=True))


def said(outputs, stream="stdout"):
    return "".join(each.text for each in outputs
                   if each.output_type == "stream" and each.name == stream)


def test_no_cell_shows_a_traceback_or_writes_to_stderr(cells):
    for name, outputs in cells.items():
        for each in outputs:
            assert each.output_type != "error" or (
                name.startswith(("wrong", "no ")) and len(each.traceback) == 1
                and "\n" not in each.traceback[0]), each
        assert said(outputs, "stderr") == "" or name in ("wrong flag", "wrong job"), name


def test_the_command_line_works_from_a_cell(cells):
    shell, = cells["!python"]
    assert "Test accuracy" in shell.text and "\x1b" not in shell.text
    assert not re.search(r"\r(?!\n)", shell.text), "a bar that stays"
    *_, shown = cells["%run"]
    assert "Test accuracy" in said(cells["%run"])
    assert shown.output_type == "display_data" and shown.data["text/html"].count("<img") >= 6


def test_results_show_themselves(cells):
    *before, shown = cells["train"]
    assert shown.data["text/html"].count("data:image/png;base64,") >= 6
    assert "mlp on offline digits" in shown.data["text/plain"]
    assert "epoch 1/1" in said(before)
    assert "%run deep_learning_deliverable.py --predict" in said(before)
    assert len(before) == 1, "lines, and no rest of a bar"
    figure, = cells["figure"]
    assert len(figure.data["image/png"]) > 1_000 and "text/html" not in figure.data, "not twice"
    page, = cells["report"]
    assert page.data["text/html"].startswith("<iframe srcdoc=")
    picture, note, table = cells["predict"]
    assert "image/png" in picture.data and "stand-in" in note.text
    assert "confidence" in table.data["text/html"]
    own, = cells["own figure"]
    assert own.output_type == "display_data" and "image/png" in own.data
    number, = cells["load"]
    assert 0 <= float(number.data["text/plain"]) <= 1


def test_a_problem_is_one_line(cells):
    wrong, = cells["wrong flag"]
    assert wrong.text == "error: --epochs 0: must be at least 1 and at most 1000000\n"
    assert [each.text for each in cells["wrong job"]] == [
        "error: --serve: a notebook cannot serve by %run; use !python instead\n"]
    for name, line in (
            ("wrong keyword", "error: train has no epoch= (did you mean epochs?)"),
            ("no picture", "error: predict cat.png: no such file; this run's model reads pictures"),
            ("no figure", "error: no figure 'training_curve'; there are confusion_matrix, ")):
        problem, = cells[name]
        assert problem.traceback[0].startswith(line)


# -- without one ---------------------------------------------------------------------------------


def surroundings():
    """What a training could leave behind in the process that it ran in."""
    gc.collect()
    return {"torch": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()),
            "python": random.getstate(), "style": dict(matplotlib.rcParams),
            "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
            "threads": torch.get_num_threads(), "warnings": list(warnings.filters),
            "folder": os.getcwd(), "gradients": torch.is_grad_enabled(),
            "trainings": sum(issubclass(type(each), torch.nn.Module | dld.TrainState | dld.Dataset)
                             for each in gc.get_objects())}


def test_two_trainings_are_alike_and_leave_nothing_behind(tmp_path, undrawn, capsys):
    """The first by keywords, which are the flags; the second by its config.json."""
    first = dld.train("mnist", **{**QUICK, "epochs": np.int64(2), "label_smoothing": 0,
                                  "output_dir": tmp_path})
    settings = json.loads((first.folder / "config.json").read_text("utf-8"))
    assert (settings["label_smoothing"], settings["data"], settings["epochs"]) == (0, "offline", 2)
    torch.manual_seed(7)  # any state but that in which the first left it
    before = surroundings()
    run = dld.train(config=first.folder / "config.json")
    after = surroundings()
    assert [key for key in before if before[key] != after[key]] == []
    one, two = (torch.load(each.folder / "model.pt")["weights"] for each in (first, run))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert run.folder == tmp_path / "mnist-offline-digits-2" and "predictor" not in vars(run)
    said = capsys.readouterr()
    assert said.out.count("epoch 2/2") == 2 and said.err == ""


@pytest.mark.parametrize(("asked", "line"), [
    ({"epoch": 3}, "train has no epoch= (did you mean epochs?)"),
    ({"seeds": 3}, "train has no seeds=; use %run with --seeds"),
    ({"device": "gpu"}, "device gpu: choose from auto, cpu, cuda, mps"),
    ({"epochs": "3"}, "epochs takes a whole number, got '3'"),
    ({"task": "all"}, "task all: train them one after another: "
                      "cifar10, mnist, sentiment, images, text"),
    ({"resume": "a", "config": "b"}, "resume and config cannot be combined"),
    ({"resume": "nowhere"}, "resume nowhere: no such folder")])
def test_bad_keywords_are_one_line(asked, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dld.Failure) as problem:
        dld.train(**asked)
    assert str(problem.value) == line
    assert problem.value._render_traceback_() == [f"error: {line}"]
    assert problem.value.__context__ is None and not list(tmp_path.iterdir())


def test_a_run_from_disk_with_its_figures_and_report(run, monkeypatch):
    pytest.importorskip("IPython")
    folder = run["mnist"].folder
    monkeypatch.chdir(folder.parent)
    one = dld.load(folder.name)
    monkeypatch.chdir(folder)  # as by %cd in a later cell
    assert one.metrics == metrics_of(folder) and os.fspath(one) == str(folder)
    assert f"{one.metrics['test_accuracy']:.2%}" in repr(one) and "\n" not in repr(one)
    assert {name: figure.data for name, figure in one.figures.items()} == {
        path.stem: path.read_bytes() for path in folder.glob("*.png")}
    frame = one.report._repr_html_()
    page = html.unescape(re.findall(r'srcdoc="([^"]*)"', frame)[0])
    whole = (folder / "report.html").read_text("utf-8")
    assert page.replace('\n<base href="about:srcdoc">', "") == whole != page
    assert frame.count("<") == 2 and "allow-scripts" not in frame, "nothing but the frame"
    with pytest.raises(dld.UsageError, match=r"no such folder; there are .*mnist-offline-digits"):
        dld.load(folder.with_name("other"))


def test_a_folder_in_the_home_folder_is_meant(tmp_path, monkeypatch, undrawn):
    """No shell has spelt out the ~ in a cell."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    one = dld.train("mnist", **QUICK, output_dir="~/new")
    assert one.folder == tmp_path / "new" / "mnist-offline-digits"
    assert dld.load("~/new/mnist-offline-digits").metrics == one.metrics


def test_predicting_pictures_however_they_come(run, digits, tmp_path, capsys):
    x, file = digits.x[:3, 0], tmp_path / "0.png"
    Image.fromarray(x[0]).save(file)
    coloured = np.dstack([x[2]] * 3 + [np.full((28, 28), 255, np.uint8)])
    before = torch.get_rng_state()
    found = run["mnist"].predict([file, torch.from_numpy(x[1]), coloured])
    assert torch.equal(before, torch.get_rng_state())
    assert found.drop(columns="name").equals(
        run["mnist"].predict([x[0], Image.fromarray(x[1]), x[2, ..., None]]).drop(columns="name"))
    assert [*found["name"]] == [str(file), "Tensor", "ndarray"]
    shares = found.filter(like="p_")
    assert shares.shape == (3, 10) and np.allclose(shares.sum(axis=1), 1)
    assert (found["confidence"] == shares.max(axis=1)).all()
    assert (shares.idxmax(axis=1) == "p_" + found["predicted"]).all()
    assert "stand-in" in capsys.readouterr().out


def test_predicting_texts_with_reasons(run, tmp_path, monkeypatch, capsys):
    display, shown = pytest.importorskip("IPython.display"), []
    monkeypatch.setattr(display, "display", shown.append)
    one = run["sentiment"].predict("a <b>wonderful</b> film")
    assert one["predicted"][0] in ("negative", "positive") and "weighed most" in one["hint"][0]
    (tmp_path / "lines.txt").write_text("good\nbad & <i>worse\n", "utf-8")
    many = run["sentiment"].predict(["fine", tmp_path / "lines.txt"], explain=True)
    assert [*many["name"]] == ["fine", "good", "bad & <i>worse"]
    attention, evidence = (each.data for each in shown)
    assert "worse" in attention and "worse" in evidence and "<i>" not in attention + evidence
    assert attention != evidence
    assert run["sentiment"].predict(pd.Series(["fine", "good"], [7, 9])).equals(
        run["sentiment"].predict(["fine", "good"]))
    monkeypatch.setattr(run["sentiment"].predictor, "doubted", [])
    capsys.readouterr()
    run["sentiment"].predict("fine")
    assert "WARNING" not in capsys.readouterr().out
    monkeypatch.setattr(run["sentiment"].predictor, "doubted", ["attention"])
    run["sentiment"].predict("fine")
    assert f"attention's, and {dld.DOUBT}\n" in capsys.readouterr().out
    for task, given, line in (
            ("sentiment", ["fine", 3], "int: .* texts; give one, or a list of them"),
            ("mnist", np.zeros((4, 4)), r"ndarray: not .* array float64 \[4, 4\]; give uint8"),
            ("mnist", np.zeros((3, 28, 28), np.uint8), r"ndarray: .* \[3, 28, 28\]; give uint8"),
            ("mnist", 3, r"int: .* \(an array int64 \[\]; give uint8")):
        with pytest.raises(dld.Failure, match=f"predict {line}"):
            run[task].predict(given)


def test_an_interrupt_is_short_and_the_run_goes_on(tmp_path, monkeypatch, undrawn, capsys):
    kept = dld.log_epoch
    with monkeypatch.context() as patch:
        patch.setattr(dld, "log_epoch",
                      lambda *asked: signal.raise_signal(signal.SIGINT) or kept(*asked))
        with pytest.raises(KeyboardInterrupt) as stopped:
            dld.train("mnist", **QUICK, output_dir=tmp_path)
    folder = tmp_path / "mnist-offline-digits"
    line = f'interrupted; go on with train(resume="{folder.as_posix()}")'
    assert stopped.value._render_traceback_() == [line] and stopped.value.__context__ is None
    half = dld.load(folder)
    assert half.metrics["status"] == "interrupted" and "interrupted " in repr(half)
    capsys.readouterr()
    assert dld.train(resume=half, epochs=3).metrics["epochs"] == 3
    assert "epoch 1/" not in capsys.readouterr().out
