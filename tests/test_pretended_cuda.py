"""tests/test_gpu.py on a machine without a GPU: the pretended one of tests/pretended_cuda/ takes its place."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not found: it compiles what torch asks of a CUDA build"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA: two cannot speak for one device"),
]  # fmt: skip


def test_the_gpu_tests_hold_on_a_pretended_gpu():
    """Mixed devices, dtypes and strides that a kernel refuses, and waits in the decode loop are errors there."""
    command = [sys.executable, str(HERE / "pretended_cuda" / "rehearse.py")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15  # so none was skipped for want of a GPU
