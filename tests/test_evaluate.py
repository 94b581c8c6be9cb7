"""scripts/evaluate.sh on every suite's file format in miniature; expected scores are worked out by hand."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import benchmarks
import host
import llava_checkout
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = "llava-tiny-mmfuser"

# LLaVA's judge script imports openai before version 1; this one answers without a network.
JUDGE = """
class error:
    class RateLimitError(Exception):
        pass

class ChatCompletion:
    said = iter(["8 6\\nFine.", "5 1\\nPoor.", "I would rather not say."])

    @classmethod
    def create(cls, messages, **_):
        assert "A road." in messages[1]["content"]
        return {"choices": [{"message": {"content": next(cls.said)}}]}
"""
# LLaVA's entry points call .cuda(); on a machine without a GPU this makes them stay where they are.
STAY_ON_CPU = """
import sys
if any("llava.eval.model_" in part or "answering.py" in part for part in sys.orig_argv):
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return llava_checkout.make(tmp_path_factory.mktemp("checkout") / "LLaVA")


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder for PYTHONPATH: an old openai with a canned judge."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "openai.py").write_text(JUDGE)
    about = folder / "openai-0.28.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: openai\nVersion: 0.28.0\n")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that no test here may load: it has no weights."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"image_aspect_ratio": "pad"}))
    long_ago = time.time() - 3600
    os.utime(folder / "config.json", (long_ago, long_ago))
    return folder


def evaluate(*arguments, code=0, cwd=ROOT, **environment):
    """Run the real bash script; return what it printed. `environment` adds variables, None removes one."""
    env = host.environment(PYTHON=sys.executable, **environment)
    for name in ("OPENAI_API_KEY", "CUDA_VISIBLE_DEVICES"):
        if environment.get(name) is None:
            env.pop(name, None)
    done = host.run(["bash", ROOT / "scripts" / "evaluate.sh", *arguments], check=False, env=env, cwd=cwd)
    assert done.returncode == code, done.stdout[-6000:]
    return done.stdout


def adopt(data, checkpoint):
    """Note that the answers that `data` came with are this checkpoint's."""
    data.mkdir(exist_ok=True)
    own = {"checkpoint": str(checkpoint), "base": None, "conv_mode": None}
    suites = [make.__name__ for make in benchmarks.LLAVA] + ["ocrbench", "regioncap", "rec"]
    (data / "evaluated_checkpoints.json").write_text(json.dumps({checkpoint.name: {key: own for key in suites}}))


def results(data, name=NAME):
    found = json.loads((data / "results" / name / "results.json").read_text())
    return {result["suite"]: result for result in found["suites"]}


def row(output, title):
    """The cells of a line of the final table."""
    lines = [line for line in output.splitlines() if line.startswith(title + "  ")]
    assert len(lines) == 1, output
    return [cell.strip() for cell in lines[0].split("  ") if cell.strip()][1:]


def test_llavas_twelve_suites_are_scored_as_by_hand_from_finished_answers(tmp_path, checkout, checkpoint, modules):
    data = tmp_path / "data"
    adopt(data, checkpoint)
    expected = {make.__name__: make(data, NAME) for make in benchmarks.LLAVA}
    output = evaluate(
        *(checkpoint, *expected, "--data", data, "--llava", checkout),
        OPENAI_API_KEY="x",
        PYTHONPATH=str(modules),
    )
    found = results(data)
    assert list(found) == list(expected)
    for suite, (status, score, unparsed) in expected.items():
        result = found[suite]
        assert (result["status"], result.get("score")) == (status, pytest.approx(score, abs=0.01)), result
        assert sum(result["unparsed"].values()) == unparsed, result
        assert any("×" in note for note in result["notes"]) == bool(unparsed)
        assert result["notes"][0].startswith("reused ") and " answers, made 20" in result["notes"][0]
        assert "answering into" not in (data / "results" / NAME / f"{suite}.log").read_text(), "answered again"
    assert row(output, "POPE") == ["66.7", "85.9", "86.3"]
    assert row(output, "MME") == ["125.0", "1510.7", "1479.7 (falls)"]
    assert row(output, "VQAv2") == ["upload", "78.5", "79.1"]
    assert "1 × review without scores" in output
    upload = data / "vqav2/answers_upload/llava_vqav2_mscoco_test-dev2015" / f"{NAME}.json"
    assert f"upload {upload} to https://eval.ai" in output and json.loads(upload.read_text())
    assert json.loads((data / "mm-vet/results" / f"{NAME}.json").read_text())
    assert (data / "mmbench_cn/answers_upload/mmbench_dev_cn_20231003" / f"{NAME}.xlsx").stat().st_size


