"""Bad input: for each kind the exit code, one line that says what, where and what to try, and
nothing written or lost.

The tables are the documentation: what is wrong, in flags or in an empty folder, and the message.
"""
import functools
import gzip
import hashlib
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import dld
from PIL import Image

MNIST = "--task mnist --data offline --device cpu"

FLAGS = [
    ("--task cifer10", "sentiment, images, text, all (did you mean cifar10?)"),
    ("--task ''", "--task : choose from cifar10"),
    ("--taks mnist", "unknown argument --taks (did you mean --task?)"),
    ("--epoch 3", "unknown argument --epoch (did you mean --epochs?)"),
    ("mnist", "unknown argument mnist"),
    ("--task", "argument --task: expected one argument"),
    ("--epochs many", "invalid int value: 'many'"),
    ("--epochs 1.5", "invalid int value: '1.5'"),
    ("--epochs 0", "--epochs 0: must be at least 1"),
    (f"--epochs {10**30}", "must be at least 1 and at most 1000000"),
    ("--batch-size 0", "--batch-size 0: must be at least 1"),
    ("--lr nan", "--lr takes a finite float"),
    ("--lr inf", "--lr takes a finite float"),
    ("--lr -1", "--lr -1.0: must be at least"),
    ("--seed -1", "--seed -1: must be at least 0"),
    (f"--seed {2**64}", "--seed 18446744073709551616: must be at least 0"),
    ("--limit -5", "--limit -5: must be at least 0"),
    ("--val-fraction 0.9", "at most 0.5"),
    ("--val-fraction 0", "--val-fraction 0.0: must be at least 0.001"),
    ("--dropout 1", "--dropout 1.0: must be at least 0 and at most 0.95"),
    ("--label-smoothing 1", "at most 0.99"),
    ("--width 1", "--width 1: must be at least 4"),
    ("--width 100000", "at most 8192"),
    ("--patience -1", "--patience -1: must be at least 0"),
    ("--vocabulary 0", "--vocabulary 0: must be at least 1"),
    ("--max-tokens 1", "--max-tokens 1: must be at least 2"),
    ("--schedule cosin", "(did you mean cosine?)"),
    ("--optimizer adam", "choose from adamw, muon (did you mean adamw?)"),
    ("--precision fp8", "choose from auto, fp32, bf16, fp16"),
    ("--data fake", "choose from auto, real, offline"),
    ("--report short", "--report short: choose from full, minimal"),
    ("--device tpu", "--device tpu: choose from auto, cpu, cuda, mps"),
    ("--device cuda", "this PyTorch sees no CUDA device; use --device auto or cpu"),
    ("--device mps", "no Apple GPU"),
    ("--model resnet19", "did you mean resnet1"),
    ("--model ''", "--model : unknown here"),
    ("--task sentiment --model resnet18", "Known: lstm"),
    ("--task all --model resnet18", "Known: lstm"),
    ("--budget 5", "--budget 5: give a time with its unit, as 90s, 5m or 1h"),
    ("--budget 0s", "--budget 0s: give a time"),
    (f"{MNIST} --limit 200 --budget 0.1s", "--budget 0.1s: mnist with mlp needs about"),
    ("--checkpoint-every soon", "--checkpoint-every soon: give a time with its unit"),
    ("--folds 1", "--folds 1: cross-validation needs at least 2 folds"),
    ("--folds -2", "--folds -2: must be at least 0"),
    ("--folds 3 --budget 3m", "--folds and --budget cannot be combined"),
    ("--folds 3 --patience 3", "--folds and --patience cannot be combined"),
    (f"{MNIST} --limit 20 --folds 99", "--folds 99: there are only 40 training samples"),
    (f"{MNIST} --limit 1", "--limit 1 leaves no training sample of"),
    (f"{MNIST} --batch-size 1", "batch norm needs at least 2 samples"),
    ("--mirror 'my disk'", "--mirror my disk: give an address that begins with http"),
    ("--mirror ftp://x/y", "--mirror ftp://x/y: give an address"),
    ("--evaluate --resume x", "--evaluate and --resume cannot be combined"),
    ("--predict x.png", "--predict needs --run RUN"),
    ("--run outputs/x", "--run needs --predict or --evaluate or --serve or --export"),
    ("--evaluate --run x y", "--evaluate takes one --run, not 2"),
    ("--serve", "--serve needs --run RUN"),
    ("--serve --port 0 --run nowhere", "nowhere: no such folder"),
    ("--serve --run a/x b/x", "a folder name of its own"),
    ("--port 80", "--port needs --serve"),
    ("--serve --run . --port 65536", "--port 65536: must be at least 0 and at most"),
    ("--serve --run . --host 1.2.3.4", "--host 1.2.3.4 --port 8000: cannot"),
    ("--serve --run . --lr 1", "--serve takes its settings from the run"),
    ("--predict x.png --run nowhere", "nowhere: no such folder"),
    ("--predict x.png --run .", "model.pt is not there; is"),
    ("--compare x", "--compare needs two or more different run folders"),
    ("--compare . ./", "--compare needs two or more different run folders"),
    ("--compare x y", "--compare x: no such folder"),
    (f"{MNIST} --init nowhere", "--init nowhere: nowhere/model.pt"),
    ("--init x --pretrained", "--init and --pretrained cannot be combined"),
    ("--data offline --pretrained", "no weights of fast are published"),
    ("--output x.csv", "--output needs --predict"),
    ("--task images", "--task images needs your own data: give --data FOLDER"),
    ("--task text --data auto", "give --data FOLDER or --data FILE.csv"),
    ("--data my/pictures", "your own data needs --task images or --task text"),
    ("--class-weights yes", "--class-weights yes: choose from none, balanced"),
    ("--resume nowhere", "--resume nowhere: no such folder"),
    ("--config nowhere.json", "cannot read nowhere.json"),
]

