"""Compile and load hooks.cpp. Import this before torch: torch asks once, as it is imported, who speaks for CUDA."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def load() -> None:
    """The library is compiled once for a version of torch: it stays in the temporary folder."""
    assert "torch" not in sys.modules, "too late for CUDA hooks: torch has been imported"
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch, source = Path(found.origin).parent, Path(__file__).with_name("hooks.cpp")
    key = hashlib.sha1(source.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"pretended_cuda_{os.getuid()}_{key}.so"
    if not library.exists():
        include, fresh = torch / "include", f"{library}.{os.getpid()}"
        options = ["-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        subprocess.run([shutil.which("g++") or "c++", *options, str(source), "-o", fresh], check=True)
        os.replace(fresh, library)
    for name in ("libc10.so", "libtorch_cpu.so"):  # which hold what the library needs
        ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
