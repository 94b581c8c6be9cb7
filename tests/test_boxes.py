"""Boxes in answers, and what RefCOCO's scores make of them; expected values are worked out by hand."""

import math
import os
import shutil
import sys
from pathlib import Path

import benchmarks
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "evaluation"))

import refcoco  # noqa: E402
import suites  # noqa: E402
from boxes import iou, parse_box, to_pixels  # noqa: E402

BOX = (0.25, 0.1, 0.5, 0.9)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("[0.25, 0.1, 0.5, 0.9]", "fraction"),
        ("[0.25,.10,0.50,0.9]", "fraction"),
        ("It is at [0.25 0.1 0.5 0.9].", "fraction"),
        ("(0.25, 0.1, 0.5, 0.9)", "fraction"),
        ("0.25, 0.1, 0.5, 0.9", "fraction"),
        ("[[0.25, 0.1, 0.5, 0.9]]", "fraction"),
        ("[0.5, 0.9, 0.25, 0.1]", "fraction"),
        ("2 dogs, the left one is [0.25, 0.1, 0.5, 0.9]", "fraction"),
        ("[0.25, 0.1, 0.5, 0.9] and [0.0, 0.0, 1.0, 1.0]", "fraction"),
        ("<box>[0.25, 0.1, 0.5, 0.9]</box>", "fraction"),
        ("[25%, 10%, 50%, 90%]", "percent"),
        ("25 %, 10 %, 50 %, 90 %", "percent"),
        ("[250, 100, 500, 900]", "scaled"),
        ("<box>(250,100),(500,900)</box>", "scaled"),
        ("<ref>dog</ref><box>[[250, 100, 500, 900]]</box>", "scaled"),
        ("(250,100)</box><box>(500,900)", "scaled"),
        ("{250 100 500 900}", "scaled"),
    ],
)
def test_formats_of_the_same_box(text, kind):
    parsed = parse_box(text)
    assert parsed.box == pytest.approx(BOX) and parsed.kind == kind and not parsed.outside


def test_whole_numbers_are_read_as_the_scale_says():
    assert parse_box("[0, 0, 999, 999]", scale=999).box == (0, 0, 1, 1)
    assert parse_box("[10, 20, 30, 40]", scale=None)[:2] == ((10, 20, 30, 40), "pixels")
    assert parse_box("[0, 0, 1, 1]").kind == "fraction"


@pytest.mark.parametrize(
    "text", ["", "a brown dog", "[0.1, 0.2, 0.3]", "at 3 o'clock, 2 of 5", "v1.2.3.4", "[x1, y1, x2, y2]"]
)
def test_no_box_is_none(text):
    assert parse_box(text) is None


@pytest.mark.parametrize("text", ["[-0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 1.02, 0.4]", "[10, 20, 1200, 30]"])
def test_coordinates_outside_the_image_are_noticed(text):
    assert parse_box(text).outside


def test_fractions_of_the_padded_square_become_pixels():
    # 40 x 20: the square is 40 wide, the image starts 10 below its top. 20 x 41: 10 right of its left (10.5 cut).
    whole = parse_box("[0, 0.25, 1, 0.75]")
    assert to_pixels(whole, 40, 20, padded=True) == (0, 0, 40, 20)
    assert to_pixels(whole, 40, 20, padded=False) == (0, 5, 40, 15)
    assert to_pixels(parse_box("[0.5, 0, 1, 1]"), 20, 41, padded=True) == (10.5, 0, 31, 41)
    assert to_pixels(parse_box("[0.5, 0, 1, 1]"), 30, 30, padded=True) == (15, 0, 30, 30)
    assert to_pixels(parse_box("[2, 3, 4, 5]", scale=None), 40, 20, padded=True) == (2, 3, 4, 5)


def test_intersection_over_union():
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 2, 1), (0, 0, 1, 1)) == 0.5
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0, "an empty box hits nothing, not even itself"


def test_padding_agrees_with_llavas_own():
    from llava.mm_utils import expand2square
    from PIL import Image

    for size in ((41, 20), (20, 41), (33, 33)):
        square = expand2square(Image.new("RGB", size, "white"), (0, 0, 0))
        left, top, right, bottom = square.getbbox()
        fractions = [left / square.width, top / square.height, right / square.width, bottom / square.height]
        assert to_pixels(parse_box(str(fractions)), *size, padded=True) == pytest.approx((0, 0, *size))


def rec(texts, size=(40, 20), split="RefCOCO val"):
    about = {"split": split, "size": size, "box": [4.0, 2.0, 12.0, 6.0]}
    return [{"question_id": index, "text": text, "metadata": about} for index, text in enumerate(texts)]


def test_rec_averages_over_splits_in_both_readings_and_counts_what_it_cannot_read():
    image, square = "[0.1, 0.1, 0.3, 0.3]", "[0.1, 0.3, 0.3, 0.4]"  # the box as fractions of 40 x 20 and of 40 x 40
    answers = rec([image, square, image, "no idea"]) + rec([square, "[100, 100, 1300, 600]"], split="RefCOCOg test")
    result = refcoco.score_boxes(answers, padded=True)
    assert result["parts"] == {"RefCOCO val": "50.0", "RefCOCOg test": "0.0"} and result["score"] == 25
    assert result["padded_parts"] == {"RefCOCO val": "25.0", "RefCOCOg test": "50.0"} and result["padded"] == 37.5
    assert result["unparsed"] == {"no box": 1, "outside the image": 1}
    assert result["boxes"] == {"fraction": 4, "scaled": 1}
    assert "padded" not in refcoco.score_boxes(answers, padded=False)


