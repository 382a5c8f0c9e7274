"""Bad input: for each kind the exit code, one line that says what, where and what to try, and nothing written or lost.

The table is the documentation: a name, what is arranged in an empty folder, the flags, the exit code, the message.
"""
import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import dld
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import write_cifar10, write_imdb, write_mnist

OFFLINE = ["--data", "offline", "--device", "cpu"]
HERE = ["--data-dir", "data", "--data", "real", "--device", "cpu"]


def nothing(place, runs):
    """For rows that need no files."""


def write(name, content):
    """A row's only file."""
    def arrange(place, runs):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return arrange


FLAGS = [
    ("unknown task", ["--task", "cifer10"], "sentiment, images, text, all (did you mean cifar10?)"),
    ("empty task", ["--task", ""], "--task : choose from cifar10"),
    ("unknown flag", ["--taks", "mnist"], "unknown argument --taks (did you mean --task?)"),
    ("shortened flag", ["--epoch", "3"], "unknown argument --epoch (did you mean --epochs?)"),
    ("no flag at all", ["mnist"], "unknown argument mnist"),
    ("flag without its value", ["--task"], "argument --task: expected one argument"),
    ("word for a number", ["--epochs", "many"], "invalid int value: 'many'"),
    ("fraction for a whole number", ["--epochs", "1.5"], "invalid int value: '1.5'"),
    ("no epochs", ["--epochs", "0"], "--epochs 0: must be at least 1"),
    ("endless epochs", ["--epochs", str(10**30)], "must be at least 1 and at most 1000000"),
    ("no batch", ["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    ("not a number", ["--lr", "nan"], "--lr takes a finite float"),
    ("endless rate", ["--lr", "inf"], "--lr takes a finite float"),
    ("negative rate", ["--lr", "-1"], "--lr -1.0: must be at least"),
    ("negative seed", ["--seed", "-1"], "--seed -1: must be at least 0"),
    ("seed beyond all generators", ["--seed", str(2**64)], "--seed 18446744073709551616: must be at least 0"),
    ("negative limit", ["--limit", "-5"], "--limit -5: must be at least 0"),
    ("all for validation", ["--val-fraction", "0.9"], "at most 0.5"),
    ("nothing for validation", ["--val-fraction", "0"], "--val-fraction 0.0: must be at least 0.001"),
    ("everything dropped out", ["--dropout", "1"], "--dropout 1.0: must be at least 0 and at most 0.95"),
    ("targets all alike", ["--label-smoothing", "1"], "at most 0.99"),
    ("a network without width", ["--width", "1"], "--width 1: must be at least 4"),
    ("a network too wide", ["--width", "100000"], "at most 8192"),
    ("negative patience", ["--patience", "-1"], "--patience -1: must be at least 0"),
    ("no vocabulary", ["--vocabulary", "0"], "--vocabulary 0: must be at least 1"),
    ("texts without words", ["--max-tokens", "1"], "--max-tokens 1: must be at least 2"),
    ("unknown schedule", ["--schedule", "cosin"], "(did you mean cosine?)"),
    ("unknown optimizer", ["--optimizer", "adam"], "choose from adamw, muon (did you mean adamw?)"),
    ("unknown precision", ["--precision", "fp8"], "choose from auto, fp32, bf16, fp16"),
    ("unknown data", ["--data", "fake"], "choose from auto, real, offline"),
    ("unknown report", ["--report", "short"], "--report short: choose from full, minimal"),
    ("unknown device", ["--device", "tpu"], "--device tpu: choose from auto, cpu, cuda, mps"),
    ("a GPU that is not there", ["--device", "cuda"], "this PyTorch sees no CUDA device; use --device auto or cpu"),
    ("an Apple GPU that is not there", ["--device", "mps"], "no Apple GPU"),
    ("unknown model", ["--model", "resnet19"], "did you mean resnet1"),
    ("empty model", ["--model", ""], "--model : unknown here"),
    ("model of another task", ["--task", "sentiment", "--model", "resnet18"], "Known: lstm"),
    ("model that not all tasks have", ["--task", "all", "--model", "resnet18"], "Known: lstm"),
    ("budget without unit", ["--budget", "5"], "--budget 5: give a time with its unit, as 90s, 5m or 1h"),
    ("budget of nothing", ["--budget", "0s"], "--budget 0s: give a time"),
    ("a budget that buys nothing", ["--task", "mnist", *OFFLINE, "--limit", "200", "--budget", "1s"],
     "--budget 1s: mnist with mlp needs about"),
    ("checkpoints at no time", ["--checkpoint-every", "soon"], "--checkpoint-every soon: give a time with its unit"),
    ("one fold", ["--folds", "1"], "--folds 1: cross-validation needs at least 2 folds"),
    ("negative folds", ["--folds", "-2"], "--folds -2: must be at least 0"),
    ("folds in a budget", ["--folds", "3", "--budget", "3m"], "--folds and --budget cannot be combined"),
    ("folds with patience", ["--folds", "3", "--patience", "3"], "--folds and --patience cannot be combined"),
    ("more folds than samples", ["--task", "mnist", *OFFLINE, "--limit", "20", "--folds", "99"],
     "--folds 99: there are only 40 training samples"),
    ("one sample", ["--task", "mnist", *OFFLINE, "--limit", "1"], "--limit 1 leaves no training sample of"),
    ("batches of one", ["--task", "mnist", *OFFLINE, "--batch-size", "1"], "batch norm needs at least 2 samples"),
    ("mirror that is no address", ["--mirror", "my disk"], "--mirror my disk: give an address that begins with http"),
    ("mirror of another kind", ["--mirror", "ftp://x/y"], "--mirror ftp://x/y: give an address"),
    ("two jobs", ["--evaluate", "--resume", "x"], "--evaluate and --resume cannot be combined"),
    ("prediction without a run", ["--predict", "x.png"], "--predict needs --run RUN"),
    ("a run without a job", ["--run", "outputs/x"], "--run needs --predict or --evaluate or --serve or --export"),
    ("two runs for one", ["--evaluate", "--run", "x", "y"], "--evaluate takes one --run, not 2"),
    ("a server of nothing", ["--serve"], "--serve needs --run RUN"),
    ("a server of a run that is not there", ["--serve", "--port", "0", "--run", "nowhere"], "nowhere: no such folder"),
    ("a server of two runs of one name", ["--serve", "--run", "a/x", "b/x"], "a folder name of its own"),
    ("a port without a server", ["--port", "80"], "--port needs --serve"),
    ("a port beyond all", ["--serve", "--run", ".", "--port", "65536"], "--port 65536: must be at least 0 and at most"),
    ("a host that is nowhere", ["--serve", "--run", ".", "--host", "1.2.3.4"], "--host 1.2.3.4 --port 8000: cannot"),
    ("settings while serving", ["--serve", "--run", ".", "--lr", "1"], "--serve takes its settings from the run"),
    ("a run that is not there", ["--predict", "x.png", "--run", "nowhere"], "nowhere: no such folder"),
    ("a folder that is no run", ["--predict", "x.png", "--run", "."], "model.pt is not there; is"),
    ("one run to compare", ["--compare", "x"], "--compare needs two or more different run folders"),
    ("a run compared with itself", ["--compare", ".", "./"], "--compare needs two or more different run folders"),
    ("runs that are not there", ["--compare", "x", "y"], "--compare x: no such folder"),
    ("weights from nowhere", ["--task", "mnist", *OFFLINE, "--init", "nowhere"], "--init nowhere: nowhere/model.pt"),
    ("weights from two places", ["--init", "x", "--pretrained"], "--init and --pretrained cannot be combined"),
    ("published weights of a network of our own", ["--pretrained", *OFFLINE], "no weights of fast are published"),
    ("a table without predictions", ["--output", "x.csv"], "--output needs --predict"),
    ("own pictures that are not named", ["--task", "images"], "--task images needs your own data: give --data FOLDER"),
    ("own texts that are not named", ["--task", "text", "--data", "auto"], "give --data FOLDER or --data FILE.csv"),
    ("own data for another task", ["--data", "my/pictures"], "your own data needs --task images or --task text"),
    ("classes weighed oddly", ["--class-weights", "yes"], "--class-weights yes: choose from none, balanced"),
    ("resuming nothing", ["--resume", "nowhere"], "--resume nowhere: no such folder"),
    ("settings from nowhere", ["--config", "nowhere.json"], "cannot read nowhere.json"),
]

CONFIGS = [
    ("settings cut short", "{", "bad.json is not valid JSON"),
    ("settings that are none", "[]", "expected a JSON object"),
    ("an unknown setting", '{"epoch": 3}', "unknown setting 'epoch' (did you mean epochs?)"),
    ("a word for a number in settings", '{"epochs": "ten"}', "--epochs takes a finite int, got 'ten'"),
    ("a number for a word in settings", '{"task": 3}', "--task 3: choose from"),
    ("nothing for a number in settings", '{"lr": null}', "--lr takes a finite float, got None"),
    ("a list for a model in settings", '{"model": ["mlp"]}', "--model takes a finite str, got ['mlp']"),
    ("settings in other letters", b"\xff\xfe{\x00}\x00", "bad.json is not valid JSON"),
]


def cifar10(harm):
    """A small CIFAR-10 folder with something wrong in it."""
    def arrange(place, runs):
        folder = place / "data" / "cifar-10-batches-py"
        write_cifar10(folder)
        harm(folder)
    return arrange


def mnist(harm):
    def arrange(place, runs):
        folder = place / "data" / "MNIST" / "raw"
        write_mnist(folder, zipped=False)
        harm(folder)
    return arrange


def imdb(harm):
    def arrange(place, runs):
        write_imdb(place / "data" / "aclImdb")
        harm(place / "data" / "aclImdb")
    return arrange


def batch(**changes):
    """A CIFAR-10 batch that differs from a right one in this."""
    right = {b"data": np.zeros((20, 3072), np.uint8), b"labels": [i % 10 for i in range(20)]}
    return pickle.dumps({**right, **{key.encode(): value for key, value in changes.items()}}, protocol=2)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch boom",))


def swap(folder, one, other):
    blob = (folder / one).read_bytes()
    (folder / one).write_bytes((folder / other).read_bytes())
    (folder / other).write_bytes(blob)


def without_class(folder, lacking=9):
    for path in folder.iterdir():
        labels = [i % lacking for i in range(20)]
        path.write_bytes(batch(labels=labels))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
SECOND = "data_batch_2"
DATA = [
    ("cifar10", "a batch is missing", cifar10(lambda f: (f / SECOND).unlink()), "cannot read data/cifar-10-batches"),
    ("cifar10", "a batch is a folder", cifar10(lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir())),
     "Is a directory"),
    ("cifar10", "a batch is empty", cifar10(lambda f: (f / SECOND).write_bytes(b"")), "data_batch_2 is damaged"),
    ("cifar10", "a batch is cut short",
     cifar10(lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:1000])), "data_batch_2 is damaged"),
    ("cifar10", "a batch is a web page", cifar10(lambda f: (f / SECOND).write_text("<html>not found")),
     "data_batch_2 is damaged"),
    ("cifar10", "a batch wants to run code", cifar10(lambda f: (f / SECOND).write_bytes(pickle.dumps(Bomb()))),
     "it asks for posix.system"),
    ("cifar10", "pictures of another size", cifar10(lambda f: (f / SECOND).write_bytes(
        batch(data=np.zeros((20, 3000), np.uint8)))), "data_batch_2 is damaged"),
    ("cifar10", "more labels than pictures", cifar10(lambda f: (f / SECOND).write_bytes(batch(labels=[1] * 21))),
     "data_batch_2 is damaged"),
    ("cifar10", "labels beyond the classes", cifar10(lambda f: (f / SECOND).write_bytes(batch(labels=[12] * 20))),
     "labels outside 0-9"),
    ("cifar10", "labels that are words", cifar10(lambda f: (f / SECOND).write_bytes(batch(labels=["cat"] * 20))),
     "data_batch_2 is damaged"),
    ("cifar10", "no labels", cifar10(lambda f: (f / SECOND).write_bytes(pickle.dumps({b"data": b""}))),
     "data_batch_2 is damaged"),
    ("cifar10", "swapped batches", cifar10(lambda f: (f / SECOND).write_bytes(
        batch(batch_label=b"testing batch 1 of 1"))), "says that it is testing batch 1 of 1: were files swapped?"),
    ("cifar10", "a class without a sample", cifar10(without_class), "has no training sample of truck"),
    ("cifar10", "the archive is cut short", write("data/cifar-10-python.tar.gz", b"\x1f\x8b1"), "damaged (md5 differs"),
    ("cifar10", "the folder is a file", write("data/cifar-10-batches-py", ""), "cifar-10-python.tar.gz"),
    ("mnist", "a file is empty", mnist(lambda f: (f / IMAGES).write_bytes(b"")), f"{IMAGES} is damaged"),
    ("mnist", "a file is cut short", mnist(lambda f: (f / IMAGES).write_bytes((f / IMAGES).read_bytes()[:-9])),
     f"{IMAGES} is damaged"),
    ("mnist", "a file is too long", mnist(lambda f: (f / IMAGES).write_bytes((f / IMAGES).read_bytes() + b"x")),
     f"{IMAGES} is damaged"),
    ("mnist", "a file is a web page", mnist(lambda f: (f / IMAGES).write_text("<html>")), "no IDX header"),
    ("mnist", "a file is still packed", mnist(lambda f: (f / IMAGES).write_bytes(gzip.compress(b"x"))), "no IDX head"),
    ("mnist", "pictures for labels", mnist(lambda f: swap(f, IMAGES, LABELS)), "its labels do not fit together"),
    ("mnist", "labels of the other part", mnist(lambda f: swap(f, LABELS, "t10k-labels-idx1-ubyte")),
     "its labels do not fit together"),
    ("mnist", "both parts swapped", mnist(lambda f: (swap(f, LABELS, "t10k-labels-idx1-ubyte"),
                                                     swap(f, IMAGES, "t10k-images-idx3-ubyte"))), "files swapped?"),
    ("mnist", "labels beyond the classes", mnist(lambda f: (f / LABELS).write_bytes(
        bytes([0, 0, 8, 1, 0, 0, 0, 40]) + bytes([77] * 40))), "its labels do not fit together"),
    ("mnist", "a header of giant sizes", mnist(lambda f: (f / IMAGES).write_bytes(
        bytes([0, 0, 8, 3]) + b"\xff" * 12)), f"{IMAGES} is damaged"),
    ("mnist", "packed and broken", mnist(lambda f: ((f / IMAGES).unlink(), (f / f"{IMAGES}.gz").write_bytes(b"no"))),
     "damaged (md5 differs"),
    ("sentiment", "no folder of one class", imdb(lambda f: shutil.rmtree(f / "train" / "neg")),
     "cannot read data/aclImdb/train/neg: No such file"),
    ("sentiment", "no text of one class", imdb(lambda f: [p.unlink() for p in (f / "test" / "pos").iterdir()]),
     "holds no .txt file"),
    ("sentiment", "a folder for a text", imdb(lambda f: (f / "train" / "pos" / "x.txt").mkdir()),
     "cannot read data/aclImdb/train/pos/x.txt"),
    ("sentiment", "the archive is a web page", write("data/aclImdb_v1.tar.gz", "<html>"), "damaged (md5 differs"),
]


