"""Models that leave the program predict as they did inside; what TensorBoard is given."""
import contextlib
import functools
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, dld
from PIL import Image, ImageOps
from test_serving import CODE, JSON, PNG, ask, place, png, process, ready

TASKS, FORMS = ("cifar10", "mnist", "sentiment"), ("pt2", "onnx")


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Copies, into which a model can be exported."""
    place = tmp_path_factory.mktemp("runs")
    return {task: Path(shutil.copytree(run, place / run.name)) for task, run in finished.items()}


@pytest.fixture(scope="module")
def export(runs):
    """Exports a run's model by the command, once: the file, and what was said."""
    @functools.cache
    def made(task, form):
        for package in ("onnx", "onnxscript", "onnxruntime") * (form == "onnx"):
            pytest.importorskip(package)
        with (contextlib.redirect_stdout(io.StringIO()) as out,
              contextlib.redirect_stderr(io.StringIO()) as err):
            assert dld.main(["--export", form, "--run", str(runs[task])]) == 0, err.getvalue()
        assert not err.getvalue()
        return runs[task] / f"model.{form}", out.getvalue()
    return made


@pytest.fixture(scope="module")
def server(runs):
    """The port of a server of all three runs, started when it is first needed."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(
            lambda: stack.enter_context(process("-c", CODE, *runs.values()))[1])


def open_file(path):
    """The network and its metadata, as those get them who have nothing but the file."""
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        network = torch.export.load(str(path), extra_files=extra).module()
        return network, json.loads(extra["metadata.json"])
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["metadata"])
    return lambda x: torch.from_numpy(
        session.run(None, {facts["input"]["name"]: x.numpy()})[0]), facts


def word_numbers(texts, needs):
    """Texts as the exported network takes them, by the metadata alone."""
    found = np.full((len(texts), needs["max_tokens"]), needs["pad"], np.int64)
    known = {word: i + needs["first_word"] for i, word in enumerate(needs["vocabulary"])}
    for row, text in zip(found, texts, strict=True):
        for old, new in needs["replace"].items():
            text = text.replace(old, new)
        words = re.findall(needs["word_pattern"], text.lower()) or [""]
        if len(words) > needs["max_tokens"]:
            words = words[:needs["head"]] + words[-needs["tail"]:]
        row[:len(words)] = [known.get(word, needs["unknown"]) for word in words]
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def inputs(runs, shapes, digits, reviews):
    """100 new samples a task, and what the run itself says about them."""
    texts = [*reviews.x[-96:], "zyzzyva", "A WONDERFUL film<br />worth 8/10 :) , isn’t it?!",
             "dull, long and bad " * 150, "good " * 1000]
    some = {"cifar10": list(shapes.x[-100:]), "mnist": list(digits.x[-100:]), "sentiment": texts}
    return {task: (some[task], (model := ready(runs[task])).probabilities(model.pack(some[task])))
            for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("way", ["command", "server", *FORMS])
def test_all_ways_to_predict_agree_on_the_same_100_inputs(
        runs, export, server, inputs, way, task, tmp_path):
    run, (samples, expected) = runs[task], inputs[task]
    columns = [f"p_{name}" for name in ready(run).classes]
    if way == "command" and task == "sentiment":
        given = tmp_path / "texts.jsonl"
        given.write_text("\n".join(json.dumps({"text": text}) for text in samples), "utf-8")
    elif way == "command":
        given = tmp_path / "pictures"
        given.mkdir()
        for row, picture in enumerate(samples):
            (given / f"{row:02}.png").write_bytes(png(picture))
    if way == "command":
        table = tmp_path / "table.csv"
        assert dld.main(["--predict", str(given), "--run", str(run), "--output", str(table)]) == 0
        found = torch.from_numpy(pd.read_csv(table)[columns].to_numpy())
    elif way == "server":
        sent = [(json.dumps({"text": x}), JSON) if task == "sentiment" else (png(x), PNG)
                for x in samples]
        answers = [json.loads(ask(server(), place(run), *one)[2]) for one in sent]
        found = torch.tensor([[*answer["probabilities"].values()] for answer in answers])
    else:
        network, facts = open_file(export(task, way)[0])
        x = (word_numbers(samples, facts["preprocessing"]) if task == "sentiment"
             else torch.from_numpy(np.stack(samples)))
        found = torch.cat([network(some) for some in x.split([4, 1, 5, 2, 88])])
        assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("task", "larger"), [("cifar10", 1), ("cifar10", 10), ("mnist", 3)])
def test_other_views_count_where_the_picture_is_unsure(runs, inputs, task, larger):
    """Scores made larger: fewer pictures are unsure then."""
    model, (samples, _) = ready(runs[task]), inputs[task]
    *_, last = (layer for layer in model.model.modules() if isinstance(layer, torch.nn.Linear))
    last.weight.data *= larger
    samples = model.pack(samples)
    with torch.no_grad():
        once = model.model(samples.batch(torch.arange(100)))
        found = dld.Standalone(model).eval()(samples.pixels).double()
    lead = once.topk(2).values.diff(dim=1).abs()[:, 0]
    alone = dld.probabilities(once, model.meta["temperature"])
    moved = (found - alone).abs().amax(1)
    assert (lead < 1).any() and moved[lead < 1].max() > 1e-5
    assert larger == 1 or ((lead > 1).any() and moved[lead > 1].max() < 1e-5)
    torch.testing.assert_close(found, model.probabilities(samples), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_metadata_says_what_the_model_is_and_how_a_picture_is_prepared(
        runs, export, form, tmp_path):
    noise = np.random.default_rng(0).integers(100, 256, (50, 70), np.uint8)
    picture = Image.fromarray(noise.repeat(3, 0).repeat(2, 1)).convert("RGB")
    picture.save(tmp_path / "picture.png")
    for task in ("cifar10", "mnist"):
        network, facts = open_file(export(task, form)[0])
        needs, metrics = facts["preprocessing"], dld.load(runs[task]).metrics
        side = needs["side"]
        for key in ("task", "dataset", "test_accuracy"):
            assert facts[key] == metrics[key]
        assert facts["input"]["shape"] == ["N", needs["channels"], side, side] and needs["steps"]
        x = np.asarray(ImageOps.fit(picture.convert(needs["mode"]), (side, side)))
        x = (255 - x if needs["light_on_dark"] else x).reshape(side, side, -1).transpose(2, 0, 1)
        (_, found), = ready(runs[task]).predict([str(tmp_path / "picture.png")])
        np.testing.assert_allclose(network(torch.from_numpy(x.copy())[None]),
                                   found.filter(like="p_"), rtol=0, atol=1e-4)


def test_onnx_is_one_file_with_a_free_number_of_samples_and_standard_operations(export):
    onnx = pytest.importorskip("onnx")
    for task in TASKS:
        model = onnx.load(export(task, "onnx")[0], load_external_data=False)
        assert not any(x.external_data for x in model.graph.initializer)
        free, *fixed = model.graph.input[0].type.tensor_type.shape.dim
        assert free.dim_param and not any(size.dim_param for size in fixed)
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} <= {""}
    assert sum(node.op_type == "LSTM" for node in model.graph.node) == 4


def test_the_command_says_what_it_made_and_nothing_else(export):
    path, said = export("mnist", "pt2")
    assert [line.split()[0] for line in said.splitlines()] == [
        "Exported", "Checked", "Input", "Output", "Metadata"]
    assert f"{path}, " in said and "pixels: uint8 [N, 1, 28, 28]" in said


HONEST = dld.Standalone.forward


@pytest.mark.parametrize(("forward", "message"), [
    (lambda self, x: HONEST(self, x) * 0.999, "predicts otherwise"),
    (lambda self, x: HONEST(self, x) * float("nan"), "predicts otherwise"),
    (lambda self, x: self.model(x[x > 0]), "mlp cannot be exported with torch"),
], ids=["other numbers", "no numbers", "no graph"])
def test_what_cannot_be_kept_is_one_line_and_the_file_before_it_stays(
        runs, export, forward, message, monkeypatch, capsys):
    path, run = export("mnist", "pt2")[0], runs["mnist"]
    before, beside = path.read_bytes(), sorted(run.iterdir())
    monkeypatch.setattr(dld.Standalone, "forward", forward)
    assert dld.main(["--export", "pt2", "--run", str(run)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert path.read_bytes() == before and sorted(run.iterdir()) == beside


def test_a_folder_that_cannot_be_written_is_said_before_the_work(runs, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dld.Standalone, "forward", lambda self, x: pytest.fail("worked first"))
    monkeypatch.setattr(dld.Path, "touch", refuse)
    assert dld.main(["--export", "pt2", "--run", str(runs["mnist"])]) == 1
    assert re.search(r"cannot write .*model\.pt2: Permission denied\n$", capsys.readouterr().err)


@pytest.mark.parametrize(("missing", "flags", "line"), [
    ("onnx", ["--export", "onnx", "--run", "RUN"], "--export onnx needs the package onnx; try: "),
    ("onnxruntime", ["--export", "onnx", "--run", "RUN"], "needs the package onnxruntime; try: "),
    ("tensorboard", ["--task", "mnist", "--tensorboard"], "needs the package tensorboard; try: "),
    ("", ["--export", "onnx"], "--export needs --run RUN"),
    ("", ["--export", "tflite", "--run", "RUN"], "invalid choice: 'tflite'"),
    ("", ["--export", "pt2", "--run", "RUN", "--epochs", "3"], "leave out --epochs"),
    ("", ["--export", "pt2", "--run", "RUN", "--evaluate"], "cannot be combined")])
def test_wrong_usage_is_one_line(runs, missing, flags, line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != missing or None)
    assert dld.main([str(runs["mnist"]) if flag == "RUN" else flag for flag in flags]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
    for packages in ("onnx onnxscript onnxruntime", "tensorboard"):
        assert missing not in packages.split() or said.endswith(f" -m pip install {packages}\n")


# -- TensorBoard ---------------------------------------------------------------------------------


def read_curves(run):
    """What TensorBoard shows of a run: {curve: [(epoch, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)]
            for name in found.Tags()["scalars"]}


