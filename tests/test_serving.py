"""A server on three finished runs: right answers, also to many at once; hostile requests; the page in a browser."""
import asyncio
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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, dld
from matplotlib import colormaps
from PIL import Image
from test_bad_input import giant

PNG, JSON = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}
CODE = """import sys, pathlib, deep_learning_deliverable as dld
limits = dld.Limits(body=300_000, inside=24, arriving=1.0)
dld.serve([pathlib.Path(run) for run in sys.argv[1:]], {"device": "cpu"}, dld.Log(), port=0, limits=limits)"""


@contextlib.contextmanager
def process(*command):
    """A server in a process of its own, killed if it outlives the block: (process, port)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, encoding="utf-8",
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
        assert server.returncode == 0 and out == "Stopped serving\n" and "Traceback" not in err, err


def ask(port, path="/predict", body=None, headers=None, method="POST"):
    """One request: (status, headers, body)."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(line):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it answers before it has read everything
            line.request(method, path, body, headers or {})
        answer = line.getresponse()
        return answer.status, answer.headers, answer.read()


def raw(port, *parts, pause=0.0):
    """Bytes to the server, then all that it says until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                line.sendall(part)
                time.sleep(pause)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                said += part
    return said


def place(run, more=""):
    return f"/predict?run={urllib.parse.quote(run.name)}{more}"


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0).squeeze()).save(file, "PNG")
    return file.getvalue()


def expected(run, samples):
    """What the model says without a server."""
    ready = dld.Predictor(run, dld.Runtime(torch.device("cpu"), "fp32"))
    return ready.shares(ready.pack(samples)), ready


def measured(port, name, run):
    """The value of a sample of /metrics, 0 if it is not there."""
    text = ask(port, "/metrics", method="GET")[2].decode()
    found = re.search(rf'^{name}{{run="{re.escape(run.name)}"[^}}]*}} (\S+)$', text, re.M)
    return float(found[1]) if found else 0.0


# -- right answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cifar10", "mnist", "sentiment"])
def test_many_at_once_get_what_each_would_get_alone(finished, port, shapes, digits, reviews, task):
    run, raws = finished[task], {"cifar10": shapes, "mnist": digits, "sentiment": reviews}
    some = list(raws[task].x[-48:])
    if task == "sentiment":
        some = [*some[:40], "", "ünknown 😀", "good", "\ud800", "!" * 500, "long " * 900, "Bad film.<br />Bad.", "a\0b"]
        bodies, headers = [json.dumps({"text": text}) for text in some], JSON
        samples = [text.replace("\ud800", "?") for text in some]
    else:
        bodies, headers = [png(picture) for picture in some], PNG
        ready = dld.Predictor(run, dld.Runtime(torch.device("cpu"), "fp32"))
        samples = [dld.read_picture(io.BytesIO(body), ready.meta) for body in bodies]
    shares, ready = expected(run, samples)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: ask(port, place(run), body, headers), bodies))
    for (status, head, body), share in zip(answers, shares, strict=True):
        answer = json.loads(body)
        assert status == 200 and head["Content-Type"] == "application/json" and answer["run"] == run.name
        assert list(answer["probabilities"]) == ready.classes
        assert np.allclose(list(answer["probabilities"].values()), share, atol=1e-4)
        assert answer["confidence"] == max(answer["probabilities"].values())
        assert answer["predicted"] == ready.classes[int(share.argmax())]
        assert set(answer) == {"run", "predicted", "confidence", "probabilities"}
    batches = measured(port, "dld_batch_size_count", run)
    assert measured(port, "dld_batch_size_sum", run) == len(bodies) and batches < 0.7 * len(bodies)


def test_a_picture_is_explained_by_its_map_in_the_colours_of_the_report(finished, port, shapes):
    run, blob = finished["cifar10"], png(shapes.x[0])
    coded = json.dumps({"image": base64.b64encode(blob).decode()})
    answers = [json.loads(ask(port, place(run, "&explain=1"), body, headers)[2]) for body, headers in (
        (blob, PNG), (blob, {"Content-Type": "application/octet-stream"}), (coded, JSON),
        (coded.replace('": "', '": "data:image/png;base64,'), {"Content-Type": "Application/JSON; charset=utf-8"}))]
    assert all(answer == answers[0] for answer in answers), "however it is sent"
    shares, ready = expected(run, [shapes.x[0]])
    samples = ready.pack([shapes.x[0]])
    strength = dld.explain_images(ready.model, samples.batch(torch.tensor([0])), shares.argmax(1))["gradcam"][0].numpy()
    drawn = Image.open(io.BytesIO(base64.b64decode(answers[0]["overlay"].removeprefix("data:image/png;base64,"))))
    assert drawn.size == (256, 256) and answers[0]["method"].startswith("Grad-CAM: ")
    y, x = np.unravel_index(strength.argmax(), strength.shape)
    strongest = 255 * np.array(colormaps["inferno"](1.0)[:3])
    wanted = 0.75 * strongest + 0.25 * shapes.x[0][:, y, x]
    assert np.abs(np.asarray(drawn)[8 * y + 4, 8 * x + 4] - wanted).max() < 40
    y, x = np.unravel_index(strength.argmin(), strength.shape)
    assert np.abs(np.asarray(drawn)[8 * y + 4, 8 * x + 4] - shapes.x[0][:, y, x].astype(int)).max() < 40


def test_a_text_is_explained_by_the_attention_to_its_words(finished, port):
    text = "The plot was not good."
    answer = json.loads(ask(port, place(finished["sentiment"], "&explain=1"), json.dumps({"text": text}), JSON)[2])
    assert " ".join(word for word, _ in answer["words"]) == text
    assert sum(weight for _, weight in answer["words"]) == pytest.approx(1, abs=1e-4)
    assert answer["shades"] == [dark for _, dark in dld.shade(answer["words"])]
    long = json.dumps({"text": "good " * 900})
    words = json.loads(ask(port, place(finished["sentiment"], "&explain=1"), long, JSON)[2])["words"]
    assert words.count(["…", 0.0]) == 1, "the model did not read its middle"
    half = ask(port, place(finished["sentiment"], "&explain=1"), '{"text": "good \\ud83d? film"}', JSON)
    assert half[0] == 200 and json.loads(half[2])["words"][-1][0] == "film", "half of a character harms nothing"


def test_health_metrics_and_page(finished, port):
    health = json.loads(ask(port, "/health", method="GET")[2])
    assert health["status"] == "ok" and health["version"] == dld.VERSION
    for told, (task, run) in zip(health["runs"], finished.items(), strict=True):
        metrics = json.loads((run / "metrics.json").read_text("utf-8"))
        assert (told["name"], told["task"], told["model"]) == (run.name, task, metrics["model"])
        assert told["test_accuracy"] == metrics["test_accuracy"] and told["stand_in"] and len(told["classes"]) >= 2
    ask(port, place(finished["mnist"]), b"x", PNG)
    lines = ask(port, "/metrics", method="GET")[2].decode().splitlines()
    sample = r'[a-z_]+\{([a-z]+="(?:[^"\\]|\\.)*"(?:,[a-z]+="(?:[^"\\]|\\.)*")*)?\} -?[\d.e+-]+'
    assert all(re.fullmatch(sample, line) or re.fullmatch(r"# (HELP|TYPE) \w+ .+", line) for line in lines)
    counts = [float(line.split()[-1]) for line in lines
              if line.startswith(f'dld_request_seconds_bucket{{run="{finished["mnist"].name}"')]
    assert len(counts) == 13 and counts == sorted(counts) and counts[-1] > 0, "buckets count what is below their edge"
    status, headers, page = ask(port, "/", method="GET")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href|url|import|action)\W{1,3}(https?:)?//""", page.decode())
    assert ask(port, "/docs", method="GET")[0] == ask(port, "/openapi.json", method="GET")[0] == 404