CONFIGS = [
    ("settings cut short", "{", "bad.json is not valid JSON"),
    ("settings that are none", "[]", "expected a JSON object"),
    ("an unknown setting", '{"epoch": 3}', "unknown setting 'epoch' (did you mean epochs?)"),
    ("a word for a number", '{"epochs": "ten"}', "--epochs takes a finite int, got 'ten'"),
    ("a number for a word", '{"task": 3}', "--task 3: choose from"),
    ("nothing for a number", '{"lr": null}', "--lr takes a finite float, got None"),
    ("a list for a model", '{"model": ["mlp"]}', "--model takes a finite str, got ['mlp']"),
    ("settings in other letters", b"\xff\xfe{\x00}\x00", "bad.json is not valid JSON"),
]


# -- harm: functions of the folder in which something is to be wrong -------------------------------


def nothing(place):
    """For rows in which files are right, and flags are not."""


def all_of(*harms):
    return lambda place: [harm(place) for harm in harms]


def write(name, new):
    """A file, and folders around it: these bytes or words, or what a function makes of its own."""
    def harm(place):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = new(path.read_bytes()) if callable(new) else new
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return harm


def lose(name):
    return lambda place: (place / name).unlink()


def folder(name):
    """A folder of this name, perhaps where a file was."""
    def harm(place):
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir(parents=True)
    return harm


def swap(one, other):
    def harm(place):
        (place / one).rename(place / "between")
        (place / other).rename(place / one)
        (place / "between").rename(place / other)
    return harm


def pictures(*names):
    """Small pictures with these names."""
    def harm(place):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(place / name)
    return harm


def flip(blob):
    """One bit in the middle."""
    at = len(blob) // 2
    return blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1:]


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch boom",))


# -- the official data sets ------------------------------------------------------------------------


def batch(**changes):
    """A CIFAR-10 batch that differs from a right one in this."""
    right = {b"data": np.zeros((20, 3072), np.uint8), b"labels": [i % 10 for i in range(20)]}
    return pickle.dumps({**right, **{key.encode(): value for key, value in changes.items()}}, 2)


