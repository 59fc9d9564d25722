"""RMO's rescue (arXiv 2601.20585): with RMO a base that never answers in the asked format learns it, without RMO it learns nothing.

    python -m experiments.rescue                             # the experiment `rescue` of ablate.py
    python -m experiments.rescue --language-model smollm2    # its experiment `rescue_smollm2`

The base of the first is tiny/ that answers every question with "I cannot tell." (prose.py). None of its answers is valid, all
earn 0, so no group has spread and GRPO has no gradient. RMO (k = 1, in every group that is alike and poor) puts the true answer
among the eight of a group: its advantage is sqrt(7) = 2.65, that of the others -0.38. Once the policy writes the format now and
then by itself, groups have spread, RMO acts no more, and GRPO goes on alone.

The base of the second is a real language model of 135 M parameters with eyes that were never taught (smollm2.py): it was not made
for this, nothing was taken from it, and it answers in prose and in JSON of other kinds. It is trained by LoRA, in groups of four,
without KL (the reference is what it is to get away from). What base and trained policy say to the same test images is in
`predictions_base.jsonl` and `predictions_stage1.jsonl` of each run.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import sys

from experiments import ablate

SMOLLM2 = ["--language-model", "smollm2"]


def main(argv: list[str] | None = None) -> None:
    """What else stands on the command line is ablate's."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == SMOLLM2:
        ablate.main(["rescue_smollm2", *argv[2:]])
    else:
        ablate.main(["rescue", *argv])


if __name__ == "__main__":
    main()
