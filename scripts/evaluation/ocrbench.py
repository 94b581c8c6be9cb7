"""OCRBench: 1000 questions about text in images; an answer scores if it contains the expected text.

Data as published (Yuliang-Liu/MultimodalOCR): OCRBench.json, a list of {dataset_name, id, image_path, question,
answers, type}, or the same records one a line (OCRBench.jsonl, as in the MMFuser authors' repository), beside the
folder OCRBench_Images/.
"""

from collections import Counter
from pathlib import Path
from typing import Dict, List

from PIL import Image
from progress import read

MAX_NEW_TOKENS = 128
PUBLISHED = 1000  # questions


def files(folder: Path) -> List[Path]:
    """The file with the questions, .json or .jsonl; where neither exists, the one expected."""
    found = [file for file in (folder / "OCRBench.json", folder / "OCRBench.jsonl") if file.is_file()]
    return found[:1] or [folder / "OCRBench.json"]


def questions(folder: Path) -> List[Dict]:
    """The records in the file's order. `id` repeats between its data sets, so the position is the question_id."""
    return [
        {
            "question_id": index,
            "text": record["question"],
            "metadata": {key: record[key] for key in ("dataset_name", "type", "answers")},
            "image": str(folder / "OCRBench_Images" / record["image_path"]),
        }
        for index, record in enumerate(read(files(folder)[0]))
    ]


def image(question: Dict) -> Image.Image:
    return Image.open(question["image"]).convert("RGB")


def contains(text: str, record: Dict) -> bool:
    """OCRBench's rule: case and line breaks do not matter; in formulas (HME100k) case does, and blanks do not."""
    expected = record["answers"] if isinstance(record["answers"], list) else [record["answers"]]
    if record["dataset_name"] == "HME100k":
        return any("".join(answer.split()) in "".join(text.split()) for answer in expected)
    text = text.lower().strip().replace("\n", " ")
    return any(answer.lower().strip().replace("\n", " ") in text for answer in expected)


def score(answers: List[Dict]) -> Dict:
    """Number of right answers, per question type, and how many were empty."""
    right, total = Counter(), Counter()
    for answer in answers:
        record = answer["metadata"]
        total[record["type"]] += 1
        right[record["type"]] += contains(answer["text"], record)
    short = f"{len(answers)} questions, where the published file has {PUBLISHED}: the score is no OCRBench score"
    return {
        "score": sum(right.values()),
        "notes": [short] if len(answers) != PUBLISHED else [],
        "questions": len(answers),
        "parts": {kind: f"{right[kind]} of {total[kind]}" for kind in total},
        "unparsed": {"empty answer": sum(not answer["text"].strip() for answer in answers)},
    }
