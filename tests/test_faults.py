"""Faults of the data: planted ones are found, and sound data is left in peace."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of, small
from PIL import Image


def leak_pictures(raw):
    """Test pictures become training pictures: shifted, brighter, noisier, mirrored."""
    x, rng = raw.x.copy(), np.random.default_rng(0)
    for i in range(40):
        picture = raw.x[i].astype(float)
        picture = [np.roll(picture, 1, 2), picture * 0.8 + 30, picture[:, :, ::-1],
                   picture + rng.normal(0, 6, picture.shape)][i % 4]
        x[raw.n_train + i] = picture.clip(0, 255).astype(np.uint8)
    return x


def leak_texts(raw):
    """Test texts become training texts with one word more."""
    more = [f"{text} indeed" for text in raw.x[:40]]
    return [*raw.x[:raw.n_train], *more, *raw.x[raw.n_train + 40:]]


@pytest.mark.parametrize(("task", "leak"), [("cifar10", leak_pictures), ("sentiment", leak_texts)])
def test_a_planted_leak_is_found_and_hardly_anything_else(shapes, reviews, task, leak):
    raw = {"cifar10": shapes, "sentiment": reviews}[task]

    def find(x):
        data = dld.build_dataset(dataclasses.replace(raw, x=x, packed=None), small(task))
        return {(each["row"], each["other_row"]) for each in dld.find_near_repeats(data, [])}

    found, usual = find(leak(raw)), find(raw.x)
    planted = {(raw.n_train + i, i) for i in range(40)}
    assert len(found & planted) >= 38
    assert len(found - planted - usual) <= 2 and len(usual) <= 10


def test_of_two_copies_in_the_test_part_both_nearly_repeat_a_training_text(reviews):
    first = reviews.n_train
    x = [*reviews.x[:first], *[f"{reviews.x[0]} indeed"] * 2, *reviews.x[first + 2:]]
    data = dld.build_dataset(dataclasses.replace(reviews, x=x, packed=None), small("sentiment"))
    prints = {part: data.samples.identities(data.parts[part]) for part in dld.PARTS}
    repeats = dld.find_repeats(data, prints, torch.empty(0, dtype=torch.int64))
    found = {each["row"] for each in dld.find_near_repeats(data, repeats)}
    assert {first, first + 1} <= found


PATTERNS = np.random.default_rng(5).integers(0, 256, (4, 1, 12, 12))


def make_patterns(n, n_train):
    """Four patterns under noise: quickly learnt."""
    rng = np.random.default_rng(1)
    y = rng.permutation(np.arange(n) % 4)
    x = (0.35 * PATTERNS[y] + rng.normal(80, 70, (n, 1, 12, 12))).clip(0, 255).astype(np.uint8)
    return dld.RawData("patterns", list("abcd"), x, y, n_train, "offline-patterns")


def flags_for(raw, tmp_path, monkeypatch):
    """To train on this, with empty pictures for figures."""
    task = dld.Task("image", offline=lambda: raw, defaults={"model": "mlp"})
    monkeypatch.setitem(dld.TASKS, "patterns", task)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **more: (
        Image.new("L", (8, 8)).save(file, "png")))
    return ["--task", "patterns", "--data", "offline", "--device", "cpu", "--precision", "fp32",
            "--width", "32", "--batch-size", "50", "--no-views", "--report", "minimal",
            "--output-dir", str(tmp_path)]


def test_wrong_labels_repeats_and_empty_samples_are_found_by_cross_validation(
        tmp_path, monkeypatch, capsys):
    raw, n, rng = make_patterns(1600, 1200), 1200, np.random.default_rng(2)
    flipped = rng.permutation(np.arange(100, n))[:40]
    raw.y[flipped] = (raw.y[flipped] + rng.integers(1, 4, 40)) % 4
    for copy, of in ((n, 0), (n + 10, 10), (n + 20, n + 30)):  # across parts, and within one
        for values in (raw.x, raw.y):
            values[copy:copy + 10] = values[of:of + 10]
    raw.x[50:53], raw.y[50:53] = raw.x[60], (raw.y[60] + 1) % 4
    raw.x[[70, n + 50]], raw.y[[70, n + 50]] = 77, 0
    assert dld.main([*flags_for(raw, tmp_path, monkeypatch), "--epochs", "3", "--folds", "3"]) == 0
    run = tmp_path / "patterns-offline-patterns"
    faults = pd.read_csv(run / "faults.csv")
    suspects = faults[faults["fault"] == "suspect label"]["row"].tolist()[:40]
    assert len({*suspects} & {*flipped}) >= 30
    assert faults[faults["fault"] == "empty"]["row"].tolist() == [70, n + 50]
    metrics = metrics_of(run)
    assert (metrics["test_repeats"], metrics["test_own_repeats"]) == (21, 10), "20 and an empty one"
    assert (metrics["train_repeats"], metrics["repeats_with_other_label"]) == (3, 1)
    predicted = pd.read_csv(run / "predictions.csv").set_index("row")["correct"]
    without = predicted.drop([*range(n, n + 20), n + 50]).mean()
    assert metrics["test_accuracy_without_repeats"] == pytest.approx(without)
    assert (metrics["train_samples"], metrics["val_samples"], metrics["folds"]) == (n, 0, 3)
    assert metrics["val_accuracy"] == pytest.approx(metrics["folds_accuracy"], abs=1e-3)
    assert "Cross-validation with 3 folds" in (run / "report.html").read_text("utf-8")
    assert dld.main(["--evaluate", "--run", str(run)]) == 0, "the same numbers"
    before = dld.load_file(run / "model.pt")
    for name in ("model.pt", "checkpoint.pt", "metrics.json"):
        (run / name).unlink()
    saved = dld.load_file(run / "folds.pt")
    del saved["histories"]["fold 2"]  # as if stopped there: the last training must not depend on it
    torch.save(saved, run / "folds.pt")
    capsys.readouterr()
    assert dld.main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "fold 2/3" in out and "fold 3/3" not in out
    after = dld.load_file(run / "model.pt")
    torch.testing.assert_close(after["weights"], before["weights"], atol=0, rtol=0)


def test_the_accuracy_of_the_folds_is_that_of_both_parts_of_a_network(tmp_path, undrawn):
    assert dld.main(["--task", "sentiment", "--data", "offline", "--limit", "180", "--epochs", "1",
                     "--folds", "2", "--report", "minimal", "--device", "cpu", "--output-dir",
                     str(tmp_path)]) == 0
    metrics = metrics_of(next(tmp_path.iterdir()))
    assert metrics["val_accuracy"] == pytest.approx(metrics["folds_accuracy"])


def test_folds_hold_each_training_sample_once_and_never_a_test_sample(digits):
    config = small("mnist", folds=5)
    data = dld.build_dataset(digits, config)
    folds = dld.fold_rows(data.parts, data.labels, config)
    held = torch.cat([parts["val"] for parts in folds])
    assert sorted(held.tolist()) == data.parts["train"].tolist() == [*range(digits.n_train)]
    for parts in folds:
        assert not {*parts["train"].tolist()} & {*parts["val"].tolist()}
        assert torch.equal(parts["test"], data.parts["test"])
        counts = data.labels[parts["val"]].bincount(minlength=10)
        assert counts.max() - counts.min() <= 3, "stratified"


def test_both_copies_of_a_test_sample_that_init_had_learnt_are_known():
    parts = {"train": torch.tensor([0]), "val": torch.tensor([1]), "test": torch.tensor([2, 3])}
    data = SimpleNamespace(labels=torch.zeros(4, dtype=torch.int64), parts=parts)
    marks = {"train": torch.tensor([10]), "val": torch.tensor([11]), "test": torch.tensor([12, 12])}
    issues = pd.DataFrame(dld.find_repeats(data, marks, torch.tensor([12])))
    assert dld.measure_issues(data, issues, torch.tensor([True, True]))["test_repeats"] == 2


def test_shuffled_labels_end_in_nothing_learned(tmp_path, monkeypatch, capsys):
    raw = make_patterns(1200, 600)
    raw.y[:] = np.random.default_rng(2).permutation(raw.y)
    assert dld.main([*flags_for(raw, tmp_path, monkeypatch), "--epochs", "2"]) == 0
    run = tmp_path / "patterns-offline-patterns"
    m, page = metrics_of(run), (run / "report.html").read_text("utf-8")
    assert m["test_accuracy_low"] < 0.25 < m["test_accuracy_high"]
    assert m["test_macro_f1_low"] < 0.25 and abs(m["test_auc"] - 0.5) < 0.06
    assert m["commonest_gain_low"] < 0 and "nothing learned" in capsys.readouterr().out
    assert "Nothing learned" in page and "this model is better" not in page
