"""scripts/evaluate.sh: lmms-eval scores tiny checkpoints on a local task, beside LLaVA's own script.

The harness's environment is made once, below this one, or where EVALUATE_ENV says.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import host
import numpy as np
import pytest
import score
import torch
from evaluation import harness, paired
from evaluation.suites import SUITES
from tiny import SEEDED

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = Path(os.environ.get("EVALUATE_ENV") or Path(sys.prefix) / "evaluate")
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.json
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
PICTURES = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
# LLaVA's script calls .cuda(); on a machine without a GPU this makes it stay where it is.
STAY_ON_CPU = """
import sys
if any("llava.eval.model_" in part for part in sys.orig_argv):
    import torch

    def here(to):
        def move(self, *places, **named):
            named = {key: value for key, value in named.items() if value != "cuda"}
            return to(self, *[place for place in places if place != "cuda"], **named) if places or named else self
        return move

    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = lambda self, *_: self
        kind.to = here(kind.to)
"""


QUESTIONS = ("What is the number?", "Where is the number?")  # two about every picture


def command(*arguments):
    return ["bash", ROOT / "scripts" / "evaluate.sh", *arguments]


def environ(**more):
    env = host.environment(**{"PYTHON": sys.executable, "EVALUATE_ENV": str(ENVIRONMENTS), **more})
    for name in ("OPENAI_API_KEY", "CUDA_VISIBLE_DEVICES"):
        env.pop(name, None)
    return env


def evaluate(*arguments, code=0, **more):
    """Run the real bash script; return what it printed."""
    done = host.run(command(*arguments), check=False, env=environ(**more), timeout=1500)
    assert done.returncode == code, done.stdout[-6000:]
    return done.stdout


def row(output, title):
    """The cells of a line of the final table."""
    lines = [line for line in output.splitlines() if line.startswith(title + "  ")]
    assert len(lines) == 1, output
    return [cell.strip() for cell in lines[0].split("  ") if cell.strip()][1:]


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """A plain LLaVA, and the same with a fuser whose gates are open."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("checkpoints")
    plain, fused = folder / "llava-stock", folder / "llava-mmfuser"  # "plain" in a name changes LLaVA's prompt
    seeded = [sys.executable, "-c", SEEDED]  # weights of chance may answer with ties, which 16 bits decide by chance
    host.train(world, plain, "finetune", max_steps=1, mm_projector_type="mlp2x_gelu", launcher=seeded)
    host.run([sys.executable, "-m", "llava_mmfuser", "upgrade", plain, fused])
    for file in fused.glob("*.safetensors"):
        weights, drawn = load_file(file), torch.Generator().manual_seed(0)
        for name in sorted(weights):
            if name.endswith("_proj.weight") and ".fuser." in name:
                weights[name].copy_(torch.rand(weights[name].shape, generator=drawn) * 0.4 - 0.2)
            if name.endswith("gate.scale"):
                weights[name].fill_(20.0)
        save_file(weights, file, {"format": "pt"})
    return plain, fused


@pytest.fixture(scope="module")
def asked(world, checkpoints, tmp_path_factory):
    """Answers of LLaVA's own script: (records of the pictures, {checkpoint: answers})."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "sitecustomize.py").write_text(STAY_ON_CPU)
    records = json.loads((world / "data" / "finetune.json").read_text())
    records = [record for record in records[:8] for _ in QUESTIONS]
    lines = [
        {"question_id": index, "image": record["image"], "text": QUESTIONS[index % 2]}
        for index, record in enumerate(records)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {}
    for checkpoint in checkpoints:
        script = [sys.executable, "-m", "llava.eval.model_vqa_loader", "--model-path", checkpoint]
        script += ["--question-file", folder / "questions.jsonl", "--image-folder", world / "data"]
        script += ["--answers-file", folder / f"{checkpoint.name}.jsonl", "--temperature", "0"]
        script += ["--conv-mode", "vicuna_v1"]  # as in its v1_5 scripts; lmms-eval's default, too
        host.run([*script, "--max_new_tokens", "8"], env=host.environment(PYTHONPATH=str(folder)))
        lines = (folder / f"{checkpoint.name}.jsonl").read_text().splitlines()
        answers[checkpoint] = [json.loads(line)["text"] for line in lines]
    return [world / "data" / record["image"] for record in records], answers


@pytest.fixture(scope="module")
def tasks(asked, tmp_path_factory):
    """Two tasks of our own. A third of `toy`'s answers are plain LLaVA's, another third the fuser's, the rest wrong."""
    folder = tmp_path_factory.mktemp("tasks")
    pictures, answers = asked
    rows = []
    for index, (picture, options) in enumerate(zip(pictures, zip(*answers.values()))):
        right = [*options, "no such word"][index % 3]
        rows.append({"image": str(picture), "question": QUESTIONS[index % 2], "answer": right.upper()})
    for name, part in (("toy", rows), ("other", rows[:4])):
        (folder / f"{name}.json").write_text(json.dumps(part))
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder))
    (folder / "pictures.py").write_text(PICTURES)
    return folder


