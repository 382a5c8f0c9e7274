"""The user's own pictures and texts: found, split, cached, trained on, predicted in bulk."""
import csv
import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of
from PIL import Image, ImageOps

OWN = {"device": "cpu", "precision": "fp32"}
REVIEWS = [(i, f"a {'good' if i % 2 else 'bad'} film number {i}, seen in the cinema",
            "pos" if i % 2 else "neg") for i in range(60)]


def folder_of_shapes(root, n, names=("circle", "ring", "star")):
    """n pictures of shapes, one folder a class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, len(names), n)
    x, _ = dld.draw_shapes(np.array([list(dld.SHAPES).index(names[i]) for i in y]), rng)
    for i, (label, pixels) in enumerate(zip(y, x, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels.transpose(1, 2, 0)).resize((32 + i % 7, 32))
        picture.save(root / names[label] / f"{i}.png")
    return root


def table(path, rows, head=("id", "review", "sentiment"), delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows] if head else rows)
    return path


def rows_of(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def configure(task, data, folder, **settings):
    return dld.resolve_config({"task": task, "data": str(data), "data_dir": str(folder / "memory"),
                               **OWN, **settings})


def read(*arguments, **settings):
    return dld.load_raw(configure(*arguments, **settings), dld.Log())


def start(config):
    """Its data set, its network before the first step, and what was said."""
    data = dld.build_dataset(dld.load_raw(config, dld.Log()), config)
    state, said = dld.start_training(data, config, dld.start_machine(config))
    return data, state.model.state_dict(), said


def test_pictures_in_folders_are_split_with_every_class_in_every_part(tmp_path):
    raw = read("images", folder_of_shapes(tmp_path / "shapes", 60), tmp_path)
    assert raw.classes == ["circle", "ring", "star"] and raw.x.shape == (60, 3, 32, 32)
    rows = {part: rows.numpy() for part, rows in dld.split_rows(raw, dld.Config()).items()}
    assert raw.n_train == 48 and all(set(raw.y[rows[part]]) == {0, 1, 2} for part in dld.PARTS)
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "shapes" / "ring" / f"new{i}.png")
    again = read("images", tmp_path / "shapes", tmp_path)
    assert len({*raw.names[48:]} & {*again.names[50:]}) >= 10, "which moves few of the others"


def test_classes_are_in_the_order_in_which_people_count():
    names = ["2", "010", "a", "a0", "a1b", "a2", "a10", "b"]
    found = [dld.SampleFile("", name, "", "") for name in reversed(names)]
    assert dld.class_names("", found) == names


def test_parts_that_somebody_named_are_kept_and_a_class_missing_in_one_shifts_no_label(tmp_path):
    parts = {"Train": (30, ("circle", "ring", "star")), "valid": (8, ("circle", "star")),
             "test": (9, ("ring", "star"))}
    for part, (n, names) in parts.items():
        folder_of_shapes(tmp_path / "shapes" / part, n, names)
    folder_of_shapes(tmp_path / "shapes" / "holdout", 3)
    raw = read("images", tmp_path / "shapes", tmp_path)
    assert [why for _, why in raw.skipped] == ["in no class of train, val or test"] * 3
    rows = dld.split_rows(raw, dld.Config())
    for part, (folder, (n, _)) in zip(("train", "val", "test"), parts.items(), strict=True):
        assert len(rows[part]) == n
        assert all(raw.names[i].startswith(f"{folder}/{raw.classes[raw.y[i]]}/")
                   for i in rows[part].tolist())


def test_unreadable_files_are_skipped_and_the_others_stay_with_their_labels(tmp_path):
    root = folder_of_shapes(tmp_path / "around" / "shapes", 40)  # as archives have it
    bad = {"ring/broken.jpg": b"\xff\xd8 no picture", "star/empty.png": b"", "star/a.txt": b"hello",
           "beside.png": b"in no class"}
    for name, blob in {**bad, "ring/._1.png": b"of a Mac"}.items():
        (root / name).write_bytes(blob)
    raw = read("images", tmp_path / "around", tmp_path)
    assert {name for name, _ in raw.skipped} == {*bad} and len(raw.x) == len(raw.names) == 40
    form = {"side": 32, "channels": 3, "light_on_dark": False}
    for name, y, x in zip(raw.names, raw.y, raw.x, strict=True):
        assert name.startswith(raw.classes[y])
        assert np.array_equal(x, next(dld.ImageData.read_inputs(str(root / name), form))[1])


def test_pictures_are_decoded_once_and_again_when_one_has_changed(tmp_path, capsys):
    root = folder_of_shapes(tmp_path / "shapes", 20)

    def again(decoded, **settings):
        capsys.readouterr()
        raw = read("images", root, tmp_path, **settings)
        assert ("Decoding 20 pictures" in capsys.readouterr().out) == decoded
        return raw

    assert again(True, image_size=16, colour="grey").x.shape == (20, 1, 16, 16)
    again(True)
    assert again(False, test_fraction=0.4).n_train == 12, "another split needs no new decoding"
    changed = next((root / "ring").iterdir())
    Image.new("RGB", (50, 40), "red").save(changed)
    after = again(True)
    assert (after.x[after.names.index(f"ring/{changed.name}"), 0] > 250).all()


def test_tables_of_many_kinds_give_the_same_texts_and_classes(tmp_path):
    objects = [{"body": t, "label": s} for _, t, s in REVIEWS]
    table(tmp_path / "a.csv", REVIEWS)
    table(tmp_path / "b.tsv", REVIEWS, delimiter="\t")
    table(tmp_path / "c.csv", REVIEWS, delimiter=";")
    (tmp_path / "d.csv").write_bytes((tmp_path / "a.csv").read_text().encode("utf-16"))
    table(tmp_path / "e.csv", [row[1:] for row in REVIEWS], head=None)
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, objects)))
    (tmp_path / "h.json").write_text(json.dumps(objects))
    table(tmp_path / "i.csv", [(f"no. {i}", t, "x", s) for i, t, s in REVIEWS],
          head=("title", "review_text", "text_id", "stars"))
    (tmp_path / "k.txt").write_text("\n".join(f"{s} {t}" for _, t, s in REVIEWS))
    for name, mark in (("l.txt", "__label__{} {}"), ("m.csv", "__label__{} , {}")):
        (tmp_path / name).write_text("\n".join(mark.format(s, t) for _, t, s in REVIEWS))
    (tmp_path / "n").mkdir()
    for sense in ("pos", "neg"):
        (tmp_path / "n" / f"reviews.{sense}").write_text("\n".join(
            t for _, t, s in REVIEWS if s == sense))
    table(tmp_path / "o.txt", [(s, t) for _, t, s in REVIEWS], head=None, delimiter="\t")
    for i, text, sense in REVIEWS:
        (tmp_path / "j" / sense).mkdir(parents=True, exist_ok=True)
        (tmp_path / "j" / sense / f"{i}.txt").write_text(text)
    for path in tmp_path.iterdir():
        raw = read("text", path, tmp_path / "j")
        assert raw.classes == ["neg", "pos"] and raw.n_train == 48, path
        pairs = zip(raw.x, raw.y.tolist(), strict=True)
        assert sorted(pairs) == sorted((t, int(s == "pos")) for _, t, s in REVIEWS), path


def test_columns_can_be_named_and_a_column_of_parts_is_kept(tmp_path):
    parts = ("test", "dev", "train", "train", "train")
    rows = [(t, f"title {i}", s, "x" if i % 3 else "y", parts[i % 5]) for i, t, s in REVIEWS]
    path = table(tmp_path / "a.csv", rows, head=("text", "title", "label", "mood", "split"))
    raw = read("text", path, tmp_path, text_column="title", label_column="mood")
    assert raw.classes == ["x", "y"] and raw.x[0].startswith("title")
    assert raw.n_val == 12 and raw.n_train == 48


@pytest.mark.parametrize("head", [("gold", "sentence", "where"), None])
def test_a_column_of_parts_is_found_by_what_it_holds(head, tmp_path):
    parts = ("test", "Dev", "train", "train", "train")
    rows = [(f"{s} {i % 4}", t, parts[i % 5]) for i, t, s in REVIEWS]
    raw = read("text", table(tmp_path / "a.csv", rows, head=head), tmp_path)
    assert raw.n_val == 12 and raw.n_train == 48 and len(raw.x) == 60
    assert len(raw.classes) == 4, "which the parts are not, though they are fewer"


def test_letters_of_windows_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n" + b"".join(
        f"caf\xe9 \u201c{i}\u201d,{i % 2}\n".encode("cp1252") for i in range(9)))
    assert all(re.fullmatch("caf\xe9 \u201c\\d\u201d", text) for text in
               read("text", tmp_path / "a.csv", tmp_path).x)


LINES = ["text,label", *(f"film {i},{i % 2}" for i in range(10))]


@pytest.mark.parametrize("lines, kept, skipped", [
    ([*LINES, ",1", "no class,", "alone", "a,0"], 11, ["row 11", "row 12", "row 13"]),
    ([*LINES, "w " * 70_000 + ",1"], 11, []),
    ([""] * 101 + LINES, 10, []),
    ([*LINES, '"open,1', "b,1"], 11, ["row 11"]),
    ([*LINES, '"a" film,"open', "b,1"], 11, ["row 11"]),
    ([*LINES, '"open,1', "b,1", '"two\nlines, ""quoted""",0', "c,1", 'd "e" f,1'], 14, ["row 11"]),
    (['{"text": "a", "label": 1}', "no JSON", '{"text": "b", "label": 2}', "[1]"], 2,
     ["row 2", "row 4"])],
    ids=["no text or no class", "a long cell", "empty lines", "an open quote", "one behind another",
         "one before others", "no JSON"])
