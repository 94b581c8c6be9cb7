"""scripts/study.py without training: what it tunes on, what it keeps, its arithmetic. And the toy's own machinery."""

import json
import os
import signal
import subprocess
import sys
import time

import demo
import host
import housekeeping
import numpy as np
import pytest
import study
import torch
from ablation import study_report, toy_run
from toy import asking, models, pictures, probe, recipe, whitening

DETAILS = """
import json, sys
output, seed, *flags = sys.argv[1:]
fast, helped = "0.01" in flags, "mmfuser" in flags
shares = {"validation": [int(fast == helped)] * 4, "heldout": [1 - int(fast == helped), int(helped), 0, 1]}
details = {
    "losses": {"pretrain": [2.0] * 30, "finetune": [1.0] * 30 + [0.1] * 30},
    "gates": {"pretrain": [], "finetune": [0.2] * helped},
    "seconds": 1,
    "parameters": 5,
    "right": {split: dict.fromkeys(("number", "place", "light"), right) for split, right in shares.items()},
}
json.dump(details, open(output + "/details.json", "w"))
json.dump({"score": 1}, open(output + "/metrics.json", "w"))
sys.exit(int(seed) == 7)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """`main` on two arms and a toy whose runs are DETAILS: on validation pictures mmfuser is better at the high rate
    and the query alone at the low one, on held-out pictures the other way round."""
    script = tmp_path / "details.py"
    script.write_text(DETAILS)
    world = tmp_path / "study" / "world"
    (world / toy_run.RELEASED).mkdir(parents=True)
    probes = [dict.fromkeys(study_report.KINDS, 0.25)] * 2
    (world / "probe.json").write_text(json.dumps(probes))
    sizes = {**{name: default for name, (default, _) in toy_run.WORLD.items()}, **study.SPLITS}
    (world / "world.json").write_text(json.dumps({**sizes, "seed": 0}))
    command = [sys.executable, "-S", str(script), "{output}", "{seed}", "{flags}"]
    monkeypatch.setattr(toy_run, "run_command", lambda *_: command)
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(study, "exit_on_signals", lambda: None)
    return lambda *given: study.main(["--output", str(tmp_path / "study"), "--arms", "mmfuser", *given])


def runs_below(folder):
    return {file.stem: file.stat().st_mtime_ns for file in (folder / "runs").glob("*.json")}


def test_rates_are_tuned_on_validation_pictures_only_and_runs_are_reused(made_up, tmp_path, capsys):
    assert made_up("--seeds", "0", "1", "2") == 0
    made = runs_below(tmp_path / "study")
    assert len(made) == 2 * 2 + 2 * 2, "both trials with the first seed, then two more seeds of the better one"
    assert {name for name in made if name.endswith("seed1")} == {
        "llava-query-alone,-0.002-x-1-seed1",
        "llava-mmfuser,-0.002-x-5-seed1",
    }, "though held-out pictures say the opposite"
    text = (tmp_path / "study" / "report.md").read_text()
    assert "the number falls by 0 points and the light by 0: the premise does not hold" in text
    assert "| number | 25 | 25 |" in text and "| mmfuser | 0.002 x 5 | 5 | 1 | 0.100 | 44 (3/3) | 0.200 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| mmfuser | 50.0"))
    assert row.split(" | ")[5].startswith("+25.0 ± "), "one of four questions more, in every seed"
    assert (tmp_path / "study" / "curves.png").stat().st_size > 10000
    assert made_up("--seeds", "0", "1", "2") == 0
    assert runs_below(tmp_path / "study") == made, "the same command again makes nothing"
    assert made_up("--seeds", "1", "2") == 2
    assert "was made with the first seed 0; begin with it, or give another --output" in capsys.readouterr().err


def test_a_failed_run_is_named_and_made_again(made_up, tmp_path, capsys):
    assert made_up("--seeds", "0", "7") == 2
    assert "2 of 2 runs failed; the same command makes them again: " in capsys.readouterr().err
    assert not (tmp_path / "study" / "report.md").exists()
    (tmp_path / "details.py").write_text(DETAILS.replace("sys.exit", "bool"))
    assert made_up("--seeds", "0", "7") == 0


@pytest.mark.slow
@pytest.mark.fp16_cpu
def test_a_study_makes_its_world_and_arms_that_only_the_toy_knows(tmp_path, monkeypatch):
    sizes = {**dict.fromkeys(toy_run.WORLD, (1, "")), "pictures": (32, "")}
    monkeypatch.setattr(toy_run, "WORLD", sizes)
    monkeypatch.setattr(study, "SPLITS", {"validation": 4, "heldout": 4})
    monkeypatch.setattr(study, "STEPS", {"pretrain_steps": 1, "finetune_steps": 1})
    monkeypatch.setattr(os, "environ", {**os.environ})
    (tmp_path / "runs").mkdir()
    arms = study.BASELINE, "query, whitened", "released, with mmfuser"
    made = study.Study(tmp_path, [3], arms, [None, None])
    with housekeeping.locked(tmp_path, "test") as lock:
        made.prepare(lock)
        assert len(json.loads((made.world / "probe.json").read_text())) == 8
        released = (made.world / toy_run.RELEASED / "config.json").read_bytes()
        made.prepare(lock)  # again: nothing is left to do
        runs = [made.run(arm, study.TRIALS[0], 3) for arm in arms]
        made.make(runs, lock)
    assert (made.world / toy_run.RELEASED / "config.json").read_bytes() == released
    plain, whitened, fused = (study.details(run) for run in runs)
    assert list(fused["losses"]) == ["finetune"] and len(fused["losses"]["finetune"]) == 2, (
        "as many steps as the others"
    )
    assert whitened["losses"] != plain["losses"] and not (runs[0].folder / "llava-finetune").exists()
    assert all(len(found["right"]["heldout"]["number"]) == 4 for found in (plain, whitened, fused))


def test_seeds_are_used_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--output", str(tmp_path / "study"), "--seeds", "0", "1", "1"])
    assert "--seeds 0 1 1 has a seed twice; use each once" in capsys.readouterr().err


def test_runs_are_spread_over_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert study.places(None) == ["4", "5", "4", "5"] and study.places(1) == ["4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert study.places(3) == ["0", "1", "0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert study.places(3) == [None] * 3


def test_no_two_study_arms_are_the_same():
    tables = {table for arm in study.ARMS.values() for table in arm.tables}
    assert {"fusions", "layer sets", "attention kinds", "modules"} < tables
    for table in tables:  # a report compares a table's arms with one
        assert len({arm.against for arm in study.ARMS.values() if table in arm.tables}) == 1
    flags = [study.setting(arm, trial)[1] for arm in study.ARMS for trial in study.TRIALS]
    assert len(set(flags)) == len(flags), "no two arms or trials are the same"
    for name, arm in study.ARMS.items():
        own = {flag for flag in study.setting(name, study.TRIALS[1])[1] if flag.endswith("_lr")}
        weightless = "mlp" in arm.flags or name == "mean"
        assert own == {"--mm_projector_lr" if weightless else "--mm_fuser_lr"}, name


def test_intervals_are_paired_and_cover_seeds_and_questions():
    same = np.tile([[1, 0, 1, 0]], (3, 1))
    assert study_report.interval(same - same) == (0, 0)
    mean, half = study_report.interval(np.array([[1] * 50, [0] * 50]))
    assert mean == 0.5 and half > 0.5, "two seeds that disagree leave everything open"
    random = np.random.RandomState(0)
    hits = 0
    for _ in range(200):  # three seeds that differ by 0.1, 100 questions that differ by 0.2, around 0.5
        seeds, questions = 0.1 * random.randn(3, 1), 0.2 * random.randn(1, 100)
        mean, half = study_report.interval((random.rand(3, 100) < 0.5 + seeds + questions).astype(float))
        hits += abs(mean - 0.5) <= half
    assert 184 <= hits <= 198, "about 95 in 100"


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
