"""Runs that are forked from a warm interpreter are as good as fresh processes."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import host
import pytest
import warm

MODULES = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(*sys.modules, sep="\\n")
"""
STATE = "import os, sys, torch; print(*sys.modules, torch.initial_seed(), os.environ.get('RANK'), sep='\\n')"


def lines(command, **variables):
    return host.run(command, env=host.environment(**variables)).stdout.splitlines()


def test_warm_interpreter_has_imported_nothing_that_train_py_would_not(world, tmp_path):
    afresh = {"PYTHONNOUSERSITE": "1"}  # any variable that is not the usual one
    fresh = lines([sys.executable, "-c", MODULES, host.train_py(), *host.train_arguments(world, tmp_path)], **afresh)
    forked = lines([sys.executable, "-c", STATE])[:-2]
    assert set(warm.LIBRARIES) <= set(forked) and not set(forked) - {"numpy.random.mtrand"} - set(fresh)
    bare = lines([sys.executable, "-c", "import sys; print(*sys.modules, sep='\\n')"], **afresh)
    ours = {name for name in bare if name.startswith("llava")}
    assert ours == {name for name in forked if name.startswith("llava")}, "the hook and nothing else"


def test_each_fork_draws_its_own_seeds_and_has_its_own_variables():
    first, second = (lines([sys.executable, "-c", STATE], RANK=rank)[-2:] for rank in "01")
    assert first[0] != second[0] and [first[1], second[1]] == ["0", "1"]


@pytest.mark.parametrize(
    "options,variables",
    [(["-S"], {}), (["-m", "json"], {}), ([], {"PYTHONPATH": "{folder}"}), ([], {"HF_HUB_OFFLINE": "0"})],
)
def test_what_a_fork_cannot_be_starts_afresh(tmp_path, options, variables):
    (tmp_path / "sitecustomize.py").touch()
    command = [sys.executable, *options, "-c", "pass"]
    variables = {name: value.format(folder=tmp_path) for name, value in variables.items()}
    assert not warm.runs(command, host.environment(**variables), host.USUAL)


@pytest.mark.parametrize("fresh", [True, False])
def test_modules_run_with_their_folder_before_what_is_installed(tmp_path, fresh):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").touch()
    (tmp_path / "llava" / "own.py").write_text(
        "import llava, os, sys\nassert sys.modules['__main__'].__dict__ is globals()\n"
        "print(__name__, sys.argv, os.path.dirname(llava.__file__), sys.path[:2])"
    )
    env = host.environment(PYTHONPATH=str(tmp_path), **({"PYTHONNOUSERSITE": "1"} if fresh else {}))
    command = [sys.executable, "-m", "llava.own", "a b"]
    assert warm.runs(command, env, host.USUAL) != fresh
    file = tmp_path / "llava" / "own.py"
    printed = f"__main__ {[str(file), 'a b']} {file.parent} {[os.getcwd(), str(tmp_path)]}"
    assert host.run(command, env=env).stdout.splitlines() == [printed]


@pytest.mark.parametrize("disabled", [None, "1"])
def test_hook_follows_the_variable(disabled):
    code = "import sys; print(any('mmfuser' in type(finder).__module__ for finder in sys.meta_path))"
    assert lines([sys.executable, "-c", code], LLAVA_MMFUSER_DISABLE=disabled) == [str(not disabled)]


def test_script_is_main_with_its_arguments_folder_and_output(tmp_path):
    (tmp_path / "neighbour.py").write_text("name = 'found'")
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, neighbour, os, pickle, sys\nclass Here: pass\n"
        "atexit.register(print, 'end')\nassert pickle.loads(pickle.dumps(Here())).__class__ is Here\n"
        "print(__name__, __file__ == sys.argv[0], sys.argv[1:], neighbour.name, os.getcwd(), sys.stdin.read())\n"
        "os.system('echo shell'); sys.exit(3)"
    )
    done = host.run([sys.executable, script, "a b"], cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == [f"__main__ True ['a b'] found {tmp_path} ", "end", "shell"]


@pytest.mark.parametrize(
    "code,reason",
    [("raise OSError('this')", "exit 1"), ("import os; os.kill(os.getpid(), 11)", "exit -11")],
)
def test_crash_is_reported_with_its_last_output(code, reason):
    with pytest.raises(AssertionError) as error:
        host.run([sys.executable, "-c", f"print('before', flush=True); {code}"])
    assert reason in str(error.value) and "before" in str(error.value)
    assert "OSError: this" in str(error.value).splitlines()[-1] or "11" in reason


SLEEP = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
open(sys.argv[1] + ".part", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
print("asleep", flush=True)
time.sleep(60)
"""


def ended(path):
    """Whether both processes that a sleeper named end within seconds."""
    running = [int(pid) for pid in path.read_text().split()]
    deadline = time.monotonic() + 10
    while running and time.monotonic() < deadline:
        time.sleep(0.02)
        running = [pid for pid in running if os.path.exists(f"/proc/{pid}") and not zombie(pid)]
    return not running


def zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_run_that_takes_too_long_is_ended_with_its_children(tmp_path):
    with pytest.raises(AssertionError, match="not done after 1 s\nasleep"):
        host.run([sys.executable, "-c", SLEEP, tmp_path / "pids"], timeout=1)
    assert ended(tmp_path / "pids")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_tests_leave_no_process_behind(tmp_path, number):
    code = f"import host, sys; host.run([sys.executable, '-c', {SLEEP!r}, {str(tmp_path / 'pids')!r}])"
    with tempfile.TemporaryFile() as log:
        tests = subprocess.Popen(
            [sys.executable, "-c", code],
            env=host.environment(PYTHONPATH=str(host.HERE)),
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's tests ignore it
        )
        while not (tmp_path / "pids").exists():
            assert tests.poll() is None
            time.sleep(0.02)
        tests.send_signal(number)
        assert tests.wait(10)
    assert ended(tmp_path / "pids")


def test_failing_rank_ends_the_others(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(5)\ntime.sleep(60)")
    done = host.run([sys.executable, host.HERE / "ranks.py", "2", script], check=False, timeout=30)
    assert done.returncode == 5
