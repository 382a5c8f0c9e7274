"""A server on finished runs: right answers, also to many at once; hostile requests; its end."""
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, dld, metrics_of
from matplotlib import colormaps
from PIL import Image

PNG, JSON = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}
TASKS = ("cifar10", "mnist", "sentiment")
# A server with narrow limits, whose model fails on black pictures.
CODE = """import sys, deep_learning_deliverable as dld
dld.MAX_REQUEST_BYTES, dld.MAX_CONNECTIONS, dld.SECONDS_TO_SEND = 300_000, 24, 1.0
answer = dld.Predictor.shares
def probabilities(self, samples):
    if self.meta["kind"] == "image" and not samples.pixels.any():
        raise RuntimeError("a secret at /tmp/secret.py")
    return answer(self, samples)
dld.Predictor.shares = shares
sys.exit(dld.main(["--serve", "--run", *sys.argv[1:], "--port", "0", "--device", "cpu"]))"""


@contextlib.contextmanager
def process(*command):
    """A server in a process of its own, killed if it outlives the block: (process, port)."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True,
                              encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        first = server.stdout.readline()
        assert first.startswith("Serving "), first + server.stderr.read()
        yield server, int(re.search(r":(\d+)/ until", first)[1])
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def port(finished):
    with process("-c", CODE, *finished.values()) as (server, number):
        yield number
        assert server.poll() is None, "nothing may end it"
        server.terminate()
        out, err = server.communicate(timeout=30)
        assert server.returncode == 0 and out.endswith("Stopped serving\n"), err
        assert "Traceback" not in out + err


def ask(port, path="/predict", body=None, headers=None, method="POST"):
    """One request: (status, headers, body)."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
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


# -- right answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_many_at_once_get_what_each_would_get_alone(finished, port, shapes, digits, task):
    run, model = finished[task], ready(finished[task])
    if task == "sentiment":
        texts = ["", "ünknown 😀", "good", "\ud800", "!" * 500, "long " * 900, "Bad.<br />Bad.",
                 "a\0b"] * 2
        sent, samples = [json.dumps({"text": text}) for text in texts], [
            text.replace("\ud800", "?") for text in texts]
    else:
        samples = [*{"cifar10": shapes, "mnist": digits}[task].x[-16:]]
        sent = [png(x) for x in samples]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda body: ask(
            port, place(run), body, JSON if task == "sentiment" else PNG), sent)]
    for (status, head, body), share in zip(answers, model.probabilities(model.pack(samples)), strict=True):
        answer = json.loads(body)
        assert status == 200 and head["Content-Type"] == "application/json"
        assert set(answer) == {"run", "predicted", "confidence", "probabilities"}
        assert answer["run"] == run.name and list(answer["probabilities"]) == model.classes
        assert np.allclose([*answer["probabilities"].values()], share, rtol=0, atol=1e-4)
        assert answer["confidence"] == answer["probabilities"][answer["predicted"]] == max(
            answer["probabilities"].values())
    counted = get(port, "/metrics")[2].decode()
    assert f'dld_requests_total{{run="{run.name}",status="200"}} {len(sent)}\n' in counted


def test_a_picture_is_explained_by_its_map_in_the_colours_of_the_report(finished, port, shapes):
    x, model = shapes.x[0], ready(finished["cifar10"])
    coded = json.dumps({"image": base64.b64encode(png(x)).decode()})
    answers = [json.loads(ask(port, place(finished["cifar10"], "&explain=1"), body, {
        "Content-Type": content})[2]) for body, content in (
            (png(x), "image/png"), (png(x), "application/octet-stream"),
            (coded, "application/json"), (coded.replace('": "', '": "data:image/png;base64,'),
                                          "Application/JSON; charset=utf-8"))]
    assert all(answer == answers[0] for answer in answers), "however it is sent"
    assert answers[0]["method"].startswith("Grad-CAM: ")
    samples = model.pack([x])
    label = model.probabilities(samples).argmax(1)
    maps = model.kind.explain(model.model, samples.batch(torch.tensor([0])), label)["gradcam"][0]
    drawn = Image.open(io.BytesIO(base64.b64decode(answers[0]["overlay"].partition(",")[2])))
    assert drawn.size == (256, 256)
    hot = 255 * np.array(colormaps["inferno"](1.0)[:3])
    for place_of, share in ((maps.argmax(), 0.75), (maps.argmin(), 0.0)):
        row, column = divmod(int(place_of), 32)
        wanted = share * hot + (1 - share) * x[:, row, column]
        assert np.abs(np.asarray(drawn)[8 * row + 4, 8 * column + 4] - wanted).max() < 40