# -- hostile requests -------------------------------------------------------------------------------------------------


def truncated_jpeg():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()[:700]


def large_png():
    """A PNG of 8,000 x 8,000 pixels of one colour, within the limit of bytes but not of pixels."""
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")
    return file.getvalue()


def pcx():
    """A whole picture, of a format that hardly anybody sends, and so hardly anybody has tested."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PCX")
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n/showpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PHP = {"Content-Type": "application/x-httpd-php"}
HOSTILE = [  # name, run, method, path's end, headers, body, status, words of the error
    ("empty", "cifar10", "POST", "", PNG, b"", 400, "empty"),
    ("noise", "cifar10", "POST", "", PNG, bytes(range(256)), 422, "not a picture that can be read"),
    ("huge", "cifar10", "POST", "", PNG, bytes(400_000), 413, "a request may hold"),
    ("a truncated JPEG", "cifar10", "POST", "", {"Content-Type": "image/jpeg"}, truncated_jpeg(), 422, "not a picture"),
    ("more pixels than bytes", "cifar10", "POST", "", PNG, large_png(), 422, "8000 x 8000 pixels; the most are"),
    ("SVG", "cifar10", "POST", "", {"Content-Type": "image/svg+xml"}, SVG, 422, "not a picture"),
    ("a program for a printer", "cifar10", "POST", "", {"Content-Type": "image/x-eps"}, EPS, 422, "not a picture"),
    ("a rare format", "cifar10", "POST", "", {"Content-Type": "image/x-pcx"}, pcx(), 422, "not a picture"),
    ("HTML", "cifar10", "POST", "", {"Content-Type": "text/html"}, b"<script>", 415, "takes a picture"),
    ("PHP", "cifar10", "POST", "", PHP, b"<?php", 415, "Content-Type is not known"),
    ("no type", "cifar10", "POST", "", {}, b"x", 415, "Content-Type is missing"),
    ("a form", "cifar10", "POST", "", {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", 415, "takes"),
    ("a text for a picture", "cifar10", "POST", "", JSON, b'{"text": "good"}', 422, "takes a picture"),
    ("a picture for a text", "sentiment", "POST", "", PNG, b"\x89PNG", 422, "reads texts"),
    ("bad JSON", "sentiment", "POST", "", JSON, b'{"text": "go', 400, "not valid JSON"),
    ("JSON in no letters", "sentiment", "POST", "", JSON, b'{"text": "\xff\xfe"}', 400, "not valid JSON"),
    ("nested JSON", "sentiment", "POST", "", JSON, b'{"text": ' + b"[" * 200_000, 400, "not valid JSON"),
    ("NaN", "sentiment", "POST", "", JSON, b'{"text": NaN}', 422, "takes a text"),
    ("an endless number", "sentiment", "POST", "", JSON, b'{"text": ' + b"9" * 9999 + b"}", (400, 422), "takes a text"),
    ("a list", "sentiment", "POST", "", JSON, b'["good"]', 422, "takes a text"),
    ("nothing", "sentiment", "POST", "", JSON, b"null", 422, "takes a text"),
    ("a text too long", "sentiment", "POST", "", JSON, json.dumps({"text": "x" * 100_001}), 413, "100,001 characters"),
    ("bad base64", "cifar10", "POST", "", JSON, b'{"image": "@@@@"}', 422, "not base64"),
    ("empty base64", "cifar10", "POST", "", JSON, b'{"image": ""}', 422, "not a picture"),
    ("a number for base64", "cifar10", "POST", "", JSON, b'{"image": 7}', 422, "takes a picture"),
    ("another explanation", "cifar10", "POST", "&explain=yes", PNG, b"x", 400, "explain is 0 or 1"),
    ("reading", "cifar10", "GET", "", {}, b"", 405, "POST /predict"),
    ("deleting", "cifar10", "DELETE", "", {}, b"", 405, "POST /predict"),
]


@pytest.mark.parametrize(("run", "method", "more", "headers", "body", "status", "words"),
                         [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_requests_get_a_sentence(finished, port, tmp_path, run, method, more, headers, body, status, words):
    got, head, said = ask(port, place(finished[run], more), body, headers, method)
    assert got in (status if isinstance(status, tuple) else (status,)), said
    error = json.loads(said)
    assert set(error) == {"error"} and words in error["error"] and head["Content-Type"] == "application/json"
    assert not re.search(r"Traceback|\.py|0x|/tmp|\n", error["error"]), error
    assert head["X-Content-Type-Options"] == "nosniff"


def test_a_picture_of_giant_size_and_one_behind_a_lie(finished, port, tmp_path):
    giant(tmp_path / "bomb.png")
    status, _, said = ask(port, place(finished["cifar10"]), (tmp_path / "bomb.png").read_bytes(), PNG)
    assert status == 422 and "pixels" in json.loads(said)["error"]


@pytest.mark.parametrize(("path", "method", "status"), [
    ("/predict?run=../../etc", "POST", 404), ("/predict?run=%2e%2e%2fmodel.pt%00", "POST", 404),
    ("/predict", "POST", 400), ("/predict/", "POST", 404), ("/../../etc/passwd", "GET", 404),
    ("/model.pt", "GET", 404), ("/health", "POST", 405),
    ("/predict?run=" + "x" * 9000, "POST", 404)])
def test_paths_that_lead_nowhere(port, path, method, status):
    got, head, said = ask(port, path, b"x" if method == "POST" else None, PNG, method)
    assert got == status and set(json.loads(said)) == {"error"}
    assert status != 405 or head["Allow"]


def test_bodies_that_never_end_or_never_come(finished, port):
    head = f"POST {place(finished['cifar10'])} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n".encode()
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    assert b" 413 " in raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 7, pause=0.02)[:20]
    assert b" 413 " in raw(port, head + b"Content-Length: 99999999999\r\n\r\n")[:20], "without waiting for any of it"
    started = time.monotonic()
    slow = raw(port, head + b"Content-Length: 100\r\n\r\n", *[b"x"] * 8, pause=0.2)
    assert b" 408 " in slow[:20] and b'{"error":"the request came too slowly"}' in slow
    assert time.monotonic() - started < 10
    short = raw(port, head + b"Content-Length: 3\r\n\r\nabcdefgh")
    assert b" 422 " in short[:20] and short.count(b"HTTP/1.1") == 1, "the rest is no request"
    for wrong in (b"Content-Length: -1", b"Content-Length: 5\r\nContent-Length: 7", b"Transfer-Encoding: x"):
        assert re.match(rb"HTTP/1.1 (400|501) ", raw(port, head + wrong + b"\r\n\r\nabcde"))
    assert re.match(rb"HTTP/1.1 400 ", raw(port, b"\x16\x03\x01 nonsense\r\n\r\n"))
    assert re.match(rb"HTTP/1.1 (400|431) ", raw(port, head + b"X: " + b"y" * 200_000 + b"\r\n\r\n"))
    assert ask(port, "/health", method="GET")[0] == 200


def test_too_many_at_a_time_are_told_to_come_back(finished, port):
    head = f"POST {place(finished['mnist'])} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with contextlib.ExitStack() as held:
        for _ in range(24):
            held.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(head.encode())
        time.sleep(0.3)
        status, headers, said = ask(port, place(finished["mnist"]), b"x", PNG)
        assert status == 503 and headers["Retry-After"] == "1" and "try again" in json.loads(said)["error"]
    time.sleep(0.3)  # those that hung up have left
    assert ask(port, place(finished["mnist"]), b"x", PNG)[0] == 422
    text = ask(port, "/metrics", method="GET")[2].decode()
    assert 'reason="too many at a time"} 1\n' in text


# -- inside, without a network ----------------------------------------------------------------------------------------


class Sluggish(dld.Predictor):
    """Takes its time, and fails on black pictures."""

    seconds = 0.0

    def shares(self, samples):
        time.sleep(self.seconds)
        if any(not samples.show(row).any() for row in range(len(samples))):
            raise RuntimeError("a secret at /tmp/secret.py")
        return super().shares(samples)


async def call(app, path, body):
    """(status, JSON) of a POST."""
    said = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(b"content-type", b"image/png")], "http_version": "1.1", "root_path": "", "scheme": "http"}
    await app(scope, receive, send)
    return said[0]["status"], json.loads(said[1]["body"])


def test_one_sample_that_the_model_fails_on_harms_no_other(finished, capsys):
    ready = Sluggish(finished["mnist"], dld.Runtime(torch.device("cpu"), "fp32"))
    app = dld.Server([ready], dld.Log(), dld.Limits(pause=0.1)).build()
    pictures = [np.full((1, 28, 28), shade, np.uint8) for shade in (0, 90, 0, 200)]
    pictures[1][:, :9] = pictures[3][:, :9] = 5

    async def together():
        return await asyncio.gather(*(call(app, "/predict", png(picture)) for picture in pictures))

    statuses, answers = zip(*asyncio.run(together()), strict=True)
    assert statuses == (500, 200, 500, 200), answers
    assert "secret" not in json.dumps(answers) and "a secret" in capsys.readouterr().out


def test_an_answer_that_takes_too_long_is_given_up(finished):
    ready = Sluggish(finished["mnist"], dld.Runtime(torch.device("cpu"), "fp32"))
    ready.seconds = 0.5
    server = dld.Server([ready], dld.Log(), dld.Limits(answering=0.2))
    app, picture = server.build(), png(np.eye(28, dtype=np.uint8)[None] * 255)

    async def twice():
        first = await call(app, "/predict", picture)
        ready.seconds = 0.0
        await asyncio.sleep(0.5)
        return first, await call(app, "/predict", picture)

    (status, said), (again, _) = asyncio.run(twice())
    assert status == 504 and "no answer in time" in said["error"] and again == 200
    assert server.inside == 0 and 'reason="no time left"} 1\n' in server.tally.text()


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line(finished, port, capsys):
    assert dld.main(["--serve", "--run", str(finished["mnist"]), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--port {port}: another program listens there" in error


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_a_signal_ends_it_cleanly_even_while_somebody_asks(finished, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.pt").write_bytes((finished["mnist"] / "model.pt").read_bytes())
    with process(SCRIPT, "--serve", "--run", tmp_path / "bare", "--port", "0", "--device", "cpu") as (server, port):
        assert json.loads(ask(port, "/health", method="GET")[2])["runs"][0]["test_accuracy"] is None
        assert ask(port, body=png(np.eye(28, dtype=np.uint8)[None] * 255), headers=PNG)[0] == 200, "one run: no name"
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=30)
    assert server.returncode in (0, 130) and "Traceback" not in err and out == "Stopped serving\n", err


# -- the page, in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        own = [path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()]
        try:
            program = tools.chromium.launch(executable_path=own[0] if own else None,
                                            args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as problem:
            pytest.skip(f"no chromium: {problem}")
        yield program
        program.close()


def test_the_page_shows_bars_and_reasons(finished, port, browser, shapes, tmp_path):
    (tmp_path / "shape.png").write_bytes(png(shapes.x[0]))
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(20_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda problem: said.append(str(problem)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#image:not([hidden])")
    accuracy = json.loads((finished["cifar10"] / "metrics.json").read_text("utf-8"))["test_accuracy"]
    assert "stand-in" in page.inner_text("#standin") and f"{accuracy:.1%}" in page.inner_text("#facts")
    page.set_input_files("#file", tmp_path / "shape.png")
    page.wait_for_selector("#bars li")
    shown = [float(text.rstrip("%")) for text in page.locator(".share").all_inner_texts()]
    assert len(shown) == 10 and shown == sorted(shown, reverse=True) and sum(shown) == pytest.approx(100, abs=1)
    page.wait_for_function("document.getElementById('overlay').naturalWidth === 256")
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "nothing sticks out"
    page.focus("#run")
    page.keyboard.press("End")  # the last run, by keyboard alone
    page.wait_for_selector("#text:not([hidden])")
    assert page.is_hidden("#result") and page.is_hidden("#image")
    page.keyboard.press("Tab")
    page.keyboard.type("The plot was <b>not</b> good.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#words > *")
    assert "".join(page.inner_text("#words").split()) == "Theplotwas<b>not</b>good.", "as text, not as HTML"
    assert len(page.locator("#bars li").all()) == 2 and page.locator("#words mark").count() > 0
    assert said == []
    assert all(re.match(rf"http://127\.0\.0\.1:{port}/|data:|blob:", url) for url in asked), asked
    page.select_option("#run", finished["mnist"].name)
    drop = page.evaluate_handle("""() => { const all = new DataTransfer();
        all.items.add(new File(["no picture"], "note.png", {type: "image/png"})); return all; }""")
    page.dispatch_event("#image", "drop", {"dataTransfer": drop})
    page.wait_for_selector("#error:not([hidden])")
    assert "Not a picture that can be read" in page.inner_text("#error") and page.is_hidden("#result")


def test_a_png_of_the_test_is_what_it_says():
    wide, high = struct.unpack(">II", large_png()[16:24])
    assert wide * high > dld.MOST_PIXELS // 2 and len(large_png()) < 300_000
