"""scripts/study.py without training: what it tunes on, what it keeps, its arithmetic. And the toy's own machinery."""

import json
import os
import signal
import subprocess
import sys
import time

import demo
import host
import numpy as np
import pytest
import study
import torch
from ablation import study_report
from toy import asking, models, pictures, probe, recipe, whitening


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A study of two arms whose runs are made up; its runs are listed in `made`."""
    monkeypatch.setattr(study, "ARMS", {name: study.ARMS[name] for name in (study.BASELINE, "mmfuser")})
    made = study.Study(tmp_path, quick=True, device="cpu")
    made.made = []

    def train(arm, trial, seed, folder):
        made.made.append((arm, trial, seed))
        return {
            "losses": [[2.0] * 30, [1.0] * 30 + [0.1] * 30],
            "gates": [[], [0.2] * (arm == "mmfuser")],
            "seconds": 1,
        }

    def ask(arm, folder):
        fast, helped = "x5" in folder.name, arm == "mmfuser"
        right = {
            "validation": dict.fromkeys(study_report.KINDS, [int(fast == helped)] * 4),  # the arms want different rates
            "heldout": dict.fromkeys(study_report.KINDS, [1 - int(fast == helped), int(helped), 0, 1]),
        }
        return {"right": right, "parameters": 5}

    monkeypatch.setattr(made, "_train", train)
    monkeypatch.setattr(made, "_ask", ask)
    return made


def test_rates_are_tuned_on_validation_pictures_only_and_runs_are_reused(quick):
    trials, results = quick.judge()
    assert trials == {study.BASELINE: (2e-3, 1), "mmfuser": (2e-3, 5)}, "though held-out pictures say the opposite"
    assert len(quick.made) == len(set(quick.made)) == 2 * 2 + 2 * 2, "both trials, then two more seeds"
    assert [len(found) for found in results.values()] == [3, 3]
    quick.made.clear()
    assert quick.judge() == (trials, results) and not quick.made
    file = quick.file("mmfuser", (2e-3, 5), 1)
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": {"pretrain": 1, "finetune": 1}}))
    with pytest.raises(ValueError, match="is of another design; give another --output"):
        quick.judge()


def test_report_says_what_was_measured(quick, tmp_path):
    trials, results = quick.judge()
    tables = {name: arm.table for name, arm in quick.arms.items()}
    probes = [dict.fromkeys(study_report.KINDS, 0.25)] * 2
    text = study_report.report(quick.design, quick.seeds, trials, results, tables, study.BASELINE, probes, "cpu")
    assert "| number | 25 | 25 |" in text and "| mmfuser | 0.002 x 5 | 5 | 1 | 0.100 | 44 (3/3) | 0.200 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| mmfuser | 50.0"))
    assert row.split(" | ")[5].startswith("+25.0 [+0.0, "), "one of four questions more, in every seed"
    study_report.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10000


def test_a_study_can_be_cut_to_some_arms(tmp_path):
    assert list(study.Study(tmp_path, True, "cpu", arms=["dense", "mean"]).arms) == [study.BASELINE, "mean", "dense"]


def test_every_study_arm_is_understood(tmp_path):
    names = {name for name, arm in study.ARMS.items() if arm.quick}
    assert study.BASELINE in names and {arm.table for arm in study.ARMS.values()} > {"fusions", "modules"}
    files = [study.Study(tmp_path, False, "cpu").file(name, (1e-3, 5), 0) for name in study.ARMS]
    assert len(set(files)) == len(study.ARMS)


def test_bootstrap_is_paired_and_covers_seeds():
    same = np.tile([[1, 0, 1, 0]], (3, 1))
    assert study_report.bootstrap(same - same) == (0, 0, 0)
    seeds = np.array([[1] * 50, [0] * 50])
    assert study_report.bootstrap(seeds) == (0.5, 0.0, 1.0), "two seeds that disagree leave everything open"


def test_pictures_say_what_they_show(tmp_path):
    from PIL import Image

    pictures.make_dataset(tmp_path, train=12, heldout=0, image_size=64, digit_size=24)
    for record in json.loads((tmp_path / "pretrain.json").read_text()):
        numbered, clean = (np.asarray(Image.open(tmp_path / record[name]), float) for name in ("image", "clean"))
        left, top, right, bottom = record["box"]
        changed = np.abs(numbered - clean).sum(2)
        assert changed[top:bottom, left:right].sum() == changed.sum() > 0, "the number is in its box"
        row, column = (int(value * 3 / 64) for value in ((top + bottom) / 2, (left + right) / 2))
        assert record["place"] == pictures.PLACES[3 * row + column]
        assert record["light"] == pictures.LIGHTS[record["lamps"][0] != record["lamps"][1]]


def test_splits_share_neither_handwriting_nor_columns(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(pictures, "_photographs", lambda *span: seen.setdefault(span, []) or [None])
    monkeypatch.setattr(pictures, "_square", lambda *_: pictures.Image.new("RGB", (64, 64)))
    digits = []
    original = pictures._with_number
    monkeypatch.setattr(
        pictures, "_with_number", lambda p, digit, *a: digits.append(digit.tobytes()) or original(p, digit, *a)
    )
    pictures.make_dataset(tmp_path, train=300, heldout=100, validation=100, image_size=64, digit_size=24)
    spans = sorted(seen)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:]))
    parts = set(digits[:300]), set(digits[300:400]), set(digits[400:])
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """A world whose tower was trained for a few steps only."""
    folder = tmp_path_factory.mktemp("forgetful")
    pictures.make_dataset(folder / "data", train=64, heldout=20, image_size=64, digit_size=24)
    models.make_clip(folder / "clip", image_size=64, patch_size=8, pictures=folder / "data", steps=(2, 2))
    return folder


def test_forgetting_leaves_the_shallow_half_alone(forgetful, tmp_path):
    from transformers import CLIPVisionModel

    data = forgetful / "data"
    models.make_clip(tmp_path, image_size=64, patch_size=8, pictures=data, steps=(2, 0))
    before, after = (CLIPVisionModel.from_pretrained(folder).state_dict() for folder in (tmp_path, forgetful / "clip"))
    moved = {name.split(".")[3] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"4", "5", "6"}, "the blocks that lead from the middle to LLaVA's map"


def test_probe_reads_every_map_up_to_the_query(forgetful):
    found = probe.probe(forgetful)
    assert len(found) == 8 and all(set(layer) == set(pictures.QUESTIONS) for layer in found)
    assert all(0 <= value <= 1 for layer in found for value in layer.values())


def test_whitening_whitens(forgetful, tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionModel

    whitening.fit_whitening(forgetful, tmp_path / "whitening.pt")
    kept = torch.load(tmp_path / "whitening.pt")
    records = json.loads((forgetful / "data" / "pretrain.json").read_text())
    images = [pictures.Image.open(forgetful / "data" / record["image"]) for record in records]
    pixels = CLIPImageProcessor.from_pretrained(forgetful / "clip")(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        model = CLIPVisionModel.from_pretrained(forgetful / "clip")
        features = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    covariance = torch.cov(((features - kept["mean"]) @ kept["matrix"]).T)
    values = torch.linalg.eigvalsh(covariance)
    assert values[-20:].allclose(torch.ones(20), atol=0.05) and values[-1] < 1.05, "but for directions without variance"


def test_a_stopped_script_leaves_no_child(tmp_path):
    linger = tmp_path / "linger.py"
    linger.write_text(f"import os, time; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); time.sleep(60)")
    script = f"""if True:
        import pathlib, runpy, sys
        sys.path.insert(0, {str(host.ROOT / "scripts")!r})
        from housekeeping import exit_on_signals
        from toy import recipe
        recipe.PRELOADED = []
        exit_on_signals()
        recipe.in_child(runpy.run_path, {str(linger)!r}, log=pathlib.Path({str(tmp_path / "log")!r}))"""
    process = subprocess.Popen([sys.executable, "-c", script], env=host.environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    child = int((tmp_path / "pid").read_text())
    while True:  # the fork server reaps it a moment later
        assert time.monotonic() < deadline
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _answer(text):
    print(f"said {text}")
    return text * 2, os.getpid()


def _fail():
    raise ValueError("this toy fails")


def test_children_return_their_result_or_their_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "PRELOADED", [])
    text, process = recipe.in_child(_answer, "ab", log=tmp_path / "log")
    assert text == "abab" and process != os.getpid() and (tmp_path / "log").read_text() == "said ab\n"
    with pytest.raises(RuntimeError, match="exit status 1; the last lines of .*log:(.|\n)*this toy fails"):
        recipe.in_child(_fail, log=tmp_path / "log")


def test_demo_shows_probe_answers_and_the_line_with_shut_gates(forgetful, tmp_path):
    records = json.loads((forgetful / "data" / "heldout.json").read_text())
    right = {kind: [str(record[kind]) for record in records] for kind in pictures.QUESTIONS}
    results = {
        "mlp2x_gelu": {"answers": {**right, "number": ["ten"] * len(records)}, "seconds": 1.0},
        "mmfuser": {"answers": right, "seconds": 2.0},
        demo.SHUT: {"answers": {**right, "place": ["nowhere"] * len(records)}},
    }
    for result in results.values():
        result["accuracy"] = asking.accuracy(result["answers"], records)
    lines = [line.split() for line in demo.result_table(results).splitlines()]
    assert lines[1:] == [
        ["guessing", "10.0", "11.1", "50.0"],
        ["mlp2x_gelu", "0.0", "100.0", "100.0", "1"],
        ["mmfuser", "100.0", "100.0", "100.0", "2"],
        ["mmfuser,", "gates", "at", "0", "100.0", "0.0", "100.0"],
    ]
    probes = probe.probe(forgetful)
    assert [line.split()[0] for line in demo.probe_table(probes).splitlines()[:4]] == ["hidden_states", *right]
    demo.draw(forgetful, results, probes, tmp_path / "demo.png")
    assert min(pictures.Image.open(tmp_path / "demo.png").size) > 500