def test_table_shows_the_papers_13b_row_and_where_it_falls(tmp_path, checkout, checkpoint):
    data = tmp_path / "data"
    adopt(data, checkpoint)
    benchmarks.ocrbench(data, NAME)
    asked = ("textvqa", "ocrbench", "--size", "13b")
    output = evaluate(checkpoint, *asked, "--data", data, "--llava", checkout, code=1)
    assert row(output, "TextVQA") == ["missing", "61.3", "59.9 (falls)"]
    assert row(output, "OCRBench") == ["3", "331", "343"]
    assert output.count("not measured here") == 1
    assert output.count("OCRBench: reused 5 of 5 answers, made 20") == 1
    assert (data / "results" / NAME / "results.txt").read_text().strip() in output


@pytest.mark.parametrize("layout", ["OCRBench.json", "OCRBench.jsonl"])
def test_ocrbench_is_scored_by_its_own_rule(tmp_path, checkout, checkpoint, layout):
    adopt(tmp_path, checkpoint)
    benchmarks.ocrbench(tmp_path, NAME, layout)
    evaluate(checkpoint, "ocrbench", "--data", tmp_path, "--llava", checkout)
    result = results(tmp_path)["ocrbench"]
    assert result["score"] == 3, "case and blanks matter where the rule says so"
    assert result["parts"]["Handwritten Mathematical Expression Recognition"] == "1 of 2"
    assert result["unparsed"] == {"empty answer": 1}
    assert result["notes"][0].startswith("5 questions, where the published file has 1000")


def test_missing_and_half_data_say_which_file_and_other_suites_run(tmp_path, checkout, checkpoint):
    data = tmp_path / "data"
    adopt(data, checkpoint)
    for make in (benchmarks.pope, benchmarks.gqa, benchmarks.seed, benchmarks.ocrbench):
        make(data, NAME)
    benchmarks.refcoco(data, parts=2)
    (data / "gqa/data/images/203.jpg").unlink()
    (data / "gqa/data/images/204.jpg").unlink()
    (data / "seed_bench/SEED-Bench.json").write_text("")
    (data / "OCRBench/OCRBench.json").unlink()
    (data / "refcoco/RefCOCOplus/data/testA-00001-of-00002.parquet").unlink()
    asked = ("vizwiz", "gqa", "seed", "pope", "ocrbench", "rec", "llavabench")
    output = evaluate(checkpoint, *asked, "--data", data, "--llava", checkout, code=1)
    assert row(output, "POPE")[0] == "66.7"
    for title in ("VizWiz", "GQA", "SEED", "OCRBench", "REC", "LLaVA-W"):
        assert row(output, title)[0] == "missing"
    first = data / "gqa/data/images/203.jpg"
    for text in (
        f"VizWiz: {data / 'vizwiz/llava_test.jsonl'} is missing: get it from eval.zip",
        f"VizWiz: {data / 'vizwiz/test'} is missing: get it from https://vizwiz",
        f"GQA: 2 of 5 pictures are missing, the first is {first}: get them from https://cs.stanford.edu",
        f"SEED: {data / 'seed_bench/SEED-Bench.json'} is empty",
        f"OCRBench: {data / 'OCRBench/OCRBench.json'} is missing: get it from https://github.com/Yuliang-Liu",
        f"REC: {data / 'refcoco/RefCOCOplus/data/testA-00001-of-00002.parquet'} is missing: get it from https://hugging",
        "LLaVA-W: OPENAI_API_KEY is not set",
    ):
        assert text in output
    assert {key: result["status"] for key, result in results(data).items()}["pope"] == "scored"


