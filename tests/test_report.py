"""The pages: valid, complete in themselves, and saying nothing that the numbers do not."""
import csv
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import dld, metrics_of, small

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every element closed in order, ids once, links inside the page, pictures with words, tables with heads."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.text = [], [], [], [], ""
        self.feed(page)
        assert self.open == [], "never closed"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object"), "nothing runs, nothing is fetched"
        assert all(name not in values or values[name].startswith(("data:", "#")) for name in ("src", "href"))
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"][1:])
        if tag == "img":
            self.images.append(values["alt"])
            assert int(values["width"]) > 100 and int(values["height"]) > 50
        if tag == "td":
            assert self.open[-2] == "tr" and "table" in self.open
        if tag == "th":
            assert values["scope"] in ("row", "col")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(path):
    page = path.read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>") and '<html lang="en">' in page and "viewport" in page
    assert path.stat().st_size < 5e6 and "url(" not in page and "@import" not in page
    found = Checker(page)
    assert len(set(found.ids)) == len(found.ids) and set(found.links) == set(found.ids)
    assert all(len(alt) > 30 for alt in found.images), "the finding, not only a name"
    return found


def test_the_page_of_each_run_is_whole(finished):
    for task, run in finished.items():
        found, m = check(run / "report.html"), metrics_of(run)
        pictures = {path.stem.replace("_", " ") for path in run.glob("*.png")}
        assert {alt.split(":")[0] for alt in found.images} == pictures, "every figure of the folder, and no other"
        assert "good for trying out, not for claims" in found.text, "the stand-in's banner"
        assert f"Right on {m['test_accuracy']:.2%} of {m['test_samples']:,} test samples" in found.text
        assert m["torch"] in found.text and m["test_rows_sha256"] in found.text and "--config" in found.text
        order = [found.text.index(part) for part in ("Result", "The training", "Where it errs", "Can its confidence",
                                                     "Why it decides so", "The data's own faults", "What it cost")]
        assert order == sorted(order)
        assert task != "cifar10" or f"in {m['peak_on_object']:.1%} of {m['peaks']:,} right predictions" in found.text


def test_what_the_page_says_can_be_counted_in_the_tables(finished):
    for run in finished.values():
        text = check(run / "report.html").text
        lines = list(csv.DictReader((run / "predictions.csv").open(encoding="utf-8")))
        wrong = [line for line in lines if line["correct"] == "0"]
        said = re.search(r"([\d,]+) mistakes? among ([\d,]+) test", text)
        assert (int(said[1]), int(said[2])) == (len(wrong), len(lines))
        for true, taken, n, of in re.findall(r"(\w+) taken for (\w+) \((\d+) of (\d+)\)", text)[:5]:
            assert int(n) == sum(line["true"] == true and line["predicted"] == taken for line in wrong)
            assert int(of) == sum(line["true"] == true for line in lines)
        sure = max(wrong, key=lambda line: float(line["confidence"]))
        assert f"{sure['predicted']} {float(sure['confidence']):.0%} (true: {sure['true']})" in text
        least = re.search(r"at least 80% sure\s*([\d.]+)%\s*([\d.]+)%", re.sub(r"<[^>]+>", " ", (
            run / "report.html").read_text("utf-8")))
        kept = [line for line in lines if float(line["confidence"]) >= 0.8]
        if kept:
            assert float(least[1]) == pytest.approx(100 * len(kept) / len(lines), abs=0.06)
        each = list(csv.DictReader((run / "classes.csv").open(encoding="utf-8")))
        assert sum(int(row["support"]) for row in each) == len(lines)
        held = metrics_of(run)
        faults = list(csv.DictReader((run / "faults.csv").open(encoding="utf-8")))
        for kind, key in (("suspect label", "suspect_labels"), ("empty", "empty_samples"),
                          ("near repeat", "near_repeats")):
            assert sum(row["fault"] == kind for row in faults) == held[key]


