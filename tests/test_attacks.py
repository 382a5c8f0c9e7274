"""Hostile files, odd machines and changed data: each case that broke the program once, and what
it does now. Bad input that ends in one line is in test_bad_input.py, requests to the server are in
test_serving.py."""
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of
from PIL import Image
from test_own_data import configure, folder_of_shapes, read, rows_of, table

CPU = ["--device", "cpu", "--precision", "fp32"]
SHORT = [*CPU, "--report", "minimal", "--epochs", "1", "--width", "16", "--batch-size", "20"]
FILMS = [(f"a {'good' if i % 2 else 'bad'} film, number {i * i}", "pn"[i % 2]) for i in range(80)]


def said(capsys, *flags, code=0):
    """What the program says on the screen."""
    capsys.readouterr()
    assert dld.main([*map(str, flags)]) == code
    out = capsys.readouterr()
    return out.out + out.err


def start(task, data, *flags):
    return ["--task", task, "--data", data, *SHORT, *flags]


# -- data that has changed -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a table."""
    place = tmp_path_factory.mktemp("trained")
    path = table(place / "film.csv", FILMS, head=("text", "label"))
    assert dld.main([*start("text", str(path)), "--output-dir", str(place)]) == 0
    return place / "text-film"


@pytest.fixture
def film(trained, tmp_path, monkeypatch, undrawn):
    """A copy of it, and of its table, which lies beside the outputs."""
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained, tmp_path / "outputs" / "text-film")
    config = json.loads((run / "config.json").read_text("utf-8"))
    data = str(table(tmp_path / "film.csv", FILMS, head=("text", "label")))
    (run / "config.json").write_text(json.dumps({**config, "data": data}), "utf-8")
    return run


def reorder(rows):
    return random.Random(0).sample(rows, len(rows))


@pytest.mark.parametrize("change", [reorder, lambda rows: rows[:60], lambda rows: [
    *rows[:-1], (rows[-1][0], "p")]], ids=["another order", "fewer rows", "another label"])
def test_a_run_is_neither_resumed_nor_measured_again_on_changed_data(film, change, capsys):
    path, before = film.parent.parent / "film.csv", (film / "model.pt").read_bytes()
    table(path, change(FILMS), head=("text", "label"))
    for flags in (["--resume", film, "--epochs", 2], ["--evaluate", "--run", film]):
        assert "film.csv" in said(capsys, *flags, *CPU[:2], code=2).replace("film has", "film.csv")
    assert (film / "model.pt").read_bytes() == before
    out = said(capsys, "--evaluate", "--run", film, "--data", path, *CPU[:2])
    n = len(change(FILMS))
    assert f"of {n} labelled samples" in out and "was trained on" in out
    table(path, FILMS, head=("text", "label"))
    assert "DIFFERENT" not in said(capsys, "--evaluate", "--run", film, *CPU[:2])
    assert "after 1 epoch" in said(capsys, "--resume", film, "--epochs", 2, *CPU[:2])


def test_the_weights_of_init_say_which_test_samples_they_have_learnt(film, capsys):
    table(film.parent.parent / "again.csv", reorder(FILMS), head=("text", "label"))
    flags = [flag for flag in start("text", "again.csv") if flag not in ("--width", "16")]
    assert "was trained on too" in said(capsys, *flags, "--init", film)
    metrics = metrics_of(film.parent / "text-again")
    faults = pd.read_csv(film.parent / "text-again" / "faults.csv")
    learnt = faults[faults["fault"] == "learnt by --init"]
    assert 0 < len(learnt) == metrics["test_repeats"] <= metrics["test_samples"] == 16


def test_labelled_data_is_measured_as_a_whole(film, tmp_path, capsys):
    new = [(i, f"{text}, once more", label) for i, (text, label) in enumerate(FILMS[:27])]
    path = table(tmp_path / "new.csv", [*new, (99, "neither", "q")], head=("id", "text", "label"))
    out = said(capsys, "--predict", path, "--run", film, "--output", tmp_path / "p.csv", *CPU)
    assert "of 27 labelled samples (95% interval" in out and "1 sample of classes that" in out
    rows = rows_of(tmp_path / "p.csv")
    assert [(row["text"], row["label"]) for row in rows[:27]] == [row[1:] for row in new]
    right = sum(row["label"] == row["predicted"] for row in rows[:27])
    assert f"{right / 27:.2%} of 27" in out
    out = said(capsys, "--evaluate", "--run", film, "--data", path, *CPU[:2])
    assert f"{right / 27:.2%} of 27" in out and "DIFFERENT" not in out


