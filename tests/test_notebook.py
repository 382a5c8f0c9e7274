"""In notebooks: as a module, by %run and by !python in a real kernel, and without a kernel."""
import gc
import html
import json
import os
import random
import re
import signal
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of
from PIL import Image

QUICK = {"data": "offline", "device": "cpu", "report": "minimal", "limit": 100, "width": 64,
         "epochs": 2}


@pytest.fixture(scope="module")
def run(finished):
    return {task: dld.load(folder) for task, folder in finished.items()}


# -- in a kernel ---------------------------------------------------------------------------------

README = re.search(r"## In Colab and notebooks\n(.*?)\n## ",
                   (ROOT / "README.md").read_text("utf-8"), re.S)[1]
SHORTER = {  # what the README's cells say -> what is run, on little data
    "--task mnist": "--task mnist --data offline --dry-run --report minimal --output-dir shell",
    '"mnist", epochs=3': '"mnist", data="offline", epochs=1, limit=100, report="minimal"',
    '"outputs/mnist"': '"outputs/mnist-offline-digits"'}
CHECKS = {  # name -> cell
    "wrong flag": "%run deep_learning_deliverable.py --task mnist --epochs 0",
    "wrong keyword": "dld.train('mnist', epoch=3)",
    "no picture": "run.predict('cat.png')",
    "no figure": "run.figures['training_curve']",
    "interrupted": """
import signal
kept = dld.log_epoch
def interrupt(*asked):
    signal.raise_signal(signal.SIGINT)
    return kept(*asked)
dld.log_epoch, dld.write_figures = interrupt, lambda *asked: {}
dld.train("mnist", data="offline", epochs=3, limit=100, output_dir="later", report="minimal")""",
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
    for fine, coarse in (("(24, 12, 4)", "(2, 1, 1)"), ("dpi=150", "dpi=60")):  # quickly drawn
        script = script.replace(fine, coarse)
    (folder / SCRIPT.name).write_text(script, "utf-8")
    readme = re.findall(r"```python\n(.*?)```", README, re.S)
    for whole, less in SHORTER.items():
        assert any(whole in cell for cell in readme)
        readme = [cell.replace(whole, less) for cell in readme]
    names = ("!python", "%run", "train", "figure", "report", "predict", "load", *CHECKS)
    return dict(zip(names, execute([*readme, *CHECKS.values()], folder), strict=True))


def said(outputs, stream="stdout"):
    return "".join(each.text for each in outputs
                   if each.output_type == "stream" and each.name == stream)


def test_no_cell_shows_a_traceback_or_writes_to_stderr(cells):
    for name, outputs in cells.items():
        for each in outputs:
            assert each.output_type != "error" or (name in CHECKS and len(each.traceback) == 1
                                                   and "\n" not in each.traceback[0]), each
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
    assert shown.data["text/html"].count("data:image/png;base64,") >= 7
    assert "mlp on offline digits" in shown.data["text/plain"]
    assert "epoch 1/1" in said(before)
    assert "%run deep_learning_deliverable.py --predict" in said(before)
    assert len(before) == 1, "lines, and no rest of a bar"
    figure, = cells["figure"]
    assert len(figure.data["image/png"]) > 5_000 and "text/html" not in figure.data, "not twice"
    page, = cells["report"]
    assert page.data["text/html"].startswith("<iframe srcdoc=")
    picture, note, table = cells["predict"]
    assert "image/png" in picture.data and "stand-in" in note.text
    assert "confidence" in table.data["text/html"]
    number, = cells["load"]
    assert 0 <= float(number.data["text/plain"]) <= 1


def test_a_problem_is_one_line(cells):
    wrong, = cells["wrong flag"]
    assert wrong.text == "error: --epochs 0: must be at least 1 and at most 1000000\n"
    for name, line in (
            ("wrong keyword", "error: train has no epoch= (did you mean epochs?)"),
            ("no picture", "error: predict cat.png: no such file; this run's model reads pictures"),
            ("no figure", "error: no figure 'training_curve'; there are confusion_matrix, ")):
        problem, = cells[name]
        assert problem.traceback[0].startswith(line)
    *_, problem = cells["interrupted"]
    assert problem.traceback == [
        'interrupted; go on with train(resume="later/mnist-offline-digits")']
    assert "Stopped after" in said(cells["interrupted"])


def test_the_users_figures_work_and_of_a_bar_an_empty_line_is_kept(cells):
    figure, = cells["own figure"]
    assert figure.output_type == "display_data" and "image/png" in figure.data
    lines, bar = cells["bar"]
    assert lines.text == "epoch 0\nepoch 50\nepoch 100\nepoch 150\nend\n"
    assert bar.data == {"text/plain": ""}


# -- without one ---------------------------------------------------------------------------------


@pytest.fixture
def no_figures(monkeypatch):
    """They take most of the time of a short training, and others have seen that they are drawn."""
    monkeypatch.setattr(dld, "write_figures", lambda *asked: {})
    monkeypatch.setattr(dld, "write_progress", lambda *asked, **more: None)


def surroundings():
    """What a training could leave behind in the process that it ran in."""
    gc.collect()
    files = Path("/proc/self/fd")
    return {"torch": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()),
            "python": random.getstate(), "style": dict(matplotlib.rcParams),
            "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
            "threads": torch.get_num_threads(), "warnings": list(warnings.filters),
            "products": torch.get_float32_matmul_precision(), "folder": os.getcwd(),
            "gradients": torch.is_grad_enabled(), "type": torch.get_default_dtype(),
            "files": len(os.listdir(files)) if files.exists() else 0,
            "trainings": sum(issubclass(type(each), torch.nn.Module | dld.TrainState | dld.Dataset)
                             for each in gc.get_objects())}


