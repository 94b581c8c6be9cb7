"""Boxes in a model's answer: find one, bring it to the image's pixels, compare it with another."""

import re
from typing import List, NamedTuple, Optional, Sequence, Tuple

Box = Tuple[float, float, float, float]

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)\s*%?"
# What may stand between two coordinates: "0.1, 0.2", "(1,2),(3,4)", "(1,2)</box><box>(3,4)", "[1 2 3 4]".
BETWEEN = r"(?:[\s,;()\[\]{}|]|</?\w+>)+"
FOUR = BETWEEN.join(f"({NUMBER})" for _ in range(4))
# A bracket or tag before the first number is a surer sign of a box than four numbers in prose.
BRACKETED = re.compile(r"(?:[\[({]|<\w+>)\s*" + FOUR)
BARE = re.compile(r"(?<![\w.])" + FOUR + r"(?![\w])")


class Parsed(NamedTuple):
    """One answer's box: fractions of the image (or of the square), or pixels; x0 <= x1 and y0 <= y1."""

    box: Box
    kind: str  # "fraction", "percent", "scaled" (whole numbers up to `scale`) or "pixels"
    outside: bool  # some coordinate lies outside the range of its kind


def parse_box(text: str, scale: Optional[float] = 1000) -> Optional[Parsed]:
    """The first box in `text`, or None where there is none.

    Numbers with a % sign are percent; numbers that are all at most 1, or that all have a decimal point and are below 2,
    are fractions (LLaVA's own form). Anything larger is read as `scale` parts of the side (999 or 1000 are usual), or
    as pixels if `scale` is None: the numbers alone cannot tell the two apart. Swapped corners are put in order.
    """
    match = BRACKETED.search(text) or BARE.search(text)
    if not match:
        return None
    words = [word.replace(" ", "") for word in match.groups()]
    values = [float(word.rstrip("%")) for word in words]
    if any(word.endswith("%") for word in words):
        kind, divisor, limit = "percent", 100.0, 1.0
    elif max(values) <= 1 or (all("." in word for word in words) and max(values) < 2):
        kind, divisor, limit = "fraction", 1.0, 1.0
    elif scale is None:
        kind, divisor, limit = "pixels", 1.0, float("inf")
    else:
        kind, divisor, limit = "scaled", float(scale), 1.0
    x0, y0, x1, y1 = (value / divisor for value in values)
    box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    return Parsed(box, kind, min(box) < 0 or max(box) > limit)


def to_pixels(parsed: Parsed, width: int, height: int, padded: bool) -> Box:
    """`parsed.box` in pixels of a `width` x `height` image.

    `padded`: fractions are of the square that LLaVA pads an image to (`image_aspect_ratio: "pad"`), in which the image
    sits in the middle, its offset rounded down (llava.mm_utils.expand2square). Pixels are the image's own.
    """
    if parsed.kind == "pixels":
        return parsed.box
    side_x, side_y, left, top = width, height, 0, 0
    if padded:
        side_x = side_y = max(width, height)
        left, top = (side_x - width) // 2, (side_y - height) // 2
    x0, y0, x1, y1 = parsed.box
    return (x0 * side_x - left, y0 * side_y - top, x1 * side_x - left, y1 * side_y - top)


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 where both are empty.

    torchvision.ops.box_iou gives the same; four lines spare the scorer a library that must match torch's build.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas: List[float] = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return both / (sum(areas) - both) if both else 0.0
