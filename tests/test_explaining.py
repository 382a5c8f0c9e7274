"""Explanations: that they point at what the model uses, and leave the model as it was."""
import pytest
import torch
from conftest import dld, small
from torch import nn


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules())


class Corner(nn.Module):
    """Class 1 if the upper left corner is bright, else class 0: it is known what a good explanation must show."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(inplace=True))
        self.features[0].weight.data.fill_(1.0)

    def forward(self, x):
        corner = self.features(x)[:, :, :8, :8].mean((1, 2, 3))
        return torch.stack((0.1 + 0 * corner, corner), 1)


def test_grad_cam_points_at_the_evidence_even_behind_an_in_place_relu():
    model, x = Corner().eval(), torch.rand(3, 1, 32, 32) + 0.5
    x[:, :, :8, :8] += 3
    before = x.clone()
    layer = dld.find_last_map(model, x)
    assert isinstance(layer, nn.Sequential | nn.ReLU)
    cam = dld.grad_cam(model, x, layer)
    assert cam.shape == (3, 32, 32) and cam.min() >= 0 and cam.max() <= 1
    assert (cam[:, :8, :8].mean((1, 2)) > 2 * cam[:, 16:, 16:].mean((1, 2))).all()
    assert torch.equal(x, before) and hooks(model) == 0


def test_an_empty_map_stays_empty():
    class Silent(Corner):
        def forward(self, x):
            return torch.stack((1 + 0 * self.features(x).mean((1, 2, 3)), torch.zeros(len(x))), 1)

    model, x = Silent().eval(), torch.rand(2, 1, 32, 32)
    assert dld.grad_cam(model, x, dld.find_last_map(model, x)).max() == 0


def test_hooks_go_even_when_the_model_fails():
    model = Corner()
    with pytest.raises(RuntimeError), dld.watching(model, lambda *_: None):
        assert hooks(model) > 0
        model(torch.zeros(1, 5, 8, 8))
    assert hooks(model) == 0


def test_saliency_finds_the_only_pixel_that_matters():
    class Pixel(nn.Module):
        def forward(self, x):
            return torch.stack((x[:, 0, 5, 9], -x[:, 0, 5, 9]), 1)

    strength = dld.saliency(Pixel(), torch.rand(2, 1, 28, 28))
    assert strength.shape == (2, 28, 28) and (strength[:, 5, 9] == 1).all() and strength.sum() == 2


@pytest.mark.parametrize(("model", "expected"), [("classic", "gradcam"), ("resnet18", "gradcam"),
                                                 ("vgg11_bn", "gradcam"), ("mlp", "saliency")])
def test_every_image_model_gets_an_explanation(shapes, model, expected):
    data = dld.build_data(shapes, small("cifar10", model=model))
    network = dld.build_model(data.meta)
    name, maps = dld.explain_images(network, data.samples, data.parts["test"][:2])
    assert name == expected and len(maps) == 2 and maps[0].shape == (32, 32)
    assert hooks(network) == 0 and not network.training
    assert all(p.grad is None for p in network.parameters())


def test_grad_cam_of_the_fast_network_is_seldom_empty(finished):
    model, meta = dld.load_model(finished["cifar10"], dld.Runtime(torch.device("cpu"), "fp32"))
    raw = dld.make_shapes(100, 100)
    name, maps = dld.explain_images(model, dld.Images(dld.pack_images(raw.x), meta), torch.arange(100))
    assert name == "gradcam"
    assert sum(cam.max() > 0 for cam in maps) > 80


def test_attention_shown_is_attention_used(reviews):
    data = dld.build_data(reviews, small("sentiment"))
    model = dld.build_model(data.meta).eval()
    rows = data.parts["test"][:3]
    name, texts = dld.explain_texts(model, data.samples, rows)
    assert name == "attention"
    for row, words in zip(rows, texts, strict=True):
        assert [word for word, _ in words] == reviews.x[row].split(), "as written, with its punctuation"
        used = model.attend(data.samples.batch(row.unsqueeze(0)))[1][0, :len(words)]
        torch.testing.assert_close(torch.tensor([weight for _, weight in words]), used, atol=1e-6, rtol=0)


def test_the_strongest_passages_of_a_long_text():
    words = [(str(i), 5.0 if i in (50, 52, 80) else 0.5) for i in range(100)]
    shown = [word for word, _ in dld.strongest_passages(words, 30)]
    assert shown == ["…", *map(str, range(44, 59)), "…", *map(str, range(74, 87)), "…"]
    assert dld.strongest_passages(words[:30], 30) == words[:30]


def test_a_shade_means_the_same_in_every_text():
    even, uneven = [(str(i), 0.01) for i in range(100)], [("a", 0.5), ("b", 0.02), *[("c", 0.48 / 98)] * 98]
    assert {dark for _, dark in dld.shade(even)} == {0.0}, "no word stands out, so none is shaded"
    assert [round(dark, 2) for _, dark in dld.shade(uneven)[:3]] == [1.0, 0.5, 0.0]
    assert dld.shade([("good", 0.6), dld.GAP, ("film", 0.4)])[1] == dld.GAP


def test_a_text_that_is_cut_shows_where(reviews):
    data = dld.build_data(reviews, small("sentiment", max_tokens=6))
    row = data.parts["test"][data.samples.length[data.parts["test"]] > 6][:1]
    words = dld.explain_texts(dld.build_model(data.meta), data.samples, row)[1][0]
    assert len(words) == 7 and words[3] == dld.GAP and sum(weight for _, weight in words) == pytest.approx(1, abs=1e-3)


def test_the_page_holds_every_word_and_nothing_that_runs(tmp_path):
    words = [("<script>alert(1)</script>", 0.9), ("fine.", 0.1)]
    dld.write_text_weights(["-"], [dld.Verdict("<b>", "positive", 0.9)], [words], tmp_path / "a.html", "A & B\nsecond")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "A &amp; B<br>second" in page
    assert 'title="weight 90.0%"' in page and "fine." in page and "&lt;b&gt;" in page and "http" not in page
