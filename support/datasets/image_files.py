"""Image files: opened as upright RGB, checked, compared."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data import MAX_ASPECT, DataError, Item

# Not all that Pillow knows: EPS would run Ghostscript. HEIF is there where pillow_heif has registered it.
_KINDS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF"}
ENDINGS = tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in _KINDS))
FORMATS = tuple(_KINDS & Image.OPEN.keys())
DARK = 1 << 14  # of 16-bit pixels: an image with none above has numbers of 14 bits or fewer in it


def open_image(path: Path) -> Image.Image:
    """A file as an upright RGB image: turned as its EXIF says, 16 bits scaled to 8, transparency laid on white.

    Raises DataError with the file's name when it is missing, unreadable, truncated, silently dark (12-bit numbers in 16
    bits), too long for its width (see `smart_size`) or larger than Image.MAX_IMAGE_PIXELS: a few kilobytes can unpack to
    gigabytes, and Pillow only warns up to twice that limit.
    """
    if not os.path.isfile(path) and os.path.lexists(path):  # to open a pipe would wait for ever
        raise DataError(f"image file {path} is no regular file: replace it or take it out")
    return decode(path, f"image file {path}")


def decode(source: Path | BinaryIO, what: str) -> Image.Image:
    """As `open_image`, also from bytes in memory. `what` names the image in errors."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            size, limit = f"{image.width} x {image.height} pixels", Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise DataError(f"{what} has {size}, more than {limit / 1e6:.0f} million: shrink it")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(f"{what} has {size}, more than 200 times as long as it is wide: crop it")
            sixteen = ";16" in str(image.tile)  # Pillow keeps the upper 8 bits of 16-bit colours
            upright = ImageOps.exif_transpose(image)
            if sixteen and upright.mode in ("RGB", "RGBA", "LA"):
                _refuse_dark(257 * int(np.asarray(upright.convert("RGB")).max()))
            return _to_rgb(upright)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} does not exist: check --data-root") from None
    except Exception as error:  # on broken bytes the decoders raise whatever they happen to run into
        raise DataError(f"{what} cannot be read ({error}): replace it or take it out") from None


def _refuse_dark(highest: int) -> None:
    if 0 < highest < DARK:
        raise ValueError(
            f"its 16-bit pixels go up to {highest} of 65535, so it would be nearly black: scale them to 8 bits"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """As transformers' convert_to_rgb, but for 16-bit grey, which Pillow would clip: nearly all of it turns white."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its 32-bit pixels have no known range")
        _refuse_dark(int(pixels.max()))
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def unreadable(items: list[Item]) -> dict[Path, str]:
    """{path: what is wrong with it} of the images that cannot be opened. Slow: opens and decodes all, in threads."""

    def check(item: Item) -> str:
        try:
            item.image()
        except DataError as error:
            return str(error)
        return ""

    of_path = {item.path: item for item in items if item.path}
    pool = ThreadPoolExecutor()  # decoding releases the GIL
    try:
        checked = progress(pool.map(check, of_path.values()), "checking images", len(of_path))
        return {path: wrong for path, wrong in zip(of_path, checked, strict=True) if wrong}
    finally:
        pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all of them


def progress(steps: Iterable, what: str, total: int) -> Iterable:
    """The same steps, with a bar on stderr if they take longer than a second. Of several processes the first shows it."""
    return tqdm(steps, what, total, delay=1, leave=False, disable=os.environ.get("RANK", "0") != "0")


def identical_files(splits: dict[str, list[Item]]) -> list[list[tuple[str, Item]]]:
    """Groups of (split, item) whose files have equal bytes; in each, more than one file or more than one split.

    Only files of equal size are read. The same picture, saved anew or resized, is not found, nor are rows of parquet files.
    """
    of_path: dict[Path, list[tuple[str, Item]]] = defaultdict(list)
    for split, items in splits.items():
        for item in items:
            if item.path and item.path.is_file():
                of_path[item.path].append((split, item))
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(of_path):
        by_size[path.stat().st_size].append(path)
    same_size = [path for paths in by_size.values() if len(paths) > 1 for path in paths]
    groups: dict[bytes, list[tuple[str, Item]]] = defaultdict(list)
    for path in progress(same_size, "comparing files", len(same_size)):
        groups[hashlib.sha256(path.read_bytes()).digest()] += of_path.pop(path)
    alone = of_path.values()  # like none but themselves, yet perhaps in two splits
    found = [
        sorted(group, key=lambda entry: (entry[0], entry[1].path or Path())) for group in (*groups.values(), *alone)
    ]
    return [group for group in found if len({(split, item.path) for split, item in group}) > 1]
