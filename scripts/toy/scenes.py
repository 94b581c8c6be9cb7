"""Pictures of small items on photographs, questions about both, and the maps that the real tower makes of them."""

from pathlib import Path
from typing import List, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .pictures import PHOTOGRAPHS, PathLike, photographs

SIDE, PATCH = 112, 14  # pixels: 8 x 8 cells
PLACES = tuple((row, column) for row in (1, 4, 6) for column in (1, 4, 6))  # cells that hold an item
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TINTS = ((220, 40, 40), (40, 170, 60), (50, 80, 220), (230, 200, 40), (180, 60, 200), (40, 200, 210))
ITEMS = {"digit": 10, "letter": len(LETTERS), "dots": 5, "tint": len(TINTS)}  # kind -> answers
SCENES = {"photo": len(PHOTOGRAPHS), "same": 2}  # which photograph is on the left; whether that on the right is, too
KINDS = {**ITEMS, **SCENES}
# split -> its parts of `load_digits` and of every photograph, as in `pictures.make_dataset`: they never meet
SPLITS = {
    "train": ((0.0, 0.7), (0.0, 0.6)),
    "validation": ((0.7, 0.8), (0.6, 0.8)),
    "heldout": ((0.8, 1.0), (0.8, 1.0)),
}
QUESTIONS = len(PLACES) + len(SCENES)  # per picture: one per place, then the scene's


def make_scenes(split: str, count: int, seed: int) -> Tuple[List[Image.Image], torch.Tensor, torch.Tensor]:
    """Pictures with kinds and answers of their questions, [count, QUESTIONS] each: indices into KINDS, and below it."""
    from sklearn.datasets import load_digits

    random = np.random.RandomState([seed, list(SPLITS).index(split)])
    of_digits, of_photographs = SPLITS[split]
    data, backgrounds = load_digits(), photographs(*of_photographs)
    pool = np.arange(*(int(part * len(data.target)) for part in of_digits))
    pictures, kinds, answers = [], [], []
    for _ in range(count):
        left = random.randint(len(backgrounds))
        right = left if random.randint(2) else (left + random.randint(1, len(backgrounds))) % len(backgrounds)
        picture = Image.new("RGB", (SIDE, SIDE))
        for number, half in enumerate((left, right)):
            picture.paste(_half(backgrounds[half], random), (number * SIDE // 2, 0))
        kind = random.randint(len(ITEMS), size=len(PLACES))
        answer = [random.randint(list(ITEMS.values())[index]) for index in kind]
        for place, (row, column) in enumerate(PLACES):
            corner = np.array([column, row]) * PATCH + random.randint(-2, 3, size=2)
            name = list(ITEMS)[kind[place]]
            if name == "digit":
                example = int(random.choice(pool))
                answer[place] = int(data.target[example])
                picture = _blended(picture, data.images[example] / 16, corner)
            else:
                picture = _drawn(picture, name, answer[place], corner, random)
        pictures.append(picture)
        kinds.append([*kind, len(ITEMS), len(ITEMS) + 1])
        answers.append([*answer, left, int(left == right)])
    return pictures, torch.tensor(np.array(kinds)), torch.tensor(answers)


def _half(photograph: Image.Image, random: np.random.RandomState) -> Image.Image:
    """A random upright part of a photograph, half a picture large."""
    most = min(photograph.height // 2, photograph.width)
    width = random.randint(most // 2, most + 1)
    left, top = random.randint(photograph.width - width + 1), random.randint(photograph.height - 2 * width + 1)
    return photograph.crop((left, top, left + width, top + 2 * width)).resize((SIDE // 2, SIDE), Image.BICUBIC)


def _blended(picture: Image.Image, ink: np.ndarray, corner: np.ndarray) -> Image.Image:
    """White ink [8, 8] in 0..1 over a darkened square of a patch's size; the photograph shows through."""
    ink = np.asarray(Image.fromarray((ink * 255).astype(np.uint8)).resize((PATCH, PATCH), Image.BICUBIC)) / 255 * 0.8
    pixels = np.asarray(picture).astype(float)
    square = pixels[corner[1] : corner[1] + PATCH, corner[0] : corner[0] + PATCH]
    square[:] = square * 0.4 * (1 - ink[..., None]) + 255 * ink[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _drawn(picture: Image.Image, kind: str, answer: int, corner: np.ndarray, random) -> Image.Image:
    """A printed letter of 10 pixels, dots of 3 pixels, or a disc of 12 pixels in a translucent tint."""
    x, y = (int(value) for value in corner)
    draw = ImageDraw.Draw(picture, "RGBA")
    if kind == "tint":
        draw.ellipse((x + 1, y + 1, x + 12, y + 12), fill=(*TINTS[answer], 150))
        return picture
    draw.rectangle((x, y, x + PATCH - 1, y + PATCH - 1), fill=(0, 0, 0, 150))
    if kind == "letter":
        draw.text(
            (x + PATCH / 2, y + PATCH / 2), LETTERS[answer], font=_font(random.randint(3)), fill="white", anchor="mm"
        )
        return picture
    for spot in random.choice(9, answer + 1, replace=False):  # one to five
        left, top = x + 1 + 4 * (spot % 3), y + 1 + 4 * (spot // 3)
        draw.rectangle((left, top, left + 2, top + 2), fill="white")
    return picture


def _font(index: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's three upright fonts, at the size whose capitals are 10 pixels high."""
    import matplotlib

    name = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")[index]
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), 13)


@torch.no_grad()
def make_maps(tower: PathLike, pictures: List[Image.Image], layers: List[int], batch: int = 50) -> torch.Tensor:
    """Maps of these hidden_states side by side, without CLS: [pictures, patches, layers * width] in bfloat16."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(tower, torch_dtype=torch.bfloat16).eval()
    processor = CLIPImageProcessor.from_pretrained(tower)
    found = []
    for start in range(0, len(pictures), batch):
        pixels = processor(pictures[start : start + batch], return_tensors="pt").pixel_values.bfloat16()
        states = model(pixels, output_hidden_states=True).hidden_states
        found.append(torch.cat([states[layer][:, 1:] for layer in layers], -1))
    return torch.cat(found)
