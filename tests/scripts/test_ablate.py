"""scripts/ablate.py: settings and names, the queue with a stub for a command, the arithmetic, one run on the toy."""

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import host
import housekeeping
import pytest
from ablation import command as ablate
from ablation import report, runs, toy_run

SCRIPT = host.ROOT / "scripts" / "ablate.py"
# Writes what train.py writes. Flags: --value V, --fail, --bad METRICS.JSON, --gate FILE waits until FILE is there.
STUB = """
import json, os, sys, time
output, seed, *flags = sys.argv[1:]
assert os.listdir(output) == [], "a clean folder"
def mark(name):
    with open(os.path.join(output, name), "w") as file:
        file.write(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
with open(os.path.join(output, "pid"), "w") as file:
    print(os.getpid(), file=file)
mark("started")
if "--gate" in flags:
    deadline = time.monotonic() + 60
    while not os.path.exists(flags[flags.index("--gate") + 1]):
        time.sleep(0.02)
        assert time.monotonic() < deadline, "the gate stays closed"
if "--fail" in flags:
    sys.exit("ValueError: this stub fails")
value = float(flags[flags.index("--value") + 1]) if "--value" in flags else 1.0
with open(os.path.join(output, "trainer_state.json"), "w") as file:
    json.dump({"log_history": [{"loss": 99.0}] + 10 * [{"loss": value + int(seed)}] + [{"train_runtime": 1.0}]}, file)
with open(os.path.join(output, "metrics.json"), "w") as file:
    file.write(flags[flags.index("--bad") + 1] if "--bad" in flags else json.dumps({"score": value * (1 + int(seed))}))
"""
TWO = ["--settings", "one: --value 1", "two: --value 2"]


@pytest.fixture
def stub(tmp_path):
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    return ["--", sys.executable, "-S", str(file), "{output}", "{seed}", "{flags}"]


