"""scripts/study.py with made-up runs: what it tunes on and keeps. And the toy's own machinery."""

import contextlib
import json
import multiprocessing
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
import study_report
import torch
from toy import arm as toy_arm
from toy import asking, models, pictures, probe, recipe, whitening

# A run: on validation pictures mmfuser is better at the high rate and the query alone at the low one, on held-out
# pictures the other way round. Seed 7 fails; the mean waits for a file `gate` beside the study.
RUN = """
import json, os, sys, time
world, output, _, seed, _, *steps, _, device, _ = sys.argv[1:11]
flags, seed = sys.argv[11:], int(seed)
study = os.path.dirname(world)
assert os.listdir(output) == ["log.txt"], "a clean folder"
open(output + "/started", "w").write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
while "mean" in flags and not os.path.exists(study + "/gate"):
    time.sleep(0.02)
fast, helped = "0.01" in flags, "mmfuser" in flags
shares = {"validation": [int(fast == helped)] * 4, "heldout": [1 - int(fast == helped), int(helped), 0, 1]}
details = {
    "made": {"flags": flags, "seed": seed, "steps": list(map(int, steps)), "device": device},
    "losses": {"pretrain": [2.0] * 30, "finetune": [1.0] * 30 + [0.1] * 30},
    "gates": {"pretrain": [], "finetune": [0.2] * helped},
    "seconds": 1,
    "parameters": 5,
    "right": {split: dict.fromkeys(("number", "place", "light"), right) for split, right in shares.items()},
}
if seed == 7:
    sys.exit("ValueError: this run fails")
with open(output + "/details", "w") as file:
    json.dump(details, file)
os.replace(output + "/details", output + "/details.json")  # whole, as toy/arm.py
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The folder of a study whose world is made and whose runs are RUN."""
    script, folder = tmp_path / "run.py", tmp_path / "study"
    script.write_text(RUN)
    world = folder / "world"
    (world / toy_arm.RELEASED).mkdir(parents=True)
    (world / "probe.json").write_text(json.dumps([dict.fromkeys(study_report.KINDS, 0.25)] * 2))
    sizes = {**{name: default for name, (default, _) in study.SIZES.items()}, **study.SPLITS}
    (world / "world.json").write_text(json.dumps({**sizes, "seed": 0}))
    monkeypatch.setattr(study, "RUN", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(study, "exit_on_signals", lambda: None)
    return folder


def judge(folder, *given):
    return study.main(["--output", str(folder), *given])


def finished(folder):
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("runs/*/details.json")}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def is_free(folder):
    with contextlib.suppress(ValueError), housekeeping.locked(folder, "test"):
        return True
    return False


def test_rates_are_tuned_on_validation_pictures_only_and_runs_are_reused(made_up, capsys):
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "0", "1", "2") == 0
    made = finished(made_up)
    assert len(made) == 2 * 2 + 2 * 2, "both trials with the first seed, then two more seeds of the better one"
    assert {name for name in made if name.endswith("seed1")} == {
        "query-alone,-0.002-x-1-seed1",
        "mmfuser,-0.002-x-5-seed1",
    }, "though held-out pictures say the opposite"
    text = (made_up / "report.md").read_text()
    assert "the number falls by 0 points and the light by 0: the premise does not hold" in text
    assert "| number | 25 | 25 |" in text and "| mmfuser | 0.002 x 5 | 5 | 1 | 0.100 | 44 (3/3) | 0.200 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| mmfuser | 50.0"))
    assert row.split(" | ")[5].startswith("+25.0 ± "), "one of four questions more, in every seed"
    assert (made_up / "curves.png").stat().st_size > 10000
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "0", "1", "2") == 0
    assert finished(made_up) == made, "the same command again makes nothing"


def test_results_of_another_world_or_run_are_refused(made_up, monkeypatch, capsys):
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "1", "2") == 2
    assert "was made with the first seed 0, not 1; use that, or give another --output" in capsys.readouterr().err
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "0") == 0
    made = finished(made_up)
    monkeypatch.setattr(study, "STEPS", {"pretrain_steps": (1, ""), "finetune_steps": (250, "")})
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "0") == 2
    assert "not of {'flags': [" in capsys.readouterr().err and finished(made_up) == made


def test_a_failed_run_stops_no_other_and_is_made_again(made_up, tmp_path, capsys):
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "0", "7") == 2
    error = capsys.readouterr().err
    assert "2 of 2 runs failed; the same command makes them again: " in error
    assert "this run fails" in (made_up / "runs" / "mmfuser,-0.002-x-5-seed7" / "log.txt").read_text()
    assert len(finished(made_up)) == 4 and not (made_up / "report.md").exists()
    (tmp_path / "run.py").write_text(RUN.replace("sys.exit", "bool"))
    assert judge(made_up, "--arms", "mmfuser", "--seeds", "0", "7") == 0