@pytest.fixture(scope="module")
def scored(checkpoints, tasks, tmp_path_factory):
    """One call that scores both: (folder of results, what was printed)."""
    folder = tmp_path_factory.mktemp("scored")
    plain, fused = checkpoints
    asked_for = ("toy", "gqa", "mmvet", "gqs", "--against", plain, "--include_path", tasks, "--output", folder)
    return folder, evaluate(fused, *asked_for, code=1)


def found(folder):
    files = list(folder.glob("llava-mmfuser-*/results.json"))
    assert len(files) == 1
    return json.loads(files[0].read_text())


@pytest.mark.fp16_cpu
@pytest.mark.slow
def test_a_local_task_scores_as_by_hand_and_as_llavas_own_script_answers(asked, tasks, checkpoints, scored):
    folder, output = scored
    toy = found(folder)["suites"][0]
    truth = [record["answer"] for record in json.loads((tasks / "toy.json").read_text())]
    rights = []
    for checkpoint, said in zip(checkpoints, (toy["against"], toy["score"])):
        samples = list(folder.glob(f"{checkpoint.name}-*/toy/samples_toy.jsonl"))
        harness_says = [json.loads(line)["filtered_resps"].strip() for line in samples[0].open()]
        assert harness_says == asked[1][checkpoint], "LLaVA's script and lmms-eval differ"
        rights.append([answer.upper() == right for answer, right in zip(harness_says, truth)])
        assert said == pytest.approx(sum(rights[-1]) / len(truth)) and 0 < said < 1
    mean = np.mean(rights[1]) - np.mean(rights[0])
    pair = toy["paired"]
    assert pair["mean"] == pytest.approx(mean) and pair["questions"] == len(truth) == 16 and pair["additive"]
    assert pair["pictures"] == 8, "two questions about each"
    assert pair["low"] < mean < pair["high"]
    cells = row(output, "toy")
    assert cells[:3] == ["exact_match", f"{toy['score']:.3f}", f"{toy['against']:.3f}"]
    assert cells[3].startswith(f"{mean:+.3f} [") and cells[6] == "16 / 8"
    log = next(folder.glob("llava-mmfuser-*/toy.log")).read_text()
    assert "fuser weights: from" in log and "mmfuser" not in next(folder.glob("llava-stock-*/toy.log")).read_text()
    assert f"transformers {found(folder)['versions']['transformers']}" in output and "lmms-eval 0.7.3" in output


@pytest.mark.fp16_cpu
@pytest.mark.slow
def test_missing_data_keys_and_tasks_are_named_and_other_suites_go_on(scored):
    _, output = scored
    assert "its data could not be read: " in output and "GQA" in output and "by --include_path" in output
    assert "MM-Vet: OPENAI_API_KEY is not set" in output and "HF_DATASETS_OFFLINE=1" in output
    assert "gqs is neither a suite (vqav2, gqa, vizwiz" in output and "lmms_eval tasks list" in output
    assert row(output, "GQA") == ["exact_match", *"––––––", "62", "62.8"]
    assert output.count("== llava-stock") == 1, "what failed for one checkpoint is not asked of the other"


def test_an_interrupt_while_a_process_starts_ends_it(interrupted_start):
    with pytest.raises(KeyboardInterrupt), harness.running(["sleep", "60"]):
        pass
    assert interrupted_start[0].wait(5) == -signal.SIGTERM


@pytest.mark.fp16_cpu
@pytest.mark.slow
def test_what_was_scored_is_kept(checkpoints, tasks, scored):
    folder, _ = scored
    before = folder_of(folder, "llava-mmfuser")
    output = evaluate(checkpoints[1], "toy", "--include_path", tasks, "--output", folder)
    assert "toy: kept from an earlier run" in output and folder_of(folder, "llava-mmfuser") == before
    assert row(output, "toy")[0] == "exact_match"


def folder_of(folder, name):
    """Times of the samples below a checkpoint's results."""
    return {file: file.stat().st_mtime_ns for file in folder.glob(f"{name}-*/*/samples_*.jsonl")}


