"""Sources, splits, batches."""
import dataclasses
import gzip
import pickle
import re
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import dld, small
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression


def test_splits_are_disjoint_stratified_and_seeded(digits):
    parts = dld.split_rows(digits, small("mnist"))
    train, val, test = (set(parts[name].tolist()) for name in dld.PARTS)
    assert len(train) + len(val) + len(test) == len(digits.y) == len(train | val | test)
    assert max(train | val) < digits.n_train <= min(test)
    share = np.bincount(digits.y[parts["val"]], minlength=10) / np.bincount(digits.y[:digits.n_train], minlength=10)
    assert abs(share - 0.1).max() < 0.03
    again, other = dld.split_rows(digits, small("mnist")), dld.split_rows(digits, small("mnist", seed=1))
    assert torch.equal(parts["val"], again["val"]) and not torch.equal(parts["val"], other["val"])
    assert torch.equal(parts["test"], other["test"]), "the test part must not depend on the seed"


def test_every_beginning_of_a_stratified_order_is_balanced():
    y = np.repeat([0, 1, 2], [600, 300, 3])
    order = dld.stratified_order(y, np.random.default_rng(0).permutation)
    assert sorted(order) == list(range(len(y)))
    for n in (30, 300, 450):
        assert abs(np.bincount(y[order[:n]], minlength=3) / n - np.array([600, 300, 3]) / 903).max() < 0.04


def test_limit_keeps_every_class(digits):
    parts = dld.split_rows(digits, small("mnist", limit=50))
    assert [len(parts[name]) for name in dld.PARTS] == [50, 50, 50]
    assert len(np.unique(digits.y[parts["train"]])) == 10


def test_too_little_data_is_one_clear_line(digits):
    raw = dld.Raw("tiny", ["a", "b"], digits.x[:1], digits.y[:1], 1)
    with pytest.raises(dld.DataError, match="no train samples are left"):
        dld.split_rows(raw, small("mnist"))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_batches_of_pictures_are_normalised_by_the_training_rows(shapes):
    data = dld.build_data(shapes, small("cifar10"))
    x = data.samples.batch(data.parts["train"])
    assert x.mean((0, 2, 3)).abs().max() < 0.01 and (x.std((0, 2, 3)) - 1).abs().max() < 0.01
    expected = shapes.x[data.parts["train"].numpy()] / 255
    np.testing.assert_allclose(data.meta["mean"], expected.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.meta["deviation"], expected.std((0, 2, 3)), atol=1e-5)


def test_every_picture_comes_once_an_epoch_and_no_batch_is_a_single_one(shapes):
    data = dld.build_data(shapes, small("cifar10"))
    rows = data.parts["train"][:65]
    batches = data.samples.plan(rows, 64, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(65))
    assert [len(batch) for batch in batches] == [33, 32]


def bright_places(**how):
    """Where one bright pixel goes, 500 times: across and down from where it was."""
    x = torch.zeros(500, 1, 33, 33)
    x[:, :, 16, 26] = 1
    moved = dld.vary(x, torch.Generator().manual_seed(0), torch.zeros(500), **how).flatten(1).argmax(1)
    return moved % 33 - 26, moved // 33 - 16


def test_varying_by_nothing_changes_nothing_and_mirroring_is_exact():
    x = torch.rand(64, 3, 32, 32)
    noise = torch.Generator().manual_seed(0)
    mirrored = torch.arange(64) % 2
    same = dld.vary(x, noise, torch.zeros(64))
    torch.testing.assert_close(same, x, atol=1e-5, rtol=0)
    both = dld.vary(x, noise, mirrored)
    torch.testing.assert_close(both[::2], x[::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1::2], x[1::2].flip(-1), atol=1e-5, rtol=0)


