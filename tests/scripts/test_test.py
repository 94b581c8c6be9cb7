"""scripts/test.sh, with a Python that makes no environment."""

import host


def run(folder, *words):
    env = host.environment(TEST_ENVS=str(folder / "envs"), PYTHON="false", CI="")
    done = host.run(["bash", host.ROOT / "scripts" / "test.sh", *words], check=False, env=env)
    return done.returncode, done.stdout


def test_help_and_unknown_words_make_nothing(tmp_path):
    code, output = run(tmp_path, "--help")
    assert code == 0 and all(f"\n    {stage} " in output for stage in "quick new pinned export all serve vllm".split())
    code, output = run(tmp_path, "quick", "pined")
    assert code == 2 and output == "pined is no stage; use one of quick, new, pinned, export, all, serve, vllm\n"
    assert not list(tmp_path.iterdir())


def test_a_stage_that_fails_stops_no_other_and_the_end_names_all(tmp_path):
    code, output = run(tmp_path, "quick", "pinned")
    found = {line[9:37].strip(): line[:8].strip() for line in output.split("\n\n")[-1].splitlines()}
    found.pop("DeepSpeed's launcher", None)  # where numactl is missing
    failed, not_run = ["environment-new", "environment-pinned"], ["ruff-and-mypy", "quick", "pinned"]
    assert code == 1 and found == {**dict.fromkeys(failed, "failed"), **dict.fromkeys(not_run, "not run")}
