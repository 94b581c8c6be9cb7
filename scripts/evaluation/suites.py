"""The paper's suites, and a few that ask for what shallow layers should help: which tasks of lmms-eval they are."""

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

Pair = Tuple[float, float]  # LLaVA-1.5, with MMFuser


class Suite(NamedTuple):
    """`tasks` and `metric` are lmms-eval's; a score is the mean over the tasks times `scale`.

    `paper` are the rows of arXiv 2410.11829 by size; `differs` says how that protocol is another one; `needs` are
    environment variables (capitals) and programs without which there is no score.
    """

    title: str
    tasks: Sequence[str]
    metric: Optional[str] = None
    scale: float = 100.0
    paper: Dict[str, Pair] = {}
    differs: str = ""
    needs: Sequence[str] = ()


def _regions(kind: str) -> Tuple[str, ...]:
    splits = (("refcoco", "val testA testB"), ("refcoco+", "val testA testB"), ("refcocog", "val test"))
    return tuple(f"{name}_{kind}_{split}" for name, parts in splits for split in parts.split())


def _paper(small: Pair, large: Pair) -> Dict[str, Pair]:
    return {"7b": small, "13b": large}


JUDGE = ("OPENAI_API_KEY",)

SUITES = {
    "vqav2": Suite(
        "VQAv2",
        ["vqav2_val"],
        "exact_match",
        paper=_paper((78.5, 79.1), (80.0, 80.1)),
        differs="validation split; the paper's is test-dev (task vqav2_test writes a file for that server)",
    ),
    "gqa": Suite("GQA", ["gqa"], "exact_match", paper=_paper((62.0, 62.8), (63.3, 63.4))),
    "vizwiz": Suite(
        "VizWiz",
        ["vizwiz_vqa_val"],
        "exact_match",
        paper=_paper((50.0, 53.4), (53.6, 57.4)),
        differs="validation split; the paper's is test-dev (task vizwiz_vqa_test writes a file for that server)",
    ),
    "sqa": Suite("SQA-I", ["scienceqa_img"], "exact_match", paper=_paper((66.8, 68.7), (71.6, 71.2))),
    "textvqa": Suite(
        "TextVQA",
        ["textvqa_val"],
        "exact_match",
        paper=_paper((58.2, 58.8), (61.3, 59.9)),
        differs="no OCR tokens in the prompt; LLaVA's script gives them, and scores higher",
    ),
    "pope": Suite(
        "POPE",
        ["pope"],
        "pope_f1_score",
        paper=_paper((85.9, 86.3), (85.9, 87.5)),
        differs="F1 over all questions, where only a bare 'yes' is one; the paper's is the mean of three, and LLaVA's "
        "script takes whatever says no 'no' for a yes",
    ),
    "mme": Suite("MME", ["mme"], "mme_perception_score", 1.0, paper=_paper((1510.7, 1479.7), (1531.3, 1585.2))),
    "mmbench": Suite(
        "MMB",
        ["mmbench_en_dev_static"],
        "gpt_eval_score",
        1.0,
        paper=_paper((64.3, 67.5), (67.7, 69.9)),
        differs="letters are read off by rules here; the paper's answers were scored by MMBench's server",
    ),
    "mmbench_cn": Suite(
        "MMB-CN",
        ["mmbench_cn_dev"],
        "gpt_eval_score",
        1.0,
        paper=_paper((58.3, 60.1), (63.6, 63.8)),
        differs="a judge reads answers that name no letter; the paper's answers were scored by MMBench's server",
        needs=JUDGE,  # without it lmms-eval draws such letters at random
    ),
    "seed": Suite(
        "SEED",
        ["seedbench"],
        "seed_all",
        paper=_paper((58.6, 60.8), (61.6, 62.0)),
        differs="video questions show all frames of the data set; LLaVA's script shows the middle one",
    ),
    "llavabench": Suite(
        "LLaVA-W",
        ["llava_in_the_wild"],
        "gpt_eval_llava_all",
        1.0,
        paper=_paper((63.4, 65.5), (70.7, 71.8)),
        differs="another judge than LLaVA's gpt-4-0314",
        needs=JUDGE,
    ),
    "mmvet": Suite(
        "MM-Vet",
        ["mmvet"],
        "gpt_eval_score",
        1.0,
        paper=_paper((30.5, 32.6), (35.4, 36.6)),
        differs="another judge, and a prompt that asks to think step by step",
        needs=JUDGE,
    ),
    "ocrbench": Suite(
        "OCRBench",
        ["ocrbench"],
        "ocrbench_accuracy",
        1000.0,
        paper=_paper((297, 315), (331, 343)),
        differs="case is ignored in every part",
    ),
    "regioncap": Suite(
        "Region captioning",
        _regions("bbox"),
        "refcoco_CIDEr",
        paper=_paper((37.2, 39.7), (38.9, 42.8)),
        needs=("java",),  # the tokenizer of pycocoevalcap
    ),
    "rec": Suite(
        "REC",
        _regions("bbox_rec"),
        "refcoco_ACC@0.5",
        paper=_paper((51.7, 57.4), (60.7, 61.1)),
        differs="boxes are read as fractions of the picture, while LLaVA-1.5 learned them as fractions of the padded "
        "square (LLaVA issue 606); the paper evidently did the same",
    ),
    "cv_bench": Suite("CV-Bench", ["cv_bench"], "cv_bench_acc"),
    "countbench": Suite("CountBench", ["countbench"], "acc"),
    "vstar": Suite("V*", ["vstar_bench"], "vstar_overall_acc"),
    "mmvp": Suite("MMVP", ["mmvp"], "mmvp_pair_accuracy"),
}