def pictures(*names):
    """Small pictures with these names."""
    def arrange(place, runs):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(place / name)
    return arrange


OWN = [
    ("a folder of pictures that is not there", "images", "own", nothing, "--data own: no such folder"),
    ("a packed folder", "images", "own.zip", write("own.zip", "PK"), "--data own.zip: a file; unpack it"),
    ("a folder with nothing in it", "images", "own", lambda place, runs: (place / "own").mkdir(),
     "no pictures (.jpg, .jpeg, .jfif, .png ...) in folders; expected one folder a class"),
    ("pictures without classes", "images", "own", pictures("own/a.png", "own/b.png"), "but no folder for each class"),
    ("pictures of one class", "images", "own", pictures("own/cat/a.png", "own/cat/b.png"), "has only the class cat"),
    ("pictures that are none", "images", "own", lambda place, runs: (write("own/a/x.png", "no")(place, runs),
                                                                     write("own/b/y.png", "no")(place, runs)),
     "none of the pictures can be read, for example"),
    ("a table that is not there", "text", "own.csv", nothing, "--data own.csv: no such file or folder"),
    ("an empty table", "text", "own.csv", write("own.csv", ""), "own.csv holds no rows"),
    ("a table with a head alone", "text", "own.csv", write("own.csv", "text,label\n"), "own.csv holds no rows"),
    ("a table of one column", "text", "own.csv", write("own.csv", "text\na\nb\n"), "name it with --label-column"),
    ("a table of one class", "text", "own.csv", write("own.csv", "text,label\na,1\nb,1\n"), "has only the class 1"),
    ("a table without classes", "text", "own.csv", write("own.csv", "text,label\na,\nb,\n"),
     "none of the 2 samples can be used; the first: no class in the column label"),
    ("JSON lines that are none", "text", "own.jsonl", write("own.jsonl", "a\nb\n"), "own.jsonl holds no rows"),
]


