"""ablate.py's table by hand. That it runs is tested with the README's commands."""

import math
import re

from experiments import ablate


def test_table_says_how_many_seeds_have_a_value():
    rows = {
        "on": [{"MAE@1": 1.0, "tau@4": 0.5}, {"MAE@1": 2.0, "tau@4": 0.25}],
        "off": [{"MAE@1": 3.0, "tau@4": math.nan}, {"MAE@1": 3.5, "tau@4": 0.125}],
        "never": [{"MAE@1": 4.0, "tau@4": math.nan}, {"MAE@1": 4.0, "tau@4": math.nan}],
    }
    head, *lines = ablate.table(rows).splitlines()
    assert head.split() == ["MAE@1", "tau@4"]
    assert re.split(r" {2,}", lines[0]) == ["on", "1.500 (1.000 to 2.000)", "0.375 (0.250 to 0.500)"]
    assert lines[1].endswith("0.125 (0.125 to 0.125) of 1") and lines[1].startswith("off")
    assert lines[2].split() == ["never", "4.000", "(4.000", "to", "4.000)", "-"]