def test_broken_data_names_the_file_and_other_suites_run(tmp_path, checkout, checkpoint):
    data = tmp_path / "data"
    adopt(data, checkpoint)
    for make in (benchmarks.pope, benchmarks.gqa, benchmarks.sqa, benchmarks.mmvet, benchmarks.ocrbench):
        make(data, NAME)
    benchmarks.refcoco(data)
    broken = {
        "gqa": data / "gqa/llava_gqa_testdev_balanced.jsonl",
        "sqa": data / "scienceqa/llava_test_CQM-A.json",
        "ocrbench": data / "OCRBench/OCRBench.json",
        "rec": data / "refcoco/RefCOCO/data/val-00000-of-00001.parquet",
    }
    for file in broken.values():
        file.write_bytes(file.read_bytes()[:-20])
    questions = data / "mm-vet/llava-mm-vet.jsonl"
    questions.write_text(questions.read_text().replace("question_id", "id"))
    output = evaluate(checkpoint, "mmvet", *broken, "pope", "--data", data, "--llava", checkout, code=1)
    found = results(data)
    for suite, file in broken.items():
        assert found[suite]["status"] == "failed" and str(file) in found[suite]["notes"][0], found[suite]
    assert "MM-Vet: no 'question_id' in some record" in output
    assert row(output, "POPE")[0] == "66.7"
    (data / "OCRBench/OCRBench.json").write_text("[]")
    output = evaluate(checkpoint, "ocrbench", "--data", data, "--llava", checkout, code=1)
    assert f"{data / 'OCRBench/OCRBench.json'} holds no question" in output


def test_whatever_a_scorer_raises_fails_only_its_suite(tmp_path, checkout, checkpoint):
    data = tmp_path / "data"
    adopt(data, checkpoint)
    benchmarks.pope(data, NAME)
    about = [(split, index) for split in benchmarks.refcoco(data) for index in range(2)]
    rows = [
        {"question_id": f"{split}/{index}", "text": "dog", "metadata": {"split": split, "references": ["dog"]}}
        for split, index in about
    ]
    benchmarks.lines(data / "refcoco/answers/regioncap" / f"{NAME}.jsonl", rows)
    for module, text in (
        ("cider/cider", "class Cider:\n    def compute_score(self, *_):\n        assert not 'a caption'"),
        ("tokenizer/ptbtokenizer", "class PTBTokenizer:\n    def tokenize(self, texts):\n        return texts"),
    ):
        benchmarks.write(tmp_path / "modules/pycocoevalcap" / f"{module}.py", text)
    benchmarks.write(tmp_path / "modules/pycocoevalcap/__init__.py", "")
    benchmarks.write(tmp_path / "modules/java", "")
    (tmp_path / "modules/java").chmod(0o755)
    output = evaluate(
        *(checkpoint, "regioncap", "pope", "--data", data, "--llava", checkout),
        code=1,
        PYTHONPATH=str(tmp_path / "modules"),
        PATH=f"{tmp_path / 'modules'}{os.pathsep}{os.environ['PATH']}",
    )
    assert [row(output, title)[0] for title in ("Region captioning", "POPE")] == ["FAILED", "66.7"]
    assert "Region captioning: AssertionError: " in output and "assert not 'a caption'" in log(data, "regioncap")


def test_list_names_every_suite_and_its_files(tmp_path):
    output = evaluate("--list", "--data", tmp_path)
    for suite in [make.__name__ for make in benchmarks.LLAVA] + ["ocrbench", "regioncap", "rec"]:
        assert f"\n{suite} (" in "\n" + output
    assert f"{tmp_path}/textvqa/TextVQA_0.5.1_val.json: https://dl.fbaipublicfiles.com" in output


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "CKPT is missing"),
        (["no-such/folder/llava"], "CKPT is no-such/folder/llava: no such folder, and no name on the hub"),
        (["./llava-typo"], "CKPT is ./llava-typo: no such folder"),
        (["~/llava-typo"], "CKPT is ~/llava-typo: no such folder"),
        (["scripts/llava-typo"], "CKPT is scripts/llava-typo: no such folder"),
        (["{checkpoint}", "--base", "../vicuna-typo"], "--base is ../vicuna-typo: no such folder"),
        (["{checkpoint}", "gqs"], "unknown suite gqs; there are vqav2, gqa"),
        (["lmsys/vicuna-7b-v1.5"], "its name lacks 'llava'"),
        (["{checkpoint}", "--name", "a/b"], "--name is a/b: letters, digits"),
        (["{checkpoint}", "--data", "{tmp}/absent"], "no such folder; make it"),
        (["{checkpoint}", "--llava", "{tmp}"], "it has no llava/eval; give the folder of a LLaVA checkout"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path, checkpoint, arguments, problem):
    filled = [argument.format(checkpoint=checkpoint, tmp=tmp_path) for argument in arguments]
    assert problem in evaluate(*filled, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]


