"""The way over a GPU: a real one where there is one, else the pretend one of pretend_gpu.py."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import dld, metrics_of, small
from PIL import Image
from pretend_gpu import pretend_gpu
from test_own_data import folder_of_shapes, table

REAL = torch.cuda.is_available()
counted = pytest.mark.skipif(REAL, reason="a real GPU counts nothing")


@pytest.fixture(autouse=True)
def gpu(undrawn, monkeypatch):
    for kind in (dld.ImageData, dld.TextData):  # so many explanations are put to the test
        monkeypatch.setattr(kind, "tested", {"full": 8, "short": 4})
    if REAL:
        yield None
        return
    with pretend_gpu() as log:
        yield log


# -- whole runs ----------------------------------------------------------------------------------

FLAGS = {"cifar10": ["--width", "8", "--batch-size", "25", "--precision", "bf16"],
         "mnist": ["--width", "32", "--precision", "fp16"],
         "sentiment": ["--width", "8", "--max-tokens", "40", "--precision", "fp32"]}


def command(*arguments):
    assert dld.main([*map(str, arguments)]) == 0


def train(place, *flags):
    """A run on the GPU: its folder."""
    command("--device", "cuda", "--output-dir", place, *flags)
    return max(place.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With their full reports, made when asked for."""
    found = {}

    def get(task):
        if task not in found:
            found[task] = train(tmp_path_factory.mktemp("gpu"), "--task", task, "--data",
                                "offline", "--limit", "150", "--epochs", "2", *FLAGS[task])
        return found[task]
    return get


@pytest.mark.parametrize("task", FLAGS)
def test_a_run_predicts_on_the_cpu_what_it_predicted_on_the_gpu(task, runs):
    folder, cpu = runs(task), dld.Config(task=task, device="cpu", precision="fp32")
    metrics = metrics_of(folder)
    assert metrics["device"].endswith(FLAGS[task][-1]) and "cpu" not in metrics["device"]
    assert (folder / "report.html").stat().st_size > 10_000
    ready = dld.Predictor(folder, dld.start_machine(cpu))
    data = dld.build_dataset(dld.TASKS[task].offline(), small(task, limit=150))
    rows = data.parts["test"]
    probs = ready.probabilities(ready.pack(
        [data.samples.tokens.texts[row] for row in rows.tolist()] if task == "sentiment"
        else data.samples.pixels[rows].numpy()))
    there = pd.read_csv(folder / "predictions.csv")
    assert [*there["row"]] == rows.tolist()
    difference = np.abs(probs.numpy() - there.filter(like="p_").to_numpy()).max()
    assert difference < (1e-5 if FLAGS[task][-1] == "fp32" and not REAL else 0.05)


def test_a_model_from_the_gpu_is_used_there(runs, tmp_path):
    folder, picture = runs("mnist"), tmp_path / "digit.png"
    Image.fromarray(dld.make_digits().x[0, 0]).save(picture)
    command("--predict", picture, "--run", folder, "--device", "cuda", "--explain",
            "--output", tmp_path / "out.csv")
    assert len(pd.read_csv(tmp_path / "out.csv")) == 1
    ready = dld.Predictor(folder, dld.start_machine(dld.Config(task="mnist", device="cuda")))
    answer = dld.answer_request(ready, "image/png", picture.read_bytes(), explain=True)
    assert answer["overlay"].startswith("data:image/png")
    command("--evaluate", "--run", folder, "--device", "cuda")
    command("--export", "pt2", "--run", folder)


@pytest.mark.parametrize(("task", "flags"), [
    ("mnist", ["--folds", "2", "--limit", "100"]),
    ("sentiment", ["--limit", "40", "--model", "transformer", "--precision", "bf16", "--no-wide"])])
def test_other_trainings_run_there_and_go_on(task, flags, tmp_path):
    folder = train(tmp_path, "--task", task, "--data", "offline", "--epochs", "1", *FLAGS[task],
                   "--report", "minimal", *flags)
    command("--resume", folder, "--epochs", "2")
    assert metrics_of(folder)["epochs"] == 2