def test_every_picture_is_mirrored_every_other_epoch(shapes):
    data = dld.build_data(shapes, small("cifar10"))
    data.samples.augment = {"flip": True}
    rows = data.parts["train"]
    plain, noise = data.samples.batch(rows), torch.Generator()
    epochs = [data.samples.batch(rows, noise, epoch) for epoch in (0, 1, 2)]
    torch.testing.assert_close(epochs[1], epochs[0].flip(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(epochs[2], epochs[0], atol=1e-4, rtol=0)
    unchanged = (epochs[0] - plain).abs().amax((1, 2, 3)) < 1e-4
    assert 0.4 < unchanged.float().mean() < 0.6


def test_variations_stay_within_their_bounds():
    across, down = bright_places(shift=3)
    assert across.min() == down.min() == -3 and across.max() == down.max() == 3
    across, down = bright_places(rotate=20)  # along a circle: 10 pixels from the middle, at most 20 degrees
    assert 3 <= down.abs().max() <= 4 and across.abs().max() <= 1
    across, down = bright_places(scale=0.2)
    assert 2 <= across.abs().max() <= 3 and (down == 0).all()
    across, down = bright_places(elastic=1)
    assert 1 <= across.abs().max() <= 4 and 1 <= down.abs().max() <= 4


def test_views_are_the_same_pictures_shifted_and_mirrored(shapes):
    data = dld.build_data(shapes, small("cifar10"))
    x = data.samples.batch(data.parts["test"][:4])
    views = data.samples.views(x)
    assert len(views) == 5 and all(view.shape == x.shape for view in views)
    assert torch.equal(views[0][..., :-1, :-1], x[..., 1:, 1:]) and torch.equal(views[2], x.flip(3))
    data.samples.augment = {}
    assert len(data.samples.views(x)) == 2, "no mirroring where that changes the meaning"


def test_pictures_of_any_size_and_mode_can_be_opened(tmp_path):
    from PIL import Image
    meta = {"channels": 3, "side": 32, "paper": False}
    for mode, size in (("RGB", (32, 32)), ("RGBA", (500, 20)), ("L", (7, 300)), ("P", (40, 40)), ("1", (33, 9)),
                       ("CMYK", (64, 64)), ("I;16", (50, 50)), ("LA", (1, 1))):
        path = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}"
        Image.new(mode, size).save(path)
        (name, x), = dld.open_images(str(path), meta)
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8 and name == str(path)
        (_, grey), = dld.open_images(str(path), {"channels": 1, "side": 28, "paper": True})
        assert grey.shape == (1, 28, 28)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert dld.read_picture(tmp_path / "clear.png", meta).min() == 255, "transparent means white paper"


def test_ink_on_paper_is_turned_into_light_on_dark_for_mnist(tmp_path):
    from PIL import Image
    page = np.full((40, 40), 240, np.uint8)
    page[10:30, 18:22] = 10
    Image.fromarray(page).save(tmp_path / "paper.png")
    Image.fromarray(255 - page).save(tmp_path / "board.png")
    meta = {"channels": 1, "side": 28, "paper": True}
    paper, board = (dld.read_picture(tmp_path / name, meta) for name in ("paper.png", "board.png"))
    assert np.abs(paper.astype(int) - board).max() <= 1 and paper[0, 0].max() < 20


# -- texts ------------------------------------------------------------------------------------------------------------


def test_words_keep_negation_and_marks_with_feeling():
    assert dld.find_words("don't, stop! a 10/10 film?? 😀 (naïve) :) either/or") == [
        "don't", "stop", "!", "a", "10/10", "film", "?", "?", "😀", "naïve", ":)", "either", "or"]


def test_bytes_that_are_no_utf8_are_taken_for_latin_1():
    assert dld.decode("naïve 😀".encode() + " café".encode("latin-1")) == "naïve 😀 café"


def test_words_are_shown_as_they_are_written():
    texts = ['He said: "It is (almost) GOOD!" <br /> No?', "", "İstanbul is nice."]
    samples = dld.Texts(dld.pack_texts(texts), {"vocabulary": ["good"], "max_tokens": 50})
    assert samples.words(0) == ["He", "said:", '"It', "is", "(almost)", "GOOD", '!"', "No", "?"]
    assert samples.words(1) == [""] and samples.unknown(1) == []
    assert len(samples.words(2)) == int(samples.length[2]), "also where lower case has more letters"
    assert samples.unknown(0) == ["he", "said", "it", "is", "almost", "!", "no", "?"]


def test_the_vocabulary_comes_from_training_rows_alone():
    texts = ["good film film"] * 5 + ["secret secret secret"] * 5
    tokens = dld.pack_texts(texts)
    meta = dld.learn_texts(tokens, torch.arange(5), small("sentiment"))
    assert meta["vocabulary"] == ["film", "good"]
    samples = dld.Texts(tokens, meta)
    assert samples.batch(torch.tensor([0, 9])).tolist() == [[3, 2, 2], [dld.UNKNOWN] * 3]


def test_long_texts_keep_beginning_and_end_and_empty_ones_are_inputs():
    words = [f"w{i}" for i in range(100)]
    tokens = dld.pack_texts([" ".join(words), "", "   ", "w1 w2"])
    samples = dld.Texts(tokens, {"vocabulary": words, "max_tokens": 10})
    assert samples.words(0) == words[:5] + words[-5:]
    prints = samples.identities(torch.arange(3))
    assert prints[0] != prints[1] == prints[2]
    batch = samples.batch(torch.arange(4))
    assert batch[0].tolist() == [*range(2, 7), *range(97, 102)]
    assert batch[1].tolist() == batch[2].tolist() == [dld.UNKNOWN] + [dld.PAD] * 9
    assert batch[3].tolist() == [3, 4] + [dld.PAD] * 8
    assert samples.words(3) == ["w1", "w2"]


def test_batches_hold_texts_of_like_length(reviews):
    data = dld.build_data(reviews, small("sentiment"))
    rows = data.parts["train"]
    batches = data.samples.plan(rows, 32, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(rows)))
    x = [data.samples.batch(rows[where]) for where in batches]
    padding = sum(int((b == dld.PAD).sum()) for b in x) / sum(b.numel() for b in x)
    assert padding < 0.08
    lengths = [b.shape[1] for b in x]
    assert lengths != sorted(lengths), "batches must come in random order"


