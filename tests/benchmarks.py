"""Each benchmark's data in miniature, in its real file format, with answers and their scores worked out by hand."""

import base64
import csv
import io
import json

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
COUNTED = "answer not as the scorer expects"

# What stands in data folders but comes from the benchmarks' own downloads; these print what the originals print.
GQA_EVAL = """
import argparse, json
tier = argparse.ArgumentParser()
tier.add_argument("--tier")
tier = tier.parse_args().tier
questions = json.load(open(f"{tier}_questions.json"))
predictions = {row["questionId"]: row["prediction"] for row in json.load(open(f"{tier}_predictions.json"))}
right = sum(predictions[key] == row["answer"] for key, row in questions.items())
print(f"Binary: 12.00%\\nOpen: 34.00%\\nAccuracy: {100 * right / len(questions):.2f}%\\nValidity: 56.00%")
"""
MME_CONVERT = """
import argparse, json, os
name = argparse.ArgumentParser()
name.add_argument("--experiment")
name = name.parse_args().experiment
os.makedirs(f"eval_tool/answers/{name}", exist_ok=True)
with open(f"eval_tool/answers/{name}/existence.txt", "w") as out:
    for line in open(f"answers/{name}.jsonl"):
        out.write(json.loads(line)["text"] + "\\n")
"""
MME_CALCULATION = """
import argparse
folder = argparse.ArgumentParser()
folder.add_argument("--results_dir")
folder = folder.parse_args().results_dir
answers = [line.strip().lower()[:4] for line in open(f"{folder}/existence.txt")]
right = ["yes" in answer if index % 2 == 0 else "no" in answer for index, answer in enumerate(answers)]
pairs = [first and second for first, second in zip(right[::2], right[1::2])]
print("=========== Perception ===========")
print("total score:", 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs), "\\n")
print("=========== Cognition ===========")
print("total score:", 7.5, "\\n")
"""


def picture(path, size=(40, 30)):
    """Write a grey picture; without an extension, as SEED's, it is a JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path, format=None if path.suffix else "JPEG")
    return path


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def answered(file, questions, texts):
    """An answers file as LLaVA's entry points write it."""
    lines(
        file,
        [
            {"question_id": key, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
            for (key, prompt), text in zip(questions, texts)
        ],
    )


def short_answer(data, suite, question_file, images, questions, answers_file=None, texts=()):
    """A question file of {question_id, image, text, category} with its pictures, and answers to it."""
    rows = [dict(zip(("question_id", "image", "text", "category"), question)) for question in questions]
    lines(data / suite / question_file, rows)
    for row in rows:
        picture(data / suite / images / row["image"])
    if answers_file:
        answered(data / suite / answers_file, [(row["question_id"], row["text"]) for row in rows], texts)
    return rows


def vqav2(data, name):
    questions = [(index, f"COCO_{index}.jpg", f"What is it?{SHORT}", "default") for index in (11, 12, 13)]
    split = "llava_vqav2_mscoco_test-dev2015"
    short_answer(data, "vqav2", "llava_vqav2_mscoco_test2015.jsonl", "test2015", [*questions, (14, *questions[0][1:])])
    answers = f"answers/{split}/{name}/merge.jsonl"
    short_answer(data, "vqav2", f"{split}.jsonl", "test2015", questions, answers, ["Two dogs", "red", ""])
    return "upload", None, 1


def gqa(data, name):
    questions = [(str(index), f"{index}.jpg", f"Is it?{SHORT}", "default") for index in (201, 202, 203, 204, 205)]
    split = "llava_gqa_testdev_balanced"
    answers = f"answers/{split}/{name}/merge.jsonl"
    short_answer(data, "gqa", f"{split}.jsonl", "data/images", questions, answers, ["Yes.", "red", "cat", "no", "no"])
    truth = {"201": "yes", "202": "red", "203": "dog", "204": "no", "205": "yes"}
    write(data / "gqa/data/testdev_balanced_questions.json", {key: {"answer": text} for key, text in truth.items()})
    write(data / "gqa/data/eval/eval.py", GQA_EVAL)
    return "scored", 60.0, 0


def vizwiz(data, name):
    questions = [(f"VizWiz_test_{i}.jpg", f"VizWiz_test_{i}.jpg", f"What?{SHORT}", "default") for i in range(2)]
    short_answer(data, "vizwiz", "llava_test.jsonl", "test", questions, f"answers/{name}.jsonl", ["unanswerable", "ok"])
    return "upload", None, 0


def sqa(data, name):
    folder = data / "scienceqa"
    problems = {
        str(key): {"question": "Which?", "choices": ["red", "blue", "green"], "answer": 1, "image": image}
        for key, image in ((4, "image.png"), (5, "image.png"), (7, "image.png"), (9, None))
    }
    rows = []
    for key, problem in problems.items():
        turns = [{"from": "human", "value": "Which?\n<image>" if problem["image"] else "Which?"}]
        row = {"id": key, "conversations": [*turns, {"from": "gpt", "value": "The answer is B."}]}
        if problem["image"]:
            picture(folder / "images" / "test" / key / "image.png")
            row["image"] = f"{key}/image.png"
        rows.append(row)
    write(folder / "llava_test_CQM-A.json", rows)
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"test": list(problems)})
    prompts = [(row["id"], ("<image>\n" if "image" in row else "") + "Which?") for row in rows]
    # With pictures: right, wrong, unreadable; without: right. IMG accuracy is 1 of 3.
    answered(folder / "answers" / f"{name}.jsonl", prompts, ["B", "A. red", "perhaps blue", "The answer is B."])
    return "scored", 33.33, 1


