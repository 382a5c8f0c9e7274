"""Kill small runs at random instants, resume them, and compare with runs that nobody disturbed.

    python tests/benchmarks/torture.py --kills 200

Each run is a process of its own (a fork, so that libraries are loaded once), hit by SIGKILL,
SIGTERM and SIGINT in turn, at instants drawn at random from its life: while it loads data, trains,
saves (every 20 ms, so that many hits fall into saving) or draws. Life is counted in seconds of
processor time, so that other load changes nothing (Linux only). It is then resumed, and hit again,
until it gets through. Weights, history and every number that is not a time must equal those of the
undisturbed run, bit for bit. Of folds only whole ones are kept, so there hits come further apart.

Two cases differ. "changed" trains on a table whose rows are put into another order before each
resume: that is refused, changes no file, and with the old order the run goes on. "search" is a
search with --storage, which the same command continues: no trial that was done is lost, and at the
end there are as many as were asked for.
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Beside other load, threads that wait for each other would take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import matplotlib.pyplot  # noqa: F401  libraries that every fork would else load by itself
import seaborn  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401

import deep_learning_deliverable as dld

# Small figures, so that more of a run's life is training and saving.
dld.ImageData.shown = dld.TextData.shown = (2, 1, 1)
CASES = {
    "cifar10": ["--task", "cifar10", "--width", "16", "--limit", "400", "--batch-size", "50",
                "--epochs", "6"],
    "mnist": ["--task", "mnist", "--width", "64", "--limit", "600", "--epochs", "10",
              "--schedule", "constant"],
    "sentiment": ["--task", "sentiment", "--limit", "400", "--epochs", "4"],
    "folds": ["--task", "mnist", "--width", "64", "--limit", "300", "--epochs", "6",
              "--folds", "2"],
    "changed": ["--task", "text", "--width", "16", "--epochs", "8"],
    "search": ["--task", "mnist", "--width", "32", "--limit", "200", "--epochs", "3",
               "--search", "6"],
}
COMMON = ["--device", "cpu", "--precision", "fp32", "--report", "minimal",
          "--checkpoint-every", "0.02s"]
TABLE = dld.make_reviews(300, 10)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = ("seconds_", "latency_ms", "samples_per_second", "peak_memory_mb")


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


def end(child: int, patience: float = 120) -> int:
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


def age(child: int) -> float:
    """Seconds of processor time that a process has used; infinite once it has ended."""
    if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return math.inf
    return time.clock_gettime((~child << 3) | 2)  # as clock_getcpuclockid(3) numbers clocks


def flags_of(case: str, place: Path) -> list[str]:
    """The command of a case; its table and its database lie beside the runs."""
    data = str(place.parent / "live.csv") if case == "changed" else "offline"
    storage = ["--storage", f"sqlite:///{place}.db"] * (case == "search")
    return [*CASES[case], *COMMON, "--data", data, *storage, "--output-dir", str(place)]


def write_table(place: Path, seed: int | None = None) -> None:
    """The table of "changed", perhaps in another order."""
    rows = list(zip(TABLE.x, TABLE.y, strict=True))
    if seed is not None:
        random.Random(seed).shuffle(rows)
    with (place / "live.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def refuse_changed(run: Path, log: Path) -> None:
    """With its rows in another order, the table is not taken for the one that the run began on."""
    before = contents(run)
    write_table(run.parent.parent, seed=1)
    log.unlink(missing_ok=True)
    code = end(start(["--resume", str(run)], log))
    assert code == 2 and "has changed since" in log.read_text("utf-8"), (code, log.read_text())
    assert contents(run) == before, "a file was written or lost"
    write_table(run.parent.parent)


def trials_in(place: Path) -> dict[int, object]:
    """The trials of a search that are done, by their numbers, and what each reached."""
    import optuna
    database = Path(f"{place}.db")
    if not database.exists():
        return {}
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    return {trial.number: (trial.values, trial.params) for study in storage.get_all_studies()
            for trial in storage.get_all_trials(study._study_id, states=done)}


def search_outcome(place: Path) -> dict[str, object]:
    """What the last folder of a search says must fit the database."""
    done, runs = trials_in(place), folders(place)
    last = max(runs, key=lambda path: path.stat().st_mtime)
    with (last / "trials.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] in ("complete", "pruned")]
    assert {int(row["number"]) - 1 for row in rows} == {*done}
    best = max((row for row in rows if row["state"] == "complete"),
               key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    chosen = json.loads((last / "best.json").read_text("utf-8"))
    assert math.isclose(chosen["lr"], float(best["lr"]), rel_tol=1e-6)
    return {"trials": len(done) >= 6}


def folders(place: Path) -> list[Path]:
    """The runs here that have a name already."""
    return [path for path in place.glob("*") if path.is_dir() and not path.name.startswith(".")]


def outcome(run: Path) -> dict[str, object]:
    """All that must be the same."""
    weights = dld.load_file(run / "model.pt")["weights"]
    with (run / "history.csv").open(encoding="utf-8") as file:
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    return {"weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
            "history": history, "metrics": {k: v for k, v in metrics.items()
                                            if not k.startswith(TIMES)},
            "predictions": (run / "predictions.csv").read_bytes()}


def undisturbed(case: str, place: Path) -> tuple[dict[str, object], float]:
    """What an undisturbed run ends with, and how long it takes."""
    flags = flags_of(case, place / f"{case}-calm")
    child, took = start(flags, place / "log.txt"), 0.0
    while (now := age(child)) < math.inf:
        took = now
        time.sleep(0.005)
    assert end(child) == 0, (place / "log.txt").read_text()
    if case == "search":
        return search_outcome(place / f"{case}-calm"), took
    run, = folders(place / f"{case}-calm")
    return outcome(run), took


def hits_in(tally: Counter[str]) -> int:
    return sum(tally[how.name] for how in SIGNALS)


def disturb(case: str, place: Path, took: float, chance: random.Random, most: int,
            tally: Counter[str]) -> Path:
    """Start a run, hit it, resume it, hit it again ... until it is through or was hit so often."""
    flags, log, hits = flags_of(case, place), place.with_suffix(".log"), 0
    done: dict[int, object] = {}
    while True:
        runs = [] if case == "search" else folders(place)
        assert len(runs) <= 1, runs
        if case == "changed" and runs and (runs[0] / "checkpoint.pt").exists():
            refuse_changed(runs[0], log)
            tally["changed data refused"] += 1
        if case == "search":
            before, done = done, trials_in(place)
            assert before.items() <= done.items(), "a trial was lost"
        log.unlink(missing_ok=True)
        child = start(["--resume", str(runs[0])] if runs else flags, log)
        if hits < most:
            how = SIGNALS[hits_in(tally) % len(SIGNALS)]
            # Most while it trains and saves; of a fold nothing is left unless it got to its end.
            first, last = (0.0, 1.1) if chance.random() < 0.3 or case == "folds" else (0.2, 0.6)
            instant = chance.uniform(first, last) * took
            while age(child) < instant:
                time.sleep(0.001)
            os.kill(child, how)
        code = end(child)
        if code == 0:
            return place if case == "search" else folders(place)[0]
        said = log.read_text("utf-8")
        expected = -how if how == signal.SIGKILL else 130
        assert hits < most and code == expected, (case, how, code, said[-3000:])
        hits += 1
        tally[how.name] += 1
        status = [json.loads(path.read_text("utf-8"))["status"]
                  for path in place.glob("*/metrics.json")]
        tally[f"left {status[0]}" if status else "no folder yet"] += 1
        if code == 130 and "Task " in said and case != "search":  # else nothing was written yet
            assert status == ["interrupted"], (status, said[-3000:])


def torture(kills: int, cases: list[str], seed: int, each: int) -> Counter[str]:
    """Until so many kills have been survived; raises at the first difference."""
    tally: Counter[str] = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(scratch))
        calm = {case: undisturbed(case, Path(scratch)) for case in cases}
        while (before := hits_in(tally)) < kills:
            case = cases[tally["runs"] % len(cases)]
            place = Path(scratch) / f"{case}-{tally['runs']}"
            place.mkdir()
            run = disturb(case, place, calm[case][1], chance, min(each, kills - before), tally)
            found = search_outcome(place) if case == "search" else outcome(run)
            for what, expected in calm[case][0].items():
                assert found[what] == expected, (
                    f"{what} of {case} differ after {hits_in(tally) - before} kills")
            left = {path.name for path in run.iterdir()
                    if path.name.startswith(".") or "before" in path.name}
            assert left <= {".lock"}, left
            tally["runs"] += 1
            print(f"{hits_in(tally):4} kills survived, {tally['runs']} runs equal", flush=True)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=12, help="most kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    begun = time.monotonic()
    print(dict(torture(args.kills, args.cases, args.seed, args.each)),
          f"{time.monotonic() - begun:.0f} s")
