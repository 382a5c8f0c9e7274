"""Figures open, are not blank, repeat to the byte, and stand odd input."""
import contextlib
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

EPOCHS = np.arange(5)
HISTORY = pd.DataFrame({"epoch": EPOCHS + 1, "train_loss": 2 / (EPOCHS + 1),
                        "val_loss": 2.2 / (EPOCHS + 1), "train_accuracy": 0.3 + 0.1 * EPOCHS,
                        "val_accuracy": 0.28 + 0.1 * EPOCHS})
RIGHT, WRONG = dld.Verdict("bird", "bird", 0.9), dld.Verdict("airplane", "automobile", 0.55)
NOTES = [dld.Verdict("test:\nbird", colour=dld.BLUE), dld.Verdict("training:\nbird")]
PICTURES = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
SURE, Y = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3
FALLS = {against: torch.linspace(1, 0.1, len(dld.DELETED_SHARES)).double().repeat(5, 1) ** power
         for power, against in enumerate(("random", "untrained", "explained"), 1)}
RUNS = pd.DataFrame({"label": ["cifar10 classic", "mnist mlp"], "test_accuracy": 0.9,
                     "test_accuracy_low": 0.88, "test_accuracy_high": 0.92,
                     "seconds_training": 10.0, "parameters": 10**6, "multiply_adds": 10**7,
                     "latency_ms": 1.5, "samples_per_second": 2000.0})

LAYERS = pd.DataFrame({"layer": [f"body.{i}" for i in range(8)], "kind": "ConvolutionOfManyKinds",
                       "output": "256 x 112 x 112", "parameters": 12_345_678, "multiply_adds": 9})
CURVE = (np.array([0, 0.2, 1]), np.array([0, 0.8, 1]), np.array([0.5, 0.9, 1]),
         np.array([1, 0.8, 0]))

DRAW = {
    "curves": (dld.plot_curves, HISTORY, 4),
    "one epoch, no validation": (dld.plot_curves, HISTORY[:1].assign(
        val_loss=np.nan, val_accuracy=np.nan), 1),
    "many histories": (dld.plot_histories, {f"fold {i}": HISTORY for i in range(8)}),
    "histories, long names": (dld.plot_histories, {
        f"outputs/a/rather/long/path/{i}": HISTORY for i in range(7)}),
    "confusion, long names": (dld.plot_confusion, np.arange(9).reshape(3, 3),
                              ["airplane", "automobile", "$bird$ {x}"]),
    "pictures": (dld.plot_pictures, [PICTURES[0], PICTURES[1][..., 0]], [RIGHT, WRONG]),
    "pairs": (dld.plot_pictures, PICTURES, NOTES),
    "maps": (dld.plot_maps, PICTURES, [RIGHT, WRONG], [{"for bird": np.eye(32)}, {
        "for automobile": np.zeros((32, 32)), "for airplane": np.eye(32)}]),
    "texts": (dld.plot_texts, ["costs $5 or $6 \\alpha 很好 😀", ""], [RIGHT, WRONG]),
    "reliability": (dld.plot_reliability, dld.calibration_bins(SURE, Y),
                    dld.calibration_bins(SURE[:1], Y[:1])),
    "deletion": (dld.plot_deletion, {"attention": FALLS, "evidence": FALLS}),
    "comparison": (dld.plot_comparison, RUNS),
    "roc": (dld.plot_roc, {"$a$": CURVE, "b": CURVE}),
    "balance": (dld.plot_balance, {part: np.array([50, 9, 700]) for part in ("a", "b", "c")},
                ["bird", "a class with a rather long name", "$x$"]),
    "lengths": (dld.plot_lengths, np.arange(1000), 400),
    "architecture": (dld.plot_architecture, LAYERS, "3 x 224 x 224"),
}


