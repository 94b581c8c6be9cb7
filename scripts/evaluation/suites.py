"""The suites: one row each. A new suite is a new row.

`LlavaSuite` runs a shell script of the user's LLaVA checkout; `OwnSuite` is what LLaVA lacks. All paths are below the
data folder, laid out as LLaVA's docs/Evaluation.md says; {name} is the name the answers are filed under.
"""

import re
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import ocrbench
import refcoco
from progress import read

EVAL_ZIP = "eval.zip, linked in LLaVA's docs/Evaluation.md"


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


WORDS = matches(r"(?s).*\S.*")
LETTER = matches(r"[A-D]")


def yes_or_no(text: str) -> bool:
    """LLaVA's eval_pope.py takes a first sentence with one of three words for a no, and anything else for a yes."""
    sentence = text.split(".")[0].replace(",", "")
    no = {"No", "not", "no"} & set(sentence.split(" "))
    return bool(no or re.search(r"\byes\b", sentence, re.IGNORECASE))


def choice(text: str) -> bool:
    """LLaVA's eval_science_qa.py reads a letter, "B. …", or a text that says exactly once what the answer is."""
    return bool(re.fullmatch(r"(?s)[A-E]|[A-E]\. .*", text)) or len(re.findall(r"The answer is [A-Z].", text)) == 1


class LlavaSuite(NamedTuple):
    """A benchmark of LLaVA's scripts/v1_5/eval.

    `needs` are (file or folder, where to get it); `valid` says whether the suite's scorer can read an answer, and those
    it cannot are counted, as is what `extra` counts; `score` reads the number off the output of LLaVA's or the
    benchmark's own scorer; where there is no local one, `upload` is the file that LLaVA's script makes for `server`;
    `derived` are files that LLaVA's script would keep although the answers they were made from are new.
    """

    title: str
    script: str
    questions: str
    answers: str
    needs: Sequence[Tuple[str, str]]
    images: Optional[str] = None
    valid: Callable[[str], bool] = WORDS
    score: Optional[Callable[[str], float]] = None
    upload: Optional[str] = None
    server: str = ""
    extra: Callable[[Path, str], Dict[str, int]] = lambda data, name: {}
    modules: Sequence[str] = ()
    variables: Sequence[str] = ()
    derived: Sequence[str] = ()

    @property
    def merged(self) -> bool:
        """Whether the script asks for chunks and puts the answers together itself."""
        return self.answers.endswith("/merge.jsonl")


class OwnSuite(NamedTuple):
    """A benchmark that LLaVA lacks, answered by answering.py and scored here."""

    title: str
    folder: str
    answers: str
    files: Callable[[Path], List[Path]]
    questions: Callable[[Path], List[Dict]]
    image: Callable[[Dict], object]
    scorer: Callable[..., Dict]
    where: str
    max_new_tokens: int
    modules: Sequence[str] = ()
    programs: Sequence[str] = ()

    def questions_of(self, data: Path) -> List[Dict]:
        return self.questions(data / self.folder)


def number(pattern: str) -> Callable[[str], float]:
    """Reads the last match of `pattern`'s group in a scorer's output. Raises ValueError where there is none."""

    def find(output: str) -> float:
        found = re.findall(pattern, output, re.MULTILINE)
        if not found:
            raise ValueError(f"the scorer printed nothing like {pattern!r}")
        return float(found[-1])

    return find


def pope_f1(output: str) -> float:
    """Mean F1, in percent, of POPE's three categories."""
    values = [float(value) for value in re.findall(r"^F1 score: ([\d.]+)", output, re.MULTILINE)]
    if len(values) != 3:
        raise ValueError(f"eval_pope.py printed {len(values)} F1 scores; expected 3 (adversarial, popular, random)")
    return 100 * sum(values) / 3


def unparsed_reviews(data: Path, name: str) -> Dict[str, int]:
    """Reviews whose two scores LLaVA's script could not read; it stores -1 for both, and they lower the mean."""
    reviews = data / "llava-bench-in-the-wild" / "reviews" / f"{name}.jsonl"
    return {"review without scores": sum(-1 in row["tuple"] for row in read(reviews))} if reviews.is_file() else {}