def textvqa(data, name):
    people = {"a": ["stop"] * 10, "b": ["main st"] * 2 + ["main street"] * 8, "c": ["7"] * 10}
    truth = [{"image_id": key, "question": f"What is {key}?", "answers": said} for key, said in people.items()]
    write(data / "textvqa/TextVQA_0.5.1_val.json", {"data": truth})
    questions = [
        (key, f"{key}.jpg", f"What is {key}?\nReference OCR token: X{SHORT}", "default") for key in people
    ]
    file = "llava_textvqa_val_v051_ocr.jsonl"
    short_answer(data, "textvqa", file, "train_images", questions, f"answers/{name}.jsonl", ["Stop", "main st", ""])
    # 1; two of ten people: (2 * 1/3 + 8 * 2/3) / 10 = 0.6; 0.
    return "scored", 53.33, 1


def pope(data, name):
    labels = {"adversarial": ["yes", "no"], "popular": ["yes", "no", "yes"], "random": ["yes", "no"]}
    questions, index = [], 0
    for kind, said in labels.items():
        rows = []
        for label in said:
            index += 1
            questions.append((index, f"{index}.jpg", f"Is there a dog?{SHORT}", kind))
            rows.append({"question_id": index, "image": f"{index}.jpg", "text": "Is there a dog?", "label": label})
        lines(data / f"pope/coco/coco_pope_{kind}.json", rows)
    texts = ["Yes", "Yes", "yes", "No", "no", "Yes, there is.", "a cat"]
    short_answer(data, "pope", "llava_pope_test.jsonl", "val2014", questions, f"answers/{name}.jsonl", texts)
    # Each category has one true positive and one error: F1 = 2 / 3. LLaVA's scorer takes "a cat" for a yes.
    return "scored", 100 * 2 / 3, 1


def mme(data, name):
    questions = [
        (f"existence/{index}.jpg", f"existence/{index}.jpg", f"Is it a {thing}? Please answer yes or no.{SHORT}", "e")
        for index in (1, 2)
        for thing in ("dog", "cat")
    ]
    images, texts = "MME_Benchmark_release_version", ["Yes", "No", "yes", "Dog"]
    short_answer(data, "MME", "llava_mme.jsonl", images, questions, f"answers/{name}.jsonl", texts)
    write(data / "MME/convert_answer_to_mme.py", MME_CONVERT)
    write(data / "MME/eval_tool/calculation.py", MME_CALCULATION)
    return "scored", 75.0 + 50.0, 1


def mmbench(data, name, suite="mmbench", split="mmbench_dev_20230712"):
    pixels = io.BytesIO()
    Image.new("RGB", (30, 40), "gray").save(pixels, format="JPEG")
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    file = data / suite / f"{split}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as table:
        writer = csv.DictWriter(table, columns, delimiter="\t", restval="")
        writer.writeheader()
        for index, question in ((241, "Which?"), (252, 'Two lines,\nand "quotes"?')):
            row = {"index": index, "question": question, "A": "red", "B": "blue", "answer": "A", "category": "c"}
            writer.writerow({**row, "image": base64.b64encode(pixels.getvalue()).decode(), "split": "dev"})
    answers = file.parent / "answers" / split / f"{name}.jsonl"
    answered(answers, [(241, "Which?"), (252, "Two?")], ["A", "I cannot tell"])
    return "upload", None, 1


def mmbench_cn(data, name):
    return mmbench(data, name, "mmbench_cn", "mmbench_dev_cn_20231003")


