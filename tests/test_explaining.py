"""Explanations: that they point at what the model uses, and leave the model as it was."""
import pytest
import torch
from conftest import dld, small
from torch import nn

CPU = dld.Machine(torch.device("cpu"), "fp32")


def untouched(model):
    """Explaining has left nothing behind: no hook, no gradient, no dropout switched on."""
    return not model.training and all(p.grad is None for p in model.parameters()) and not any(
        module._forward_hooks or module._backward_hooks for module in model.modules())


class Corner(nn.Module):
    """Class 1 if the upper left corner is bright, else class 0: a good explanation is known."""

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
    cam = dld.explain_images(model, x, torch.ones(3, dtype=torch.long))["gradcam"]
    assert cam.shape == (3, 32, 32) and cam.min() >= 0 and cam.max() <= 1
    assert (cam[:, :8, :8].mean((1, 2)) > 2 * cam[:, 16:, 16:].mean((1, 2))).all()
    against = dld.explain_images(model, x, torch.zeros(3, dtype=torch.long))["gradcam"]
    assert against.max() == 0, "nothing speaks for class 0: an empty map stays empty"
    with pytest.raises(RuntimeError):
        dld.explain_images(model, torch.zeros(1, 5, 8, 8), torch.tensor([0]))
    assert torch.equal(x, before) and untouched(model), "not even after a failure"


@pytest.mark.parametrize(("side", "places", "step"),
                         [(32, 7, 4), (32, 3, 8), (28, 7, 4), (28, 13, 2), (32, 32, 1)])