def test_a_text_is_explained_by_the_attention_to_its_words(finished, port):
    def explain(text):
        status, _, said = ask(port, place(finished["sentiment"], "&explain=1"), text, JSON)
        assert status == 200
        return json.loads(said)

    answer = explain('{"text": "The plot was not good."}')
    weights = [weight for _, weight in answer["words"]]
    assert " ".join(word for word, _ in answer["words"]) == "The plot was not good."
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert len(answer["shades"]) == 5 and np.argmax(answer["shades"]) == np.argmax(weights)
    long = explain(json.dumps({"text": "good " * 900}))["words"]
    assert long.count(["…", 0.0]) == 1, "the model did not read its middle"
    assert explain('{"text": "half \\ud83d? film"}')["words"][-1][0] == "film"


def test_health_metrics_and_page(finished, port):
    health = json.loads(get(port, "/health")[2])
    assert health["status"] == "ok" and health["version"] == dld.VERSION
    for told, (task, run) in zip(health["runs"], finished.items(), strict=True):
        known = metrics_of(run)
        assert (told["name"], told["task"], told["model"]) == (run.name, task, known["model"])
        assert told["test_accuracy"] == known["test_accuracy"] and told["stand_in"]
    ask(port, place(finished["mnist"]), b"x", PNG)
    lines = get(port, "/metrics")[2].decode().splitlines()
    assert all(re.fullmatch(r'dld_requests_total\{run="[\w-]+",status="\d+"\} \d+|'
                            r"# (HELP|TYPE) dld_requests_total .+", line) for line in lines)
    status, headers, page = get(port, "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href|url|import|action)\W{1,3}(https?:)?//""", page.decode())


# -- hostile requests ----------------------------------------------------------------------------


