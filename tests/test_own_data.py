"""The user's own pictures and texts: found, split, remembered, trained on, predicted in bulk."""
import contextlib
import csv
import io
import json
import types

import numpy as np
import pytest
import torch
from conftest import metrics_of
from PIL import Image, ImageOps

import deep_learning_deliverable as dld

OWN = {"device": "cpu", "precision": "fp32"}


def folder_of_shapes(root, n, seed=0, size=32, names=("circle", "ring", "star")):
    """n pictures of shapes, one folder a class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, len(names), n)
    x, _ = dld.draw_shapes(np.array([list(dld.SHAPES).index(names[i]) for i in y]), rng)
    for i, (label, pixels) in enumerate(zip(y, x, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).resize((size + i % 7, size)).save(root / names[label] / f"{i}.png")
    return root


def read(task, data, tmp_path, **settings):
    config = dld.settle({}, {"task": task, "data": str(data), "data_dir": str(tmp_path / "memory"), **OWN, **settings})
    return dld.load_raw(config, dld.Log())


def table(path, rows, head=("id", "review", "sentiment"), delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows] if head else rows)
    return path


REVIEWS = [(i, f"a {'good' if i % 2 else 'bad'} film number {i}, seen in the cinema", "pos" if i % 2 else "neg")
           for i in range(60)]


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_in_folders_are_split_with_every_class_in_every_part_whatever_their_number(tmp_path):
    raw = read("images", folder_of_shapes(tmp_path / "shapes", 60), tmp_path)
    assert raw.classes == ["circle", "ring", "star"] and raw.x.shape == (60, 3, 32, 32) and raw.n_train == 48
    rows = {part: rows.numpy() for part, rows in dld.split_rows(raw, dld.Config()).items()}
    assert all(set(raw.y[rows[part]]) == {0, 1, 2} for part in dld.PARTS)
    assert all(raw.names[i].startswith(raw.classes[raw.y[i]]) for i in range(60)), "names stay with their rows"
    test = {raw.names[i] for i in rows["test"]}
    folder_of_shapes(tmp_path / "more", 3, seed=9)
    for i, path in enumerate(sorted((tmp_path / "more").rglob("*.png"))):
        path.rename(tmp_path / "shapes" / "ring" / f"new{i}.png")
    again = read("images", tmp_path / "shapes", tmp_path)
    now = {again.names[i] for i in dld.split_rows(again, dld.Config())["test"].tolist()}
    assert len(test & now) >= 10, "what is added moves few of the others"


def test_parts_that_somebody_named_are_kept_and_a_class_missing_in_one_shifts_no_label(tmp_path):
    for part, n, names in (("Train", 30, ("circle", "ring", "star")), ("valid", 8, ("circle", "star")),
                           ("test", 9, ("ring", "star"))):
        folder_of_shapes(tmp_path / "shapes" / part, n, names=names)
    raw = read("images", tmp_path / "shapes", tmp_path)
    rows = dld.split_rows(raw, dld.Config())
    assert [len(rows[part]) for part in dld.PARTS] == [30, 8, 9] and raw.classes == ["circle", "ring", "star"]
    for part, folder in (("train", "Train"), ("val", "valid"), ("test", "test")):
        for i in rows[part].tolist():
            assert raw.names[i].startswith(f"{folder}/{raw.classes[raw.y[i]]}/")


def test_unreadable_files_are_skipped_and_listed_and_the_others_stay_with_their_labels(tmp_path):
    root = folder_of_shapes(tmp_path / "around" / "shapes", 40)  # one folder around all, as archives have it
    (root / "ring" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (root / "star" / "empty.png").write_bytes(b"")
    (root / "star" / "notes.txt").write_text("hello")
    (root / ".hidden").mkdir()
    (root / "ring" / "._1.png").write_bytes(b"of a Mac")
    raw = read("images", tmp_path / "around", tmp_path)
    assert {name for name, _ in raw.skipped} == {"ring/broken.jpg", "star/empty.png", "star/notes.txt"}
    assert len(raw.x) == len(raw.y) == len(raw.names) == 40
    form = {"side": 32, "channels": 3, "paper": False}
    for i in range(40):
        assert np.array_equal(raw.x[i], dld.read_picture(root / raw.names[i], form))


def test_pictures_are_decoded_once_and_again_when_one_has_changed(tmp_path, monkeypatch):
    root, calls = folder_of_shapes(tmp_path / "shapes", 20), []
    whole = dld.read_picture
    monkeypatch.setattr(dld, "read_picture", lambda *given: calls.append(given) or whole(*given))
    first = read("images", root, tmp_path)
    assert len(calls) == 20 and isinstance(first.x, np.memmap)
    again = read("images", root, tmp_path, test_fraction=0.4)
    assert len(calls) == 20 and again.n_train == 12, "another split needs no new decoding"
    changed = next((root / "ring").iterdir())
    Image.new("RGB", (50, 40), "red").save(changed)
    after = read("images", root, tmp_path)
    assert len(calls) == 40 and (after.x[after.names.index(f"ring/{changed.name}"), 0] > 250).all()
    right = np.array(after.x)
    kept, = (tmp_path / "memory" / "decoded").glob("*.pixels")
    kept.write_bytes(kept.read_bytes()[:-100])
    assert np.array_equal(read("images", root, tmp_path).x, right) and len(calls) == 60, "damaged: made anew"
    (tmp_path / "file").write_text("in the way")
    assert np.array_equal(read("images", root, tmp_path, data_dir=str(tmp_path / "file")).x, right), "or does without"


def test_grey_pictures_stay_grey_and_small_ones_small(tmp_path):
    root = folder_of_shapes(tmp_path / "shapes", 20, size=28)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert read("images", root, tmp_path).x.shape[1:] == (1, 28, 28)
    assert read("images", root, tmp_path, image_size=16, colour="rgb").x.shape[1:] == (3, 16, 16)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_tables_of_many_kinds_give_the_same_texts_and_classes(tmp_path):
    one = read("text", table(tmp_path / "a.csv", REVIEWS), tmp_path)
    assert one.classes == ["neg", "pos"] and len(one.x) == 60 and one.n_train == 48
    as_pairs = sorted(zip(one.x, one.y.tolist(), strict=True))
    table(tmp_path / "b.tsv", REVIEWS, delimiter="\t")
    table(tmp_path / "c.csv", REVIEWS, delimiter=";")
    (tmp_path / "d.csv").write_bytes((tmp_path / "a.csv").read_text("utf-8").encode("utf-16"))
    table(tmp_path / "e.csv", [row[1:] for row in REVIEWS], head=None)
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps({"body": t, "label": s}) for _, t, s in REVIEWS), "utf-8")
    table(tmp_path / "g.csv", REVIEWS, head=("n", "Was man sah", "Urteil"))
    (tmp_path / "h.json").write_text(json.dumps([{"text": t, "label": s} for _, t, s in REVIEWS]), "utf-8")
    table(tmp_path / "i.csv", [(f"no. {i}", t, "x", s) for i, t, s in REVIEWS], head=("title", "review_text", "text_id",
                                                                                       "stars"))
    for name in ("b.tsv", "c.csv", "d.csv", "e.csv", "f.jsonl", "g.csv", "h.json", "i.csv"):
        other = read("text", tmp_path / name, tmp_path)
        assert sorted(zip(other.x, other.y.tolist(), strict=True)) == as_pairs, name


def test_rows_without_text_or_class_are_skipped_with_their_line(tmp_path):
    rows = [*REVIEWS[:20], (20, "", "pos"), (21, "no class", ""), (22,), *REVIEWS[20:40]]
    raw = read("text", table(tmp_path / "a.csv", rows), tmp_path)
    assert [name for name, _ in raw.skipped] == ["line 22", "line 23", "line 24"] and len(raw.x) == 40
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": 1}\nnot json\n{"text": "b", "label": 2}\n[1]\n', "utf-8")
    raw = read("text", tmp_path / "b.jsonl", tmp_path, test_fraction=0.5)
    assert raw.skipped == [("line 2", "not a JSON object"), ("line 4", "not a JSON object")]


def test_columns_can_be_named_and_a_column_of_parts_is_kept(tmp_path):
    parts = ("test", "dev", "train", "train", "train")
    rows = [(text, f"title {i}", sense, "x" if i % 3 else "y", parts[i % 5]) for i, text, sense in REVIEWS]
    path = table(tmp_path / "a.csv", rows, head=("text", "title", "label", "mood", "split"))
    raw = read("text", path, tmp_path, text_column="title", label_column="mood")
    assert raw.classes == ["x", "y"] and raw.x[0].startswith("title") and raw.n_val == 12 and raw.n_train == 48


def test_texts_in_folders_and_classes_that_people_count(tmp_path):
    for i in range(44):
        (tmp_path / "stars" / f"{i % 11} stars").mkdir(parents=True, exist_ok=True)
        (tmp_path / "stars" / f"{i % 11} stars" / f"{i}.txt").write_text(f"number {i}")
    assert read("text", tmp_path / "stars", tmp_path).classes == [f"{i} stars" for i in range(11)]


def test_scripts_without_spaces_are_read_sign_by_sign():
    words = dld.pack_texts(["iPhone很好! don't これ 8/10"]).words
    assert words == ["iphone", "很", "好", "!", "don't", "こ", "れ", "8/10"]


# -- training ---------------------------------------------------------------------------------------------------------


def test_rare_classes_can_count_as_much_as_others(shapes):
    few = np.flatnonzero((shapes.y != 3) | (np.arange(len(shapes.y)) % 12 == 0))
    raw = dld.Raw("uneven", shapes.classes, shapes.x[few], shapes.y[few], int((few < 600).sum()))
    even, plain = (dld.build_data(raw, dld.settle({}, {"task": "cifar10", "class_weights": how, **OWN}))
                   for how in ("balanced", "none"))
    rows, truth = even.lesson(0, 1)
    by_class = torch.zeros(10).index_add_(0, even.labels[rows], truth.sum(1))
    assert torch.allclose(by_class, by_class.mean().expand(10)) and by_class.sum().round() == len(rows)
    config = dld.settle({}, {"task": "cifar10", **OWN})
    assert any("--class-weights balanced" in note for note in dld.check_parts(plain, config, dld.World()))
    config = dld.settle({}, {"task": "cifar10", "class_weights": "balanced", **OWN})
    assert not any("--class-weights" in note for note in dld.check_parts(even, config, dld.World()))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on a folder of pictures, and one on a table, both with something to skip."""
    place = tmp_path_factory.mktemp("own")
    folder_of_shapes(place / "shapes", 240)
    (place / "shapes" / "ring" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    raw = dld.make_reviews(240, 10)
    rows = [(i, text, ("bad", "good")[label]) for i, (text, label) in enumerate(zip(raw.x, raw.y, strict=True))]
    table(place / "reviews.csv", [*rows, (250, "", "good")])
    for task, data in (("images", "shapes"), ("text", "reviews.csv")):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert dld.main(["--task", task, "--data", str(place / data), "--epochs", "3", "--width", "16",
                             "--data-dir", str(place / "memory"), "--batch-size", "20", "--report", "minimal",
                             "--device", "cpu", "--output-dir", str(place / "outputs")]) == 0
        assert "Skipped 1 sample" in said.getvalue()
    return place


def test_own_data_ends_in_a_full_run_folder_that_names_files_and_lines(own):
    for run, like in (("images-shapes", "circle"), ("text-reviews", "line ")):
        folder = own / "outputs" / run
        metrics = metrics_of(folder)
        assert metrics["skipped"] == 1 and metrics["status"] == "finished" and metrics["dataset"] == run.split("-")[1]
        with (folder / "predictions.csv").open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == metrics["test_samples"] == (47 if "images" in run else 50), "the broken one was drawn too"
        assert any(line["name"].startswith(like) for line in lines)
        assert len((folder / "skipped.csv").read_text("utf-8").splitlines()) == 2
        assert "skipped.csv" in (folder / "report.html").read_text("utf-8")
    run = str(own / "outputs" / "images-shapes")
    assert dld.main(["--evaluate", "--run", run, "--data-dir", str(own / "memory")]) == 0


def test_a_run_starts_from_another_ones_weights_with_a_new_head_for_new_classes(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own)
    folder_of_shapes(tmp_path / "new", 60, names=("heart", "ring", "circle"))
    given = {"task": "images", "data": str(tmp_path / "new"), "init": "outputs/images-shapes", "data_dir": "memory"}
    given |= OWN
    config = dld.settle({}, given)
    assert config.width == 16 and config.image_size == 32 and config.lr < dld.RECIPES["fast"]["lr"]
    raw = dld.load_raw(config, dld.Log())
    data, runtime = dld.build_data(raw, config), dld.start_runtime(config)
    old = dld.load_file(own / "outputs/images-shapes/model.pt")
    assert data.meta["mean"] == old["meta"]["mean"], "the old weights expect the old scale"
    state, said = dld.begin(data, config, runtime)
    now = state.model.state_dict()
    for name, value in old["weights"].items():
        assert name == "head.weight" or torch.equal(now[name], value), name
    assert raw.classes == ["circle", "heart", "ring"] and "2 of 3 classes known" in said
    assert torch.equal(now["head.weight"][[0, 2]], old["weights"]["head.weight"][[0, 1]])
    assert not torch.equal(now["head.weight"][1], old["weights"]["head.weight"][2])


def test_a_text_run_keeps_its_words_and_learns_new_ones(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own)
    path = table(tmp_path / "new.csv", [(i, f"{t} zebra zebra giraffe", s) for i, t, s in REVIEWS])
    config = dld.settle({}, {"task": "text", "data": str(path), "init": "outputs/text-reviews", **OWN})
    data = dld.build_data(dld.load_raw(config, dld.Log()), config)
    old = dld.load_file(own / "outputs/text-reviews/model.pt")
    words = len(old["meta"]["vocabulary"])
    assert data.meta["vocabulary"][:words] == old["meta"]["vocabulary"] and "zebra" in data.meta["vocabulary"][words:]
    state, _ = dld.begin(data, config, dld.start_runtime(config))
    now = state.model.state_dict()
    assert torch.equal(now["embedding.weight"][:words + 2], old["weights"]["embedding.weight"])
    assert torch.equal(now["pairs.weight"], old["weights"]["pairs.weight"])


def test_published_weights_come_from_the_data_folder_and_are_checked(tmp_path, monkeypatch, capsys):
    import hashlib

    import torchvision
    weights = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(weights, tmp_path / "file")
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()[:8]
    name = f"mobilenet-{digest}.pth"
    (tmp_path / "file").rename(tmp_path / name)
    (tmp_path / "net-00000000.pth").write_bytes(b"no weights")

    class Published:
        url = f"https://nowhere.invalid/{name}"

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda model: types.SimpleNamespace(DEFAULT=Published))
    folder_of_shapes(tmp_path / "shapes", 40)
    config = dld.settle({}, {"task": "images", "data": str(tmp_path / "shapes"), "model": "mobilenet_v3_small", **OWN,
                             "pretrained": True, "data_dir": str(tmp_path)})
    data = dld.build_data(dld.load_raw(config, dld.Log()), config)
    state, said = dld.begin(data, config, dld.start_runtime(config))
    assert data.meta["mean"] == dld.PUBLISHED["mean"] and "published" in said
    now = state.model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in weights.items() if not key.startswith("classifier.3"))
    Published.url = "https://nowhere.invalid/net-00000000.pth"
    with pytest.raises(dld.DataError, match="is damaged; delete it"):
        dld.load_published(config)
    (tmp_path / "net-00000000.pth").unlink()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(dld.DataMissing, match=r"could not download net-00000000.pth .* put it into"):
        dld.load_published(config)


