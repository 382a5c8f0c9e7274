"""The program as its user meets it: flags, folders, messages, exit codes."""
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of, small
from PIL import Image

EVERY_RUN = {
    "training_curves.png", "confusion_matrix.png", "confusion_matrix_norm.png", "reliability.png",
    "sample_predictions.png", "report.html", "classification_report.txt", "classes.csv",
    "faults.csv", "metrics.json", "history.csv", "predictions.csv", "config.json", "log.txt",
    "model.pt", "checkpoint.pt"}
EXPLANATION = {"cifar10": {"gradcam.png"}, "mnist": {"saliency.png"},
               "sentiment": {"attention.html", "evidence.html"}}
MNIST = ["--task", "mnist", "--data", "offline", "--device", "cpu", "--limit", "100",
         "--report", "minimal"]


def artefacts(run):
    """All that every run like this one must have."""
    there = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    return there - {"mistakes.png", "suspects.png", "near_repeats.png"}  # if there are any


# -- the program, alone ----------------------------------------------------------------------------


def test_the_one_file_trains_in_an_empty_folder_and_says_no_warning(tmp_path):
    shutil.copy(SCRIPT, tmp_path)  # as downloaded
    done = subprocess.run(
        [sys.executable, SCRIPT.name, "--task", "mnist", "--data", "offline", "--dry-run",
         "--report", "minimal"],
        cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings, and no progress bar where nobody watches"
    run = tmp_path / "outputs" / "mnist-offline-digits-dry-run"
    assert artefacts(run) == EVERY_RUN | {"saliency.png"}
    assert "stand-in" in done.stdout.splitlines()[-1]


def test_importing_has_no_side_effects(tmp_path):
    code = ("import sys, random, torch; before = torch.get_rng_state()\n"
            "import deep_learning_deliverable\n"
            "assert torch.equal(before, torch.get_rng_state())\n"
            "heavy = {'matplotlib', 'seaborn', 'sklearn', 'torchvision'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_network_ends_in_the_stand_in_or_in_exit_3(
        tmp_path, undrawn, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dld, "MNIST", [dataclasses.replace(
        archive, mirrors=("http://127.0.0.1:9/x",)) for archive in dld.MNIST])
    flags = [*MNIST, "--epochs", "1"]
    assert dld.main([*flags, "--data", "real"]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "train-images-idx3-ubyte.gz" in said and "by hand" in said
    assert not Path("outputs").exists()
    assert dld.main([*flags, "--data", "auto"]) == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "stand-in" in said.splitlines()[-1]
    run = Path("outputs/mnist-offline-digits")
    unsought = {"near_repeats", "baseline", "saliency_over_random"}
    assert not unsought & metrics_of(run).keys(), "what was not sought is not said"
    page = (run / "report.html").read_text("utf-8")
    assert "Near repeats" not in page and "not put to the test" in page


# -- what a finished run holds, and what it can be asked -------------------------------------------


@pytest.mark.parametrize("task", EXPLANATION)
def test_a_finished_run_is_complete_and_its_files_agree(task, finished):
    run = finished[task]
    assert artefacts(run) == EVERY_RUN | EXPLANATION[task] | {"deletion.png"}
    for picture in run.glob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image.convert("L")).std() > 5, f"{picture} is blank"
    metrics = metrics_of(run)
    assert metrics["status"] == "finished" and "stand-in" in metrics["dataset"]
    assert [key for key, value in metrics.items() if value is None] in ([], ["peak_memory_mb"])
    assert not any(isinstance(value, dict | list) for value in metrics.values()), "flat"
    assert f"{metrics['test_accuracy']:.2%}" in (run / "log.txt").read_text("utf-8")
    report = (run / "classification_report.txt").read_text("utf-8")
    assert "macro avg" in report and "stand-in" in report
    history = pd.read_csv(run / "history.csv")
    best = history.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    assert len(history) == metrics["epochs"] and best["epoch"] == metrics["best_epoch"]
    assert best["val_accuracy"] == metrics["val_accuracy"]
    table = pd.read_csv(run / "predictions.csv", dtype={"true": str, "predicted": str})
    right = table["true"] == table["predicted"]
    assert right.mean() == pytest.approx(metrics["test_accuracy"])
    assert (right == table["correct"]).all()
    shares = table.filter(regex="^p_")
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-4)
    assert (shares.idxmax(axis=1).str[2:] == table["predicted"]).all()
    config = json.loads((run / "config.json").read_text("utf-8"))
    assert list(config) == [field.name for field in dataclasses.fields(dld.Config)]
    assert config["data"] == "offline" and config["precision"] != "auto", "what was decided"


