"""Pictures with questions: real handwriting (scikit-learn's `load_digits`) on photographs of scikit-image's wheel."""

import json
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

import numpy as np
from PIL import Image

PHOTOGRAPHS = (
    "skimage:astronaut.png",
    "skimage:camera.png",
    "skimage:chelsea.png",
    "skimage:coffee.png",
    "skimage:grass.png",
    "skimage:gravel.png",
    "skimage:motorcycle_left.png",
    "skimage:rocket.jpg",
    "skimage:brick.png",
    "skimage:coins.png",
    "sklearn:china.jpg",
    "sklearn:flower.jpg",
)
PathLike = Union[str, Path]
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
SURFACES = ("sky", "sand", "grass", "stone", "leaf", "wood", "wall", "water", "cloud", "hair", "skin", "road")
LIGHTS = ("alike", "unlike")
QUESTIONS = {
    "number": "What is the number?",
    "place": "Where is the number?",
    "light": "How are the two halves lit?",
}
CHANCE = {"number": 1 / 10, "place": 1 / len(PLACES), "light": 1 / len(LIGHTS)}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def caption(number: int, place: str, light: str) -> str:
    """The single-turn description that pretraining asks for."""
    return f"the number {number} at the {place}, both halves lit {light}"


def make_dataset(
    folder: PathLike,
    train: int = 16,
    heldout: int = 4,
    validation: int = 0,
    image_size: int = 28,
    digit_size: int = 12,
    seed: int = 0,
) -> Path:
    """Write pictures and LLaVA's json: pretrain.json, finetune.json (the same `train` pictures), validation.json and
    heldout.json.

    Digits and backgrounds of the splits never meet: each has its own part of `load_digits` and its own columns of every
    photograph. Besides LLaVA's keys records carry `number`, `place`, `lamps`, `light` (whether both are alike) and
    `box` (the number's pixels), and those of training pictures `clean`, the same picture without its number.
    """
    from sklearn.datasets import load_digits

    folder = Path(folder)
    for name in ("images", "clean"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    data = load_digits()
    digits, numbers = data.images / 16.0, data.target  # [1797, 8, 8] in 0..1, [1797]
    random = np.random.RandomState(seed)
    for name, count, digit_span, photograph_span in (
        ("train", train, (0.0, 0.7), (0.0, 0.6)),
        ("heldout", heldout, (0.8, 1.0), (0.8, 1.0)),
        ("validation", validation, (0.7, 0.8), (0.6, 0.8)),
    ):
        backgrounds = photographs(*photograph_span)
        pool = np.arange(*(int(part * len(numbers)) for part in digit_span))
        records = []
        for index in range(count):
            row, place = int(random.choice(pool)), random.randint(len(PLACES))
            lamps = [int(random.randint(2)) for _ in range(2)]
            clean = _lit(_square(backgrounds[random.randint(len(backgrounds))], image_size, random), lamps)
            picture, box = _with_number(clean, digits[row], place, digit_size, random)
            file = f"{name}_{index:05d}.png"
            picture.save(folder / "images" / file)
            record = {
                "id": file[:-4],
                "image": f"images/{file}",
                "number": int(numbers[row]),
                "place": PLACES[place],
                "light": LIGHTS[lamps[0] != lamps[1]],
                "lamps": lamps,
                "box": box,
            }
            if name == "train":
                record["clean"] = f"clean/{file}"
                clean.save(folder / record["clean"])
            records.append(record)
        splits = {name: records}
        if name == "train":
            splits = {
                "pretrain": [dict(record, conversations=_caption_turns(record)) for record in records],
                "finetune": [
                    dict(record, conversations=_question_turns(record, index)) for index, record in enumerate(records)
                ],
            }
        for split, rows in splits.items():
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
    return folder


def _caption_turns(record: Dict) -> List[Dict]:
    return [
        {"from": "human", "value": "<image>\nDescribe the picture."},
        {"from": "gpt", "value": caption(record["number"], record["place"], record["light"])},
    ]


def _question_turns(record: Dict, index: int) -> List[Dict]:
    turns = []
    for kind in np.roll(list(QUESTIONS), index):  # each kind is asked first as often as the others
        turns += [{"from": "human", "value": QUESTIONS[kind]}, {"from": "gpt", "value": str(record[kind])}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def photographs(start: float, stop: float) -> List[Image.Image]:
    """Every photograph, cut to the columns between the fractions `start` and `stop` of its width."""
    import skimage
    import sklearn

    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.__file__).parent / "datasets" / "images",
    }
    names = (name.split(":") for name in PHOTOGRAPHS)
    whole = [Image.open(folders[library] / file).convert("RGB") for library, file in names]
    return [
        photograph.crop((int(photograph.width * start), 0, int(photograph.width * stop), photograph.height))
        for photograph in whole
    ]


def _square(photograph: Image.Image, image_size: int, random: np.random.RandomState) -> Image.Image:
    """A random square of a photograph."""
    side = random.randint(min(photograph.size) // 2, min(photograph.size) + 1)
    left, top = (random.randint(length - side + 1) for length in photograph.size)
    return photograph.crop((left, top, left + side, top + side)).resize((image_size, image_size), Image.BICUBIC)


def _lit(picture: Image.Image, lamps: Sequence[int]) -> Image.Image:
    """The picture with each half, left and right, lit from above (0) or below (1): brightness goes from 1.7 to 0.3."""
    shade = 0.7 * np.linspace(1, -1, picture.height)[:, None, None]  # from above
    signs = np.repeat([1 - 2 * lamp for lamp in lamps], picture.width // 2)[None, :, None]
    return _image(np.asarray(picture) * (1 + shade * signs))


def _with_number(
    picture: Image.Image, digit: np.ndarray, place: int, digit_size: int, random: np.random.RandomState
) -> Tuple[Image.Image, List[int]]:
    """`digit` in white on a darkened square in the cell `place` of a 3x3 grid, and the box of that square.

    The photograph still shows through: on a plain card even raw pixels would tell the numbers apart.
    """
    y, x = (_offset(cell, picture.width, digit_size, random) for cell in divmod(place, 3))
    ink = np.asarray(Image.fromarray((digit * 255).astype(np.uint8)).resize((digit_size, digit_size), Image.BICUBIC))
    ink = 0.8 * ink[..., None] / 255
    pixels = np.asarray(picture).astype(float)
    square = pixels[y : y + digit_size, x : x + digit_size]
    square[:] = square * 0.4 * (1 - ink) + 255 * ink
    return _image(pixels), [x, y, x + digit_size, y + digit_size]


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _offset(cell: int, image_size: int, digit_size: int, random: np.random.RandomState) -> int:
    """A random start, a multiple of 4 pixels, that puts the digit's centre in third number `cell` of the picture."""
    starts = [
        start
        for start in range(0, image_size - digit_size + 1, 4)
        if (start + digit_size / 2) * 3 // image_size == cell
    ]
    return int(random.choice(starts))
