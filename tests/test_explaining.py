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
    layers = dld.find_maps(model, x)
    assert len(layers) == 1 and isinstance(layers[0], nn.Sequential | nn.ReLU)
    cam = dld.grad_cam(model, x, torch.ones(3, dtype=torch.long), layers)
    assert cam.shape == (3, 32, 32) and cam.min() >= 0 and cam.max() <= 1
    assert (cam[:, :8, :8].mean((1, 2)) > 2 * cam[:, 16:, 16:].mean((1, 2))).all()
    assert torch.equal(x, before) and hooks(model) == 0
    against = dld.grad_cam(model, x, torch.zeros(3, dtype=torch.long), layers)
    assert against.max() == 0, "nothing speaks for class 0: an empty map stays empty"


@pytest.mark.parametrize("name", ["classic", "resnet18"])
def test_grad_cam_agrees_with_another_implementation(shapes, name):
    """pytorch-grad-cam's, where that is installed: the same map of each layer; that one stretches nearly empty ones."""
    library = pytest.importorskip("pytorch_grad_cam")
    data = dld.build_data(shapes, small("cifar10", model=name))
    torch.manual_seed(0)
    model = dld.build_model(data.meta).eval()
    x, label = data.samples.batch(data.parts["test"][:6]), torch.arange(6)
    compared = 0

    class Against:
        def __init__(self, c):
            self.c = c

        def __call__(self, logits):
            return logits[self.c] - torch.cat((logits[:self.c], logits[self.c + 1:])).logsumexp(0)

    layers = dld.find_maps(model, x)
    for place, (layer, mine) in enumerate(zip(layers, dld.find_evidence(model, x, label, layers), strict=True)):
        theirs = library.GradCAM if place else library.HiResCAM
        with theirs(model=model, target_layers=[layer]) as other:
            maps = torch.from_numpy(other(input_tensor=x, targets=[Against(c) for c in range(6)]))
        for one, two in zip(dld.spread_map(mine.relu(), 32).flatten(1), maps.flatten(1), strict=True):
            if one.max() > 0:
                assert torch.corrcoef(torch.stack((one, two)))[0, 1] > 0.999
                compared += 1
    assert compared >= 3


