"""Models that leave the program: served (also to hostile requests) and exported."""
import base64
import concurrent.futures
import contextlib
import functools
import http.client
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, dld, metrics_of
from PIL import Image

TASKS, FORMS = ("cifar10", "mnist", "sentiment"), ("pt2", "onnx")
PNG, JSON = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}
# A server with narrow limits, whose model fails on black pictures.
CODE = """import sys, deep_learning_deliverable as dld
dld.MAX_REQUEST_BYTES, dld.MAX_CONNECTIONS, dld.SECONDS_TO_SEND = 300_000, 24, 1.0
answer = dld.Predictor.probabilities
def shares(self, samples):
    if self.meta["kind"] == "image" and not samples.pixels.any():
        raise RuntimeError("a secret at /tmp/secret.py")
    return answer(self, samples)
dld.Predictor.probabilities = shares
sys.exit(dld.main(["--serve", "--run", *sys.argv[1:], "--port", "0", "--device", "cpu"]))"""


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Copies, into which models can be exported."""
    place = tmp_path_factory.mktemp("runs")
    return {task: Path(shutil.copytree(finished[task], place / task)) for task in TASKS}


@pytest.fixture(scope="module")
def port(runs, tmp_path_factory):
    """Of a server of these runs and of a bare model; a signal ends it, also while somebody asks."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    bare = tmp_path_factory.mktemp("bare") / 'a "run"'
    bare.mkdir()
    (bare / "model.pt").write_bytes((runs["mnist"] / "model.pt").read_bytes())
    (bare / "metrics.json").write_text('{"test_accuracy": NaN}')  # it must not break the others
    server = subprocess.Popen(
        [sys.executable, "-c", CODE, *map(str, runs.values()), str(bare)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        first = server.stdout.readline()
        assert first.startswith("Serving "), first + server.stderr.read()
        port = int(re.search(r":(\d+)/ until", first)[1])
        yield port
        assert server.poll() is None, "nothing may end it"
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            server.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
            out, err = server.communicate(timeout=120)
        assert sys.platform == "win32" or (
            server.returncode in (0, 130) and out.endswith("Stopped serving\n")), err
        assert "Traceback" not in out + err
    finally:
        server.kill()
        server.communicate()


def ask(port, path="/predict", body=None, headers=None, method="POST"):
    """One request: (status, headers, body)."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(line):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before the end
            line.request(method, path, body, headers or {})
        answer = line.getresponse()
        return answer.status, answer.headers, answer.read()


def get(port, path):
    return ask(port, path, method="GET")


def place(run, more=""):
    return f"/predict?run={urllib.parse.quote(run.name)}{more}"


def picture_file(picture, form="PNG"):
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def png(x):
    """The file of a picture [C, H, W]."""
    return picture_file(Image.fromarray(x.transpose(1, 2, 0).squeeze()))


def ready(run):
    """A run's model without a server."""
    return dld.Predictor(run, dld.start_machine(dld.Config(device="cpu", precision="fp32")))


# -- all ways to predict -------------------------------------------------------------------------


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
def export(runs):
    """Exports a run's model by the command, once."""
    @functools.cache
    def made(task, form):
        for package in ("onnx", "onnxscript", "onnxruntime") * (form == "onnx"):
            pytest.importorskip(package)
        if form == "onnx" and torch.__version__.startswith("2.6."):
            pytest.skip("torch 2.6 cannot write these networks")
        with (contextlib.redirect_stdout(io.StringIO()) as out,
              contextlib.redirect_stderr(io.StringIO()) as err):
            assert dld.main(["--export", form, "--run", str(runs[task])]) == 0, err.getvalue()
        assert not err.getvalue() and "Checked" in out.getvalue()
        return runs[task] / f"model.{form}"
    return made


@pytest.fixture(scope="module")
def inputs(runs, shapes, digits, reviews):
    """100 new samples a task, and what the run itself says about them."""
    texts = [*reviews.x[-92:], "zyzzyva", "A WONDERFUL film<br />worth 8/10 :) , isn’t it?!",
             "dull, long and bad " * 150, "good " * 1000, "ünknown 😀", "x" * 500, "a\0b", "?"]
    some = {"cifar10": list(shapes.x[-100:]), "mnist": list(digits.x[-100:]), "sentiment": texts}
    return {task: (some[task], (model := ready(runs[task])).probabilities(model.pack(some[task])))
            for task in TASKS}


def by_command(run, task, samples, tmp_path, request):
    given, table = tmp_path / ("texts.jsonl" if task == "sentiment" else "pictures"), tmp_path / "t"
    if task == "sentiment":
        given.write_text("\n".join(json.dumps({"text": text}) for text in samples), "utf-8")
    else:
        given.mkdir()
        for row, picture in enumerate(samples):
            (given / f"{row:02}.png").write_bytes(png(picture))
    assert dld.main(["--predict", str(given), "--run", str(run), "--output", str(table)]) == 0
    return torch.from_numpy(pd.read_csv(table).filter(like="p_").to_numpy())


def by_server(run, task, samples, tmp_path, request):
    """Sixteen ask at a time."""
    port, found = request.getfixturevalue("port"), []
    sent = [(json.dumps({"text": x}), JSON) if task == "sentiment" else (png(x), PNG)
            for x in samples]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda one: ask(port, place(run), *one), sent)]
    for status, _, body in answers:
        answer = json.loads(body)
        assert status == 200 and answer["run"] == run.name
        assert answer["confidence"] == answer["probabilities"][answer["predicted"]] == max(
            answer["probabilities"].values())
        found.append([*answer["probabilities"].values()])
    return torch.tensor(found)


