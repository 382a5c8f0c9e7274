"""Networks: shapes, learning, and what must not change a prediction."""
import pytest
import torch
import torch.nn.functional as F
from conftest import dld

PICTURES = {"kind": "image", "channels": 3, "side": 16, "classes": list("abcdefghij"),
            "dropout": 0.0, "width": 16, "patches": torch.eye(12).tolist()}
TEXTS = {"kind": "text", "classes": ["no", "yes"], "vocabulary": [f"w{i}" for i in range(50)],
         "pairs": 512, "max_tokens": 400, "dropout": 0.0, "model": "lstm", "width": 16}


def random_ids(n, length, seed=0):
    return torch.randint(2, 52, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["fast", "classic", "mlp", "resnet18", "lstm", "transformer"])
def test_every_model_overfits_one_batch(name):
    torch.manual_seed(0)
    meta = {**(TEXTS if name in dld.TEXT_MODELS else PICTURES), "model": name}
    model = dld.build_model(meta).train()
    x = random_ids(16, 12) if name in dld.TEXT_MODELS else torch.randn(16, 3, 16, 16)
    y = torch.arange(16) % len(meta["classes"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(200):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.1:
            break
    assert loss < 0.1


@pytest.mark.parametrize(("name", "channels", "side"), [
    ("fast", 1, 28), ("fast", 2, 17), ("classic", 1, 33), ("mobilenet_v3_small", 1, 28),
    ("googlenet", 1, 28)])
def test_models_take_pictures_of_other_sizes(name, channels, side):
    model = dld.build_model({**PICTURES, "model": name, "channels": channels, "side": side,
                             "patches": torch.eye(4 * channels).tolist()}).eval()
    assert model(torch.zeros(2, channels, side, side)).shape == (2, 10)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_neither_padding_nor_batch_order_changes_a_prediction_and_attention_sums_to_one(name):
    torch.manual_seed(0)
    model = dld.build_model({**TEXTS, "model": name, "dropout": 0.5}).eval()
    alone = [random_ids(1, n, seed=n) for n in (1, 3, 17, 40)]
    expected = torch.cat([model(ids) for ids in alone])
    padded = torch.stack([F.pad(ids[0], (0, 60 - ids.shape[1]), value=dld.PAD) for ids in alone])
    torch.testing.assert_close(model(padded), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(padded.flip(0)).flip(0), expected, atol=1e-5, rtol=0)
    assert (expected.std(0) > 1e-3).all(), "different texts give different logits"
    logits, weight = model.attend(torch.cat((padded, torch.full((1, 60), dld.PAD))))
    assert logits.isfinite().all(), "an empty text too"
    torch.testing.assert_close(weight.sum(1), torch.ones(5))
    assert torch.equal(weight[:4] > 0, padded != dld.PAD)


def test_the_lstm_equals_pytorchs_bidirectional_one_on_packed_sequences():
    torch.manual_seed(0)
    model = dld.build_model(TEXTS).eval()
    oracle = torch.nn.LSTM(dld.WORD_DIM + dld.PAIR_DIM, 16, 2, batch_first=True,
                           bidirectional=True)
    for layer, pair in enumerate(zip(model.reader.ahead, model.reader.back, strict=True)):
        for suffix, one in zip(("", "_reverse"), pair, strict=True):
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(oracle, f"{part}_l{layer}{suffix}").data = getattr(one, f"{part}_l0").data
    ids = F.pad(random_ids(3, 9), (0, 4), value=dld.PAD)
    ids[1, 5:] = dld.PAD
    length = (ids != dld.PAD).sum(1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(model.embed(ids), length, batch_first=True,
                                                     enforce_sorted=False)
    h, _ = torch.nn.utils.rnn.pad_packed_sequence(oracle(packed)[0], batch_first=True,
                                                  total_length=13)
    weight = model.score(h).squeeze(-1).masked_fill(ids == dld.PAD, -torch.inf).softmax(1)
    logits, found = model.attend(ids)
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, model.head((weight.unsqueeze(1) @ h).squeeze(1)),
                               atol=1e-5, rtol=0)


@pytest.mark.parametrize(("task", "name", "said"), [
    ("cifar10", "resnet_18", "(did you mean resnet18?). Known: fast, classic, mlp"),
    ("sentiment", "resnet18", "Known: lstm, transformer\n")])
def test_an_unknown_model_is_refused_with_the_known_ones(task, name, said, capsys):
    assert dld.main(["--task", task, "--model", name]) == 2
    shown = capsys.readouterr().err
    assert said in shown and f"--model {name}: unknown" in shown
