"""Image files of every kind and state: an upright RGB image, or a sentence that names the file."""

import os
import random

import numpy as np
import pytest
from PIL import Image
from small_data import noise_image
from transformers.image_transforms import convert_to_rgb

import data
from support.datasets import image_files as images
from support.datasets import splits as datasets


def saved(tmp_path, image, name="x.png", **kwargs):
    image.save(tmp_path / name, **kwargs)
    return np.asarray(images.open_image(tmp_path / name)).astype(int)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    # 65535 -> 255, 32768 -> 127.5, 257 -> 1, 0 -> 0: value / 257
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("x.png", "x.tif"):
        got = saved(tmp_path, Image.fromarray(grey), name)
        assert got[0, :, 0].tolist() == [0, 1, 128, 255] and (got == got[:, :, :1]).all()
    (tmp_path / "x.pgm").write_bytes(b"P5 4 1 65535\n" + grey.astype(">u2").tobytes())  # Pillow: mode I
    assert np.asarray(images.open_image(tmp_path / "x.pgm"))[0, :, 0].tolist() == [0, 1, 128, 255]
    for odd in (np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)):
        with pytest.raises(data.DataError, match=r"x\.tif cannot be read .*scale them"):
            saved(tmp_path, Image.fromarray(odd), "x.tif")


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_numbers_of_twelve_bits_in_sixteen_are_refused_not_nearly_black(tmp_path, name):
    """A white of 4095 would become 4095 / 257 = 16 of 255. All black is black, and 16384 is a quarter of the range."""
    for highest, refused in ((4095, True), (16383, True), (16384, False), (0, False)):
        grey = np.full((2, 2), highest, np.uint16)
        grey[0, 0] = 0
        if refused:
            with pytest.raises(data.DataError, match=f"pixels go from 0 to {highest}, .*scale them"):
                saved(tmp_path, Image.fromarray(grey), name)
        else:
            assert saved(tmp_path, Image.fromarray(grey), name)[1, 1, 0] == round(highest / 257)


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".jp2", ".avif", ".pnm"])
def test_endings_that_pillow_knows_are_read(tmp_path, ending):
    assert ending in images.ENDINGS
    noise_image(32, 32).save(tmp_path / f"1{ending}")
    assert images.open_image(tmp_path / f"1{ending}").size == (32, 32)
    (tmp_path / "3").mkdir()
    (tmp_path / f"1{ending}").rename(tmp_path / f"3/a{ending.upper()}")
    splits, left_out = datasets.read_dataset("folder", tmp_path, {"delta": 1})
    assert sum(map(len, splits.values())) == 1 and not left_out


def test_transparency_is_laid_on_white_as_transformers_does(tmp_path):
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.putpixel((1, 0), (255, 0, 0, 51))  # 20 % red on white: 255 - 0.2 * 255 = 204
    got = saved(tmp_path, red)
    assert got.tolist() == [[[255, 0, 0], [255, 204, 204]], [[255, 255, 255], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert saved(tmp_path, grey).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert saved(tmp_path, palette).tolist() == [[[0, 0, 255], [0, 255, 0]]]
    assert saved(tmp_path, palette, transparency=1).tolist() == [[[0, 0, 255], [255, 255, 255]]]
    assert saved(tmp_path, palette, "x.gif").tolist() == [[[0, 0, 255], [0, 255, 0]]]
    for mode in ("RGBA", "LA", "P", "L", "1", "RGB"):
        image = Image.merge("RGBA", [noise_image(9, 7, c).getchannel(0) for c in range(4)]).convert(mode)
        image.save(tmp_path / "y.png")
        expected = convert_to_rgb(Image.open(tmp_path / "y.png"), return_numpy=True)
        assert np.array_equal(np.asarray(images.open_image(tmp_path / "y.png")), expected)


def test_cmyk_and_exif(tmp_path):
    # 100 % yellow, no other ink
    assert saved(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 255, 0)), "x.jpg")[4, 4].tolist() == pytest.approx(
        [255, 255, 0], abs=3
    )
    # Orientation 6: the camera stood on its side, turn by 90 degrees clockwise. The left half, red, comes to the top.
    lying = Image.new("RGB", (16, 8), "blue")
    lying.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    got = saved(tmp_path, lying, "x.png", exif=exif)
    assert got.shape == (16, 8, 3) and got[0, 4].tolist() == [255, 0, 0] and got[15, 4].tolist() == [0, 0, 255]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    for limit in (10_000, None):  # just within; switched off by the user
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        images.open_image(tmp_path / "bomb.png")
    for limit in (9_999, 6_000, 4_999):  # Pillow itself raises only from twice the limit on
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.DataError, match=r"image file .*bomb\.png"):
            images.open_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken tags
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tif", "bmp", "ppm"])
def test_broken_files_are_named(tmp_path, ending):
    """Cut short at many places and with bytes spoiled: an image or a DataError with the file's name, nothing else."""
    path = tmp_path / f"half.{ending}"
    exif = {"exif": Image.Exif()} if ending in ("jpg", "png", "webp") else {}
    noise_image(40, 30).save(path, **exif)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(60):
        broken = bytearray(whole[: rng.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(8 if trial % 2 == 0 else 0):
            broken[rng.randrange(min(200, len(broken)))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            assert images.open_image(path).mode == "RGB"
        except data.DataError as error:
            refused += 1
            assert f"half.{ending}" in str(error)
    assert refused >= 20


def test_postscript_is_never_run(tmp_path):
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(data.DataError, match=r"a\.jpg cannot be read .*cannot identify"):
        images.open_image(tmp_path / "a.jpg")


def test_what_is_no_regular_file_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("pipe.png", "folder.png", "loop.png"):
        with pytest.raises(data.DataError, match=f"image file .*{name} does not exist, or is no regular file"):
            images.open_image(tmp_path / name)
