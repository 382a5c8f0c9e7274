"""Faults of the data: planted ones are found, and sound data is left in peace."""
import csv
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of, small

CPU = dld.Machine(torch.device("cpu"), "fp32")


def repeats(data, right):
    """What is said of this data's exact repeats, if the model was right on these test samples."""
    prints = {part: data.samples.identities(data.parts[part]) for part in dld.PARTS}
    issues = pd.DataFrame(dld.find_repeats(data, prints))
    return dld.measure_issues(data, issues, torch.tensor(right))


def test_repeats_are_found_within_and_across_parts_and_left_out(digits):
    texts = ["good film", "bad film", "fine", "good  film", "poor", "good film", "new words",
             "poor", "new words"]
    raw = dld.RawData("texts", ["no", "yes"], texts, np.array([1, 0, 1, 1, 0, 0, 0, 0, 1]), 5)
    data = dld.build_dataset(raw, small("sentiment", val_fraction=0.25))
    found = repeats(data, [True, True, True, False])
    assert (found["train_repeats"], found["test_repeats"], found["test_own_repeats"]) == (1, 2, 1)
    assert found["repeats_with_other_label"] == 2, "a good film, once bad; new words, once good"
    assert found["test_accuracy_without_repeats"] == 0.5, "of two with new words one is right"
    x, y, n = digits.x.copy(), digits.y.copy(), digits.n_train
    x[n:n + 50], y[n:n + 50] = x[:50], y[:50]
    raw = dataclasses.replace(digits, x=x, y=y, packed=None)
    found = repeats(dld.build_dataset(raw, small("mnist")), [True] * 360)
    assert found["test_repeats"] == 50 and found["repeats_with_other_label"] == 0


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
def test_a_planted_leak_is_found_and_hardly_anything_else(finished, shapes, reviews, task, leak):
    raw = {"cifar10": shapes, "sentiment": reviews}[task]
    _, meta = dld.load_model(finished[task], CPU)

    def find(x):
        data = dld.build_dataset(dataclasses.replace(raw, x=x, packed=None), small(task))
        samples = type(data.samples)(data.samples.pack(x), meta)
        data = dataclasses.replace(data, samples=samples)
        return {(each["row"], each["other_row"])
                for each in dld.find_near_repeats(data, set())}

    found, usual = find(leak(raw)), find(raw.x)
    planted = {(raw.n_train + i, i) for i in range(40)}
    assert len(found & planted) >= 38
    assert len(found - planted - usual) <= 2 and len(usual) <= 10


def test_empty_samples_are_found(shapes):
    x = shapes.x.copy()
    x[[3, 650]] = 77
    pictures = dld.ImageData.pack(x)
    meta = dld.ImageData.fit_preprocessing(pictures, torch.arange(600), small("cifar10"))
    assert dld.ImageData(pictures, meta).blank_rows(torch.arange(800)).tolist() == [3, 650]
    texts = dld.TextData.pack(["good film", "", "good", "xyzzy", "film"])
    meta = {"vocabulary": ["good", "film"], "max_tokens": 9}
    assert dld.TextData(texts, meta).blank_rows(torch.arange(5)).tolist() == [1, 3]


PATTERNS = np.random.default_rng(5).integers(0, 256, (4, 1, 12, 12))


def make_patterns(n, n_train, flipped=0.0):
    """Four patterns under noise: quickly learnt; some training labels are made wrong."""
    rng = np.random.default_rng(1)
    y = rng.permutation(np.arange(n) % 4)
    x = (0.35 * PATTERNS[y] + rng.normal(80, 70, (n, 1, 12, 12))).clip(0, 255).astype(np.uint8)
    wrong = rng.permutation(n_train)[:round(flipped * n_train)]
    y[wrong] = (y[wrong] + rng.integers(1, 4, len(wrong))) % 4
    return dld.RawData("patterns", list("abcd"), x, y, n_train, "offline-patterns"), {*wrong}


def flags_for(raw, tmp_path, monkeypatch):
    task = dld.Task("image", offline=lambda: raw, defaults={"model": "mlp"})
    monkeypatch.setitem(dld.TASKS, "patterns", task)
    return ["--task", "patterns", "--data", "offline", "--device", "cpu", "--precision", "fp32",
            "--width", "32", "--batch-size", "100", "--no-views", "--report", "minimal",
            "--output-dir", str(tmp_path)]


def test_planted_label_flips_are_found_out_of_fold(tmp_path, monkeypatch, capsys):
    raw, flipped = make_patterns(5400, 5000, 0.02)
    flags = flags_for(raw, tmp_path, monkeypatch)
    assert dld.main([*flags, "--epochs", "3", "--folds", "3"]) == 0
    run = tmp_path / "patterns-offline-patterns"
    table = list(csv.DictReader((run / "faults.csv").open(encoding="utf-8")))
    first = [int(row["row"]) for row in table if row["fault"] == "suspect label"][:100]
    assert len(first) >= 70 and len(flipped.intersection(first)) / len(first) >= 0.7
    metrics, page = metrics_of(run), (run / "report.html").read_text("utf-8")
    assert (metrics["train_samples"], metrics["val_samples"], metrics["folds"]) == (5000, 0, 3)
    assert metrics["best_epoch"] == 3 and 0 < metrics["folds_spread"] < 0.05
    assert metrics["val_accuracy"] == pytest.approx(metrics["folds_accuracy"], abs=1e-3)
    assert "Cross-validation with 3 folds, accuracy " in page and "no validation curve" in page
    assert (run / "folds.png").exists() and "validation" in (run / "log.txt").read_text("utf-8")
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
    assert after["meta"]["temperature"] == before["meta"]["temperature"]


def test_folds_hold_each_training_sample_once_and_never_a_test_sample(digits):
    config = small("mnist", folds=5)
    data = dld.build_dataset(digits, config)
    assert len(data.parts["val"]) == 0
    assert data.parts["train"].tolist() == list(range(digits.n_train))
    folds = dld.fold_rows(data.parts, data.labels, config)
    held = torch.cat([parts["val"] for parts in folds])
    assert sorted(held.tolist()) == data.parts["train"].tolist()
    for parts in folds:
        assert not {*parts["train"].tolist()} & {*parts["val"].tolist()}
        assert torch.equal(parts["test"], data.parts["test"])
        counts = data.labels[parts["val"]].bincount(minlength=10)
        assert counts.max() - counts.min() <= 3, "stratified"


def test_shuffled_labels_end_in_nothing_learned(tmp_path, monkeypatch, capsys):
    raw, _ = make_patterns(2400, 1600)
    raw = dataclasses.replace(raw, y=np.random.default_rng(2).permutation(raw.y))
    assert dld.main([*flags_for(raw, tmp_path, monkeypatch), "--epochs", "2"]) == 0
    run = tmp_path / "patterns-offline-patterns"
    m, page = metrics_of(run), (run / "report.html").read_text("utf-8")
    assert m["test_accuracy_low"] < 0.25 < m["test_accuracy_high"]
    assert m["test_macro_f1_low"] < 0.25 and abs(m["test_auc"] - 0.5) < 0.05
    assert m["commonest_gain_low"] < 0 and "nothing learned" in capsys.readouterr().out
    assert "Nothing learned" in page and "this model is better" not in page
