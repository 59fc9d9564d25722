"""What the tests of the data sets are made of: small images of noise, items without a file, tables, readers' results."""

import json

import numpy as np
from PIL import Image

import data
from support.datasets import drawings
from support.datasets import splits as datasets


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_images(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8, seed=number).save(root / name)


def item(name, label, task=drawings.DOTS):
    return data.Item(name, label, task, lambda: noise_image(56, 56))


def everything(name, root, **kwargs):
    splits, left_out = datasets.read_dataset(name, root, **kwargs)
    return {i.name: i for items in splits.values() for i in items}, left_out


TABLE = [
    {"path": "a b/ä 1.jpg", "label": "1", "split": "train", "group": "sharp"},
    {"path": "a b/ä 1.jpg", "label": "2.5", "split": "train", "group": "bright"},  # one image, two questions
    {"path": "./c.png", "label": "5", "split": "test", "group": "sharp"},
    {"path": "d.jpg", "label": "4.5", "split": "val", "group": "bright"},
]


def write_table(root, kind, rows):
    root.mkdir(exist_ok=True)
    if kind == "jsonl":
        (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        (root / "labels.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")  # as spreadsheets write it
    return root