def run_with(task, harm):
    """A copy of a finished run with something wrong in it."""
    def arrange(place, runs):
        shutil.copytree(runs[task], place / "run")
        harm(place / "run")
    return arrange


def change(name, **values):
    """A model.pt or checkpoint.pt with other contents."""
    def harm(run):
        torch.save({**torch.load(run / name, weights_only=True), **values}, run / name)
    return harm


def flip(path, place=0.5):
    blob = bytearray(path.read_bytes())
    blob[int(len(blob) * place)] ^= 4
    path.write_bytes(blob)


def bomb(path):
    torch.save({"format": dld.MODEL_FORMAT, "meta": Bomb(), "weights": {}}, path)


def other_model(run):
    saved = torch.load(run / "model.pt", weights_only=True)
    torch.save({**saved, "meta": {**saved["meta"], "width": 64}}, run / "model.pt")


def forge(run, **values):
    config = json.loads((run / "config.json").read_text("utf-8"))
    (run / "config.json").write_text(json.dumps({**config, **values}), "utf-8")


def unfinished(run):
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    (run / "metrics.json").write_text(json.dumps({**metrics, "status": "running"}), "utf-8")


LOOK = ["--predict", "picture.png", "--run", "run"]
MORE = ["--resume", "run", "--epochs", "9"]
RUNS = [
    ("the model is not there", "cifar10", lambda r: (r / "model.pt").unlink(), LOOK, "model.pt is not there"),
    ("the model is a folder", "cifar10", lambda r: ((r / "model.pt").unlink(), (r / "model.pt").mkdir()), LOOK,
     "model.pt is damaged or not made by this program"),
    ("the model is empty", "cifar10", lambda r: (r / "model.pt").write_bytes(b""), LOOK, "model.pt is damaged"),
    ("the model is cut short", "cifar10", lambda r: (r / "model.pt").write_bytes((r / "model.pt").read_bytes()[:9999]),
     LOOK, "model.pt is damaged"),
    ("one bit of the model differs", "cifar10", lambda r: flip(r / "model.pt"), LOOK, "model.pt is damaged"),
    ("the model is a text", "cifar10", lambda r: (r / "model.pt").write_text("weights"), LOOK, "model.pt is damaged"),
    ("the model wants to run code", "cifar10", lambda r: bomb(r / "model.pt"), LOOK, "model.pt is damaged"),
    ("the model is a list", "cifar10", lambda r: torch.save([1], r / "model.pt"), LOOK, "not made by this version"),
    ("the model is of a newer version", "cifar10", change("model.pt", format=99), LOOK,
     "made by a newer version of this program (format 99; this one reads 5)"),
    ("the model is of an older version", "cifar10", change("model.pt", format=1), LOOK, "not made by this version"),
    ("weights that do not fit", "cifar10", other_model, LOOK, "do not fit together"),
    ("a model without its description", "cifar10", change("model.pt", meta={}), LOOK, "do not fit together"),
    ("a description of another kind", "cifar10", change("model.pt", meta={"kind": "sound"}), LOOK, "do not fit"),
    ("a checkpoint in the model's place", "cifar10", lambda r: shutil.copy(r / "checkpoint.pt", r / "model.pt"), LOOK,
     "made by a newer version"),
    ("no such picture", "cifar10", lambda r: None, ["--predict", "gone.png", "--run", "run"], "no such file"),
    ("a folder without pictures", "cifar10", lambda r: (r / "none").mkdir(), ["--predict", "run/none", "--run", "run"],
     "run/none: nothing to predict in there; this run's model reads pictures"),
    ("a text for a picture", "cifar10", lambda r: None, ["--predict", "run/log.txt", "--run", "run"], "not a picture"),
    ("half a picture", "cifar10", lambda r: (r / "x.png").write_bytes((r / "gradcam.png").read_bytes()[:5000]),
     ["--predict", "run/x.png", "--run", "run"], "not a picture that can be read"),
    ("an empty picture", "cifar10", lambda r: (r / "x.png").write_bytes(b""),
     ["--predict", "run/x.png", "--run", "run"], "not a picture that can be read; this run's model"),
    ("a picture of giant size", "cifar10", lambda r: giant(r / "x.png"),
     ["--predict", "run/x.png", "--run", "run"], "not a picture that can be read"),
    ("a folder without texts", "sentiment", lambda r: (r / "none").mkdir(), ["--predict", "run/none", "--run", "run"],
     "run/none: nothing to predict in there; this run's model reads texts"),
    ("a column that is not there", "sentiment", lambda r: None,
     ["--predict", "run/history.csv", "--run", "run", "--text-column", "epich"], "no such column (did you mean epoch"),
    ("reasons without a place", "cifar10", lambda r: None, [*LOOK, "--explain"], "--explain needs --output FILE.csv"),
    ("a table where none can be", "mnist", lambda r: None, ["--predict", "run/gradcam.png", "--run", "run",
     "--output", "no/such/place.csv"], "--output no/such/place.csv: no such folder"),
    ("a folder for a table", "cifar10", lambda r: None, ["--predict", "run/gradcam.png", "--run", "run", "--output",
                                                         "run"], "--output run: a folder; name a file"),
    ("weights of another kind", "sentiment", lambda r: None, ["--task", "mnist", *OFFLINE, "--init", "run"],
     "--init run: its network reads texts, and this task has pictures"),
    ("weights of another width", "mnist", lambda r: None,
     ["--task", "mnist", *OFFLINE, "--init", "run", "--width", "64"], "its width is 128; leave out --width"),
    ("weights of another network", "mnist", lambda r: None,
     ["--task", "mnist", *OFFLINE, "--init", "run", "--model", "fast"], "its model is mlp; leave out --model"),
    ("weights for another colour", "mnist", lambda r: None, ["--task", "cifar10", *OFFLINE, "--init", "run"],
     "trained on pictures with 1 channel"),
    ("a picture for texts", "sentiment", lambda r: None, ["--predict", "run/attention.png", "--run", "run"],
     "not a text file"),
    ("texts in letters of two bytes", "sentiment", lambda r: (r / "x.txt").write_bytes("good".encode("utf-16")),
     ["--predict", "run/x.txt", "--run", "run"], "not a text file"),
    ("a file without a text", "sentiment", lambda r: (r / "x.txt").write_text("\n \n"),
     ["--predict", "run/x.txt", "--run", "run"], "nothing to predict in there"),
    ("no such file of texts", "sentiment", lambda r: None, ["--predict", "gone.txt", "--run", "run"], "no such file"),
    ("settings while predicting", "sentiment", lambda r: None, ["--predict", "x", "--run", "run", "--lr", "1"],
     "leave out --lr"),
    ("settings while evaluating", "mnist", lambda r: None, ["--evaluate", "--run", "run", "--seed", "1"],
     "leave out --seed"),
    ("settings while comparing", "mnist", lambda r: None, ["--compare", "run", ".", "--seed", "1"], "leave out --seed"),
    ("an unfinished run to compare", "mnist", unfinished, ["--compare", "run", "."], "this run has not finished"),
    ("a run to compare without predictions", "mnist", lambda r: (r / "predictions.csv").unlink(),
     ["--compare", "run", "."], "not a run folder of this version"),
    ("a file for a run", "mnist", lambda r: None, ["--resume", "run/log.txt"], "--resume run/log.txt: no such folder"),
    ("a finished run", "mnist", lambda r: None, ["--resume", "run"], "has finished its 2 epochs; give more --epochs"),
    ("fewer epochs than done", "mnist", lambda r: None, ["--resume", "run", "--epochs", "1"], "give more --epochs"),
    ("another past", "mnist", lambda r: None, ["--resume", "run", "--lr", "1"], "--lr would change the past"),
    ("no checkpoint", "mnist", lambda r: (r / "checkpoint.pt").unlink(), MORE, "its checkpoint.pt is gone"),
    ("a checkpoint cut short", "mnist", lambda r: (r / "checkpoint.pt").write_bytes(b"PK" * 999), MORE,
     "checkpoint.pt is damaged"),
    ("one bit of the checkpoint differs", "mnist", lambda r: flip(r / "checkpoint.pt"), MORE, "is damaged"),
    ("a checkpoint of a newer version", "mnist", change("checkpoint.pt", format=99), MORE, "made by a newer version"),
    ("a checkpoint of another network", "mnist", lambda r: forge(r, width=64), MORE, "does not fit its config.json"),
    ("a checkpoint of another task", "mnist", lambda r: forge(r, task="sentiment", model="lstm"), MORE,
     "does not fit its config.json"),
    ("settings of a run cut short", "mnist", lambda r: (r / "config.json").write_text("{"), MORE, "not valid JSON"),
    ("unknown settings of a run", "mnist", lambda r: forge(r, flavour="red"), MORE, "unknown setting 'flavour'"),
    ("numbers of a run cut short", "mnist", lambda r: (r / "metrics.json").write_text("{"), MORE, "not valid JSON"),
]