def test_a_coarse_map_is_laid_where_its_places_are(side, places, step):
    """Each place stands for 1, 2, 4, 8 pixels; what fills no window is left out at the end."""
    class Pooled(nn.Module):
        def forward(self, x):
            light = self.pool(x[..., :places * step, :places * step]).sum((1, 2, 3))
            return torch.stack((0 * light, light), 1)

    model = Pooled()
    model.pool = nn.AvgPool2d(step)
    for place in (0, places // 2, places - 1):
        x = torch.zeros(1, 1, side, side)
        x[0, 0, place * step:(place + 1) * step] = 1
        cam = dld.grad_cam(model, x, torch.tensor([1]), [model.pool])
        assert place * step <= int(cam[0].amax(1).argmax()) < (place + 1) * step


@pytest.mark.parametrize(("task", "model"), [("mnist", "mlp"), ("cifar10", "classic"),
                                             ("sentiment", "lstm"), ("sentiment", "transformer")])
def test_integrated_gradients_sum_to_the_difference_that_the_input_makes(request, task, model):
    raw = request.getfixturevalue({"mnist": "digits", "cifar10": "shapes"}.get(task, "reviews"))
    data = dld.build_dataset(raw, small(task, model=model))
    torch.manual_seed(0)
    network = dld.build_model(data.meta).eval()
    x, label = data.samples.batch(data.parts["test"][:3]), torch.tensor([0, 1, 1])
    gains = dld.integrated_gradients(network, x, label, steps=64)
    assert untouched(network)
    with torch.no_grad():
        given = network(x)
        for module in network.modules():  # nothing said: pictures of zeros, words without a vector
            if isinstance(module, nn.Embedding):
                module.weight.zero_()
        nothing = network(x if x.ndim == 2 else 0 * x)
    difference = (given - nothing).gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(gains.flatten(1).sum(1), difference, atol=0.02, rtol=0.02)


def test_integrated_gradients_find_the_only_pixel_that_matters():
    class Pixel(nn.Module):
        def forward(self, x):
            return torch.stack((x[:, 0, 5, 9], -x[:, 0, 5, 9]), 1)

    x = torch.rand(2, 1, 28, 28) + 0.1
    gains = dld.integrated_gradients(Pixel(), x, torch.tensor([0, 1]))
    assert gains[:, 5, 9].tolist() == pytest.approx([float(x[0, 0, 5, 9]), -float(x[1, 0, 5, 9])])
    assert (gains != 0).sum() == 2


@pytest.mark.parametrize("model", [*dld.ImageData.models, "resnet18"])
def test_every_image_model_gets_an_explanation(shapes, model):
    data = dld.build_dataset(shapes, small("cifar10", model=model))
    network = dld.build_model(data.meta)
    x = data.samples.batch(data.parts["test"][:2])
    found = dld.explain_images(network, x, torch.tensor([3, 4]))
    assert list(found) == ["saliency" if model == "mlp" else "gradcam"] and untouched(network)
    assert all(maps.shape == (2, 32, 32) for maps in found.values())


def test_grad_cam_of_the_fast_network_is_seldom_empty(finished):
    model, meta = dld.load_model(finished["cifar10"], CPU)
    x = dld.ImageData(dld.ImageData.pack(dld.make_shapes(100, 0).x), meta).batch(torch.arange(100))
    cams = dld.explain_images(model, x, model(x).argmax(1))["gradcam"]
    assert (cams.amax((1, 2)) > 0).sum() > 80


def test_a_random_explanation_fails_the_test_that_a_good_one_passes(finished, digits):
    """Of 150 digits: marks drawn blindly, and marks where a trained network's gradients are."""
    model, meta = dld.load_model(finished["mnist"], CPU)
    untrained, random = dld.build_model(meta), torch.Generator().manual_seed(1)
    passed = {}
    for name in ("blind", "good"):
        samples = dld.ImageData(dld.ImageData.pack(digits.x), meta)
        if name == "blind":
            samples.explain = lambda model, x, label: {
                "saliency": torch.rand(len(x), 28, 28, generator=random)}
        curves = dld.deletion_curves(model, untrained, samples, torch.arange(150),
                                     meta["temperature"])
        found = dld.measure_explanations(curves)
        low, high = (found[f"saliency_over_random_{end}"] for end in ("low", "high"))
        assert low < found["saliency_over_random"] < high
        passed[name] = dld.passes_test(found, "saliency")
        assert ("It can be trusted" in dld.say_explanation(found, "saliency")) == passed[name]
    assert passed == {"blind": False, "good": True}


def test_areas_under_the_deletion_curves():
    """A curve that falls at once has no area, one that stays has all; the gain is the rest."""
    stays = torch.ones(4, len(dld.DELETED_SHARES), dtype=torch.double)
    falls = 0 * stays
    found = dld.measure_explanations(
        {"x": {"explained": falls, "random": stays, "untrained": falls}})
    assert found["x_area_explained"] == 0 and found["x_area_random"] == pytest.approx(1)
    assert found["x_over_random_low"] == pytest.approx(1) and found["x_over_untrained_high"] == 0
    one = dld.measure_explanations(
        {"x": {"explained": falls[:1], "random": stays[:1], "untrained": stays[:1]}})
    assert one["x_over_random"] == pytest.approx(1), "one sample proves nothing"
    assert one["x_over_random_low"] <= 0


def test_deleting_goes_from_the_strongest_to_all():
    class Listener(nn.Module):
        def forward(self, x):
            return torch.stack(((x == 9).sum(1).float(), torch.zeros(len(x))), 1)

    x = torch.tensor([[9, 4, 5, 9, 0, 0, 0, 0], [4, 9, 9, 9, 4, 4, 4, 4]])
    label = torch.zeros(2, dtype=torch.long)
    curve = dld.deletion_curve(Listener(), x, label, (x == 9).float(), 1.0)
    half = dld.DELETED_SHARES.index(0.5)
    assert curve[0, 0] == pytest.approx(torch.tensor(2.0).sigmoid())
    assert curve[0, half] == curve[1, half] == pytest.approx(0.5), "of the words, not of the room"
    assert curve[:, -1].tolist() == [0.5, 0.5] and (curve.diff(dim=1) <= 0).all()


def test_marks_at_random_are_as_many_and_stay_within_the_text():
    strength = torch.tensor([[3.0, 1.0, 0.0, 0.0, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    random = torch.Generator().manual_seed(3)
    moved = dld.shift_randomly(strength, torch.tensor([4, 5]), random)
    assert sorted(moved[0, :4].tolist()) == [0, 0, 1, 3] and moved[0, 4] == 7
    assert sorted(moved[1].tolist()) == [1, 2, 3, 4, 5]


def test_peaks_are_looked_up_on_the_object(shapes):
    rows = torch.arange(20)
    on = torch.from_numpy(shapes.masks[:20]).float()
    assert dld.peaks_on_object(shapes.masks, rows, on).all()
    for other in (1 - on, 0 * on):  # an empty map has no peak
        assert not dld.peaks_on_object(shapes.masks, rows, other).any()


@pytest.mark.parametrize("longest", [400, 6])
def test_attention_shown_is_attention_used_on_the_words_as_written(reviews, longest):
    data = dld.build_dataset(reviews, small("sentiment", max_tokens=longest))
    model, samples, test = dld.build_model(data.meta).eval(), data.samples, data.parts["test"]
    rows = test[samples.length[test] > 6][:3]
    found = dld.explain_texts(model, samples.batch(rows), torch.tensor([0, 1, 1]))
    assert list(found) == ["attention", "evidence"] and untouched(model)
    for row, words in zip(rows, samples.weighted_words(rows, found["attention"]), strict=True):
        written = reviews.x[row].split()
        if longest == 6:  # the beginning and the end, and a sign that there is more between
            assert len(words) == 7 and words.pop(3)[0] == "…"
            written = written[:3] + written[-3:]
        assert [word for word, _ in words] == written, "with their punctuation"
        used = model.attend(samples.batch(row.unsqueeze(0)))[1][0, :len(words)]
        torch.testing.assert_close(torch.tensor([weight for _, weight in words]), used,
                                   atol=1e-6, rtol=0)


def test_a_shade_means_the_same_in_every_text():
    even = [(str(i), 0.01) for i in range(100)]
    uneven = [("a", 0.5), ("b", 0.02), *[("c", 0.48 / 98)] * 98]
    assert {dark for *_, dark in dld.shade(even)} == {0.0}, "no word stands out: none is shaded"
    assert [round(dark, 2) for *_, dark in dld.shade(uneven)[:3]] == [1.0, 0.5, 0.0]
    assert dld.shade([("good", 0.6), ("…", 0.0), ("film", 0.4)])[1] == ("…", 0.0, 0.0)
    assert dld.shade([("not", -0.9), ("a", 0.05), ("b", 0.05)])[0][2] < -0.6, "speaks against"


def test_the_page_of_words_holds_every_word_and_nothing_that_runs(tmp_path):
    texts = ["<script>alert(1)</script> fine.", "a & b"]
    samples = dld.TextData(dld.TextData.pack(texts), {"vocabulary": [], "max_tokens": 9})
    said = [dld.Verdict("<b>", "positive", 0.9), dld.Verdict("negative", "negative", 0.9)]
    weights = torch.tensor([[[0.9, -0.05, 0.02, 0.02, 0.01], [0.5, 0.5, 0.0, 0.0, 0.0]]])
    samples.write_maps(torch.arange(2), said, [[], []], weights, tmp_path / "a", "A & B\nsecond")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script" not in page and "http" not in page and "<b>" not in page
    for shown in ("&lt;script&gt;", "A &amp; B<br>second", 'title="weight 90.0%"', "fine.",
                  "&lt;b&gt;", "alert("):
        assert shown in page
