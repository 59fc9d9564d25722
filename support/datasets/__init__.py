"""Data sets: files in, items with a task out.

splits         `load_dataset`, `load_splits`: rows checked, divided into train, val and test, made into items
rows           what a reader yields for each image, and what decides its split
readers        what each kind of data set's files say, and the task that goes with it
parquet        the reader of parquet files with images in them (Hugging Face)
tasks          a task from the data set's own and the user's question, and from the labels
image_files    image files opened as upright RGB, checked, compared
drawings       the drawn sets `dots` and `dials`
balance        weights that draw rare labels more often
loader         the next steps' prompts, prepared ahead
saved_task     the question of a run, saved with it and beside its weights
report         `python data.py NAME [ROOT]`: a look at a data set (run by __main__)
"""

import support.run.quiet_end  # isort: skip  # noqa: F401  first: Ctrl-C during the slow imports of `data` is one line

from support.datasets.splits import load_dataset, load_splits

__all__ = ["load_dataset", "load_splits"]
