"""Numbers against independent oracles."""
import numpy as np
import pytest
import torch
from conftest import dld, small
from scipy.stats import binomtest  # comes with scikit-learn
from sklearn.metrics import accuracy_score, f1_score, log_loss


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (1, 7), (863, 1000), (9432, 10000)])
def test_the_interval_agrees_with_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert dld.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_measures_agree_with_scikit_learn():
    rng = torch.Generator().manual_seed(0)
    logits, y = torch.randn(400, 5, generator=rng), torch.randint(0, 5, (400,), generator=rng)
    found = dld.measure(logits, y)
    predicted = logits.argmax(1)
    assert found["test_accuracy"] == pytest.approx(accuracy_score(y, predicted))
    assert found["test_macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"))
    assert found["test_loss"] == pytest.approx(log_loss(y, logits.double().softmax(1).numpy()), rel=1e-5)
    assert found["test_accuracy_low"] < found["test_accuracy"] < found["test_accuracy_high"]


def test_multiply_adds_are_what_the_layers_do():
    meta = {"kind": "image", "model": "classic", "channels": 3, "side": 32, "classes": list("abcdefghij"),
            "dropout": 0.5}
    by_hand, channels, side = 0, 3, 32
    for width in (32, 64, 128, 256):
        by_hand += side * side * channels * 9 * width
        channels, side = width, side // 2
    by_hand += 1024 * 512 + 512 * 128 + 128 * 10
    assert dld.count_multiply_adds(dld.build_model(meta), torch.zeros(1, 3, 32, 32)) == by_hand
    text = {"kind": "text", "model": "lstm", "classes": ["no", "yes"], "vocabulary": ["w"] * 10, "dropout": 0.3,
            "width": 128}
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
    """The oracle: the deviation of the samples' differences."""
    rng = np.random.default_rng(0)
    right, simple = (torch.from_numpy(rng.random(500) < share) for share in (0.9, 0.8))
    found = dld.measure_gain(right, simple)
    difference = right.double().numpy() - simple.double().numpy()
    half = 1.959964 * difference.std() / 500 ** 0.5
    assert found["yardstick_gain"] == pytest.approx(difference.mean())
    assert found["yardstick_gain_low"] == pytest.approx(difference.mean() - half)
    assert found["yardstick_gain_high"] == pytest.approx(difference.mean() + half)
    same = dld.measure_gain(right, right)
    assert same["yardstick_gain"] == same["yardstick_gain_low"] == 0


def test_repeats_of_training_samples_are_counted_and_left_out():
    texts = ["good film", "bad film", "fine", "poor", "good  film", "new words", "poor"]
    raw = dld.Raw("texts", ["no", "yes"], texts, np.array([1, 0, 1, 0, 1, 0, 0]), 4)
    data = dld.build_data(raw, small("sentiment", val_fraction=0.25))
    found = dld.measure_repeats(data, torch.tensor([True, False, True]))
    assert found == {"test_repeats": 2, "test_accuracy_without_repeats": 0.0}


def test_facts_fingerprint_the_split(digits):
    one, two, other = (dld.build_data(digits, small("mnist", seed=seed)).facts() for seed in (0, 0, 1))
    assert one == two and one["val_rows_sha256"] != other["val_rows_sha256"]
    assert one["test_rows_sha256"] == other["test_rows_sha256"]
    assert np.isclose(one["train_samples"] / (one["train_samples"] + one["val_samples"]), 0.9, atol=0.01)