def huge(side, body=b""):
    """A PNG that says it is a black-and-white picture of side x side pixels."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def content(kind):
    return {"Content-Type": kind}


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n/showpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HOSTILE = [  # name, a run or a path, headers, body, status, words of the error
    ("empty", "cifar10", PNG, b"", 400, "empty"),
    ("noise", "cifar10", PNG, bytes(range(256)), 422, "not a picture that can be read"),
    ("too many bytes", "cifar10", PNG, bytes(400_000), 413, "a request may hold"),
    ("a truncated JPEG", "cifar10", PNG, picture_file(NOISE, "JPEG")[:700], 422, "not a picture"),
    ("too many pixels", "cifar10", PNG, huge(8000), 422, "8000 x 8000 pixels, at most"),
    ("a bomb", "cifar10", PNG, huge(100_000), 422, "pixels"),
    ("SVG", "cifar10", content("image/svg+xml"), SVG, 422, "not a picture"),
    ("a program for a printer", "cifar10", content("image/x-eps"), EPS, 422, "not a picture"),
    ("a rare format", "cifar10", PNG, picture_file(NOISE, "PCX"), 422, "not a picture"),
    ("HTML", "cifar10", content("text/html"), b"<script>", 415, "takes a picture"),
    ("no type", "cifar10", {}, b"x", 415, "Content-Type is missing"),
    ("a form", "cifar10", content("multipart/form-data; boundary=x"), b"--x--", 415, "not known"),
    ("a text for a picture", "cifar10", JSON, b'{"text": "good"}', 422, "takes a picture"),
    ("a picture for a text", "sentiment", PNG, b"\x89PNG", 422, "reads texts"),
    ("bad JSON", "sentiment", JSON, b'{"text": "go', 400, "not valid JSON"),
    ("JSON in no letters", "sentiment", JSON, b'{"text": "\xff\xfe"}', 400, "not valid JSON"),
    ("nested JSON", "sentiment", JSON, b'{"text": ' + b"[" * 200_000, 400, "not valid JSON"),
    ("NaN", "sentiment", JSON, b'{"text": NaN}', 422, "takes a text"),
    ("an endless number", "sentiment", JSON, b'{"text": ' + b"9" * 9999 + b"}", 400, "takes"),
    ("a list", "sentiment", JSON, b'["good"]', 422, "takes a text"),
    ("nothing", "sentiment", JSON, b"null", 422, "takes a text"),
    ("a long text", "sentiment", JSON, b'{"text": "' + b"x" * 100_001 + b'"}', 422, "100,001"),
    ("bad base64", "cifar10", JSON, b'{"image": "@@@@"}', 422, "not base64"),
    ("empty base64", "cifar10", JSON, b'{"image": ""}', 422, "not a picture"),
    ("a number for base64", "cifar10", JSON, b'{"image": 7}', 422, "takes a picture"),
    ("a failure", "mnist", PNG, picture_file(Image.new("L", (28, 28))), 500, "the server's log"),
    ("an unknown run", "/predict?run=../../etc", PNG, b"x", 404, "no such run"),
    ("another", "/predict?run=%2e%2e%2fmodel.pt%00", PNG, b"x", 404, "no such run"),
    ("an endless one", "/predict?run=" + "x" * 9000, PNG, b"x", 404, "no such run"),
    ("none", "/predict", PNG, b"x", 400, "add ?run="),
    ("explanation", "/predict?run=mnist&explain=yes", PNG, b"x", 400, "explain is 0 or 1"),
    ("a slash", "/predict/", PNG, b"x", 404, "POST /predict"),
    ("posting", "/health", PNG, b"x", 405, "GET /, /health"),
    ("reading", "/predict", {}, None, 405, "POST /predict"),
    *((path, path, {}, None, 404, "POST /predict") for path in (
        "/../../etc/passwd", "/model.pt", "/docs", "/openapi.json")),
]


@pytest.mark.parametrize(("where", "headers", "body", "status", "words"),
                         [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_requests_get_a_sentence(finished, port, where, headers, body, status, words):
    path = place(finished[where]) if where in finished else where
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
    *((wrong, [b"abcde"], 400) for wrong in (
        b"Content-Length: -1", b"Content-Length: 5\r\nContent-Length: 7", b"Transfer-Encoding: x",
        b"no header", b"X: " + b"y" * 200_000))])
def test_a_body_that_never_ends_or_comes_gets_one_answer_and_no_connection(
        finished, port, header, parts, status):
    said, head = b"", (f"POST {place(finished['cifar10'])} HTTP/1.1\r\nHost: x\r\n"
                       "Content-Type: image/png\r\n").encode()
    with socket.create_connection(("127.0.0.1", port), timeout=4) as line:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in (head + header + b"\r\n\r\n", *parts):
                line.sendall(part)
                time.sleep(0.02 if status == 413 else 0.2)
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                said += part
    assert said.startswith(b"HTTP/1.1 %d " % status) and said.count(b"HTTP/1.1") == 1
    assert get(port, "/health")[0] == 200


def test_too_many_at_a_time_are_sent_away_and_may_come_back(finished, port):
    def health():
        return get(port, "/health")[0]

    def wait_for(status):
        return next((True for _ in range(100) if health() == status or time.sleep(0.05)), False)

    with contextlib.ExitStack() as held:
        for _ in range(24):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert wait_for(503)
    assert wait_for(200)


# -- the command ---------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line(finished, port, capsys):
    assert dld.main(["--serve", "--run", str(finished["mnist"]), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--port {port}: another program listens there" in error


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_a_signal_ends_it_cleanly_even_while_somebody_asks(finished, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.pt").write_bytes((finished["mnist"] / "model.pt").read_bytes())
    with process(SCRIPT, "--serve", "--run", tmp_path / "bare", "--port", "0",
                 "--device", "cpu") as (server, port):
        assert json.loads(get(port, "/health")[2])["runs"][0]["test_accuracy"] is None
        one = png(np.eye(28, dtype=np.uint8)[None] * 255)
        assert ask(port, body=one, headers=PNG)[0] == 200, "one run needs no name"
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=30)
    assert server.returncode in (0, 130) and out == "Stopped serving\n" and not err