def test_own_pictures_and_texts_are_learnt_there_from_what_was_learnt_before(runs, tmp_path):
    shapes = folder_of_shapes(tmp_path / "shapes", 60)
    flags = ["--report", "short", "--epochs", "1", "--limit", "40"]
    first = train(tmp_path / "one", "--task", "images", "--data", shapes, *flags, "--init",
                  runs("cifar10"), *FLAGS["cifar10"])
    raw = dld.make_reviews(80, 10)
    rows = [(i, text, ("bad", "good")[y])
            for i, (text, y) in enumerate(zip(raw.x, raw.y, strict=True))]
    file = table(tmp_path / "reviews.csv", rows)
    second = train(tmp_path / "two", "--task", "text", "--data", file, *flags, *FLAGS["sentiment"])
    for folder in (first, second):
        assert metrics_of(folder)["baseline_accuracy"] > 0


def test_settings_are_sought_there(tmp_path):
    pytest.importorskip("optuna")
    command("--task", "mnist", "--data", "offline", "--device", "cuda", "--search", "2",
            "--limit", "60", "--epochs", "1", "--width", "16", "--output-dir", tmp_path)
    assert len(pd.read_csv(tmp_path / "search-mnist-offline-digits" / "trials.csv")) == 2


# -- training ------------------------------------------------------------------------------------