@pytest.mark.fp16_cpu
@pytest.mark.slow
def test_an_adapter_with_its_base_is_scored_from_any_path_after_an_interrupt_that_leaves_no_process(
    world, tasks, tmp_path
):
    adapter, folder = tmp_path / "a=1" / "fuser-adapter", tmp_path / "scores"
    host.train(world, adapter, "pretrain", max_steps=1)
    assert "only a part (adapter" in evaluate(adapter, "other", code=2)
    arguments = (adapter, "other", "--base", world / "llama", "--include_path", tasks, "--output", folder)
    evaluation = subprocess.Popen(
        list(map(str, command(*arguments))),
        env=environ(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's tests ignore it
    )
    try:
        kept, line = "", ""
        while not line.startswith("== llava-fuser-adapter: other"):
            kept, line = kept + line, evaluation.stdout.readline()
            assert line, kept
        deadline = time.monotonic() + 60
        while not processes(folder):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        evaluation.send_signal(signal.SIGINT)
        assert evaluation.wait(30) != 0 and not processes(folder)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(evaluation.pid, signal.SIGKILL)
    assert not list(folder.glob("*/*.partial-*")) and not list(folder.glob("*/other"))
    assert row(evaluate(*arguments), "other")[0] == "exact_match"
    log = next(folder.glob("llava-fuser-adapter-*/other.log")).read_text()
    assert f"fuser weights: none of 24 tensors is in {world / 'llama'}; starts as identity unless an adapter" in log


def processes(folder):
    """Processes whose command line names `folder` as lmms-eval's output."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = file.read_text(errors="replace")
            found += [file.parent.name] * (f"--output_path\0{folder}" in text)
    return found


@pytest.mark.slow
def test_every_suites_tasks_and_metric_are_the_harnesss_and_llavas_python_stays_as_it_is():
    python = harness.environment(ENVIRONMENTS)
    assert importlib.util.find_spec("lmms_eval") is None and python.is_relative_to(ENVIRONMENTS)
    code = """if True:
        import json, sys
        from lmms_eval.tasks import TaskManager
        from lmms_eval.utils import load_yaml_config
        index = TaskManager("ERROR").task_index
        configs = {name: load_yaml_config(index[name]["yaml_path"]) for name in sys.argv[1:]}
        found = {name: [str(metric["metric"]) for metric in config["metric_list"]] for name, config in configs.items()}
        print(json.dumps(found))"""
    names = [task for suite in SUITES.values() for task in suite.tasks]
    metrics = json.loads(host.run([python, "-c", code, *names], env=host.environment()).stdout.splitlines()[-1])
    for suite in SUITES.values():
        assert all(suite.metric in metrics[task] for task in suite.tasks), suite


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "CKPT is missing"),
        (["no-such/folder/llava"], "CKPT is no-such/folder/llava: no such folder, and no name on the hub"),
        (["./llava-typo"], "CKPT is ./llava-typo: no such folder"),
        (["{plain}", "--against", "{llama}"], "is not a LLaVA checkpoint"),
        (["{plain}", "--base", "{llama}"], "is a whole checkpoint; leave it out"),
        (["{plain}", "--size", "7b", "gqa"], "gqa stands behind a flag; suites stand right behind CKPT"),
        (["{plain}", "gqa", "--tasks", "pope"], "--tasks is set here"),
        (["{plain}", "toy", "--include_path", "{tmp}/absent"], "absent: no such folder"),
        (["{tmp}/a,b/c"], "no such folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_installed(
    world, checkpoints, tmp_path, monkeypatch, capsys, arguments, problem
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVALUATE_ENV", str(tmp_path / "env"))
    monkeypatch.setattr(score, "exit_on_signals", lambda: None)
    filled = [part.format(plain=checkpoints[0], llama=world / "llama", tmp=tmp_path) for part in arguments]
    with pytest.raises(SystemExit) as stopped:
        score.main(filled)
    assert stopped.value.code == 2 and problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_environment_that_cannot_be_finished_leaves_nothing(tmp_path):
    output = evaluate("owner/name", "gqa", code=2, EVALUATE_ENV=str(tmp_path), PIP_NO_INDEX="1")
    assert "ended with exit code 1; nothing was left behind" in output and not list(tmp_path.iterdir())


def test_list_prints_every_suite(capsys):
    assert score.main(["--list"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n{key} ({suite.title}): " in "\n" + output for key, suite in SUITES.items())


def answers(*values, pictures=None):
    """Answers to one task, each about a picture of its own if not said otherwise."""
    return [dict(enumerate(zip(values, pictures or range(len(values)))))]


def test_paired_difference_is_over_the_same_questions_and_by_hand():
    ours, theirs = answers(1.0, 0.0, 1.0, 1.0), answers(0.0, 0.0, 1.0, 0.0)
    found = paired.difference(ours, theirs, [[0.75], [0.25]], 100.0)
    assert (found.mean, found.questions, found.pictures, found.additive) == (50.0, 4, 4, True)
    exact = sorted(np.mean(draw) for draw in np.stack(np.meshgrid(*[[1, 0, 0, 1]] * 4), -1).reshape(-1, 4))
    assert [found.low, found.high] == [100 * exact[int(0.025 * 256)], 100 * exact[int(0.975 * 256)]]
    assert found.p == 0.5, "two coins that fall alike"
    assert found.seen == pytest.approx(100 * (1.960 + 0.842) * np.std(exact), rel=0.02)
    assert found == paired.difference(ours, theirs, [[0.75], [0.25]], 100.0)
    assert paired.difference(answers(0.5), answers(0.5), [[0.5], [0.5]], 1.0) is None, "one picture"
    assert paired.difference(answers(0.5, 1), answers(0.5, 1), [[0.75], [0.75]], 1.0).p is None, "not right or wrong"
    with pytest.raises(ValueError, match="1 questions were asked of one checkpoint only"):
        paired.difference(ours, answers(0.0, 0.0, 1.0), [[0.75], [0.25]], 100.0)


def test_pictures_are_drawn_whole_also_over_tasks():
    first, second = answers(1, 1, 0, 0, pictures="aabb"), answers(0, 0, 0, 0, pictures="aabb")
    said = [[0.5], [0.0]]
    alone = paired.difference(first, second, said, 1.0)
    assert (alone.low, alone.high, alone.pictures) == (0.0, 1.0, 2), "either picture may be drawn twice"
    both = paired.difference(first * 2, second * 2, [said[0] * 2, said[1] * 2], 1.0)
    assert (both.mean, both.low, both.high, both.pictures) == (0.5, 0.0, 1.0, 2), "the second task shows the same"


def simulated(count, effect=0.0, pictures=100, questions=10, shared=0.1):
    """Intervals of runs whose questions share `shared` of their variance with the others about the same picture."""
    random = np.random.default_rng(0)
    for _ in range(count):
        noise = shared**0.5 * random.normal(size=(pictures, 1)) + (1 - shared) ** 0.5 * random.normal(
            size=(pictures, questions)
        )
        yield noise + effect, paired.interval((noise + effect).sum(1)[None], np.full((1, pictures), questions))


def test_intervals_hold_the_truth_in_at_least_93_of_100_runs_where_questions_share_pictures(monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    runs = list(simulated(600))
    assert 0.93 <= np.mean([low <= 0 <= high for _, (_, low, high, _) in runs]) <= 0.97
    naive = [abs(values.mean()) <= 1.96 * values.std() / values.size**0.5 for values, _ in runs]
    assert np.mean(naive) < 0.87, "as if questions were independent"


def test_the_smallest_visible_difference_is_seen_in_four_of_five_runs(monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    error = np.mean([error for _, (*_, error) in simulated(50)])
    assert 0.75 <= np.mean([low > 0 for _, (_, low, _, _) in simulated(400, effect=2.802 * error)]) <= 0.85


@pytest.mark.parametrize(
    "right, wrong, said, additive",
    [
        ({"score": 1.0, "category": "OCR"}, {"score": 0.0, "category": "OCR"}, 150.0, False),
        ({"score": 1, "prediction": "no"}, {"score": 0, "prediction": "yes"}, 0.5, True),
        ({"pred": "A", "answer": "A"}, {"pred": "B", "answer": "A"}, 0.5, True),
        ({"pred": [0, 0, 0.5, 1], "bbox": [0, 0, 0.6, 1]}, {"pred": [0, 0, 0, 0], "bbox": [0, 0, 0.6, 1]}, 0.5, True),
        ({"is_correct": True}, {"is_correct": False}, 0.5, True),
    ],
)
def test_what_tasks_log_counts_per_question(right, wrong, said, additive):
    found = paired.difference(answers(right, wrong), answers(wrong, wrong), [[said], [said - said]], 100.0)
    assert (found.mean, found.additive) == (50.0, additive)
    without = {"pred": "x", "answer": ["x"]}
    assert paired.difference(answers(without, without), answers(1.0, 1.0), [[1.0], [1.0]], 1.0) is None
