"""Networks: shapes, learning, and what must not change a prediction."""
import pytest
import torch
import torch.nn.functional as F
from conftest import dld, small

PICTURES = {"kind": "image", "channels": 3, "side": 32, "classes": list("abcdefghij"), "dropout": 0.0,
            "width": 16, "patches": torch.eye(12).tolist()}
TEXTS = {"kind": "text", "classes": ["no", "yes"], "vocabulary": [f"w{i}" for i in range(50)], "pairs": 512,
         "dropout": 0.0, "model": "lstm", "width": 16}


def random_ids(n, length, seed=0):
    return torch.randint(2, 52, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["fast", "classic", "mlp", "resnet18", "lstm", "transformer"])
def test_every_model_overfits_one_batch(name):
    torch.manual_seed(0)
    meta = {**(TEXTS if name in dld.TEXT_MODELS else PICTURES), "model": name}
    model = dld.build_model(meta)
    x = random_ids(16, 12) if name in dld.TEXT_MODELS else torch.randn(16, 3, 32, 32)
    y = torch.arange(16) % len(meta["classes"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(200):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.1


def test_the_fast_networks_first_layer_decorrelates_real_patches(shapes):
    data = dld.build_data(shapes, small("cifar10"))
    model = dld.build_model(data.meta)
    x = data.samples.batch(data.parts["train"])
    with torch.no_grad():
        out = model.body[0](x).transpose(0, 1).flatten(1)  # [24, all patches]
    torch.testing.assert_close(out[12:], -out[:12], atol=1e-4, rtol=0)
    covariance = out[:12].cov()
    strong = covariance.diag() > 0.5  # the others hardly occur in these pictures
    assert strong.sum() >= 8
    torch.testing.assert_close(covariance[strong][:, strong], torch.eye(int(strong.sum())), atol=0.1, rtol=0)
    assert not model.body[0].weight.requires_grad and model.body[0].bias.requires_grad


def test_the_fast_network_takes_other_pictures():
    for channels, side in ((1, 28), (3, 40), (2, 17)):
        meta = {**PICTURES, "model": "fast", "channels": channels, "side": side,
                "patches": torch.eye(4 * channels).tolist()}
        assert dld.build_model(meta).eval()(torch.zeros(2, channels, side, side)).shape == (2, 10)


def test_the_classic_cnn_is_what_it_says():
    model = dld.classic_cnn({**PICTURES, "dropout": 0.5})
    convolutions = [layer.out_channels for layer in model if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [32, 64, 128, 256]
    assert [layer.p for layer in model if isinstance(layer, torch.nn.Dropout)] == [0.25, 0.5]
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model) == 3
    for side in (28, 32, 33, 64):
        model = dld.classic_cnn({**PICTURES, "side": side, "channels": 1})
        assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenet_v3_small", "alexnet", "googlenet", "densenet121"])
def test_torchvision_models_take_small_pictures(name):
    model = dld.build_model({**PICTURES, "model": name, "channels": 1, "side": 28}).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_resnet_keeps_its_resolution_on_small_pictures():
    model = dld.build_model({**PICTURES, "model": "resnet18"})
    assert model.conv1.stride == (1, 1) and isinstance(model.maxpool, torch.nn.Identity)


def test_unknown_models_list_the_known_ones():
    with pytest.raises(dld.UsageError, match=r"did you mean resnet18\?.*fast, classic, mlp.*vgg11_bn"):
        dld.settle({}, {"task": "cifar10", "model": "resnet_18"})
    with pytest.raises(dld.UsageError, match=r"Known: lstm, transformer$"):
        dld.settle({}, {"task": "sentiment", "model": "resnet18"})


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_padding_and_batch_order_never_change_a_prediction(name):
    torch.manual_seed(0)
    model = dld.build_model({**TEXTS, "model": name, "dropout": 0.5}).eval()
    alone = [random_ids(1, n, seed=n) for n in (1, 3, 17, 40)]
    expected = torch.cat([model(ids) for ids in alone])
    padded = torch.stack([F.pad(ids[0], (0, 60 - ids.shape[1]), value=dld.PAD) for ids in alone])
    torch.testing.assert_close(model(padded), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(padded.flip(0)).flip(0), expected, atol=1e-5, rtol=0)
    assert (expected.std(0) > 1e-3).all(), "different texts give different logits"


def test_the_lstm_equals_pytorchs_bidirectional_one():
    """The oracle: torch's own bidirectional LSTM on a packed sequence, given the same weights."""
    torch.manual_seed(0)
    model = dld.build_model(TEXTS).eval()
    oracle = torch.nn.LSTM(dld.EMBEDDING + dld.PAIRING, 16, 2, batch_first=True, bidirectional=True)
    for layer, (ahead, back) in enumerate(zip(model.reader.ahead, model.reader.back, strict=True)):
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(oracle, f"{part}_l{layer}").data = getattr(ahead, f"{part}_l0").data
            getattr(oracle, f"{part}_l{layer}_reverse").data = getattr(back, f"{part}_l0").data
    ids = F.pad(random_ids(3, 9), (0, 4), value=dld.PAD)
    ids[1, 5:] = dld.PAD
    length = (ids != dld.PAD).sum(1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(model.embed(ids), length, batch_first=True,
                                                     enforce_sorted=False)
    h, _ = torch.nn.utils.rnn.pad_packed_sequence(oracle(packed)[0], batch_first=True, total_length=13)
    score = model.score(h).squeeze(-1).masked_fill(ids == dld.PAD, -torch.inf)
    weight = score.softmax(1)
    logits, found = model.attend(ids)
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, model.head((weight.unsqueeze(1) @ h).squeeze(1)), atol=1e-5, rtol=0)


def test_word_dropout_drops_the_same_features_in_all_words_of_a_text():
    h = dld.WordDropout(0.5)(torch.ones(4, 7, 100))
    assert (h == h[:, :1]).all() and 0.3 < (h == 0).float().mean() < 0.7 and set(h.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(h[0], h[1])


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_attention_sums_to_one_over_the_words_and_survives_an_empty_text(name):
    model = dld.build_model({**TEXTS, "model": name}).eval()
    ids = F.pad(random_ids(3, 6), (0, 3), value=dld.PAD)
    ids[2] = dld.PAD
    logits, weight = model.attend(ids)
    assert logits.isfinite().all()
    torch.testing.assert_close(weight.sum(1), torch.ones(3))
    assert (weight[:2, 6:] == 0).all() and (weight[:2, :6] > 0).all()
