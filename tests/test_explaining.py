"""Explanations: that they point at what the model uses, and leave the model as it was."""
import pytest
import torch
from conftest import dld, small
from torch import nn


def fit_preprocessing(raw, **settings):
    """A network after a short training, without a run folder: (model, data)."""
    config = small(**settings)
    data, machine = dld.build_dataset(raw, config), dld.start_machine(config)
    state, _ = dld.start_training(data, config, machine)
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer()))
    return state.model.eval(), data


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


@pytest.mark.parametrize(("task", "model"), [("mnist", "mlp"), ("cifar10", "classic"),
                                             ("sentiment", "lstm")])
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


def test_feature_maps_are_of_the_convolution_and_not_of_the_in_place_relu_behind_it():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1))
    network[0].weight.data.fill_(-1.0)
    found = dld.feature_maps(network, torch.rand(1, 1, 8, 8) + 1)
    assert [*found] == ["first convolution", "middle convolution"]
    assert (found["first convolution"] < 0).all()


@pytest.mark.parametrize("model", dld.ImageData.models)
def test_every_image_model_gets_an_explanation(shapes, model):
    data = dld.build_dataset(shapes, small("cifar10", model=model))
    network = dld.build_model(data.meta)
    x = data.samples.batch(data.parts["test"][:2])
    found = dld.explain_images(network, x, torch.tensor([3, 4]))
    assert list(found) == ["saliency" if model == "mlp" else "gradcam"] and untouched(network)
    assert all(maps.shape == (2, 32, 32) for maps in found.values())


def test_grad_cam_of_the_fast_network_is_seldom_empty(shapes):
    model, data = fit_preprocessing(shapes, task="cifar10", limit=200, epochs=1)
    x = data.samples.batch(data.parts["test"][:50])
    cams = dld.explain_images(model, x, model(x).argmax(1))["gradcam"]
    assert (cams.amax((1, 2)) > 0).sum() > 40


def test_a_random_explanation_fails_the_test_that_a_good_one_passes(digits):
    """Of 100 digits: marks drawn blindly, and marks where a trained network's gradients are."""
    model, data = fit_preprocessing(digits, task="mnist", limit=900, epochs=2)
    untrained, random = dld.build_model(data.meta), torch.Generator().manual_seed(1)
    passed = {}
    for name in ("blind", "good"):
        samples = dld.ImageData(dld.ImageData.pack(digits.x), data.meta)
        if name == "blind":
            samples.explain = lambda model, x, label: {
                "saliency": torch.rand(len(x), 28, 28, generator=random)}
        curves = dld.deletion_curves(model, untrained, samples, torch.arange(100), 1.0)
        found = dld.measure_explanations(curves)
        low, high = (found[f"saliency_over_random_{end}"] for end in ("low", "high"))
        assert low < found["saliency_over_random"] < high
        passed[name] = dld.passes_test(found, "saliency")
        assert ("It passed" in dld.say_explanation(found, "saliency", 100)) == passed[name]
    assert passed == {"blind": False, "good": True}


def test_attention_shown_is_attention_used_on_the_words_as_written(reviews):
    data = dld.build_dataset(reviews, small("sentiment", max_tokens=6, wide=False))
    model, samples, test = dld.build_model(data.meta).eval(), data.samples, data.parts["test"]
    rows = test[samples.length[test] > 6][:3]
    found = dld.explain_texts(model, samples.batch(rows), torch.tensor([0, 1, 1]))
    assert list(found) == ["attention", "evidence"] and untouched(model)
    used = model.attend(samples.batch(rows))[1]
    for i, words in enumerate(samples.weighted_words(rows, found["attention"])):
        assert len(words) == 7 and words.pop(3)[0] == "…", "there is more between"
        written = reviews.x[rows[i]].split()
        assert [word for word, _ in words] == written[:3] + written[-3:], "with punctuation"
        assert [weight for _, weight in words] == pytest.approx(used[i, :6].tolist(), abs=1e-6)