def test_pictures_are_measured_as_a_whole(tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_shapes(tmp_path / "shapes", 60)
    assert dld.main(start("images", "shapes")) == 0
    folder_of_shapes(tmp_path / "new", 87)
    for i, path in enumerate(sorted((tmp_path / "new").rglob("*.png"))):  # 27 new ones, larger
        if int(path.stem) < 60:
            path.unlink()
        elif i % 2:
            Image.open(path).resize((64, 64)).save(path)
    out = said(capsys, "--evaluate", "--run", "outputs/images-shapes", "--data", "new", *CPU[:2])
    assert "of 27 labelled samples" in out and "trained on" not in out


def test_other_built_in_data_is_measured_and_not_compared(tmp_path, finished, capsys):
    run = shutil.copytree(finished["mnist"], tmp_path / "run")
    saved = torch.load(run / "model.pt", weights_only=True)
    saved["meta"]["fingerprint"] = "of other data"
    torch.save(saved, run / "model.pt")
    out = said(capsys, "--evaluate", "--run", run, "--data", "offline", *CPU[:2])
    assert "test samples of offline digits" in out and "recorded" not in out


# -- tables and pictures -------------------------------------------------------------------------

ROWS = [f"film {i} was good,{'pn'[i % 2]}" for i in range(200)]
TABLES = [
    ("text,label", [*ROWS[:50], '"' + ROWS[50], *ROWS[51:]], 199,
     "row 51: a quote that is never closed (line 52)"),
    ("text,label", [*ROWS[:50], '"' + ROWS[50], *ROWS[51:150], '"a, b",p'], 150, "(line 52)"),
    ("text,label,text", [f"{row},other" for row in ROWS], 200, "of several called text the first"),
    ("label,text", ["p,good, a lot", *(row[::-1] for row in ROWS)], 200, "3 cells, where"),
    ("text,label,split", [f"{row},{'test' if i % 5 else 'train'}" for i, row in enumerate(ROWS)]
     + ["film,p,unused"], 200, "split (the part)"),
    ("text;label", [f"film {i}, {'was , good,' * (i % 3)};{'pn'[i % 2]}" for i in range(99)], 99,
     "Columns text (the text) and label"),
    ("text,label", [*ROWS, "a,P"], 201, "the classes 'P', 'p' differ in case"),
    ("text,label", [*ROWS, "a,nan"], 201, "the class 'nan': are these samples without"),
]


@pytest.mark.parametrize(("head", "rows", "kept", "note"), TABLES, ids=[row[-1] for row in TABLES])
def test_what_is_odd_in_a_table_is_said(head, rows, kept, note, tmp_path, capsys):
    (tmp_path / "own.csv").write_text("\n".join([head, *rows]))
    raw = read("text", tmp_path / "own.csv", tmp_path)
    config = configure("text", tmp_path / "own.csv", tmp_path)
    data = dld.build_dataset(raw, config)
    notes = dld.check_dataset(data, config, dld.DistributedContext())
    assert note in capsys.readouterr().out + "\n".join(notes)
    assert len(raw.x) == kept and "other" not in raw.x and "film" in raw.x[0] + raw.x[0][::-1]


def deep(values, kind):
    return Image.fromarray(np.asarray(values).astype(kind))


GREY = np.arange(16).reshape(4, 4) * 16.0
DEPTHS = [  # white in the file, what it is stored as
    (4095, np.uint16), (65535, np.uint16), (255, np.uint16), (1, np.float32), (255, np.float32),
    (255, np.int32), (4095, np.int32)]


@pytest.mark.parametrize(("white", "kind"), DEPTHS)
def test_deep_pictures_are_scaled_by_what_they_hold(white, kind, tmp_path):
    path = tmp_path / ("x.png" if kind == np.uint16 else "x.tif")
    deep(GREY / 240 * white, kind).save(path)
    x = dld.read_picture(path, {"side": 4, "channels": 1, "light_on_dark": False})
    assert np.abs(x[0] - GREY / 240 * 255).max() <= 2


def test_deep_pictures_of_one_data_set_are_scaled_alike(tmp_path):
    for label, white in (("dark", 900), ("bright", 60_000)):
        (tmp_path / "deep" / label).mkdir(parents=True)
        for i in range(4):
            deep(GREY / 240 * white, np.uint16).save(tmp_path / "deep" / label / f"{i}.png")
    raw = read("images", tmp_path / "deep", tmp_path, image_size=4)
    means = [raw.x[raw.y == raw.classes.index(label)].mean() for label in ("dark", "bright")]
    assert means[1] > 30 * means[0]
    meta = dld.build_dataset(raw, configure("images", tmp_path / "deep", tmp_path)).meta
    again = dld.read_picture(tmp_path / "deep" / "dark" / "0.png", meta)
    assert again.mean() == pytest.approx(means[0], abs=1)


def test_deep_pictures_of_either_byte_order_are_grey(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "deep" / label).mkdir(parents=True)
        page = Image.frombytes("I;16B", (4, 4), (GREY * 250).astype(">u2").tobytes())
        page.save(tmp_path / "deep" / label / "x.tif")
    assert read("images", tmp_path / "deep", tmp_path).x.shape[1] == 1


@pytest.mark.parametrize("values", [GREY - 300, GREY * np.nan, GREY * 1e9])
def test_pictures_whose_white_is_not_known_are_refused(values, tmp_path):
    deep(values, np.float32).save(tmp_path / "x.tif")
    with pytest.raises(dld.UnreadableSample, match="save it with 8 bits"):
        dld.read_picture(tmp_path / "x.tif", {"side": 4, "channels": 1, "light_on_dark": False})


@pytest.mark.skipif(sys.platform == "win32", reason="no such links")
def test_only_regular_files_are_read_and_links_that_lead_back_are_not_followed(
        tmp_path, finished, capsys):
    root = folder_of_shapes(tmp_path / "shapes", 30)
    os.mkfifo(root / "ring" / "pipe.png")
    os.symlink("/dev/zero", root / "ring" / "zero.png")
    os.symlink("..", root / "ring" / "up")
    os.symlink(root, root / "star" / "top")
    raw = read("images", root, tmp_path)
    assert len(raw.x) == 30 and {*raw.skipped} == {
        (f"ring/{name}.png", "neither a file nor a link to one") for name in ("pipe", "zero")}
    for path in (root / "ring" / "pipe.png", "/dev/zero"):
        out = said(capsys, "--predict", path, "--run", finished["mnist"], code=2)
        assert "neither a file nor a link to one" in out and out.count("\n") == 1
    os.mkfifo(tmp_path / "pipe.csv")
    for flags, code in ((["--config", tmp_path / "pipe.csv"], 2),
                        (["--task", "text", "--data", tmp_path / "pipe.csv"], 3),
                        (["--predict", tmp_path / "pipe.csv", "--run", finished["sentiment"]], 3)):
        assert "neither a file nor a link to one" in said(capsys, *flags, code=code)


# -- suspect labels, weights ---------------------------------------------------------------------


def test_no_more_labels_are_suspected_than_can_be_wrong():
    rng, n = np.random.default_rng(0), 5000
    # Weak but calibrated: the truth is drawn from what the network says.
    probs = torch.tensor(rng.dirichlet([0.1] * 10, n))
    drawn = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    rows = torch.arange(n)
    flagged = len(dld.find_suspect_labels(rows, "val", drawn, probs))
    assert flagged > 2 * dld.most_wrong_labels(drawn, probs) > 0
    # Strong, and one label in 25 is wrong: it suspects them, and few others.
    sure = probs.argmax(1)
    probs = 0.96 * torch.nn.functional.one_hot(sure, 10) + 0.004 * torch.ones(n, 10).double()
    y = torch.where(rows % 25 == 0, (sure + 1) % 10, sure)
    found = dld.find_suspect_labels(rows, "val", y, probs)[:dld.most_wrong_labels(y, probs)]
    assert {one["row"] for one in found} == {*range(0, n, 25)}
    assert {one["part"] for one in found} == {"val"}
    assert dld.most_wrong_labels((sure + 1) % 10, probs) == 0, "a network that knows nothing"


class Fixed(torch.nn.Module):
    """Says what it is told to."""

    def forward(self, x):
        return self.logits[:len(x)]


def test_with_balanced_weights_the_best_epoch_is_the_one_that_is_fair_to_rare_classes():
    y = np.array([0] * 9 + [1])
    x = np.zeros((30, 1, 8, 8), np.uint8)
    raw = dld.RawData("", ["a", "b"], x, np.tile(y, 3), 20, n_val=10)
    common = torch.tensor([[1.0, 0.0]] * 10)  # 90 % right, half of the classes
    fair = torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 0.0]] * 6 + [[0.0, 1.0]])  # 70 %, 5 of 6
    for how, best in (("none", 1), ("balanced", 2)):
        config = dld.resolve_config({"class_weights": how, "device": "cpu", "views": False})
        data = dld.build_dataset(raw, config)
        machine = dld.start_machine(config)
        state = dld.new_train_state(torch.nn.Linear(1, 1), config, machine)
        state.model, state.plan = Fixed(), [(0, 9)]
        context = dld.Context(config, data, machine, dld.Checkpointer())
        for logits in (common, fair):
            order = data.labels[data.parts["val"]].argsort(stable=True)
            state.model.logits, state.seen = torch.empty(10, 2), 1
            state.model.logits[order] = logits
            dld.close_epoch(state, context)
        assert state.best["epoch"] == best and state.best_weights._metadata, how
        assert [round(row["val_balanced_accuracy"], 3) for row in state.history] == [0.5, 0.833]


