"""Image files: opened as upright RGB, checked, compared."""

import hashlib
import os
from collections import Counter, defaultdict
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
DARK = 1 << 14  # of 16-bit grey: an image with none above holds numbers of 14 bits or fewer, and would be nearly black


def open_image(path: Path) -> Image.Image:
    """A file as an upright RGB image: turned as its EXIF says, 16 bits scaled to 8, transparency laid on white.

    Raises DataError with the file's name when it is missing, unreadable, truncated, silently dark (12-bit numbers in 16
    bits), too long for its width (see `smart_size`) or larger than Image.MAX_IMAGE_PIXELS: a few kilobytes can unpack to
    gigabytes, and Pillow only warns up to twice that limit.
    """
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        raise DataError(f"image file {path} does not exist, or is no regular file: check --data-root")
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
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # on broken bytes the decoders raise whatever they happen to run into
        raise DataError(f"{what} cannot be read ({error}): replace it or take it out") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """As transformers' convert_to_rgb, but for 16-bit grey, which Pillow would clip: nearly all of it turns white."""
    if image.mode[0] in "IF":
        pixels = np.asarray(image)
        low, high = pixels.min(), pixels.max()
        if image.mode == "F" or low < 0 or 0 < high < DARK or high > 65535:
            raise ValueError(f"its pixels go from {low} to {high}, not up to 65535: scale them to 8 bits")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
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


def refuse_unreadable(items: list[Item]) -> None:
    """DataError for images that cannot be opened: one should not end a training or an evaluation after an hour."""
    if wrong := unreadable(items):
        raise DataError(f"{next(iter(wrong.values()))}; {len(wrong)} such in all, --skip-bad leaves them out")


def progress(steps: Iterable, what: str, total: int | None = None) -> Iterable:
    """The same steps, with a bar on stderr if they take longer than a second. Of several processes the first shows it."""
    return tqdm(steps, what, total, delay=1, leave=False, disable=os.environ.get("RANK", "0") != "0")


def identical_files(splits: dict[str, list[Item]]) -> list[list[tuple[str, Item]]]:
    """Groups of (split, item) whose files have equal bytes; in each, more than one file or more than one split.

    Only files of equal size are read. The same picture, saved anew or resized, is not found, nor are rows of parquet files.
    """
    placed = [(split, item) for split, items in splits.items() for item in items]
    sizes = {item.path: item.path.stat().st_size for _, item in placed if item.path and item.path.is_file()}
    alike = Counter(sizes.values())
    content: dict[Path | None, object] = {path: path for path in sizes}
    for path in progress(sorted(path for path, size in sizes.items() if alike[size] > 1), "comparing files"):
        content[path] = hashlib.sha256(path.read_bytes()).digest()
    groups: dict[object, list[tuple[str, Item]]] = defaultdict(list)
    for split, item in sorted(placed, key=lambda entry: (entry[0], str(entry[1].path))):
        if item.path in content:
            groups[content[item.path]].append((split, item))
    return [group for group in groups.values() if len({(split, item.path) for split, item in group}) > 1]