def idx(*shape):
    """One of MNIST's files."""
    head = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
    return head + (np.arange(math.prod(shape)) % 10).astype(np.uint8).tobytes()


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
OFFICIAL = {  # a small data set of each, in a folder of this name
    "cifar10": ("cifar-10-batches-py", {name: batch() for name in BATCHES}),
    "mnist": ("MNIST/raw", {
        IMAGES: idx(40, 28, 28), LABELS: idx(40), "t10k-images-idx3-ubyte": idx(20, 28, 28),
        "t10k-labels-idx1-ubyte": idx(20)}),
    "sentiment": ("aclImdb", {f"{part}/{sense}/{i}.txt": f"a {sense} text, {i}" for i in range(3)
                              for part in ("train", "test") for sense in ("pos", "neg")}),
}


def official(task, harm):
    """One of these with something wrong in it."""
    name, files = OFFICIAL[task]

    def arrange(place, runs):
        for each, content in files.items():
            write(each, content)(place / "data" / name)
        harm(place / "data" / name)
    return arrange


SECOND = "data_batch_2"
DAMAGED = f"{SECOND} is damaged"
DATA = [
    ("cifar10", "a batch is missing", lose(SECOND), "cannot read data/cifar-10-batches"),
    ("cifar10", "a batch is a folder", folder(SECOND), "Is a directory"),
    ("cifar10", "a batch is empty", write(SECOND, ""), DAMAGED),
    ("cifar10", "a batch is cut short", write(SECOND, lambda blob: blob[:1000]), DAMAGED),
    ("cifar10", "a batch is a web page", write(SECOND, "<html>not found"), DAMAGED),
    ("cifar10", "a batch wants to run code", write(SECOND, pickle.dumps(Bomb())),
     f"it asks for {os.system.__module__}.system"),
    ("cifar10", "pictures of another size",
     write(SECOND, batch(data=np.zeros((20, 3000), np.uint8))), DAMAGED),
    ("cifar10", "more labels than pictures", write(SECOND, batch(labels=[1] * 21)), DAMAGED),
    ("cifar10", "labels beyond the classes", write(SECOND, batch(labels=[12] * 20)),
     "labels outside 0-9"),
    ("cifar10", "labels that are words", write(SECOND, batch(labels=["cat"] * 20)), DAMAGED),
    ("cifar10", "no labels", write(SECOND, pickle.dumps({b"data": b""})), DAMAGED),
    ("cifar10", "swapped batches", write(SECOND, batch(batch_label=b"testing batch 1 of 1")),
     "says that it is testing batch 1 of 1: were files swapped?"),
    ("cifar10", "a class without a sample",
     all_of(*(write(name, batch(labels=[i % 9 for i in range(20)])) for name in BATCHES)),
     "has no training sample of truck"),
    ("mnist", "a file is empty", write(IMAGES, ""), f"{IMAGES} is damaged"),
    ("mnist", "a file is cut short", write(IMAGES, lambda blob: blob[:-9]), f"{IMAGES} is damaged"),
    ("mnist", "a file is too long", write(IMAGES, lambda blob: blob + b"x"),
     f"{IMAGES} is damaged"),
    ("mnist", "a file is a web page", write(IMAGES, "<html>"), "no IDX header"),
    ("mnist", "a file is still packed", write(IMAGES, gzip.compress(b"x")), "no IDX header"),
    ("mnist", "pictures for labels", swap(IMAGES, LABELS), "its labels do not fit together"),
    ("mnist", "labels of the other part", swap(LABELS, "t10k-labels-idx1-ubyte"),
     "its labels do not fit together"),
    ("mnist", "both parts swapped", all_of(swap(LABELS, "t10k-labels-idx1-ubyte"),
                                           swap(IMAGES, "t10k-images-idx3-ubyte")),
     "files swapped?"),
    ("mnist", "labels beyond the classes", write(LABELS, idx(40)[:8] + bytes([77] * 40)),
     "its labels do not fit together"),
    ("mnist", "a header of giant sizes", write(IMAGES, bytes([0, 0, 8, 3]) + b"\xff" * 12),
     f"{IMAGES} is damaged"),
    ("mnist", "packed and broken", all_of(lose(IMAGES), write(f"{IMAGES}.gz", "no")),
     "damaged (md5 differs"),
    ("sentiment", "no folder of one class", lambda place: shutil.rmtree(place / "train" / "neg"),
     "cannot read data/aclImdb/train/neg: No such file"),
    ("sentiment", "no text of one class", all_of(*(lose(f"test/pos/{i}.txt") for i in range(3))),
     "holds no .txt file"),
    ("sentiment", "a folder for a text", folder("train/pos/x.txt"),
     "cannot read data/aclImdb/train/pos/x.txt"),
]
PACKED = [
    ("cifar10", "cifar-10-python.tar.gz", b"\x1f\x8b1", "damaged (md5 differs"),
    ("cifar10", "cifar-10-batches-py", "", "cifar-10-python.tar.gz"),  # a file, not a folder
    ("sentiment", "aclImdb_v1.tar.gz", "<html>", "damaged (md5 differs"),
]

