"""Image files: opened as upright RGB, checked, compared."""

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import MAX_ASPECT, DataError, Item

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not all that Pillow knows: EPS would run Ghostscript
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_image(path: Path) -> Image.Image:
    """A file as an upright RGB image: turned as its EXIF says, 16 bits scaled to 8, transparency laid on white.

    Raises DataError with the file's name when it is missing, unreadable, truncated, too long for its width (see
    `smart_size`) or larger than Image.MAX_IMAGE_PIXELS: a few kilobytes can unpack to gigabytes, and Pillow only
    warns up to twice that limit.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            size, limit = f"{image.width} x {image.height} pixels", Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise DataError(f"image file {path} has {size}, more than {limit / 1e6:.0f} million: shrink it")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(f"image file {path} has {size}, more than 200 times as long as it is wide: crop it")
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"image file {path} does not exist: check --data-root") from None
    except Exception as error:  # on broken bytes the decoders raise whatever they happen to run into
        raise DataError(f"image file {path} cannot be read ({error}): replace it or take it out") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """As transformers' convert_to_rgb, but for 16-bit grey, which Pillow would clip: nearly all of it turns white."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its 32-bit pixels have no known range")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def unreadable(items: list[Item]) -> dict[Path, str]:
    """{file: what is wrong with it} of the images that `open_image` refuses. Slow: opens and decodes all, in threads."""

    def check(path: Path) -> str:
        try:
            open_image(path)
        except DataError as error:
            return str(error)
        return ""

    paths = list(dict.fromkeys(item.path for item in items if item.path))
    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        return {path: wrong for path, wrong in zip(paths, pool.map(check, paths), strict=True) if wrong}


def identical_files(splits: dict[str, list[Item]]) -> list[list[tuple[str, Path]]]:
    """Files of equal bytes that stand in more than one split: groups of (split, file).

    Only files of equal size are read. The same picture, saved anew or resized, is not found.
    """
    by_size: dict[int, set[tuple[str, Path]]] = defaultdict(set)
    for split, path in {(split, item.path) for split, items in splits.items() for item in items if item.path}:
        by_size[path.stat().st_size].add((split, path))
    groups: dict[bytes, list[tuple[str, Path]]] = defaultdict(list)
    for files in by_size.values():
        if len({split for split, _ in files}) > 1:
            for split, path in sorted(files):
                groups[hashlib.sha256(path.read_bytes()).digest()].append((split, path))
    return [group for group in groups.values() if len({split for split, _ in group}) > 1]
