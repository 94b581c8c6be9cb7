"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions (REC) and region captioning, as lmms-eval asks and scores them.

LLaVA has neither. The paper's rows are evidently lmms-eval's (its pull request 52 reports 56.2 and 64.4 for
LLaVA-1.5-7B on RefCOCO's val and testA, the paper's first cells), so prompts, splits and data are, too:

    RefCOCO/data/{val,testA,testB}-*.parquet
    RefCOCOplus/data/{val,testA,testB}-*.parquet
    RefCOCOg/data/{val,test}-*.parquet

Columns used: question_id, image {bytes, path}, answer [str], bbox [x, y, width, height] in pixels. (Its val of RefCOCO
has 8.8 thousand objects, more than twice the UNC split's.)
"""

import functools
import io
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, List, Optional

from boxes import iou, parse_box, to_pixels
from PIL import Image, ImageDraw

SPLITS = tuple((name, split) for name in ("RefCOCO", "RefCOCOplus") for split in ("val", "testA", "testB")) + (
    ("RefCOCOg", "val"),
    ("RefCOCOg", "test"),
)
MAX_NEW_TOKENS = 128
REC_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
    "Please provide the bounding box coordinate of the region this sentence describes: {}"
)
REGION_PROMPT = "Provide a short description for this region."


def files(folder: Path) -> List[Path]:
    """Every parquet file of the eight splits, in order: all the parts that a name's "-of-0000N" promises."""
    wanted = []
    for name, split in SPLITS:
        data = folder / name / "data"
        found = sorted(data.glob(f"{split}-*.parquet"))
        count = re.fullmatch(rf"{split}-\d+-of-(\d+).*", found[0].stem) if found else None
        if not count:
            wanted += found or [data / f"{split}-00000-of-00001.parquet"]
            continue
        for part in range(int(count.group(1))):
            stem = f"{split}-{part:05d}-of-{count.group(1)}"
            wanted.append(next((file for file in found if file.name.startswith(stem)), data / f"{stem}.parquet"))
    return wanted


def _objects(folder: Path) -> List[Dict]:
    import pyarrow.parquet

    rows = []
    for file in files(folder):
        try:
            source = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as problem:
            raise ValueError(f"{file} is not a parquet file ({problem}); is it complete?") from None
        split = f"{file.parent.parent.name} {file.name.split('-')[0]}"
        for group in range(source.num_row_groups):
            table = source.read_row_group(group, columns=["question_id", "answer", "bbox"]).to_pylist()
            for offset, row in enumerate(table):
                rows.append(dict(row, split=split, image=(str(file), group, offset)))
    return rows


@functools.lru_cache(maxsize=1)  # the questions of a row group follow one another
def _pictures(file: str, group: int) -> List[Dict]:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=["image"]).column("image").to_pylist()


def image(question: Dict) -> Image.Image:
    """The picture, with the region's outline in red where the question is about a region."""
    file, group, offset = question["image"]
    picture = Image.open(io.BytesIO(_pictures(file, group)[offset]["bytes"])).convert("RGB")
    question["metadata"]["size"] = picture.size
    if question["text"] == REGION_PROMPT:
        ImageDraw.Draw(picture).rectangle(question["metadata"]["box"], outline="red")
    return picture


def _corners(box: List[float]) -> List[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def expressions(folder: Path) -> List[Dict]:
    """REC: one question per expression."""
    return [
        {
            "question_id": f"{row['split']}/{row['question_id']}/{index}",
            "text": REC_PROMPT.format(expression),
            "image": row["image"],
            "metadata": {"split": row["split"], "box": _corners(row["bbox"])},
        }
        for row in _objects(folder)
        for index, expression in enumerate(row["answer"])
    ]


def regions(folder: Path) -> List[Dict]:
    """Region captioning: one question per object; its expressions are the references."""
    return [
        {
            "question_id": f"{row['split']}/{row['question_id']}",
            "text": REGION_PROMPT,
            "image": row["image"],
            "metadata": {"split": row["split"], "box": _corners(row["bbox"]), "references": row["answer"]},
        }
        for row in _objects(folder)
    ]


def _average(parts: Dict[str, float]) -> float:
    return sum(parts.values()) / len(parts)


def score_boxes(answers: List[Dict], padded: bool, scale: Optional[float] = 1000) -> Dict:
    """P@0.5 (IoU >= 0.5) in percent, averaged over the splits, once per reading of the coordinates.

    `score`: fractions of the image, as lmms-eval and so the paper's row read them. `padded`: fractions of the padded
    square that LLaVA is shown (and its training boxes are of: its issue 606); only where the argument says that the
    checkpoint's image_aspect_ratio is "pad".
    An answer without a box is wrong in both, and counted.
    """
    unparsed, kinds = Counter(), Counter()
    hits = {False: defaultdict(list), True: defaultdict(list)}
    for answer in answers:
        about = answer["metadata"]
        parsed = parse_box(answer["text"], scale)
        unparsed["no box"] += parsed is None
        if parsed:
            kinds[parsed.kind] += 1
            unparsed["outside the image"] += parsed.outside
        for square in hits:
            box = to_pixels(parsed, *about["size"], square) if parsed else (0.0, 0.0, 0.0, 0.0)
            hits[square][about["split"]].append(iou(box, about["box"]) >= 0.5)
    parts = {
        square: {split: 100 * sum(found) / len(found) for split, found in splits.items()}
        for square, splits in hits.items()
    }
    result = {
        "score": _average(parts[False]),
        "questions": len(answers),
        "parts": {split: f"{value:.1f}" for split, value in parts[False].items()},
        "boxes": dict(kinds),
        "unparsed": dict(unparsed),
    }
    if padded:
        result["padded"] = _average(parts[True])
        result["padded_parts"] = {split: f"{value:.1f}" for split, value in parts[True].items()}
    return result


def score_captions(answers: List[Dict]) -> Dict:
    """CIDEr times 100, averaged over the splits: pycocoevalcap's, after its PTB tokenizer.

    Raises ValueError where Java, which the tokenizer runs on, fails; the tokenizer itself does not look.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    splits = defaultdict(list)
    for answer in answers:
        splits[answer["metadata"]["split"]].append(answer)
    parts = {}
    for split, rows in splits.items():
        references = {
            index: [{"caption": text} for text in row["metadata"]["references"]] for index, row in enumerate(rows)
        }
        captions = {index: [{"caption": row["text"]}] for index, row in enumerate(rows)}
        words = [PTBTokenizer().tokenize(texts) for texts in (references, captions)]
        for texts, found in zip((references, captions), words):
            if [len(found.get(index, ())) for index in texts] != [len(texts[index]) for index in texts]:
                raise ValueError(f"java returned only some of the texts of {split}: try `java -version`")
        value, _ = Cider().compute_score(*words)
        parts[split] = 100 * float(value)
    return {
        "score": _average(parts),
        "questions": len(answers),
        "parts": {split: f"{value:.1f}" for split, value in parts.items()},
        "unparsed": {"empty answer": sum(not answer["text"].strip() for answer in answers)},
    }
