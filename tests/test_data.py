"""Sources, splits, batches."""
import gzip
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dld, small
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression


def test_splits_are_disjoint_and_seeded(digits):
    parts = dld.split_rows(digits, small("mnist"))
    train, val, test = (set(parts[name].tolist()) for name in dld.PARTS)
    assert len(train) + len(val) + len(test) == len(digits.y) == len(train | val | test)
    assert max(train | val) < digits.n_train <= min(test)
    again, other = (dld.split_rows(digits, small("mnist", seed=seed)) for seed in (0, 1))
    assert torch.equal(parts["val"], again["val"]) and not torch.equal(parts["val"], other["val"])
    assert torch.equal(parts["test"], other["test"]), "the test part must not depend on the seed"


def test_parts_are_stratified_and_too_little_data_is_one_clear_line(digits):
    parts = dld.split_rows(digits, small("mnist", limit=50))
    for name in dld.PARTS:  # ten classes that are about as frequent
        assert abs(np.bincount(digits.y[parts[name]], minlength=10) - 5).max() <= 1
    with pytest.raises(dld.DataError, match="no train samples are left"):
        dld.split_rows(dld.RawData("tiny", ["a"], digits.x[:1], digits.y[:1], 1), small("mnist"))


# -- pictures ------------------------------------------------------------------------------------


def test_batches_of_pictures_are_normalised_by_the_training_rows(shapes):
    data = dld.build_dataset(shapes, small("cifar10"))
    x = data.samples.batch(data.parts["train"])
    assert x.mean((0, 2, 3)).abs().max() < 0.01 and (x.std((0, 2, 3)) - 1).abs().max() < 0.01
    expected = shapes.x[data.parts["train"].numpy()] / 255
    np.testing.assert_allclose(data.meta["mean"], expected.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.meta["std"], expected.std((0, 2, 3)), atol=1e-5)
    batches = data.samples.plan(data.parts["train"][:65], 64, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(65)), "each comes once an epoch"
    assert [len(batch) for batch in batches] == [33, 32], "no batch of a single one"


@pytest.mark.parametrize("how, across, down", [
    ({}, (0, 0), (0, 0)), ({"shift": 3}, (3, 3), (3, 3)), ({"scale": 0.2}, (2, 3), (0, 0)),
    ({"elastic": 1}, (1, 4), (1, 4)), ({"rotate": 20}, (0, 1), (3, 4))])