def test_no_row_is_lost_without_being_listed_by_its_number(lines, kept, skipped, tmp_path):
    path = tmp_path / ("a.csv" if LINES[0] in lines else "a.jsonl")
    path.write_text("\n".join(lines))
    raw = read("text", path, tmp_path, test_fraction=0.5)
    assert (len(raw.x), [name for name, _ in raw.skipped]) == (kept, skipped)


def test_rare_classes_can_count_as_much_as_others(shapes):
    few = np.flatnonzero((shapes.y != 3) | (np.arange(len(shapes.y)) % 12 == 0))
    raw = dld.RawData("", shapes.classes, shapes.x[few], shapes.y[few], int((few < 600).sum()))
    for how in ("balanced", "none"):
        config = dld.resolve_config({"class_weights": how, "label_smoothing": 0.2, **OWN})
        data = dld.build_dataset(raw, config)
        rows, labels = data.parts["train"], data.labels[data.parts["train"]]
        truth = data.shares(labels)
        by_class = torch.zeros(10).index_add_(0, labels, truth.sum(1))
        assert torch.allclose(by_class, torch.tensor(len(rows) / 10)) == (how == "balanced")
        machine = dld.start_machine(config)
        state, _ = dld.start_training(data, config, machine)
        torch.nn.init.zeros_(state.model.head.weight)  # no class is preferred
        rare = (labels == 3).nonzero().flatten()
        loss, _ = dld.train_step(state, state.model, data.samples.batch(rows[rare]), truth[rare],
                                 0.0, 1.0, config, machine)
        weight = len(rows) / 10 / len(rare) if how == "balanced" else 1
        assert float(loss) == pytest.approx(weight * len(rare) * math.log(10), rel=1e-4), (
            "smoothing takes nothing of it")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on a folder of pictures, and one on a table, both with something to skip."""
    place = tmp_path_factory.mktemp("own")
    folder_of_shapes(place / "shapes", 150)
    (place / "shapes" / "ring" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    raw = dld.make_reviews(150, 10)
    rows = [(i, raw.x[i], ("bad", "good")[y]) for i, y in enumerate(raw.y)]
    table(place / "reviews.csv", [*rows, (160, "", "good")])
    with pytest.MonkeyPatch.context() as patch:  # empty pictures for figures
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **more: (
            Image.new("L", (8, 8)).save(file, "png")))
        for task, data in (("images", "shapes"), ("text", "reviews.csv")):
            dld.train_run({
                "task": task, "data": str(place / data), "data_dir": str(place / "memory"),
                "output_dir": str(place / "outputs"), "epochs": 1, "width": 16, "batch_size": 20,
                "report": "minimal", **OWN}, dld.Log())
    return place


def test_pictures_of_other_names_are_not_the_same_samples(own, tmp_path):
    run = own / "outputs" / "images-shapes"
    other = shutil.copytree(run, tmp_path / "other")
    table = other / "predictions.csv"
    assert dld.read_run(run)[0]["test"] == dld.read_run(other)[0]["test"]
    table.write_text(table.read_text("utf-8").replace("circle/", "circle/new-"), "utf-8")
    assert dld.read_run(run)[0]["test"] != dld.read_run(other)[0]["test"]


@pytest.mark.parametrize("run, name", [("images-shapes", "circle/"), ("text-reviews", "row ")])
def test_own_data_ends_in_a_run_folder_that_names_its_samples(own, run, name):
    folder = own / "outputs" / run
    metrics, rows = metrics_of(folder), rows_of(folder / "predictions.csv")
    assert (metrics["skipped"], len(rows_of(folder / "skipped.csv"))) == (1, 1)
    assert 29 <= len(rows) == metrics["test_samples"] <= 32
    assert any(row["name"].startswith(name) for row in rows)
    assert "skipped.csv" in (folder / "report.html").read_text("utf-8")
    assert dld.main(["--evaluate", "--run", str(folder), "--data-dir", str(own / "memory")]) == 0


def test_a_run_starts_from_another_ones_weights_with_a_head_for_new_classes(own, tmp_path):
    folder_of_shapes(tmp_path / "new", 60, ("heart", "ring", "circle"))
    run = own / "outputs" / "images-shapes"
    data, now, said = start(configure("images", tmp_path / "new", own, init=str(run)))
    old = torch.load(run / "model.pt", weights_only=True)
    assert data.meta["mean"] == old["meta"]["mean"], "the old weights expect the old scale"
    head, old_head = now.pop("head.weight"), old["weights"].pop("head.weight")
    assert all(torch.equal(now[name], value) for name, value in old["weights"].items())
    assert data.meta["classes"] == ["circle", "heart", "ring"] and "2 of 3 classes known" in said
    assert torch.equal(head[[0, 2]], old_head[[0, 1]]) and not torch.equal(head[1], old_head[2])

    path = table(tmp_path / "new.csv", [(i, f"{t} zebra zebra giraffe", s) for i, t, s in REVIEWS])
    run = own / "outputs" / "text-reviews"
    data, now, _ = start(configure("text", path, own, init=str(run)))
    old = torch.load(run / "model.pt", weights_only=True)
    known, words = old["meta"]["vocabulary"], data.meta["vocabulary"]
    assert words[:len(known)] == known and "zebra" in words[len(known):]
    embedding = old["weights"]["embedding.weight"]
    assert torch.equal(now["embedding.weight"][:len(embedding)], embedding)


def test_published_weights_come_from_pytorchs_cache_and_are_checked(tmp_path, monkeypatch):
    from torchvision import models
    weights = models.mobilenet_v3_small(weights=None).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.MobileNet_V3_Small_Weights.DEFAULT.url
    place = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    config = configure("images", folder_of_shapes(tmp_path / "shapes", 40), tmp_path,
                       model="mobilenet_v3_small", pretrained=True)
    with pytest.raises(dld.DataMissing, match=r"could not download .* by hand"):
        start(dataclasses.replace(config, dry_run=True))
    torch.save(weights, place)
    data, now, said = start(config)
    assert data.meta["mean"] == [0.485, 0.456, 0.406] and "published" in said
    assert all(torch.equal(now[key], value) for key, value in weights.items()
               if not key.startswith("classifier.3"))


def test_a_folder_is_predicted_in_blocks_broken_ones_listed_and_explained(
        own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(own)
    monkeypatch.setattr(dld.Predictor.predict, "__defaults__", (64,))
    assert dld.main(["--predict", "shapes", "--run", "outputs/images-shapes", "--output",
                     str(tmp_path / "p.1.csv"), "--explain", "--device", "cpu"]) == 0
    rows = {row["name"].removeprefix("shapes/"): row for row in rows_of(tmp_path / "p.1.csv")}
    broken = [name for name, row in rows.items() if row["problem"]]
    assert len(rows) == 151 and broken == ["ring/broken.jpg"]
    for row in rows_of(own / "outputs/images-shapes/predictions.csv"):
        assert abs(float(rows[row["name"]]["p_ring"]) - float(row["p_ring"])) < 1e-4
    out = capsys.readouterr().out
    assert "150 predictions" in out and "broken.jpg: not a picture" in out and "none shown" in out
    assert (tmp_path / "p.1-gradcam.png").stat().st_size > 10_000


def test_a_table_is_predicted_by_the_column_of_the_training_unless_one_is_named(own, tmp_path):
    def predict(path, *more):
        assert dld.main(["--predict", str(path), "--run", str(own / "outputs" / "text-reviews"),
                         "--output", str(tmp_path / "p.csv"), "--device", "cpu", *more]) == 0
        return {row["name"]: row for row in rows_of(tmp_path / "p.csv")}

    rows = predict(own / "reviews.csv", "--explain")
    assert len(rows) == 161 and rows["row 161"]["problem"] == "no text" and rows["row 1"]["p_good"]
    assert (tmp_path / "p-attention.html").exists()
    film, note = "a good film", "dull stupid boring, which is much longer than the text"
    alone = {text: predict(text)[text]["p_good"] for text in (film, note)}
    assert alone[film] != alone[note]
    for head, flags, meant in ((("text", "review", "note"), (), film),
                               (("text", "review", "note"), ("--text-column", "note"), note),
                               (("id", "title", "words"), (), note)):
        rows = predict(table(tmp_path / "new.csv", [("t", film, note)], head=head), *flags)
        assert rows["row 1"]["p_good"] == alone[meant], head


def test_drift_is_silent_on_the_other_half_and_fires_on_inverted_pictures_and_other_languages(own):
    samples = dld.build_dataset(dld.make_shapes(400, 100), dld.Config()).samples
    drifted = 0
    for seed in range(20):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        reference = dld.quantiles_of(samples.statistics(order[:250]))
        for others in (order[250:], order[250:290]):  # few lie a tenth elsewhere by chance alone
            drifted += dld.measure_drift(reference, samples.statistics(others))["drifted"].any()
    assert drifted <= 2, "one in a hundred is promised"

    def look(run, *arguments):
        ready = dld.Predictor(own / "outputs" / run, dld.start_machine(dld.Config(**OWN)))
        list(ready.predict([str(argument) for argument in arguments]))
        return ready.drift()

    (own / "inverted").mkdir()
    for path in (own / "shapes").rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(own / "inverted" / path.name)
    assert "unlike" in look("images-shapes", own / "inverted")
    rng = np.random.default_rng(0)
    german = ["der", "Film", "war", "gut", "und", "ich", "habe", "ihn", "mit", "dem", "Bruder"]
    rows = [(i, " ".join(rng.choice(german, 30))) for i in range(60)]
    table(own / "german.csv", rows, head=("id", "text"))
    assert "unknown words" in look("text-reviews", own / "german.csv")
    assert "none shown" in look("text-reviews", own / "reviews.csv")
    assert look("text-reviews", "a good film") == "", "nothing can be said of a few"


def test_a_test_part_of_one_class_has_a_report_without_roc_curves(
        tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_shapes(tmp_path / "few", 6, ("ring", "star"))
    run = dld.train("images", data="few", epochs=1, report="short", **OWN)
    assert metrics_of(run.folder)["test_samples"] == 1
    assert (run.folder / "report.html").exists() and not (run.folder / "roc_pr.png").exists()
    assert "1 sample, epoch 1" in capsys.readouterr().out
