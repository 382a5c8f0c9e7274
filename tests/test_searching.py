"""Searching for settings: what is tried and never looked at, several processes, failures."""
import dataclasses
import json
import subprocess
import sys
import types
from unittest import mock

import pandas as pd
import pytest
from conftest import SCRIPT, dld, metrics_of, small

optuna = pytest.importorskip("optuna")
QUICK = ["--task", "mnist", "--data", "offline", "--device", "cpu", "--limit", "100",
         "--epochs", "2", "--width", "16"]
ONE_LEFT = ["--lr", "0.002", "--dropout", "0.1", "--label-smoothing", "0", "--batch-size", "64",
            "--weight-decay", "0.01"]  # all but --schedule
NAME = "search-mnist-offline-digits"


def trials(folder, name=NAME):
    return pd.read_csv(folder / name / "trials.csv", keep_default_na=False)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take most of the time of a short search: one test draws them."""
    monkeypatch.setattr(dld.Search, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search over digits whose test part has labels that no code could use; every row it cut."""
    place, read, batch = tmp_path_factory.mktemp("searched"), set(), dld.ImageData.batch
    raw = dld.make_digits()
    raw.y = raw.y.copy()
    raw.y[raw.n_train:] = -10**6

    def watched(self, rows, *others, **more):
        read.update(rows.tolist())
        return batch(self, rows, *others, **more)

    with pytest.MonkeyPatch.context() as patch:
        poisoned = dataclasses.replace(dld.TASKS["mnist"], offline=lambda *given: raw)
        patch.setitem(dld.TASKS, "mnist", poisoned)
        patch.setattr(dld.ImageData, "batch", watched)
        assert dld.main([*QUICK, "--search", "5", "--output-dir", str(place)]) == 0
    assert max(read) < raw.n_train, "the test part is never read"
    return place