# -- stand-ins --------------------------------------------------------------------------------------------------------


def test_stand_ins_are_deterministic_and_labelled():
    for make in (lambda: dld.make_shapes(400, 100), dld.make_digits, lambda: dld.make_reviews(300, 100)):
        one, two = make(), make()
        assert np.array_equal(one.y, two.y) and len(one.x) == len(one.y)
        assert one.x == two.x if isinstance(one.x, list) else np.array_equal(one.x, two.x)
        assert one.slug.startswith("offline-") and "stand-in" in one.name
        assert set(one.y[:one.n_train]) == set(one.y[one.n_train:]) == set(range(len(one.classes)))


def test_shapes_know_where_they_are(shapes):
    assert shapes.masks.shape == (800, 32, 32)
    share = shapes.masks.mean((1, 2))
    assert share.min() > 0.02 and share.max() < 0.5
    inside = [x[:, m].mean() - x[:, ~m].mean() for x, m in zip(shapes.x, shapes.masks, strict=True)]
    assert np.mean(np.array(inside) > 0) > 0.9, "the shape is mostly lighter than its background"


def test_counting_words_is_not_enough_for_the_reviews():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    raw = dld.make_reviews()
    train, test = raw.x[:raw.n_train], raw.x[raw.n_train:]
    assert all(8 <= len(text.split()) <= 60 for text in raw.x)
    for ngrams in ((1, 1), (1, 2)):
        vectors = TfidfVectorizer(ngram_range=ngrams)
        linear = LogisticRegression().fit(vectors.fit_transform(train), raw.y[:raw.n_train])
        assert linear.score(vectors.transform(test), raw.y[raw.n_train:]) < 0.8


# -- the official layouts, on small files of the same form ------------------------------------------------------------


