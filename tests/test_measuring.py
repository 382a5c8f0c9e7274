"""Numbers against independent oracles."""
import math

import numpy as np
import pytest
import torch
from conftest import dld, small
from scipy.optimize import minimize_scalar  # comes with scikit-learn
from scipy.stats import binomtest, rankdata
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_recall_fscore_support, top_k_accuracy_score


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (1, 7), (863, 1000), (9432, 10000)])
def test_the_interval_agrees_with_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert dld.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def chance(n, classes, seed=0, skill=0.0):
    """Random logits and labels; with skill the logits know something of the labels."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=rng)
    return torch.randn(n, classes, generator=rng) + skill * torch.eye(classes)[y], y


@pytest.mark.parametrize(("classes", "skill"), [(5, 0.0), (5, 2.0), (2, 1.0), (10, 4.0)])
def test_measures_agree_with_scikit_learn_and_textbook_formulas(classes, skill):
    logits, y = chance(400, classes, classes, skill)
    found, temperature = dld.measure(logits, y, 0.7), 0.7
    predicted, shares = logits.argmax(1), (logits.double() / temperature).softmax(1).numpy()
    assert found["test_accuracy"] == pytest.approx(accuracy_score(y, predicted))
    assert found["test_macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"))
    assert found["test_loss"] == pytest.approx(log_loss(y, shares), rel=1e-6)
    assert found["test_loss_uncalibrated"] == pytest.approx(log_loss(y, logits.double().softmax(1).numpy()), rel=1e-6)
    assert found["test_brier"] == pytest.approx(np.mean([((p - np.eye(classes)[k]) ** 2).sum()
                                                         for p, k in zip(shares, y.tolist(), strict=True)]))
    areas = []
    for c in range(classes):  # the share of pairs that are in the right order (Mann and Whitney)
        rank, mine = rankdata(shares[:, c]), (y == c).numpy()
        areas.append((rank[mine].sum() - mine.sum() * (mine.sum() + 1) / 2) / (mine.sum() * (~mine).sum()))
    assert found["test_auc"] == pytest.approx(np.mean(areas))
    if classes > 2:
        assert found["test_top2_accuracy"] == pytest.approx(top_k_accuracy_score(y, logits.numpy(), k=2))
    assert ("test_top2_accuracy" in found) == (classes > 2)
    assert found["test_accuracy_low"] < found["test_accuracy"] < found["test_accuracy_high"]
    assert found["test_macro_f1_low"] < found["test_macro_f1"] < found["test_macro_f1_high"]


def test_measures_of_each_class_agree_with_scikit_learn():
    logits, y = chance(300, 4, 1, 1.0)
    y[y == 3] = 0  # a class that does not occur
    rows = dld.measure_classes(logits, y, logits.softmax(1))
    expected = precision_recall_fscore_support(y, logits.argmax(1), labels=range(4), zero_division=0)
    for c, row in enumerate(rows):
        assert [row["precision"], row["recall"] or 0, row["f1"], row["support"]] == pytest.approx(
            [values[c] for values in expected])
    assert rows[3]["recall"] is None and rows[3]["auc"] is None


def test_the_interval_of_the_macro_f1_agrees_with_drawing_samples_anew():
    logits, y = chance(500, 3, 2, 1.5)
    found, rng, drawn = dld.measure(logits, y), np.random.default_rng(1), []
    for _ in range(500):
        rows = rng.integers(0, 500, 500)
        drawn.append(f1_score(y[rows], logits.argmax(1)[rows], average="macro"))
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert (found["test_macro_f1_low"], found["test_macro_f1_high"]) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("skill", [0.5, 3.0, 8.0])
def test_the_calibration_error_agrees_with_a_plain_loop_and_with_torchmetrics(skill):
    logits, y = chance(700, 6, 3, skill)
    shares = logits.double().softmax(1)
    confidence, right = shares.max(1).values.numpy(), (shares.argmax(1) == y).numpy()
    error = 0.0
    for k in range(15):
        there = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if there.any():
            error += there.mean() * abs(confidence[there].mean() - right[there].mean())
    assert dld.measure_trust(shares, y)["test_ece"] == pytest.approx(error, abs=1e-9)
    functional = pytest.importorskip("torchmetrics.functional.classification")
    expected = functional.multiclass_calibration_error(shares.float(), y, num_classes=6, n_bins=15, norm="l1")
    assert error == pytest.approx(float(expected), abs=1e-5)


def test_the_temperature_is_the_best_one_and_never_changes_which_class_wins():
    for scale in (0.2, 1.0, 7.0):
        logits, y = chance(3000, 5, 4, 2.0)
        logits = logits * scale

        def loss(log_t, logits=logits, y=y):
            return log_loss(y, (logits.double() / math.exp(log_t)).softmax(1).numpy())

        found = dld.fit_temperature(logits, y)
        best = math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)
        assert found == pytest.approx(best, rel=0.02)
        assert found / scale == pytest.approx(dld.fit_temperature(logits / scale, y), rel=0.01)
    sure = torch.eye(3)[torch.arange(90) % 3] * 5
    assert 0.1 < dld.fit_temperature(sure, torch.arange(90) % 3) < 2, "no mistake does not mean that there can be none"
    assert dld.fit_temperature(torch.zeros(0, 3), torch.zeros(0).long()) == 1.0
    rng = torch.Generator().manual_seed(0)
    for exponent in range(-6, 7):
        logits = torch.randn(500, 10, generator=rng) * 10.0 ** exponent
        for temperature in (0.02, 0.3, 1.7, 50.0):
            shares = dld.probabilities(logits, temperature)
            best = shares.gather(1, logits.argmax(1, keepdim=True))[:, 0]
            assert (best == shares.max(1).values).all()


def test_mcnemar_agrees_with_counting_coin_throws():
    rng = np.random.default_rng(0)
    for a, b in ((0.9, 0.8), (0.7, 0.7), (0.95, 0.5)):
        one, two = rng.random(60) < a, rng.random(60) < b
        first, second = (one & ~two).sum(), (two & ~one).sum()
        n, most = int(first + second), int(max(first, second))
        tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2 ** n
        assert dld.mcnemar(one, two) == pytest.approx(min(1.0, 2 * tail))
    assert dld.mcnemar(one, one) == 1.0


def test_commonest_mistakes_and_groups():
    matrix = np.array([[5, 3, 0], [1, 9, 0], [0, 4, 2]])
    assert dld.confused_pairs(matrix) == [(2, 1, 4), (0, 1, 3), (1, 0, 1)]
    right, group = torch.tensor([True] * 90 + [False] * 10 + [True] * 50 + [False] * 50), torch.arange(200) // 100
    rows, p = dld.group_accuracy(right, group, ["easy", "hard", "empty"])
    assert [(row["group"], row["accuracy"]) for row in rows] == [("easy", 0.9), ("hard", 0.5)] and p < 1e-6
    assert dld.group_accuracy(right, torch.arange(200) % 2, ["even", "odd"])[1] > 0.9
    cover = dld.coverage(torch.linspace(0, 1, 200), right)
    assert cover[0]["share"] == 0.5 and cover[0]["accuracy"] == 0.5


def test_multiply_adds_are_what_the_layers_do():
    meta = {"kind": "image", "model": "classic", "channels": 3, "side": 32, "classes": list("abcdefghij"),
            "dropout": 0.5}
    by_hand, channels, side = 0, 3, 32
    for width in (32, 64, 128, 256):
        by_hand += side * side * channels * 9 * width
        channels, side = width, side // 2
    by_hand += 1024 * 512 + 512 * 128 + 128 * 10
    assert dld.count_multiply_adds(dld.build_model(meta), torch.zeros(1, 3, 32, 32)) == by_hand
    text = {"kind": "text", "model": "lstm", "classes": ["no", "yes"], "vocabulary": ["w"] * 10, "pairs": 128,
            "dropout": 0.3, "width": 128}
    n = 7
    cells = 2 * n * (4 * 128 * (116 + 128)) + 2 * n * (4 * 128 * (256 + 128))
    attention = n * 256 * 128 + n * 128 + n * 256
    found = dld.count_multiply_adds(dld.build_model(text), torch.full((1, n), 3))
    assert found == cells + attention + 256 * 2


def test_costs_are_plausible(digits):
    config = small("mnist", limit=100, epochs=1)
    runtime = dld.start_runtime(config)
    data = dld.build_data(digits, config)
    state = dld.new_state(dld.build_model(data.meta), config, runtime)
    dld.fit(state, data, config, runtime, lambda state: None)
    cost = dld.measure_cost(state, data, runtime)
    assert cost["multiply_adds"] == 784 * 128 + 2 * 128 * 128 + 128 * 10
    assert 0 < cost["latency_ms"] < 1000 and cost["samples_per_second"] > 1
    assert (dld.peak_memory_mb(runtime) or 51) > 50, 'unknown on Windows'


def test_the_gain_over_the_yardstick_has_a_paired_interval():
    """The oracle: mean and deviation of the differences, with half a sample of each of the four kinds added."""
    rng = np.random.default_rng(0)
    right, simple = (torch.from_numpy(rng.random(500) < share) for share in (0.9, 0.8))
    found = dld.measure_gain(right, simple, "yardstick")
    difference = right.double().numpy() - simple.double().numpy()
    more, weight = np.append(difference, (1, -1, 0, 0)), np.append(np.ones(500), np.full(4, 0.5))
    middle = np.average(more, weights=weight)
    half = 1.959964 * np.sqrt(np.average((more - middle) ** 2, weights=weight) / weight.sum())
    assert found["yardstick_gain"] == pytest.approx(difference.mean())
    assert found["yardstick_gain_low"] == pytest.approx(middle - half)
    assert found["yardstick_gain_high"] == pytest.approx(middle + half)
    same = dld.measure_gain(right, right, "yardstick")
    assert same["yardstick_gain"] == 0 and same["yardstick_gain_low"] == -same["yardstick_gain_high"] > -0.005
    one = dld.measure_gain(torch.tensor([True]), torch.tensor([False]), "yardstick")
    assert one["yardstick_gain"] == 1 and one["yardstick_gain_low"] < 0, "one sample proves nothing"


def test_facts_fingerprint_the_split(digits):
    one, two, other = (dld.build_data(digits, small("mnist", seed=seed)).facts() for seed in (0, 0, 1))
    assert one == two and one["val_rows_sha256"] != other["val_rows_sha256"]
    assert one["test_rows_sha256"] == other["test_rows_sha256"]
    assert np.isclose(one["train_samples"] / (one["train_samples"] + one["val_samples"]), 0.9, atol=0.01)