# -- runs that were lost -------------------------------------------------------------------------


def test_a_thousand_classes_take_little_memory_and_readable_files(tmp_path, monkeypatch, undrawn):
    k, rng = 1000, np.random.default_rng(0)
    matrix = np.zeros((k, k), int)
    np.add.at(matrix, (rng.integers(0, k, 10_000), rng.integers(0, k, 10_000)), 1)
    tracemalloc.start()
    low, high = dld.bootstrap_f1(matrix, draws=200)
    assert tracemalloc.get_traced_memory()[1] < 300e6 and 0 < low < high < 0.01
    tracemalloc.stop()
    names = [f"class {i:03}" for i in range(k)]
    small, shown = dld.condense(matrix, names)
    assert small.sum() == matrix.sum() and len(shown) == 21 and shown[-1] == "980 others"
    y = np.arange(3 * k) % k
    x = rng.integers(0, 255, (3 * k, 1, 4, 4), dtype=np.uint8)
    raw = dld.RawData("many", names, x, y, 2 * k, "many")
    monkeypatch.setitem(dld.TASKS, "many", dld.Task(
        "image", offline=lambda: raw, defaults={"model": "mlp"}))
    assert dld.main(["--task", "many", "--data", "offline", "--output-dir", str(tmp_path), *SHORT,
                     "--val-fraction", "0.4"]) == 0
    run = tmp_path / "many-many"
    assert (run / "predictions.csv").stat().st_size < 100_000
    page = (run / "report.html").read_text("utf-8")
    assert page.count("class 9") < 200 and "all are in classes.csv" in page
    assert len(rows_of(run / "classes.csv")) == k