def test_half_overlap_counts_as_a_hit():
    assert refcoco.score_boxes(rec(["[0.1, 0.1, 0.3, 0.2]"]), padded=False)["score"] == 100
    assert refcoco.score_boxes(rec(["[0.1, 0.1, 0.3, 0.19]"]), padded=False)["score"] == 0


def caption(split, text, *references):
    return {"text": text, "metadata": {"split": split, "references": list(references)}}


@pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap's tokenizer needs Java")
def test_region_captions_get_cider_averaged_over_splits():
    answers = [
        caption("RefCOCO val", "The brown dog on the left.", "brown dog on the left"),  # not "the": see below
        caption("RefCOCO val", "", "cat behind a red car"),
        caption("RefCOCOg val", "one two three four", "one two three four"),
        caption("RefCOCOg val", "Five six, seven EIGHT!", "five six seven eight"),
    ]
    result = refcoco.score_captions(answers)
    # Second split: both captions are their references after tokenization, so 10 each; "100 times" makes 1000.
    assert result["parts"]["RefCOCOg val"] == "1000.0"
    # First split, n = 1: 4 + 2 idf-weighted words, "the" twice in the caption and once in the reference. All words are
    # in one of two references, so every idf is log 2 and the vectors are plain counts; clipped products over the norms.
    cosines = [
        (4 + 1) / math.sqrt((4 + 4) * 5),  # brown dog on left: 1 each; the: min(2, 1) * 1; norms sqrt(4+2*2), sqrt(5)
        4 / math.sqrt(5 * 4),
        3 / math.sqrt(4 * 3),
        2 / math.sqrt(3 * 2),
    ]
    penalty = math.exp(-((6 - 5) ** 2) / (2 * 6.0**2))
    first = 10 * penalty * sum(cosines) / 4
    assert float(result["parts"]["RefCOCO val"]) == pytest.approx(100 * first / 2, abs=0.06)
    assert result["score"] == pytest.approx((100 * first / 2 + 1000) / 2, abs=0.01)
    assert result["unparsed"] == {"empty answer": 1}


def test_a_java_that_does_not_work_is_named(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answers = [caption("RefCOCO val", text, "a brown dog") for text in ("a dog", "a cat")]
    with pytest.raises(ValueError, match="java returned only some of the texts of RefCOCO val"):
        refcoco.score_captions(answers)


@pytest.mark.parametrize(
    "suite, readable, unreadable",
    [
        (
            "pope",
            ["Yes", "yes.", "No", "No, it is a cat.", "There is not.", "no"],
            ["NO", "A cat. So no", "No\nIt is", "", "No!"],  # read as a yes
        ),
        (
            "sqa",
            ["B", "B. blue", "The answer is B.", "I see. The answer is B, then"],
            ["b", "B.", "F", "The answer is B. The answer is C.", "The answer is B"],
        ),
    ],
)
def test_unreadable_is_what_llavas_scorer_misreads(suite, readable, unreadable):
    valid = suites.SUITES[suite].valid
    assert [text for text in readable if not valid(text)] == [] == [text for text in unreadable if valid(text)]


def test_questions_come_from_the_parquet_files_in_order(tmp_path):
    splits = benchmarks.refcoco(tmp_path, parts=2)
    folder = tmp_path / "refcoco"
    assert all(file.exists() for file in refcoco.files(folder)) and len(refcoco.files(folder)) == 16
    expressions = refcoco.expressions(folder)
    assert [question["question_id"] for question in expressions[:5]] == [
        *("RefCOCO val/0/0", "RefCOCO val/0/1", "RefCOCO val/1/0", "RefCOCO val/1/1", "RefCOCO testA/0/0")
    ]
    assert list(dict.fromkeys(question["metadata"]["split"] for question in expressions)) == splits
    assert expressions[0]["text"].endswith("the region this sentence describes: the dog on side 0")
    assert expressions[0]["metadata"]["box"] == [4, 2, 12, 12], "corners, not a width and a height"
    regions = refcoco.regions(folder)
    assert len(regions) == 16 and regions[1]["metadata"]["references"] == ["the dog on side 1", "a brown dog number 1"]


def test_only_region_questions_get_their_region_outlined(tmp_path):
    benchmarks.refcoco(tmp_path)
    question = refcoco.regions(tmp_path / "refcoco")[1]
    marked = refcoco.image(question)
    assert marked.size == (20, 40) == question["metadata"]["size"]
    assert marked.getpixel((4, 2)) == marked.getpixel((12, 12)) == (255, 0, 0) != marked.getpixel((6, 6))
    plain = refcoco.image(refcoco.expressions(tmp_path / "refcoco")[2])
    assert plain.getpixel((4, 2)) == plain.getpixel((6, 6)) == (128, 128, 128)
