"""The loop: seeds, schedules, resuming, and what decides the best epoch."""
import contextlib
import dataclasses
import sys

import pytest
import torch
from conftest import dld, small


def fit(raw, config, before=None, on_epoch=lambda state: None, keeper=None):
    """Train without a run folder; `before` may touch the data or the state first."""
    runtime = dld.start_runtime(config)
    data = dld.build_data(raw, config)
    torch.manual_seed(config.seed)
    state = dld.new_state(dld.place_model(dld.build_model(data.meta), runtime), config, runtime)
    if before:
        before(data, state)
    dld.fit(state, data, config, runtime, on_epoch, keeper)
    return state


def figures(state):
    """The history without its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in state.history]


def save(state, path):
    dld.save_file(path, state.capture(dld.World()))


def load(state, path):
    state.restore(dld.load_file(path, dld.STATE_FORMAT), dld.World())


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(),
                                                 strict=True))


@pytest.mark.parametrize(("task", "precision"), [("cifar10", "fp32"), ("cifar10", "bf16"), ("mnist", "fp32"),
                                                 ("sentiment", "bf16"), ("sentiment", "fp16")])
def test_one_seed_gives_the_same_bits_and_another_does_not(task, precision, request):
    raw = request.getfixturevalue({"cifar10": "shapes", "mnist": "digits", "sentiment": "reviews"}[task])
    config = small(task, limit=150, epochs=2, precision=precision)
    one, two = fit(raw, config), fit(raw, config)
    assert same_weights(one, two) and figures(one) == figures(two)
    assert not same_weights(one, fit(raw, dataclasses.replace(config, seed=1)))


def test_labels_of_the_test_part_never_matter_to_training(digits):
    def forge(data, _):
        data.labels = data.labels.clone()
        data.labels[data.parts["test"]] = 0

    config = small("mnist", limit=300, epochs=4)
    one, two = fit(digits, config), fit(digits, config, before=forge)
    assert one.best["epoch"] == two.best["epoch"] and figures(one) == figures(two) and same_weights(one, two)


def test_texts_without_labels_teach_what_the_simple_method_thinks(reviews):
    """The epochs before the last share out the texts without labels, with its opinions for their truth."""
    raw = dataclasses.replace(reviews, x=[*reviews.x, *reviews.x[:600]], packed=None)
    config = small("sentiment", limit=600, epochs=4, max_tokens=30, unlabelled=1.5)
    data = dld.build_data(raw, config)
    assert "600 texts without labels" in dld.start_texts(dld.build_model(data.meta), data)
    train = data.parts["train"]
    lessons = [data.lesson(epoch, 4) for epoch in range(4)]
    rows = torch.cat([lesson[0] for lesson in lessons[:3]])
    assert len(rows) == 900 and sorted(rows[:600].tolist()) == [*range(800, 1400)] and (rows[600:] >= 800).all()
    assert torch.equal(lessons[3][0], train) and torch.equal(lessons[3][1].argmax(1), data.labels[train])
    assert [data.volume(done, 4) for done in range(5)] == [0, 300, 600, 900, 900 + len(train)]
    simple = dld.PhraseModel(data.samples.tokens, train, data.labels[train], 2, 3, True).shares(rows, 0.7)
    assert torch.allclose(torch.cat([lesson[1] for lesson in lessons[:3]]), simple, atol=1e-5)
    for without in (dld.build_data(raw, small("sentiment", unlabelled=0.0)), dld.build_data(reviews, config)):
        assert torch.equal(without.lesson(0, 4)[0], without.parts["train"])
        assert without.volume(3, 4) == 3 * len(without.parts["train"])


def test_a_run_with_texts_without_labels_resumes_to_the_same_bits(reviews, tmp_path):
    raw = dataclasses.replace(reviews, x=[*reviews.x, *reviews.x[:600]], packed=None)
    config, runs = small("sentiment", limit=200, epochs=3), []
    for stop in (False, True):
        runs.append(fit(raw, config, before=lambda data, state: dld.start_texts(state.model, data),
                        on_epoch=lambda state, stop=stop: save(state, tmp_path / "c.pt") if stop and state.epoch == 1
                        else None))
    resumed = fit(raw, config, before=lambda data, state: (dld.start_texts(state.model, data),
                                                           load(state, tmp_path / "c.pt")))
    assert resumed.epoch == 3 and same_weights(resumed, runs[0]) and figures(resumed) == figures(runs[0])


def test_neither_test_texts_nor_their_labels_matter_before_training(reviews):
    def started(raw):
        data = dld.build_data(raw, small("sentiment", limit=150))
        torch.manual_seed(0)
        dld.start_texts(model := dld.build_model(data.meta), data)
        return model.embedding.weight

    forged = dataclasses.replace(reviews, x=[*reviews.x[:600], *["good " * 9] * 200], y=reviews.y.copy(), packed=None)
    forged.y[600:] = 0
    assert torch.equal(started(reviews), started(forged))


@pytest.mark.parametrize("task", ["cifar10", "mnist", "sentiment"])
def test_a_resumed_run_ends_with_the_same_bits(task, request, tmp_path):
    raw = request.getfixturevalue({"cifar10": "shapes", "mnist": "digits", "sentiment": "reviews"}[task])
    config = small(task, limit=200, epochs=4, **({} if task == "cifar10" else {"schedule": "plateau"}))
    whole = fit(raw, config)

    def keeper(stop):
        """Saves after the step at which it is asked to end."""
        brake = dld.Brake()
        keeper = dld.Keeper(tmp_path / "checkpoint.pt", brake=brake)
        after_step, left = keeper.after_step, [stop]

        def count(*given):
            left[0] -= 1
            brake.asked = left[0] == 0
            after_step(*given)
        keeper.after_step = count
        return keeper

    resumed = None
    for stop in (3, 1, 4, 99):  # steps; an epoch has 2 to 7
        def before(_, state):
            if (tmp_path / "checkpoint.pt").exists():
                load(state, tmp_path / "checkpoint.pt")
        with contextlib.suppress(dld.Stopped):
            resumed = fit(raw, config, before=before, keeper=keeper(stop))
    assert resumed
    assert figures(resumed) == figures(whole) and same_weights(resumed, whole)
    assert all(torch.equal(resumed.best_weights[k], v) for k, v in whole.best_weights.items())
    names = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in names)


def test_the_best_epoch_is_the_best_on_validation_and_patience_stops(digits):
    state = fit(digits, small("mnist", limit=200, epochs=30, patience=2, lr=0.02, schedule="constant"))
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in state.history]
    assert state.best["epoch"] == 1 + scores.index(max(scores))
    assert state.epoch < 30 and state.stale == 2


def test_muon_balances_a_step_and_keeps_each_weights_length():
    torch.manual_seed(0)
    for shape in ((32, 144), (144, 32)):
        gradient = torch.randn(shape) @ torch.diag(torch.linspace(0.1, 3, shape[1]))
        before, after = (torch.linalg.svdvals(x) for x in (gradient / gradient.norm(), dld.balance(gradient)))
        assert after.max() < 1.4 and after.max() / after.min() < before.max() / before.min() / 2
    weight, last, bias = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((8, 4, 3, 3), (5, 8), (8,)))
    optimizer = dld.Muon([weight, last], [bias], lr=0.1)
    start = [p.detach().clone() for p in (weight, last, bias)]
    for p in (weight, last, bias):
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = start[0] * 8 ** 0.5 / start[0].norm()  # brought to its length, then moved
    assert 0.05 < (weight - kept).norm() < 0.2
    torch.testing.assert_close(last, start[1] - 0.1 * 20 * 1.85)  # Nesterov's first step: 1 + 0.85 gradients
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
    assert rates[0] < 0.01 or schedule == "linear"
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[-1] == pytest.approx(0 if schedule in ("cosine", "onecycle", "linear") else 0.1, abs=0.001)
    peak = rates.index(max(rates))
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_plateau_lowers_the_rate_only_when_validation_stalls(digits):
    def never_better(data, state):
        state.best = {"epoch": 0, "val_accuracy": 2.0, "val_loss": 0.0}
        state.best_weights = state.model.state_dict()

    rates = [row["learning_rate"] for row in fit(digits, small("mnist", limit=100, epochs=6, schedule="plateau"),
                                                  before=never_better).history]
    assert rates[1] == rates[0] * 1 and rates[2] == pytest.approx(0.3 * rates[1])
    assert rates[4] == pytest.approx(0.09 * rates[1])


def test_weight_decay_spares_biases_and_norms(digits):
    config = small("cifar10", model="classic", weight_decay=0.5)
    model = dld.build_model({"kind": "image", "model": "classic", "channels": 3, "side": 32, "classes": ["a", "b"],
                             "dropout": 0.5})
    decayed, spared = dld.new_state(model, config, dld.start_runtime(config)).optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and spared["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_a_loss_that_explodes_goes_back_with_smaller_steps_and_at_last_gives_up(digits):
    said = []
    keeper = dld.Keeper(say=said.append)

    def poison(data, state):
        next(state.model.parameters()).data.fill_(float("nan"))

    with pytest.raises(dld.Failure, match=r"no number in epoch 1, three times with smaller steps; try a smaller --lr"):
        fit(digits, small("mnist", limit=50, epochs=2), before=poison, keeper=keeper)
    assert len(said) == 3 and "0.3 times" in said[0] and "0.027 times" in said[2]


def test_a_loss_that_explodes_once_goes_on_from_the_last_good_state(digits):
    """One poisoned step in the second epoch: the epoch is done again, with smaller steps, and ends well."""
    class Poison(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left = 3  # forward passes in training

        def forward(self, x):
            self.left -= self.training
            return x * float("nan") if self.left == 0 and self.training else x

    def before(data, state):
        state.model.append(Poison())

    said, rates = [], []
    state = fit(digits, small("mnist", limit=100, epochs=3, batch_size=50, schedule="constant"), before=before,
                keeper=dld.Keeper(say=said.append),
                on_epoch=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]))
    assert len(said) == 1 and "epoch 2" in said[0] and state.epoch == 3 and state.calm == 1
    assert rates[1] == pytest.approx(0.3 * rates[0])
    assert all(torch.isfinite(weight).all() for weight in state.model.state_dict().values())


def test_out_of_memory_cuts_batches_and_changes_nothing(digits):
    """A device that holds 20 samples: batches of 50 are computed in pieces, with the same gradients."""
    class Tight(torch.nn.Module):
        def __init__(self, most):
            super().__init__()
            self.most = most

        def forward(self, x):
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    def tight(most):
        def before(data, state):
            model = torch.nn.Sequential(Tight(most), torch.nn.Flatten(), torch.nn.Linear(784, 10))
            state.model = model
            state.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            torch.nn.init.zeros_(model[2].weight)
            torch.nn.init.zeros_(model[2].bias)
        return before

    config, said = small("mnist", limit=200, epochs=2, batch_size=50), []
    whole = fit(digits, config, before=tight(500))
    pieces = fit(digits, config, before=tight(20), keeper=dld.Keeper(say=said.append))
    assert pieces.pieces == 4 and len(said) == 2 and "in 4 pieces" in said[1]
    for a, b in zip(whole.model.state_dict().values(), pieces.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(whole.best_logits, pieces.best_logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(dld.Failure, match="out of memory with 50 samples a process and step; try a smaller"):
        fit(digits, config, before=tight(0))


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(digits, tmp_path):
    """Whatever byte is damaged: never another state than one of the two that were saved."""
    path, said = tmp_path / "checkpoint.pt", []
    fit(digits, small("mnist", limit=100, epochs=2, width=8), keeper=dld.Keeper(path, every=0))
    newest, before = (dld.load_checkpoint(p, said.append) for p in (path, dld.older(path)))
    assert not said and (newest["epoch"], before["epoch"]) == (2, 1)
    whole = path.read_bytes()
    for place in torch.linspace(0, len(whole) - 1, 40).long().tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        found = dld.load_checkpoint(path, said.append)
        right = before if said else newest
        assert all(torch.equal(found["model"][name], weight) for name, weight in right["model"].items()), place
        assert found["epoch"] == right["epoch"] and ("is damaged" in said.pop() if said else True)
    path.unlink()
    assert dld.load_checkpoint(path, said.append)["epoch"] == 1, "killed between two renamings"


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_disk_that_is_full_costs_a_checkpoint_and_neither_the_training_nor_the_one_before(digits, tmp_path):
    import resource
    path, said, sizes = tmp_path / "checkpoint.pt", [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(state):
        if state.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, sizes[1]))

    try:
        keeper = dld.Keeper(path, every=0, say=said.append)
        keeper.after_epoch = lambda state, world: keeper.save(state, world)
        state = fit(digits, small("mnist", limit=100, epochs=3, width=8), on_epoch=fill, keeper=keeper)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    assert state.epoch == 3 and len(said) == 1 and "File too large; going on, and trying again later" in said[0]
    assert dld.load_checkpoint(path, said.append)["step"] and len(said) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint-before.pt", "checkpoint.pt"]


def test_clipping_bounds_the_step(digits):
    """With a tiny bound and plain SGD the weights can move by no more than rate x bound."""
    config = small("mnist", limit=64, epochs=1, batch_size=64, clip=1e-3, schedule="constant", weight_decay=0)
    moved = {}

    def plain(data, state):
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1)
        moved["before"] = torch.cat([p.detach().flatten().clone() for p in state.model.parameters()])

    state = fit(digits, config, before=plain)
    after = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    assert 0 < (after - moved["before"]).norm() <= config.lr * 1e-3 * 1.01


def test_logits_come_back_in_the_order_of_the_rows(reviews):
    config = small("sentiment")
    runtime = dld.start_runtime(config)
    data = dld.build_data(reviews, config)
    model = dld.build_model(data.meta)
    rows = data.parts["test"]
    logits = dld.compute_logits(model, data.samples, rows, runtime)
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dld.compute_logits(model, data.samples, rows[mixed], runtime), logits[mixed],
                               atol=1e-5, rtol=0)
