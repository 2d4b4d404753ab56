"""Signal handlers for the seconds in which Python imports torch; every script imports this module first.

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