def test_two_trainings_are_alike_and_leave_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dld, "write_figures", lambda *asked: {})
    settings = {**QUICK, "output_dir": tmp_path}
    dld.train("mnist", **settings)  # the first may load libraries
    torch.manual_seed(7)  # any state but that in which the first left it
    before = surroundings()
    run = dld.train("mnist", **settings)
    after = surroundings()
    assert [key for key in before if before[key] != after[key]] == []
    one, two = (torch.load(folder / "model.pt")["weights"] for folder in sorted(tmp_path.iterdir()))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert run.folder == tmp_path / "mnist-offline-digits-2" and "predictor" not in vars(run)
    said = capsys.readouterr()
    assert said.out.count("epoch 2/2") == 2 and said.err == ""


def test_keywords_are_the_flags(tmp_path, no_figures):
    run = dld.train("mnist", **{**QUICK, "epochs": np.int64(1), "output_dir": tmp_path,
                                "label_smoothing": 0})
    settings = json.loads((run.folder / "config.json").read_text("utf-8"))
    assert (settings["label_smoothing"], settings["data"], settings["epochs"]) == (0, "offline", 1)
    again = dld.train(config=run.folder / "config.json")
    assert again.metrics["test_loss"] == run.metrics["test_loss"] and again.folder != run.folder
    longer = dld.train(resume=run, epochs=2)
    assert longer.folder == run.folder and longer.metrics["epochs"] == 2