def test_answers_of_another_checkpoint_of_the_same_name_are_not_reused(tmp_path, checkout, checkpoint):
    data = tmp_path / "data"
    adopt(data, checkpoint)
    benchmarks.ocrbench(data, NAME)
    evaluate(checkpoint, "ocrbench", "--data", data, "--llava", checkout)
    other = tmp_path / "other" / NAME
    shutil.copytree(checkpoint, other)
    output = evaluate(other, "ocrbench", "--data", data, "--llava", checkout, code=2)
    assert f"answers of that name below {data} are of {checkpoint}, not of {other}; give another --name" in output


def test_answers_that_the_data_came_with_are_set_aside(tmp_path, counted, checkpoint):
    benchmarks.gqa(tmp_path, NAME)
    benchmarks.vizwiz(tmp_path, NAME)
    theirs = [
        tmp_path / "gqa/answers/llava_gqa_testdev_balanced" / NAME / "merge.jsonl",
        tmp_path / "vizwiz/answers" / f"{NAME}.jsonl",
    ]
    before = [file.read_text() for file in theirs]
    output = evaluate(checkpoint, "gqa", "vizwiz", "--data", tmp_path, "--llava", counted)
    assert row(output, "GQA")[0] == "20.0" and "reused" not in output
    assert [file.with_name(file.name + ".old").read_text() for file in theirs] == before
    made = time.time() - 600
    os.utime(theirs[1], (made, made))
    output = evaluate(checkpoint, "gqa", "vizwiz", "--data", tmp_path, "--llava", counted)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made))
    assert "GQA: reused 5 of 5 answers" in output and f"VizWiz: reused 2 of 2 answers, made {when}" in output


