"""Pictures that are given as files, folders or URLs, read as LLaVA reads them."""

import io
import os
import re
from typing import List, Sequence, Union
from urllib.parse import unquote, urlsplit

from PIL import Image

TIMEOUT = 30  # seconds that a server may stay silent
MARK = ".maps"  # before the ending of what is drawn, so that no picture is ever overwritten
_URL = re.compile(r"https?://", re.IGNORECASE)


def expand(source: str) -> List[str]:
    """The pictures of a folder, by name, those in folders below it and hidden ones left out; of another source, itself.

    Raises:
        ValueError: the folder has no file with the ending of a picture.
    """
    if _URL.match(source) or not os.path.isdir(source):
        return [source]
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = [name for name in sorted(os.listdir(source)) if os.path.splitext(name)[1].lower() in endings]
    results = MARK + ".png"  # of an earlier run
    files = [os.path.join(source, name) for name in names if not name.startswith(".") and not name.endswith(results)]
    if not files:
        raise ValueError(f"the folder {source} has no pictures (.png, .jpg or another ending that Pillow reads)")
    return files


def read_picture(source: str) -> Image.Image:
    """A file or URL in RGB; EXIF orientation is ignored and of an animation the first frame is taken, as LLaVA does.

    Raises:
        ValueError: no such file, a server that cannot be reached or refuses, or something that is no whole picture.
    """
    if _URL.match(source):
        import requests

        try:
            response = requests.get(source, timeout=TIMEOUT)
            response.raise_for_status()
        except requests.RequestException as error:
            raise ValueError(f"it cannot be fetched: {error}") from error
        stream: Union[str, io.BytesIO] = io.BytesIO(response.content)
    elif os.path.isfile(source):
        stream = source
    else:
        raise ValueError("no such file")
    try:
        with Image.open(stream) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        reason = "no format that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
        raise ValueError(f"it cannot be read as a picture: {reason}") from error


def output_names(sources: Sequence[str]) -> List[str]:
    """For each source a file name without ending, all different also where a file system ignores case."""
    names: List[str] = []
    taken = set()
    for source in sources:
        path = unquote(urlsplit(source).path) if _URL.match(source) else source
        stem = os.path.splitext(os.path.basename(path))[0]
        stem = re.sub(r"[^\w.-]+", "_", stem) or "picture"
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names