def test_names_that_are_no_unicode_are_cleaned_where_they_come_in(
        tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["caf\udce9", "a\x1b[31m\nb", "=HYPERLINK(1)"]
    try:
        folder_of_shapes(tmp_path / "names", 60)
        for name, new in zip(("circle", "ring", "star"), names, strict=True):
            (tmp_path / "names" / name).rename(tmp_path / "names" / new)
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    out = said(capsys, *start("images", "names", "--output-dir", "out\udce9"))
    assert "\x1b" not in out
    run = tmp_path / "out\udce9" / "images-names"
    classes = [row["class"] for row in rows_of(run / "classes.csv")]
    assert classes == ["'=HYPERLINK(1)", r"a\x1b[31m b", "café"], "and no formula"
    assert {row["true"] for row in rows_of(run / "predictions.csv")} == {*classes}
    assert dld.read_config(run / "config.json")["output_dir"] == "out\udce9"
    said(capsys, "--predict", "names", "--run", run, "--output", "p.csv")
    assert {row["name"].split("/")[1] for row in rows_of(tmp_path / "p.csv")} == {
        "café", r"a\x1b[31m b", "=HYPERLINK(1)"}
    rows = [f'{{"text": "film {i} \\ud800", "label": "\\udc00{i % 2}"}}' for i in range(40)]
    (tmp_path / "half.jsonl").write_text("\n".join(rows))
    said(capsys, *start("text", "half.jsonl"))
    assert rows_of(tmp_path / "outputs/text-half/classes.csv")[0]["class"] == "\ufffd0"
    assert "100" in said(capsys, "--predict", "\ud800 \udce9", "--run", "outputs/text-half") + "100"


@contextlib.contextmanager
def room_for_files_of(size):
    """A larger file does not fit, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_no_room_for_the_prepared_data_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_shapes(tmp_path / "shapes", 60)
    with room_for_files_of(200):
        last = said(capsys, *start("images", "shapes"), code=3).splitlines()[-1]
        with pytest.raises(dld.DataError, match="no room for the prepared data"):
            dld.tokenize_once(tmp_path / "cache", "films", lambda: ["a good film"] * 100)
    assert last.startswith(f"error: no room for the prepared data, neither in {tmp_path}")
    assert last.endswith("make room, or name another --data-dir")


def test_pictures_that_cannot_fit_the_disk_are_not_begun(tmp_path):
    with pytest.raises(OSError, match="MB needed"):  # mapped, they would end the process
        dld.decode_pictures(range(10**9), {"side": 64, "channels": 3}, tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_disk_that_fills_costs_what_does_not_fit_alone(tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "mnist", "--data", "offline", *SHORT, "--width", "128"]
    with room_for_files_of(250_000):
        out = said(capsys, *flags, code=1)
    run = tmp_path / "outputs" / "mnist-offline-digits"
    assert "WARNING  cannot save" in out and "WARNING  1 file of" in out and "Test accuracy" in out
    assert out.splitlines()[-1].startswith("error: 1 file of") and "make room" in out
    assert metrics_of(run)["status"] == "failed" and (run / "report.html").exists()
    assert not (run / "model.pt").exists()
    said(capsys, "--resume", run)
    assert (run / "model.pt").exists() and metrics_of(run)["status"] == "finished"


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_what_does_not_fit_the_disk_is_named(tmp_path):
    with room_for_files_of(100), pytest.raises(OSError) as told:
        dld.write_text(tmp_path / "a.txt", "x" * 200)
    assert told.value.filename == str(tmp_path / "a.txt") and not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_an_export_that_does_not_fit_the_disk_is_one_line(finished, capsys):
    run = finished["mnist"]
    with room_for_files_of(100_000):  # torch, writing the file itself, would end the process
        out = said(capsys, "--export", "pt2", "--run", run, code=1)
    assert out.startswith("error: cannot write") and out.count("\n") == 1
    assert not [*run.glob(".*.part")]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_disk_that_takes_neither_figures_nor_folds_ends_in_one_line(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, file, **more: file.write_bytes(bytes(9_000)))
    with room_for_files_of(8_000):
        out = said(capsys, "--task", "mnist", "--data", "offline", *SHORT, "--folds", "2", code=1)
    assert "fold 2/2" in out and "Test accuracy" in out
    assert out.splitlines()[-1].startswith("error: ") and "(folds.pt, " in out.splitlines()[-1]


def test_a_folder_that_vanishes_is_made_again(tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    run, usual = tmp_path / "outputs" / "mnist-offline-digits", dld.log_epoch

    def vanish(some, state):
        epochs = usual(some, state)
        shutil.rmtree(run)
        return epochs

    monkeypatch.setattr(dld, "log_epoch", vanish)
    monkeypatch.setattr(dld.Checkpointer, "save_if_due", lambda *_: None)
    out = said(capsys, "--task", "mnist", "--data", "offline", *SHORT)
    assert "WARNING" in out and "is gone" in out
    for name in ("model.pt", "report.html", "config.json", "metrics.json", "predictions.csv"):
        assert (run / name).exists()


@pytest.mark.parametrize("model", ["fast", "classic"])
def test_pictures_of_any_size_can_be_learnt(model):
    for side in (4, 5, 8, 9, 300, 505, 1024):
        config = dld.resolve_config({"task": "images", "data": "x", "model": model},
                                    size=(1000, side))
        assert config.batch_size > 1 and config.batch_size * side ** 2 <= 2 ** 22 + 500 * 1024
        meta = {"kind": "image", "model": model, "side": side, "channels": 1, "width": 8,
                "dropout": 0.1, "classes": ["a", "b"], "patches": torch.eye(4).tolist()}
        network = dld.build_model(meta).eval()
        assert sum(p.numel() for p in network.parameters()) < 3e6
        x = torch.rand(1, 1, side, side)
        with torch.no_grad():
            assert network(x).shape == (1, 2)
        if side < 9:
            maps, = dld.explain_images(network, x, torch.tensor([0])).values()
            assert maps.shape == (1, side, side)


def test_the_smallest_pictures_end_in_a_full_report(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    folder_of_shapes(tmp_path / "shapes", 60)
    assert dld.main([*start("images", "shapes", "--image-size", "4"), "--report", "full"]) == 0
    assert "near_repeats" in metrics_of(tmp_path / "outputs" / "images-shapes")


# -- the screen ----------------------------------------------------------------------------------


@contextlib.contextmanager
def stream(name, new):
    before = getattr(sys, name)
    setattr(sys, name, new)
    try:
        yield
    finally:
        setattr(sys, name, before)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_screen_that_is_full_closed_or_gone_changes_nothing_but_a_lost_prediction(
        tmp_path, monkeypatch, finished, undrawn):
    monkeypatch.chdir(tmp_path)
    ask = ["--predict", "a good film", "--run", str(finished["sentiment"])]
    for new in (None, open("/dev/full", "w")):  # noqa: SIM115
        with stream("stdout", new), stream("stderr", new):
            assert dld.main(ask) == (1 if new else 0)
            assert dld.main(["--lr", "x"]) == 2
            assert not new or dld.main(["--task", "mnist", "--data", "offline", *SHORT]) == 0
    assert [*tmp_path.glob("outputs/*/report.html")]
    handler, (reader, writer), stderr = dld.InterruptHandler(), os.pipe(), os.dup(2)
    os.close(reader)
    os.dup2(writer, 2)  # nobody reads it
    try:
        handler.deferring = True
        with handler:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.dup2(stderr, 2)
    assert handler.requested and not handler.raised


def test_what_is_printed_or_written_commands_nothing(tmp_path, finished, undrawn, capsys):
    for name in ("$(touch boom)", "a b", "it's", "`x`", "plain/x.csv"):
        shell = ["sh", "-c", f"printf %s {dld.quoted(dld.Path(name))}"]
        assert sys.platform == "win32" or subprocess.check_output(shell, text=True) == name
    assert dld.printable("a\x1b[2J\x07\u202eb\tc\nd é") == r"a\x1b[2J\x07\u202eb" + "\tc\nd é"
    cells = ["=1+1", "+x", "-x", "@x", "\tx", "-1", "+2.5e3", "a\0b", 7, -1.5, ""]
    dld.write_csv(tmp_path / "x.csv", pd.DataFrame({"cell": cells, "n": range(len(cells))}))
    with (tmp_path / "x.csv").open(newline="") as file:
        found = [row["cell"] for row in csv.DictReader(file)]
    assert found == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "-1", "+2.5e3", "a b", "7", "-1.5",
                     ""]
    for name in ("a|b`c<i>", "[x](y)"):
        shutil.copytree(finished["mnist"], tmp_path / name)
    report, _ = dld.write_comparison([tmp_path / "a|b`c<i>", tmp_path / "[x](y)"], tmp_path)
    text = report.read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in rows} == {4}
    assert r"a\|b\`c\<i\>" in text and r"\[x\](y)" in text