# -- the user's own data ---------------------------------------------------------------------------

OWN = [
    ("images", "a folder that is not there", "own", nothing, "--data own: no such folder"),
    ("images", "a packed folder", "own.zip", write("own.zip", "PK"),
     "--data own.zip: a file; unpack it"),
    ("images", "a folder with nothing in it", "own", folder("own"),
     "no pictures (.jpg, .jpeg, .jfif, .png ...) in folders; expected one folder a class"),
    ("images", "pictures without classes", "own", pictures("own/a.png", "own/b.png"),
     "but no folder for each class"),
    ("images", "pictures of one class", "own", pictures("own/cat/a.png", "own/cat/b.png"),
     "has only the class cat"),
    ("images", "pictures that are none", "own",
     all_of(write("own/a/x.png", "no"), write("own/b/y.png", "no")),
     "none of the pictures can be read, for example"),
    ("text", "a table that is not there", "own.csv", nothing,
     "--data own.csv: no such file or folder"),
    ("text", "an empty table", "own.csv", write("own.csv", ""), "own.csv holds no rows"),
    ("text", "a table with a head alone", "own.csv", write("own.csv", "text,label\n"),
     "own.csv holds no rows"),
    ("text", "a table of one column", "own.csv", write("own.csv", "text\na\nb\n"),
     "name it with --label-column"),
    ("text", "a table of one class", "own.csv", write("own.csv", "text,label\na,1\nb,1\n"),
     "has only the class 1"),
    ("text", "a table without classes", "own.csv", write("own.csv", "text,label\na,\nb,\n"),
     "none of the 2 samples can be used; the first: no class in the column label"),
    ("text", "JSON lines that are none", "own.jsonl", write("own.jsonl", "a\nb\n"),
     "own.jsonl holds no rows"),
]
COLUMNS = [
    ("".join(f"a,{i}\n" for i in range(99)), "",
     "the column label has 99 different values in 99 rows; is it"),
    ("a,1\nb,2\n", "--label-column labl", "no such column (did you mean label?)"),
]

# -- finished runs ---------------------------------------------------------------------------------


def change(name, **values):
    """A model.pt or checkpoint.pt with other contents."""
    return lambda run: torch.save(
        {**torch.load(run / name, weights_only=True), **values}, run / name)


def edit(name, **values):
    """A config.json or metrics.json with other contents."""
    return write(name, lambda blob: json.dumps({**json.loads(blob), **values}))


def other_model(run):
    meta = torch.load(run / "model.pt", weights_only=True)["meta"]
    change("model.pt", meta={**meta, "width": 64})(run)


def out_of_patience(run):
    best = torch.load(run / "checkpoint.pt", weights_only=True)["best"]
    change("checkpoint.pt", best={**best, "epoch": 1})(run)


def giant():
    """A PNG of 100,000 x 100,000 pixels in some bytes."""
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)),
                       (b"IDAT", b""), (b"IEND", b"")):
        crc = zlib.crc32(kind + body)
        whole += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    return whole


