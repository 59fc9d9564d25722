"""Measurements: speed, ablations, and the making of tiny/. Run them as `python -m experiments.NAME`."""
