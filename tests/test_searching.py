"""Searching for settings: what is tried, what is never looked at, several processes, what goes wrong."""
import dataclasses
import json
import sqlite3
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest
from conftest import SCRIPT, dld, metrics_of
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")
QUICK = ["--task", "mnist", "--data", "offline", "--device", "cpu", "--limit", "150", "--epochs", "2", "--width", "64"]
ONE_LEFT = ["--lr", "0.002", "--dropout", "0.1", "--label-smoothing", "0", "--batch-size", "64",
            "--weight-decay", "0.01"]  # all but --schedule, of which there are three


def table(folder):
    return dld.read_csv(folder / "trials.csv")


def poisoned():
    """Digits whose test part has labels that no code could use."""
    raw = dld.make_digits()
    raw.y = raw.y.copy()
    raw.y[raw.n_train:] = -10**6
    return raw


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search over poisoned data, and every row that it cut into batches."""
    place, read, batch = tmp_path_factory.mktemp("searched"), set(), dld.Images.batch

    def watched(self, rows, *others):
        read.update(rows.tolist())
        return batch(self, rows, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dld.TASKS, "mnist", dataclasses.replace(dld.TASKS["mnist"], offline=poisoned))
        patch.setattr(dld.Images, "batch", watched)
        assert dld.main([*QUICK, "--search", "6", "--output-dir", str(place)]) == 0
    return place / "search-mnist-offline-digits", read


def test_the_first_trial_is_the_default_and_the_best_is_no_worse(searched):
    folder, _ = searched
    rows = table(folder)
    assert [int(row["number"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["default"] for row in rows] == list("100000") and rows[0]["state"] == "complete"
    plain = dld.settle({}, {"task": "mnist", "limit": 150, "epochs": 2, "width": 64}, stand_in=True)
    assert {name: rows[0][name] for name in dld.SPACES["mlp"]} == {
        name: str(getattr(plain, name)) for name in dld.SPACES["mlp"]}
    assert len({tuple(row[name] for name in dld.SPACES["mlp"]) for row in rows}) == 6
    finished = [row for row in rows if row["state"] == "complete"]
    best = max(finished, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    chosen = json.loads((folder / "best.json").read_text("utf-8"))
    assert {name: str(chosen[name]) for name in dld.SPACES["mlp"]} == {name: best[name] for name in dld.SPACES["mlp"]}
    assert float(best["val_accuracy"]) >= float(rows[0]["val_accuracy"])
    said = (folder / "log.txt").read_text("utf-8")
    assert f"Best    trial {best['number']}, the best of 6" in said and "trial   6" in said
    assert f"--config {folder / 'best.json'}" in said
    assert "McNemar" in said or "this is the default itself" in said
    with Image.open(folder / "search.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_test_part_is_never_read(searched):
    assert max(searched[1]) < dld.make_digits().n_train


def test_the_best_settings_train_the_final_run(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(dld, "write_figures", lambda *given: None)  # others test them, and they take long
    monkeypatch.setattr(dld, "write_report", lambda *given: None)
    best = searched[0] / "best.json"
    assert dld.main(["--config", str(best), "--report", "minimal", "--output-dir", str(tmp_path)]) == 0
    metrics = metrics_of(tmp_path / "mnist-offline-digits")
    reached = max(float(row["val_accuracy"]) for row in table(searched[0]) if row["state"] == "complete")
    assert metrics["val_accuracy"] == pytest.approx(reached), "the same training as in the search"


def test_two_processes_share_a_study_and_repeat_nothing(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    flags = [*QUICK, *ONE_LEFT, "--search", "9", "--storage", url, "--output-dir", str(tmp_path)]
    other = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, encoding="utf-8")
    while other.poll() is None and not (tmp_path / "study.db").exists():
        time.sleep(0.02)
    assert dld.main(flags) == 0, "while the other makes its tables, and searches"
    out, errors = other.communicate(timeout=180)
    assert (other.returncode, errors) == (0, "")
    trained = [line for line in (out + capsys.readouterr().out).splitlines() if line.startswith("trial ")]
    assert len(trained) == 3 and sum("the default" in line for line in trained) == 1
    for folder in (tmp_path / "search-mnist-offline-digits", tmp_path / "search-mnist-offline-digits-2"):
        assert sorted(row["schedule"] for row in table(folder)) == ["cosine", "linear", "onecycle"]
    assert dld.main(flags) == 0, "and once more, when there is nothing left"
    said = capsys.readouterr().out
    assert "Before  3 trials in the database" in said and "\ntrial " not in said


def prepared(tmp_path, wanted, storage=None, **settings):
    """A search that has not begun."""
    given = {"task": "mnist", "data": "offline", "device": "cpu", "limit": 150, "epochs": 2, "width": 64, **settings}
    config, runtime, raw = dld.load_all(given, {}, dld.Log(), dld.World())
    parts = dld.split_rows(raw, config)
    space = dld.search_space(config, given)
    study = dld.create_study(storage, config, space, raw)
    return dld.Search(config, space, wanted, runtime, raw, parts, study, dld.Clock(time.perf_counter(), ""),
                      dld.Brake(), tmp_path, dld.Log(), bool(storage))


def test_a_trial_too_many_is_dropped(tmp_path):
    searching = prepared(tmp_path, 2)
    elsewhere = [searching.study.ask() for _ in range(2)]
    for trial in elsewhere:
        trial.suggest_categorical("schedule", searching.space["schedule"])
    with pytest.raises(dld.Dropped):
        searching.choose(searching.study.ask())
    searching.study.tell(elsewhere[0], state=optuna.trial.TrialState.FAIL)
    assert isinstance(searching.choose(searching.study.ask()), dld.Config)


def test_what_a_killed_process_left_behind_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(dld, "BEAT", 1)
    monkeypatch.setattr(dld, "DEAD", 1)
    with dld.using_optuna(None):
        searching = prepared(tmp_path, 2, dld.open_storage(f"sqlite:///{tmp_path / 'study.db'}"), epochs=1)
        searching.ensure_default()
        dead = searching.study.ask()
        searching.study._storage.record_heartbeat(dead._trial_id)
        searching.choose(dead)
        assert sum(map(dld.counts, searching.study.get_trials())) == 1
        searching.go()
    searching.look()
    assert sorted(trial.state for trial in searching.tried) == ["complete", "complete", "interrupted"]
    assert [trial.default for trial in searching.tried if trial.state == "complete"].count(True) == 1, "tried again"


def test_the_budget_ends_a_trial_and_the_search(tmp_path, monkeypatch, capsys):
    begun, begin = [], dld.begin
    monkeypatch.setattr(dld, "begin", lambda *given: begun.append(1) or begin(*given))
    monkeypatch.setattr(dld.Clock, "left", property(lambda self: 1000.0 if len(begun) < 3 else dld.CLOSING))
    assert dld.main([*QUICK, "--search", "9", "--budget", "9m", "--output-dir", str(tmp_path)]) == 0
    folder = tmp_path / "search-mnist-offline-digits"
    assert [row["state"] for row in table(folder)] == ["complete", "complete", "pruned"]
    assert "Time is up: a trial takes about" in capsys.readouterr().out
    assert json.loads((folder / "best.json").read_text("utf-8"))["budget"] == ""


def test_a_small_space_is_tried_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setitem(dld.SPACES, "mlp", {"schedule": ("onecycle", "cosine", "linear"), "clip": (0.0, 0.5, 1.0)})
    monkeypatch.setattr(dld, "plot_search", lambda *given: None)
    tries, choose = iter(range(200)), dld.Search.choose
    monkeypatch.setattr(dld.Search, "choose", lambda *given: next(tries) is not None and choose(*given))
    assert dld.main([*QUICK, "--search", "50", "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    rows = table(tmp_path / "search-mnist-offline-digits")
    assert len({(row["schedule"], row["clip"]) for row in rows}) == len(rows) == 9


def break_second(monkeypatch, problem):
    """Let the second training of a search end with this."""
    calls, fit = [], dld.fit

    def broken(*given):
        calls.append(1)
        if len(calls) == 2:
            raise problem
        return fit(*given)

    monkeypatch.setattr(dld, "fit", broken)


@pytest.mark.parametrize("problem", [dld.Exploded("the loss is no number"), RuntimeError("CUDA out of memory"),
                                     dld.Failure("out of memory with 9 samples")])
def test_a_trial_may_fail(problem, tmp_path, monkeypatch):
    break_second(monkeypatch, problem)
    assert dld.main([*QUICK, "--search", "3", "--output-dir", str(tmp_path)]) == 0
    rows = table(tmp_path / "search-mnist-offline-digits")
    assert [row["state"] for row in rows] == ["complete", "failed", "complete"] and rows[1]["reason"] == str(problem)


def test_an_interrupted_search_keeps_what_there_is_and_exits_130(tmp_path, monkeypatch, capsys):
    break_second(monkeypatch, dld.Stopped())
    assert dld.main([*QUICK, "--search", "3", "--output-dir", str(tmp_path)]) == 130
    folder = tmp_path / "search-mnist-offline-digits"
    assert [row["state"] for row in table(folder)] == ["complete", "interrupted"]
    assert (folder / "best.json").exists() and (folder / "search.png").exists()
    assert "Next    " in capsys.readouterr().out


def test_a_dry_run_tries_two(tmp_path):
    flags = ["--task", "mnist", "--data", "offline", "--device", "cpu", "--search", "50", "--dry-run"]
    assert dld.main([*flags, "--output-dir", str(tmp_path)]) == 0
    assert len(table(tmp_path / "search-mnist-offline-digits-dry-run")) == 2


def test_every_default_lies_in_its_space():
    fields = {field.name for field in dataclasses.fields(dld.Config)}
    given = [{"task": task, "model": model, "data": "mine" if dld.TASKS[task].own else "auto"}
             for task in dld.TASKS for model in
             [*dld.KINDS[dld.TASKS[task].kind].models, *(["resnet18"] if dld.TASKS[task].kind == "image" else [])]]
    assert {one["model"] for one in given} >= {*dld.SPACES, "resnet18"} - {""}
    for one in given:
        for stand_in in (False, True):
            config = dld.settle({}, one, stand_in=stand_in)
            for name, span in dld.search_space(config, one).items():
                value = getattr(config, name)
                assert name in fields and "lr" in dld.search_space(config, one)
                inside = value in span if isinstance(span, tuple) else span.low <= value <= span.high
                assert inside, f"{one}: {name} {value} is not in {span}"
                for end in span if isinstance(span, tuple) else (span.low, span.high):
                    dataclasses.replace(config, **{name: end})


REFUSED = [
    (["--search", "0"], "--search 0: must be at least 1"),
    (["--search", "3", "--task", "all"], "--search tunes one task at a time"),
    (["--search", "3", "--resume", "x"], "--resume and --search cannot be combined"),
    (["--search", "3", "--predict", "x", "--run", "y"], "--predict and --search cannot be combined"),
    (["--search", "3", "--folds", "3"], "--search and --folds cannot be combined"),
    (["--storage", "sqlite:///x.db"], "--storage needs --search"),
    (["--search", "3", *QUICK, *ONE_LEFT, "--schedule", "cosine"], "nothing is left to vary; leave out one of --lr"),
    (["--search", "3", *QUICK, "--limit", "1"], "--limit 1 leaves no training sample of"),
    (["--search", "3", *QUICK, "--storage", "study.db"], "--storage study.db: "),
    (["--search", "3", *QUICK, "--storage", ""], "--storage : "),
    (["--search", "3", *QUICK, "--storage", "sqlite:///no/where.db"], "unable to open database file"),
    (["--search", "3", *QUICK, "--storage", "nosql://x/y"], "nosql"),
    (["--search", "3", *QUICK, "--storage", "sqlite:///text.db"], "file is not a database"),
    (["--search", "3", *QUICK, "--storage", "sqlite:///locked.db"], "database is locked"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_searched_is_refused_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dld, "LOCKED", 0.2)
    (tmp_path / "text.db").write_text("no database " * 100)
    holder = sqlite3.connect("locked.db", isolation_level=None)
    holder.execute("begin exclusive")
    assert dld.main(flags) == 2
    holder.close()
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "outputs").exists()


def test_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dld.main([*QUICK, "--search", "3"]) == 2
    assert "with --storage sqlite:///study.db instead" in capsys.readouterr().err