def test_the_first_trial_is_the_default_and_the_best_is_no_worse(
        searched, tmp_path, undrawn):
    rows, folder = trials(searched), searched / NAME
    assert [*rows["number"]] == [1, 2, 3, 4, 5] and [*rows["default"]] == [1, 0, 0, 0, 0]
    plain = small("mnist", limit=100, epochs=2, width=16)
    names = [*dld.SPACES["mlp"]]
    assert [*rows.loc[0, names]] == [getattr(plain, name) for name in names]
    assert not rows.duplicated(names).any()
    done = rows[rows["state"] == "complete"].astype({"val_accuracy": float, "val_loss": float})
    best = done.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    chosen = json.loads((folder / "best.json").read_text("utf-8"))
    for name in names:  # old readers of CSV round the last digit
        value = chosen[name]
        assert best[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert 0 in done.index
    said = (folder / "log.txt").read_text("utf-8")
    assert f"Best    trial {best['number']}, the best of 5" in said and "trial   5" in said
    assert f"--config {folder / 'best.json'}" in said
    assert "McNemar" in said or "this is the default itself" in said
    assert dld.main(["--config", str(folder / "best.json"), "--report", "minimal",
                     "--output-dir", str(tmp_path)]) == 0, "the final run"
    reached = metrics_of(tmp_path / "mnist-offline-digits")["val_accuracy"]
    assert reached == pytest.approx(done["val_accuracy"].max())


def test_figures_of_a_search_are_drawn(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert dld.main([*QUICK, "--search", "3", "--dry-run", "--output-dir", str(tmp_path)]) == 0
    folder = tmp_path / f"{NAME}-dry-run"
    assert len(trials(tmp_path, folder.name)) == 2, "a dry run tries two"
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")


def test_one_trial_shows_no_setting_to_be_important(tmp_path, monkeypatch, recwarn):
    monkeypatch.undo()
    assert dld.main([*QUICK, "--search", "1", "--output-dir", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / NAME).glob("*.png")} == {"search.png"}
    assert not [each for each in recwarn if "too small" in str(each.message)]


def test_two_processes_share_a_study_and_a_later_one_goes_on(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    flags = [*QUICK, "--storage", url, "--output-dir", str(tmp_path), "--search"]
    other = subprocess.Popen([sys.executable, str(SCRIPT), *flags, "3"], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    while other.stdout.readline()[:6] not in ("Folder", ""):
        pass
    assert dld.main([*flags, "3"]) == 0, "while the other searches"
    out, errors = other.communicate(timeout=180)
    assert (other.returncode, errors) == (0, "")
    said = [line for line in (out + capsys.readouterr().out).splitlines() if line[:6] == "trial "]
    assert 3 <= len(said) <= 4 and sum("the default" in line for line in said) == 1
    assert dld.main([*flags, "5"]) == 0, "later, alone"
    rows = trials(tmp_path, f"{NAME}-3")
    assert len(rows) == 5 and not rows.duplicated([*dld.SPACES["mlp"]]).any()


@pytest.mark.parametrize(("problem", "code"), [(dld.Diverged(2, 0.1), 0), (dld.Interrupted(), 130)])
def test_a_trial_may_diverge_and_a_search_be_interrupted(problem, code, tmp_path, monkeypatch,
                                                         capsys):
    calls, fit = [], dld.fit

    def second_ends(*given):
        calls.append(1)
        if len(calls) == 2:
            raise problem
        return fit(*given)

    monkeypatch.setattr(dld, "fit", second_ends)
    assert dld.main([*QUICK, "--search", "3", "--output-dir", str(tmp_path)]) == code
    rows = trials(tmp_path)
    assert rows["state"][0] == "complete" and (tmp_path / NAME / "best.json").exists()
    assert "Next    " in capsys.readouterr().out
    if code == 0:
        assert [*rows["state"]] == ["complete", "failed", "complete"]
        assert rows["reason"][1].startswith("the loss became no number in epoch 2")


def test_whole_numbers_stay_whole_beside_a_trial_that_has_just_begun(tmp_path):
    study = optuna.create_study(direction="maximize")
    work = types.SimpleNamespace(config=small("mnist"), space={"batch_size": (2, 256)},
                                 folder=tmp_path)
    study.add_trial(optuna.trial.create_trial(
        params={"batch_size": 128}, value=0.5, user_attrs={"val_accuracy": 0.5},
        distributions={"batch_size": optuna.distributions.IntDistribution(2, 256)}))
    study.ask()
    table = dld.Search.write(work, study)
    assert (tmp_path / "trials.csv").read_text("utf-8").splitlines()[1].split(",")[6] == "128"
    assert "with batch size 128" in dld.say_search(table.loc[0], table[:0], 1, ["batch_size"])[0]


def test_a_default_that_was_interrupted_is_tried_again(tmp_path, monkeypatch):
    flags = [*QUICK, "--storage", f"sqlite:///{tmp_path / 'study.db'}", "--search", "1",
             "--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(dld, "fit", mock.Mock(side_effect=dld.Interrupted))
        assert dld.main(flags) == 130
    assert dld.main(flags) == 0
    rows = trials(tmp_path, f"{NAME}-2")
    assert [*rows["default"]] == [1, 1] and [*rows["state"]] == ["fail", "complete"]


REFUSED = [
    (["0"], "--search 0: must be at least 1"),
    (["3", "--task", "all"], "--search tunes one task at a time"),
    (["3", "--folds", "3"], "--search and --folds cannot be combined"),
    (["3", *QUICK, *ONE_LEFT, "--schedule", "cosine"], "nothing is left to vary; leave out one of"),
    (["3", *QUICK, "--limit", "1"], "has no training sample of 0, 1, 2"),
    (["3", *QUICK, "--storage", "study.db"], "--storage study.db: "),
    (["3", *QUICK, "--storage", "sqlite:///no/where.db"], "unable to open database file"),
    (["3", *QUICK, "--storage", "nosql://me:secret@x/y"], "--storage nosql://...@x/y: "),
    (["3", *QUICK, "--storage", "sqlite:///text.db"], "file is not a database"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_searched_is_refused_in_one_line(
        flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("no database " * 100)
    assert dld.main(["--search", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "outputs").exists()
