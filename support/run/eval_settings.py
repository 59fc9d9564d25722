"""The settings of `python eval.py`: reading them, and refusing what does not go together."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch

from data import DataError
from support.datasets.saved_task import GIVEN
from support.run.settings import number

# What goes with one of the two alone, and its default. What was not given is None at first: what is given with the other one is
# refused, not ignored.
EVALUATION = {"split": "test", "images": [1, 2, 4, 8], "samples": 200, "seed": 0}
RANKING = {"window": 4, "rounds": 2}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; `given` in it: question, order, delta, decimals and columns as given, None if not."""
    parser = argparse.ArgumentParser(description="Evaluate a policy (tables, its answers, a picture), or let it rank images.")  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="folder of a policy (Hugging Face layout), or an id on the hub")
    add("--data", help="name of the data set, such as dots, dials or coco; with --rank: whose question is asked")
    add("--data-root", help="folder of the data set; the built-in ones need none")
    add("--batch-size", type=number(int, 1), default=16, help="prompts at a time, for speed and memory (default: 16)")
    add("--out", type=Path, help="output folder (default: eval-... or rank-... beside the model, or in runs/)")
    add("--device", type=_device, default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--rank", nargs="+", metavar="PATH", help="images, or folders of images, to put in order")
    add = parser.add_argument_group("what is asked (default: as in the policy's training, else the data set's own)").add_argument  # fmt: skip
    add("--question", help='such as "How old is the person in the photo?"')
    add("--order", help='lowest first, in words: "from the youngest to the oldest"')
    add("--delta", type=number(float), help="tolerance of R_reg in units of the label")
    add("--decimals", type=number(int), help="of a value in the reference answer")
    add("--columns", help="of parquet files: image=COLUMN,label=COLUMN")
    add("--max-pixels", type=number(int, 56 * 56), help="larger images are shrunk to this area (default: the policy's)")
    add("--skip-bad", action=argparse.BooleanOptionalAction, help="leave unreadable images and bad rows out, counted")
    add = parser.add_argument_group("evaluation, without --rank").add_argument
    add("--split", choices=("train", "val", "test"), help="part of the data set (default: test)")
    add("--images", type=number(int, 1), nargs="+", help="images per prompt, a table each (default: 1 2 4 8)")
    add("--samples", type=number(int, 1), help="prompts for each number of images (default: 200)")
    add("--seed", type=number(int), help="draws the samples; the same seed gives the same prompts (default: 0)")
    add = parser.add_argument_group("ranking, with --rank").add_argument
    add("--window", type=number(int, 2), help="images in a prompt (default: 4)")
    add("--rounds", type=number(int, 0), help="times to slide; 0: by the values alone (default: 2)")

    args = parser.parse_args(argv)
    ours, others = (RANKING, EVALUATION) if args.rank else (EVALUATION, RANKING)
    for name in others:
        if getattr(args, name) is not None:
            parser.error(f"--{name} {'does not go with' if args.rank else 'needs'} --rank")
    for name, default in ours.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not args.rank and not args.data:
        parser.error("--data is required, or --rank")
    if args.data_root and not args.data:
        parser.error("--data-root goes with --data")
    args.given = {field: getattr(args, field) for field in GIVEN}
    return args


def _device(text: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        tensor = torch.zeros(1, device=name)
        tensor.tolist()  # the device "meta" has no numbers
        return tensor.device
    except (RuntimeError, AssertionError, ImportError) as error:  # unknown; not in this torch
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from error


def output_folder(args: argparse.Namespace, *name: str) -> Path:
    """The folder that results are written to, made if need be. Raises DataError if nothing can be written there."""
    model = Path(args.model)
    beside = model.parent if "runs" in model.parts else Path("runs")
    out: Path = args.out or beside / "-".join(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):  # found out now, not after an hour of evaluation
            return out
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise DataError(f"nothing can be written to --out {out}: {getattr(error, 'strerror', error)}") from None
