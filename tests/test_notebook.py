"""In notebooks: as a module, by %run and by !python in a real kernel, and what the module gives without one."""
import gc
import html
import io
import json
import logging
import os
import random
import re
import signal
import sys
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

README = re.search(r"## In Colab and notebooks\n(.*?)\n## ", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
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
dld.write_figures = dld.write_progress = lambda *asked, **more: None  # the other cells have seen that they work
dld.train("mnist", data="offline", epochs=3, limit=100, output_dir="later", report="minimal")""",
    "gone on": """
import importlib
dld = importlib.reload(dld)
dld.write_figures = dld.write_progress = lambda *asked, **more: None
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
    for fine, coarse in (("(24, 12, 4)", "(2, 1, 1)"), ("dpi=150", "dpi=60")):  # figures that are quickly drawn
        assert fine in script
        script = script.replace(fine, coarse)
    (folder / SCRIPT.name).write_text(script, "utf-8")
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
    assert len(figure.data["image/png"]) > 5_000 and "text/html" not in figure.data, "not twice"
    page, = cells["report"]
    assert page.data["text/html"].startswith("<iframe srcdoc=") and len(page.data["text/html"]) > 100_000
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
    assert problem.traceback[0].startswith("error: no figure 'training_curve' (did you mean training_curves?); there")


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


# -- without one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_figures(monkeypatch):
    """They take most of the time of a short training, and others have seen that they are drawn."""
    monkeypatch.setattr(dld, "write_figures", lambda *asked: None)
    monkeypatch.setattr(dld, "write_progress", lambda *asked, **more: None)


def surroundings():
    """What a training could leave behind in the process that it ran in."""
    return {"torch": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()), "python": random.getstate(),
            "style": dict(matplotlib.rcParams), "logging": logging.root.handlers[:],
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            "type": torch.get_default_dtype(), "threads": torch.get_num_threads(),
            "products": torch.get_float32_matmul_precision(), "warnings": list(warnings.filters),
            "folder": os.getcwd(), "gradients": torch.is_grad_enabled(),
            "files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
            "trainings": sum(issubclass(type(each), (torch.nn.Module, dld.State, dld.Data))
                             for each in gc.get_objects())}


def test_two_trainings_are_alike_and_leave_nothing_behind(tmp_path, capsys):
    settings = {**QUICK, "output_dir": tmp_path}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dld, "write_figures", lambda *asked: None)
        dld.train("mnist", **settings)  # the first may load libraries
    torch.manual_seed(7)  # any state but that in which the first left it
    gc.disable()  # chance shall not decide what is collected
    try:
        before = surroundings()
        run = dld.train("mnist", **settings)
        after = surroundings()
    finally:
        gc.enable()
    assert [key for key in before if before[key] != after[key]] == []
    one, two = (torch.load(folder / "model.pt")["weights"] for folder in sorted(tmp_path.iterdir()))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert run.folder == tmp_path / "mnist-offline-digits-2" and "predictor" not in vars(run)
    assert not list(run.folder.glob(".*")), "no lock"
    said = capsys.readouterr()
    assert said.out.count("epoch 2/2") == 2 and said.err == ""


def test_keywords_are_the_flags(tmp_path, no_figures):
    run = dld.train("mnist", **{**QUICK, "epochs": np.int64(1), "output_dir": tmp_path, "label_smoothing": 0})
    settings = json.loads((run.folder / "config.json").read_text("utf-8"))
    assert settings["label_smoothing"] == 0.0 and settings["data"] == "offline" and settings["epochs"] == 1
    assert metrics_of(run.folder)["model"] == run.metrics["model"] == "mlp"
    again = dld.train(config=run.folder / "config.json")
    assert again.metrics["test_loss"] == run.metrics["test_loss"] and again.folder != run.folder
    longer = dld.train(resume=run, epochs=2)
    assert longer.folder == run.folder and longer.metrics["epochs"] == 2


@pytest.mark.parametrize(("asked", "line"), [
    ({"epoch": 3}, "train has no epoch= (did you mean epochs?)"),
    ({"epochs": "3"}, "epochs takes a finite int, got '3'"),
    ({"epochs": 2.5}, "epochs takes a finite int, got 2.5"),
    ({"augment": 1}, "augment takes a finite bool, got 1"),
    ({"task": "minst"}, "task minst: choose from cifar10, mnist, sentiment, images, text, all (did you mean mnist?)"),
    ({"task": "all"}, "task all: train them one after another: cifar10, mnist, sentiment, images, text"),
    ({"model": ["mlp"]}, "model takes a finite str, got ['mlp']"),
    ({"val_fraction": 0.9}, "val_fraction 0.9: must be at least 0.001 and at most 0.5"),
    ({"resume": "a", "config": "b"}, "resume and config cannot be combined"),
    ({"resume": 7}, "resume takes a path, got 7"),
    ({"resume": "nowhere"}, "resume nowhere: no such folder"),
])
def test_bad_keywords_are_one_line(asked, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dld.Failure) as problem:
        dld.train(**asked)
    assert str(problem.value) == line and problem.value._render_traceback_() == [f"error: {line}"]
    assert problem.value.__context__ is None and not list(tmp_path.iterdir())


