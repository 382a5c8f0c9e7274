"""Faults of the data: planted ones are found, and sound data is left in peace."""
import csv
import dataclasses

import numpy as np
import pytest
import torch
from conftest import dld, metrics_of, small


def faults_of(run, kind):
    return [row for row in csv.DictReader((run / "faults.csv").open(encoding="utf-8")) if row["fault"] == kind]


def exact(data):
    return dld.find_repeats(data, {part: data.samples.identities(data.parts[part]) for part in dld.PARTS})


def test_repeats_are_found_within_and_across_parts_and_left_out():
    texts = ["good film", "bad film", "fine", "good  film", "poor", "good film", "new words", "poor", "new words"]
    raw = dld.Raw("texts", ["no", "yes"], texts, np.array([1, 0, 1, 1, 0, 0, 0, 0, 1]), 5)
    data = dld.build_data(raw, small("sentiment", val_fraction=0.25))
    right = torch.tensor([True, True, True, False])
    found = dld.measure_faults(data, exact(data), right)
    assert found["train_repeats"] == 1 and found["test_repeats"] == 2 and found["test_own_repeats"] == 1
    assert found["repeats_with_other_label"] == 2, "a good film, once called bad; new words, once good"
    assert found["test_accuracy_without_repeats"] == 0.5, "of the two with new words one is right"
    assert found["empty_samples"] == found["suspect_labels"] == 0


def leak_pictures(raw):
    """The first 40 test pictures become training pictures: shifted by a pixel, brighter, noisier, mirrored."""
    x, y = raw.x.copy(), raw.y.copy()
    rng = np.random.default_rng(0)
    for i in range(40):
        picture = raw.x[i].astype(float)
        picture = [np.roll(picture, 1, 2), picture * 0.8 + 30, picture + rng.normal(0, 6, picture.shape),
                   picture[:, :, ::-1]][i % 4]
        x[raw.n_train + i], y[raw.n_train + i] = picture.clip(0, 255).astype(np.uint8), raw.y[i]
    return dataclasses.replace(raw, x=x, y=y, packed=None)


def leak_texts(raw):
    """The first 40 test texts become training texts with one word more."""
    texts, y = list(raw.x), raw.y.copy()
    for i in range(40):
        texts[raw.n_train + i], y[raw.n_train + i] = f"{raw.x[i]} indeed", raw.y[i]
    return dataclasses.replace(raw, x=texts, y=y, packed=None)


@pytest.mark.parametrize(("task", "leak"), [("cifar10", leak_pictures), ("sentiment", leak_texts)])
def test_a_planted_leak_is_found(finished, shapes, reviews, task, leak):
    sound = {"cifar10": shapes, "sentiment": reviews}[task]
    runtime = dld.Runtime(torch.device("cpu"), "fp32")
    model, meta = dld.load_model(finished[task], runtime)

    def find(raw):
        data = dld.build_data(raw, small(task))
        kind = dld.KINDS[meta["kind"]]
        data = dataclasses.replace(data, samples=kind.samples(kind.pack(raw.x), meta))
        return {(fault.row, fault.other) for fault in dld.find_near_repeats(data, model, set())}

    found, usual = find(leak(sound)), find(sound)
    planted = {(sound.n_train + i, i) for i in range(40)}
    assert len(found & planted) >= 38
    assert len(found - planted - usual) <= 2 and len(usual) <= 10, "and hardly any other"


def test_an_exact_copy_is_a_repeat_and_not_a_near_one(digits):
    x, y = digits.x.copy(), digits.y.copy()
    x[digits.n_train:digits.n_train + 50], y[digits.n_train:digits.n_train + 50] = x[:50], y[:50]
    data = dld.build_data(dataclasses.replace(digits, x=x, y=y, packed=None), small("mnist"))
    found = dld.measure_faults(data, exact(data), torch.ones(360, dtype=torch.bool))
    assert found["test_repeats"] == 50 and found["repeats_with_other_label"] == 0


def test_empty_samples_are_found(shapes):
    x = shapes.x.copy()
    x[[3, 650]] = 77
    data = dld.build_data(dataclasses.replace(shapes, x=x, packed=None), small("cifar10"))
    assert [data.samples.empty(data.parts[part]).tolist() for part in ("train", "val", "test")].count([]) == 1
    assert 650 in data.samples.empty(data.parts["test"]).tolist()
    texts = dld.Raw("texts", ["no", "yes"], ["good bad film"] * 6 + ["", "good", "xyzzy", "film"],
                    np.array([1, 0] * 5), 8)
    data = dld.build_data(texts, small("sentiment", val_fraction=0.25))
    assert data.samples.empty(torch.arange(10)).tolist() == [6, 8]