def findings(digits, logits, **metrics):
    """A run's findings with these logits for the test part."""
    data = dld.build_data(digits, small("mnist", limit=len(logits)))
    data.meta["temperature"] = 1.0
    y = data.labels[data.parts["test"]]
    found = dld.Findings({**dld.measure(logits, y), **metrics}, data, [], logits)
    rows = data.labels[data.parts["train"]]
    found.metrics |= dld.measure_gain(found.right, y == int(rows.bincount().argmax()), "commonest")
    found.metrics |= {"train_accuracy": 1.0, "temperature": 1.0, "test_samples": len(y)}
    return found


def logits_for(digits, n, case):
    data = dld.build_data(digits, small("mnist", limit=n))
    y = data.labels[data.parts["test"]]
    rng = torch.Generator().manual_seed(0)
    truth = torch.eye(10)[y] * 9
    return {"perfect": truth, "all wrong": torch.eye(10)[(y + 1) % 10] * 9, "one class": torch.eye(10)[y * 0] * 9,
            "blind": torch.randn(n, 10, generator=rng), "ties": torch.zeros(n, 10),
            "good": truth / 4 + torch.randn(n, 10, generator=rng)}[case]


@pytest.mark.parametrize("case", ["perfect", "all wrong", "one class", "blind", "ties", "good"])
@pytest.mark.parametrize("n", [1, 12, 300])
def test_sentences_hold_for_odd_runs_too(digits, tmp_path, case, n):
    found = findings(digits, logits_for(digits, n, case))
    m, right = found.metrics, int(found.right.sum())
    assert all(np.isfinite(value) for value in m.values())
    text = dld.say_confusions(found)
    assert ("Not one mistake" in text) == (right == n) and (right == n or f"{n - right:,} mistake" in text)
    assert f"{right / n:.2%}" in dld.say_result(m)
    better = m["test_accuracy"] - m["commonest_accuracy"]
    if n == 300:
        assert dld.learned(m) == (case in ("perfect", "good"))
    assert dld.learned(m) is False or (better > 0 and n > 1)
    assert ("Nothing learned" in dld.say_result(m)) == (not dld.learned(m))
    gap = dld.say_gap(m)
    assert ("within the uncertainty" in gap) == (m["test_accuracy_low"] <= 1.0 <= m["test_accuracy_high"])
    for name, (names, group) in found.data.samples.slices(found.rows).items():
        rows, p = dld.group_accuracy(found.right, group, names)
        assert sum(row["samples"] for row in rows) == n
        said = dld.say_groups(name, rows, p, 1)
        assert ("No dependence" in said) == (p > 0.05 and len(rows) > 1)
    dld.write_tables(tmp_path, found)
    html = dld.report_errors(tmp_path, found)
    Checker(html)
    assert "nan" not in html and "None" not in html


def test_the_sentence_about_calibration_says_which_way_it_went():
    m = {"temperature": 2.0, "test_ece": 0.03, "test_ece_uncalibrated": 0.01}
    assert "by 1.00: it is higher now" in dld.say_calibration(m)
    assert "it is lower now" in dld.say_calibration({**m, "test_ece": 0.001})


def test_the_sentence_about_the_curves():
    def row(epoch, loss, accuracy):
        return {"epoch": epoch, "train_loss": 1.0, "val_loss": loss, "val_accuracy": accuracy}

    rising = [row(1, 0.5, 0.8), row(2, 0.3, 0.9), row(3, 0.6, 0.85)]
    said = dld.say_curves(rising, 2)
    assert "epoch 2 of 3: 90.0%" in said and "In the last epoch it was 85.0%" in said
    assert "lowest in epoch 2." in said and "too sure" not in said, "it made more mistakes as well"
    assert "too sure" in dld.say_curves([*rising[:2], row(3, 0.6, 0.9)], 2)
    assert "lowest" not in dld.say_curves(rising[:2], 2) and "last epoch" not in dld.say_curves(rising[:2], 2)


