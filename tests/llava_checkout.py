"""A stand-in for a LLaVA checkout: the installed `llava`, with short scripts that call what LLaVA's own scripts call.

The wheel has no scripts/ folder. Set LLAVA_CHECKOUT to run the same tests on a real checkout.
"""

import importlib.util
import json
import os
from pathlib import Path

NAME = "llava-v1.5-13b"
EVAL = "./playground/data/eval"
LOADER, PLAIN = "llava.eval.model_vqa_loader", "llava.eval.model_vqa"

# Converters that only LLaVA's scripts/ folder has, by what they write.
CONVERT = """
import argparse, json, os, sys
flags = {sys.argv[i]: sys.argv[i + 1] for i in range(1, len(sys.argv) - 1, 2)}
kind = os.path.basename(sys.argv[0]).split("_")[1]
if kind == "vqav2":
    folder = "./playground/data/eval/vqav2"
    source = f"{folder}/answers/{flags['--split']}/{flags['--ckpt']}/merge.jsonl"
    target = f"{folder}/answers_upload/{flags['--split']}/{flags['--ckpt']}.json"
elif kind == "mmbench":
    source = f"{flags['--result-dir']}/{flags['--experiment']}.jsonl"
    target = f"{flags['--upload-dir']}/{flags['--experiment']}.xlsx"
else:
    source = flags.get("--src") or flags["--result-file"]
    target = flags.get("--dst") or flags["--result-upload-file"]
rows = [json.loads(line) for line in open(source)]
if kind == "gqa":
    result = [{"questionId": row["question_id"], "prediction": row["text"].rstrip(".").lower()} for row in rows]
elif kind == "seed":
    texts = {str(row["question_id"]): row["text"] for row in rows}
    truth = json.load(open(flags["--annotation-file"]))["questions"]
    right = sum(texts[row["question_id"]] == row["answer"] for row in truth)
    print(f"Total accuracy: {100 * right / len(truth):.2f}%\\nimage accuracy: 99.00%")
    result = texts
else:
    result = {row["question_id"]: row["text"] for row in rows}
json.dump(result, open(target, "w"))
"""


def ask(module, suite, questions, answers, images=None, flags="", chunked=False):
    """One inference command; `chunked`: once per GPU, then put together, as LLaVA's scripts for the big suites do."""
    parts = [f"--model-path liuhaotian/{NAME}", f"--question-file {EVAL}/{suite}/{questions}"]
    parts += [f"--image-folder {EVAL}/{suite}/{images}"] * bool(images)
    parts += [f"--answers-file {EVAL}/{suite}/{answers}", "--temperature 0 --conv-mode vicuna_v1", flags]
    if not chunked:
        return f"python -m {module} {' '.join(parts)}\n"
    folder = f"{EVAL}/{suite}/{answers.rsplit('/', 1)[0]}"
    parts[parts.index(f"--answers-file {EVAL}/{suite}/{answers}")] = f"--answers-file {folder}/${{n}}_$i.jsonl"
    return (
        'IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"\nn=${#gpus[@]}\n'
        "for i in $(seq 0 $((n - 1))); do\n"
        f"  CUDA_VISIBLE_DEVICES=${{gpus[$i]}} python -m {module} \\\n"
        f"    {' '.join(parts)} --num-chunks $n --chunk-idx $i &\ndone\nwait\n"
        f">{EVAL}/{suite}/{answers}\n"
        f"for i in $(seq 0 $((n - 1))); do cat {folder}/${{n}}_$i.jsonl >>{EVAL}/{suite}/{answers}; done\n"
    )