@pytest.mark.parametrize(("asked", "line"), [
    ({"epoch": 3}, "train has no epoch= (did you mean epochs?)"),
    ({"epochs": "3"}, "epochs takes a finite int, got '3'"),
    ({"epochs": 2.5}, "epochs takes a finite int, got 2.5"),
    ({"augment": 1}, "augment takes a finite bool, got 1"),
    ({"task": "minst"}, "task minst: choose from cifar10, mnist, sentiment, images, text, all "
                        "(did you mean mnist?)"),
    ({"task": "all"}, "task all: train them one after another: "
                      "cifar10, mnist, sentiment, images, text"),
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
    assert str(problem.value) == line
    assert problem.value._render_traceback_() == [f"error: {line}"]
    assert problem.value.__context__ is None and not list(tmp_path.iterdir())


def test_a_run_from_disk(finished, run, tmp_path):
    for task, folder in finished.items():
        assert run[task].metrics == metrics_of(folder) and os.fspath(run[task]) == str(folder)
        accuracy = f"{run[task].metrics['test_accuracy']:.2%}"
        assert accuracy in repr(run[task]) and "\n" not in repr(run[task])
    with pytest.raises(dld.UsageError, match=r"no such folder; there are .*mnist-offline-digits"):
        dld.load(finished["mnist"].with_name("other"))
    (tmp_path / "metrics.json").write_text('{"status": "interrupted"}')
    with pytest.raises(dld.UsageError, match="has not finished; go on with train"):
        dld.load(str(tmp_path))


def test_figures_and_the_report_are_those_of_the_folder(run):
    pytest.importorskip("IPython")
    for one in run.values():
        assert set(one.figures) == {path.stem for path in one.folder.glob("*.png")}
        curves = (one.folder / "training_curves.png").read_bytes()
        assert one.figures["training_curves"].data == curves
        frame = one.report._repr_html_()
        page = html.unescape(re.findall(r'srcdoc="([^"]*)"', frame)[0])
        whole = (one.folder / "report.html").read_text("utf-8")
        assert page.replace('\n<base href="about:srcdoc">', "") == whole != page
        assert frame.count("<") == 2 and "allow-scripts" not in frame, "nothing but the frame"


def test_predicting_pictures_however_they_come(run, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = shapes.x[:3].transpose(0, 2, 3, 1)
    for i, pixels in enumerate(x):
        Image.fromarray(pixels).save(f"{i}.png")
    before = torch.get_rng_state()
    files = run["cifar10"].predict(["0.png", Path("1.png"), "2.png"])
    others = run["cifar10"].predict([x[0], Image.fromarray(x[1]),
                                     np.dstack((x[2], np.full((32, 32), 255, np.uint8)))])
    assert torch.equal(before, torch.get_rng_state())
    assert [*files["name"]] == ["0.png", "1.png", "2.png"]
    assert [*others["name"]] == ["ndarray", "Image", "ndarray"]
    assert files.drop(columns="name").equals(others.drop(columns="name"))
    shares = files.filter(like="p_")
    assert shares.shape == (3, 10) and np.allclose(shares.sum(axis=1), 1)
    assert (files["confidence"] == shares.max(axis=1)).all()
    assert (shares.idxmax(axis=1) == "p_" + files["predicted"]).all()
    assert "stand-in" in capsys.readouterr().out
    grey = np.zeros((28, 28), np.uint8)
    assert [len(run["mnist"].predict(one)) for one in (grey, grey[..., None])] == [1, 1]


def test_predicting_texts_with_reasons(run, tmp_path, monkeypatch):
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
    with pytest.raises(dld.UsageError, match="draws at most 24 samples, got 25"):
        run["sentiment"].predict(["good"] * 25, explain=True)


@pytest.mark.parametrize(("task", "given", "line"), [
    ("cifar10", "cat.png", "predict cat.png: no such file; this run's model reads pictures"),
    ("cifar10", np.zeros((4, 4)), "predict ndarray: not a picture that can be read (an array of f"),
    ("cifar10", np.zeros((4, 4, 7), np.uint8), "predict ndarray: not a picture that can be read"),
    ("cifar10", None, "predict NoneType: not a picture that can be read"),
    ("cifar10", [], "nothing to predict in there; this run's model reads pictures"),
    ("sentiment", np.zeros((4, 4), np.uint8), "predict ndarray: this run's model reads texts"),
    ("sentiment", ["fine", 3], "predict int: this run's model reads texts"),
])
def test_bad_input_is_one_line(run, task, given, line):
    with pytest.raises(dld.Failure) as problem:
        run[task].predict(given)
    assert line in str(problem.value) and "\n" not in str(problem.value)


def test_an_interrupt_is_short_and_the_run_goes_on(tmp_path, monkeypatch, no_figures, capsys):
    kept = dld.log_epoch
    with monkeypatch.context() as patch:
        patch.setattr(dld, "log_epoch",
                      lambda *asked: signal.raise_signal(signal.SIGINT) or kept(*asked))
        with pytest.raises(KeyboardInterrupt) as stopped:
            dld.train("mnist", **QUICK, output_dir=tmp_path)
    folder = tmp_path / "mnist-offline-digits"
    line = f'interrupted; go on with train(resume="{folder.as_posix()}")'
    assert stopped.value._render_traceback_() == [line] and stopped.value.__context__ is None
    assert dld.load(folder).metrics["status"] == "interrupted"
    assert "interrupted " in repr(dld.load(folder))
    capsys.readouterr()
    assert dld.train(resume=folder).metrics["epochs"] == 2
    assert "epoch 1/2" not in capsys.readouterr().out


def test_there_is_a_bar_only_where_it_can_go_away(monkeypatch):
    screen = types.SimpleNamespace(isatty=lambda: True, write=len, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert not dld.progress_bar(3, "").disable
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert dld.progress_bar(3, "").disable, "in the child of a kernel"
