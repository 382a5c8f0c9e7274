"""The program as its user meets it: flags, folders, messages, exit codes."""
import dataclasses
import json
import math
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
    "training_curves.png", "confusion_matrix.png", "reliability.png", "sample_predictions.png",
    "report.html", "report.md", "tables.tex", "references.bib", "classification_report.txt",
    "classes.csv", "confusion_matrix.csv", "faults.csv", "metrics.json", "history.csv",
    "predictions.csv", "config.json", "log.txt", "model.pt", "checkpoint.pt"}
FULL_REPORT = {"deletion.png", "class_balance.png", "training_samples.png", "architecture.png",
               "roc_pr.png"}
EXPLANATION = {"cifar10": {"gradcam.png", "feature_maps.png"}, "mnist": {"saliency.png"},
               "sentiment": {"attention.html", "evidence.html", "ablation.png",
                             "text_lengths.png"}}
MNIST = ["--task", "mnist", "--data", "offline", "--device", "cpu", "--limit", "100",
         "--report", "minimal"]


def artefacts(run):
    """All that every run like this one must have."""
    there = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    return there - {"mistakes.png", "suspects.png", "near_repeats.png"}  # if there are any


ALONE = """
import random, sys, torch
before = torch.get_rng_state(), random.getstate()
import deep_learning_deliverable as dld
assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
heavy = {"matplotlib", "pandas", "scipy", "seaborn", "sklearn", "torchvision"} & set(sys.modules)
assert not heavy, heavy
dld.FIGURE_DPI = 50
sys.exit(dld.main("--task mnist --data offline --dry-run --report minimal".split()))
"""


def test_the_one_file_trains_in_an_empty_folder_and_says_no_warning(tmp_path):
    """In a process of its own; importing it has no side effects."""
    shutil.copy(SCRIPT, tmp_path)  # as downloaded
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True,
                          text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings, and no progress bar where nobody watches"
    run = tmp_path / "outputs" / "mnist-offline-digits-dry-run"
    assert artefacts(run) == EVERY_RUN | {"saliency.png"}
    assert "stand-in" in done.stdout.splitlines()[-1]