LOOK, MORE = "--predict picture.png --run run", "--resume run --epochs 9"
X_PNG, NO_PICTURE = "--predict run/x.png --run run", "not a picture that can be read"
OTHER, UNFIT = "not made by this version", "do not fit together"
ASKED = [  # of a run in which all is right
    ("cifar10", "--predict gone.png --run run", "no such file"),
    ("cifar10", "--predict run/log.txt --run run", "not a picture"),
    ("cifar10", f"{LOOK} --explain", "--explain needs --output FILE.csv"),
    ("cifar10", f"{LOOK} --output no/such/place.csv", "--output no/such/place.csv: no such folder"),
    ("cifar10", f"{LOOK} --output run", "--output run: a folder; name a file"),
    ("sentiment", "--predict run/history.csv --run run --text-column epich",
     "no such column (did you mean epoch"),
    ("sentiment", "--predict run/reliability.png --run run", "not a text file"),
    ("sentiment", "--predict gone.txt --run run", "no such file"),
    ("sentiment", "--predict x --run run --lr 1", "leave out --lr"),
    ("sentiment", f"{MNIST} --init run",
     "--init run: its network reads texts, and this task has pictures"),
    ("mnist", f"{MNIST} --init run --width 64", "its width is 128; leave out --width"),
    ("mnist", f"{MNIST} --init run --model fast", "its model is mlp; leave out --model"),
    ("mnist", "--data offline --device cpu --init run", "trained on pictures with 1 channel"),
    ("mnist", "--evaluate --run run --seed 1", "leave out --seed"),
    ("mnist", "--compare run . --seed 1", "leave out --seed"),
    ("mnist", "--resume run/log.txt", "--resume run/log.txt: no such folder"),
    ("mnist", "--resume run", "has finished its 2 epochs; give more --epochs"),
    ("mnist", "--resume run --epochs 1", "give more --epochs"),
    ("mnist", "--resume run --lr 1", "--lr would change the past"),
]
RUNS = [
    ("cifar10", "no model", lose("model.pt"), LOOK, "model.pt is not there"),
    ("cifar10", "a model is a folder", folder("model.pt"), LOOK,
     "model.pt is damaged or not made by this program"),
    ("cifar10", "an empty model", write("model.pt", ""), LOOK, "model.pt is damaged"),
    ("cifar10", "a model cut short", write("model.pt", lambda blob: blob[:9999]), LOOK,
     "model.pt is damaged"),
    ("cifar10", "one bit of a model differs", write("model.pt", flip), LOOK, "model.pt is damaged"),
    ("cifar10", "a text for a model", write("model.pt", "weights"), LOOK, "model.pt is damaged"),
    ("cifar10", "a model wants to run code", lambda run: torch.save(
        {"format": dld.MODEL_FORMAT, "meta": Bomb(), "weights": {}}, run / "model.pt"), LOOK,
     "model.pt is damaged"),
    ("cifar10", "a list", lambda run: torch.save([1], run / "model.pt"), LOOK, OTHER),
    ("cifar10", "a model of a newer version", change("model.pt", format=99), LOOK,
     "made by a newer version of this program (format 99; this one reads "
     f"{dld.MODEL_FORMAT})"),
    ("cifar10", "a model of an older version", change("model.pt", format=1), LOOK, OTHER),
    ("cifar10", "weights that do not fit", other_model, LOOK, UNFIT),
    ("cifar10", "a model without its description", change("model.pt", meta={}), LOOK, UNFIT),
    ("cifar10", "a model of another kind", change("model.pt", meta={"kind": "sound"}), LOOK, UNFIT),
    ("cifar10", "a checkpoint for a model",
     lambda run: shutil.copy(run / "checkpoint.pt", run / "model.pt"), LOOK,
     "made by a newer version"),
    ("cifar10", "a folder without pictures", folder("none"), "--predict run/none --run run",
     "run/none: nothing to predict in there; this run's model reads pictures"),
    ("cifar10", "half a picture",
     lambda run: write("x.png", (run / "gradcam.png").read_bytes()[:5000])(run), X_PNG, NO_PICTURE),
    ("cifar10", "an empty picture", write("x.png", ""), X_PNG, f"{NO_PICTURE}; this run's model"),
    ("cifar10", "a picture of giant size", write("x.png", giant()), X_PNG, NO_PICTURE),
    ("sentiment", "a folder without texts", folder("none"), "--predict run/none --run run",
     "run/none: nothing to predict in there; this run's model reads texts"),
    ("sentiment", "letters of two bytes", write("x.txt", "good".encode("utf-16")),
     "--predict run/x.txt --run run", "not a text file"),
    ("sentiment", "a file without a text", write("x.txt", "\n \n"), "--predict run/x.txt --run run",
     "nothing to predict in there"),
    ("mnist", "an unfinished run to compare", edit("metrics.json", status="running"),
     "--compare run .", "this run has not finished"),
    ("mnist", "a run to compare without predictions", lose("predictions.csv"), "--compare run .",
     "not a run folder of this version"),
    ("mnist", "no patience", out_of_patience, f"{MORE} --patience 1",
     "ended for want of patience; give --patience 0"),
    ("mnist", "no checkpoint", lose("checkpoint.pt"), MORE, "checkpoint.pt is not there"),
    ("mnist", "a checkpoint cut short", write("checkpoint.pt", "PK" * 999), MORE,
     "checkpoint.pt is damaged"),
    ("mnist", "one bit of a checkpoint differs", write("checkpoint.pt", flip), MORE, "is damaged"),
    ("mnist", "a checkpoint of a newer version", change("checkpoint.pt", format=99), MORE,
     "made by a newer version"),
    ("mnist", "a checkpoint of another network", edit("config.json", width=64), MORE,
     "does not fit its config.json"),
    ("mnist", "a checkpoint of another task", edit("config.json", task="sentiment", model="lstm"),
     MORE, "does not fit its config.json"),
    ("mnist", "settings cut short", write("config.json", "{"), MORE, "not valid JSON"),
    ("mnist", "unknown settings", edit("config.json", flavour="red"), MORE,
     "unknown setting 'flavour'"),
    ("mnist", "numbers cut short", write("metrics.json", "{"), MORE, "not valid JSON"),
]