def counting(checkout, folder, body="return"):
    """A checkout whose inference entry point answers "no" without a model; chunk 1 fails where `body` says so."""
    shutil.copytree(checkout / "scripts", folder / "scripts", symlinks=True)
    shutil.copytree((checkout / "llava").resolve(), folder / "llava")
    for entry in ("model_vqa_loader.py", "model_vqa.py"):
        (folder / "llava/eval" / entry).write_text(
            f"""
import json, math, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rows = [json.loads(line) for line in open(flags["--question-file"])]
size = math.ceil(len(rows) / int(flags.get("--num-chunks", 1)))
index = int(flags.get("--chunk-idx", 0))
assert flags["--model-path"].endswith("{NAME}") and flags["--temperature"] == "0", flags
print("asked with", flags["--conv-mode"], flags.get("--model-base"))
with open(flags["--answers-file"], "w") as out:
    for row in rows[index * size : (index + 1) * size]:
        answer = {{"question_id": row["question_id"], "prompt": row["text"], "text": "no", "answer_id": "x"}}
        out.write(json.dumps(answer) + "\\n")
{body}
"""
        )
    (folder / "llava" / "__init__.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def counted(checkout, tmp_path_factory):
    return counting(checkout, tmp_path_factory.mktemp("counted") / "LLaVA", body="")


def log(data, suite):
    return (data / "results" / NAME / f"{suite}.log").read_text()


@pytest.mark.parametrize("gpus", ["0", "0,1", "0,1,2,3"])
def test_chunks_are_put_together_in_order(tmp_path, counted, checkpoint, gpus):
    benchmarks.gqa(tmp_path, "nobody")  # five questions: four GPUs get chunks of 2, 2, 1 and 0
    benchmarks.pope(tmp_path, "nobody")  # a script without chunks still uses every GPU
    evaluate(checkpoint, "gqa", "pope", "--data", tmp_path, "--llava", counted, CUDA_VISIBLE_DEVICES=gpus, code=1)
    found = results(tmp_path)
    assert found["gqa"]["score"] == 20.0, "one of five is no"
    answers = tmp_path / "gqa/answers/llava_gqa_testdev_balanced" / NAME / "merge.jsonl"
    assert [json.loads(line)["question_id"] for line in answers.open()] == ["201", "202", "203", "204", "205"]
    asked = [json.loads(line)["question_id"] for line in (tmp_path / "pope/answers" / f"{NAME}.jsonl").open()]
    assert asked == list(range(1, 8))
    # No yes at all: LLaVA's scorer divides by zero, which is an error of this suite, not a score.
    assert found["pope"]["status"] == "failed" and "eval_pope.py" in found["pope"]["notes"][0]


def test_finished_answers_are_reused_and_half_ones_answered_again(tmp_path, counted, checkpoint):
    benchmarks.gqa(tmp_path, "nobody")
    arguments = (checkpoint, "gqa", "--data", tmp_path, "--llava", counted)
    evaluate(*arguments, CUDA_VISIBLE_DEVICES="0,1")
    assert log(tmp_path, "gqa").count("answering into") == 2
    evaluate(*arguments, CUDA_VISIBLE_DEVICES="0,1")
    assert log(tmp_path, "gqa").count("reusing") == 2 and "answering into" not in log(tmp_path, "gqa")
    evaluate(*arguments, CUDA_VISIBLE_DEVICES="0,1,2")
    assert log(tmp_path, "gqa").count("merge.jsonl for chunk") == 3 and "answering into" not in log(tmp_path, "gqa")
    folder = tmp_path / "gqa/answers/llava_gqa_testdev_balanced" / NAME
    (folder / "merge.jsonl").unlink()
    half = folder / "2_1.jsonl"
    half.write_text(half.read_text()[:-20])
    evaluate(*arguments, CUDA_VISIBLE_DEVICES="0,1")
    assert log(tmp_path, "gqa").count("reusing") == 1 and log(tmp_path, "gqa").count("answering into") == 1
    assert "line 2 is not JSON" in log(tmp_path, "gqa")
    evaluate(*arguments, "--force", CUDA_VISIBLE_DEVICES="0,1")
    assert log(tmp_path, "gqa").count(": --force") == 2
    os.utime(checkpoint / "config.json", (time.time() + 60, time.time() + 60))
    evaluate(*arguments, CUDA_VISIBLE_DEVICES="0,1")
    assert log(tmp_path, "gqa").count("the checkpoint is newer") == 2
    assert results(tmp_path)["gqa"]["score"] == 20.0


def test_reviews_of_older_answers_are_not_kept(tmp_path, counted, checkpoint, modules):
    benchmarks.llavabench(tmp_path, "nobody")
    reviews = tmp_path / "llava-bench-in-the-wild/reviews" / f"{NAME}.jsonl"
    benchmarks.lines(reviews, [{"category": "c", "question_id": index, "tuple": [9, 9]} for index in range(3)])
    arguments = (checkpoint, "llavabench", "--data", tmp_path, "--llava", counted)
    for _ in range(2):  # the second time answers and reviews are both kept
        evaluate(*arguments, OPENAI_API_KEY="x", PYTHONPATH=str(modules))
        assert results(tmp_path)["llavabench"]["score"] == 50.0
    assert "Skipping 2 as we already have it" in log(tmp_path, "llavabench")
    assert len(reviews.with_name(reviews.name + ".old").read_text().splitlines()) == 3


def test_a_part_of_a_model_needs_its_base_which_reaches_the_entry_point(tmp_path, counted, checkpoint):
    data = tmp_path / "data"
    benchmarks.gqa(data, "nobody")
    arguments = (checkpoint, "gqa", "--data", data, "--llava", counted)
    evaluate(*arguments)
    assert "asked with vicuna_v1 None" in log(data, "gqa")
    (checkpoint / "mm_projector.bin").write_bytes(b"")
    os.utime(checkpoint / "mm_projector.bin", (0, 0))
    assert "which holds mm_projector.bin and so is only a part: give its --base" in evaluate(*arguments, code=2)
    evaluate(*arguments, "--base", "lmsys/vicuna-7b-v1.5", "--conv-mode", "plain")
    assert "asked with plain lmsys/vicuna-7b-v1.5" in log(data, "gqa")
    assert "reused" not in evaluate(*arguments, "--base", "lmsys/vicuna-7b-v1.5")
    assert "asked with vicuna_v1 lmsys/vicuna-7b-v1.5" in log(data, "gqa")
    output = evaluate(*arguments, "--base", "lmsys/vicuna-7b-v1.5")
    assert "GQA: reused 5 of 5 answers, made 20" in output and "asked with" not in log(data, "gqa")
    (checkpoint / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    evaluate(*arguments)
    assert "asked with vicuna_v1 None" in log(data, "gqa"), "a released checkpoint is whole and holds one, too"
    (checkpoint / "adapter_config.json").write_text("{}")
    assert "its name lacks 'lora'" in evaluate(*arguments, "--base", "lmsys/x", code=2)


def test_a_relative_base_is_found_and_a_relative_tower_refused(tmp_path, counted, checkpoint):
    data = tmp_path / "data"
    benchmarks.gqa(data, "nobody")
    (tmp_path / "vicuna").mkdir()
    (tmp_path / "clip").mkdir()
    arguments = (checkpoint, "gqa", "--data", data, "--llava", counted)
    evaluate(*arguments, "--base", "vicuna", cwd=tmp_path)
    assert f"asked with vicuna_v1 {tmp_path / 'vicuna'}" in log(data, "gqa")
    (tmp_path / "vicuna/config.json").write_text("{}")
    assert "reused" not in evaluate(*arguments, "--base", "./vicuna", cwd=tmp_path), "the base is newer"
    (checkpoint / "config.json").write_text(json.dumps({"mm_vision_tower": "./clip"}))
    output = evaluate(*arguments, cwd=tmp_path, code=2)
    assert "has the mm_vision_tower ./clip, found from this folder, where LLaVA's scripts do not run" in output
    assert f"write {tmp_path / 'clip'} there" in output
    (tmp_path / "clip").rmdir()
    evaluate(*arguments, cwd=tmp_path)


def test_a_name_that_answered_nothing_is_free_for_another_checkpoint(tmp_path, counted, checkpoint):
    data = tmp_path / "data"
    benchmarks.gqa(data, "nobody")
    typo = f"nobody/{NAME}"
    broken = tmp_path / "LLaVA"
    shutil.copytree(counted, broken, symlinks=True)
    (broken / "llava/eval/model_vqa_loader.py").write_text("raise OSError('no such repository')")
    evaluate(typo, "gqa", "--data", data, "--llava", broken, code=1)
    evaluate(checkpoint, "gqa", "--data", data, "--llava", counted)
    assert f"are of {checkpoint}, not of {typo}" in evaluate(typo, "gqa", "--data", data, "--llava", counted, code=2)


def test_a_failed_chunk_names_its_log_keeps_the_others_and_other_suites_go_on(tmp_path, checkout, checkpoint):
    broken = counting(checkout, tmp_path / "LLaVA", body="if index == 1: sys.exit('out of memory')")
    data = tmp_path / "data"
    benchmarks.gqa(data, "nobody")
    benchmarks.vizwiz(data, "nobody")
    adopt(data, checkpoint)
    benchmarks.sqa(data, NAME)
    asked = (checkpoint, "gqa", "vizwiz", "sqa", "--data", data, "--llava", broken)
    output = evaluate(*asked, code=1, CUDA_VISIBLE_DEVICES="0,1")
    assert [row(output, title)[0] for title in ("GQA", "VizWiz", "SQA-I")] == ["FAILED", "FAILED", "33.3"]
    assert f"(log: {data / 'results' / NAME / 'gqa.log'})" in output and "out of memory" in log(data, "gqa")
    assert "chunk 1 of 2 ended with exit code 1" in output
    assert not (data / "gqa/data/testdev_balanced_predictions.json").exists(), "scored half the answers"
    answered = data / "vizwiz/answers" / f"{NAME}.jsonl"
    assert not answered.exists() and answered.with_name(answered.name + ".2_0.partial").exists()
    entry = broken / "llava/eval/model_vqa_loader.py"  # now works for chunk 1; chunk 0 must not be asked again
    asking = "if index == 0 and 'llava_test' in flags['--question-file']:"
    entry.write_text(entry.read_text().replace("if index == 1:", asking))
    output = evaluate(*asked, CUDA_VISIBLE_DEVICES="0,1")
    assert [row(output, title)[0] for title in ("GQA", "VizWiz", "SQA-I")] == ["20.0", "upload", "33.3"]
    assert "VizWiz: reused 2 of 2 answers" in output


@pytest.mark.parametrize("gpus, why", [("0", "retrained"), ("0,1", "retrained"), ("0,1", "--force")])
def test_stale_answers_never_pass_for_new_ones_and_are_kept_aside(tmp_path, checkout, checkpoint, gpus, why):
    llava = counting(checkout, tmp_path / "LLaVA", body="")
    data = tmp_path / "data"
    benchmarks.gqa(data, "nobody")
    arguments = (checkpoint, "gqa", "--data", data, "--llava", llava)
    evaluate(*arguments, CUDA_VISIBLE_DEVICES=gpus)
    merged = data / "gqa/answers/llava_gqa_testdev_balanced" / NAME / "merge.jsonl"
    old = merged.read_text()
    if why == "retrained":
        os.utime(checkpoint / "config.json", (time.time() + 60, time.time() + 60))
    entry = llava / "llava/eval/model_vqa_loader.py"
    working = entry.read_text()
    entry.write_text(working.replace('"no"', '"yes"') + f"\nif index == {gpus[-1]}: sys.exit('out of memory')")
    output = evaluate(*arguments, *[why] * why.startswith("-"), CUDA_VISIBLE_DEVICES=gpus, code=1)
    assert "GQA: answering: chunk 0 of 1 ended with exit code 1" in output
    assert not merged.exists() and merged.with_name("merge.jsonl.old").read_text() == old
    if why == "retrained":
        os.utime(checkpoint / "config.json", (time.time() - 60, time.time() - 60))
    entry.write_text(working.replace('"no"', '"yes"'))
    evaluate(*arguments, CUDA_VISIBLE_DEVICES=gpus)
    assert {json.loads(line)["text"] for line in merged.open()} == {"yes"}


def test_a_later_run_adds_to_the_table_what_is_of_the_same_checkpoint(tmp_path, counted, checkpoint):
    for make in (benchmarks.gqa, benchmarks.vizwiz):
        make(tmp_path, "nobody")
    arguments = ("--data", tmp_path, "--llava", counted)
    evaluate(checkpoint, "sqa", "gqa", *arguments, code=1)
    output = evaluate(checkpoint, "vizwiz", *arguments)  # the exit code is about what was asked for now
    assert list(results(tmp_path)) == ["gqa", "vizwiz", "sqa"]
    assert [row(output, title)[0] for title in ("GQA", "VizWiz", "SQA-I")] == ["20.0", "upload", "missing"]
    evaluate(checkpoint, "vizwiz", *arguments, "--conv-mode", "plain")
    assert list(results(tmp_path)) == ["vizwiz"]
    os.utime(checkpoint / "config.json")
    evaluate(checkpoint, "gqa", *arguments)
    assert list(results(tmp_path)) == ["gqa"], "retrained in between"


def test_one_evaluation_at_a_time_per_data_folder(tmp_path, counted, checkpoint):
    benchmarks.gqa(tmp_path, "nobody")
    arguments = (checkpoint, "gqa", "--data", tmp_path, "--llava", counted)
    with open(tmp_path / "evaluate.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = evaluate(*arguments, code=2)
        assert f"--data is {tmp_path}: another evaluation" in output and f"holds {lock.name}; wait for it" in output
    evaluate(*arguments)


def test_llavas_converters_import_the_checkouts_llava(tmp_path, checkout, checkpoint):
    llava = counting(checkout, tmp_path / "LLaVA", body="")
    data = tmp_path / "data"
    benchmarks.vizwiz(data, "nobody")
    convert = llava / "scripts/convert_vizwiz_for_submission.py"
    convert.write_text("import llava\nprint('llava is', llava.__file__)\n" + convert.read_text())
    evaluate(checkpoint, "vizwiz", "--data", data, "--llava", llava)
    assert f"llava is {llava / 'llava/__init__.py'}" in log(data, "vizwiz")


def alive(pid):
    """Whether a process runs; one that ended and waits for its parent to ask does not."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "suite, number", [("gqa", signal.SIGINT), ("vizwiz", signal.SIGTERM), ("ocrbench", signal.SIGTERM)]
)
def test_an_interrupted_evaluation_leaves_no_process_behind(tmp_path, checkout, checkpoint, suite, number):
    wait = "import os, time\nprint(os.getpid(), file=open({!r} + '/' + str(os.getpid()), 'w'))\ntime.sleep(300)"
    started = tmp_path / "started"
    started.mkdir()
    llava = counting(checkout, tmp_path / "LLaVA", body=wait.format(str(started)))
    (llava / "llava" / "constants.py").write_text(wait.format(str(started)))  # what answering.py imports first
    data = tmp_path / "data"
    for make in (benchmarks.gqa, benchmarks.vizwiz, benchmarks.ocrbench):
        make(data, None)
    command = ["bash", ROOT / "scripts/evaluate.sh", checkpoint, suite, "--data", data, "--llava", llava]
    environment = host.environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="0,1")
    evaluation = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's tests ignore it
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(started.iterdir())) < 2:
            assert evaluation.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        evaluation.send_signal(number)  # to it alone; a terminal's Ctrl-C reaches LLaVA's background jobs in vain
        assert evaluation.wait(20) != 0
        deadline = time.monotonic() + 10
        while any(alive(file.name) for file in started.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        evaluation.kill()
        for file in started.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.name), signal.SIGKILL)


DRIFT = {
    "two checkpoints": ("python -m", "python -m x --model-path a/b\npython -m", "expected one literal --model-path"),
    "a variable": ("liuhaotian/llava-v1.5-13b", "$1", "expected one literal --model-path, found $1"),
    "other questions": ("llava_test.jsonl", "llava_train.jsonl", "it answers --question-file ./playground"),
    "other answers": ("vizwiz/answers/", "vizwiz/replies/", "it ended without error, but"),
    "no upload file": ("_for_submission.py", "_for_nothing.py", "convert_vizwiz_for_nothing.py"),
    "no inference": ("llava.eval.model_vqa_loader", "json.tool", "-m json.tool"),
}


@pytest.mark.parametrize("drift", DRIFT)
def test_a_script_that_drifted_is_an_error(tmp_path, counted, checkpoint, drift):
    before, after, problem = DRIFT[drift]
    llava = tmp_path / "LLaVA"
    shutil.copytree(counted, llava, symlinks=True)
    data = tmp_path / "data"
    benchmarks.vizwiz(data, "nobody")
    script = llava / "scripts/v1_5/eval/vizwiz.sh"
    script.write_text(script.read_text().replace(before, after))
    output = evaluate(checkpoint, "vizwiz", "--data", data, "--llava", llava, code=1)
    assert row(output, "VizWiz")[0] == "FAILED" and problem in output, output


def test_without_a_checkout_llavas_suites_are_missing_and_say_so(tmp_path, checkpoint):
    adopt(tmp_path, checkpoint)
    benchmarks.vizwiz(tmp_path, NAME)
    benchmarks.ocrbench(tmp_path, NAME)
    installed = Path(host.train_py()).parents[2]
    output = evaluate(checkpoint, "vizwiz", "ocrbench", "--data", tmp_path, "--llava", installed, code=1)
    assert "vizwiz.sh is missing: give --llava a checkout" in output
    assert row(output, "OCRBench")[0] == "3"


# From here on a real, tiny model answers through LLaVA's own entry points and ours.


@pytest.fixture(scope="module")
def answered(world, checkout, tmp_path_factory):
    """A trained checkpoint's run over suites of every kind of entry point: (data, output)."""
    folder = tmp_path_factory.mktemp("answered")
    host.train(world, folder / NAME, "finetune", max_steps=1)
    settings = json.loads((folder / NAME / "generation_config.json").read_text())
    settings["eos_token_id"] = list(range(json.loads((folder / NAME / "config.json").read_text())["vocab_size"]))
    (folder / NAME / "generation_config.json").write_text(json.dumps(settings))  # each answer is one token long
    (folder / "sitecustomize.py").write_text(STAY_ON_CPU)
    data = folder / "data"
    for make in (benchmarks.gqa, benchmarks.sqa, benchmarks.mmbench, benchmarks.mmvet, benchmarks.ocrbench):
        make(data, "nobody")
    benchmarks.refcoco(data)
    arguments = (folder / NAME, "--data", data, "--llava", checkout)
    evaluate(*arguments, "rec", CUDA_VISIBLE_DEVICES="0,1", PYTHONPATH=str(folder))
    suites = ("gqa", "sqa", "mmbench", "mmvet", "ocrbench", "rec")
    return data, evaluate(*arguments, *suites, PYTHONPATH=str(folder))


@pytest.mark.fp16_cpu
def test_a_real_model_answers_every_question_through_every_entry_point(answered):
    data, output = answered
    found = results(data)
    assert [result["status"] for result in found.values()] == ["scored"] * 2 + ["upload"] * 2 + ["scored"] * 2
    for suite, file, count in (
        ("gqa", f"gqa/answers/llava_gqa_testdev_balanced/{NAME}/merge.jsonl", 5),
        ("sqa", f"scienceqa/answers/{NAME}.jsonl", 4),
        ("mmbench", f"mmbench/answers/mmbench_dev_20230712/{NAME}.jsonl", 2),
        ("mmvet", f"mm-vet/answers/{NAME}.jsonl", 2),
        ("ocrbench", f"OCRBench/answers/{NAME}.jsonl", 5),
        ("rec", f"refcoco/answers/rec/{NAME}.jsonl", 32),
    ):
        rows = [json.loads(line) for line in (data / file).open()]
        assert len(rows) == count and {row["model_id"] for row in rows} == {NAME}
        assert "fuser weights: from" in log(data, suite)
    assert row(output, "REC")[1:] == ["51.7", "57.4"] and found["rec"]["unparsed"]["no box"] == 32
    assert row(output, "REC, padded square") == ["0.0"]
    assert {tuple(json.loads(line)["metadata"]["size"]) for line in (data / file).open()} == {(40, 20), (20, 40)}
