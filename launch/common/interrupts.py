"""Settings from before torch is imported, which takes seconds; every script imports this module first.

Until a script handles signals itself (signals.py), a request to stop ends it at once, with `signals.EXIT_RESUMABLE`
and without a traceback.
"""

import os
import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:  # not where a script is only imported
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(75))  # an exception could be swallowed within an import

# CUDA's allocator maps pages into segments that grow. Segments of fixed size stay in pieces: a rollout's cache and an
# update's activations would not fit into each other's. torch's CUDA libraries read the variables while they are loaded.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