def run_with(task, harm):
    """A copy of a finished run with something wrong in it."""
    def arrange(place, runs):
        shutil.copytree(runs[task], place / "run")
        pictures("picture.png")(place)
        harm(place / "run")
    return arrange


def alone(harm):
    return lambda place, runs: harm(place)


REAL, CPU = "--data-dir data --data real --device cpu", "--device cpu"
TABLE = [  # what it is, how it is arranged, the flags, the exit code, the message
    *((flags, alone(nothing), flags, 2, message) for flags, message in FLAGS),
    *((f"--config: {name}", alone(write("bad.json", text)), "--config bad.json", 2, message)
      for name, text, message in CONFIGS),
    *((f"{task}: {name}", official(task, harm), f"--task {task} {REAL}", 3, message)
      for task, name, harm, message in DATA),
    *((f"{task}: {name}", alone(write(f"data/{name}", content)), f"--task {task} {REAL}", 3,
       message) for task, name, content, message in PACKED),
    *((f"{task}: {name}", alone(harm), f"--task {task} --data {data} {CPU}", 3, message)
      for task, name, data, harm, message in OWN),
    *((message, alone(write("own.csv", f"text,label\n{rows}")),
       f"--task text --data own.csv {CPU} {flags}", 2, message)
      for rows, flags, message in COLUMNS),
    *((f"{task} run: {flags}", run_with(task, nothing), flags, 2, message)
      for task, flags, message in ASKED),
    *((f"{task} run: {name}", run_with(task, harm), flags, 2, message)
      for task, name, harm, flags, message in RUNS),
    ("results into a file", alone(write("file", "")), f"{MNIST} --output-dir file", 1,
     "cannot write"),
    ("results below a file", alone(write("file", "")), f"{MNIST} --output-dir file/x/y", 1,
     "cannot write into"),
]


def everything(place):
    """Each file with its contents; locks and an empty cache may stay behind."""
    return {str(path.relative_to(place)): hashlib.sha256(
        path.read_bytes()).hexdigest() if path.is_file() else "" for path in place.rglob("*")
        if path.suffix != ".lock" and path.name not in (".lock", "cache")}


