"""The settings of `python eval.py`: reading them, and refusing what does not go together."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch

from data import DataError
from support.datasets.saved_task import GIVEN
from support.run.settings import is_utf8


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    number.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
    return number


def _device(text: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # unknown; not in this torch
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from error
    if device.type == "meta" or (device.type == "cpu" and torch.device(name).index):
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}")
    return device


def _text(text: str) -> str:
    if not is_utf8(text):
        raise argparse.ArgumentTypeError("it is no UTF-8 text")
    return text


# Defaults of what goes with one of the two alone. The parser leaves out what was not given, so that a setting of the
# one is refused with the other, not silently ignored.
EVALUATION = dict(split="test", images=[1, 2, 4, 8], samples=200, seed=0)
RANKING = dict(window=4, rounds=2, json=False)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; `given` in it: question, order, delta, decimals and columns as given, None if not."""
    parser = argparse.ArgumentParser(
        description="Evaluate a policy (tables, its answers, a picture), or let it rank images."
    )
    _add_common(parser)
    _add_question(parser)
    _add_evaluation(parser)
    _add_ranking(parser)
    args = parser.parse_args(argv)
    _refuse_what_does_not_go_together(parser, args)
    args = argparse.Namespace(**(RANKING if args.rank else EVALUATION) | vars(args))
    args.given = {field: getattr(args, field) for field in GIVEN}
    return args


def _shown(name: str) -> str:
    default = (EVALUATION | RANKING)[name]
    return f"(default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder of a policy (Hugging Face layout), or an id on the hub")
    add("--data", help="name of the data set, such as dots, dials or coco; with --rank: whose question is asked")
    add("--data-root", help="folder of the data set; the built-in ones need none")
    add("--batch-size", type=_at_least(1), default=16, help="prompts at a time, for speed and memory (default: 16)")
    add("--out", type=Path, help="output folder (default: eval-... or rank-... beside the model, or in runs/)")
    add("--device", type=_device, default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--rank", nargs="+", metavar="PATH", help="images, or folders of images, to put in order")


def _add_question(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "what is asked (default: as in the policy's training, else the data set's own)"
    ).add_argument
    add("--question", type=_text, help='such as "How old is the person in the photo?"')
    add("--order", type=_text, help='lowest first, in words: "from the youngest to the oldest"')
    add("--delta", type=float, help="tolerance of R_reg in units of the label")
    add("--decimals", type=int, help="of a value in the reference answer")
    add("--columns", help="of parquet files: image=COLUMN,label=COLUMN")
    add("--max-pixels", type=_at_least(56 * 56), help="larger images are shrunk to this area (default: the policy's)")
    add("--skip-bad", action=argparse.BooleanOptionalAction, help="leave unreadable images and bad rows out, counted")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation, without --rank", argument_default=argparse.SUPPRESS).add_argument
    add("--split", choices=("train", "val", "test"), help=f"part of the data set {_shown('split')}")
    add("--images", type=_at_least(1), nargs="+", help=f"images per prompt, a table each {_shown('images')}")
    add("--samples", type=_at_least(1), help=f"prompts for each number of images {_shown('samples')}")
    add("--seed", type=int, help=f"draws the samples; the same seed gives the same prompts {_shown('seed')}")


def _add_ranking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("ranking, with --rank", argument_default=argparse.SUPPRESS).add_argument
    add("--window", type=_at_least(2), help=f"images in a prompt {_shown('window')}")
    add("--rounds", type=_at_least(0), help=f"times to slide; 0: by the values alone {_shown('rounds')}")
    add("--json", action="store_true", help="print a JSON list of {rank, file, value} and nothing else")


def _refuse_what_does_not_go_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in vars(args):
        if name in (EVALUATION if args.rank else RANKING):
            parser.error(f"--{name.replace('_', '-')} {'does not go with' if args.rank else 'needs'} --rank")
    if not args.rank and not args.data:
        parser.error("--data is required, or --rank")
    if args.data_root and not args.data:
        parser.error("--data-root goes with --data")


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


def say(text: str) -> None:
    """What is not the result goes to standard error."""
    print(text, file=sys.stderr, flush=True)
