"""The wide part: what phrases and pieces of words say, beside a network that reads."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import dld, metrics_of, small
from torch import nn


@pytest.fixture(scope="module")
def prepared(reviews):
    """A text network before its first step, its data, and a machine."""
    config = small("sentiment", max_tokens=8)
    data, machine = dld.build_dataset(reviews, config), dld.start_machine(config)
    state, _ = dld.start_training(data, config, machine)
    return state.model, data, machine


def joined(prepared, shares=(0.5, 2.0)):
    """The same once the wide part has joined, as it is loaded from a file."""
    model, data, _ = prepared
    meta = {**data.meta, "wide": data.wide.sizes}
    both = dld.build_model(meta)
    both.load_state_dict({**model.state_dict(), "shares": torch.tensor(shares),
                          **{f"wide.{name}": x for name, x in data.wide.state_dict().items()}})
    return both.eval()


def test_the_network_counts_phrases_as_scikit_learn_does(prepared, monkeypatch):
    _, data, machine = prepared
    rows, train = data.parts["test"], data.parts["train"]
    phrases = dld.fit_phrases(data.samples, data, train)
    assert 100 < len(phrases.known) <= phrases.slots
    assert len({*(phrases.known % phrases.slots).tolist()}) == len(phrases.known), "one a slot"
    monkeypatch.setattr(dld, "fit_pieces", lambda *_: None)
    wide = dld.fit_wide(data.samples, data, train)
    found = dld.predict_logits(wide, data.samples, rows, machine).softmax(1)
    torch.testing.assert_close(found, phrases.probabilities(rows), atol=1e-5, rtol=0)
    assert found.std(0).min() > 0.01


def test_beside_a_wide_part_that_knows_no_answers_the_network_learns_the_rest(reviews):
    # Labels by chance: nothing to be learnt, but they can be learnt by heart.
    chance = np.random.default_rng(0).integers(0, 2, 600)
    raw = dataclasses.replace(reviews, x=[*reviews.x, *reviews.x[:99]],
                              y=np.append(chance, reviews.y[600:]), packed=None, learnt={})
    config = small("sentiment")
    data, machine = dld.build_dataset(raw, config), dld.start_machine(config)
    state, _ = dld.start_training(data, config, machine)
    rows = data.parts["train"]
    y, sure = data.labels[rows], dld.predict_logits(data.wide, data.samples, rows, machine)
    assert (sure.argmax(1) == y).double().mean() > 0.8
    assert (data.beside.argmax(1) == y).double().mean() < 0.6
    x, truth = data.samples.batch(rows[:32]), data.shares(y[:32])
    losses = [float(dld.train_step(state, state.model, x, truth, known, 1.0, config,
                                   machine)[0]) for known in (0.0, 20 * truth)]
    assert losses[0] > 15 and losses[1] < 0.01, "what is known already need not be learnt"


def test_words_that_share_pieces_share_what_these_say(prepared):
    texts = [f"{stem}{end} film" for stem in ("care", "hope", "use", "help", "point")
             for end in ("less", "ful") for _ in range(9)]
    y = np.array([int("ful" in text) for text in texts])
    raw = dld.RawData("", ["no", "yes"], [*texts, "a", "b"], np.append(y, [0, 1]), len(texts))
    data = dld.build_dataset(raw, small("sentiment"))
    evidence, square, _ = dld.fit_pieces(data.samples, data, data.parts["train"])
    of = {word: evidence[i + 2] @ [-1, 1] for i, word in enumerate(data.meta["vocabulary"])}
    assert all(of[word] * (1 if word.endswith("ful") else -1) > 5 * abs(of["film"])
               for word in of if word != "film")
    assert (square[2:] > 0).all() and not evidence[:2].any(), "padding and unknown words say none"


def test_the_wide_part_reads_what_the_reader_must_skip(prepared):
    both, data = joined(prepared), prepared[1]
    n = len(data.meta["vocabulary"])
    ids = torch.randint(2, n + 2, (4, 30), generator=torch.Generator().manual_seed(0))
    ids[3, 20:] = dld.PAD
    logits, weight = both.attend(ids)
    assert weight.shape == ids.shape and torch.allclose(weight.sum(1), torch.ones(4))
    assert (weight[:3, 4:-4] == 0).all() and (weight[:3, :4] > 0).all()
    assert (weight[3, 4:16] == 0).all() and (weight[3, 16:20] > 0).all()
    other = ids.clone()
    other[:, 10] = (ids[:, 10] - 1) % n + 2
    assert torch.equal(both.attend(other)[0], logits)
    assert not torch.allclose(both(other), both(ids))
    alone = torch.stack((both.attend(ids)[0], both.wide(ids)))
    torch.testing.assert_close(both(ids), 0.5 * alone[0] + 2 * alone[1])


@pytest.mark.parametrize("length", [1, 2, 14])
def test_evidence_of_both_parts_sums_to_what_the_text_adds(prepared, length):
    random = torch.Generator().manual_seed(length)
    both, ids = joined(prepared), torch.randint(2, 60, (3, length), generator=random)
    ids[1, 5:] = dld.PAD
    label = torch.tensor([0, 1, 1])
    gains = dld.integrated_gradients(both, ids, label, steps=100)
    assert gains.shape == ids.shape
    with torch.no_grad():
        given = both(ids)
        for module in both.modules():
            if isinstance(module, nn.Embedding):
                module.weight.zero_()
        difference = (given - both(ids)).gather(1, label[:, None])[:, 0]
    torch.testing.assert_close((gains * (ids != dld.PAD)).sum(1), difference, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("n, deep, low, high", [
    (2000, "noise", 0.0, 0.05), (2000, "truth", 1.0, 50), (0, "noise", 0.099, 0.101)])
def test_what_was_held_out_says_what_each_part_counts(n, deep, low, high):
    random = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,), generator=random)
    noise, truth = 3 * torch.randn(n, 3, generator=random), nn.functional.one_hot(y, 3).float()
    wide = truth + torch.randn(n, 3, generator=random)
    shares = dld.fit_shares(torch.stack((noise if deep == "noise" else 3 * truth, wide), 1), y)
    assert low <= shares[0] <= high and shares[1] > 0


def test_the_report_says_what_each_part_adds_unless_there_is_one_part(finished, tmp_path, reviews,
                                                                      undrawn):
    run = finished["sentiment"]
    m, page = metrics_of(run), (run / "report.html").read_text("utf-8")
    assert "Ablation" in page and (run / "ablation.png").exists()
    for name in ("wide", "deep", "commonest", "baseline"):
        assert f"{m[f'{name}_accuracy']:.2%}" in page
        assert m["test_accuracy"] - m[f"{name}_accuracy"] == pytest.approx(m[f"{name}_gain"])
    saved = torch.load(run / "model.pt", weights_only=True)
    slots, words = saved["meta"]["wide"]
    assert len(saved["weights"]["wide.number"]) == slots and words > 2
    given = {**json.loads((run / "config.json").read_text()), "wide": False, "epochs": 1}
    given |= {"output_dir": str(tmp_path), "data": "offline", "report": "minimal"}
    alone = dld.train_run(given, dld.Log(quiet=True))
    assert "deep_accuracy" not in metrics_of(alone) and not (alone / "ablation.png").exists()
    assert "Ablation" not in (alone / "report.html").read_text("utf-8")


def test_with_folds_each_has_a_wide_part_of_its_own(tmp_path, undrawn, monkeypatch):
    fitted = []
    monkeypatch.setattr(dld, "fit_shares", lambda both, y, fit=dld.fit_shares: (
        fitted.append((len(both), both[:, 1].std())), fit(both, y))[1])
    run = dld.train_run({"task": "sentiment", "data": "offline", "folds": 2, "epochs": 1,
                         "limit": 120, "max_tokens": 12, "device": "cpu", "report": "minimal",
                         "output_dir": str(tmp_path)}, dld.Log(quiet=True))
    (n, spread), = fitted
    assert n == metrics_of(run)["train_samples"] and spread > 0.01