@pytest.mark.parametrize(("arrange", "flags", "code", "message"),
                         [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_bad_input_is_one_clear_line(arrange, flags, code, message, request, tmp_path, monkeypatch,
                                     capsys):
    flags = shlex.split(flags)
    for package in ("fastapi", "uvicorn") if flags[0] == "--serve" and len(flags) > 1 else ():
        pytest.importorskip(package)
    runs = request.getfixturevalue("finished") if any("run" in flag[:4] for flag in flags) else {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for archive in (*dld.MNIST, dld.CIFAR10, dld.IMDB):
        monkeypatch.setitem(archive.__dict__, "mirrors", ("http://127.0.0.1:9/refused",))
    arrange(tmp_path, runs)
    before = everything(tmp_path)
    assert dld.main(flags) == code
    out, said = capsys.readouterr()
    assert message in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert "Traceback" not in said + out and "--debug" not in said
    assert everything(tmp_path) == before, "something was written or lost"


def test_a_full_disk_is_said_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000}))
    assert dld.main([*MNIST.split(), "--output-dir", str(tmp_path / "out")]) == 1
    assert re.search(r"has 5 MB left, a run needs \d+ MB; make room",
                     capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# -- what nobody thought of: drawn at random, the same each time -----------------------------------

WORDS = ["", "-", "--", "0", "1e9", "mnist", "auto", "90s", "\0", "../x", "é" * 9, "%s", "nan",
         "-inf", "1.5", "-1", str(10**30), "\u2028", "\ud800", "--lr", "{}"]
VALUES = [*WORDS, None, True, False, 0, -1, 7, 10**30, 0.0, 0.5, -1.5, math.nan, math.inf, [], [1],
          {}]


def test_no_flags_end_in_a_traceback(tmp_path, monkeypatch, capsys):
    """On a task that is not there, so that nothing is trained even if all are right."""
    monkeypatch.chdir(tmp_path)
    known = [option for action in dld.build_parser()._actions for option in action.option_strings
             if option not in ("-h", "--help", "--version", "--debug")]
    draw = random.Random(0)
    for _ in range(300):
        flags = [word for _ in range(draw.randrange(5)) for word in (
            draw.choice(known), draw.choice(WORDS))]
        assert dld.main([*flags, "--task", "no such task"]) == 2, flags
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "--debug" not in said, (flags, said)


def test_no_settings_of_a_file_end_in_a_traceback():
    draw, right = random.Random(0), 0
    for _ in range(500):
        values = {name: draw.choice(VALUES)
                  for name in draw.sample(dld.SETTINGS, draw.randrange(4))}
        try:
            config = dld.resolve_config({}, values)
        except dld.Failure as problem:
            assert str(problem), values
        else:
            right += 1
            assert type(config.epochs) is int and config.lr > 0
    assert 0 < right < 500


@pytest.mark.parametrize("name", ["model.pt", "config.json", "idx", SECOND])
def test_no_damage_to_a_file_goes_unnoticed_or_ends_in_a_traceback(name, finished, tmp_path):
    """Either it is refused, or what comes out is what went in, or is valid all the same."""
    official("cifar10", nothing)(tmp_path, finished)
    write("idx", idx(4, 5))(tmp_path)
    for each in ("model.pt", "config.json"):
        shutil.copy(finished["mnist"] / each, tmp_path)
    path = tmp_path / ("data/cifar-10-batches-py" if name == SECOND else "") / name
    read = {"model.pt": dld.load_file, "idx": dld.read_idx,
            "config.json": lambda path: dld.resolve_config({}, dld.read_config(path)),
            SECOND: lambda path: dld.read_cifar10(
                dld.Config(data_dir=str(tmp_path / "data")))}[name]
    blob, draw, refused = path.read_bytes(), random.Random(0), 0
    right = read(path)
    for _ in range(60):
        at, some = draw.randrange(len(blob)), draw.randbytes(draw.randrange(7))
        path.write_bytes(draw.choice((
            blob[:at] + bytes([blob[at] ^ 16]) + blob[at + 1:], blob[:at], blob[:at] + some
            + blob[at:], blob[:at] + some + blob[at + len(some):])))
        try:
            found = read(path)
        except dld.Failure as problem:
            refused += 1
            assert name in str(problem) or name == "config.json"
        else:
            for key, value in right["weights"].items() if name == "model.pt" else ():
                assert torch.equal(found["weights"][key], value)
    assert refused > 10
