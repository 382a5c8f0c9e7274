"""The pages: valid, complete in themselves, and saying nothing that the numbers do not."""
import csv
import dataclasses
import math
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dld, metrics_of, small
from PIL import Image


class Checker(HTMLParser):
    """Elements closed in order, ids once, links inside, pictures with words, tables with heads."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.text = [], [], [], [], ""
        assert page.startswith("<!DOCTYPE html>") and '<html lang="en">' in page
        assert not re.search(r"<script|url\(|@import", page)
        self.feed(page)
        assert self.open == [], "never closed"
        assert len({*self.ids}) == len(self.ids) and {*self.links} == {*self.ids}
        assert all(len(alt) > 30 for alt in self.images), "the finding, not only a name"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object"), "nothing runs, or is fetched"
        assert not any(name.startswith("on") for name in values)
        for name in {"src", "href"} & values.keys():
            assert values[name].startswith(("data:", "#"))
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a":
            self.links.append(values["href"][1:])
        elif tag == "img" and (values["width"], values["alt"]) != ("96", "a test sample"):
            self.images.append(values["alt"])
            assert int(values["width"]) > 100 and int(values["height"]) > 50
        elif tag in ("td", "th"):
            self.text += " "
            assert self.open[-2] == "tr" and (tag == "td" or values["scope"] in ("row", "col"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(path):
    assert path.stat().st_size < 5e6
    return Checker(path.read_text("utf-8"))


def table_of(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_the_page_of_each_run_is_whole(finished):
    for run in finished.values():
        found, m = check(run / "report.html"), metrics_of(run)
        pictures = {path.stem.replace("_", " ") for path in run.glob("*.png")}
        letters = {"confusion matrix", *(  # what a page can show as text
            ("sample predictions", "training samples", "mistakes", "suspects", "near repeats")
            if m["task"] == "sentiment" else ())}
        assert {alt.split(":")[0] for alt in found.images} == pictures - letters
        text = (run / "report.md").read_text("utf-8")
        linked = {*re.findall(r"\]\((\w+\.(?:png|html))\)", text)}
        assert linked == {path.name for path in run.iterdir() if path.suffix in (".png", ".html")
                          } - {"report.html"}
        assert f"{m['test_accuracy']:.2%}" in text and "## Questions" in text
        right = f"Right on {m['test_accuracy']:.2%} of {m['test_samples']:,} test samples"
        for said in ("good for trying out, not for claims", right, m["torch"], "--config",
                     m["data_fingerprint"]):
            assert said in found.text
        order = [found.text.index(part) for part in (
            "Result", "Data", "Model", "Training", "Mistakes", "Confidence", "Explanations",
            "Faults of the data", "Cost", "Questions", "Repeat it")]
        assert order == sorted(order)


def test_what_the_page_says_can_be_counted_in_the_tables(finished):
    for run in finished.values():
        text, m = check(run / "report.html").text, metrics_of(run)
        lines = table_of(run / "predictions.csv")
        wrong = [line for line in lines if line["correct"] == "0"]
        said = re.search(r"([\d,]+) mistakes? among ([\d,]+) test", text)
        assert (int(said[1]), int(said[2])) == (len(wrong), len(lines))
        pairs = re.findall(r"(\w+) taken for (\w+) \((\d+) of (\d+)\)", text)
        assert pairs or not wrong
        for true, taken, n, of in pairs[:5]:
            assert int(n) == sum((line["true"], line["predicted"]) == (true, taken)
                                 for line in wrong)
            assert int(of) == sum(line["true"] == true for line in lines)
        for sure in sorted(wrong, key=lambda line: -float(line["confidence"]))[:1]:
            said = f"{sure['predicted']} {float(sure['confidence']):.1%} (true: {sure['true']})"
            assert said in text
        assert sum(int(row["support"]) for row in table_of(run / "classes.csv")) == len(lines)
        faults = [row["fault"] for row in table_of(run / "faults.csv")]
        assert [faults.count(kind) for kind in ("suspect label", "empty", "near repeat")] == [
            m[key] for key in ("suspect_labels", "empty_samples", "near_repeats")]


@pytest.mark.parametrize(("case", "n"), [
    *((case, 300) for case in ("perfect", "all wrong", "one class", "blind", "ties", "good")),
    ("perfect", 1), ("all wrong", 1)])
def test_sentences_hold_for_odd_runs_too(digits, tmp_path, case, n):
    data = dld.build_dataset(digits, small("mnist", limit=n))
    data.meta["temperature"] = 1.0
    y = data.labels[data.parts["test"]]
    truth = torch.eye(10)[y] * 9
    noise = torch.randn(n, 10, generator=torch.Generator().manual_seed(0))
    logits = {"perfect": truth, "all wrong": truth.roll(1, 1), "blind": noise, "ties": 0 * noise,
              "one class": torch.eye(10)[y * 0] * 9, "good": truth / 4 + noise}[case]
    commonest = int(data.labels[data.parts["train"]].bincount().argmax())
    m = {**dld.measure(logits, y), "train_accuracy": 1.0, "temperature": 1.0, "test_samples": n,
         "train_samples": 50,
         **dld.paired_gain(logits.argmax(1) == y, y == commonest, "commonest")}
    found = dld.Evaluation(m, data, pd.DataFrame(), logits)
    assert all(np.isfinite(value) for value in m.values())
    dld.write_tables(tmp_path, found)
    dld.write_page(tmp_path / "a.html", found.title, {
        "Result": [dld.text_block(dld.say_result(m), dld.say_gap(m), dld.say_confusions(found))],
        "Errors": dld.report_errors(found, lambda name, finding: dld.text_block(finding))})
    text, right = check(tmp_path / "a.html").text, int(found.right.sum())
    assert f"{right / n:.2%}" in text and "nan" not in text and "None" not in text
    assert ("Not one mistake" if right == n else f"{n - right:,} mistake") in text
    better = m["test_accuracy"] > m["commonest_accuracy"] and n > 1
    learned = "Nothing learned" not in text and "too few" not in text
    assert learned == (case in ("perfect", "good")) if n == 300 else better or not learned
    assert ("no difference shown" in text) == (right == n)


def random_run(seed, digits):
    """An evaluation of any quality, from hopeless to perfect, of few or many samples."""
    rng = np.random.default_rng(seed)
    data = dld.build_dataset(digits, small("mnist", limit=int(rng.choice([12, 60, 300]))))
    data.meta["temperature"] = temperature = float(rng.uniform(0.3, 3))
    y = data.labels[data.parts["test"]]
    noise = torch.randn(len(y), 10, generator=torch.Generator().manual_seed(seed))
    logits = torch.eye(10)[y] * float(rng.choice([0, 1, 3, 30])) + noise
    epochs = int(rng.integers(1, 9))
    history = pd.DataFrame({"epoch": range(1, epochs + 1), **{
        key: rng.choice([1.0, *rng.random(3)], epochs)
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")}})
    best = history.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    right, simple = logits.argmax(1) == y, torch.from_numpy(rng.random(len(y)) < rng.random())
    doubted = int(rng.integers(0, 4))
    m = {**dld.measure(logits, y, temperature), "temperature": temperature, "model": "mlp",
         "train_accuracy": float(rng.choice([1.0, right.double().mean(), rng.random()])),
         "test_samples": len(y), "train_samples": len(data.parts["train"]), "dataset": data.name,
         **dld.paired_gain(right, y == 0, "commonest"), "baseline": "a simple method",
         **dld.paired_gain(right, simple, "baseline"), "best_epoch": int(best["epoch"]),
         "val_accuracy": best["val_accuracy"], "parameters": 9, "multiply_adds": 9,
         "val_samples": int(rng.choice([0, 20, 500])), "doubted_labels": doubted,
         "suspect_labels": int(rng.integers(0, doubted + 1)),
         "seconds_total": 9.0, "device": "cpu", "epochs": epochs, "stand_in": True}
    return dld.Evaluation(m, data, history, logits), m, history, right


def test_no_numbers_make_a_false_sentence(digits):
    seen = set()
    for seed in range(60):
        found, m, history, right = random_run(seed, digits)
        settings = dataclasses.asdict(small("mnist"))
        blocks = [*dld.report_result(m, {"views": 0.0}), {
            "kind": "questions", "answers": dld.answer_questions(found, settings)}]
        text = " ".join(part for block in blocks for part in dld.block_markdown(block))
        text += dld.say_curves(history, m["best_epoch"]) + dld.say_calibration(m)
        text += dld.say_suspects(m, 500)
        n, hits, last = len(right), int(right.sum()), history.iloc[-1]
        # Newcombe's interval of training minus test, from Wilson's by their own formulas.
        sides = []
        for p, size in ((m["train_accuracy"], m["train_samples"]), (hits / n, n)):
            z, p = 1.959964, round(p * size) / size
            middle = p + z * z / (2 * size)
            half = z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
            sides.append([(middle + sign * half) / (1 + z * z / size) for sign in (-1, 1)])
        (low, high), (test_low, test_high) = sides
        gap, p = m["train_accuracy"] - hits / n, m["train_accuracy"]
        less = gap - math.hypot(p - low, test_high - hits / n)
        more = gap + math.hypot(high - p, hits / n - test_low)
        simplest = m["commonest_gain_low"], m["baseline_gain_low"]
        few = n < 100 and m["commonest_gain"] > 0.2
        ranks = m.get("test_auc", 0) > 0.6
        ties = int((history["val_accuracy"] == history["val_accuracy"].max()).sum())
        lowest = history.loc[history["val_loss"].idxmin()]
        rose = last["val_loss"] > 1.1 * lowest["val_loss"]
        true = {
            "it knows its training samples better": less > 0,
            "Yes: it knows": less > 0,
            "the test part is easier": more < 0,
            "no difference shown.": less <= 0 <= more,
            "Nothing learned": simplest[0] <= 0 and not few and not ranks,
            "By accuracy, it is not shown": simplest[0] <= 0 and not few and ranks,
            "too few samples to show": simplest[0] <= 0 and few,
            "this model is better": max(simplest) > 0,
            "the simple method is better": min(m["commonest_gain_high"],
                                               m["baseline_gain_high"]) < 0,
            "Which mistakes": hits < n,
            "No test sample is wrong": hits == n,
            "was measured once": len(history) == 1,
            "had the least loss": ties > 1,
            "Later epochs did": m["best_epoch"] < len(history) and last[
                "train_accuracy"] > last["val_accuracy"] + 0.1,
            "too sure of its mistakes": rose and lowest["val_accuracy"] <= last[
                "val_accuracy"] < 1,
            "can be named": m["doubted_labels"] > 0 == m["suspect_labels"],
            "Expect its own mistakes": 0 < m["suspect_labels"] < m["doubted_labels"],
            "too sure of 500": m["temperature"] > 1.005 and m["val_samples"] == 500 and m[
                "val_accuracy"] < 1,
            "(95% interval 1.000 to 1.000": False, "nan": False, "inf ": False,
            "it helped": m["test_ece"] < m["test_ece_uncalibrated"] - 0.002,
            "did not help": m["test_ece"] > m["test_ece_uncalibrated"] + 0.002}
        assert not re.search("None(?! of | occurs)", text)
        for sentence, holds in true.items():
            assert (sentence in text) == holds, (seed, sentence, text)
            seen |= {(sentence, holds)}
    assert len(seen) >= 38, "both ways of most"


def test_the_sentence_about_calibration_says_which_way_it_went():
    m = {"temperature": 2.0, "test_ece": 0.03, "test_ece_uncalibrated": 0.01, "val_samples": 9,
         "val_accuracy": 0.5}
    assert "be 1.00 points: on the test part it did not help" in dld.say_calibration(m)
    assert "it helped" in dld.say_calibration({**m, "test_ece": 0.001})
    assert "no correction" in dld.say_calibration({**m, "temperature": 1.001})


@pytest.mark.parametrize(("losses", "accuracies", "said", "unsaid"), [
    ([0.5, 0.3, 0.6], [0.8, 0.9, 0.85], "it was 85.0%. The validation loss was lowest in epoch 2.",
     "too sure"),  # it made more mistakes as well
    ([0.5, 0.3, 0.6], [0.8, 0.9, 0.9], "too sure", "lowest in epoch 2."),
    ([0.5, 0.3], [0.8, 0.9], "epoch 2 of 2: 90.0%; these weights were kept.", "last epoch"),
    ([np.nan] * 2, [np.nan] * 2, "no validation curve", "nan")])
def test_the_sentence_about_the_curves(losses, accuracies, said, unsaid):
    history = pd.DataFrame({"epoch": range(1, len(losses) + 1), "train_loss": 1.0,
                            "val_loss": losses, "val_accuracy": accuracies})
    found = dld.say_curves(history, 2)
    assert said in found and unsaid not in found


def test_an_interrupted_training_is_not_said_to_have_lost_patience(digits):
    config = small("mnist", limit=60, epochs=9, patience=3)
    data, m = dld.build_dataset(digits, config), {"train_samples": 50, "epochs": 4}
    for ended, said in (({}, True), ({"ended": "interrupted after 4 of 9 epochs"}, False)):
        text = dld.say_recipe(data, dataclasses.asdict(config), m | ended, steps=9)
        assert ("validation did not" in text) == said and ("interrupted" in text) != said


def test_the_recipe_says_what_the_loss_and_the_end_were(digits):
    config = small("mnist", limit=60, batch_size=16, epochs=9, patience=1, class_weights="balanced")
    data = dld.build_dataset(digits, config)
    settings, steps = dataclasses.asdict(config), 3 * data.epoch_steps(config)
    text = dld.say_recipe(data, settings, {"epochs": 3}, steps)
    assert "in which each class counts alike" in text and "then the rate fell to its end" in text
    text = dld.say_recipe(data, {**settings, "schedule": "constant", "class_weights": "none"},
                          {"epochs": 3}, steps)
    assert "samples, as many as" in dld.say_recipe(data, settings, {"epochs": 9}, steps // 3)
    assert "counts alike" not in text and "did not become better for long." in text


def test_the_class_with_the_most_mistakes_is_not_said_to_have_most_of_them(digits):
    data = dld.build_dataset(digits, small("mnist", limit=300))
    data.meta["temperature"], y = 1.0, data.labels[data.parts["test"]]
    logits = torch.eye(10)[torch.where(torch.arange(len(y)) % 2 == 0, (y + 1) % 10, y)]
    found = dld.Evaluation({}, data, pd.DataFrame(), logits)
    said, wrong = dld.explain_mistakes(found), found.matrix.sum(1) - found.matrix.diagonal()
    assert "Most concern" not in said and max(wrong) < len(found.mistakes) / 2
    name, n, of = re.search(r"Missed most: (.+) \((\d+) of (\d+)\)\.$", said).groups()
    assert re.match(r"Fewest training samples: \d+ \(class \d\)", dld.say_balance(found)), (
        "numbers of samples and classes that are numbers are told apart")
    row = found.classes.index(name)
    assert (int(n), int(of)) == (max(wrong), found.matrix[row].sum()) and wrong[row] == max(wrong)


def test_the_parameters_of_a_run_are_those_of_its_layers(finished):
    for run in finished.values():
        layers = [line.split(" | ") for line in (run / "report.md").read_text("utf-8").split(
            "| layer |")[1].split("\n\n")[0].splitlines()[2:]]
        total = sum(int(cells[-2].replace(",", "")) for cells in layers)
        assert total == metrics_of(run)["parameters"]


def test_what_stands_below_the_layers_is_of_this_network(digits):
    config = small("mnist", limit=60)
    data = dld.build_dataset(digits, config)
    data.meta["temperature"] = 1.0
    for model, more, lstm, wide in (("transformer", {"deep_share": 0.5}, False, True),
                                    ("lstm", {}, True, False)):
        m = {"model": model, "multiply_adds": 1, "train_samples": 54, "epochs": 1, **more}
        found = dld.Evaluation(m, data, pd.DataFrame({"steps": [1]}), torch.zeros(60, 10))
        said = dld.report_model(found, dataclasses.asdict(config), lambda name, text: text)[1]
        assert ("LSTM" in said) == lstm and ("wide part" in said) == wide


@pytest.mark.parametrize("epochs", [1, 2])
def test_of_one_epoch_none_is_said_to_be_chosen(digits, epochs):
    config = small("mnist", limit=60)
    data = dld.build_dataset(digits, config)
    data.meta["temperature"], history = 1.0, pd.DataFrame({"val_loss": [1.0] * epochs})
    found = dld.Evaluation({}, data, history, torch.zeros(60, 10))
    blocks = dld.report_data(found, dataclasses.asdict(config), lambda name, finding: None)
    assert ("best epoch" in str(blocks[1])) == (epochs > 1)


def test_as_many_samples_are_said_to_be_trained_on_as_there_were(digits):
    config = small("mnist", limit=60, epochs=2, batch_size=40)  # two batches of 30
    data = dld.build_dataset(digits, config)
    for steps, times in ((3, "1.5"), (4, "2"), (240, "120")):
        text = dld.say_recipe(data, dataclasses.asdict(config), {"epochs": 2}, steps)
        assert text.startswith(f"Trained for {steps} steps of 30 samples, {times} times as many")


def test_a_network_that_muon_trains_is_not_said_to_know_adamw(shapes):
    config = small("cifar10", limit=60)
    data, settings = dld.build_dataset(shapes, config), dataclasses.asdict(config)
    assert config.optimizer == "muon" and settings["weight_decay"]
    text = dld.say_recipe(data, settings, {"epochs": config.epochs}, steps=4)
    assert "Muon" in text and "AdamW" not in text and "weight decay" not in text
    assert "--weight-decay" not in dld.settings_in_use(settings, data.meta)


def test_what_was_skipped_ends_in_dots_only_where_more_reasons_follow():
    skipped = [(f"{i}.png", f"reason {i}") for i in range(5)]
    assert dld.say_skipped(skipped[:4]).endswith("1 reason 3")
    assert dld.say_skipped(skipped).endswith("1 reason 3 ...")


def test_pages_escape_classes_texts_and_the_names_of_data_and_runs(
        tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **more: (
        Image.new("L", (800, 400)).save(file, "png")))
    evil, name = "<script>alert(1)</script>", "data" if os.name == "nt" else "<script>a & b"
    words = {evil: f"good {evil} film &amp; <img src=x onerror=y>", 'b" & <b>': "bad poor </p> one"}
    rows = [(f"{words[label]} {i}", label) for i in range(60) for label in words]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / f"{name}.csv", index=False)
    assert dld.main(["--task", "text", "--data", str(tmp_path / f"{name}.csv"), "--epochs", "1",
                     "--device", "cpu", "--report", "minimal", "--output-dir", str(tmp_path)]) == 0
    run = next(tmp_path.glob("text-*"))
    text = check(run / "report.html").text
    assert all(shown in text for shown in (evil, 'b" & <b>', name))
    for page in ("attention.html", "evidence.html"):
        shown = Checker((run / page).read_text("utf-8")).text
        assert name in shown and "<script>" in shown and "onerror" in shown and "</p>" in shown
    one, two = (shutil.copytree(run, tmp_path / f"{name}{i}") for i in (1, 2))
    assert dld.main(["--compare", str(one), str(two)]) == 0
    assert f"{name}1" in check(tmp_path / "comparison.html").text


# -- several runs ----------------------------------------------------------------------------------


def copy_run(run, place, right=None, rng=None):
    """A copy of a finished run; with `right`, one that is right so often on the same samples."""
    run = shutil.copytree(run, place)
    if right is not None:
        table = pd.read_csv(run / "predictions.csv")
        table["correct"] = (rng.random(len(table)) < right).astype(int)
        dld.write_csv(run / "predictions.csv", table)
        low, high = dld.wilson(table["correct"].sum(), len(table))
        dld.write_json(run / "metrics.json", {
            **metrics_of(run), "test_accuracy": float(table["correct"].mean()),
            "test_accuracy_low": low, "test_accuracy_high": high})
    return run


def test_equal_runs_compare_as_equal_and_unequal_ones_as_unequal(finished, tmp_path, capsys):
    rng = np.random.default_rng(0)
    one = copy_run(finished["mnist"], tmp_path / "one")
    same = copy_run(one, tmp_path / "same")
    assert dld.main(["--compare", str(one), str(same)]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if "/" not in line) < 80
    out = " ".join(out.split())
    assert ("No difference shown between one and same: +0.0 points, 95% interval -0.5 to +0.5, "
            "McNemar's test p = 1.") in out and "is better than" not in out
    page = check(tmp_path / "comparison.html")
    assert "No difference shown" in page.text and len(page.images) == 2
    good, bad = (copy_run(one, tmp_path / name, right, rng)
                 for name, right in (("good", 0.99), ("bad", 0.7)))
    runs = [str(bad), str(good), str(one)]
    assert dld.main(["--compare", *runs, "--output-dir", str(tmp_path / "out")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "good is better than bad: +" in out and "corrected for 3 pairs" in out
    assert "bad is better" not in out and "good is better than every other run." in out
    rows = table_of(tmp_path / "out" / "comparison.csv")
    assert [row["label"] for row in rows] == ["bad", "good", "one"]
    check(tmp_path / "out" / "comparison.html")


def test_runs_on_different_data_are_not_tested_against_each_other(finished, tmp_path, capsys):
    runs = [str(finished["mnist"]), str(finished["sentiment"])]
    assert dld.main(["--compare", *runs, "--output-dir", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "McNemar" not in out and "says nothing about which network is better" in out
    assert "stand-in" in check(tmp_path / "comparison.html").text


def test_bad_runs_to_compare_are_refused(finished, tmp_path, capsys):
    run = str(finished["mnist"])
    half, old = (copy_run(finished["mnist"], tmp_path / name) for name in ("half", "old"))
    dld.write_json(half / "metrics.json", {**metrics_of(half), "status": "interrupted"})
    (old / "predictions.csv").write_text("row,true\n1,2\n")
    for flags, message in (([run, run], "two or more different"),
                           ([run, str(half)], "has not finished"),
                           ([run, str(old)], "not a run folder of this version")):
        assert dld.main(["--compare", *flags]) == 2, flags
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "comparison.md").exists()