def scripts():
    """Name -> text of the twelve shell scripts."""
    one, bench = f"answers/{NAME}.jsonl", "llava-bench-in-the-wild"
    vqa, gqa = "llava_vqav2_mscoco_test-dev2015", "llava_gqa_testdev_balanced"
    single = "--single-pred-prompt"
    texts = {
        "vqav2": ask(LOADER, "vqav2", f"{vqa}.jsonl", f"answers/{vqa}/{NAME}/merge.jsonl", "test2015", chunked=True)
        + f"python scripts/convert_vqav2_for_submission.py --split {vqa} --ckpt {NAME}",
        "gqa": ask(LOADER, "gqa", f"{gqa}.jsonl", f"answers/{gqa}/{NAME}/merge.jsonl", "data/images", chunked=True)
        + f"python scripts/convert_gqa_for_eval.py --src {EVAL}/gqa/answers/{gqa}/{NAME}/merge.jsonl"
        f" --dst {EVAL}/gqa/data/testdev_balanced_predictions.json\n"
        f"cd {EVAL}/gqa/data && python eval/eval.py --tier testdev_balanced",
        "vizwiz": ask(LOADER, "vizwiz", "llava_test.jsonl", one, "test")
        + f"python scripts/convert_vizwiz_for_submission.py --annotation-file {EVAL}/vizwiz/llava_test.jsonl"
        f" --result-file {EVAL}/vizwiz/{one} --result-upload-file {EVAL}/vizwiz/answers_upload/{NAME}.json",
        "sqa": ask("llava.eval.model_vqa_science", "scienceqa", "llava_test_CQM-A.json", one, "images/test", single)
        + f"python llava/eval/eval_science_qa.py --base-dir {EVAL}/scienceqa --result-file {EVAL}/scienceqa/{one}"
        f" --output-file {EVAL}/scienceqa/o.jsonl --output-result {EVAL}/scienceqa/r.json",
        "textvqa": ask(LOADER, "textvqa", "llava_textvqa_val_v051_ocr.jsonl", one, "train_images")
        + f"python -m llava.eval.eval_textvqa --annotation-file {EVAL}/textvqa/TextVQA_0.5.1_val.json"
        f" --result-file {EVAL}/textvqa/{one}",
        "pope": ask(LOADER, "pope", "llava_pope_test.jsonl", one, "val2014")
        + f"python llava/eval/eval_pope.py --annotation-dir {EVAL}/pope/coco"
        f" --question-file {EVAL}/pope/llava_pope_test.jsonl --result-file {EVAL}/pope/{one}",
        "mme": ask(LOADER, "MME", "llava_mme.jsonl", one, "MME_Benchmark_release_version")
        + f"cd {EVAL}/MME && python convert_answer_to_mme.py --experiment {NAME}\n"
        f"cd eval_tool && python calculation.py --results_dir answers/{NAME}",
        "seed": ask(LOADER, "seed_bench", "llava-seed-bench.jsonl", f"answers/{NAME}/merge.jsonl", ".", chunked=True)
        + f"python scripts/convert_seed_for_submission.py --annotation-file {EVAL}/seed_bench/SEED-Bench.json"
        f" --result-file {EVAL}/seed_bench/answers/{NAME}/merge.jsonl"
        f" --result-upload-file {EVAL}/seed_bench/answers_upload/{NAME}.jsonl",
        "llavabench": ask(PLAIN, bench, "questions.jsonl", one, "images")
        + f"mkdir -p {EVAL}/{bench}/reviews\n"
        f"python llava/eval/eval_gpt_review_bench.py --question {EVAL}/{bench}/questions.jsonl"
        f" --context {EVAL}/{bench}/context.jsonl --rule scripts/rule.json"
        f" --answer-list {EVAL}/{bench}/answers_gpt4.jsonl {EVAL}/{bench}/{one}"
        f" --output {EVAL}/{bench}/reviews/{NAME}.jsonl\n"
        f"python llava/eval/summarize_gpt_review.py -f {EVAL}/{bench}/reviews/{NAME}.jsonl",
        "mmvet": ask(PLAIN, "mm-vet", "llava-mm-vet.jsonl", one, "images")
        + f"mkdir -p {EVAL}/mm-vet/results\n"
        f"python scripts/convert_mmvet_for_eval.py --src {EVAL}/mm-vet/{one} --dst {EVAL}/mm-vet/results/{NAME}.json",
    }
    for suite, split, flags in (
        ("mmbench", "mmbench_dev_20230712", single),
        ("mmbench_cn", "mmbench_dev_cn_20231003", f"--lang cn {single}"),
    ):
        texts[suite] = ask(
            "llava.eval.model_vqa_mmbench", suite, f"{split}.tsv", f"answers/{split}/{NAME}.jsonl", flags=flags
        ) + (
            f"python scripts/convert_mmbench_for_submission.py --annotation-file {EVAL}/{suite}/{split}.tsv"
            f" --result-dir {EVAL}/{suite}/answers/{split} --upload-dir {EVAL}/{suite}/answers_upload/{split}"
            f" --experiment {NAME}"
        )
    return texts


def make(folder: Path) -> Path:
    """Write the stand-in, or link to the checkout that LLAVA_CHECKOUT names."""
    folder.mkdir(parents=True)
    real = os.environ.get("LLAVA_CHECKOUT")
    if real:
        for part in ("llava", "scripts"):
            (folder / part).symlink_to(Path(real).resolve() / part)
        return folder
    (folder / "llava").symlink_to(Path(importlib.util.find_spec("llava").origin).parent)
    shell = folder / "scripts" / "v1_5" / "eval"
    shell.mkdir(parents=True)
    for suite, text in scripts().items():
        (shell / f"{suite}.sh").write_text(f"#!/bin/bash\n{text}\n")
    for kind, use in (("vqav2", "submission"), ("gqa", "eval"), ("vizwiz", "submission"), ("seed", "submission")):
        (folder / "scripts" / f"convert_{kind}_for_{use}.py").write_text(CONVERT)
    for kind, use in (("mmbench", "submission"), ("mmvet", "eval")):
        (folder / "scripts" / f"convert_{kind}_for_{use}.py").write_text(CONVERT)
    rule = {"role": "Assistant", "prompt": "Rate them."}
    rules = {f"llava_bench_{kind}": rule for kind in ("conv", "detail", "complex")}
    (folder / "scripts" / "rule.json").write_text(json.dumps(rules))
    return folder