def test_ctrl_c_while_packages_are_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n", "utf-8")
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run([sys.executable, SCRIPT.name], cwd=tmp_path, capture_output=True,
                          text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_no_network_ends_in_the_stand_in_or_in_exit_3_and_a_budget_says_what_it_bought(
        tmp_path, undrawn, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dld, "measure_speed", lambda data, config, *others, **more: (
        dld.SpeedEstimate(config, step=0.1, predict=1e-4, figure=0.1)))  # whatever machine this is
    monkeypatch.setattr(dld, "MNIST", [dataclasses.replace(
        archive, mirrors=("http://127.0.0.1:9/x",)) for archive in dld.MNIST])
    flags = [*MNIST, "--epochs", "2", "--budget"]
    assert dld.main([*flags, "30m", "--data", "real"]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "train-images-idx3-ubyte.gz" in said and "by hand" in said
    assert dld.main([*flags, "0.1s", "--output-dir", "short"]) == 0
    said = capsys.readouterr().out
    assert "however little is trained: the budget is too small" in said
    config = json.loads(Path("short/mnist-offline-digits/config.json").read_text("utf-8"))
    assert config["steps"] == "0:1", "one step, and its report"
    assert not Path("outputs").exists()
    assert dld.main([*flags, "30m", "--data", "auto"]) == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "stand-in" in said.splitlines()[-1]
    said = " ".join(said.split())
    assert "the budget buys --width 1024" in said and "about 2 epochs" in said
    assert "near repeats; --report full takes" in said, "not that half an hour was too little"
    run = Path("outputs/mnist-offline-digits")
    config, metrics = json.loads((run / "config.json").read_text("utf-8")), metrics_of(run)
    assert (config["budget"], config["width"], metrics["seconds_budget"]) == ("", 1024, 1800)
    assert metrics["epochs"] == 2, "no more than the flags allow"
    named = {key: value for key, value in metrics.items() if key.startswith("seconds_")}
    others = sum(named[f"seconds_{key}"] for key in ("budget", "total", "data"))
    said = "each second has a name"
    assert sum(named.values()) - others == pytest.approx(named["seconds_total"], abs=0.1), said


@pytest.mark.parametrize("task", EXPLANATION)
def test_a_finished_run_is_complete_and_its_files_agree(task, finished):
    run = finished[task]
    assert artefacts(run) == EVERY_RUN | EXPLANATION[task] | FULL_REPORT
    for picture in run.glob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image.convert("L")).std() > 5, f"{picture} is blank"
    metrics = metrics_of(run)
    assert metrics["status"] == "finished" and "stand-in" in metrics["dataset"]
    assert [key for key, value in metrics.items() if value is None] in ([], ["peak_memory_mb"])
    assert "macro avg" in (run / "classification_report.txt").read_text("utf-8")
    history = pd.read_csv(run / "history.csv")
    best = history.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    assert len(history) == metrics["epochs"] and best["epoch"] == metrics["best_epoch"]
    # Where a network is unsure, its pictures are seen from several sides, but not in every epoch.
    assert best["val_accuracy"] == pytest.approx(metrics["val_accuracy"],
                                                 abs=0.1)
    table = pd.read_csv(run / "predictions.csv", dtype={"true": str, "predicted": str})
    right = table["true"] == table["predicted"]
    assert right.mean() == pytest.approx(metrics["test_accuracy"])
    assert (right == table["correct"]).all()
    shares = table.filter(regex="^p_")
    assert (shares.idxmax(axis=1).str[2:] == table["predicted"]).all()
    config = json.loads((run / "config.json").read_text("utf-8"))
    assert config["data"] == "offline" and config["precision"] != "auto", "what was decided"


@pytest.mark.parametrize("task", EXPLANATION)
def test_evaluate_gets_the_same_numbers_or_says_which_differ(task, finished, tmp_path, capsys):
    metrics = metrics_of(finished[task])
    assert dld.main(["--evaluate", "--run", str(finished[task])]) == 0
    out = capsys.readouterr().out
    assert out.count("same") >= 13 and "DIFFERENT" not in out and "stand-in" in out
    assert f"{metrics['test_accuracy']:.6f}" in out
    if task == "mnist":
        run = shutil.copytree(finished[task], tmp_path / "run")
        dld.write_json(run / "metrics.json", {**metrics, "test_loss": 7.0})
        assert dld.main(["--evaluate", "--run", str(run)]) == 1
        assert capsys.readouterr().out.count("DIFFERENT") == 1


def test_predict_agrees_with_predictions_csv_and_needs_only_model_pt(finished, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished["cifar10"] / "model.pt", run)
    table = pd.read_csv(finished["cifar10"] / "predictions.csv")[:5]
    files = [str(tmp_path / f"{row}.png") for row in table["row"]]
    for row, file in zip(table["row"], files, strict=True):
        picture = dld.TASKS["cifar10"].offline().x[row]
        Image.fromarray(picture.transpose(1, 2, 0)).save(file)
    precision = metrics_of(finished["cifar10"])["precision"]
    assert dld.main(["--predict", *files, "--run", str(run), "--precision", precision]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    found = pd.DataFrame([line.split()[:2] for line in said[:5]], columns=["class", "share"])
    assert found["class"].tolist() == table["predicted"].tolist() and "offline shapes" in last
    shares = found["share"].str.rstrip("%").astype(float).tolist()
    assert shares == pytest.approx((100 * table["confidence"]).tolist(), abs=0.11)


def test_predict_reads_texts_from_the_command_line_and_from_a_file(finished, tmp_path, capsys):
    def predict(*inputs):
        assert dld.main(["--predict", *inputs, "--run", str(finished["sentiment"])]) == 0
        return capsys.readouterr().out.splitlines()

    out = [line for line in predict("The plot was good.", "", "ünknown 😀", "long " * 3000)
           if not line.startswith((" ", "WARNING"))]
    assert len(out) == 5 and all(re.match(r"(posi|nega)tive \d+\.\d%", line) for line in out[:4])
    file = tmp_path / "lines.txt"
    file.write_bytes("The plot was good.\n\nBad caf\xe9\r\n".encode("latin-1"))
    lines = [line for line in predict(str(file)) if not line.startswith((" ", "WARNING"))]
    assert len(lines) == 3 and lines[0] == out[0] and "café" in lines[1]
    assert predict("the zzgruntle plot was good")[1].endswith("unknown: zzgruntle")
    no_text = str(finished["sentiment"] / "reliability.png")
    assert dld.main(["--predict", no_text, "--run", str(finished["sentiment"])]) == 2
    assert f"{no_text}: not a text file" in capsys.readouterr().err


def test_any_texts_in_the_layout_of_imdb_train_and_predict(tmp_path, undrawn, capsys):
    texts = {"pos": [b"good", "nice :) 😀".encode(), b"caf\xe9 tr\xe8s bon", b"fine!"],
             "neg": [b"bad", b"", b"awful ?!", b"no"]}
    for place in ("train/pos", "train/neg", "test/pos", "test/neg"):
        folder = tmp_path / "data" / "aclImdb" / place
        folder.mkdir(parents=True)
        for i, text in enumerate(texts[place[-3:]] * 8):
            (folder / f"{i}.txt").write_bytes(text)
    assert dld.main(["--task", "sentiment", "--model", "transformer", "--data", "real", "--epochs",
                     "6", "--batch-size", "4", "--data-dir", str(tmp_path / "data"), "--device",
                     "cpu", "--precision", "fp32", "--report", "minimal",
                     "--output-dir", str(tmp_path)]) == 0
    run = tmp_path / "sentiment"
    metrics = metrics_of(run)
    assert metrics["dataset"] == "texts in aclImdb" and metrics["unlabelled_samples"] == 0
    assert metrics["test_accuracy"] == 1.0 and metrics["empty_samples"] == 16
    assert metrics["test_repeats"] == 64 and metrics["test_accuracy_without_repeats"] is None
    assert "says nothing about new ones" in " ".join(capsys.readouterr().out.split())
    assert dld.main(["--predict", "nice :) 😀", "awful ?!", "--run", str(run)]) == 0
    assert re.fullmatch(r"positive .*\n .*\nnegative .*\n.*\n?", capsys.readouterr().out)


def test_a_config_repeats_its_run_exactly_in_a_new_folder(finished, tmp_path, undrawn):
    run, again = finished["mnist"], tmp_path / "mnist-offline-digits-2"
    (tmp_path / "mnist-offline-digits").mkdir()  # a finished run is never overwritten
    assert dld.main(["--config", str(run / "config.json"), "--report", "minimal",
                     "--output-dir", str(tmp_path)]) == 0
    assert not [*(tmp_path / "mnist-offline-digits").iterdir()]
    one, two = (dld.load_file(folder / "model.pt")["weights"] for folder in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = metrics_of(run), metrics_of(again)
    assert not [key for key, value in two.items() if one[key] != value and not re.search(
        "second|latency|memory", key)]


def test_resume_continues_in_the_same_folder_where_no_other_process_trains(
        finished, tmp_path, undrawn, monkeypatch, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    over, forecast = [], dld.TimeBudget.forecast
    monkeypatch.setattr(dld.TimeBudget, "forecast", lambda budget, data, config, steps: (
        over.append(steps / data.epoch_steps(config)) or forecast(budget, data, config, steps)))
    config = json.loads((run / "config.json").read_text("utf-8"))
    dld.write_json(run / "config.json", {**config, "report": "minimal"})
    again = ["--resume", str(run), "--epochs", "3"]
    with dld.run_lock(run):
        assert dld.main(again) == 2
    said = capsys.readouterr().err
    assert f"{run} is being trained by another process" in said and said.count("\n") == 1
    assert dld.main(again) == 0 and over == [2], "what is over takes no time"
    metrics, history = metrics_of(run), pd.read_csv(run / "history.csv")
    assert metrics["epochs"] == 3 and metrics["status"] == "finished"
    assert history["epoch"].tolist() == [1, 2, 3] and history["seconds"].is_monotonic_increasing


def test_interrupted_runs_save_and_report_and_go_on(tmp_path, undrawn, monkeypatch, capsys):
    """Ctrl-C in the second epoch, and SIGTERM in the third: the step ends, all is saved."""
    run = tmp_path / "mnist-offline-digits"
    first = [*MNIST, "--epochs", "3", "--batch-size", "30", "--output-dir", str(tmp_path)]
    for sent, epoch, flags in ((signal.SIGINT, 1, first),
                               (signal.SIGTERM, 2, ["--resume", str(run)])):
        def interrupt(self, state, *others, real=dld.Checkpointer.after_step,
                      at=(epoch, 1), sent=sent):
            if (state.epoch, state.step) == at:
                os.kill(os.getpid(), sent)
            real(self, state, *others)

        with monkeypatch.context() as patch:
            patch.setattr(dld.Checkpointer, "after_step", interrupt)
            assert dld.main(flags) == 130
        where = f"interrupted in epoch {epoch + 1} of 3, after 1 step"
        said, metrics = capsys.readouterr().out, metrics_of(run)
        assert f"--resume {dld.quoted(run)}" in said and "Report of what there is" in said
        assert (metrics["status"], metrics["ended"]) == ("interrupted", where)
        assert metrics["best_epoch"] <= epoch and metrics["test_accuracy"] > 0
    assert "after 1 epoch and 1 step" in said
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == [1, 2]


def test_of_a_run_with_steps_that_was_interrupted_no_epochs_are_said_to_have_been_planned(
        tmp_path, undrawn, monkeypatch, capsys):
    monkeypatch.setattr(dld, "log_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
    assert dld.main([*MNIST, "--steps", "8", "--batch-size", "30",
                     "--output-dir", str(tmp_path)]) == 130
    assert "Stopped after 1 epoch and 1 step. Continue" in capsys.readouterr().out
    ended = metrics_of(tmp_path / "mnist-offline-digits")["ended"]
    assert ended == "interrupted after 5 of 8 steps"


@pytest.mark.parametrize(("where", "over"), [("print_start", "0 epochs and 1 step"),
                                             ("log_epoch", "1 epoch")])
def test_ctrl_c_before_the_first_step_and_after_the_last_is_not_lost(
        where, over, tmp_path, undrawn, monkeypatch, capsys):
    real = getattr(dld, where)
    monkeypatch.setattr(dld, where, lambda *given: (
        real(*given), signal.raise_signal(signal.SIGINT)))
    assert dld.main([*MNIST, "--epochs", "1", "--batch-size", "30",
                     "--output-dir", str(tmp_path)]) == 130
    run = tmp_path / "mnist-offline-digits"
    assert f"Stopped after {over}, of 1 epoch. Continue with" in capsys.readouterr().out
    assert metrics_of(run)["status"] == "interrupted"
    monkeypatch.undo()
    assert dld.main(["--resume", str(run)]) == 0


def test_an_interrupted_run_with_a_budget_goes_on_with_the_report_that_it_planned(
        tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(dld, "measure_speed", lambda data, config, *others, **more: (
        dld.SpeedEstimate(config, step=0.1, predict=1e-4, figure=0.1)))
    monkeypatch.setattr(dld, "log_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
    assert dld.main([*MNIST[:-2], "--epochs", "2", "--budget", "30m",
                     "--output-dir", str(tmp_path)]) == 130
    run = tmp_path / "mnist-offline-digits"
    config = json.loads((run / "config.json").read_text("utf-8"))
    assert config["report"] == "full" and "ended" in metrics_of(run)


def test_a_signal_that_a_library_turns_into_another_error_is_still_a_signal(
        tmp_path, monkeypatch, capsys):
    """Extension modules answer Ctrl-C while they are loaded with an ImportError."""
    def load(*given):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(dld, "write_figures", load)
    assert dld.main([*MNIST, "--epochs", "1", "--output-dir", str(tmp_path)]) == 130
    assert "ImportError" not in capsys.readouterr().err
    assert metrics_of(tmp_path / "mnist-offline-digits")["status"] == "interrupted"


def test_half_written_files_are_never_seen(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        dld.write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


SPEED = dld.SpeedEstimate(dld.Config(), step=0.05, predict=1e-4, figure=0.1)


def test_a_time_or_length_that_is_given_replaces_the_steps_of_a_repeated_run():
    saved = {"task": "mnist", "steps": "0:500", "epochs": 9}
    for given in ({"budget": "30s"}, {"epochs": 2}, {"dry_run": True}):
        assert dld.resolve_config(given, saved).steps == ""
    assert dld.resolve_config({"lr": 0.1}, saved).steps == "0:500"


def test_a_larger_budget_buys_a_higher_rung_and_flags_given_stay(digits, monkeypatch):
    monkeypatch.setattr(dld, "measure_speed", lambda data, config, *others, **more: (
        dataclasses.replace(SPEED, config=config)))

    def buy(budget, **more):
        given = {"task": "mnist", "data": "offline", "device": "cpu", "precision": "fp32",
                 "model": "fast", "limit": 300, **more}
        config = dld.resolve_config({**given, "budget": f"{budget}s"})
        clock = dld.TimeBudget(time.perf_counter(), budget)
        return dataclasses.replace(config, budget="", **dld.fit_to_budget(
            digits, config, dld.start_machine(config), given, clock))

    least, few, many = map(buy, (1, 20, 36_000))
    assert least.width <= few.width <= many.width == 64
    steps = [int(bought.steps) for bought in (least, few, many)]
    assert steps == sorted(steps) and steps[0] >= 1
    assert buy(36_000, width=8, batch_size=100).width == 8
    assert (least.report, many.report) == ("minimal", "full"), "a tenth is for what gives trust"


def test_a_machine_that_slows_down_gets_fewer_steps(digits):
    data = dld.build_dataset(digits, config := small("mnist", limit=100, report="minimal"))
    estimate = dataclasses.replace(SPEED, config=config, predict=0.0, figure=0.0)
    state = dld.new_train_state(dld.build_model(data.meta), config, dld.start_machine(config))
    state.plan, state.before, found = [(0, 10**6)], 1000, []
    for seconds in (25, 50, 100, 5_000):
        budget = dld.TimeBudget(time.perf_counter() - seconds, 1000, speed=estimate,
                                marks=[(0.0, 0.0, 0.0)])
        state.seconds = float(seconds)
        found.append(budget.affordable(data, config, state))
    assert found == pytest.approx([38_000, 19_000, 9_500, 200], rel=0.03, abs=40)
    assert found[3] <= 1000, "the time is over: no further step"


def test_the_report_is_shortened_where_training_ended_too_late(digits):
    data = dld.build_dataset(digits, config := small("mnist", limit=100, report="full"))
    estimate = dataclasses.replace(SPEED, config=config)
    evaluation = estimate.evaluation(data, config)
    reserve = dld.TimeBudget(0.0, 100).reserve  # which is there to be used now
    needs = [estimate.closing(data, dataclasses.replace(config, report=level)) - evaluation
             - reserve for level in ("full", "short", "minimal")]
    assert needs == sorted(needs, reverse=True)
    for left, level in ((60, "full"), (needs[0] - 0.1, "short"), (needs[1] - 0.1, "minimal"),
                        (-5, "minimal")):
        budget = dld.TimeBudget(time.perf_counter() - 100 + left + evaluation, 100, speed=estimate,
                                laps={"evaluation": evaluation},
                                levels=("full", "short", "minimal"))
        assert budget.report_level(data, config) == level
        budget.levels = ()
        assert budget.report_level(data, config) == "full", "a flag has chosen"


def test_of_small_data_what_is_no_prediction_does_not_count_as_a_slow_machine(digits):
    config = small("mnist", limit=60)
    data = dld.build_dataset(digits, config)
    estimate = dld.SpeedEstimate(config, step=0.01, predict=1e-4, figure=0.1)
    budget = dld.TimeBudget(time.perf_counter() - 10, 20, speed=estimate,
                            laps={"evaluation": 0.5},  # of which the predictions are 0.02
                            levels=("full", "short", "minimal"))
    assert budget.report_level(data, config) == "full"


def test_fewer_threads_are_taken_only_where_they_are_faster():
    several, seconds = torch.get_num_threads(), iter((0.0, 0.02, 0.02, 0.0))
    try:
        torch.set_num_threads(2)
        dld.choose_threads(lambda: time.sleep(next(seconds)))
        assert torch.get_num_threads() == 2
        assert dld.choose_threads(lambda: time.sleep(next(seconds))) < 0.02
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(several)


def test_what_a_budget_decided_is_repeated_without_a_clock(digits):
    """More or less time on the way: the rate ends at nothing, and the same bits come again."""
    config = small("mnist", limit=100, width=16, batch_size=20, schedule="linear")
    data, machine = dld.build_dataset(digits, config), dld.start_machine(config)
    wanted = iter([40, 40, 22, 30, 12, 13, *[13] * 99])

    def fit(config, affordable=None):
        state, _ = dld.start_training(data, config, machine)
        rates = []
        dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer(),
                                   lambda state: rates.append(state.history[-1]["learning_rate"]),
                                   affordable))
        return state, rates

    first, rates = fit(dataclasses.replace(config, steps="40"), lambda state: next(wanted))
    assert len(first.plan) > 2 and first.plan[-1][1] == first.steps == 13 and first.done == 1
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * config.lr
    plan = ",".join(f"{start}:{total}" for start, total in first.plan)
    again, _ = fit(dataclasses.replace(config, steps=plan))
    assert all(torch.equal(a, b) for a, b in zip(
        first.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    assert [row["val_loss"] for row in again.history][-1] == first.history[-1]["val_loss"]
    assert not math.isnan(first.history[-1]["val_loss"]), "the end is always measured"


@pytest.mark.parametrize(("epochs", "left"), [(30, 1.5), (7, 1)])
def test_a_stalled_run_goes_through_the_rest_of_its_schedule(digits, epochs, left):
    config = small("mnist", limit=100, width=16, batch_size=20, epochs=epochs, schedule="linear")
    config = dataclasses.replace(config, patience=5, lr=1e-9)  # nothing becomes better
    data, machine = dld.build_dataset(digits, config), dld.start_machine(config)
    state, _ = dld.start_training(data, config, machine)
    for p in state.model.parameters():
        p.register_hook(torch.zeros_like)  # not by rounding either
    for module in state.model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.0  # nor do means and deviations
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer()))
    stalled, total = state.plan[-1]
    epoch = data.epoch_steps(config)
    assert stalled == 6 * epoch, "the first epoch is the best"
    assert state.steps == total == stalled + math.ceil(left * epoch) and state.done == 1
    assert total <= epochs * epoch, "no more than was asked for"
    assert state.history[-1]["learning_rate"] < 0.5 * config.lr


def test_what_no_flag_limits_takes_twenty_minutes_at_most(digits, monkeypatch):
    monkeypatch.setattr(dld, "measure_speed", lambda data, config, *others, **more: (
        dld.SpeedEstimate(config, step=20 * (config.width / 512) ** 1.75, predict=1e-4)))
    monkeypatch.setattr(dld, "load_raw", lambda config, log: digits)

    def prepare(**given):
        budget = dld.TimeBudget(time.perf_counter())
        given = {"task": "mnist", "data": "offline", "device": "cpu", "precision": "fp32", **given}
        config, *_, data = dld.prepare(given, {}, dld.Log(quiet=True), dld.DistributedContext(),
                                       budget)
        return budget.seconds, budget.forecast(data, config, 0)

    seconds, said = prepare()
    assert seconds == 1200 and "about 20 min here: this budget buys --width 512" in said
    assert re.search(r"; --epochs 60 trains the whole recipe, in about \d", said)
    assert prepare(epochs=60)[0] == prepare(width=512)[0] == 0
    assert [*map(dld.roughly, (1.0, 1.46, 9.96, 120.4))] == ["1", "1.5", "10", "120"]


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
    def missing(config):
        raise dld.DataMissing("stripes are only made here")

    task = dld.Task("image", missing, None, {"model": "classic", "epochs": 3})
    monkeypatch.setitem(dld.TASKS, "stripes", task)
    flags = ["--task", "stripes", "--output-dir", str(tmp_path), "--batch-size", "20",
             "--precision", "fp32", "--device", "cpu", "--report", "minimal"]
    assert dld.main(flags) == 3 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setitem(dld.TASKS, "stripes", dataclasses.replace(task, offline=make_stripes))
    assert dld.main(flags) == 0
    run = tmp_path / "stripes-offline-stripes"
    assert metrics_of(run)["test_accuracy"] > 0.9
    assert artefacts(run) == EVERY_RUN | {"gradcam.png"}
    Image.fromarray(make_stripes().x[0, 0]).save(tmp_path / "one.png")
    capsys.readouterr()
    assert dld.main(["--predict", str(tmp_path / "one.png"), "--run", str(run)]) == 0
    assert re.match(r"(down|across) ", capsys.readouterr().out)


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
    assert "stand-in" in " ".join(capsys.readouterr().out.splitlines()[-2:])


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