def seed(data, name):
    questions = [
        (101, "SEED-Bench-image/a", "Which?", "c"),
        (102, "SEED-Bench-image/b", "Which?", "c"),
        ("v8", "SEED-Bench-video-image/8.png", "Which?", "c"),
        ("v9", "SEED-Bench-video-image/9.png", "Which?", "c"),
    ]
    rows = [
        {"question_id": str(key), "question_type_id": kind, "data_type": media, "answer": "A"}
        for (key, *_), kind, media in zip(questions, (1, 1, 2, 2), ("image", "image", "video", "video"))
    ]
    write(data / "seed_bench/SEED-Bench.json", {"questions": rows, "question_type": {"Scene": 1, "Action": 2}})
    answers = f"answers/{name}/merge.jsonl"
    short_answer(data, "seed_bench", "llava-seed-bench.jsonl", ".", questions, answers, ["A", "A.", "A", "B"])
    return "scored", 50.0, 1


def llavabench(data, name):
    folder = data / "llava-bench-in-the-wild"
    kinds = ("conv", "detail", "conv")
    questions = [(index, "001.jpg", f"Describe {index}.", kind) for index, kind in enumerate(kinds)]
    suite, answers = "llava-bench-in-the-wild", f"answers/{name}.jsonl"
    short_answer(data, suite, "questions.jsonl", "images", questions, answers, ["good", "bad", "odd"])
    lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A road."}])
    answered(folder / "answers_gpt4.jsonl", [(row[0], row[2]) for row in questions], ["A road."] * 3)
    # The judge says 8 to 6, 5 to 1, and once nothing readable, which LLaVA's script stores as -1 to -1.
    return "scored", round(100 * (6 + 1 - 1) / (8 + 5 - 1), 1), 1


def mmvet(data, name):
    questions = [(index, f"v1_{index}.png", "What is x?", "default") for index in (0, 1)]
    short_answer(data, "mm-vet", "llava-mm-vet.jsonl", "images", questions, f"answers/{name}.jsonl", ["x = 1", "Four"])
    return "upload", None, 0


LLAVA = [vqav2, gqa, vizwiz, sqa, textvqa, pope, mme, mmbench, mmbench_cn, seed, mmvet, llavabench]


def ocrbench(data, name=None, layout="OCRBench.json"):
    folder = data / "OCRBench"
    rows = [
        ("IIIT5K", "CENTRE", "Regular Text Recognition"),
        ("textVQA", ["dr pepper", "Dr. Pepper"], "Scene Text-centric VQA"),
        ("HME100k", "\\frac { 1 } { 2 }", "Handwritten Mathematical Expression Recognition"),
        ("HME100k", "x ^ { 2 }", "Handwritten Mathematical Expression Recognition"),
        ("FUNSD", "$3", "Key Information Extraction"),
    ]
    records = []
    for index, (source, said, kind) in enumerate(rows):
        path = f"{source}/{index}.png"
        picture(folder / "OCRBench_Images" / path)
        record = {"dataset_name": source, "id": 3, "image_path": path, "question": "what is written in the image?"}
        records.append({**record, "answers": said, "type": kind})
    if layout.endswith("l"):
        lines(folder / layout, records)
    else:
        write(folder / layout, records)
    if name:
        texts = ["The word is\ncentre.", "a DR. PEPPER can", "\\frac{ 1 }{2}", "X^{2}", ""]
        kept = ("dataset_name", "type", "answers")
        answers = [
            {"question_id": index, "text": text, "metadata": {key: record[key] for key in kept}}
            for index, (record, text) in enumerate(zip(records, texts))
        ]
        lines(folder / "answers" / f"{name}.jsonl", answers)
    return "scored", 3, 1


def refcoco(data, parts=1):
    """The eight splits as parquet files, two objects each: a wide and a tall picture, boxes in pixels."""
    import pyarrow
    import pyarrow.parquet

    pixels = []
    for size in ((40, 20), (20, 40)):
        buffer = io.BytesIO()
        Image.new("RGB", size, "gray").save(buffer, format="PNG")
        pixels.append(buffer.getvalue())
    splits = [(source, split) for source in ("RefCOCO", "RefCOCOplus") for split in ("val", "testA", "testB")]
    splits += [("RefCOCOg", "val"), ("RefCOCOg", "test")]
    for source, split in splits:
        folder = data / "refcoco" / source / "data"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "question_id": f"{index}",
                "image": {"bytes": pixels[index], "path": f"{index}.png"},
                "answer": [f"the dog on side {index}", f"a brown dog number {index}"],
                "bbox": [4.0, 2.0, 8.0, 10.0],
            }
            for index in range(2)
        ]
        for part in range(parts):
            table = pyarrow.Table.from_pylist(rows[part :: parts] if parts > 1 else rows)
            file = folder / f"{split}-{part:05d}-of-{parts:05d}.parquet"
            pyarrow.parquet.write_table(table, file, row_group_size=1)
    return [f"{source} {split}" for source, split in splits]