def write_cifar10(folder, per_batch=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
                 b"labels": [i % 10 for i in range(per_batch)], b"batch_label": b"x", b"filenames": [b"y"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_mnist(folder, zipped):
    folder.mkdir(parents=True)
    for archive, n in zip(dld.MNIST, (40, 40, 20, 20), strict=True):
        pictures = "images" in archive.name
        shape = (n, 28, 28) if pictures else (n,)
        head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        body = (np.arange(np.prod(shape)) % (256 if pictures else 10)).astype(np.uint8).tobytes()
        path = folder / archive.name.removesuffix("" if zipped else ".gz")
        path.write_bytes(gzip.compress(head + body) if zipped else head + body)


def write_imdb(folder):
    for place in ("train/pos", "train/neg", "train/unsup", "test/pos", "test/neg"):
        (folder / place).mkdir(parents=True)
        for i in range(12):
            text = f"{place} number {i}" if i else ""
            (folder / place / f"{i}_7.txt").write_bytes(text.encode() + b" caf\xe9 \xf0\x9f\x98\x80")


def test_cifar10_is_read_unpacked_and_packed(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "a" / "cifar-10-batches-py")
    raw = dld.read_cifar10(tmp_path / "a", dld.Downloads(False))
    assert raw.x.shape == (120, 3, 32, 32) and raw.n_train == 100 and raw.classes[3] == "cat" and not raw.slug
    (tmp_path / "b").mkdir()
    packed = tmp_path / "b" / dld.CIFAR10.name
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "a" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(dld, "CIFAR10", dld.Archive(packed.name, dld.file_md5(packed), 1, ("",)))
    again = dld.read_cifar10(tmp_path / "b", dld.Downloads(False))
    assert np.array_equal(raw.x, again.x) and np.array_equal(raw.y, again.y)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [packed.name, "cifar-10-batches-py"][::-1]


def test_cifar10_batches_cannot_run_code(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Bomb()}))
    with pytest.raises(dld.DataError, match=r"data_batch_3 is damaged.*asks for"):
        dld.read_cifar10(tmp_path, dld.Downloads(False))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_is_read_zipped_and_not(tmp_path, zipped, monkeypatch):
    write_mnist(tmp_path / "MNIST" / "raw", zipped)
    monkeypatch.setattr(dld, "MNIST", [dld.Archive(a.name, dld.file_md5(tmp_path / "MNIST" / "raw" / a.name), 1, ("",))
                                       if zipped else a for a in dld.MNIST])
    raw = dld.read_mnist(tmp_path, dld.Downloads(False))
    assert raw.x.shape == (60, 1, 28, 28) and raw.n_train == 40 and raw.y[:12].tolist() == [*range(10), 0, 1]


def test_imdb_is_read_with_odd_bytes_and_empty_reviews(tmp_path):
    write_imdb(tmp_path / "aclImdb")
    raw = dld.read_imdb(tmp_path, dld.Downloads(False))
    assert len(raw.x) == 60 and raw.n_train == 24 and raw.y.tolist() == ([0] * 12 + [1] * 12) * 2
    assert raw.x[0] == " café 😀" and "train/unsup" in raw.x[59]
    assert raw.name == "texts in aclImdb", "only the official reviews are called IMDb"
    parts = dld.split_rows(raw, small("sentiment"))
    assert parts["unlabelled"].tolist() == [*range(48, 60)] and max(map(max, (parts[p] for p in dld.PARTS))) < 48


def test_reviews_are_cut_once_and_a_stale_or_damaged_file_is_never_used(tmp_path, monkeypatch):
    write_imdb(tmp_path / "aclImdb")
    raw = dld.read_imdb(tmp_path, dld.Downloads(False))
    kept = tmp_path / "aclImdb.cut.npz"
    read, files = [], dld.read_text
    monkeypatch.setattr(dld, "read_text", lambda path: read.append(path) or files(path))
    again = dld.read_imdb(tmp_path, dld.Downloads(False))
    assert not read and list(again.x) == list(raw.x)
    assert torch.equal(again.packed.flat, raw.packed.flat) and again.packed.words == raw.packed.words

    kept.write_bytes(kept.read_bytes()[:-500])
    assert list(dld.read_imdb(tmp_path, dld.Downloads(False)).x) == list(raw.x) and len(read) == 60
    (tmp_path / "aclImdb/test/pos/3_7.txt").write_text("changed, and of another length")
    assert "changed, and of another length" in dld.read_imdb(tmp_path, dld.Downloads(False)).x and len(read) == 120
    monkeypatch.setattr(dld, "WORD", r"\w+")
    dld.read_imdb(tmp_path, dld.Downloads(False))
    assert len(read) == 180, "another way of cutting"

    shutil.rmtree(tmp_path / "aclImdb/train/unsup")
    kept.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dld.Tokens, "save", full)
    assert len(dld.read_imdb(tmp_path, dld.Downloads(False)).x) == 48
    assert not kept.exists(), "a folder that takes no file"


def test_word_vectors_put_words_of_like_use_together():
    rng = np.random.default_rng(0)
    pairs = {2: (10, 11), 3: (10, 11), 4: (20, 21), 5: (20, 21)}  # 2 and 3 stand beside 10 and 11; 4 and 5 do not
    firsts = rng.integers(2, 6, 2000)
    ids = [word for first in firsts for word in (first, rng.choice(pairs[first]), 30)]
    vectors = F.normalize(dld.word_vectors(torch.tensor(ids), 40, 8, near=1), dim=1)
    assert vectors.shape == (40, 8) and vectors.isfinite().all()
    assert vectors[2] @ vectors[3] > 0.9 > 0.5 > vectors[2] @ vectors[4]