def by_file(form, run, task, samples, tmp_path, request):
    network, facts = open_file(request.getfixturevalue("export")(task, form))
    assert facts["test_accuracy"] == metrics_of(run)["test_accuracy"]
    x = (word_numbers(samples, facts["preprocessing"]) if task == "sentiment"
         else torch.from_numpy(np.stack(samples)))
    return torch.cat([network(some) for some in x.split([4, 1, 5, 2, 88])])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("way", [by_command, by_server, *(
    functools.partial(by_file, form) for form in FORMS)], ids=["command", "server", *FORMS])
def test_all_ways_to_predict_agree_on_the_same_100_inputs(
        runs, inputs, way, task, tmp_path, request):
    samples, expected = inputs[task]
    found = way(runs[task], task, samples, tmp_path, request).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std(0).max() > 0.002, "the inputs make a difference"


def test_a_picture_is_explained_by_its_map(runs, port, shapes):
    x = shapes.x[0]
    coded = json.dumps({"image": base64.b64encode(png(x)).decode()})
    answers = [json.loads(ask(port, place(runs["cifar10"], "&explain=1"), body, {
        "Content-Type": content})[2]) for body, content in (
            (png(x), "image/png"), (png(x), "application/octet-stream"),
            (coded, "application/json"), (coded.replace('": "', '": "data:image/png;base64,'),
                                          "Application/JSON; charset=utf-8"))]
    assert all(answer == answers[0] for answer in answers), "however it is sent"
    assert answers[0]["method"].startswith("Grad-CAM: ")
    drawn = Image.open(io.BytesIO(base64.b64decode(answers[0]["overlay"].partition(",")[2])))
    small = np.asarray(drawn.convert("RGB").resize((32, 32))).transpose(2, 0, 1).astype(float)
    changed = np.abs(small - x).max(0)
    assert drawn.size == (256, 256) and changed.max() > 60 and (changed < 40).mean() > 0.2


def test_a_text_is_explained_by_the_attention_to_its_words(runs, port):
    def explain(text):
        body = json.dumps({"text": text})
        return json.loads(ask(port, place(runs["sentiment"], "&explain=1"), body, JSON)[2])

    answer = explain("The plot was not good.")
    words, weights = zip(*answer["words"], strict=True)
    assert " ".join(words) == "The plot was not good." and len(answer["shades"]) == 5
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert explain("good " * 1200)["words"].count(["…", 0.0]) == 1, "it did not read the middle"


def test_health_metrics_and_page(runs, port):
    health = json.loads(get(port, "/health")[2])
    *told, bare = health["runs"]
    assert health["status"] == "ok" and bare["test_accuracy"] is None
    for one, run in zip(told, runs.values(), strict=True):
        assert one["name"] == run.name and one["stand_in"]
        assert one["test_accuracy"] == metrics_of(run)["test_accuracy"]
    for name, spelt in (("mnist", "mnist"), ('a "run"', r'a \"run\"')):
        ask(port, f"/predict?run={urllib.parse.quote(name)}", b"x", PNG)
        assert f'{{run="{spelt}",status="422"}} ' in get(port, "/metrics")[2].decode()
    status, headers, page = get(port, "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href|url|import|action)\W{1,3}(https?:)?//""", page.decode())


