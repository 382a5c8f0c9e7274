"""Models that leave the program predict as they did inside; what TensorBoard is given is what history.csv says."""
import contextlib
import csv
import importlib.util
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, dld
from test_serving import CODE, JSON, PNG, ask, place, png, process

TASKS = ("cifar10", "mnist", "sentiment")


@pytest.fixture(scope="module")
def said():
    """What the commands of `exported` printed: (task, form) -> (output, errors)."""
    return {}


@pytest.fixture(scope="module")
def exported(finished, said):
    """Each run's model in both forms, made once, by the command: (task, form) -> file."""
    for task, form in itertools.product(TASKS, dld.FORMS):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            assert dld.main(["--export", form, "--run", str(finished[task])]) == 0, err.getvalue()
        said[task, form] = out.getvalue(), err.getvalue()
    return {(task, form): finished[task] / f"model.{form}" for task, form in said}


def ready(run):
    return dld.Predictor(run, dld.start_runtime(dld.Config(device="cpu", precision="fp32")))


def metadata(path):
    """As those get it who have nothing but the file."""
    if path.suffix == ".onnx":
        import onnxruntime
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["metadata"])
    extra = {"metadata.json": ""}
    torch.export.load(str(path), extra_files=extra)
    return json.loads(extra["metadata.json"])


def number(text, needs):
    """Word numbers of a text by the metadata alone."""
    for old, new in needs["replace"].items():
        text = text.replace(old, new)
    known = {word: place + needs["first_word"] for place, word in enumerate(needs["vocabulary"])}
    words = re.findall(needs["word_pattern"], text.lower()) or [""]
    if len(words) > needs["max_tokens"]:
        words = words[:needs["head"]] + words[-needs["tail"]:]
    return [known.get(word, needs["unknown"]) for word in words]


@pytest.fixture(scope="module")
def port(finished):
    with process("-c", CODE, *finished.values()) as (_, number):
        yield number