def test_variations_go_as_far_as_they_may_and_no_farther(how, across, down):
    x = torch.zeros(500, 1, 33, 33)
    x[:, :, 16, 26] = 1  # one bright pixel, 10 from the middle: where does it go?
    moved = dld.augment_batch(x, torch.Generator().manual_seed(0), torch.zeros(500), **how)
    place = moved.flatten(1).argmax(1)
    for moves, (least, most) in ((place % 33 - 26, across), (place // 33 - 16, down)):
        assert least <= moves.abs().max() <= most and (not most or moves.min() < 0)


def test_every_picture_is_mirrored_every_other_epoch_and_among_the_views(shapes):
    samples = dld.build_dataset(shapes, small("cifar10")).samples
    samples.augment, rows = {"flip": True}, torch.arange(600)
    epochs = [samples.batch(rows, torch.Generator(), epoch) for epoch in (0, 1, 2)]
    torch.testing.assert_close(epochs[1], epochs[0].flip(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(epochs[2], epochs[0], atol=1e-4, rtol=0)
    unchanged = (epochs[0] - samples.batch(rows)).abs().amax((1, 2, 3)) < 1e-4
    assert 0.4 < unchanged.float().mean() < 0.6
    views = samples.views(x := epochs[0][:4])
    assert len(views) == 5 and torch.equal(views[2], x.flip(3))
    assert torch.equal(views[0][..., :-1, :-1], x[..., 1:, 1:])
    samples.augment = {}
    assert len(samples.views(x)) == 2, "no mirroring where that changes the meaning"


def test_pictures_of_any_size_and_mode_can_be_opened(tmp_path):
    from PIL import Image
    meta = {"channels": 3, "side": 32, "light_on_dark": False}
    for mode, size, ending, value in (
            ("RGB", (32, 32), "png", 0), ("L", (7, 300), "webp", 0), ("P", (40, 40), "gif", 0),
            ("1", (33, 9), "png", 0), ("I;16", (50, 50), "tif", 0), ("CMYK", (64, 64), "jpg", 255),
            ("RGBA", (500, 20), "png", 255), ("LA", (1, 1), "png", 255)):  # clear is white paper
        Image.new(mode, size).save(path := f"{tmp_path / mode[:3]}.{ending}")
        (name, x), = dld.ImageData.read_inputs(path, meta)
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8 and name == path
        assert abs(x.astype(int) - value).max() <= 1, mode
        (_, grey), = dld.ImageData.read_inputs(path, {"channels": 1, "side": 28, "light_on_dark": True})
        assert grey.shape == (1, 28, 28)


def test_ink_on_paper_is_turned_into_light_on_dark_for_mnist():
    page = np.full((40, 40), 240, np.uint8)
    page[10:30, 18:22] = 10
    meta = {"channels": 1, "side": 28, "light_on_dark": True}
    paper, board = (next(dld.ImageData.read_inputs(x, meta))[1] for x in (page, 255 - page))
    assert np.abs(paper.astype(int) - board).max() <= 1 and paper[0, 0].max() < 20


# -- texts ---------------------------------------------------------------------------------------


def test_words_keep_negation_marks_with_feeling_and_single_signs_of_unspaced_scripts():
    text = "Don't, stop! a 10/10 film?? 😀 (naïve) :) either/or iPhone很好! これ"
    assert dld.tokenize([text]).words == [
        "don't", "stop", "!", "a", "10/10", "film", "?", "😀", "naïve", ":)", "either", "or",
        "iphone", "很", "好", "こ", "れ"]
    assert dld.decode("naïve 😀".encode() + " café".encode("latin-1")) == "naïve 😀 café"


def test_words_are_shown_as_they_are_written():
    texts = ['He said: "It is (almost) GOOD!" <br /> No?', "", "İstanbul is nice."]
    samples = dld.TextData(dld.tokenize(texts), {"vocabulary": ["good"], "max_tokens": 50})
    assert [samples.words(row) for row in (0, 1)] == [
        ["He", "said:", '"It', "is", "(almost)", "GOOD", '!"', "No", "?"], [""]]
    assert len(samples.words(2)) == int(samples.length[2]), "also where lower case has more letters"


def test_the_vocabulary_comes_from_training_rows_alone():
    raw = dld.RawData("", ["a", "b"], ["good film film"] * 6 + ["secret secret"] * 5,
                      np.arange(11) % 2, 6)
    data = dld.build_dataset(raw, small("sentiment"))
    assert data.meta["vocabulary"] == ["film", "good"]
    assert data.samples.batch(torch.tensor([0, 9])).tolist() == [[3, 2, 2],
                                                                 [dld.UNKNOWN] * 2 + [dld.PAD]]


def test_long_texts_keep_beginning_and_end_and_empty_ones_are_inputs():
    words = [f"w{i}" for i in range(100)]
    samples = dld.TextData(dld.tokenize([" ".join(words), "", "   ", "w1 w2"]),
                           {"vocabulary": words, "max_tokens": 10})
    assert samples.words(0) == words[:5] + words[-5:] and samples.words(3) == ["w1", "w2"]
    prints = samples.identities(torch.arange(3))
    assert prints[0] != prints[1] == prints[2]
    empty = [dld.UNKNOWN] + [dld.PAD] * 9
    assert samples.batch(torch.arange(4)).tolist() == [
        [*range(2, 7), *range(97, 102)], empty, empty, [3, 4] + [dld.PAD] * 8]


def test_batches_hold_texts_of_like_length(reviews):
    data = dld.build_dataset(reviews, small("sentiment"))
    rows = data.parts["train"]
    batches = data.samples.plan(rows, 32, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(rows)))
    x = [data.samples.batch(rows[where]) for where in batches]
    assert sum(int((b == dld.PAD).sum()) for b in x) / sum(b.numel() for b in x) < 0.08
    lengths = [b.shape[1] for b in x]
    assert lengths != sorted(lengths), "batches must come in random order"


def test_the_phrase_model_is_scikit_learns_own(reviews):
    """The oracle: the same method written with scikit-learn's vectoriser."""
    train, y = torch.arange(600), torch.from_numpy(reviews.y)
    model = dld.PhraseModel(dld.tokenize(reviews.x), train, y[train], 2, 2, False)
    counter = CountVectorizer(analyzer=lambda text: [
        " ".join(words[i:i + n]) for words in [dld.find_words(text.lower())] for n in (1, 2)
        for i in range(len(words) - n + 1)])
    counts = counter.fit_transform(reviews.x[:600])
    often = np.flatnonzero(np.asarray(counts.sum(0)).ravel() > 1)
    scale = TfidfTransformer(sublinear_tf=True).fit(counts[:, often])
    oracle = LogisticRegression(C=10, tol=1e-6, max_iter=1000)
    oracle.fit(scale.transform(counts[:, often]), reviews.y[:600])
    expected = oracle.predict_proba(scale.transform(counter.transform(reviews.x[600:])[:, often]))
    np.testing.assert_allclose(model.probabilities(torch.arange(600, 800)), expected, atol=0.01)
    for texts, y in ((["one"], [1]), (["a b", "c d"], [0, 0]), (["", ""], [0, 1])):
        rows = torch.arange(len(y))
        tiny = dld.PhraseModel(dld.tokenize(texts), rows, torch.tensor(y), 2, 3, True)
        assert torch.allclose(tiny.probabilities(rows).sum(1), torch.ones(len(y))), "stands so few too"


# -- the official layouts, on small files of the same form; the stand-ins ------------------------


def at(folder):
    return dld.Config(data_dir=str(folder), dry_run=True)  # a dry run downloads nothing


def write_cifar10(folder, per_batch=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
                 b"labels": [i % 10 for i in range(per_batch)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def write_imdb(folder):
    for place in ("train/pos", "train/neg", "train/unsup", "test/pos", "test/neg"):
        (folder / place).mkdir(parents=True)
        for i in range(12):
            text = (f"{place} number {i}" if i else "").encode() + b" caf\xe9 \xf0\x9f\x98\x80"
            (folder / place / f"{i}_7.txt").write_bytes(text)


def test_cifar10_is_read_unpacked_and_packed(tmp_path, monkeypatch):
    inside = write_cifar10(tmp_path / "a" / "cifar-10-batches-py")
    raw = dld.read_cifar10(at(tmp_path / "a"))
    assert raw.x.shape == (120, 3, 32, 32) and raw.n_train == 100 and raw.classes[3] == "cat"
    packed = tmp_path / "b" / dld.CIFAR10.name
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(inside, inside.name)
    monkeypatch.setattr(dld, "CIFAR10", dld.Archive(packed.name, dld.file_md5(packed), 1, ("",)))
    again = dld.read_cifar10(at(tmp_path / "b"))
    assert np.array_equal(raw.x, again.x) and np.array_equal(raw.y, again.y)
    seen = {path.name for path in packed.parent.iterdir() if not path.name.endswith(".lock")}
    assert seen == {packed.name, inside.name}


class Bomb:
    def __reduce__(self):
        return (open, ("boom", "w"))


@pytest.mark.parametrize("harm", [
    lambda whole: whole[:1000], lambda whole: b"", lambda whole: None, lambda whole: b"<html>",
    lambda whole: pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [12]}, 2),
    lambda whole: pickle.dumps({b"data": Bomb()})],
    ids=["truncated", "empty", "missing", "text", "labels", "code"])
def test_damaged_files_are_named_and_cannot_run_code(tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    victim = write_cifar10(tmp_path / "cifar-10-batches-py") / "data_batch_2"
    bad = harm(victim.read_bytes())
    victim.write_bytes(bad) if bad is not None else victim.unlink()
    with pytest.raises(dld.DataError, match="data_batch_2") as caught:
        dld.read_cifar10(at(tmp_path))
    assert not isinstance(caught.value, dld.DataMissing), "else it would become the stand-in"
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_is_read_zipped_and_not(tmp_path, zipped, monkeypatch):
    inside, archives = tmp_path / "MNIST" / "raw", []
    inside.mkdir(parents=True)
    for archive, n in zip(dld.MNIST, (40, 40, 20, 20), strict=True):
        shape = (n, 28, 28) if "images" in archive.name else (n,)
        head = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
        body = head + (np.arange(np.prod(shape)) % 10).astype(np.uint8).tobytes()
        path = inside / archive.name.removesuffix("" if zipped else ".gz")
        path.write_bytes(gzip.compress(body) if zipped else body)
        archives.append(dld.Archive(archive.name, dld.file_md5(path), 1, ("",)))
    monkeypatch.setattr(dld, "MNIST", archives)
    raw = dld.read_mnist(at(tmp_path))
    assert raw.x.shape == (60, 1, 28, 28) and raw.n_train == 40
    assert raw.y[:12].tolist() == [*range(10), 0, 1] == raw.x[0, 0, 0, :12].tolist()


def test_imdb_is_read_with_odd_bytes_and_empty_reviews(tmp_path):
    write_imdb(tmp_path / "aclImdb")
    raw = dld.read_imdb(at(tmp_path))
    assert len(raw.x) == 60 and raw.n_train == 24 and raw.y.tolist() == ([0] * 12 + [1] * 12) * 2
    assert raw.x[0] == " café 😀" and "train/unsup" in raw.x[59] and raw.name != "IMDb"
    parts = dld.split_rows(raw, small("sentiment"))
    assert parts["unlabelled"].tolist() == [*range(48, 60)]
    assert max(int(parts[name].max()) for name in dld.PARTS) < 48


def test_reviews_are_cut_once_and_a_stale_or_damaged_cache_is_never_used(tmp_path, monkeypatch):
    write_imdb(tmp_path / "aclImdb")
    raw = dld.read_imdb(at(tmp_path))
    read, files = [], dld.read_text
    monkeypatch.setattr(dld, "read_text", lambda path: read.append(path) or files(path))

    def again(expected):
        read.clear()
        new = dld.read_imdb(at(tmp_path))
        assert len(read) == expected
        return new

    same = again(0)
    assert list(same.x) == list(raw.x) and same.packed.words == raw.packed.words
    assert torch.equal(same.packed.flat, raw.packed.flat)
    for kept in (tmp_path / "cache" / "aclImdb").iterdir():
        kept.write_bytes(kept.read_bytes()[:-10])
        assert list(again(60).x) == list(raw.x), f"damaged: {kept}"
    (tmp_path / "aclImdb/test/pos/3_7.txt").write_text("changed, and of another length")
    assert "changed, and of another length" in again(60).x
    monkeypatch.setattr(dld, "WORD", r"\w+")
    again(60)
    shutil.rmtree(tmp_path / "aclImdb/train/unsup")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert len(again(48).x) == 48, "where no cache can be, it does without"


def test_a_cache_that_lacks_a_file_is_made_anew(tmp_path):
    write_imdb(tmp_path / "aclImdb")
    dld.read_imdb(at(tmp_path))
    for kept in (tmp_path / "cache" / "aclImdb").iterdir():
        kept.unlink()
        assert len(dld.read_imdb(at(tmp_path)).x) == 60, kept


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says")
def test_pictures_in_a_memory_map_are_trained_on_without_being_read_into_memory(tmp_path):
    def own_memory():
        said = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", said)[1]) * 1024

    shape = (400_000, 3, 32, 32)
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, shape)  # takes no room: empty
    x, y = np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(400_000) % 2
    config = small("cifar10", model="mlp", epochs=1, limit=500)
    machine, before = dld.start_machine(config), own_memory()
    data = dld.build_dataset(dld.RawData("stripes", ["light", "dark"], x, y, 360_000), config)
    assert data.samples.pixels.data_ptr() == x.ctypes.data, "the file itself, not a copy"
    state, _ = dld.start_training(data, config, machine)
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer()))
    assert state.epoch == 1 and own_memory() - before < x.nbytes / 2  # of 1.2 GB


def test_auto_falls_back_loudly_and_real_never(tmp_path, capsys):
    given = {"data_dir": str(tmp_path / "data"), "dry_run": True}
    raw = dld.load_raw(small("mnist", data="auto", **given), dld.Log())
    assert raw.stand_in_slug == "offline-digits" and "dry run" in raw.name
    assert re.search(r"WARNING .* is not there; get https://\S+ ", capsys.readouterr().out)
    with pytest.raises(dld.DataMissing, match="is not there"):
        dld.load_raw(small("mnist", data="real", **given), dld.Log())


def test_stand_ins_are_deterministic_and_labelled(shapes, digits, reviews):
    for one, two in ((shapes, dld.make_shapes(600, 200)), (digits, dld.make_digits()),
                     (reviews, dld.make_reviews(600, 200))):
        assert np.array_equal(one.y, two.y) and np.array_equal(one.x, two.x)
        assert one.stand_in_slug.startswith("offline-") and "stand-in" in one.name
        assert set(one.y[:one.n_train]) == set(one.y[one.n_train:]) == set(range(len(one.classes)))
    lighter = [x[:, m].mean() > x[:, ~m].mean()
               for x, m in zip(shapes.x, shapes.masks, strict=True)]
    assert np.mean(lighter) > 0.9, "the shape is mostly lighter than its background"
