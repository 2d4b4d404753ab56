"""Imported first by every script: from here until a script hears signals itself, those that ask it to stop end it at
once, without a traceback and with `stopping.GO_ON`.

Importing torch takes seconds, in which Python would show where it stood.
"""

import os
import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not where a script is only imported
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(75))  # an exception may be lost within what is imported
