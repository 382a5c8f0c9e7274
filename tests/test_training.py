"""The loop: seeds, schedules, checkpoints, and what decides the best epoch."""
import dataclasses
import math
import sys

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


@pytest.mark.parametrize(("task", "precision"), [("cifar10", "fp32"), ("mnist", "bf16"),
                                                 ("sentiment", "fp16")])
def test_one_seed_gives_the_same_bits_and_another_does_not(task, precision, request):
    raw = request.getfixturevalue(RAW[task])
    config = small(task, limit=50, epochs=2, precision=precision)
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
    config = small(task, limit=200, epochs=2)
    assert same(fit(raw, config), fit(forged, config))


def test_texts_without_labels_teach_what_the_simple_method_thinks(reviews):
    """The epochs before the last share out these texts, with its opinions for their truth."""
    raw = with_unlabelled(reviews)
    config = small("sentiment", limit=600, epochs=4, max_tokens=30, unlabelled=1.5)
    data = dld.build_dataset(raw, config)
    _, said = dld.start_training(data, config, dld.start_machine(config))
    assert "600 texts without labels" in said
    train = data.parts["train"]
    targets = [data.epoch_targets(epoch, 4) for epoch in range(4)]
    rows, truth = (torch.cat(each) for each in zip(*targets[:3], strict=True))
    assert sorted(rows[:600].tolist()) == [*range(800, 1400)]
    assert len(rows) == 900 and (rows[600:] >= 800).all()
    assert torch.equal(targets[3][0], train)
    assert torch.equal(targets[3][1].argmax(1), data.labels[train])
    assert [data.samples_until(n, 4) for n in range(5)] == [0, 300, 600, 900, 900 + len(train)]
    simple = dld.PhraseModel(data.samples.tokens, train, data.labels[train], 2, 3, True)
    torch.testing.assert_close(truth, simple.probabilities(rows, 0.7), atol=1e-5, rtol=0)
    for without in (dld.build_dataset(raw, small("sentiment", unlabelled=0.0)),
                    dld.build_dataset(reviews, config)):
        assert torch.equal(without.epoch_targets(0, 4)[0], without.parts["train"])
        assert without.samples_until(3, 4) == 3 * len(without.parts["train"])


class Stopping(dld.Checkpointer):
    """Is asked to end the training after so many steps."""

    def __init__(self, path, steps):
        super().__init__(path)
        self.steps = steps

    def after_step(self, state, group, lr):
        self.steps -= 1
        self.interrupt.requested = self.steps == 0
        super().after_step(state, group, lr)


@pytest.mark.parametrize("task", RAW)
def test_a_resumed_training_ends_with_the_same_bits(task, request, tmp_path):
    raw = request.getfixturevalue(RAW[task])
    raw = with_unlabelled(raw) if task == "sentiment" else raw
    schedule = "plateau" if task == "mnist" else "linear"
    config = small(task, limit=150, epochs=3, batch_size=40, schedule=schedule)
    path = tmp_path / "checkpoint.pt"
    for steps in (3, 1, 4):  # the first epoch has four or more
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


def test_muon_steps_equally_far_in_all_directions_and_keeps_each_weights_length():
    torch.manual_seed(0)
    weight, last, bias = parameters = [torch.nn.Parameter(torch.randn(*shape))
                                       for shape in ((8, 4, 3, 3), (5, 8), (8,))]
    start = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    weight.grad = (torch.randn(8, 36) * torch.linspace(0.1, 3, 8).unsqueeze(1)).view_as(weight)
    dld.Muon([weight, last], [bias], lr=0.1).step()
    kept = start[0] * 8 ** 0.5 / start[0].norm()  # brought to its length, then moved
    before, after = (torch.linalg.svdvals(x.detach().flatten(1))
                     for x in (weight.grad, (kept - weight) / 0.1))
    assert after.max() < 1.4 and after.max() / after.min() < before.max() / before.min() / 2
    # Nesterov's first step: 1 + 0.85 gradients.
    torch.testing.assert_close(last, start[1] - 0.1 * 20 * 1.85)
    torch.testing.assert_close(bias, start[2] - 0.1 * 100 * 1.85)


def test_fewer_epochs_once_time_runs_out_still_end_with_a_small_rate(digits):
    config = small("mnist", limit=200, epochs=10, batch_size=20, schedule="linear", lr=0.01)
    state = fit(digits, config, on_epoch=lambda state: 4 if state.epoch >= 2 else None)
    rates = [row["learning_rate"] for row in state.history]
    assert state.epoch == 4 and rates[1] > 0.0075 and rates[3] < 0.0005


