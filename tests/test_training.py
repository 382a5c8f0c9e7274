"""The loop: seeds, schedules, checkpoints, and what decides the best epoch."""
import dataclasses
import math
import sys

import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of, small

RAW = {"cifar10": "shapes", "mnist": "digits", "sentiment": "reviews"}  # fixtures


def fit(raw, config, before=None, on_epoch=lambda state: None, checkpointer=None):
    """Train without a run folder; `before` may touch the data or the state first."""
    machine = dld.start_machine(config)
    data = dld.build_dataset(raw, config)
    state, _ = dld.start_training(data, config, machine)
    checkpointer = checkpointer or dld.Checkpointer()
    if checkpointer.path:
        dld.restore_checkpoint(state, checkpointer.path, machine.group)
    if before:
        before(data, state)
    dld.fit(state, dld.Context(config, data, machine, checkpointer, on_epoch))
    return state


def figures(state):
    """The history without its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in state.history]


def same(one, two):
    """Whether two trainings ended with the same bits."""
    pairs = [*zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True),
             *zip(one.best_weights.values(), two.best_weights.values(), strict=True)]
    return figures(one) == figures(two) and all(torch.equal(a, b) for a, b in pairs)


def with_unlabelled(reviews):
    return dataclasses.replace(reviews, x=[*reviews.x, *reviews.x[:600]], packed=None)


def test_the_report_says_what_training_figures_are_measured_against(reviews):
    m = {"val_samples": 50, "deep_share": 0.5}
    for raw, said in ((reviews, "The curves are the network's own"),
                      (with_unlabelled(reviews), "on the others, with the wide part beside it. "
                                                 "Validation is the network's own")):
        config = small("sentiment", limit=150, epochs=2, class_weights="balanced")
        data = dld.build_dataset(raw, config)
        dld.start_training(data, config, dld.start_machine(config))
        text = dld.say_difference(data, dataclasses.asdict(config), m)
        assert said in text and "weights of the classes" in text


@pytest.mark.parametrize(("task", "precision"), [("cifar10", "fp32"), ("mnist", "bf16"),
                                                 ("sentiment", "fp16")])
def test_one_seed_gives_the_same_bits_and_another_does_not(task, precision, request):
    raw = request.getfixturevalue(RAW[task])
    config = small(task, limit=50, epochs=1, precision=precision)
    one = fit(raw, config)
    assert same(one, fit(raw, config))
    assert not same(one, fit(raw, dataclasses.replace(config, seed=1)))


@pytest.mark.parametrize("task", ["mnist", "sentiment"])
def test_neither_samples_nor_labels_of_the_test_part_matter_to_training(task, request):
    raw = request.getfixturevalue(RAW[task])
    x, y = raw.x.copy(), raw.y.copy()
    y[raw.n_train:] = 0
    others = x[raw.n_train:] // 2 if task == "mnist" else ["good " * 9] * (len(x) - raw.n_train)
    x[raw.n_train:] = others
    forged = dataclasses.replace(raw, x=x, y=y, packed=None)
    config = small(task, limit=100, epochs=1)
    assert same(fit(raw, config), fit(forged, config))


class Stopping(dld.Checkpointer):
    """Is asked to end the training after so many steps."""

    def __init__(self, path, steps):
        super().__init__(path)
        self.steps = steps

    def after_step(self, state, group):
        self.steps -= 1
        self.interrupt.requested = self.steps == 0
        super().after_step(state, group)


@pytest.mark.parametrize("task", RAW)
def test_a_resumed_training_ends_with_the_same_bits(task, request, tmp_path):
    raw = request.getfixturevalue(RAW[task])
    raw = with_unlabelled(raw) if task == "sentiment" else raw
    schedule = "constant" if task == "mnist" else "linear"
    config = small(task, limit=150, epochs=2, batch_size=40, schedule=schedule)
    path = tmp_path / "checkpoint.pt"
    for steps in (3, 1, 1):  # an epoch has four: the last one ends all but its validation
        with pytest.raises(dld.Interrupted):
            fit(raw, config, checkpointer=Stopping(path, steps))
    resumed = fit(raw, config, checkpointer=dld.Checkpointer(path))
    assert same(resumed, fit(raw, config))
    assert set(dld.load_file(path, dld.STATE_FORMAT)["model"]) == set(resumed.model.state_dict())


def test_the_best_epoch_is_the_best_on_validation_and_patience_stops(digits):
    state = fit(digits, small("mnist", limit=200, epochs=30, patience=2, lr=0.02,
                              schedule="constant"))
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in state.history]
    assert state.best["epoch"] == 1 + scores.index(max(scores)) == state.epoch - 2
    assert state.epoch < 30


def test_nothing_is_timed_where_there_is_nothing_to_predict(digits, monkeypatch):
    monkeypatch.setattr(dld, "choose_threads", lambda job: pytest.fail("two times of nothing"))
    config = small("mnist", limit=60, epochs=1, folds=2)  # without a validation part
    data, machine = dld.build_dataset(digits, config), dld.start_machine(config)
    state, _ = dld.start_training(data, config, machine)
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer(),
                               affordable=lambda state: 1))


def test_muon_steps_equally_far_in_all_directions_and_keeps_each_weights_length():
    torch.manual_seed(0)
    weight, last = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((8, 4, 3, 3), (5, 8)))
    start = weight.detach().clone()
    gradient = torch.randn(8, 36) * torch.linspace(0.1, 3, 8)[:, None]
    weight.grad = gradient.view_as(weight).clone()
    dld.Muon([weight, last], [], lr=0.1).step()
    kept = start * 8 ** 0.5 / start.norm()  # brought to its length, then moved
    before, after = (torch.linalg.svdvals(x.detach().flatten(1))
                     for x in (gradient, (kept - weight) / 0.1))
    assert after.max() < 1.4 and after.max() / after.min() < before.max() / before.min() / 2


@pytest.mark.parametrize("schedule", ["linear", "cosine", "onecycle", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule):
    config = small("mnist", lr=0.1, schedule=schedule)
    rates = [dld.learning_rate(config, step / 1000) for step in range(1000)]
    falls = schedule in ("cosine", "onecycle", "linear")
    assert rates[0] < 0.01 or schedule == "linear"
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[-1] == pytest.approx(0 if falls else 0.1, abs=0.001)
    peak = rates.index(max(rates))
    assert rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_loss_that_is_no_number_leaves_what_was_best_and_advice(epoch, tmp_path, monkeypatch,
                                                                  undrawn, capsys):
    batch = dld.ImageData.batch

    def poisoned(self, rows, noise=None, now=0, shard=slice(None)):
        bad = noise is not None and now == epoch - 1
        return batch(self, rows, noise, now, shard) * (math.nan if bad else 1.0)

    monkeypatch.setattr(dld.ImageData, "batch", poisoned)
    assert dld.main(["--task", "mnist", "--data", "offline", "--device", "cpu", "--limit", "150",
                     "--width", "32", "--epochs", "4", "--lr", "0.004", "--report", "minimal",
                     "--checkpoint-every", "0.001s", "--output-dir", str(tmp_path)]) == 1
    assert (f"the loss became no number in epoch {epoch}; try a smaller --lr than 0.004"
            in capsys.readouterr().err)
    run, = tmp_path.iterdir()
    metrics = metrics_of(run)
    assert metrics["status"] == "failed" and metrics.get("epochs", 0) == epoch - 1
    assert (run / "report.html").exists() == (epoch > 1)
    if epoch > 1:
        saved = dld.load_file(run / "checkpoint.pt", dld.STATE_FORMAT)
        assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_tensorboard_has_every_epoch_once_also_after_going_on(tmp_path, undrawn):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    given = {"limit": 100, "report": "minimal", "output_dir": str(tmp_path), "tensorboard": True}
    run = dld.train_run(dataclasses.asdict(small("mnist", epochs=2, **given)), dld.Log(quiet=True))
    assert dld.main(["--resume", str(run), "--epochs", "4"]) == 0
    history, found = pd.read_csv(run / "history.csv"), EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    for name, key in dld.TensorBoard.CURVES.items():
        assert [event.step for event in found.Scalars(name)] == [1, 2, 3, 4]
        assert [event.value for event in found.Scalars(name)] == pytest.approx([*history[key]])


def test_a_damaged_checkpoint_is_noticed(digits, tmp_path):
    """Whatever byte is damaged: never another state than the one that was saved."""
    path = tmp_path / "checkpoint.pt"
    fit(digits, small("mnist", limit=100, epochs=1, width=8), checkpointer=dld.Checkpointer(path))
    saved, whole = dld.load_file(path, dld.STATE_FORMAT), path.read_bytes()
    for place in torch.linspace(0, len(whole) - 1, 30).long().tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        try:
            found = dld.load_file(path, dld.STATE_FORMAT)["model"]
        except dld.UsageError as problem:
            assert "is damaged" in str(problem)
        else:  # a byte that means nothing
            assert all(torch.equal(found[name], w) for name, w in saved["model"].items())


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_costs_a_checkpoint_and_neither_the_training_nor_the_one_before(digits,
                                                                                    tmp_path):
    import resource
    path, said, sizes = tmp_path / "checkpoint.pt", [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(state):
        if state.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, sizes[1]))

    try:
        state = fit(digits, small("mnist", limit=100, epochs=4, width=8), on_epoch=fill,
                    checkpointer=dld.Checkpointer(path, every=0, say=said.append))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    assert state.epoch == 4 and len(said) == 1
    assert "File too large; going on, and trying again later" in said[0]
    assert dld.load_file(path, dld.STATE_FORMAT)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
