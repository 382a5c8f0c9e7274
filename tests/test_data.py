"""Sources, splits, batches."""
import dataclasses
import gzip
import tarfile

import numpy as np
import pytest
import torch
from conftest import dld, small
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from test_bad_input import nothing, official


def test_splits_are_disjoint_stratified_and_seeded(digits):
    parts = dld.split_rows(digits, small("mnist"))
    train, val, test = (set(parts[name].tolist()) for name in dld.PARTS)
    assert len(train) + len(val) + len(test) == len(digits.y) == len(train | val | test)
    assert max(train | val) < digits.n_train <= min(test)
    few, again, other = (dld.split_rows(digits, small("mnist", seed=seed, limit=50))
                         for seed in (0, 0, 1))
    assert torch.equal(few["val"], again["val"]) and not torch.equal(few["val"], other["val"])
    assert torch.equal(few["test"], other["test"]), "the test part must not depend on the seed"
    for name in dld.PARTS:  # ten classes that are about as frequent
        n = 6 if name == "val" else 50  # one ninth, as without a limit
        times = np.bincount(digits.y[few[name]], minlength=10)
        assert times.sum() == n and abs(times - n / 10).max() <= 1


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


def test_every_picture_is_mirrored_every_other_epoch(shapes):
    samples = dld.build_dataset(shapes, small("cifar10")).samples
    samples.augment, rows = {"flip": True}, torch.arange(100)
    epochs = [samples.batch(rows, torch.Generator(), epoch) for epoch in (0, 1, 2)]
    torch.testing.assert_close(epochs[1], epochs[0].flip(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(epochs[2], epochs[0], atol=1e-4, rtol=0)
    unchanged = (epochs[0] - samples.batch(rows)).abs().amax((1, 2, 3)) < 1e-4
    assert 0.3 < unchanged.float().mean() < 0.7


def test_pictures_of_any_size_and_mode_can_be_opened(tmp_path):
    meta = {"channels": 3, "side": 32, "light_on_dark": False}
    for mode, size, ending, value in (
            ("RGB", (32, 32), "png", 0), ("L", (7, 300), "webp", 0), ("P", (40, 40), "gif", 0),
            ("1", (33, 9), "png", 0), ("I;16", (50, 50), "tif", 0), ("CMYK", (64, 64), "jpg", 255),
            ("RGBA", (500, 20), "png", 255), ("LA", (1, 1), "png", 255)):  # clear is white paper
        Image.new(mode, size).save(path := f"{tmp_path / mode[:3]}.{ending}")
        (name, x, _), = dld.ImageData.read_inputs(path, meta)
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8 and name == path
        assert abs(x.astype(int) - value).max() <= 1, mode


def test_ink_on_paper_is_turned_into_light_on_dark_for_mnist():
    page = np.full((40, 40), 240, np.uint8)
    page[10:30, 18:22] = 10
    meta = {"channels": 1, "side": 28, "light_on_dark": True}
    paper, board = (next(dld.ImageData.read_inputs(x, meta))[1] for x in (page, 255 - page))
    assert np.abs(paper.astype(int) - board).max() <= 1 and paper[0, 0].max() < 20


def test_words_keep_negation_marks_with_feeling_and_single_signs_of_unspaced_scripts():
    text = "Don't, stop! a 10/10 film?? 😀 (naïve) :) either/or iPhone很好! これ"
    assert dld.tokenize([text]).words == [
        "don't", "stop", "!", "a", "10/10", "film", "?", "😀", "naïve", ":)", "either", "or",
        "iphone", "很", "好", "こ", "れ"]
    assert dld.decode("naïve 😀".encode() + " café".encode("latin-1")) == "naïve 😀 café"


@pytest.mark.parametrize("ending", ["txt", "ndjson"])
def test_the_name_of_a_file_that_is_not_there_is_no_text(ending):
    with pytest.raises(dld.UsageError, match="no such file"):
        next(dld.TextData.read_inputs(f"gone.{ending}", {}))


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


def test_the_phrase_model_is_scikit_learns_own(reviews):
    """The oracle: the same method written with scikit-learn's vectoriser."""
    train, y = torch.arange(600), torch.from_numpy(reviews.y)
    tokens = dld.tokenize(reviews.x)
    every = torch.arange(len(tokens.words)) + 2
    model = dld.PhraseModel(tokens, every, len(every) + 2, train, y[train], 2, longest=2)
    counter = CountVectorizer(tokenizer=dld.find_words, token_pattern=None, ngram_range=(1, 2))
    counts = counter.fit_transform(reviews.x[:600])
    often = np.flatnonzero(np.asarray(counts.sum(0)).ravel() > 1)
    oracle = make_pipeline(TfidfTransformer(sublinear_tf=True),
                           LogisticRegression(C=10, tol=1e-6, max_iter=1000))
    oracle.fit(counts[:, often], reviews.y[:600])
    expected = oracle.predict_proba(counter.transform(reviews.x[600:])[:, often])
    np.testing.assert_allclose(model.probabilities(torch.arange(600, 800)), expected, atol=0.01)


def at(folder):
    return dld.Config(data_dir=str(folder), dry_run=True)  # a dry run downloads nothing


def write_imdb(folder):
    for place in ("train/pos", "train/neg", "train/unsup", "test/pos", "test/neg"):
        (folder / place).mkdir(parents=True)
        for i in range(12):
            text = (f"{place} number {i}" if i else "").encode() + b" caf\xe9 \xf0\x9f\x98\x80"
            (folder / place / f"{i}_7.txt").write_bytes(text)


def test_cifar10_is_read_unpacked_and_packed(tmp_path, monkeypatch):
    official("cifar10", nothing)(tmp_path, None)
    raw = dld.read_cifar10(at(tmp_path / "data"))
    assert raw.x.shape == (120, 3, 32, 32) and raw.n_train == 100 and raw.classes[3] == "cat"
    packed = tmp_path / "b" / dld.CIFAR10.name
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "data" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(dld, "CIFAR10", dld.Archive(packed.name, dld.file_md5(packed), 1, ("",)))
    again = dld.read_cifar10(at(tmp_path / "b"))
    assert np.array_equal(raw.x, again.x) and np.array_equal(raw.y, again.y)
    seen = {path.name for path in packed.parent.iterdir() if not path.name.endswith(".lock")}
    assert seen == {packed.name, "cifar-10-batches-py"}


def test_mnist_is_read_unzipped_and_zipped(tmp_path, monkeypatch):
    official("mnist", nothing)(tmp_path, None)
    raw, archives = dld.read_mnist(at(tmp_path / "data")), []
    assert raw.x.shape == (60, 1, 28, 28) and raw.n_train == 40
    assert raw.y[:12].tolist() == [*range(10), 0, 1] == raw.x[0, 0, 0, :12].tolist()
    for archive in dld.MNIST:
        zipped = tmp_path / "data" / "MNIST" / "raw" / archive.name
        zipped.write_bytes(gzip.compress(zipped.with_suffix("").read_bytes()))
        zipped.with_suffix("").unlink()
        archives.append(dataclasses.replace(archive, md5=dld.file_md5(zipped)))
    monkeypatch.setattr(dld, "MNIST", archives)
    again = dld.read_mnist(at(tmp_path / "data"))
    assert np.array_equal(raw.x, again.x) and np.array_equal(raw.y, again.y)


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
    same = dld.read_imdb(at(tmp_path))
    assert not read and list(same.x) == list(raw.x) and same.packed.words == raw.packed.words
    assert torch.equal(same.packed.flat, raw.packed.flat)
    for kept in (tmp_path / "cache" / "aclImdb").iterdir():
        kept.write_bytes(kept.read_bytes()[:-10])
        assert list(dld.read_imdb(at(tmp_path)).x) == list(raw.x), f"damaged: {kept}"
    assert read, "anew"
    (tmp_path / "aclImdb/test/pos/3_7.txt").write_text("changed, and of another length")
    assert "changed, and of another length" in dld.read_imdb(at(tmp_path)).x


def test_stand_ins_are_deterministic_and_labelled(shapes, digits, reviews):
    for one, two in ((shapes, dld.make_shapes(600, 200)), (digits, dld.make_digits()),
                     (reviews, dld.make_reviews(600, 200))):
        assert np.array_equal(one.y, two.y) and np.array_equal(one.x, two.x)
        assert one.stand_in_slug.startswith("offline-") and "stand-in" in one.name
        assert set(one.y[:one.n_train]) == set(one.y[one.n_train:]) == set(range(len(one.classes)))


def test_words_are_shown_as_they_are_written():
    texts = ['He said: "It is (almost) GOOD!" <br /> No?', "", "İstanbul is nice."]
    samples = dld.TextData(dld.tokenize(texts), {"vocabulary": ["good"], "max_tokens": 50})
    assert [samples.words(row) for row in (0, 1)] == [
        ["He", "said:", '"It', "is", "(almost)", "GOOD", '!"', "No", "?"], [""]]
    assert len(samples.words(2)) == int(samples.length[2]), "also where lower case has more letters"
