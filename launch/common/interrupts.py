"""Settings from before torch is imported, which takes seconds; every script imports this module first.

Until a script handles signals itself (signals.py), a request to stop ends it at once, with `signals.EXIT_RESUMABLE`
and without a traceback.
"""

import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:  # not where a script is only imported
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(75))  # an exception could be swallowed within an import

# CUDA's allocator maps pages into segments that grow. Segments of fixed size stay in pieces: a rollout's cache and an
# update's activations would not fit into each other's. torch's CUDA libraries read the variables while they are loaded.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# Triton's cache is local to the node: in a home folder on NFS the ranks of all nodes would wait for each other's files.
# Others may write to the temporary folder, and Triton runs what it finds in its cache.
if not {"TRITON_CACHE_DIR", "TRITON_HOME"} & os.environ.keys():
    cache = Path(tempfile.gettempdir(), f"trialign-triton-{os.getuid()}")
    try:
        cache.mkdir(mode=0o700, exist_ok=True)
        found = cache.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            os.environ["TRITON_CACHE_DIR"] = str(cache)
    except OSError:
        pass  # Triton's own default serves
