"""Kill small runs at random instants, resume them, and compare what comes out with runs that nobody disturbed.

    python tests/benchmarks/torture.py --kills 200

Each run is a process of its own (a fork, so that libraries are loaded once), hit by SIGKILL, SIGTERM or SIGINT at an
instant drawn at random from its life: while it loads data, trains, saves (every 20 ms, so that many hits fall into
saving) or draws. It is then resumed, and hit again, until it gets through. Weights, history and every number that is
not a time must equal those of the undisturbed run, bit for bit.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deep_learning_deliverable as dld

# Small figures, so that more of a run's life is training and saving.
dld.KINDS.update({name: dataclasses.replace(kind, shown=(2, 1, 1)) for name, kind in dld.KINDS.items()})
CASES = {
    "cifar10": ["--task", "cifar10", "--width", "16", "--limit", "400", "--batch-size", "50", "--epochs", "6"],
    "mnist": ["--task", "mnist", "--width", "64", "--limit", "600", "--epochs", "10", "--schedule", "plateau"],
    "sentiment": ["--task", "sentiment", "--limit", "400", "--epochs", "4"],
    "folds": ["--task", "mnist", "--width", "64", "--limit", "300", "--epochs", "6", "--folds", "2"],
}
COMMON = ["--data", "offline", "--device", "cpu", "--report", "minimal", "--checkpoint-every", "0.02s"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = {"seconds_setup", "seconds_report", "seconds_training", "seconds_total", "seconds_data", "latency_ms",
         "samples_per_second", "peak_memory_mb"}


def start(flags: list[str], log: Path) -> int:
    """Run the program in a child process; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = 99
        try:
            code = dld.main(flags)
        finally:
            sys.stdout.flush()
            os._exit(code)


def end(child: int, patience: float = 60) -> int:
    """Its exit code (negative: the signal that ended it)."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("a run did not end")


def outcome(run: Path) -> tuple[object, ...]:
    """All that must be the same: weights, history, numbers, predictions."""
    weights = dld.load_file(run / "model.pt")["weights"]
    with (run / "history.csv").open(encoding="utf-8") as file:
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    metrics = {k: v for k, v in json.loads((run / "metrics.json").read_text("utf-8")).items() if k not in TIMES}
    return ({name: tensor.numpy().tobytes() for name, tensor in weights.items()}, history, metrics,
            (run / "predictions.csv").read_bytes())


def undisturbed(case: str, place: Path) -> tuple[tuple[object, ...], float]:
    """What an undisturbed run ends with, and how long it takes."""
    started = time.monotonic()
    code = end(start([*CASES[case], *COMMON, "--output-dir", str(place / f"{case}-calm")], place / "log.txt"))
    took = time.monotonic() - started
    assert code == 0, (place / "log.txt").read_text()
    run, = (place / f"{case}-calm").iterdir()
    return outcome(run), took


def disturb(case: str, place: Path, took: float, chance: random.Random, most: int, tally: Counter[str]) -> Path:
    """Start a run, hit it, resume it, hit it again ... until it gets through or has been hit often enough."""
    flags = [*CASES[case], *COMMON, "--output-dir", str(place)]
    hits = 0
    while True:
        runs = [path for path in place.glob("*") if path.is_dir() and not path.name.startswith(".")]
        assert len(runs) <= 1, runs
        log = place.with_suffix(".log")
        log.unlink(missing_ok=True)
        child = start(["--resume", str(runs[0])] if runs else flags, log)
        if hits < most:
            how = chance.choice(SIGNALS)
            first, last = (0.0, 1.1) if chance.random() < 0.3 else (0.2, 0.6)  # most while it trains and saves
            time.sleep(chance.uniform(first, last) * took)
            os.kill(child, how)
        code = end(child)
        if code == 0:
            return next(path for path in place.glob("*") if path.is_dir() and not path.name.startswith("."))
        said = log.read_text("utf-8")
        assert hits < most and code == (-how if how == signal.SIGKILL else 130), (case, how, code, said[-3000:])
        hits += 1
        tally[how.name] += 1
        status = [json.loads(path.read_text("utf-8"))["status"] for path in place.glob("*/metrics.json")]
        tally["no folder yet" if not status else f"left {status[0]}"] += 1
        if code == 130 and "Task " in said:  # else it had not begun to write
            assert status == ["interrupted"], (status, said[-3000:])


def torture(kills: int, cases: list[str], seed: int, each: int) -> Counter[str]:
    """Until so many kills have been survived; raises at the first difference."""
    tally: Counter[str] = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        calm = {case: undisturbed(case, Path(scratch)) for case in cases}
        number = 0
        while (survived := sum(tally[how.name] for how in SIGNALS)) < kills:
            case = cases[number % len(cases)]
            place = Path(scratch) / f"{case}-{number}"
            place.mkdir()
            before = survived
            run = disturb(case, place, calm[case][1], chance, min(each, kills - survived), tally)
            expected, found = calm[case][0], outcome(run)
            for what, one, other in zip(("weights", "history", "metrics", "predictions"), expected, found, strict=True):
                hits = sum(tally[how.name] for how in SIGNALS) - before
                assert one == other, f"{what} of {case} differ after {hits} kills"
            left = [path.name for path in run.iterdir() if path.name.startswith(".") or "before" in path.name]
            assert not left, left
            number += 1
            tally["runs"] += 1
            print(f"{sum(tally[how.name] for how in SIGNALS):4} kills survived, {number} runs equal", flush=True)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=12, help="most kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    begun = time.monotonic()
    print(dict(torture(args.kills, args.cases, args.seed, args.each)), f"{time.monotonic() - begun:.0f} s")
