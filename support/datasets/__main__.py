"""`python data.py NAME [ROOT]`, also as `python -m support.datasets NAME [ROOT]`: see report.py."""

from support.datasets.report import main

main()