@pytest.fixture(autouse=True)
def signals():
    """main() takes over SIGTERM and SIGHUP."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_of(root, setting, seed):
    return root / "runs" / f"llava-{setting}-seed{seed}"


def record(root, setting, seed):
    return json.loads(run_of(root, setting, seed).with_suffix(".json").read_text())


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def settings_of(*arguments):
    return ablate.collect_settings(ablate.parse_arguments(["--output", "x", *arguments])[0])


def test_grid_is_every_combination_named_by_its_values():
    settings = settings_of("--grid", "mm_fuser_layers", "3,23", "uniform", "--grid", "mm_x", "True", "a/b")
    assert settings == {
        "layers=3,23+x=True": ("--mm_fuser_layers", "3,23", "--mm_x", "True"),
        "layers=3,23+x=a/b": ("--mm_fuser_layers", "3,23", "--mm_x", "a/b"),
        "layers=uniform+x=True": ("--mm_fuser_layers", "uniform", "--mm_x", "True"),
        "layers=uniform+x=a/b": ("--mm_fuser_layers", "uniform", "--mm_x", "a/b"),
    }
    assert ablate.folder_name("layers=3,23+x=a/b") == "llava-layers=3,23+x=a-b"


def test_settings_come_before_presets_and_grids():
    presets = ["--preset", "modules", "--preset", "attention"]
    settings = settings_of("--grid", "mm_y", "1", *presets, "--settings", 'wide:--a "b c"  -d')
    assert list(settings) == [
        "wide", "mlp2x_gelu", "cross", "cross+self", "deformable", "dense", "window", "y=1",
    ]  # fmt: skip
    assert settings["wide"] == ("--a", "b c", "-d")
    assert settings["cross"] == ("--mm_projector_type", "mmfuser", "--mm_fuser_self_attention", "False")


def test_presets_agree_on_the_settings_they_share():
    shared = {}
    for preset in ablate.PRESETS.values():
        assert next(iter(preset)) == "mlp2x_gelu", "the baseline"
        for name, flags in preset.items():
            assert shared.setdefault(name, flags) == flags
            assert ablate.folder_name(name) == f"llava-{name}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is nothing to compare"),
        (["--settings", "--mm_x 1"], "has no name"),
        (["--settings", "a: 'b"], '--settings "a: \'b" is not quoted as in a shell'),
        (["--settings", "a: 1", "a: 2"], "'a' and 'a' have the same folder name"),
        (["--settings", "a/b: 1", "a b: 2"], "'a/b' and 'a b' have the same folder name"),
        (["--grid", "mm_x", "1", "1"], "'x=1' and 'x=1' have the same folder name"),
        (["--grid", "mm_x=1,2"], "write --grid mm_fuser_attention deformable dense"),
        ([*TWO, "--seeds", "1", "1"], "--seeds 1 1 has a seed twice"),
        ([*TWO, "--", "no-such-command", "{flags}"], "no-such-command: there is no such command"),
        ([*TWO, "--read-steps", "5", "--", "true"], "--read-steps 5 is a size of the demo"),
        ([*TWO, "--", "true", "{seed}", "{output}"], "no {flags}"),
        ([*TWO, "--", "true", "{flags}", "{output}"], "no {seed}"),
        ([*TWO, "--", "true", "{flags}", "{seed}"], "no {output}"),
    ],
)
def test_what_cannot_work_is_refused_first(tmp_path, capsys, arguments, message):
    assert ablate.main(["--output", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ablate: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named_first(tmp_path, capsys, monkeypatch, stub):
    monkeypatch.setattr(toy_run, "NEEDED", ("llava", "no_such_package"))
    assert ablate.main(["--output", str(tmp_path / "new"), *TWO]) == 2
    assert "has no no_such_package; install what is missing" in capsys.readouterr().err
    assert ablate.main(["--output", str(tmp_path / "new"), *TWO, "--dry-run", *stub]) == 0, "not needed here"


def test_placeholders():
    template = ("bash", "{flags}", "-c", "run {flags} {seed} ${HOME} {x}", "--dir={output}", "{name}:{port}")
    run = ablate.Run("s", ("--a", "b {seed}"), 7, template, ablate.Path("/o"))
    assert run.command(29) == [
        "bash", "--a", "b {seed}", "-c", "run --a 'b {seed}' 7 ${HOME} {x}", "--dir=/o", "s:29",
    ]  # fmt: skip


def test_dry_run_prints_commands_and_writes_nothing(tmp_path, capsys, stub):
    assert ablate.main(["--output", str(tmp_path / "out"), *TWO, "--seeds", "4", "--dry-run", *stub]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# one, seed 4: to run" and lines[1].endswith("llava-one-seed4 4 --value 1") and len(lines) == 4
    assert not (tmp_path / "out").exists()


def test_runs_are_recorded_and_skipped_when_done(tmp_path, capsys, stub):
    command = ["--output", str(tmp_path), *TWO, "--seeds", "0", "2", *stub]
    assert ablate.main(command) == 0
    first = record(tmp_path, "two", 2)
    assert first["status"] == "done" and first["flags"] == ["--value", "2"] and first["seed"] == 2
    assert first["metrics"] == {"loss": 4.0, "score": 6.0} and first["seconds"] > 0
    assert first["ran"][-4:] == [str(run_of(tmp_path, "two", 2)), "2", "--value", "2"]
    assert first["versions"]["torch"] == importlib.metadata.version("torch")
    order = [run_of(tmp_path, name, seed) / "started" for seed in (0, 2) for name in ("one", "two")]
    assert order == sorted(order, key=lambda file: file.stat().st_mtime_ns), "first every setting with the first seed"
    for file in ("table.txt", "results.json", "results.csv", "ablation.png"):
        (tmp_path / file).unlink()
    capsys.readouterr()
    assert ablate.main([*command[:5], "--seeds", "0", "2", "3", *stub]) == 0, "a seed more"
    output = capsys.readouterr().out
    assert "2 settings x 3 seeds: 4 done, 2 to run" in output and output.count("started ") == 2
    assert record(tmp_path, "two", 2) == first
    assert (tmp_path / "table.txt").read_text() in output
    assert (tmp_path / "results.csv").read_text().splitlines()[:2] == [
        "setting,seed,status,seconds,loss,score",
        f"one,0,done,{record(tmp_path, 'one', 0)['seconds']},1.0,1.0",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["baseline"] == "one" and results["settings"] == {"one": ["--value", "1"], "two": ["--value", "2"]}
    assert len(results["runs"]) == 6 and results["summary"][1]["values"] == {"0": 2.0, "2": 4.0, "3": 5.0}


def test_finished_runs_of_another_command_are_refused(tmp_path, capsys, stub):
    one = ["--output", str(tmp_path), "--seeds", "0", "--settings"]
    assert ablate.main([*one, "one: --value 1", *stub]) == 0
    before = record(tmp_path, "one", 0)
    capsys.readouterr()
    for changed in ([*one, "one: --value 5", *stub], [*one, "one: --value 1", *stub, "--more"]):
        assert ablate.main(changed) == 2
        error = capsys.readouterr().err
        assert "llava-one-seed0.json is the result of another run: " in error and error.count("\n") == 1
        assert ("flags --value 1 (now --value 5)" in error) != ("--more" in error)
    assert record(tmp_path, "one", 0) == before
    run_of(tmp_path, "foreign", 0).mkdir()
    assert ablate.main([*one, "foreign: --value 1", *stub]) == 2
    assert "so it is not from here" in capsys.readouterr().err and run_of(tmp_path, "foreign", 0).exists()


def test_a_failing_run_stops_nothing_and_is_made_again(tmp_path, capsys, stub):
    settings = ["bad: --fail", """text: --bad '{"score": "high"}'""", "one: --value 1"]
    command = ["--output", str(tmp_path), "--seeds", "0", "--settings", *settings, *stub]
    assert ablate.main(command) == 1
    output = capsys.readouterr().out
    log = run_of(tmp_path, "bad", 0).with_suffix(".log")
    assert f"Failed: bad, seed 0: exit status 1; {log}" in output
    assert f"failed   bad, seed 0: exit status 1: ValueError: this stub fails; {log}" in output
    assert "metrics.json is not of the form {name: number, …}" in record(tmp_path, "text", 0)["problem"]
    assert record(tmp_path, "one", 0)["status"] == "done"
    rows = {row["setting"]: row for row in json.loads((tmp_path / "results.json").read_text())["summary"]}
    assert rows["bad"]["n"] == rows["text"]["n"] == 0 and rows["one"]["n"] == 1
    assert rows["one"]["difference"] is None, "there is no baseline"
    assert ablate.main([*command[:4], "--settings", "bad: --value 3", *stub]) == 0, "a failed setting may be changed"
    assert record(tmp_path, "bad", 0)["metrics"]["score"] == 3


def test_a_run_without_metrics_is_not_done(tmp_path, capsys):
    command = ["--output", str(tmp_path), "--settings", "a:", "--seeds", "0", "--", "true", "{output}"]
    assert ablate.main(command) == 1
    assert "left neither a metrics.json nor a trainer_state.json with a loss" in capsys.readouterr().out
    assert not (tmp_path / "ablation.png").exists()


def test_gpus_are_shared_by_a_queue(tmp_path, stub):
    """Both of the first two must have started before either may end; the third gets the one that is free first."""
    gate = tmp_path / "gate"
    settings = [f"a: --gate {gate}", f"b: --gate {tmp_path / 'never'}", "c:"]
    command = [sys.executable, SCRIPT, "--output", tmp_path, "--seeds", "0", "--gpus", "5", "6,7", "--settings"]
    process = subprocess.Popen([*map(str, command), *settings, *stub], start_new_session=True)
    try:
        wait_for(lambda: all((run_of(tmp_path, name, 0) / "started").exists() for name in "ab"))
        assert not run_of(tmp_path, "c", 0).exists()
        gate.touch()
        wait_for(lambda: (run_of(tmp_path, "c", 0) / "metrics.json").exists())
        (tmp_path / "never").touch()
        assert process.wait(30) == 0
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    seen = [(run_of(tmp_path, name, 0) / "started").read_text() for name in "abc"]
    assert seen == ["5", "6,7", "5"] and [record(tmp_path, name, 0)["gpu"] for name in "abc"] == seen


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_ablation_goes_on(tmp_path, capsys, stub, number, status):
    gate = tmp_path / "gate"
    command = ["--output", str(tmp_path), "--seeds", "0", "--settings", "one: --value 1", f"slow: --gate {gate}", *stub]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *command], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run_of(tmp_path, "slow", 0) / "started").exists())
    process.send_signal(number)
    assert process.wait(30) == status
    first = record(tmp_path, "one", 0)
    assert first["status"] == "done" and record(tmp_path, "slow", 0)["status"] == "running"
    table = (tmp_path / "table.txt").read_text()
    assert table.endswith("Not run yet: 1 of 2.\n") and "one" in table
    if number == signal.SIGKILL:  # nobody could stop the child, so nobody else may use its folder
        assert not is_free(tmp_path)
        assert ablate.main(command) == 2
        assert "is in use by another ablate.py, or by a run that one left behind" in capsys.readouterr().err
        os.kill(int((run_of(tmp_path, "slow", 0) / "pid").read_text()), signal.SIGKILL)
        wait_for(lambda: is_free(tmp_path))
    assert is_free(tmp_path), "the child was stopped, too: it holds the lock while it lives"
    gate.touch()
    (run_of(tmp_path, "slow", 0) / "metrics.json").write_text('{"score": -1}')  # half a result
    assert ablate.main(command) == 0
    assert record(tmp_path, "one", 0) == first and record(tmp_path, "slow", 0)["metrics"]["score"] == 1


def test_runs_that_do_not_stop_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(housekeeping, "GRACE", 0.2)
    script = "trap '' TERM; touch {output}/up; while :; do sleep 0.1; done"
    run = runs.Run("deaf", (), 0, ("bash", "-c", script), tmp_path / "deaf")

    def started(*_):
        wait_for((tmp_path / "deaf" / "up").exists)
        raise KeyboardInterrupt

    with housekeeping.locked(tmp_path, "test") as lock, pytest.raises(KeyboardInterrupt):
        runs.run_all([run], [None], lock, started, lambda *_: None)
    wait_for(lambda: is_free(tmp_path))


def test_an_interrupt_while_a_run_starts_ends_it(tmp_path, interrupted_start):
    run = runs.Run("one", (), 0, ("sleep", "60"), tmp_path / "one")
    with housekeeping.locked(tmp_path, "test") as lock, pytest.raises(KeyboardInterrupt):
        runs.run_all([run], [None], lock, lambda *_: None, lambda *_: None)
    assert interrupted_start[0].wait(5) == -signal.SIGTERM


def is_free(root):
    with contextlib.suppress(ValueError), housekeeping.locked(root, "test"):
        return True
    return False


def finished(setting, seed, **metrics):
    versions = {"torch": "2"}
    return dict(setting=setting, seed=seed, status="done", seconds=10.0 * seed, metrics=metrics, versions=versions)


def test_mean_spread_and_difference():
    records = [finished("a", seed, x=value) for seed, value in ((1, 1.0), (2, 2.0), (3, 6.0))]
    records += [finished("b", 1, x=3.0), finished("b", 3, x=10.0), finished("c", 2, y=7)]
    records.append(dict(setting="c", seed=3, status="failed", metrics={}, problem="exit status 9", log="c.log"))
    rows = report.summarise(records, ["a", "b", "c"], ["x", "seconds"])
    a, b, c, *seconds = rows
    assert (a["n"], a["mean"], a["difference"]) == (3, 3.0, None)
    assert a["deviation"] == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert (b["n"], b["mean"], b["difference"]) == (2, 6.5, 3.0)  # seeds 1 and 3: 3 - 1 and 10 - 6
    assert b["difference_deviation"] == pytest.approx(2**0.5)
    assert (c["n"], c["mean"], c["deviation"], c["difference"]) == (0, None, None, None)
    assert [row["mean"] for row in seconds] == [20.0, 20.0, 20.0] and seconds[2]["deviation"] is None
    lines = report.table(rows, records, ["a", "b", "c"]).splitlines()
    assert lines[0].split() == ["x", "n", "mean", "±", "sd", "difference", "to", "a"]
    assert lines[2].split() == ["b", "2", "6.500", "±", "4.950", "+3.000", "±", "1.414"]
    assert lines[3].split() == ["c", "0"]
    assert lines[8].split() == ["c", "1", "20.0", "+0.0"]
    assert lines[-1] == "Failed: c, seed 3: exit status 9; c.log"


def test_different_versions_are_pointed_out():
    records = [finished("a", 0, x=1.0), finished("a", 1, x=1.0)]
    assert "Careful" not in report.table([], records, ["a"])
    records[1]["versions"] = {"torch": "3"}
    assert "different versions of torch (2, 3)" in report.table([], records, ["a"])


@pytest.mark.parametrize("value", [0.0, 1e9, float("nan"), float("inf")])
def test_plot_is_drawn_whatever_the_values(tmp_path, value):
    from PIL import Image

    records = [finished(setting, seed, x=value, y=seed + 0.5) for setting in "ab" for seed in (0, 1)]
    rows = report.summarise(records, ["a", "b", "missing"], ["x", "y"])
    report.draw(rows, ["a", "b", "missing"], tmp_path / "plot.png")
    picture = Image.open(tmp_path / "plot.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(2**20)}
    assert picture.width > picture.height > 100 and (31, 119, 180) in colours, "tab:blue of the second setting"


def test_world_of_other_sizes_is_refused(tmp_path, capsys):
    (tmp_path / "world").mkdir()
    sizes = {name: default for name, (default, _) in toy_run.WORLD.items()}
    (tmp_path / "world" / "world.json").write_text(json.dumps({**sizes, "heldout": 9}))
    assert ablate.main(["--output", str(tmp_path), *TWO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"--heldout 400: {tmp_path / 'world'} was made with --heldout 9; use that, or give another" in error


def test_the_fuser_has_the_toys_rate_where_it_has_weights_and_none_is_given():
    own = ["--mm_fuser_lr", "0.01"]
    assert toy_run.own_rate([]) == toy_run.own_rate(["--mm_fuser_fusion", "weighted_sum"]) == own
    assert toy_run.own_rate(["--mm_projector_type=mlp2x_gelu"]) == toy_run.own_rate(["--mm_fuser_fusion", "mean"]) == []
    assert toy_run.own_rate(["--mm_fuser_lr", "3"]) == []


@pytest.mark.fp16_cpu
def test_toy_trains_and_answers_with_the_flags(tmp_path):
    sizes = "--pictures 16 --heldout 1 --read-steps 0 --forget-steps 0 --llama-steps 0".split()
    sizes += "--pretrain-steps 2 --finetune-steps 1".split()
    command = [sys.executable, SCRIPT, "--output", tmp_path, "--seeds", "3", "--grid", "mm_fuser_num_points", "2"]
    done = host.run([*command, *sizes], check=False)
    assert done.returncode == 0, done.stdout + run_of(tmp_path, "num_points=2", 3).with_suffix(".log").read_text()
    metrics = record(tmp_path, "num_points=2", 3)["metrics"]
    shares = [f"{kind} right (%)" for kind in ("number", "place", "light")]
    assert list(metrics) == ["pretrain loss", "finetune loss", "cross gate", *shares]
    assert metrics["pretrain loss"] > 1 and 0 <= metrics["place right (%)"] <= 100
    config = json.loads((run_of(tmp_path, "num_points=2", 3) / "llava-finetune" / "config.json").read_text())
    assert config["mm_fuser_num_points"] == 2 and metrics["cross gate"] > 0
    again = host.run([*command, *sizes])
    assert "1 settings x 1 seeds: 1 done, 0 to run" in again.stdout and "world" not in again.stdout