# -- hostile requests ----------------------------------------------------------------------------


JPEG = picture_file(Image.new("RGB", (64, 64)), "JPEG")
LARGE = picture_file(Image.new("1", (8000, 8000)))
HOSTILE = [  # name, a run or a path, headers, body, status, words of the error
    ("empty", "cifar10", PNG, b"", 422, "not a picture"),
    ("too many bytes", "cifar10", PNG, bytes(400_000), 413, "a request may hold"),
    ("a truncated JPEG", "cifar10", PNG, JPEG[:-99], 422, "not a picture"),
    ("too many pixels", "cifar10", PNG, LARGE, 422, "8000 x 8000 pixels, at most"),
    ("HTML", "cifar10", {"Content-Type": "text/html"}, b"<script>", 415, "takes a picture"),
    ("a text for a picture", "cifar10", JSON, b'{"text": "good"}', 422, "takes a picture"),
    ("a picture for a text", "sentiment", PNG, b"\x89PNG", 422, "reads texts"),
    ("bad JSON", "sentiment", JSON, b'{"text": "go', 400, "not valid JSON"),
    ("nested JSON", "sentiment", JSON, b'{"text": ' + b"[" * 200_000, 400, "not valid JSON"),
    ("a long text", "sentiment", JSON, b'{"text": "' + b"x" * 100_001 + b'"}', 422, "100,001"),
    ("bad base64", "cifar10", JSON, b'{"image": "@@@@"}', 422, "not base64"),
    ("a failure", "mnist", PNG, picture_file(Image.new("L", (28, 28))), 500, "the server's log"),
    ("an unknown run", "/predict?run=../../etc", PNG, b"x", 404, "no such run"),
    ("none", "/predict", PNG, b"x", 400, "add ?run="),
    ("posting", "/health", PNG, b"x", 405, "GET /, /health"),
    ("reading", "/predict", {}, None, 405, "POST /predict"),
    *((path, path, {}, None, 404, "POST /predict") for path in ("/../../etc/passwd", "/docs")),
]


