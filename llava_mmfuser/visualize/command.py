"""`visualize`: draws the feature maps of pictures, one PNG each."""

import contextlib
import os
import re
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from .maps import feature_maps
from .pictures import MARK, expand, output_names, read_picture
from .reading import Model, read_model


def visualize(
    images: Sequence[str], output: str, at: Optional[str] = None, npz: bool = False, **model: Any
) -> Iterator[Union[str, ValueError]]:
    """Draw NAME.jpg as NAME.maps.png in the folder `output`; pictures of the same name get -2, -3, ….

    Args:
        images: files, folders or URLs, see `expand`.
        at: ``x,y``, a point in pixels of every picture; the PNG shows where the query there samples.
        npz: write `FeatureMaps.arrays` beside each PNG.
        model: arguments of `read_model`.

    Yields:
        A line for each note and each PNG, a ValueError for each picture that failed. Errors before the first picture
        are raised.
    """
    number = r"\s*([+-]?\d+(?:\.\d*)?)\s*"
    match = None if at is None else re.fullmatch(f"{number},{number}", at)
    if at is not None and match is None:
        raise ValueError(f"--at {at} is not allowed; use x,y in pixels of the picture, such as 120,80")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); install it: pip install matplotlib") from error
    sources: List[str] = []
    for image in images:
        try:
            sources += expand(image)
        except (OSError, ValueError) as error:
            yield ValueError(str(error))
    if not sources:
        return
    os.makedirs(output, exist_ok=True)
    loaded = read_model(**model)
    yield from loaded.notes
    point = (float(match[1]), float(match[2])) if match else None
    inputs = set(map(os.path.realpath, sources))
    for source, name in zip(sources, output_names(sources)):
        path = os.path.join(output, name + MARK)
        try:
            if os.path.realpath(path + ".png") in inputs:
                raise ValueError(f"its feature maps would overwrite {path}.png; choose another --output")
            yield _draw_one(loaded, source, path, point, npz)
        except (OSError, ValueError) as error:
            yield ValueError(f"{source}: {error}")


def _draw_one(model: Model, source: str, path: str, at: Optional[Tuple[float, float]], npz: bool) -> str:
    """Write the files of one picture, `path` and an ending each. Returns the line for the user."""
    from .drawing import draw  # needs matplotlib

    file = path + ".png"
    maps = feature_maps(model, read_picture(source), at)
    figure = draw(maps, os.path.basename(source))
    with _replacing(file) as stream:
        figure.savefig(stream, format="png")
    if npz:
        with _replacing(path + ".npz") as stream:
            np.savez(stream, **maps.arrays())
    if maps.fused is None:
        file += "; without the fused map, because the fuser returns none like the query's"
    if at is not None and maps.samples is None:
        file += "; without samples, because the fuser's attention has none"
    return file


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[Any]:
    """Open a file beside `path` and rename it to `path` at the end, so that `path` is never half-written."""
    partial = path + ".partial"
    try:
        with open(partial, "wb") as stream:
            yield stream
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
