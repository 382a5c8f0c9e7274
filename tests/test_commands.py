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
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of, program, small
from PIL import Image

EVERY_RUN = {"training_curves.png", "confusion_matrix.png", "confusion_matrix_norm.png", "sample_predictions.png",
             "reliability.png", "report.html", "classification_report.txt", "classes.csv", "faults.csv", "metrics.json",
             "history.csv", "predictions.csv", "config.json", "log.txt", "model.pt", "checkpoint.pt"}
EXPLANATION = {"cifar10": {"gradcam.png"}, "mnist": {"saliency.png"},
               "sentiment": {"attention.png", "attention.html", "evidence.png", "evidence.html"}}
IF_THERE_ARE_ANY = {"mistakes.png", "suspects.png", "near_repeats.png"}


def artefacts(run):
    """All that every run like this one must have."""
    return {path.name for path in run.iterdir()} - IF_THERE_ARE_ANY


# -- the whole program, in a process of its own -----------------------------------------------------------------------


def test_all_tasks_and_their_comparison_from_one_command(tmp_path):
    shutil.copy(SCRIPT, tmp_path)  # alone in an empty folder, as downloaded
    done = subprocess.run([sys.executable, SCRIPT.name, "--task", "all", "--data", "offline", "--dry-run"],
                          cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings, and no progress bar where nobody watches"
    runs = {metrics_of(run)["task"]: run for run in (tmp_path / "outputs").iterdir() if run.is_dir()}
    assert set(runs) == set(EXPLANATION)
    for task, run in runs.items():
        assert artefacts(run) == EVERY_RUN | EXPLANATION[task] | {"deletion.png"}
        for picture in run.glob("*.png"):
            with Image.open(picture) as image:
                assert np.asarray(image.convert("L")).std() > 5, f"{picture} is blank"
        metrics = metrics_of(run)
        assert metrics["status"] == "finished" and metrics["stand_in"] and "offline" in run.name
        assert "stand-in" in metrics["dataset"]
        assert f"{metrics['test_accuracy']:.2%}" in (run / "log.txt").read_text("utf-8")
        report = (run / "classification_report.txt").read_text("utf-8")
        assert "macro avg" in report and "stand-in" in report
    table = list(csv.DictReader((tmp_path / "outputs" / "comparison.csv").open(encoding="utf-8")))
    assert [row["label"].split()[0] for row in table] == list(EXPLANATION)
    assert all(int(row["multiply_adds"]) > 0 for row in table)
    report = (tmp_path / "outputs" / "comparison.md").read_text("utf-8")
    assert "One picture costs cifar10 fast" in report and "stand-in" in done.stdout.splitlines()[-1]
    assert (tmp_path / "outputs" / "comparison.png").stat().st_size > 10_000


def test_no_network_ends_in_the_stand_in_or_in_exit_3(tmp_path, monkeypatch, capsys):
    code = ("import sys, deep_learning_deliverable as dld, dataclasses\n"
            "dld.MNIST = tuple(dataclasses.replace(a, mirrors=('http://127.0.0.1:9/x',)) for a in dld.MNIST)\n"
            "sys.exit(dld.main(sys.argv[1:]))")

    def run(*flags):
        return subprocess.run([sys.executable, "-c", code, "--task", "mnist", "--limit", "50", "--epochs", "1",
                               "--report", "minimal", *flags],
                              cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)

    real = run("--data", "real")
    assert real.returncode == 3 and real.stderr.count("\n") == 1
    assert "train-images-idx3-ubyte.gz" in real.stderr and "by hand" in real.stderr
    assert not (tmp_path / "outputs").exists()
    for archive in dld.MNIST:
        monkeypatch.setitem(archive.__dict__, "mirrors", ("http://127.0.0.1:9/x",))
    monkeypatch.chdir(tmp_path)
    assert dld.main(["--task", "mnist", "--limit", "50", "--epochs", "1", "--report", "minimal"]) == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "stand-in" in said.splitlines()[-1]
    metrics = metrics_of(tmp_path / "outputs" / "mnist-offline-digits")
    assert not {"near_repeats", "yardstick", "saliency_over_random"} & metrics.keys(), "what was not sought is not said"
    page = (tmp_path / "outputs" / "mnist-offline-digits" / "report.html").read_text("utf-8")
    assert "Near repeats" not in page and "not put to the test" in page


def test_importing_has_no_side_effects(tmp_path):
    code = ("import sys, random, torch; before = torch.get_rng_state(); import deep_learning_deliverable\n"
            "assert torch.equal(before, torch.get_rng_state())\n"
            "heavy = {'matplotlib', 'seaborn', 'sklearn', 'torchvision'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert list(tmp_path.iterdir()) == []


# -- one process, finished runs ---------------------------------------------------------------------------------------


def test_metrics_hold_what_was_promised(finished):
    for run in finished.values():
        metrics = metrics_of(run)
        promised = {"task", "model", "dataset", "seed", "device", "precision", "parameters", "epochs", "best_epoch",
                    "train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_low", "test_accuracy_high",
                    "test_macro_f1", "test_loss", "seconds_training", "seconds_total", "peak_memory_mb", "status",
                    "train_samples", "val_rows_sha256", "multiply_adds", "latency_ms", "samples_per_second", "model_mb"}
        assert promised <= metrics.keys()
        assert [key for key, value in metrics.items() if value is None and key != "peak_memory_mb"] == []
        assert all(not isinstance(value, dict | list) for value in metrics.values()), "flat"
        head, *rows = csv.reader((run / "history.csv").open(encoding="utf-8"))
        assert tuple(head) == dld.HISTORY and len(rows) == metrics["epochs"]
        best = max(rows, key=lambda row: (float(row[5]), -float(row[4])))
        assert int(best[0]) == metrics["best_epoch"] and float(best[5]) == metrics["val_accuracy"]
        lines = list(csv.DictReader((run / "predictions.csv").open(encoding="utf-8")))
        right = sum(line["true"] == line["predicted"] for line in lines)
        assert right / len(lines) == pytest.approx(metrics["test_accuracy"])
        assert right == sum(int(line["correct"]) for line in lines)
        for line in lines[:20]:
            shares = {key[2:]: float(value) for key, value in line.items() if key.startswith("p_")}
            assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
            assert max(shares, key=shares.get) == line["predicted"]


def test_evaluate_gets_the_same_numbers(finished, capsys):
    for run in finished.values():
        assert dld.main(["--evaluate", "--run", str(run)]) == 0
        out = capsys.readouterr().out
        assert out.count("same") >= 13 and "stand-in" in out and f"{metrics_of(run)['test_accuracy']:.6f}" in out


def test_evaluate_says_when_the_numbers_differ(finished, tmp_path, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    metrics = metrics_of(run)
    dld.write_json(run / "metrics.json", {**metrics, "test_loss": 7.0})
    assert dld.main(["--evaluate", "--run", str(run)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_predict_agrees_with_predictions_csv_and_needs_only_model_pt(finished, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(finished["cifar10"] / "model.pt", tmp_path / "run")
    raw = dld.make_shapes()
    lines = list(csv.DictReader((finished["cifar10"] / "predictions.csv").open(encoding="utf-8")))[:5]
    for line in lines:
        Image.fromarray(raw.x[int(line["row"])].transpose(1, 2, 0)).save(tmp_path / f"{line['row']}.png")
    files = [str(tmp_path / f"{line['row']}.png") for line in lines]
    precision = metrics_of(finished["cifar10"])["precision"]
    assert dld.main(["--predict", *files, "--run", str(tmp_path / "run"), "--precision", precision]) == 0
    out = capsys.readouterr().out.splitlines()
    for line, said in zip(lines, out, strict=False):
        name, share = said.split()[:2]
        assert name == line["predicted"] and float(share.strip("%")) == pytest.approx(
            100 * float(line["confidence"]), abs=0.11)
    assert "offline shapes" in out[-1]


def test_predict_texts_from_the_command_line_and_from_a_file(finished, tmp_path, capsys):
    run = str(finished["sentiment"])
    assert dld.main(["--predict", "The plot was good.", "", "ünknown 😀", "long " * 3000, "--run", run]) == 0
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(out) == 5 and all(re.match(r"(positive|negative) \d+\.\d%", line) for line in out[:4])
    (tmp_path / "lines.txt").write_bytes("The plot was good.\n\nBad caf\xe9\r\n".encode("latin-1"))
    assert dld.main(["--predict", str(tmp_path / "lines.txt"), "--run", run]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(lines) == 3 and lines[0] == out[0] and "café" in lines[1]
    assert dld.main(["--predict", "the zzgruntle plot was good, gnarfy", "--run", run]) == 0
    hint = capsys.readouterr().out.splitlines()[1]
    assert hint.endswith("unknown: zzgruntle, gnarfy") and len(re.findall(r"\w+ \d+%", hint)) <= 4


def test_any_texts_in_the_layout_of_imdb_train_and_predict(tmp_path, capsys):
    texts = {"pos": ["good", "nice :) 😀", "caf\xe9 tr\xe8s bon", "fine!"], "neg": ["bad", "", "awful ?!", "no"]}
    for part in ("train", "test"):
        for sense, some in texts.items():
            (tmp_path / "data" / "aclImdb" / part / sense).mkdir(parents=True)
            for i, text in enumerate(some * 8):
                encoded = text.encode("utf-8" if "😀" in text else "latin-1")
                (tmp_path / "data" / "aclImdb" / part / sense / f"{i}.txt").write_bytes(encoded)
    flags = ["--task", "sentiment", "--data", "real", "--data-dir", str(tmp_path / "data"), "--epochs", "8",
             "--batch-size", "4"]
    for model in ("lstm", "transformer"):
        assert dld.main([*flags, "--model", model, "--output-dir", str(tmp_path / model)]) == 0
        run = tmp_path / model / "sentiment"
        metrics = metrics_of(run)
        assert metrics["dataset"] == "texts in aclImdb" and metrics["unlabelled_samples"] == 0
        assert metrics["test_accuracy"] == 1.0 and metrics["yardstick_accuracy"] > 0.8
        assert metrics["test_repeats"] == 64 and metrics["test_accuracy_without_repeats"] is None
        assert artefacts(run) == EVERY_RUN | EXPLANATION["sentiment"] | {"deletion.png"}
        assert "says nothing about new ones" in capsys.readouterr().out
        assert dld.main(["--predict", "nice :) 😀", "awful ?!", "--run", str(run)]) == 0
        assert re.fullmatch(r"positive .*\n .*\nnegative .*\n.*\n?", capsys.readouterr().out)


def test_a_config_repeats_its_run_exactly_in_a_new_folder(finished, capsys):
    run = finished["mnist"]
    before = (run / "model.pt").read_bytes()
    assert dld.main(["--config", str(run / "config.json")]) == 0
    again = run.with_name(run.name + "-2")
    assert (run / "model.pt").read_bytes() == before, "a finished run is never overwritten"
    one, two = (dld.load_file(folder / "model.pt")["weights"] for folder in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    timed = {"seconds_setup", "seconds_report", "seconds_training", "seconds_total", "seconds_data", "latency_ms",
             "samples_per_second",
             "peak_memory_mb"}
    one, two = ({k: v for k, v in metrics_of(folder).items() if k not in timed} for folder in (run, again))
    assert one == two


def test_resume_continues_in_the_same_folder(finished, tmp_path, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    assert dld.main(["--resume", str(run)]) == 2
    assert "has finished its 2 epochs; give more --epochs" in capsys.readouterr().err
    assert dld.main(["--resume", str(run), "--lr", "1"]) == 2
    assert "--lr would change the past" in capsys.readouterr().err
    config = json.loads((run / "config.json").read_text("utf-8"))
    dld.write_json(run / "config.json", {**config, "report": "minimal"})  # which seeks no near repeats
    (run / "near_repeats.png").write_bytes(b"of an earlier report")
    assert dld.main(["--resume", str(run), "--epochs", "3"]) == 0
    metrics = metrics_of(run)
    assert not (run / "near_repeats.png").exists(), "nothing of an earlier report is left"
    assert metrics["epochs"] == 3 and metrics["status"] == "finished"
    assert metrics["seconds_total"] > metrics["seconds_training"] + metrics["seconds_setup"] - 0.1
    assert len((run / "history.csv").read_text("utf-8").splitlines()) == 4


def test_resume_after_patience_ended_a_run_asks_for_more_patience(finished, tmp_path, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    checkpoint = dld.load_file(run / "checkpoint.pt", dld.STATE_FORMAT)
    torch.save({**checkpoint, "best": {**checkpoint["best"], "epoch": 1}}, run / "checkpoint.pt")
    assert dld.main(["--resume", str(run), "--epochs", "9", "--patience", "1"]) == 2
    assert "ended for want of patience; give --patience 0" in capsys.readouterr().err


def test_an_interrupted_run_saves_reports_and_can_go_on(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second epoch: the step ends, everything is saved, what there is is reported."""
    def interrupt(self, state, *others, real=dld.Keeper.after_step):
        if self.path and (state.epoch, state.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
            assert self.brake.asked
        real(self, state, *others)

    flags = ["--task", "mnist", "--data", "offline", "--limit", "100", "--epochs", "3", "--device", "cpu",
             "--batch-size", "30", "--report", "minimal", "--output-dir", str(tmp_path)]
    ours = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(dld.Keeper, "after_step", interrupt)
        assert dld.main(flags) == 130
    assert signal.getsignal(signal.SIGINT) is ours
    run = tmp_path / "mnist-offline-digits"
    shown, metrics = capsys.readouterr(), metrics_of(run)
    assert f"--resume {dld.quoted(run)}" in shown.out and "Report of what there is" in shown.out
    assert metrics["status"] == "interrupted" and metrics["ended"] == "interrupted in epoch 2 of 3, after 1 step"
    assert metrics["best_epoch"] == 1 and metrics["test_accuracy"] > 0
    assert "This training was interrupted in epoch 2 of 3, after 1 step" in (run / "report.html").read_text("utf-8")
    assert dld.main(["--resume", str(run)]) == 0
    assert "after 1 epoch and 1 step" in capsys.readouterr().out and "ended" not in metrics_of(run)


def test_a_folder_in_which_another_process_trains_is_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    with dld.locked(run / ".lock", print):
        assert dld.main(["--resume", str(run), "--epochs", "9"]) == 2
    said = capsys.readouterr().err
    assert f"{run} is being trained by process {os.getpid()} on " in said and said.count("\n") == 1
    assert not (run / ".lock").exists() and metrics_of(run)["status"] == "finished"


def test_a_signal_that_a_library_turns_into_another_error_is_still_a_signal(tmp_path, monkeypatch, capsys):
    """Extension modules answer Ctrl-C while they are loaded with an ImportError."""
    def load(*given):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(dld, "write_figures", load)
    flags = ["--task", "mnist", "--data", "offline", "--limit", "100", "--epochs", "1", "--report", "minimal"]
    assert dld.main([*flags, "--output-dir", str(tmp_path)]) == 130
    assert "ImportError" not in capsys.readouterr().err
    assert metrics_of(tmp_path / "mnist-offline-digits")["status"] == "interrupted"


def test_a_new_task_is_one_entry(tmp_path, monkeypatch, capsys):
    """Stripes across or down: registered here, trained, reported and predicted by the same program."""
    def make_stripes():
        rng = np.random.default_rng(0)
        y = rng.permutation(np.arange(300) % 2)
        x = rng.integers(0, 90, (300, 1, 16, 16), dtype=np.uint8)
        for i, label in enumerate(y):
            x[i, 0][(slice(None, None, 4),) if label else (slice(None), slice(None, None, 4))] += 150
        return dld.Raw("stripes", ["down", "across"], x, y, 200, "offline-stripes")

    def missing(folder, download):
        raise dld.DataMissing("stripes are only made here")

    monkeypatch.setitem(dld.TASKS, "bare", dld.Task("image", missing, None, {"model": "classic"}))
    assert [dld.main(["--task", "bare", "--data", data]) for data in ("auto", "real", "offline")] == [3, 3, 2]
    monkeypatch.setitem(dld.TASKS, "stripes", dld.Task("image", missing, make_stripes, {"model": "classic",
                                                                                        "epochs": 4}))
    assert dld.main(["--task", "stripes", "--output-dir", str(tmp_path), "--batch-size", "20"]) == 0
    run = tmp_path / "stripes-offline-stripes"
    assert metrics_of(run)["test_accuracy"] > 0.9
    assert artefacts(run) == EVERY_RUN | {"gradcam.png", "deletion.png"}
    Image.fromarray(make_stripes().x[0, 0]).save(tmp_path / "one.png")
    capsys.readouterr()
    assert dld.main(["--predict", str(tmp_path / "one.png"), "--run", str(run)]) == 0
    assert re.match(r"(down|across) ", capsys.readouterr().out)


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_larger_budget_buys_a_higher_rung_and_flags_given_stay(digits, monkeypatch):
    pace = dld.Pace(dld.settle({}, {"task": "mnist", "model": "fast", "width": 16}), train=1e-3, predict=1e-4)
    monkeypatch.setattr(dld, "measure_pace", lambda data, config, runtime: dataclasses.replace(pace, config=config))
    monkeypatch.setattr(dld, "measure_drawing", lambda: 0.1)  # no machine's own speed decides
    given = {"task": "mnist", "model": "fast", "data": "offline", "limit": 300, "device": "cpu", "precision": "fp32"}
    runtime = dld.start_runtime(dld.Config(device="cpu", precision="fp32"))

    def buy(budget, **more):
        config = dld.settle({}, {**given, **more, "budget": budget})
        return dld.make_the_most(digits, config, runtime, {**given, **more}, dld.Clock(time.perf_counter(), budget))

    little, much = buy("12s"), buy("10h")
    rungs = [(rung["width"], rung["epochs"]) for rung in dld.LADDERS["fast"]]
    assert rungs.index((little.width, little.epochs)) < rungs.index((much.width, much.epochs)) == len(rungs) - 1
    assert buy("10h", width=8, batch_size=100).width == 8
    assert (little.report, much.report) == ("minimal", "full"), "a quarter of the budget is for believing"


def test_a_budget_for_texts_counts_what_their_preparation_takes(reviews):
    raw = dataclasses.replace(reviews, x=[*reviews.x, *reviews.x[:600]], packed=None)
    given = {"task": "sentiment", "data": "offline", "device": "cpu", "precision": "fp32", "max_tokens": 20}
    runtime = dld.start_runtime(dld.Config(device="cpu", precision="fp32"))

    def buy(**more):
        config = dld.settle({}, {**given, **more, "budget": "10h"})
        return dld.make_the_most(raw, config, runtime, {**given, **more}, dld.Clock(time.perf_counter(), "10h"))

    assert (buy().epochs, buy().unlabelled) == (3, 1.0) and buy(unlabelled=0.5).unlabelled == 0.5
    data = dld.build_data(raw, config := small("sentiment", epochs=3, max_tokens=20))
    pace = dld.Pace(config, train=0.01, predict=0.001)
    more, less = (pace.seconds(data, dataclasses.replace(config, unlabelled=n), started=False) for n in (1.0, 0.0))
    before, after = dld.text_seconds(data, 600)
    believing = pace.believing(data, config)
    assert before > 0 < after < believing
    rest = 0.01 * (len(data.parts["train"]) + 600) + 0.001 * (3 * len(data.parts["val"]) + 800 - 60) + 10 * pace.figure
    assert more == pytest.approx(before + rest + believing, abs=0.01) and less > rest, "three passes over the labelled"


def test_a_run_within_a_budget_records_what_it_chose(tmp_path, capsys):
    flags = ["--task", "mnist", "--data", "offline", "--limit", "200", "--budget", "60s", "--epochs", "3",
             "--output-dir", str(tmp_path)]
    assert dld.main(flags) == 0
    run = tmp_path / "mnist-offline-digits"
    config, metrics = (json.loads((run / f"{name}.json").read_text("utf-8")) for name in ("config", "metrics"))
    assert config["budget"] == "" and config["epochs"] == metrics["epochs"] and metrics["seconds_budget"] == 60
    width, epochs = re.search(r"--budget 60s buys --width (\d+) --epochs (\d+)", capsys.readouterr().out).groups()
    assert int(width) == config["width"] and int(epochs) >= config["epochs"], "fewer only if the machine slowed down"


def test_all_tasks_share_a_budget(finished, monkeypatch):
    shares = []

    def quick(given, log):
        shares.append(dld.read_time(given["budget"]))
        return finished[given["task"]]

    monkeypatch.setattr(dld, "train_run", quick)
    assert dld.main(["--task", "all", "--budget", "10m"]) == 0
    left = 10 * 60 - dld.IMPORTING - 5  # seconds for the comparison
    assert shares == pytest.approx([left / 3, left / 2, left], abs=3), "here no task uses its share"


def test_a_machine_that_slows_down_gets_fewer_epochs(digits):
    data = dld.build_data(digits, config := small("mnist", limit=100, epochs=10, report="minimal"))
    pace = dld.Pace(config, train=0.01, predict=0.0, figure=0.1)  # a second an epoch, a second to draw
    clock = dld.Clock(time.perf_counter() - 4, "12s", pace)

    def affordable(seconds):
        state = types.SimpleNamespace(epoch=2, seconds=seconds)
        return clock.affordable(data, config, state)

    assert [affordable(2), affordable(4), affordable(200)] == [9, 5, 2]
    assert dld.Clock(time.perf_counter(), "", pace).affordable(data, config, None) == 10


# -- when things go wrong: see also test_bad_input --------------------------------------------------------------------


def test_debug_shows_the_traceback(tmp_path):
    loud = program("--config", "nowhere.json", "--debug", cwd=tmp_path)
    assert loud.returncode == 1 and "Traceback" in loud.stderr and "UsageError" in loud.stderr


def test_half_written_files_are_never_seen(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        dld.write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


# -- what is written down must be true --------------------------------------------------------------------------------


def test_requirements_and_the_scripts_own_metadata_agree():
    block = re.search(r"# dependencies = \[\n(.*?)# \]", SCRIPT.read_text("utf-8"), re.S)[1]
    inline = re.findall(r'"(.+?)"', block)
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert inline == [line for line in lines if not line.endswith("  # for the tests only")]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in inline), "lower bounds only"


def test_the_readme_lists_every_flag_with_its_help():
    readme = (ROOT / "README.md").read_text("utf-8").split("## Every flag")[1]
    listed = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \| (.+?) \|$", readme, re.M))
    known = {action.option_strings[0]: action.help.replace("%%", "%") for action in dld.build_parser()._actions
             if action.option_strings[0] not in ("-h", "--version")}
    assert listed == known


def test_the_readme_has_the_defaults_of_each_task():
    readme = (ROOT / "README.md").read_text("utf-8")
    keys = ("model", "width", "epochs", "batch_size", "optimizer", "lr", "schedule", "dropout", "label_smoothing",
            "clip", "views")
    assert f"| task | {' | '.join(f'`{dld.flag_name(key)}`' for key in keys)} |" in readme
    for given in ({"task": "cifar10"}, {"task": "mnist"}, {"task": "sentiment"},
                  {"task": "cifar10", "model": "classic"}):
        real, offline = (dld.settle({}, given, stand_in) for stand_in in (False, True))
        cells = [str(getattr(real, key)) + (f" ({getattr(offline, key)})" if getattr(real, key) != getattr(offline, key)
                                             else "") for key in keys]
        assert f"| {given['task']} | {' | '.join(cells)} |" in readme


def test_the_readme_names_every_artefact_and_metric(finished):
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in EVERY_RUN | set().union(*EXPLANATION.values()) | {"comparison.png", "comparison.md",
                 "comparison.csv", "comparison.html", "comparison_curves.png", "folds.png", "folds.pt", "deletion.png",
                 *IF_THERE_ARE_ANY}:
        assert f"`{name}`" in readme, name
    for run in finished.values():
        for key in metrics_of(run):
            assert f"`{key}`" in readme, key
    for key in ("folds", "folds_accuracy", "folds_spread"):
        assert f"`{key}`" in readme, key


def test_every_setting_has_a_home(finished):
    config = json.loads((finished["cifar10"] / "config.json").read_text("utf-8"))
    assert list(config) == [field.name for field in dataclasses.fields(dld.Config)]
    assert config["data"] == "offline" and config["precision"] != "auto", "what was decided is written down"