@pytest.mark.parametrize(("where", "headers", "body", "status", "words"),
                         [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_requests_get_a_sentence(runs, port, where, headers, body, status, words):
    path = place(runs[where]) if where in runs else where
    got, head, said = ask(port, path, body, headers, "GET" if body is None else "POST")
    assert got == status, said
    error = json.loads(said)
    assert set(error) == {"error"} and words in error["error"]
    assert not re.search(r"Traceback|\.py|secret|0x|/tmp|\n", error["error"]), error
    assert head["X-Content-Type-Options"] == "nosniff"
    assert status != 405 or head["Allow"]


CHUNKS = [b"10000\r\n" + bytes(65536) + b"\r\n"] * 7


@pytest.mark.parametrize(("header", "parts", "status"), [
    pytest.param(b"Transfer-Encoding: chunked", CHUNKS, 413, id="endless"),
    pytest.param(b"Content-Length: 99999999999", [], 413, id="announced"),
    pytest.param(b"Content-Length: 100", [b"x"] * 8, 408, id="slow"),
    (b"Connection: close\r\nContent-Length: 3", [b"abcdefgh"], 422),
    (b"Content-Length: -1", [b"abcde"], 400)])
def test_a_body_that_never_ends_or_comes_gets_one_answer_and_no_connection(
        runs, port, header, parts, status):
    said, head = b"", (f"POST {place(runs['cifar10'])} HTTP/1.1\r\nHost: localhost\r\n"
                       "Content-Type: image/png\r\n").encode()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in (head + header + b"\r\n\r\n", *parts):
                line.sendall(part)
                time.sleep(0.02 if status == 413 else 0.2)
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                said += part
    assert said.startswith(b"HTTP/1.1 %d " % status) and said.count(b"HTTP/1.1") == 1
    assert get(port, "/health")[0] == 200


HEAD = b"POST /predict?run=mnist HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"


def open_connections(held, port, n, sent):
    for _ in range(n):
        line = held.enter_context(socket.create_connection(("127.0.0.1", port)))
        with contextlib.suppress(OSError):
            line.sendall(sent)
        yield line


def test_too_many_at_a_time_are_sent_away_and_may_come_back(runs, port):
    def overload():
        with contextlib.ExitStack() as held:
            [*open_connections(held, port, 24, HEAD + b"\r\n")]  # whose bodies never come
            time.sleep(0.3)
            return get(port, "/health")[0]

    assert any(overload() == 503 for _ in range(5)), "on a busy machine they come too slowly"
    assert any(get(port, "/health")[0] == 200 or time.sleep(0.05) for _ in range(1000))


def test_who_sends_no_head_is_left_and_others_are_answered_meanwhile(runs, port):
    with contextlib.ExitStack() as held:
        lines = [*open_connections(held, port, 50, HEAD)]
        assert get(port, "/health")[0] == 200, "the first of them have gone"
        for _ in range(15):  # the others trickle on
            time.sleep(0.1)
            for line in lines:
                with contextlib.suppress(OSError):
                    line.sendall(b"X: 1\r\n")
        for line in lines:
            line.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert line.recv(1) == b""


def test_what_asyncio_complains_of_is_said_once(capsys):
    hear = dld.saying_once(dld.Log())
    for text in ["no files left\nmore", "no files left\nmore", "another"] * 9:
        assert not hear(logging.LogRecord("asyncio", 40, "", 0, text, (), None)), "nowhere else"
    assert capsys.readouterr().out == "WARNING  no files left\nWARNING  another\n"


STRANGERS = [  # what the Host and the Origin say, and the status
    ({}, 422), ({"Host": "localhost"}, 422), ({"Host": "[::1]:80"}, 422),
    ({"Host": "evil.com"}, 421), ({"Host": "127.0.0.1.evil.com"}, 421), ({"Host": ""}, 421),
    ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 422),
    ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
    ({"Origin": "http://evil.com"}, 403), ({"Origin": "null"}, 403), ({"Host": "[::1"}, 421)]


@pytest.mark.parametrize(("headers", "status"), STRANGERS, ids=[str(row) for row in STRANGERS])
def test_only_pages_of_this_server_may_ask_it(runs, port, headers, status):
    got, _, said = ask(port, place(runs["mnist"]), b"no picture", {**PNG, **headers})
    assert (got, set(json.loads(said))) == (status, {"error"})
    assert headers.get("Origin") or ask(port, "/", None, headers, "GET")[0] == (
        200 if status == 422 else status)


# -- exported ------------------------------------------------------------------------------------


def test_onnx_is_one_file_with_a_free_number_of_samples_and_standard_operations(export):
    onnx = pytest.importorskip("onnx")
    for task in TASKS:
        model = onnx.load(export(task, "onnx"), load_external_data=False)
        assert not any(x.external_data for x in model.graph.initializer)
        free, *fixed = model.graph.input[0].type.tensor_type.shape.dim
        assert free.dim_param and not any(size.dim_param for size in fixed)
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} <= {""}
    assert sum(node.op_type == "LSTM" for node in model.graph.node) == 4


def test_the_readme_tells_how_to_use_what_was_exported(runs, export):
    folder, *_ = {export("cifar10", form).parent for form in FORMS}
    readme = (ROOT / "README.md").read_text("utf-8").partition("--export onnx")[2]
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    code = code.replace("outputs/cifar10", folder.as_posix()).replace(
        "\n\n", "\nsaid = facts, probabilities\n\n")
    names = {}
    exec(code, names)
    first, second = names["said"], (names["facts"], names["probabilities"].detach().numpy())
    assert first[0] == second[0] and "arrow" in first[0]["classes"]
    np.testing.assert_allclose(first[1], second[1], atol=1e-4)


def test_what_cannot_be_kept_is_one_line_and_the_file_before_it_stays(
        runs, export, monkeypatch, capsys):
    path, run, honest = export("mnist", "pt2"), runs["mnist"], dld.Standalone.forward
    before, beside = path.read_bytes(), sorted(run.iterdir())
    monkeypatch.setattr(dld.Standalone, "forward", lambda self, x: honest(self, x) * 0.999)
    assert dld.main(["--export", "pt2", "--run", str(run)]) == 1
    said = capsys.readouterr().err
    assert "predicts otherwise" in said and said.count("\n") == 1
    assert path.read_bytes() == before and sorted(run.iterdir()) == beside


@pytest.mark.parametrize(("flags", "line"), [
    (["onnx", "--run", "RUN"], "needs the package onnx; try: "), (["onnx"], "needs --run RUN"),
    (["pt2", "--run", "RUN", "--epochs", "3"], "leave out --epochs")])
def test_wrong_usage_is_one_line(runs, flags, line, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "onnx" or None)
    run = str(runs["mnist"])
    assert dld.main(["--export", *(run if flag == "RUN" else flag for flag in flags)]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