def test_tensorboard_has_every_epoch_once_also_after_going_on(tmp_path, undrawn):
    pytest.importorskip("tensorboard")
    given = {"task": "mnist", "data": "offline", "device": "cpu", "epochs": 2, "limit": 100,
             "report": "minimal", "output_dir": str(tmp_path), "tensorboard": True,
             **SMALL["mnist"]}
    run = dld.train_run(given, dld.Log(quiet=True))
    killed = dld.TensorBoard(run / "tensorboard", 2)  # an epoch of a process that was then killed
    killed.add({"epoch": 3.0, **dict.fromkeys(dld.TensorBoard.CURVES.values(), 9.0)})
    killed.writer.close()
    assert dld.main(["--resume", str(run), "--epochs", "4"]) == 0
    history, curves = pd.read_csv(run / "history.csv"), read_curves(run)
    for name, key in dld.TensorBoard.CURVES.items():
        expected = [*zip(history["epoch"], history[key], strict=True)]
        assert curves[name] == [(epoch, pytest.approx(value)) for epoch, value in expected]


def test_tensorboard_leaves_tensorflow_alone(tmp_path, monkeypatch):
    """It would take long to load and print pages, where it is installed."""
    compat = pytest.importorskip("tensorboard.compat")
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    dld.TensorBoard(tmp_path / "tensorboard", 0).writer.close()
    assert importlib.reload(compat).tf.io