@pytest.mark.parametrize("what", DRAW)
def test_figures_are_drawn(what, tmp_path, monkeypatch):
    monkeypatch.setattr(dld, "FIGURE_DPI", 100)  # a coarse one cuts through its own frames
    plot, *given = DRAW[what]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(*given, tmp_path / "a.png", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as picture:
        inches = picture.width / dld.FIGURE_DPI, picture.height / dld.FIGURE_DPI
        assert 6 <= inches[0] <= 10.7 and inches[1] >= 1.3
        shades = np.asarray(picture.convert("L"))
    assert (shades < 200).mean() > 0.002 and shades.std() > 5, "blank"
    for edge in (shades[:2], shades[-2:], shades[:, :2], shades[:, -2:]):
        assert edge.min() > 200, "clipped"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn from now on."""
    figures, canvas = [], dld.canvas

    @contextlib.contextmanager
    def keeping(*given):
        with canvas(*given) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(dld, "canvas", keeping)
    return figures


def test_a_long_class_name_does_not_run_into_a_text(tmp_path, drawn):
    name = "question about the invoice amount"
    dld.plot_texts(["My parcel did not come. " * 9], [dld.Verdict(f"no {name}", name, 0.5)],
                   tmp_path / "a.png", "title")
    verdict, text = (each.get_window_extent() for each in drawn[0].axes[0].texts)
    assert verdict.x1 < text.x0 and text.x1 < drawn[0].bbox.x1


def test_wide_intervals_are_drawn_whole_and_no_number_is_struck_through(tmp_path, drawn):
    wide = {"accuracy": [0.5, 0.3], "low": [0.33, 0.14], "high": [0.67, 0.54]}
    dld.plot_parts(pd.DataFrame({"key": ["test", "x"], "name": ["a", "b"], **wide}),
                   tmp_path / "a.png", "title")
    dld.plot_comparison(RUNS.assign(test_accuracy=wide["accuracy"], test_accuracy_low=wide["low"],
                                    test_accuracy_high=wide["high"]), tmp_path / "b.png", "title")
    for figure in drawn:
        axes = figure.axes[0]
        edge = axes.get_window_extent().x1
        for high, number in zip(wide["high"], axes.texts, strict=True):
            end = axes.transData.transform((100 * high, 0))[0]
            assert end < number.get_window_extent().x0 < number.get_window_extent().x1 < edge


def test_figures_repeat_to_the_byte(tmp_path):
    plot, *given = DRAW["maps"]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    for path in (one, two):
        plot(*given, path, "title")
    assert one.read_bytes() == two.read_bytes()


def test_the_areas_beside_the_curves_are_those_of_scikit_learn(tmp_path, drawn):
    random = np.random.default_rng(0)
    truth = random.integers(2, size=200)
    score = np.round(truth * 0.3 + random.random(200), 1)  # with ties
    found = types.SimpleNamespace(y=torch.tensor(1 - truth), probs=torch.tensor(score)[:, None])
    dld.plot_roc({"_a": dld.roc_and_precision(found, 0)}, tmp_path / "a.png", "title")
    areas = roc_auc_score(truth, score), average_precision_score(truth, score)
    said = drawn[0].legends[0].get_texts()[0].get_text()
    assert said == " _a ({:.3f}, {:.3f})".format(*areas)


def test_long_captions_end_before_the_next_picture():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    name = "Ein sehr langer Klassenname & mehr_als_das"
    figure = Figure(dpi=100)
    FigureCanvasAgg(figure)
    for verdict in (dld.Verdict(name, name, 1.0), dld.Verdict(f"for {name}"),
                    dld.Verdict(name, "cat", 0.5)):
        box = figure.text(0, 0, verdict.caption, fontsize=9).get_window_extent()
        assert box.width / 100 < 7.94 / 6, "inches from one picture to the next"


def test_the_names_of_40_classes_can_be_read_on_a_page(tmp_path):
    names = [f"class {i}" for i in range(40)]
    dld.plot_confusion(np.eye(40, dtype=int), names, path := tmp_path / "a.png", "")
    with Image.open(path) as image:
        assert image.width / dld.FIGURE_DPI < 15, "a wider one is made smaller, its letters too"


def test_no_legend_covers_a_point_of_the_calibration(tmp_path, drawn):
    bins = dld.calibration_bins(SURE.softmax(1), Y)
    dld.plot_reliability(bins, bins, tmp_path / "a.png", "")
    upper, [legend] = drawn[0].axes[0], drawn[0].legends
    assert upper.get_legend() is None
    assert not legend.get_window_extent().overlaps(upper.get_window_extent())