@pytest.mark.parametrize(("side", "places", "step"), [(32, 7, 4), (32, 3, 8), (28, 7, 4), (28, 13, 2), (32, 32, 1)])
def test_a_coarse_map_is_laid_where_its_places_are(side, places, step):
    """Each place of a pooled map stands for 2, 4, 8 ... pixels; what does not fill a window is left out at the end."""
    for place in (0, places // 2, places - 1):
        coarse = torch.zeros(1, places, places)
        coarse[0, place, 0] = 1
        fine = dld.spread_map(coarse, side)
        assert fine.shape == (1, side, side)
        assert place * step <= int(fine[0].amax(1).argmax()) < (place + 1) * step


def test_hooks_go_even_when_the_model_fails():
    model = Corner()
    with pytest.raises(RuntimeError), dld.watching(model, lambda *_: None):
        assert hooks(model) > 0
        model(torch.zeros(1, 5, 8, 8))
    assert hooks(model) == 0


def test_integrated_gradients_sum_to_the_difference_that_the_input_makes(shapes, reviews, digits):
    for task, raw, model in (("mnist", digits, "mlp"), ("cifar10", shapes, "classic"), ("sentiment", reviews, "lstm"),
                             ("sentiment", reviews, "transformer")):
        data = dld.build_data(raw, small(task, model=model))
        torch.manual_seed(0)
        network = dld.build_model(data.meta).eval()
        x = data.samples.batch(data.parts["test"][:3])
        label = torch.tensor([0, 1, 1])
        gains = dld.integrated_gradients(network, x, label, steps=64)
        empty = torch.zeros_like(x)

        def silence(module, _, out):
            return out * 0 if isinstance(module, nn.Embedding) else None

        with torch.no_grad():
            given = network(x)
            if x.ndim == 2:
                with dld.watching(network, silence):
                    none = network(x)
            else:
                none = network(empty)
        difference = (given - none).gather(1, label[:, None])[:, 0]
        torch.testing.assert_close(gains.flatten(1).sum(1), difference, atol=0.02, rtol=0.02)
        assert hooks(network) == 0 and all(p.grad is None for p in network.parameters())


def test_integrated_gradients_find_the_only_pixel_that_matters():
    class Pixel(nn.Module):
        def forward(self, x):
            return torch.stack((x[:, 0, 5, 9], -x[:, 0, 5, 9]), 1)

    x = torch.rand(2, 1, 28, 28)
    gains = dld.integrated_gradients(Pixel(), x, torch.tensor([0, 1]))
    assert gains[:, 5, 9].tolist() == pytest.approx([float(x[0, 0, 5, 9]), -float(x[1, 0, 5, 9])])
    assert (gains != 0).sum() == 2


@pytest.mark.parametrize(("model", "expected"), [("classic", "gradcam"), ("resnet18", "gradcam"),
                                                 ("vgg11_bn", "gradcam"), ("mlp", "saliency")])
def test_every_image_model_gets_an_explanation(shapes, model, expected):
    data = dld.build_data(shapes, small("cifar10", model=model))
    network = dld.build_model(data.meta)
    found = dld.explain_images(network, data.samples.batch(data.parts["test"][:2]), torch.tensor([3, 4]))
    assert list(found) == [expected] and found[expected].shape == (2, 32, 32)
    assert hooks(network) == 0 and not network.training
    assert all(p.grad is None for p in network.parameters())


def test_grad_cam_of_the_fast_network_is_seldom_empty(finished):
    model, meta = dld.load_model(finished["cifar10"], dld.Runtime(torch.device("cpu"), "fp32"))
    raw = dld.make_shapes(100, 100)
    x = dld.Images(dld.pack_images(raw.x), meta).batch(torch.arange(100))
    cams = dld.explain_images(model, x, model(x).argmax(1))["gradcam"]
    assert sum(cam.max() > 0 for cam in cams) > 80


def test_a_random_explanation_fails_the_test_that_a_good_one_passes(finished):
    """Of 150 shapes: marks drawn blindly, and marks on the pixels that a trained network's gradients name."""
    runtime = dld.Runtime(torch.device("cpu"), "fp32")
    model, meta = dld.load_model(finished["mnist"], runtime)
    untrained = dld.build_model(meta)
    samples = dld.Images(dld.pack_images(dld.make_digits().x), meta)
    chance = torch.Generator().manual_seed(1)

    def blind(model, x, label):
        return {"saliency": torch.rand(len(x), 28, 28, generator=chance)}

    verdicts = {}
    for name, explain in (("blind", blind), ("good", dld.explain_images)):
        curves = dld.try_explanations(model, untrained, samples, torch.arange(150), explain, meta["temperature"])
        assert curves["saliency"]["explained"].shape == (150, len(dld.SHARES))
        found = dld.measure_explanations(curves)
        verdicts[name] = dld.trusted(found, "saliency")
        assert found["saliency_over_random_low"] < found["saliency_over_random"] < found["saliency_over_random_high"]
        text = dld.say_explanation(found, "saliency")
        assert ("It can be trusted" in text) == verdicts[name]
    assert verdicts == {"blind": False, "good": True}


def test_areas_under_the_deletion_curves(shapes):
    """A curve that falls at once has no area, one that stays has all; the gain is their difference."""
    falls = torch.zeros(4, len(dld.SHARES), dtype=torch.double)
    stays = torch.ones(4, len(dld.SHARES), dtype=torch.double)
    found = dld.measure_explanations({"x": {"explained": falls, "random": stays, "untrained": falls}})
    assert found["x_area_explained"] == 0 and found["x_area_random"] == pytest.approx(1)
    assert found["x_over_random_low"] == pytest.approx(1) and found["x_over_untrained_high"] == 0
    alone = dld.measure_explanations({"x": {"explained": falls[:1], "random": stays[:1], "untrained": stays[:1]}})
    assert alone["x_over_random"] == pytest.approx(1) and alone["x_over_random_low"] <= 0, "one sample proves nothing"


def test_deleting_goes_from_the_strongest_to_all(reviews):
    class Listener(nn.Module):
        def forward(self, x):
            return torch.stack(((x == 9).sum(1).float(), torch.zeros(len(x))), 1)

    x = torch.tensor([[9, 4, 5, 9, 0, 0, 0, 0], [4, 9, 9, 9, 4, 4, 4, 4]])
    strength = (x == 9).float()
    curve = dld.delete_strongest(Listener(), x, torch.zeros(2, dtype=torch.long), strength, 1.0)
    assert curve[0, 0] == pytest.approx(torch.tensor(2.0).sigmoid()) and curve[0, 5] == pytest.approx(0.5)
    assert curve[:, -1].tolist() == [0.5, 0.5] and (curve.diff(dim=1) <= 0).all()


def test_marks_elsewhere_are_as_many_and_stay_within_the_text():
    strength = torch.tensor([[3.0, 1.0, 0.0, 0.0, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    moved = dld.elsewhere(strength, torch.tensor([4, 5]), torch.Generator().manual_seed(3))
    assert sorted(moved[0, :4].tolist()) == [0, 0, 1, 3] and moved[0, 4] == 7
    assert sorted(moved[1].tolist()) == [1, 2, 3, 4, 5]


def test_peaks_are_looked_up_on_the_object(shapes):
    data = dld.build_data(shapes, small("cifar10"))
    rows = data.parts["test"][:20]
    on = torch.from_numpy(data.masks[rows.numpy()]).float()
    assert dld.peaks_on_object(data, rows, on).all() and not dld.peaks_on_object(data, rows, 1 - on).any()
    assert not dld.peaks_on_object(data, rows, 0 * on).any(), "an empty map has no peak"


def test_attention_shown_is_attention_used(reviews):
    data = dld.build_data(reviews, small("sentiment"))
    model = dld.build_model(data.meta).eval()
    rows = data.parts["test"][:3]
    found = dld.explain_texts(model, data.samples.batch(rows), torch.tensor([0, 1, 1]))
    assert list(found) == ["attention", "evidence"]
    texts = dld.dress_texts(data.samples, rows, [], found["attention"][None])
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
    assert dld.shade([("not", -0.9), ("a", 0.05), ("b", 0.05)])[0][1] < -0.6, "words that speak against"


def test_a_text_that_is_cut_shows_where(reviews):
    data = dld.build_data(reviews, small("sentiment", max_tokens=6))
    row = data.parts["test"][data.samples.length[data.parts["test"]] > 6][:1]
    weights = dld.explain_texts(dld.build_model(data.meta), data.samples.batch(row), torch.tensor([1]))["attention"]
    words = dld.dress_texts(data.samples, row, [], weights[None])[0]
    assert len(words) == 7 and words[3] == dld.GAP and sum(weight for _, weight in words) == pytest.approx(1, abs=1e-3)


def test_the_page_holds_every_word_and_nothing_that_runs(tmp_path):
    words = [("<script>alert(1)</script>", 0.9), ("fine.", 0.1)]
    dld.write_text_weights(["-"], [dld.Verdict("<b>", "positive", 0.9)], [words], tmp_path / "a.html", "A & B\nsecond")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "A &amp; B<br>second" in page
    assert 'title="weight 90.0%"' in page and "fine." in page and "&lt;b&gt;" in page and "http" not in page