# -- predicting -------------------------------------------------------------------------------------------------------


def test_a_folder_is_predicted_in_blocks_with_broken_ones_listed_and_explained(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(own)
    monkeypatch.setattr(dld.Survey.predict, "__defaults__", (64,))
    assert dld.main(["--predict", "shapes", "--run", "outputs/images-shapes", "--output", str(tmp_path / "p.csv"),
                     "--explain", "--device", "cpu"]) == 0
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 241 and [line["name"] for line in lines if line["problem"]] == ["shapes/ring/broken.jpg"]
    by_name = {line["name"].removeprefix("shapes/"): float(line["p_ring"] or 0) for line in lines}
    with (own / "outputs/images-shapes/predictions.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            assert by_name[line["name"]] == pytest.approx(float(line["p_ring"]), abs=0.02), "there it was bf16"
    out = capsys.readouterr().out
    assert "240 predictions" in out and "broken.jpg: not a picture" in out and "none shown" in out
    assert (tmp_path / "p-gradcam.png").stat().st_size > 10_000


def test_rows_of_a_table_are_predicted(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own)
    assert dld.main(["--predict", "reviews.csv", "--run", "outputs/text-reviews", "--output", str(tmp_path / "p.csv"),
                     "--text-column", "review", "--device", "cpu"]) == 0
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert len(lines) == 251 and lines["line 252"]["problem"] == "no text" and lines["line 2"]["predicted"]


def test_a_table_to_predict_is_read_by_the_column_of_the_training_unless_another_is_named(own, tmp_path):
    meta = dld.load_file(own / "outputs/text-reviews/model.pt")["meta"]
    path = table(tmp_path / "new.csv", [("t", "a good film", "a note that is much longer than the text")],
                 head=("text", "review", "note"))
    assert list(dld.open_texts(str(path), meta)) == [("line 2", "a good film")]
    assert next(dld.open_texts(str(path), meta | {"column_asked_for": "note"}))[1].startswith("a note")
    other = table(tmp_path / "other.csv", [("t", "a bad film")], head=("id", "words"))
    assert list(dld.open_texts(str(other), meta)) == [("line 2", "a bad film")]


def test_drift_is_silent_on_the_other_half_and_fires_on_inverted_pictures_and_other_languages(own):
    drifted = 0
    samples = dld.Images(torch.from_numpy(dld.make_shapes(600, 400).x), {"mean": [0.5] * 3, "deviation": [0.2] * 3,
                                                                           "augment": {}, "views": False})
    for seed in range(50):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        reference = dld.remember(samples.statistics(order[:500]))
        drifted += any(row["drifted"] for row in dld.measure_drift(reference, samples.statistics(order[500:])))
        few = samples.statistics(order[500:540])  # which lie a tenth elsewhere by chance alone
        drifted += any(row["drifted"] for row in dld.measure_drift(reference, few))
    assert drifted <= 3, "one in a hundred is promised"

    def look(run, arguments):
        survey = dld.Survey(dld.Predictor(run, dld.start_runtime(dld.Config(**OWN))))
        list(survey.predict([str(argument) for argument in arguments]))
        return survey.say_drift()

    for path in (own / "shapes").rglob("*.png"):
        (own / "inverted").mkdir(exist_ok=True)
        ImageOps.invert(Image.open(path)).save(own / "inverted" / path.name)
    assert "unlike" in look(own / "outputs/images-shapes", [own / "inverted"])
    rng = np.random.default_rng(0)
    german = ["der", "Film", "war", "gut", "und", "schlecht", "ich", "habe", "ihn", "mit", "dem", "Bruder", "gesehen"]
    table(own / "german.csv", [(i, " ".join(rng.choice(german, 30))) for i in range(60)], head=("id", "text"))
    assert "unknown words" in look(own / "outputs/text-reviews", [own / "german.csv"])
    assert "none shown" in look(own / "outputs/text-reviews", [own / "reviews.csv"])
    assert look(own / "outputs/text-reviews", ["a good film"]) == "", "nothing can be said of a few"