def test_pages_escape_what_they_show(tmp_path):
    rows = [["<b>", "a & b"], ["x", '"']]
    part = dld.html_section("A <part>", dld.html_table("c > d", ["e", "f"], rows))
    dld.write_page(tmp_path / "a.html", "<i>\nsecond", part)
    found = Checker((tmp_path / "a.html").read_text("utf-8"))
    assert "<b>" in found.text and "a & b" in found.text and "A <part>" in found.text
    assert dld.html_section("nothing", "", "") == "" == dld.html_figure(tmp_path / "gone.png", "finding")


# -- several runs -----------------------------------------------------------------------------------------------------


def copy_run(run, place, right=None, rng=None):
    """A copy of a finished run; with `right`, one that is right so often on the same samples."""
    run = shutil.copytree(run, place)
    if right is not None:
        lines = list(csv.DictReader((run / "predictions.csv").open(encoding="utf-8")))
        for line in lines:
            line["correct"] = str(int(rng.random() < right))
        dld.write_csv(run / "predictions.csv", list(lines[0]), [list(line.values()) for line in lines])
        m = metrics_of(run)
        m["test_accuracy"] = sum(line["correct"] == "1" for line in lines) / len(lines)
        m["test_accuracy_low"], m["test_accuracy_high"] = dld.wilson(m["test_accuracy"] * len(lines), len(lines))
        dld.write_json(run / "metrics.json", m)
    return run


def test_equal_runs_compare_as_equal_and_unequal_ones_as_unequal(finished, tmp_path, capsys):
    rng = np.random.default_rng(0)
    one = copy_run(finished["mnist"], tmp_path / "one")
    same = copy_run(one, tmp_path / "same")
    assert dld.main(["--compare", str(one), str(same)]) == 0
    out = capsys.readouterr().out
    assert "No difference shown between one and same: +0.0 points, 95% interval -0.5 to +0.5" in out
    assert "p = 1" in out and "is better than" not in out
    page = check(tmp_path / "comparison.html")
    assert "No difference shown" in page.text and len(page.images) == 2
    good, bad = (copy_run(one, tmp_path / name, right, rng) for name, right in (("good", 0.95), ("bad", 0.7)))
    assert dld.main(["--compare", str(bad), str(good), str(one), "--output-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "good is better than bad: +" in out and "bad is better" not in out and "corrected for 3 pairs" in out
    best = max((metrics_of(run)["test_accuracy"], run.name) for run in (good, bad, one))[1]
    assert f"- {best} is better than every other run." in out or "- No run is shown to be better" in out
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open(encoding="utf-8")))
    assert [row["label"] for row in rows] == ["bad", "good", "one"]
    check(tmp_path / "out" / "comparison.html")


def test_runs_on_different_data_are_not_tested_against_each_other(finished, tmp_path, capsys):
    runs = [str(finished["mnist"]), str(finished["sentiment"])]
    assert dld.main(["--compare", *runs, "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "McNemar" not in out and "says nothing about which network is better" in out
    assert "stand-in" in check(tmp_path / "comparison.html").text


def test_bad_runs_to_compare_are_refused(finished, tmp_path, capsys):
    run = str(finished["mnist"])
    broken = copy_run(finished["mnist"], tmp_path / "broken")
    (broken / "predictions.csv").write_text("row,true\n1,2\n")
    half = copy_run(finished["mnist"], tmp_path / "half")
    dld.write_json(half / "metrics.json", {**metrics_of(half), "status": "interrupted"})
    old = copy_run(finished["mnist"], tmp_path / "old")
    dld.write_json(old / "metrics.json", {key: value for key, value in metrics_of(old).items() if key != "model_mb"})
    for flags, message in (([run], "two or more different"), ([run, run], "two or more different"),
                           ([run, "nowhere"], "nowhere: no such folder"), ([run, str(tmp_path)], "cannot read"),
                           ([run, str(broken)], "not a run folder of this version"),
                           ([run, str(half)], "has not finished"), ([run, str(old)], "model_mb is missing"),
                           ([run, str(old), "--seed", "3"], "leave out --seed")):
        assert dld.main(["--compare", *flags]) == 2, flags
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "comparison.md").exists()