def test_a_run_from_disk(finished, run, tmp_path):
    for task, folder in finished.items():
        assert run[task].metrics == metrics_of(folder) and os.fspath(run[task]) == str(folder)
        assert f"{run[task].metrics['test_accuracy']:.2%}" in repr(run[task]) and "\n" not in repr(run[task])
        assert set(run[task].figures) == {path.stem for path in folder.glob("*.png")}
        assert run[task].figures["training_curves"]._repr_png_()[0] == (folder / "training_curves.png").read_bytes()
    with pytest.raises(dld.UsageError, match=r"no such folder; there are .*mnist-offline-digits"):
        dld.load(finished["mnist"].with_name("other"))
    (tmp_path / "metrics.json").write_text('{"status": "interrupted"}')
    with pytest.raises(dld.UsageError, match="has not finished; go on with train"):
        dld.load(str(tmp_path))


def test_the_report_is_framed_whole(run):
    for one in run.values():
        frame = one.report._repr_html_()
        inside, = re.findall(r'srcdoc="([^"]*)"', frame)
        page = html.unescape(inside).replace('\n<base href="about:srcdoc">', "")  # without, links lead out of the frame
        assert page == (one.folder / "report.html").read_text("utf-8") and page != html.unescape(inside)
        assert frame.count("<") == 2 and "allow-scripts" not in frame, "nothing but the frame"


def test_predicting_pictures_however_they_come(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = dld.make_shapes().x[:3].transpose(0, 2, 3, 1)
    for i, pixels in enumerate(x):
        Image.fromarray(pixels).save(f"{i}.png")
    before = torch.get_rng_state()
    files = run["cifar10"].predict(["0.png", Path("1.png"), "2.png"])
    others = run["cifar10"].predict([x[0], Image.fromarray(x[1]), np.dstack((x[2], np.full((32, 32), 255, np.uint8)))])
    assert torch.equal(before, torch.get_rng_state())
    assert [one.probabilities for one in files] == [one.probabilities for one in others]
    for one in files:
        assert sum(one.probabilities.values()) == pytest.approx(1) and len(one.probabilities) == 10
        assert one.confidence == max(one.probabilities.values()) == one.probabilities[one.label]
    assert [one.name for one in others] == ["ndarray", "Image", "ndarray"]
    table = files._repr_html_()
    assert table.count("<tr>") == table.count("data:image/png") == 3 and "stand-in" in table and "0.png" in table
    explained, = run["cifar10"].predict("0.png", explain=True).reasons.values()
    assert explained.name == "gradcam" and Image.open(io.BytesIO(explained.blob)).width == 1200
    grey = np.zeros((28, 28), np.uint8)
    assert [len(run["mnist"].predict(one)) for one in (grey, grey[..., None])] == [1, 1]


def test_predicting_texts(run, tmp_path):
    one, = run["sentiment"].predict("a <b>wonderful</b> film")
    assert one.label in ("negative", "positive") and "weighed most" in one.hint and one.name == ""
    (tmp_path / "lines.txt").write_text("good\nbad & worse\n", "utf-8")
    many = run["sentiment"].predict(["fine", tmp_path / "lines.txt"], explain=True)
    assert [each.sample for each in many] == ["fine", "good", "bad & worse"]
    assert set(many.reasons) == {"attention", "evidence"}
    assert "bad &amp; worse" in many._repr_html_() and "<b>wonderful" not in run["sentiment"].predict(
        "<b>wonderful")._repr_html_()


@pytest.mark.parametrize(("task", "given", "line"), [
    ("cifar10", "cat.png", "predict cat.png: no such file; this run's model reads pictures"),
    ("cifar10", np.zeros((4, 4)), "predict ndarray: not a picture that can be read (an array of float64; give uint8"),
    ("cifar10", np.zeros((4, 4, 7), np.uint8), "predict ndarray: not a picture that can be read"),
    ("cifar10", None, "predict NoneType: not a picture that can be read"),
    ("cifar10", [], "predict: nothing to predict in there"),
    ("sentiment", np.zeros((4, 4), np.uint8), "predict ndarray: this run's model reads texts"),
    ("sentiment", ["fine", 3], "predict int: this run's model reads texts"),
])
def test_bad_input_is_one_line(run, task, given, line):
    with pytest.raises(dld.Failure) as problem:
        run[task].predict(given)
    assert str(problem.value).startswith(line) and "\n" not in str(problem.value)


def test_an_interrupt_is_short_and_the_run_goes_on(tmp_path, monkeypatch, no_figures):
    kept = dld.after_epoch
    with monkeypatch.context() as patch:
        patch.setattr(dld, "after_epoch", lambda *asked: (kept(*asked), signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt) as stopped:
            dld.train("mnist", **QUICK, output_dir=tmp_path)
    folder = tmp_path / "mnist-offline-digits"
    line = f'interrupted; go on with train(resume="{folder.as_posix()}")'
    assert stopped.value._render_traceback_() == [line] and stopped.value.__context__ is None
    assert dld.load(folder).metrics["status"] == "interrupted" and "interrupted in epoch 2" in repr(dld.load(folder))
    assert dld.train(resume=folder).metrics["epochs"] == 2


def test_there_is_a_bar_only_where_it_can_go_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True, write=len, flush=lambda: None))
    for child_of_a_kernel in (False, True):
        with monkeypatch.context() as patch:
            patch.delenv("JPY_PARENT_PID", raising=False)
            if child_of_a_kernel:
                patch.setenv("JPY_PARENT_PID", "1")
            assert dld.progress_bar(3, "").disable == child_of_a_kernel