def test_the_phrase_model_is_scikit_learns_own(reviews):
    """The oracle: the same method written with scikit-learn's vectoriser."""
    tokens, train, test = dld.pack_texts(reviews.x), torch.arange(600), torch.arange(600, 800)
    y = torch.from_numpy(reviews.y)
    ours = dld.PhraseModel(tokens, train, y[train], 2, 2, False).shares(test)
    counter = CountVectorizer(analyzer=lambda text: [
        " ".join(words[i:i + n]) for words in [dld.find_words(text.lower())] for n in (1, 2)
        for i in range(len(words) - n + 1)])
    counts = counter.fit_transform(reviews.x[:600])
    often = np.flatnonzero(np.asarray(counts.sum(0)).ravel() > 1)
    scale = TfidfTransformer(sublinear_tf=True).fit(counts[:, often])
    model = LogisticRegression(C=10, tol=1e-6, max_iter=1000).fit(scale.transform(counts[:, often]), reviews.y[:600])
    expected = model.predict_proba(scale.transform(counter.transform(reviews.x[600:])[:, often]))
    np.testing.assert_allclose(ours, expected, atol=0.01)


@pytest.mark.parametrize("texts, y", [(["one"], [1]), (["a b", "c d"], [0, 0]), (["", ""], [0, 1])])
def test_the_phrase_model_stands_hardly_any_texts(texts, y):
    model = dld.PhraseModel(dld.pack_texts(texts), torch.arange(len(y)), torch.tensor(y), 2, 3, True)
    shares = model.shares(torch.arange(len(y)))
    assert shares.shape == (len(y), 2) and torch.allclose(shares.sum(1), torch.ones(len(y)))


@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "labels", "text"])
def test_damaged_files_are_named(tmp_path, harm):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    victim = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    if harm == "missing":
        victim.unlink()
    elif harm == "labels":
        victim.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [12]}, protocol=2))
    else:
        victim.write_bytes({"truncated": victim.read_bytes()[:1000], "empty": b"", "text": b"<html>not found"}[harm])
    with pytest.raises(dld.DataError, match="data_batch_2") as caught:
        dld.read_cifar10(tmp_path, dld.Downloads(False))
    assert not isinstance(caught.value, dld.DataMissing), "broken data must not silently become the stand-in"


# -- larger than memory ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of this process")
def test_pictures_in_a_memory_map_are_trained_on_without_being_read_into_memory(tmp_path):
    """1.2 GB in a file (that takes no room, being empty mostly): the process keeps less than half of it."""
    def own_memory():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    pictures = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (100_000, 3, 64, 64))
    pictures[:2000:2] = 200
    y = np.arange(100_000) % 2
    del pictures
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    config = small("cifar10", model="classic", epochs=1, batch_size=32, limit=3000)
    runtime = dld.start_runtime(config)
    before = own_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = dld.build_data(dld.Raw("stripes", ["light", "dark"], x, y, 90_000), config)
    assert data.samples.pixels.data_ptr() == x.__array_interface__["data"][0], "the file itself, not a copy"
    state, _ = dld.begin(data, config, runtime)
    few = dataclasses.replace(data, parts={"train": data.parts["train"][:320], "val": data.parts["val"][:100]})
    dld.fit(state, few, config, runtime, lambda state: None)
    assert state.epoch == 1 and own_memory() - before < x.nbytes / 2


# -- which data is used ------------------------------------------------------------------------------------------------


def test_auto_falls_back_loudly_and_real_never(tmp_path, capsys, monkeypatch):
    def missing(folder, downloads):
        raise dld.DataMissing("could not download it")
    monkeypatch.setitem(dld.TASKS, "mnist", dld.Task("image", missing, dld.make_digits, {"model": "mlp"}))
    assert dld.load_raw(small("mnist", data="auto"), dld.Log()).slug == "offline-digits"
    assert "WARNING  could not download it" in capsys.readouterr().out
    with pytest.raises(dld.DataMissing):
        dld.load_raw(small("mnist", data="real"), dld.Log())
