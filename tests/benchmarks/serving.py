#!/usr/bin/env python3
"""A server under load, then under attack: errors, latency, requests a second, and its memory.

    python tests/benchmarks/serving.py                               a picture model, hardly trained
    python tests/benchmarks/serving.py --run outputs/sentiment       any run
    python tests/benchmarks/serving.py --task sentiment --explain 1  with reasons for each answer

Requests are test samples of the run's own built-in data, `--together` at a time, over connections
that stay open.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from PIL import Image

import deep_learning_deliverable as dld

CONNECTION = threading.local()  # each thread keeps one open


def memory(process):
    """Megabytes that the server's process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) / 1024


def encode(picture):
    """A PNG."""
    file = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0).squeeze()).save(file, "PNG")
    return file.getvalue()


def bodies_for(task):
    """(headers, bodies) of requests."""
    some = dld.TASKS[task].offline().x[-1000:]
    if task == "sentiment":
        return {"Content-Type": "application/json"}, [json.dumps({"text": text}) for text in some]
    return {"Content-Type": "image/png"}, [encode(picture) for picture in some]


def ask(port, body, headers, path, method="POST"):
    """(status, seconds, answer) of one request."""
    started = time.perf_counter()
    if started - getattr(CONNECTION, "used", 0) > 3:  # the server hangs up after five idle seconds
        CONNECTION.line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line = CONNECTION.line
    try:
        line.request(method, path, body, headers)
        answer = line.getresponse()
        said = answer.read()
        return answer.status, time.perf_counter() - started, said
    except (OSError, http.client.HTTPException) as problem:
        line.close()  # and opens again when it is next used
        return type(problem).__name__, time.perf_counter() - started, b""
    finally:
        CONNECTION.used = time.perf_counter()


def bomb(size, mode):
    """A small PNG of many pixels."""
    file = io.BytesIO()
    Image.new(mode, (size, size)).save(file, "PNG")
    return file.getvalue()


def attack(port, rounds=20):
    """So many hostile requests; how many of each status they got."""
    png, coded = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}
    flat = bomb(6600, "RGBA")  # allowed, and large: 174 MB of pixels
    kinds = [(bomb(9000, "RGB"), png), (flat, png), (flat[:len(flat) // 2], png), (b"", png),
             (bytes(17_000_000), png), (b'{"image": ' + b"[" * 5_000_000, coded),
             (b"[" + b"{}," * 4_000_000 + b"1]", coded),
             (json.dumps({"text": "x " * 60_000}), coded), (b'{"text": "x', coded),
             (os.urandom(100_000), png)]
    statuses = Counter()
    for body, headers in (kinds * rounds)[:rounds]:
        statuses[ask(port, body, headers, "/predict")[0]] += 1
    return dict(statuses)


def load(port, headers, bodies, together, path):
    """Send all of these; (statuses, seconds of each, seconds of all)."""
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        done = list(pool.map(lambda body: ask(port, body, headers, path), bodies))
    took = time.perf_counter() - started
    return Counter(status for status, _, _ in done), [seconds for _, seconds, _ in done], took


def measure(port, process, task, options):
    """Print what the server does."""
    headers, bodies = bodies_for(task)
    bodies = (bodies * options.requests)[:options.requests]
    path = f"/predict?explain={options.explain}"
    load(port, headers, bodies[:64], options.together, path)  # the first are never like the others
    before = memory(process)
    statuses, times, seconds = load(port, headers, bodies, options.together, path)
    after = memory(process)
    times.sort()
    print(f"{task}: {len(bodies):,} requests, {options.together} at a time: {dict(statuses)}\n"
          f"latency ms: p50 {1000 * statistics.median(times):.1f}, "
          f"p99 {1000 * times[int(0.99 * len(times))]:.1f}, most {1000 * times[-1]:.1f}; "
          f"{len(bodies) / seconds:.0f} requests/s\n"
          f"memory MB: {before:.0f} before, {after:.0f} after")
    for _ in range(options.repeats):
        load(port, headers, bodies, options.together, path)
        print(f"memory MB: {memory(process):.0f} after as many again")
    for _ in range(options.attacks):
        print(f"20 hostile requests: {attack(port)}; memory MB: {memory(process):.0f}")
    print(f"still answers: {dict(load(port, headers, bodies[:100], options.together, path)[0])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--task", default="cifar10", choices=("cifar10", "mnist", "sentiment"))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--explain", default="0", choices=["0", "1"])
    parser.add_argument("--repeats", type=int, default=0,
                        help="how many times to send all of it once more")
    parser.add_argument("--attacks", type=int, default=2,
                        help="how many times to send 20 hostile requests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = options.run or dld.train_run(
            {"task": options.task, "data": "offline", "device": "cpu", "epochs": 1, "limit": 1000,
             "report": "minimal", "output_dir": place}, dld.Log())
        process = subprocess.Popen([sys.executable, dld.__file__, "--serve", "--run", str(run),
                                    "--port", "0", "--device", "cpu"], stdout=subprocess.PIPE,
                                   text=True)
        try:
            said = process.stdout.readline().strip()
            print(said)
            port = int(re.search(r":(\d+)/", said)[1])
            task = json.loads(ask(port, None, {}, "/health", "GET")[2])["runs"][0]["task"]
            measure(port, process, task, options)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                print(f"exit code {process.wait(timeout=30)}")


if __name__ == "__main__":
    main()