def test_arms_are_chosen_by_name_by_table_or_are_ones_own(made_up, capsys):
    def chosen(*given):
        options = dict(arms=[], tables=[], own=[], quick=False)
        return list(study.chosen(study.argparse.Namespace(**{**options, **dict(given)})))

    assert chosen() == list(study.ARMS) and "dense" not in chosen(("quick", True))
    assert chosen(("tables", ["modules"])) == [study.BASELINE, "mmfuser", "cross-attention only"]
    assert chosen(("arms", ["released, with mmfuser"])) == [
        study.BASELINE,
        study.FINETUNED_ON,
        "released, with mmfuser",
    ]
    assert (
        judge(made_up, "--own", "wide: --mm_projector_type mmfuser --mm_fuser_num_points 8", "--seeds", "0", "1") == 0
    )
    assert "**Your own** (+: compared with query alone)" in (made_up / "report.md").read_text()
    assert judge(made_up, "--own", "--mm_fuser_num_points 8") == judge(made_up, "--own", "mmfuser: ") == 2
    assert capsys.readouterr().err.count('write "NAME: FLAGS", with a name that no other arm has') == 2


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_study_goes_on(made_up, capsys, number, status):
    given = ["--arms", "mean", "--seeds", "0", "--jobs", "4"]

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's tests ignore it
        study.exit_on_signals = housekeeping.exit_on_signals
        sys.exit(judge(made_up, *given))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    started = made_up / "runs" / "mean,-0.002-x-1-seed0" / "started"
    wait_for(lambda: len(finished(made_up)) == 2 and started.exists() and started.read_text())
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == status
    first = finished(made_up)
    if number == signal.SIGKILL:  # nobody could stop the children, so nobody else may use their folders
        assert judge(made_up, *given) == 2
        assert "is in use by another study.py, or by a run that one left behind" in capsys.readouterr().err
        for file in made_up.glob("runs/mean*/started"):
            os.kill(int(file.read_text().split()[0]), signal.SIGKILL)
        wait_for(lambda: is_free(made_up))
    assert is_free(made_up), "the children were stopped, too: they hold the lock while they live"
    (made_up / "gate").touch()
    assert judge(made_up, *given) == 0
    assert {name: finished(made_up)[name] for name in first} == first, "what was done is kept"


def run_of(folder, command):
    return study.Run("one", {}, list(command), folder / "one")


def test_gpus_are_shared_by_a_queue(made_up):
    (made_up / "gate").touch()
    made = study.Study(made_up, (0,), study.ARMS, ["5", "6,7"])
    runs = [made.run(study.BASELINE, study.TRIALS[0], seed) for seed in (0, 1, 2)]
    with housekeeping.locked(made_up, "test") as lock:
        study.run_all(runs, made.gpus, lock)
    seen = [(run.folder / "started").read_text().split()[1] for run in runs]
    assert seen[:2] == ["5", "6,7"] and seen[2] in seen[:2]
    assert all("--device cuda" in " ".join(run.command) for run in runs)


def test_runs_that_do_not_stop_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(housekeeping, "GRACE", 0.2)
    up = tmp_path / "one" / "up"
    monkeypatch.setattr(study.time, "sleep", lambda _: study.sys.exit(3) if up.exists() else None)
    run = run_of(tmp_path, ["bash", "-c", f"trap '' TERM; touch {up}; while :; do sleep 0.1; done"])
    with housekeeping.locked(tmp_path, "test") as lock, pytest.raises(SystemExit):
        study.run_all([run], [None], lock)
    monkeypatch.undo()
    wait_for(lambda: is_free(tmp_path))


def test_an_interrupt_while_a_run_starts_ends_it(tmp_path, interrupted_start):
    with housekeeping.locked(tmp_path, "test") as lock, pytest.raises(KeyboardInterrupt):
        study.run_all([run_of(tmp_path, ["sleep", "60"])], [None], lock)
    assert interrupted_start[0].wait(5) == -signal.SIGTERM


def test_the_pages_lines_compare_own_runs_seed_by_seed(tmp_path, monkeypatch, capsys):
    for setting, seed, loss in (("deformable", 1, 1), ("deformable", 2, 2), ("dense", 1, 3), ("dense", 2, 8)):
        folder = tmp_path / "mine" / f"{setting}-seed{seed}"
        folder.mkdir(parents=True)
        history = [{"loss": 99.0}, *[{"loss": float(loss)}] * 10, {"train_runtime": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = (host.ROOT / "docs" / "ablations.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "+4.000 ± 2.828\n", "3 - 1 and 8 - 2"


@pytest.mark.slow
@pytest.mark.fp16_cpu
def test_a_study_makes_its_world_and_arms_that_only_the_toy_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SIZES", {**dict.fromkeys(study.SIZES, (1, "")), "pictures": (32, "")})
    monkeypatch.setattr(study, "SPLITS", {"validation": 4, "heldout": 4})
    monkeypatch.setattr(study, "STEPS", {"pretrain_steps": (1, ""), "finetune_steps": (1, "")})
    names = study.BASELINE, "query, whitened", "released, with mmfuser"
    made = study.Study(tmp_path, [3], {name: study.ARMS[name] for name in names}, [None, None])
    with housekeeping.locked(tmp_path, "test") as lock:
        made.prepare(lock)
        assert len(json.loads((made.world / "probe.json").read_text())) == 8
        released = (made.world / toy_arm.RELEASED / "config.json").read_bytes()
        made.prepare(lock)  # again: nothing is left to do
        runs = [made.run(name, study.TRIALS[0], 3) for name in names]
        study.run_all(runs, made.gpus, lock)
    assert (made.world / toy_arm.RELEASED / "config.json").read_bytes() == released
    plain, whitened, fused = (run.details() for run in runs)
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
    settings = [study.setting(name, arm, trial) for name, arm in study.ARMS.items() for trial in study.TRIALS]
    assert len({flags for _, flags in settings}) == len(settings), "no two arms or trials are the same"
    for name, arm in study.ARMS.items():
        own = {flag for flag in study.setting(name, arm, study.TRIALS[1])[1] if flag.endswith("_lr")}
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
    monkeypatch.setattr(pictures, "photographs", lambda *span: seen.setdefault(span, []) or [None])
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