@pytest.mark.parametrize("task", EXPLANATION)
def test_evaluate_gets_the_same_numbers(task, finished, capsys):
    assert dld.main(["--evaluate", "--run", str(finished[task])]) == 0
    out = capsys.readouterr().out
    assert out.count("same") >= 13 and "DIFFERENT" not in out and "stand-in" in out
    assert f"{metrics_of(finished[task])['test_accuracy']:.6f}" in out


def test_evaluate_says_when_the_numbers_differ(finished, tmp_path, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    dld.write_json(run / "metrics.json", {**metrics_of(run), "test_loss": 7.0})
    assert dld.main(["--evaluate", "--run", str(run)]) == 1
    assert capsys.readouterr().out.count("DIFFERENT") == 1


def test_predict_agrees_with_predictions_csv_and_needs_only_model_pt(finished, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished["cifar10"] / "model.pt", run)
    table = (finished["cifar10"] / "predictions.csv").read_text("utf-8").splitlines()
    lines, pictures = list(csv.DictReader(table))[:5], dld.TASKS["cifar10"].offline().x
    files = [str(tmp_path / f"{line['row']}.png") for line in lines]
    for line, file in zip(lines, files, strict=True):
        Image.fromarray(pictures[int(line["row"])].transpose(1, 2, 0)).save(file)
    precision = metrics_of(finished["cifar10"])["precision"]
    assert dld.main(["--predict", *files, "--run", str(run), "--precision", precision]) == 0
    out = capsys.readouterr().out.splitlines()
    for line, said in zip(lines, out, strict=False):
        name, share = said.split()[:2]
        assert name == line["predicted"]
        assert float(share[:-1]) == pytest.approx(100 * float(line["confidence"]), abs=0.11)
    assert "offline shapes" in out[-1]


def test_predict_reads_texts_from_the_command_line_and_from_a_file(finished, tmp_path, capsys):
    def predict(*inputs):
        assert dld.main(["--predict", *inputs, "--run", str(finished["sentiment"])]) == 0
        return capsys.readouterr().out.splitlines()

    out = [line for line in predict("The plot was good.", "", "ünknown 😀", "long " * 3000)
           if not line.startswith(" ")]
    assert len(out) == 5 and all(re.match(r"(posi|nega)tive \d+\.\d%", line) for line in out[:4])
    file = tmp_path / "lines.txt"
    file.write_bytes("The plot was good.\n\nBad caf\xe9\r\n".encode("latin-1"))
    lines = [line for line in predict(str(file)) if not line.startswith(" ")]
    assert len(lines) == 3 and lines[0] == out[0] and "café" in lines[1]
    hint = predict("the zzgruntle plot was good, gnarfy")[1]
    assert hint.endswith("unknown: zzgruntle, gnarfy") and len(re.findall(r"\w+ \d+%", hint)) <= 4


def test_any_texts_in_the_layout_of_imdb_train_and_predict(tmp_path, undrawn, capsys):
    texts = {"pos": ["good", "nice :) 😀", "caf\xe9 tr\xe8s bon", "fine!"],
             "neg": ["bad", "", "awful ?!", "no"]}
    for part in ("train", "test"):
        for sense, some in texts.items():
            folder = tmp_path / "data" / "aclImdb" / part / sense
            folder.mkdir(parents=True)
            for i, text in enumerate(some * 8):
                encoded = text.encode("utf-8" if "😀" in text else "latin-1")
                (folder / f"{i}.txt").write_bytes(encoded)
    assert dld.main(["--task", "sentiment", "--model", "transformer", "--data", "real", "--epochs",
                     "8", "--batch-size", "4", "--data-dir", str(tmp_path / "data"), "--device",
                     "cpu", "--precision", "fp32", "--output-dir", str(tmp_path)]) == 0
    run = tmp_path / "sentiment"
    metrics = metrics_of(run)
    assert metrics["dataset"] == "texts in aclImdb" and metrics["unlabelled_samples"] == 0
    assert metrics["test_accuracy"] == 1.0 and metrics["baseline_accuracy"] > 0.8
    assert metrics["test_repeats"] == 64 and metrics["test_accuracy_without_repeats"] is None
    assert artefacts(run) == EVERY_RUN | EXPLANATION["sentiment"] | {"deletion.png"}
    assert "says nothing about new ones" in " ".join(capsys.readouterr().out.split())
    assert dld.main(["--predict", "nice :) 😀", "awful ?!", "--run", str(run)]) == 0
    assert re.fullmatch(r"positive .*\n .*\nnegative .*\n.*\n?", capsys.readouterr().out)


# -- again, and further ----------------------------------------------------------------------------


def test_a_config_repeats_its_run_exactly_in_a_new_folder(finished, undrawn):
    run = finished["mnist"]
    before = (run / "model.pt").read_bytes()
    assert dld.main(["--config", str(run / "config.json")]) == 0
    again = run.with_name(run.name + "-2")
    assert (run / "model.pt").read_bytes() == before, "a finished run is never overwritten"
    one, two = (dld.load_file(folder / "model.pt")["weights"] for folder in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = ({key: value for key, value in metrics_of(folder).items() if not re.search(
        "second|latency|memory", key)} for folder in (run, again))
    assert one == two


def test_resume_continues_in_the_same_folder(finished, tmp_path, undrawn):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    config = json.loads((run / "config.json").read_text("utf-8"))
    dld.write_json(run / "config.json", {**config, "report": "minimal"})  # seeks no near repeats
    (run / "near_repeats.png").write_bytes(b"of an earlier report")
    assert dld.main(["--resume", str(run), "--epochs", "3"]) == 0
    metrics, history = metrics_of(run), pd.read_csv(run / "history.csv")
    assert not (run / "near_repeats.png").exists(), "nothing of an earlier report is left"
    assert metrics["epochs"] == 3 and metrics["status"] == "finished"
    assert history["epoch"].tolist() == [1, 2, 3] and history["seconds"].is_monotonic_increasing
    assert metrics["seconds_total"] > metrics["seconds_training"] + metrics["seconds_setup"] - 0.1


def test_an_interrupted_run_saves_reports_and_can_go_on(
        tmp_path, undrawn, monkeypatch, capsys):
    """Ctrl-C in the second epoch: the step ends, all is saved, what there is is reported."""
    def interrupt(self, state, *others, real=dld.Checkpointer.after_step):
        if (state.epoch, state.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        real(self, state, *others)

    ours = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(dld.Checkpointer, "after_step", interrupt)
        assert dld.main([*MNIST, "--epochs", "3", "--batch-size", "30", "--precision", "fp32",
                         "--output-dir", str(tmp_path)]) == 130
    assert signal.getsignal(signal.SIGINT) is ours
    run, where = tmp_path / "mnist-offline-digits", "interrupted in epoch 2 of 3, after 1 step"
    said, metrics = capsys.readouterr().out, metrics_of(run)
    assert f"--resume {dld.quoted(run)}" in said and "Report of what there is" in said
    assert metrics["status"] == "interrupted" and metrics["ended"] == where
    assert metrics["best_epoch"] == 1 and metrics["test_accuracy"] > 0
    assert f"This training was {where}" in (run / "report.html").read_text("utf-8")
    assert dld.main(["--resume", str(run)]) == 0
    assert "after 1 epoch and 1 step" in capsys.readouterr().out and "ended" not in metrics_of(run)


def test_a_folder_in_which_another_process_trains_is_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    with dld.run_lock(run):
        assert dld.main(["--resume", str(run), "--epochs", "9"]) == 2
    said = capsys.readouterr().err
    assert f"{run} is being trained by another process" in said and said.count("\n") == 1
    assert metrics_of(run)["epochs"] == 2


def test_a_signal_that_a_library_turns_into_another_error_is_still_a_signal(
        tmp_path, monkeypatch, capsys):
    """Extension modules answer Ctrl-C while they are loaded with an ImportError."""
    def load(*given):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(dld, "write_figures", load)
    assert dld.main([*MNIST, "--epochs", "1", "--output-dir", str(tmp_path)]) == 130
    assert "ImportError" not in capsys.readouterr().err
    assert metrics_of(tmp_path / "mnist-offline-digits")["status"] == "interrupted"


# -- a task of one's own ---------------------------------------------------------------------------


def missing(config):
    raise dld.DataMissing("stripes are only made here")


def make_stripes():
    """Stripes across or down."""
    random = np.random.default_rng(0)
    y = random.permutation(np.arange(300) % 2)
    x = random.integers(0, 90, (300, 1, 16, 16), dtype=np.uint8)
    for picture, label in zip(x[:, 0], y, strict=True):
        (picture if label else picture.T)[::4] += 150
    return dld.RawData("stripes", ["down", "across"], x, y, 200, "offline-stripes")


def test_a_new_task_is_one_entry(tmp_path, undrawn, monkeypatch, capsys):
    """Registered here; trained, reported and predicted by the same program."""
    monkeypatch.setitem(dld.TASKS, "stripes", dld.Task(
        "image", missing, make_stripes, {"model": "classic", "epochs": 4}))
    assert dld.main(["--task", "stripes", "--output-dir", str(tmp_path), "--batch-size", "20",
                     "--precision", "fp32", "--device", "cpu"]) == 0
    run = tmp_path / "stripes-offline-stripes"
    assert metrics_of(run)["test_accuracy"] > 0.9
    assert artefacts(run) == EVERY_RUN | {"gradcam.png", "deletion.png"}
    Image.fromarray(make_stripes().x[0, 0]).save(tmp_path / "one.png")
    capsys.readouterr()
    assert dld.main(["--predict", str(tmp_path / "one.png"), "--run", str(run)]) == 0
    assert re.match(r"(down|across) ", capsys.readouterr().out)


@pytest.mark.xfail(reason="an AssertionError ends it in exit 1", strict=False)
@pytest.mark.parametrize(("data", "code"), [("auto", 3), ("real", 3), ("offline", 2)])
def test_a_task_without_a_stand_in_ends_in_one_clear_line(data, code, monkeypatch, capsys):
    monkeypatch.setitem(dld.TASKS, "bare", dld.Task("image", missing, None, {"model": "classic"}))
    assert dld.main(["--task", "bare", "--data", data]) == code
    assert "--debug" not in capsys.readouterr().err


# -- time: the speed of the machine is given, none is measured -------------------------------------


@pytest.fixture
def speed(monkeypatch):
    """A machine that takes a millisecond for a training sample, and draws ten figures a second."""
    known = dld.SpeedEstimate(dld.Config(), train=1e-3, predict=1e-4, figure=0.1)
    monkeypatch.setattr(dld, "measure_speed", lambda data, config, *others: dataclasses.replace(
        known, config=config))
    return known


def buy(raw, given, budget, **more):
    """The settings that a run of these flags would have in so much time."""
    given = {"data": "offline", "device": "cpu", "precision": "fp32", **given, **more}
    config = dld.resolve_config({**given, "budget": f"{budget}s"})
    clock = dld.TimeBudget(time.perf_counter(), budget)
    return dataclasses.replace(config, **dld.fit_to_budget(
        raw, config, dld.start_machine(config), given, clock))


def test_a_larger_budget_buys_a_higher_rung_and_flags_given_stay(digits, speed):
    flags = {"task": "mnist", "model": "fast", "limit": 300}
    few, some, many = (buy(digits, flags, budget) for budget in (10, 60, 36_000))
    assert few.width <= some.width <= many.width == 64 and few.epochs < many.epochs == 40
    assert (few.width, few.epochs) != (some.width, some.epochs)
    assert buy(digits, flags, 36_000, width=8, batch_size=100).width == 8
    assert (few.report, many.report) == ("minimal", "full"), "a quarter is for what gives trust"


def test_a_budget_for_texts_counts_the_unlabelled_and_their_preparation(reviews, speed):
    raw = dataclasses.replace(reviews, x=[*reviews.x, *reviews.x[:600]], packed=None)
    flags = {"task": "sentiment", "max_tokens": 20}
    much = buy(raw, flags, 36_000)
    assert (much.epochs, much.unlabelled) == (3, 1.0)
    assert buy(raw, flags, 36_000, unlabelled=0.5).unlabelled == 0.5
    data = dld.build_dataset(raw, config := small("sentiment", epochs=3, max_tokens=20))
    before, after = (speed.seconds(data, config, started=started) for started in (False, True))
    assert before - after == pytest.approx(data.samples.estimate_extra_seconds(data, 600)[0]) != 0


def test_a_run_within_a_budget_records_what_it_chose(tmp_path, undrawn, speed, capsys):
    assert dld.main([*MNIST, "--budget", "30m", "--epochs", "2", "--precision", "fp32",
                     "--output-dir", str(tmp_path)]) == 0
    run = tmp_path / "mnist-offline-digits"
    config, metrics = (json.loads((run / f"{name}.json").read_text("utf-8"))
                       for name in ("config", "metrics"))
    assert config["budget"] == "" and metrics["seconds_budget"] == 1800
    assert (config["width"], config["epochs"], metrics["epochs"]) == (1024, 2, 2)
    assert "the budget buys --width 1024 --epochs 2\n" in capsys.readouterr().out.replace(
        " --report minimal", "")


def test_all_tasks_share_a_budget_and_are_compared(finished, tmp_path, monkeypatch, capsys):
    runs = {task: shutil.copytree(run, tmp_path / run.name) for task, run in finished.items()}
    shares = []

    def train(given, log):
        shares.append(dld.parse_seconds(given["budget"]))
        return runs[given["task"]]

    monkeypatch.setattr(dld, "train_run", train)
    assert dld.main(["--task", "all", "--budget", "10h"]) == 0
    assert shares == pytest.approx([12_000, 18_000, 36_000], abs=60), "here none uses its share"
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert [label.split()[0] for label in table["label"]] == list(finished)
    assert (table["multiply_adds"] > 0).all()
    report = (tmp_path / "comparison.md").read_text("utf-8")
    assert "One picture costs cifar10 fast" in report
    assert "stand-in" in capsys.readouterr().out.splitlines()[-1]


def test_a_machine_that_slows_down_gets_fewer_epochs(digits, speed):
    data = dld.build_dataset(digits, config := small("mnist", limit=100, epochs=20,
                                                     report="minimal"))
    estimate = dataclasses.replace(speed, config=config, predict=0.0, figure=1.0)
    budget = dld.TimeBudget(time.perf_counter() - 380, 1200, speed=estimate)
    state = dld.new_train_state(dld.build_model(data.meta), config, dld.start_machine(config))
    state.epoch, found = 2, []
    for seconds in (20, 200, 20_000):
        state.seconds = float(seconds)
        found.append(budget.affordable_epochs(data, config, state))
    assert found == [20, 10, 2]


# -- when things go wrong: see also test_bad_input -------------------------------------------------


def test_debug_shows_the_traceback():
    with pytest.raises(dld.UsageError, match=r"cannot read nowhere\.json"):
        dld.main(["--config", "nowhere.json", "--debug"])


def test_half_written_files_are_never_seen(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        dld.write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


# -- what is written down must be true -------------------------------------------------------------


def test_requirements_and_the_scripts_own_metadata_agree():
    block = re.search(r"# dependencies = \[\n(.*?)# \]", SCRIPT.read_text("utf-8"), re.S)[1]
    inline = re.findall(r'"(.+?)"', block)
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert inline == [line for line in lines if not line.endswith("  # for the tests only")]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in inline), "lower bounds only"


def test_the_contents_in_the_docstring_name_the_line_of_each_section():
    if "@CONTENTS@" in dld.__doc__:
        pytest.skip("the contents are not filled in yet")
    lines = SCRIPT.read_text("utf-8").splitlines()
    listed = re.findall(r"^ +(\d+)  (\S.*?) \.+ (\d+)$", dld.__doc__, re.M)
    for number, title, line in listed:
        assert lines[int(line) - 1] == f"# {number}  {title}"
    banners = [line for line, above in zip(lines[1:], lines, strict=False)
               if re.fullmatch("# =+", above) and re.match(r"# \d+  ", line)]
    assert [f"# {number}  {title}" for number, title, _ in listed] == banners
