"""Runs a program with the guard of a fake CUDA device: `python with_guard.py TORCH_FOLDER GUARD PROGRAM ARGUMENTS`.

The guard must be loaded before torch is imported, which asks only once whether there is CUDA.
"""

import ctypes
import runpy
import sys
from pathlib import Path

libraries, guard = Path(sys.argv[1]) / "lib", sys.argv[2]
for library in (libraries / "libc10.so", libraries / "libtorch_cpu.so", guard):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
sys.argv = sys.argv[3:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