class Counting(dld.Checkpointer):
    """Notes what each step launched, and how often it waited."""

    def __init__(self, log):
        super().__init__()
        self.log, self.marks = log, []

    def after_step(self, state, group):
        super().after_step(state, group)
        self.marks.append((self.log.launches, self.log.waits.total()))

    @property
    def steps(self):
        return [tuple(np.subtract(b, a)) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def start(task, **settings):
    """All that a training begins with, on the GPU unless told otherwise."""
    config = small(task, **{"device": "cuda", "limit": 200, "batch_size": 10, "epochs": 1,
                            "width": 16, "wide": False, **settings})
    machine = dld.start_machine(config)
    data = dld.build_dataset(dld.TASKS[task].offline(), config)
    data.samples.to(machine.device)
    state, _ = dld.start_training(data, config, machine)
    return state, dld.Context(config, data, machine, dld.Checkpointer())


def fit(*arguments, checkpointer=None, **settings):
    state, context = start(*arguments, **settings)
    context.checkpointer = checkpointer or context.checkpointer
    dld.fit(state, context)
    return state


def losses(state):
    return [row["train_loss"] for row in state.history]


@pytest.mark.parametrize("task", FLAGS)
def test_the_gpu_learns_what_the_cpu_learns(task):
    still = {"word_dropout": 0.0, "max_tokens": 40} if task == "sentiment" else {"augment": False}
    one, two = (fit(task, device=device, batch_size=50, epochs=2, dropout=0.0, **still)
                for device in ("cuda", "cpu"))  # without chance, which differs
    assert losses(one) == pytest.approx(losses(two), rel=0.05 if REAL else 2e-3)


@pytest.mark.parametrize(("task", "precision"), [("cifar10", "bf16"), ("mnist", "fp16")])
def test_recorded_steps_are_the_steps_that_they_stand_for(task, precision, monkeypatch, gpu):
    recorded = fit(task, precision=precision, epochs=2)
    assert REAL or gpu.calls["graph"] > 5
    monkeypatch.setattr(dld.Stepper, "WARM_UP", 10**6)
    plain = fit(task, precision=precision, epochs=2)
    assert losses(recorded) == (pytest.approx(losses(plain), rel=0.1) if REAL else losses(plain))


def test_where_steps_cannot_be_recorded_training_goes_on(monkeypatch):
    plain, said, honest = fit("mnist", precision="fp16"), [], F.cross_entropy

    def looked_at(logits, y):
        loss = honest(logits, y)
        assert float(loss.detach()) > 0
        return loss

    monkeypatch.setattr(F, "cross_entropy", looked_at)
    state = fit("mnist", precision="fp16", checkpointer=dld.Checkpointer(say=said.append))
    assert REAL or losses(state) == losses(plain)
    assert len(said) == 1 and said[0].startswith("NOTE  training steps cannot be recorded")


def test_what_is_recorded_gives_way_where_memory_is_too_small(monkeypatch):
    plain, said, honest, calls = fit("mnist", limit=203), [], dld.train_step, []

    def step(*arguments):
        calls.append(0)
        if len(calls) == 5:  # the first batch of nine, when one of ten is recorded
            raise dld.Failure("out of memory")
        return honest(*arguments)

    monkeypatch.setattr(dld, "train_step", step)
    state = fit("mnist", limit=203, checkpointer=dld.Checkpointer(say=said.append))
    assert len(said) == 1 and "out of memory" in said[0]
    assert REAL or losses(state) == losses(plain)


@counted
@pytest.mark.parametrize(("task", "settings", "most"), [
    ("cifar10", {"precision": "bf16"}, 4), ("mnist", {"precision": "fp16"}, 4),
    ("sentiment", {"precision": "bf16"}, 211),
    ("sentiment", {"precision": "bf16", "model": "transformer"}, 358)])
def test_a_step_launches_little_and_waits_for_nothing(task, settings, most, gpu):
    counts = Counting(gpu)
    fit(task, **settings, epochs=2, checkpointer=counts)
    last = counts.steps[-6:-1]  # an epoch ends with waiting
    assert max(launches for launches, _ in last) <= most, last
    assert not any(waits for _, waits in last), gpu.waits


@counted
def test_pictures_that_do_not_fit_stay_outside_and_nobody_waits_for_them(monkeypatch, gpu):
    within = fit("mnist", epochs=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
    counts = Counting(gpu)
    state, context = start("mnist", epochs=2)
    assert context.data.samples.pixels.device.type == "cpu"
    context.data.samples.made_at_once, context.checkpointer = 100, counts
    dld.fit(state, context)
    assert losses(state) == pytest.approx(losses(within), rel=0.3)
    assert not any(waits for _, waits in counts.steps[-6:-1]), gpu.waits


@counted
def test_predictions_are_few_launches_and_speed_is_measured_to_the_end(gpu):
    state, context = start("cifar10", limit=600)
    context.data.samples.tta_margin = 100.0  # all are unsure
    rows, before = context.data.parts["train"], gpu.launches
    dld.predict_logits(state.model, context.data.samples, rows, context.machine)
    assert len(rows) == 600 and gpu.launches - before < 250
    gpu.waits.clear()
    dld.measure_speed(context.data, context.config, context.machine)
    assert gpu.waits["synchronize: torch.accelerator.synchronize()"] > 2


@pytest.mark.parametrize("task", ["cifar10", "mnist"])
def test_a_gradient_that_is_infinite_costs_a_step_and_no_weight(task):
    state, context = start(task, precision="fp16")
    context.config = dataclasses.replace(context.config, weight_decay=0.0)
    rows = context.data.parts["train"][:50]
    x = context.data.samples.batch(rows)
    y = context.data.shares(context.data.labels[rows].to(x.device))
    stepper = dld.Stepper(state, context)
    stepper.take(x, y, 0.0, 0.01)
    scale, before = state.scaler.get_scale(), dld.copy_weights(state.model, "cpu")
    stepper.take(x, y, 0.0, 0.01, weight=float("inf"))
    for name, p in state.model.named_parameters():  # Muon restores lengths
        now, then = (F.normalize(x.flatten(), dim=0) for x in (p.detach().cpu(), before[name]))
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-6)
    assert state.scaler.get_scale() == scale / 2
    stepper.take(x, y, 0.0, 0.01)
    assert all(p.isfinite().all() for p in state.model.parameters())
    assert not torch.equal(state.model.state_dict()[name].cpu(), before[name]), "it learns again"


def test_one_lstm_is_two_beside_each_other(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    reader, h = dld.BiLSTM(8, 0.0), torch.randn(5, 9, dld.WORD_DIM + dld.PAIR_DIM)
    length = torch.tensor([[9], [1], [4], [8], [2]])
    real = torch.arange(9) < length
    here = reader(h, length)[real]
    (here ** 2).sum().backward()
    gradients = [p.grad.clone() for p in reader.parameters()]
    reader.zero_grad()
    reader = reader.to("cuda:0")
    there = reader(h.to("cuda:0"), length.to("cuda:0")).cpu()[real]
    (there ** 2).sum().backward()
    torch.testing.assert_close(there, here, atol=1e-5, rtol=0)
    for p, other in zip(reader.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad.cpu(), other, atol=1e-4, rtol=1e-4)
    with torch.autocast("cuda", dtype=torch.bfloat16):  # of which cuDNN would make float16
        half = reader(h.to("cuda:0"), length.to("cuda:0")).cpu()[real]
    torch.testing.assert_close(half, here, atol=1e-5, rtol=0)


# -- what would stop a run on a GPU is noticed ---------------------------------------------------


def plant_in_augmentation(state, context, monkeypatch):
    honest = dld.augment_batch
    monkeypatch.setattr(dld, "augment_batch", lambda x, noise, mirrored, **more: honest(
        x, noise, mirrored.cpu(), **more))
    dld.fit(state, context)


def plant_in_loss(state, context, monkeypatch):
    honest = context.data.shares
    monkeypatch.setattr(context.data, "shares", lambda targets: honest(targets).cpu())
    dld.fit(state, context)


def plant_in_optimizer(state, context, monkeypatch):
    name = next(iter(state.optimizer.state))
    state.optimizer.state[name] = {p: x.cpu() for p, x in state.optimizer.state[name].items()}
    dld.fit(state, context)


def plant_in_checkpoint(state, context, monkeypatch):
    values = state.capture(context.machine.group)
    state.restore(values, context.machine.group)
    state.sums = state.sums.cpu()  # what a restored state must not hold
    dld.fit(state, context)


def plant_in_views(state, context, monkeypatch):
    samples = context.data.samples
    samples.tta_margin, honest = 100.0, samples.views
    monkeypatch.setattr(samples, "views", lambda x: [view.cpu() for view in honest(x)])
    dld.predict_logits(state.model, samples, context.data.parts["val"], context.machine)


def first(context, n=3):
    """Some samples and classes."""
    x = context.data.samples.batch(context.data.parts["test"][:n])
    return x, torch.zeros(n, dtype=torch.int64, device=x.device)


def plant_in_grad_cam(state, context, monkeypatch):
    honest = dld.layer_cams
    monkeypatch.setattr(dld, "layer_cams", lambda *given: [m.cpu() for m in honest(*given)])
    dld.explain_images(state.model, *first(context))


def plant_in_integrated_gradients(state, context, monkeypatch):
    x, label = first(context)
    dld.integrated_gradients(state.model, x, label.cpu())


def plant_in_deletion(state, context, monkeypatch):
    x, label = first(context)
    dld.deletion_curve(state.model, x, label, torch.rand(x.shape), 1.0)


def plant_in_vectors(state, context, monkeypatch):
    state.model.pairs.cpu()
    dld.predict_logits(state.model, context.data.samples, context.data.parts["val"],
                       context.machine)


PLANTS = {plant_in_augmentation: "cifar10", plant_in_loss: "mnist", plant_in_optimizer: "mnist",
          plant_in_checkpoint: "mnist", plant_in_views: "cifar10", plant_in_grad_cam: "cifar10",
          plant_in_integrated_gradients: "sentiment", plant_in_deletion: "sentiment",
          plant_in_vectors: "sentiment"}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_tensor_that_was_left_on_the_cpu_is_noticed(plant, monkeypatch):
    state, context = start(PLANTS[plant], limit=100)
    with pytest.raises((RuntimeError, ValueError), match=r"same device|on the CPU|be the same"):
        plant(state, context, monkeypatch)


@counted
def test_the_pretend_gpu_minds_generators_and_keeps_waits_out_of_graphs(gpu):
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device="cuda")
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
        x.sum().item()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(x.sum())
    assert x.tolist() == [1, 1, 1], "recording changes nothing"
    graph.replay()
    graph.replay()
    assert x.tolist() == [16, 16, 16]
