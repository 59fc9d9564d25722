"""Run tests/test_gpu.py on the pretended device:  python tests/pretended_cuda/rehearse.py [pytest's arguments]"""

import sys
from pathlib import Path

import hooks

HERE = Path(__file__).resolve().parent
hooks.load()
sys.path[:0] = [str(HERE.parent.parent)]  # the project; tests/pretended_cuda is there already

import pytest  # noqa: E402
from device import pretended_cuda  # noqa: E402

if __name__ == "__main__":
    with pretended_cuda():
        sys.exit(pytest.main(["-p", "no:cacheprovider", str(HERE.parent / "test_gpu.py"), *sys.argv[1:]]))
