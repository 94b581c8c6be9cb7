"""The paper's suites, and a few that ask for what shallow layers should help: which tasks of lmms-eval they are."""

from typing import Dict, NamedTuple, Optional, Sequence, Tuple


class Suite(NamedTuple):
    """`tasks` and `metric` are lmms-eval's; a score is the mean over the tasks times `scale`.

    `needs` are environment variables (capitals) and programs without which there is no score; `paper` are the rows of
    arXiv 2410.11829 by size: LLaVA-1.5, with MMFuser; `differs` says how that protocol is another one.
    """

    title: str
    tasks: Sequence[str]
    metric: Optional[str] = None
    scale: float = 100.0
    needs: Sequence[str] = ()
    paper: Dict[str, Tuple[float, float]] = {}
    differs: str = ""


def _regions(kind: str) -> Tuple[str, ...]:
    splits = (("refcoco", "val testA testB"), ("refcoco+", "val testA testB"), ("refcocog", "val test"))
    return tuple(f"{name}_{kind}_{split}" for name, parts in splits for split in parts.split())


PAPER = {
    "vqav2": {"7b": (78.5, 79.1), "13b": (80.0, 80.1)},
    "gqa": {"7b": (62.0, 62.8), "13b": (63.3, 63.4)},
    "vizwiz": {"7b": (50.0, 53.4), "13b": (53.6, 57.4)},
    "sqa": {"7b": (66.8, 68.7), "13b": (71.6, 71.2)},
    "textvqa": {"7b": (58.2, 58.8), "13b": (61.3, 59.9)},
    "pope": {"7b": (85.9, 86.3), "13b": (85.9, 87.5)},
    "mme": {"7b": (1510.7, 1479.7), "13b": (1531.3, 1585.2)},
    "mmbench": {"7b": (64.3, 67.5), "13b": (67.7, 69.9)},
    "mmbench_cn": {"7b": (58.3, 60.1), "13b": (63.6, 63.8)},
    "seed": {"7b": (58.6, 60.8), "13b": (61.6, 62.0)},
    "llavabench": {"7b": (63.4, 65.5), "13b": (70.7, 71.8)},
    "mmvet": {"7b": (30.5, 32.6), "13b": (35.4, 36.6)},
    "ocrbench": {"7b": (297, 315), "13b": (331, 343)},
    "regioncap": {"7b": (37.2, 39.7), "13b": (38.9, 42.8)},
    "rec": {"7b": (51.7, 57.4), "13b": (60.7, 61.1)},
}
DIFFERS = {
    "vqav2": "validation split; the paper's is test-dev (task vqav2_test writes a file for that server)",
    "vizwiz": "validation split; the paper's is test-dev (task vizwiz_vqa_test writes a file for that server)",
    "textvqa": "no OCR tokens in the prompt; LLaVA's script gives them, and scores higher",
    "pope": "F1 over all questions, where only a bare 'yes' is one; the paper's is the mean of three, and LLaVA's "
    "script takes whatever says no 'no' for a yes",
    "mmbench": "letters are read off by rules here; the paper's answers were scored by MMBench's server",
    "mmbench_cn": "a judge reads answers that name no letter; the paper's answers were scored by MMBench's server",
    "seed": "video questions show all frames of the data set; LLaVA's script shows the middle one",
    "llavabench": "another judge than LLaVA's gpt-4-0314",
    "mmvet": "another judge, and a prompt that asks to think step by step",
    "ocrbench": "case is ignored in every part",
    "rec": "boxes are read as fractions of the picture, while LLaVA-1.5 learned them as fractions of the padded "
    "square (LLaVA issue 606); the paper evidently did the same",
}
JUDGE = ("OPENAI_API_KEY",)  # without it lmms-eval draws letters at random
JAVA = ("java",)  # runs the tokenizer of pycocoevalcap
SUITES = {
    "vqav2": Suite("VQAv2", ["vqav2_val"], "exact_match"),
    "gqa": Suite("GQA", ["gqa"], "exact_match"),
    "vizwiz": Suite("VizWiz", ["vizwiz_vqa_val"], "exact_match"),
    "sqa": Suite("SQA-I", ["scienceqa_img"], "exact_match"),
    "textvqa": Suite("TextVQA", ["textvqa_val"], "exact_match"),
    "pope": Suite("POPE", ["pope"], "pope_f1_score"),
    "mme": Suite("MME", ["mme"], "mme_perception_score", 1.0),
    "mmbench": Suite("MMB", ["mmbench_en_dev_static"], "gpt_eval_score", 1.0),
    "mmbench_cn": Suite("MMB-CN", ["mmbench_cn_dev"], "gpt_eval_score", 1.0, JUDGE),
    "seed": Suite("SEED", ["seedbench"], "seed_all"),
    "llavabench": Suite("LLaVA-W", ["llava_in_the_wild"], "gpt_eval_llava_all", 1.0, JUDGE),
    "mmvet": Suite("MM-Vet", ["mmvet"], "gpt_eval_score", 1.0, JUDGE),
    "ocrbench": Suite("OCRBench", ["ocrbench"], "ocrbench_accuracy", 1000.0),
    "regioncap": Suite("Region captioning", _regions("bbox"), "refcoco_CIDEr", 100.0, JAVA),
    "rec": Suite("REC", _regions("bbox_rec"), "refcoco_ACC@0.5"),
    "cv_bench": Suite("CV-Bench", ["cv_bench"], "cv_bench_acc"),
    "countbench": Suite("CountBench", ["countbench"], "acc"),
    "vstar": Suite("V*", ["vstar_bench"], "vstar_overall_acc"),
    "mmvp": Suite("MMVP", ["mmvp"], "mmvp_pair_accuracy"),
}
SUITES = {key: suite._replace(paper=PAPER.get(key, {}), differs=DIFFERS.get(key, "")) for key, suite in SUITES.items()}