@pytest.mark.parametrize("task", TASKS)
def test_command_server_onnx_and_pt2_agree_on_the_same_100_inputs(finished, exported, port, task, tmp_path):
    run = finished[task]
    model = ready(run)
    trial = dld.trial_samples(model)
    if task == "sentiment":
        inputs = [trial.tokens.texts[row] for row in range(100)]
        (tmp_path / "inputs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in inputs), "utf-8")
        given, sent, kind = tmp_path / "inputs.jsonl", [json.dumps({"text": text}) for text in inputs], JSON
        samples = model.pack(inputs)
    else:
        given, kind = tmp_path / "inputs", PNG
        given.mkdir()
        for row in range(100):
            (given / f"{row:02}.png").write_bytes(png(trial.pixels[row].numpy()))
        sent = [path.read_bytes() for path in sorted(given.iterdir())]
        samples = model.pack([dld.read_picture(path, model.meta) for path in sorted(given.iterdir())])
    shares = {}
    assert dld.main(["--predict", str(given), "--run", str(run), "--output", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        lines = [[float(line[f"p_{name}"]) for name in model.classes] for line in csv.DictReader(file)]
    shares["command"] = torch.tensor(lines)
    answers = [json.loads(ask(port, place(run), one, kind)[2])["probabilities"] for one in sent]
    shares["server"] = torch.tensor([[answer[name] for name in model.classes] for answer in answers])
    for form in dld.FORMS:
        network = dld.FORMS[form].open(exported[task, form])
        found = [network(dld.prepared(samples, rows)) for rows in torch.arange(100).split([4, 1, 5, 2, 88])]
        shares[form] = torch.cat(found)
        assert shares[form].dtype == torch.float32
    for name, found in shares.items():
        assert found.shape == (100, len(model.classes))
        torch.testing.assert_close(found.double(), model.shares(samples), rtol=0, atol=1e-4, msg=name)


def test_some_trial_pictures_get_other_views_and_some_do_not(finished):
    """Else the comparison above would not see whether the exported model looks twice, and where."""
    for task in ("cifar10", "mnist"):
        model = ready(finished[task])
        assert model.meta["views"]
        samples = dld.trial_samples(model)
        once = model.model(samples.batch(torch.arange(100)))
        lead = once.topk(2).values.diff(dim=1).neg()
        twice = dld.compute_logits(model.model, samples, torch.arange(100), model.runtime)
        assert (once - twice)[lead[:, 0] < 1].abs().max() > 0.01
        model.meta = {**model.meta, "views": False}
        with torch.no_grad():
            torch.testing.assert_close(dld.Standalone(model).eval()(samples.pixels), dld.probabilities(
                once, model.meta["temperature"]).float())


def test_a_picture_margin_decides_about_views(finished):
    """The model's own scores made larger: some pictures are sure then, and these are looked at once."""
    model = ready(finished["cifar10"])
    model.model.head.weight.data *= 10
    samples = dld.trial_samples(model)
    with torch.no_grad():
        lead = model.model(samples.batch(torch.arange(100))).topk(2).values.diff(dim=1).neg()
        assert 5 < (lead < 1).sum() < 95
        torch.testing.assert_close(dld.Standalone(model).eval()(samples.pixels).double(), model.shares(samples),
                                   rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", dld.FORMS)
def test_texts_of_any_length_in_any_company(finished, exported, form):
    model = ready(finished["sentiment"])
    network = dld.FORMS[form].open(exported["sentiment", form])
    for length in (1, 2, 5, 400):
        samples = model.pack(["film " * length])
        words = dld.prepared(samples, torch.arange(1))[:, :length]
        assert words.shape == (1, length)
        padded = torch.nn.functional.pad(words, (0, 9))
        for x in (words, padded, padded.repeat(7, 1)):
            torch.testing.assert_close(network(x).double(), model.shares(samples).expand(len(x), -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", dld.FORMS)
def test_metadata_is_enough_to_predict_a_text_as_the_program_does(finished, exported, form, tmp_path):
    path = exported["sentiment", form]
    facts = metadata(path)
    texts = ["A WONDERFUL film<br />worth 8/10 :) , isn’t it?!", "", "zyzzyva", "dull, long and bad " * 120]
    numbers = [number(text, facts["preprocessing"]) for text in texts]
    words = np.full((len(texts), max(map(len, numbers))), facts["preprocessing"]["pad"], np.int64)
    for row, some in zip(words, numbers, strict=True):
        row[:len(some)] = some
    shares = dld.FORMS[form].open(path)(torch.from_numpy(words))
    (tmp_path / "texts.txt").write_text("\n".join(text or " " for text in texts[:1] + texts[2:]), "utf-8")
    log = dld.Log(quiet=True)
    said = []
    log.__class__ = type("Heard", (dld.Log,), {"__call__": lambda self, text="": said.append(text)})
    dld.predict([str(tmp_path / "texts.txt")], finished["sentiment"], {"device": "cpu"}, log)
    lines = [line for line in said if re.match(r"\S+ \d+\.\d%", line)]
    expected = [f"{facts['classes'][int(each.argmax())]} {each.max():.1%}" for each in shares]
    assert [" ".join(line.split()[:2]) for line in lines] == expected[:1] + expected[2:]
    torch.testing.assert_close(shares.double(), ready(finished["sentiment"]).shares(
        ready(finished["sentiment"]).pack(texts)), rtol=0, atol=1e-4)


def test_metadata_is_enough_to_predict_a_picture_as_the_program_does(finished, exported, tmp_path):
    from PIL import Image, ImageOps
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(100, 256, (50, 70), np.uint8).repeat(3, 0).repeat(2, 1)).convert("RGB")
    picture.save(tmp_path / "picture.png")
    for task in ("cifar10", "mnist"):
        facts = metadata(exported[task, "onnx"])
        assert facts == metadata(exported[task, "pt2"])
        needs = facts["preprocessing"]
        assert facts["input"]["shape"] == ["N", needs["channels"], needs["side"], needs["side"]]
        x = np.asarray(ImageOps.fit(picture.convert(needs["mode"]), (needs["side"],) * 2))
        x = 255 - x if needs["light_on_dark"] else x
        x = torch.from_numpy(x.reshape(needs["side"], needs["side"], -1).transpose(2, 0, 1).copy())[None]
        model = ready(finished[task])
        (_, opened), = model.kind.open(str(tmp_path / "picture.png"), model.meta)
        shares = dld.FORMS["onnx"].open(exported[task, "onnx"])(x)
        torch.testing.assert_close(shares.double(), model.shares(model.pack([opened])), rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_metadata_says_what_the_model_is(finished, exported, task):
    facts = metadata(exported[task, "onnx"])
    measured = json.loads((finished[task] / "metrics.json").read_text("utf-8"))
    assert facts["task"] == task and facts["dataset"] == measured["dataset"] and facts["version"] == dld.VERSION
    assert facts["test_accuracy"] == measured["test_accuracy"]
    assert len(facts["classes"]) == facts["output"]["shape"][1] and facts["preprocessing"]["steps"]


def test_one_onnx_file_with_free_sizes_and_standard_operations_only(exported):
    import onnx
    for task, free in (("cifar10", 1), ("sentiment", 2)):
        model = onnx.load(exported[task, "onnx"], load_external_data=False)
        assert not any(x.external_data for x in model.graph.initializer)
        sizes = model.graph.input[0].type.tensor_type.shape.dim
        assert [bool(size.dim_param) for size in sizes] == [True] * free + [False] * (len(sizes) - free)
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} <= {""}
    assert sum(node.op_type == "LSTM" for node in model.graph.node) == 4


def test_what_predicts_otherwise_is_refused_and_the_one_before_it_stays(finished, exported, monkeypatch):
    path = exported["mnist", "pt2"]
    before, beside = path.read_bytes(), sorted(finished["mnist"].iterdir())
    honest = dld.Standalone.forward
    monkeypatch.setattr(dld.Standalone, "forward", lambda self, x: honest(self, x) * 0.999)
    with pytest.raises(dld.Failure, match="predicts otherwise") as problem:
        dld.export("pt2", finished["mnist"], {}, dld.Log(quiet=True))
    assert "\n" not in str(problem.value) and problem.value.code == 1
    assert path.read_bytes() == before and sorted(finished["mnist"].iterdir()) == beside


def test_what_gives_no_number_is_refused(finished):
    assert dld.largest_difference(ready(finished["mnist"]), lambda x: torch.full((len(x), 10), torch.nan)) > 1


def test_what_cannot_be_traced_is_one_line_and_no_file(finished, exported, monkeypatch):
    beside = sorted(finished["mnist"].iterdir())
    monkeypatch.setattr(dld.Standalone, "forward", lambda self, x: self.model(x[x > 0]))
    with pytest.raises(dld.Failure, match="mlp cannot be exported with torch") as problem:
        dld.export("pt2", finished["mnist"], {}, dld.Log(quiet=True))
    assert "\n" not in str(problem.value) and sorted(finished["mnist"].iterdir()) == beside


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(finished, package, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != package and there(name, *rest))
    assert dld.main(["--export", "onnx", "--run", str(finished["mnist"])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --export onnx needs the package {package}; try: ") and error.count("\n") == 1
    assert error.endswith(" -m pip install onnx onnxscript onnxruntime\n"), "by the Python that runs this"


@pytest.mark.parametrize("flags, line", [
    (["--export", "onnx"], "--export needs --run RUN"),
    (["--export", "tflite", "--run", "x"], "choose from 'onnx', 'pt2'"),
    (["--export", "pt2", "--run", "nowhere"], "--run nowhere: no such folder"),
    (["--export", "pt2", "--run", "x", "--epochs", "3"], "leave out --epochs"),
    (["--export", "pt2", "--run", "x", "--evaluate"], "--evaluate and --export cannot be combined")])
def test_wrong_usage_is_one_line(flags, line, capsys):
    assert dld.main(flags) == 2
    said = capsys.readouterr().err
    assert line in re.sub(r"choose from onnx, pt2", "choose from 'onnx', 'pt2'", said) and said.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_said_before_the_work(finished, monkeypatch):
    monkeypatch.setattr(dld, "trace", lambda ready: pytest.fail("worked first"))
    monkeypatch.setattr(dld.Path, "touch", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(dld.Failure, match=r"cannot write .*model\.pt2: Permission denied"):
        dld.export("pt2", finished["mnist"], {}, dld.Log(quiet=True))


def test_the_command_says_what_it_made_and_nothing_else(exported, said):
    for (_, form), (out, err) in said.items():
        assert not err and f"model.{form}, " in out
        assert [line.split()[0] for line in out.splitlines()] == ["Exported", "Checked", "Input", "Output", "Metadata"]
    assert "pixels: uint8 [N, 1, 28, 28]" in said["mnist", "onnx"][0]


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def check_curves(run, found):
    """The scalars are the lines of history.csv, each once."""
    with (run / "history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, key in dld.TensorBoard.CURVES.items():
        assert [event.step for event in found.Scalars(name)] == [int(row["epoch"]) for row in rows]
        assert [event.value for event in found.Scalars(name)] == pytest.approx([float(row[key]) for row in rows])


def test_tensorboard_gets_the_curves_the_figures_and_the_settings_also_after_going_on(tmp_path, monkeypatch):
    monkeypatch.setattr(dld, "write_figures", lambda folder, *rest: shutil.copy(folder / "training_curves.png",
                                                                                folder / "another.png"))
    given = {"task": "mnist", "data": "offline", "device": "cpu", "epochs": 2, "report": "minimal", "dry_run": True,
             "output_dir": str(tmp_path), **SMALL["mnist"]}
    run = dld.train_run({**given, "tensorboard": True}, dld.Log(quiet=True))
    found = events(run)
    check_curves(run, found)
    pictures = {path.stem for path in run.glob("*.png")}
    assert set(found.Tags()["images"]) == pictures == {"training_curves", "another"}
    assert found.Images("training_curves")[-1].encoded_image_string.startswith(b"\x89PNG")
    measured = json.loads((run / "metrics.json").read_text("utf-8"))
    assert found.Scalars("result/test_accuracy")[-1].value == pytest.approx(measured["test_accuracy"])
    told = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"weight_decay" in told and b"offline" in told
    assert [path.is_file() for path in (run / "tensorboard").iterdir()] == [True], "no folders for settings"

    writer = dld.TensorBoard(run / "tensorboard", [{}, {}])  # an epoch that a killed process had got to
    writer.after_epoch([{"epoch": 3.0, **dict.fromkeys(dld.TensorBoard.CURVES.values(), 9.0)}])
    writer.close()
    assert events(run).Scalars("loss/train")[-1].value == 9
    dld.resume(run, {"epochs": 4}, dld.Log(quiet=True))
    check_curves(run, events(run))


def test_a_run_that_is_followed_late_has_its_first_epochs_too(tmp_path):
    row = dict.fromkeys(dld.HISTORY, 0.5)
    history = [{**row, "epoch": 1}, {**row, "epoch": 2, "val_loss": float("nan")}]
    dld.TensorBoard(tmp_path / "tensorboard", history).close()
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/train")] == [1, 2]
    assert [event.step for event in found.Scalars("loss/val")] == [1]


def test_nothing_is_written_unless_asked_for(finished):
    assert not (finished["mnist"] / "tensorboard").exists()


def test_tensorboard_is_asked_for_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "tensorboard" and there(name, *rest))
    monkeypatch.setattr(dld, "prepare", lambda *rest: pytest.fail("worked first"))
    assert dld.main(["--task", "mnist", "--tensorboard", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --tensorboard needs the package tensorboard; try: ") and error.count("\n") == 1
    assert error.endswith(" -m pip install tensorboard\n")


def test_tensorboard_leaves_tensorflow_alone(tmp_path, monkeypatch):
    """It would take long to load and print pages, where it is installed."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    dld.TensorBoard(tmp_path / "tensorboard", []).close()
    import tensorboard.compat
    assert importlib.reload(tensorboard.compat).tf.io
