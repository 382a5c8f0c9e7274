"""Numbers against independent oracles."""
import math

import numpy as np
import pytest
import torch
from conftest import dld
from scipy.optimize import minimize_scalar  # comes with scikit-learn
from scipy.stats import rankdata
from sklearn import metrics as oracle


def guesses(n, classes, seed=0, skill=0.0):
    """Random logits and labels; with skill the logits know something of the labels."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=rng)
    return torch.randn(n, classes, generator=rng) + skill * torch.eye(classes)[y], y


def area(scores, positive):
    """The share of pairs that are in the right order (Mann and Whitney)."""
    n = positive.sum()
    return (rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum())


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (863, 1000)])
def test_the_interval_agrees_with_wilsons_formula(k, n):
    z, share = 1.959964, k / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    assert dld.wilson(k, n) == pytest.approx((middle - half, middle + half), abs=1e-6)


@pytest.mark.parametrize(("classes", "skill"), [(5, 0.0), (2, 1.0), (10, 4.0)])
def test_measures_agree_with_scikit_learn_and_textbook_formulas(classes, skill):
    logits, y = guesses(400, classes, classes, skill)
    found, predicted = dld.measure(logits, y, 0.7), logits.argmax(1)
    shares, raw = ((logits.double() / t).softmax(1).numpy() for t in (0.7, 1.0))
    right, confidence, gap = (predicted == y).numpy(), shares.max(1), 0.0
    for k in range(15):
        there = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if there.any():
            gap += there.mean() * abs(confidence[there].mean() - right[there].mean())
    expected = {
        "test_accuracy": oracle.accuracy_score(y, predicted),
        "test_macro_f1": oracle.f1_score(y, predicted, average="macro"),
        "test_loss": oracle.log_loss(y, shares),
        "test_loss_uncalibrated": oracle.log_loss(y, raw),
        "test_brier": ((shares - np.eye(classes)[y]) ** 2).sum(1).mean(), "test_ece": gap,
        "test_auc": np.mean([area(shares[:, c], (y == c).numpy()) for c in range(classes)])}
    if classes > 2:
        expected["test_top2_accuracy"] = oracle.top_k_accuracy_score(y, logits.numpy(), k=2)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert ("test_top2_accuracy" in found) == (classes > 2)
    for key in ("test_accuracy", "test_macro_f1"):
        assert found[f"{key}_low"] < found[key] < found[f"{key}_high"]


def test_measures_of_each_class_agree_with_scikit_learn():
    logits, y = guesses(300, 4, 1, 1.0)
    y[y == 3] = 0  # a class that does not occur
    predicted = logits.argmax(1)
    rows = dld.measure_classes(predicted, y, logits.softmax(1), list("abcd"))
    expected = oracle.precision_recall_fscore_support(y, predicted, labels=range(4),
                                                      zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert rows[key].fillna(0).tolist() == pytest.approx(values), key
    assert rows["class"].tolist() == list("abcd")
    assert rows[["recall", "auc"]].isna().all(axis=1).tolist() == [False, False, False, True]


def test_the_interval_of_the_macro_f1_agrees_with_drawing_samples_anew():
    logits, y = guesses(500, 3, 2, 1.5)
    found, rng = dld.measure(logits, y), np.random.default_rng(1)
    drawn = [oracle.f1_score(y[rows], logits.argmax(1)[rows], average="macro")
             for rows in rng.integers(0, 500, (200, 500))]
    interval = found["test_macro_f1_low"], found["test_macro_f1_high"]
    assert interval == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.01)


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_is_the_best_one(scale):
    logits, y = guesses(3000, 5, 4, 2.0)
    logits = logits * scale

    def loss(log_t):
        return oracle.log_loss(y, (logits.double() / math.exp(log_t)).softmax(1).numpy())

    best = math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)
    assert dld.fit_temperature(logits, y) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.7), (0.95, 0.5)])
def test_mcnemar_agrees_with_counting_coin_throws(a, b):
    one, two = np.random.default_rng(0).random((2, 60)) < [[a], [b]]
    first, second = int((one & ~two).sum()), int((two & ~one).sum())
    n = first + second
    tail = sum(math.comb(n, k) for k in range(max(first, second), n + 1)) / 2 ** n
    assert dld.mcnemar(one, two) == pytest.approx(min(1.0, 2 * tail))
    assert dld.mcnemar(one, one) == 1.0


def test_the_same_data_has_not_drifted_from_itself():
    same = {"share of unknown words": (torch.arange(300) % 3).float() / 3,  # of texts of 3 words
            "confidence": 1 - 10.0 ** torch.linspace(-3, -9, 300, dtype=torch.float64)}
    assert not dld.measure_drift(dld.quantiles_of(same), same)["drifted"].any()


def test_multiply_adds_are_what_the_layers_do():
    meta = {"kind": "image", "model": "classic", "channels": 3, "side": 32,
            "classes": list("abcdefghij"), "dropout": 0.5}
    convolutions = zip((32, 16, 8, 4), (3, 32, 64, 128), (32, 64, 128, 256), strict=True)
    by_hand = sum(side * side * before * 9 * width for side, before, width in convolutions)
    by_hand += 1024 * 512 + 512 * 128 + 128 * 10
    model = dld.build_model(meta)
    layers = dld.measure_layers(model, torch.zeros(1, 3, 32, 32))
    assert layers["multiply_adds"].sum() == by_hand
    assert layers["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert (layers["kind"] == "Conv2d").sum() == 4 and layers["output"].iloc[-1] == "10"
    blocks = dld.measure_layers(model, torch.zeros(1, 3, 32, 32), most=10)
    assert blocks.equals(layers), "nothing to put together: no layer is inside a block"


@pytest.mark.parametrize(("model", "blocks"), [("lstm", 0), ("transformer", 0), ("resnet18", 40)])
def test_layers_leave_out_no_weight_and_large_networks_are_shown_in_blocks(model, blocks):
    words = [f"w{i}" for i in range(20)]
    kind = "image" if blocks else "text"
    meta = {"kind": kind, "model": model, "channels": 3, "side": 32, "classes": ["a", "b"],
            "dropout": 0.5, "vocabulary": words, "max_tokens": 8, "pairs": 64, "width": 16,
            "wide": (8, 20)}
    network = dld.build_model(meta)
    x = torch.ones(1, 3, 32, 32) if blocks else torch.ones(1, 6, dtype=torch.int32)
    layers = dld.measure_layers(network, x)
    assert layers["parameters"].sum() == sum(p.numel() for p in network.parameters())
    assert len(layers) <= 40 and layers["multiply_adds"].sum() > 0
    assert not blocks or {"BasicBlock", "Linear"} <= {*layers["kind"]}


def test_the_gain_over_the_baseline_has_a_paired_interval():
    """The oracle: mean and deviation, with half a sample of each of the four kinds added."""
    rng = np.random.default_rng(0)
    right, simple = (torch.from_numpy(rng.random(500) < share) for share in (0.9, 0.8))
    difference = right.double().numpy() - simple.double().numpy()
    more, weight = np.append(difference, (1, -1, 0, 0)), np.append(np.ones(500), np.full(4, 0.5))
    middle = np.average(more, weights=weight)
    spread = np.sqrt(np.average((more - middle) ** 2, weights=weight) / weight.sum())
    low, high = middle - 1.959964 * spread, middle + 1.959964 * spread
    for one, two, expected in ((right, simple, (difference.mean(), low, high)),
                               (simple, right, (-difference.mean(), -high, -low))):
        found = dld.paired_gain(one, two, "x")
        assert [found[key] for key in ("x_gain", "x_gain_low", "x_gain_high")] == pytest.approx(
            expected)
    one = dld.paired_gain(torch.tensor([True]), torch.tensor([False]), "x")
    assert one["x_gain"] == 1 and one["x_gain_low"] < 0, "one sample proves nothing"