PATTERNS = np.random.default_rng(5).integers(0, 256, (4, 1, 12, 12))


def make_patterns(n=5400, n_train=5000, flipped=0.0):
    """Four patterns under noise: quickly learnt, never perfectly; some training labels are made wrong."""
    rng = np.random.default_rng(1)
    y = rng.permutation(np.arange(n) % 4)
    x = (0.35 * PATTERNS[y] + rng.normal(80, 70, (n, 1, 12, 12))).clip(0, 255).astype(np.uint8)
    wrong = rng.permutation(n_train)[:round(flipped * n_train)]
    y[wrong] = (y[wrong] + rng.integers(1, 4, len(wrong))) % 4
    return dld.Raw("patterns", list("abcd"), x, y, n_train, "offline-patterns"), set(wrong.tolist())


def register(monkeypatch, raw):
    monkeypatch.setitem(dld.TASKS, "patterns", dld.Task("image", None, lambda: raw, {"model": "mlp"}))
    return ["--task", "patterns", "--data", "offline", "--device", "cpu", "--precision", "fp32", "--width", "32",
            "--batch-size", "100", "--no-views"]


def test_planted_label_flips_are_found_out_of_fold(tmp_path, monkeypatch, capsys):
    raw, flipped = make_patterns(flipped=0.02)
    flags = [*register(monkeypatch, raw), "--epochs", "3", "--folds", "3", "--output-dir", str(tmp_path)]
    assert dld.main(flags) == 0
    run = tmp_path / "patterns-offline-patterns"
    first = [int(row["row"]) for row in faults_of(run, "suspect label")[:100]]
    assert len(first) >= 70 and len(flipped.intersection(first)) / len(first) >= 0.7
    metrics = metrics_of(run)
    assert metrics["train_samples"] == 5000 and metrics["val_samples"] == 0 and metrics["best_epoch"] == 3
    assert metrics["folds"] == 3 and 0 < metrics["folds_spread"] < 0.05
    assert metrics["val_accuracy"] == pytest.approx(metrics["folds_accuracy"], abs=1e-3)
    page = (run / "report.html").read_text("utf-8")
    assert "Cross-validation with 3 folds, accuracy " in page and "no validation curve" in page
    assert (run / "folds.png").exists() and "validation" in (run / "log.txt").read_text("utf-8")
    assert dld.main(["--evaluate", "--run", str(run)]) == 0, "the same numbers"
    before = dld.load_file(run / "model.pt")
    for name in ("model.pt", "checkpoint.pt", "metrics.json"):
        (run / name).unlink()
    saved = dld.load_file(run / "folds.pt")
    del saved["histories"]["fold 2"]  # as if it had been stopped there: the last training must not depend on it
    torch.save(saved, run / "folds.pt")
    capsys.readouterr()
    assert dld.main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "fold 2/3" in out and "fold 3/3" not in out
    after = dld.load_file(run / "model.pt")
    assert all(torch.equal(after["weights"][name], weight) for name, weight in before["weights"].items())
    assert after["meta"]["temperature"] == before["meta"]["temperature"]


def test_folds_hold_each_training_sample_once_and_never_a_test_sample(digits):
    data = dld.build_data(digits, small("mnist", folds=5))
    assert len(data.parts["val"]) == 0 and data.parts["train"].tolist() == list(range(digits.n_train))
    folds = dld.fold_rows(data.parts, data.labels, 5, seed=0)
    held = torch.cat([parts["val"] for parts in folds])
    assert sorted(held.tolist()) == data.parts["train"].tolist()
    for parts in folds:
        assert not set(parts["train"].tolist()) & set(parts["val"].tolist())
        assert torch.equal(parts["test"], data.parts["test"])
        counts = data.labels[parts["val"]].bincount(minlength=10)
        assert counts.max() - counts.min() <= 3, "stratified"


def test_shuffled_labels_end_in_nothing_learned(tmp_path, monkeypatch, capsys):
    raw, _ = make_patterns(2400, 1600)
    rng = np.random.default_rng(2)
    raw = dataclasses.replace(raw, y=rng.permutation(raw.y))
    assert dld.main([*register(monkeypatch, raw), "--epochs", "2", "--output-dir", str(tmp_path)]) == 0
    run = tmp_path / "patterns-offline-patterns"
    m = metrics_of(run)
    assert m["test_accuracy_low"] < 0.25 < m["test_accuracy_high"]
    assert m["test_macro_f1_low"] < 0.25 and abs(m["test_auc"] - 0.5) < 0.05
    assert m["commonest_gain_low"] < 0 and not dld.learned(m)
    out, page = capsys.readouterr().out, (run / "report.html").read_text("utf-8")
    assert "nothing learned" in out and "Nothing learned" in page
    assert "this model is better" not in page