def giant(path):
    """A PNG of 100,000 x 100,000 pixels in some bytes."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


TABLE = [
    *((name, nothing, flags, 2, message) for name, flags, message in FLAGS),
    *((name, write("bad.json", text), ["--config", "bad.json"], 2, message) for name, text, message in CONFIGS),
    *((f"{task}: {name}", arrange, ["--task", task, *HERE], 3, message) for task, name, arrange, message in DATA),
    *((name, arrange, ["--task", task, "--data", data, "--device", "cpu"], 3, message)
      for name, task, data, arrange, message in OWN),
    ("a number for a class", write("own.csv", "text,label\n" + "".join(f"a,{i}\n" for i in range(99))),
     ["--task", "text", "--data", "own.csv"], 2, "the column label has 99 different values in 99 rows; is it"),
    ("a class column that is not there", write("own.csv", "text,label\na,1\nb,2\n"),
     ["--task", "text", "--data", "own.csv", "--label-column", "labl"], 2, "no such column (did you mean label?)"),
    *((name, run_with(task, harm), flags, 2, message) for name, task, harm, flags, message in RUNS),
    ("results into a file", write("file", ""), ["--task", "mnist", *OFFLINE, "--output-dir", "file"], 1,
     "cannot write"),
    ("results below a file", write("file", ""), ["--task", "mnist", *OFFLINE, "--output-dir", "file/x/y"], 1,
     "cannot write into"),
]


def everything(place):
    """Each file with its contents."""
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(place.rglob("*"))}


@pytest.mark.parametrize(("arrange", "flags", "code", "message"), [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_bad_input_is_one_clear_line(arrange, flags, code, message, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for archive in (*dld.MNIST, dld.CIFAR10, dld.IMDB):
        monkeypatch.setitem(archive.__dict__, "mirrors", ("http://127.0.0.1:9/refused",))
    arrange(tmp_path, finished)
    if flags == LOOK:
        Image.new("RGB", (32, 32)).save("picture.png")
    before = everything(tmp_path)
    assert dld.main(flags) == code
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert "Traceback" not in shown.err + shown.out and "--debug" not in shown.err
    after = {name: content for name, content in everything(tmp_path).items() if not name.endswith(".lock")}
    assert after == before, "something was written or lost"


def test_the_table_is_long_and_names_each_row_once():
    assert len(TABLE) >= 60 and len({row[0] for row in TABLE}) == len(TABLE)


def test_a_full_disk_is_said_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dld.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000}))
    assert dld.main(["--task", "mnist", *OFFLINE, "--output-dir", str(tmp_path / "out")]) == 1
    assert re.search(r"has 5 MB left, this run needs about \d+ MB; make room", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# -- what nobody thought of -------------------------------------------------------------------------------------------

FLAGS_KNOWN = [option for action in dld.build_parser()._actions for option in action.option_strings
               if option not in ("-h", "--help", "--version", "--debug")]
VALUES = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=12),
                   st.sampled_from(["", "-", "--", "0", "1e9", "mnist", "auto", "90s", "\0", "../x", "é" * 9, "%s"]))
THOROUGH = settings(max_examples=300, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


@THOROUGH
@given(st.lists(st.tuples(st.sampled_from(FLAGS_KNOWN), VALUES), max_size=4))
def test_no_flags_end_in_a_traceback(tmp_path, monkeypatch, capsys, pairs):
    """Any flags with any values, on a task that is not there, so that nothing is trained even if all are right."""
    monkeypatch.chdir(tmp_path)
    code = dld.main([*(word for pair in pairs for word in pair), "--task", "no such task"])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and "--debug" not in said, said


@THOROUGH
@given(st.dictionaries(st.sampled_from([field.name for field in dld.dataclasses.fields(dld.Config)]),
                       st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
                                 st.lists(st.integers(), max_size=2)), max_size=4))
def test_no_settings_of_a_file_end_in_a_traceback(values):
    try:
        config = dld.settle(values, {})
    except dld.Failure as problem:
        assert str(problem)
    else:
        assert isinstance(config.epochs, int) and config.lr > 0


@THOROUGH
@given(st.sampled_from(["model.pt", "data_batch_1", "idx", "config.json"]), st.floats(0, 1), st.binary(max_size=6),
       st.sampled_from(["flip", "cut", "insert", "replace"]))
def test_no_damage_to_a_file_goes_unnoticed_or_ends_in_a_traceback(finished, tmp_path_factory, name, where, some, how):
    """Whatever is changed in it: either it is refused, or what comes out is what went in (or is valid all the same)."""
    place = tmp_path_factory.mktemp("damage")
    path = place / name
    if name in ("model.pt", "config.json"):
        shutil.copy(finished["mnist"] / name, path)
    elif name == "idx":
        path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 4, 0, 0, 0, 5]) + bytes(20))
    else:
        write_cifar10(place / "cifar-10-batches-py", 2)
        path = place / "cifar-10-batches-py" / name
    blob = path.read_bytes()
    at = int(where * (len(blob) - 1))
    changed = {"flip": blob[:at] + bytes([blob[at] ^ 16]) + blob[at + 1:], "cut": blob[:at],
               "insert": blob[:at] + some + blob[at:], "replace": blob[:at] + some + blob[at + len(some):]}[how]
    path.write_bytes(changed)
    read = {"model.pt": dld.load_file, "config.json": lambda path: dld.settle(dld.read_config(path), {}),
            "idx": dld.read_idx, "data_batch_1": lambda path: dld.read_cifar10(place, dld.Downloads(False))}[name]
    try:
        found = read(path)
    except dld.Failure as problem:
        assert name in str(problem) or name == "config.json"
    else:
        if name == "model.pt":
            right = torch.load(finished["mnist"] / name, weights_only=True)["weights"]
            assert all(torch.equal(found["weights"][key], value) for key, value in right.items())
    shutil.rmtree(place)