@pytest.mark.parametrize("schedule", ["linear", "cosine", "onecycle", "plateau", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule):
    config = small("mnist", lr=0.1, schedule=schedule)
    rates = [dld.learning_rate(config, step / 1000, 1.0) for step in range(1000)]
    falls = schedule in ("cosine", "onecycle", "linear")
    assert rates[0] < 0.01 or schedule == "linear"
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[-1] == pytest.approx(0 if falls else 0.1, abs=0.001)
    peak = rates.index(max(rates))
    assert rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_plateau_lowers_the_rate_only_when_validation_stalls(digits):
    def never_better(data, state):
        state.best = {"epoch": 0, "val_accuracy": 2.0, "val_loss": 0.0}

    config = small("mnist", limit=100, epochs=6, schedule="plateau")
    rates = [row["learning_rate"] for row in fit(digits, config, before=never_better).history]
    assert rates[1] == rates[0] and rates[2] == pytest.approx(0.3 * rates[1])
    assert rates[4] == pytest.approx(0.09 * rates[1])


def test_weight_decay_spares_biases_and_norms():
    config = small("cifar10", model="classic", weight_decay=0.5)
    model = dld.build_model({"kind": "image", "model": "classic", "channels": 3, "side": 32,
                             "classes": ["a", "b"], "dropout": 0.5})
    state = dld.new_train_state(model, config, dld.start_machine(config))
    decayed, spared = state.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and spared["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.parameters() if p.ndim > 1}
    assert {id(p) for p in spared["params"]} == {id(p) for p in model.parameters() if p.ndim == 1}


def test_clipping_bounds_the_step(digits):
    """With a tiny bound and plain SGD the weights can move by no more than rate x bound."""
    config = small("mnist", limit=64, epochs=1, batch_size=64, clip=1e-3, schedule="constant")
    start = []

    def plain(data, state):
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1)
        start.extend(p.detach().flatten().clone() for p in state.model.parameters())

    state = fit(digits, config, before=plain)
    after = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    assert 0 < (after - torch.cat(start)).norm() <= config.lr * 1e-3 * 1.01


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_loss_that_is_no_number_leaves_what_was_best_and_advice(epoch, tmp_path, monkeypatch,
                                                                  capsys):
    batch = dld.ImageData.batch

    def poisoned(self, rows, noise=None, now=0, shard=slice(None)):
        bad = noise is not None and now == epoch - 1
        return batch(self, rows, noise, now, shard) * (math.nan if bad else 1.0)

    monkeypatch.setattr(dld.ImageData, "batch", poisoned)
    assert dld.main(["--task", "mnist", "--data", "offline", "--device", "cpu", "--limit", "150",
                     "--width", "32", "--epochs", "4", "--lr", "0.004", "--report", "minimal",
                     "--output-dir", str(tmp_path)]) == 1
    assert (f"the loss became no number in epoch {epoch}; try a smaller --lr than 0.004"
            in capsys.readouterr().err)
    run, = tmp_path.iterdir()
    metrics = metrics_of(run)
    assert metrics["status"] == "failed" and metrics.get("epochs", 0) == epoch - 1
    assert (run / "report.html").exists() == (epoch > 1)
    if epoch > 1:
        saved = dld.load_file(run / "checkpoint.pt", dld.STATE_FORMAT)
        assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_out_of_memory_is_one_line_that_names_the_flag(digits):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(dld.Failure, match=r"out of memory with 50 samples a process and step; try "
                                          r"a smaller --batch-size than 50"):
        fit(digits, small("mnist", limit=200, batch_size=50),
            before=lambda data, state: state.model.register_forward_hook(no_room))


def test_a_damaged_checkpoint_is_noticed(digits, tmp_path):
    """Whatever byte is damaged: never another state than the one that was saved."""
    path = tmp_path / "checkpoint.pt"
    fit(digits, small("mnist", limit=100, epochs=1, width=8), checkpointer=dld.Checkpointer(path))
    saved, whole = dld.load_file(path, dld.STATE_FORMAT), path.read_bytes()
    for place in torch.linspace(0, len(whole) - 1, 40).long().tolist():
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


def test_logits_come_back_in_the_order_of_the_rows(reviews):
    config = small("sentiment")
    machine, data = dld.start_machine(config), dld.build_dataset(reviews, config)
    model, rows = dld.build_model(data.meta), data.parts["test"]
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        dld.predict_logits(model, data.samples, rows[mixed], machine),
        dld.predict_logits(model, data.samples, rows, machine)[mixed], atol=1e-5, rtol=0)