SUITES = {
    "vqav2": LlavaSuite(
        "VQAv2",
        "vqav2.sh",
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "vqav2/answers/llava_vqav2_mscoco_test-dev2015/{name}/merge.jsonl",
        [
            ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", EVAL_ZIP),
            ("vqav2/llava_vqav2_mscoco_test2015.jsonl", EVAL_ZIP),
            ("vqav2/test2015", "http://images.cocodataset.org/zips/test2015.zip"),
        ],
        images="vqav2/test2015",
        upload="vqav2/answers_upload/llava_vqav2_mscoco_test-dev2015/{name}.json",
        server="https://eval.ai/web/challenges/challenge-page/830/my-submission",
    ),
    "gqa": LlavaSuite(
        "GQA",
        "gqa.sh",
        "gqa/llava_gqa_testdev_balanced.jsonl",
        "gqa/answers/llava_gqa_testdev_balanced/{name}/merge.jsonl",
        [
            ("gqa/llava_gqa_testdev_balanced.jsonl", EVAL_ZIP),
            ("gqa/data/images", "https://cs.stanford.edu/people/dorarad/gqa/download.html"),
            ("gqa/data/testdev_balanced_questions.json", "https://cs.stanford.edu/people/dorarad/gqa/download.html"),
            (
                "gqa/data/eval/eval.py",
                "https://cs.stanford.edu/people/dorarad/gqa/evaluate.html, changed as LLaVA's docs/Evaluation.md says",
            ),
        ],
        images="gqa/data/images",
        score=number(r"^Accuracy: ([\d.]+)%"),
    ),
    "vizwiz": LlavaSuite(
        "VizWiz",
        "vizwiz.sh",
        "vizwiz/llava_test.jsonl",
        "vizwiz/answers/{name}.jsonl",
        [
            ("vizwiz/llava_test.jsonl", EVAL_ZIP),
            ("vizwiz/test", "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip"),
        ],
        images="vizwiz/test",
        upload="vizwiz/answers_upload/{name}.json",
        server="https://eval.ai/web/challenges/challenge-page/2185/my-submission",
    ),
    "sqa": LlavaSuite(
        "SQA-I",
        "sqa.sh",
        "scienceqa/llava_test_CQM-A.json",
        "scienceqa/answers/{name}.jsonl",
        [
            ("scienceqa/llava_test_CQM-A.json", EVAL_ZIP),
            *(
                (f"scienceqa/{part}", "data/scienceqa of https://github.com/lupantech/ScienceQA")
                for part in ("pid_splits.json", "problems.json", "images/test")
            ),
        ],
        images="scienceqa/images/test",
        valid=choice,
        score=number(r"IMG-Accuracy: ([\d.]+)%"),
    ),
    "textvqa": LlavaSuite(
        "TextVQA",
        "textvqa.sh",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/answers/{name}.jsonl",
        [
            ("textvqa/llava_textvqa_val_v051_ocr.jsonl", EVAL_ZIP),
            ("textvqa/TextVQA_0.5.1_val.json", "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"),
            ("textvqa/train_images", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
        ],
        images="textvqa/train_images",
        score=number(r"^Accuracy: ([\d.]+)%"),
    ),
    "pope": LlavaSuite(
        "POPE",
        "pope.sh",
        "pope/llava_pope_test.jsonl",
        "pope/answers/{name}.jsonl",
        [
            ("pope/llava_pope_test.jsonl", EVAL_ZIP),
            *(
                (f"pope/coco/coco_pope_{part}.json", "output/coco of https://github.com/AoiDragon/POPE at e3e3926")
                for part in ("adversarial", "popular", "random")
            ),
            ("pope/val2014", "http://images.cocodataset.org/zips/val2014.zip"),
        ],
        images="pope/val2014",
        valid=yes_or_no,
        score=pope_f1,
    ),
    "mme": LlavaSuite(
        "MME",
        "mme.sh",
        "MME/llava_mme.jsonl",
        "MME/answers/{name}.jsonl",
        [
            ("MME/llava_mme.jsonl", EVAL_ZIP),
            ("MME/convert_answer_to_mme.py", EVAL_ZIP),
            *(
                (
                    f"MME/{part}",
                    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (on request)",
                )
                for part in ("MME_Benchmark_release_version", "eval_tool/calculation.py")
            ),
        ],
        images="MME/MME_Benchmark_release_version",
        valid=matches(r"(?is).{0,1}yes.*|.{0,2}no.*"),
        score=number(r"= Perception =+\s*total score: ([\d.]+)"),
        modules=("sklearn",),
    ),
    "mmbench": LlavaSuite(
        "MMB",
        "mmbench.sh",
        "mmbench/mmbench_dev_20230712.tsv",
        "mmbench/answers/mmbench_dev_20230712/{name}.jsonl",
        [
            (
                "mmbench/mmbench_dev_20230712.tsv",
                "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv",
            )
        ],
        valid=LETTER,
        upload="mmbench/answers_upload/mmbench_dev_20230712/{name}.xlsx",
        server="https://opencompass.org.cn/leaderboard-multimodal",
        modules=("pandas", "openpyxl"),
    ),
    "mmbench_cn": LlavaSuite(
        "MMB-CN",
        "mmbench_cn.sh",
        "mmbench_cn/mmbench_dev_cn_20231003.tsv",
        "mmbench_cn/answers/mmbench_dev_cn_20231003/{name}.jsonl",
        [
            (
                "mmbench_cn/mmbench_dev_cn_20231003.tsv",
                "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_cn_20231003.tsv",
            )
        ],
        valid=LETTER,
        upload="mmbench_cn/answers_upload/mmbench_dev_cn_20231003/{name}.xlsx",
        server="https://opencompass.org.cn/leaderboard-multimodal",
        modules=("pandas", "openpyxl"),
    ),
    "seed": LlavaSuite(
        "SEED",
        "seed.sh",
        "seed_bench/llava-seed-bench.jsonl",
        "seed_bench/answers/{name}/merge.jsonl",
        [
            ("seed_bench/llava-seed-bench.jsonl", EVAL_ZIP),
            *(
                (f"seed_bench/{part}", "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md")
                for part in ("SEED-Bench.json", "SEED-Bench-image", "SEED-Bench-video-image")
            ),
        ],
        images="seed_bench",
        valid=LETTER,
        score=number(r"^Total accuracy: ([\d.]+)%"),
        upload="seed_bench/answers_upload/{name}.jsonl",
    ),
    "mmvet": LlavaSuite(
        "MM-Vet",
        "mmvet.sh",
        "mm-vet/llava-mm-vet.jsonl",
        "mm-vet/answers/{name}.jsonl",
        [
            ("mm-vet/llava-mm-vet.jsonl", EVAL_ZIP),
            ("mm-vet/images", "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"),
        ],
        images="mm-vet/images",
        upload="mm-vet/results/{name}.json",
        server="the notebook of https://github.com/yuweihao/MM-Vet (asks GPT-4)",
    ),
    "ocrbench": OwnSuite(
        "OCRBench",
        "OCRBench",
        "OCRBench/answers/{name}.jsonl",
        ocrbench.files,
        ocrbench.questions,
        ocrbench.image,
        ocrbench.score,
        "https://github.com/Yuliang-Liu/MultimodalOCR (OCRBench.json, and OCRBench_Images/ from its README)",
        ocrbench.MAX_NEW_TOKENS,
    ),
    "regioncap": OwnSuite(
        "Region captioning",
        "refcoco",
        "refcoco/answers/regioncap/{name}.jsonl",
        refcoco.files,
        refcoco.regions,
        refcoco.image,
        refcoco.score_captions,
        "https://huggingface.co/datasets/lmms-lab/RefCOCO, …/RefCOCOplus and …/RefCOCOg",
        refcoco.MAX_NEW_TOKENS,
        modules=("pyarrow", "pycocoevalcap"),
        programs=("java",),
    ),
    "rec": OwnSuite(
        "REC",
        "refcoco",
        "refcoco/answers/rec/{name}.jsonl",
        refcoco.files,
        refcoco.expressions,
        refcoco.image,
        refcoco.score_boxes,
        "https://huggingface.co/datasets/lmms-lab/RefCOCO, …/RefCOCOplus and …/RefCOCOg",
        refcoco.MAX_NEW_TOKENS,
        modules=("pyarrow",),
    ),
    # Last, because its judge may keep it waiting forever.
    "llavabench": LlavaSuite(
        "LLaVA-W",
        "llavabench.sh",
        "llava-bench-in-the-wild/questions.jsonl",
        "llava-bench-in-the-wild/answers/{name}.jsonl",
        [
            (f"llava-bench-in-the-wild/{part}", "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild")
            for part in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images")
        ],
        images="llava-bench-in-the-wild/images",
        score=number(r"^all ([\d.]+)"),
        extra=unparsed_reviews,
        modules=("openai<1",),  # LLaVA's script calls the old interface, and with a new one repeats its call forever
        variables=("OPENAI_API_KEY",),
        derived=("llava-bench-in-the-wild/reviews/{name}.jsonl",),
    ),
}
