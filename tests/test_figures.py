"""Figures open, are not blank, repeat to the byte, and stand odd input."""
import warnings

import numpy as np
import pytest
import torch
from conftest import dld
from PIL import Image

CLASSES = ["airplane", "automobile", "bird"]
HISTORY = [{"epoch": i + 1, "train_loss": 2 / (i + 1), "val_loss": 2.2 / (i + 1), "train_accuracy": 0.3 + 0.1 * i,
            "val_accuracy": 0.28 + 0.1 * i} for i in range(5)]
RIGHT, WRONG = dld.Verdict("bird", "bird", 0.9), dld.Verdict("airplane", "automobile", 0.55)
PICTURES = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
WORDS = [[("the", 0.1), ("$price$", 0.2), ("was_{x}", 0.3), ("😀", 0.4), ("很好", 0.4)], [("word", 1 / 300)] * 300,
         [("=" * 400, -1.0)]]
BINS = [{"low": 0.2, "high": 0.4, "samples": 9, "confidence": 0.3, "accuracy": 0.4},
        {"low": 0.8, "high": 1.0, "samples": 90, "confidence": 0.9, "accuracy": 1.0}]
FALLS = {against: torch.linspace(1, 0.1, len(dld.SHARES)).double().repeat(5, 1) ** power
         for power, against in enumerate(("random", "untrained", "explained"), 1)}
ROW = {"label": "cifar10 classic", "test_accuracy": 0.9, "test_accuracy_low": 0.88, "test_accuracy_high": 0.92,
       "seconds_training": 10.0, "parameters": 10**6, "multiply_adds": 10**7, "latency_ms": 1.5,
       "samples_per_second": 2000.0}

DRAW = {
    "curves": lambda path: dld.plot_curves(HISTORY, 4, path, "title"),
    "one epoch": lambda path: dld.plot_curves(HISTORY[:1], 1, path, "title"),
    "counts": lambda path: dld.plot_confusion(np.arange(9).reshape(3, 3), CLASSES, path, "title", False),
    "shares": lambda path: dld.plot_confusion(np.zeros((3, 3), int), CLASSES, path, "title", True),
    "two classes": lambda path: dld.plot_confusion(np.ones((2, 2), int), ["negative", "positive"], path, "t", True),
    "pictures": lambda path: dld.plot_image_samples(PICTURES, [RIGHT, WRONG], path, "title"),
    "grey picture": lambda path: dld.plot_image_samples([PICTURES[0][..., 0]], [WRONG], path, "title"),
    "maps": lambda path: dld.plot_image_maps(PICTURES, [RIGHT, WRONG], [{"for bird": np.eye(32)}, {
        "for automobile": np.zeros((32, 32)), "for airplane": np.eye(32)}], path, "t"),
    "texts": lambda path: dld.plot_text_samples(["costs $5 or $6 \\alpha 很好", ""], [RIGHT, WRONG], path, "title"),
    "no validation": lambda path: dld.plot_curves([{**row, "val_loss": float("nan"), "val_accuracy": float("nan")}
                                                   for row in HISTORY], 5, path, "title"),
    "pairs": lambda path: dld.plot_image_samples(PICTURES, [dld.Caption("test:\nbird", dld.BLUE),
                                                            dld.Caption("training:\nbird")], path, "title"),
    "reliability": lambda path: dld.plot_reliability(BINS, BINS[:1], path, "title"),
    "deletion": lambda path: dld.plot_deletion({"gradcam": FALLS}, {"gradcam": "Grad-CAM"}, path, "title"),
    "two deletions": lambda path: dld.plot_deletion({"a": FALLS, "b": FALLS}, {"a": "Attention", "b": "Gradients"},
                                                    path, "title"),
    "overlay": lambda path: dld.plot_overlay({f"fold {i}": HISTORY for i in range(12)}, path, "title"),
    "words": lambda path: dld.plot_text_weights(["", "", ""], [RIGHT, WRONG, RIGHT], WORDS, path, "title"),
    "comparison": lambda path: dld.plot_comparison([ROW, {**ROW, "label": "mnist mlp"}], path, "title"),
}


@pytest.mark.parametrize("kind", DRAW)
def test_figures_are_drawn_and_repeat_to_the_byte(kind, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DRAW[kind](one)
        DRAW[kind](two)
    assert one.read_bytes() == two.read_bytes()
    with Image.open(one) as picture:
        assert 900 <= picture.width <= 1600 and picture.height >= 200
        shades = np.asarray(picture.convert("L"))
    assert (shades < 200).mean() > 0.002 and shades.std() > 5, "blank"
    assert min(shades[:2].min(), shades[-2:].min(), shades[:, :2].min(), shades[:, -2:].min()) > 200, "clipped"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_right_and_wrong_differ_without_colour():
    assert "✓" in RIGHT.line and "✗" in WRONG.line and "true: airplane" in WRONG.line


def test_every_picture_of_a_grid_is_drawn(tmp_path):
    dld.plot_image_samples([np.zeros((8, 8), np.uint8)] * 12, [RIGHT] * 12, tmp_path / "a.png", "title")
    with Image.open(tmp_path / "a.png") as picture:
        black = np.asarray(picture.convert("L")) < 20
    assert black.mean() > 0.25
