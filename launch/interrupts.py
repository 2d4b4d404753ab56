"""Imported first by every script: from here until a script hears signals itself, Ctrl-C ends it without a traceback.

Importing torch takes seconds, in which Python would show where it stood.
"""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not where a script is only imported
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
