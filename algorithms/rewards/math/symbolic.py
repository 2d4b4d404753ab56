"""Symbolic equality by `math-verify`, in a process of its own: `python -P symbolic.py`.

Computer algebra may take for ever, or all memory, on a few characters (9^{9^{9^9}}), in C code that no Python signal
handler interrupts. So the kernel ends the process that takes more than its seconds of CPU time for a question; the next
question starts another. CPU time, not time: what is equal does not depend on how busy a machine is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

SECONDS = 2.0
"""CPU time of one question."""
MEMORY = 4 << 30
"""Bytes of address space of the process."""
LONGEST = 1000
"""Characters of an expression."""
KNOWN = 100_000
"""Size of the cache of results."""
_ENDLESS = re.compile(r"(?:[({\[]\s*){20}|\d\s*\}?\s*\^\s*\{?\s*\(?\s*\d+\s*\)?\s*\^|\d{5}\s*!|!\s*!|\^\s*\{?\s*\d{6}")
"""Brackets, powers of powers and factorials that are unrealistic: not worth the time."""
_WARM = (r"\frac{2\sqrt{3}}{x^2+1}", r"x \in (-\infty, 3] \cup [5, 7)", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}")


class Symbolic:
    """Client of the process, which starts at the first question and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[tuple[str, ...], bool] = {}
        self._lock = threading.Lock()

    def readable(self, text: str) -> bool:
        """Whether an expression can be parsed in time."""
        return self._ask(text)

    def equal(self, wanted: str, given: str) -> bool:
        """Whether two expressions are equal; False after the time limit."""
        return self._ask(wanted, given)

    def _ask(self, *texts: str) -> bool:
        if any(len(text) > LONGEST or _ENDLESS.search(text) for text in texts):
            return False
        with self._lock:
            if texts not in self._known:
                if len(self._known) >= KNOWN:
                    self._known.clear()
                self._known[texts] = self._answer(texts)
            return self._known[texts]

    def _answer(self, texts: tuple[str, ...]) -> bool:
        if self._process is None:
            command = [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout is not None
            if self._process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the process of math-verify ended with exit code {self._process.wait()}")
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(texts) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:  # it took too long, or died of what it computed
            self._process.kill()
            self._process.wait()
            stdin.close()
            stdout.close()
            self._process = None
        return answer == "1\n"


def main() -> None:
    """Answers lines of JSON on stdin, one or two expressions each, with a 1 or a 0."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that is printed must get between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that asks
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about its missing time limit
    for text in _WARM:
        parsed(text)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF is not handled: it ends the process
        try:
            answer = answered(*json.loads(line))
        except Exception:  # of whatever library; what cannot be compared is not equal
            answer = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(answer), file=answers, flush=True)


def parsed(text: str) -> Any:
    """SymPy object of an expression, with decimals as fractions; None if it cannot be parsed."""
    import sympy  # optional, and slow to import
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig()
    for found in parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None):  # pyright: ignore
        if isinstance(found, sympy.Basic):
            return found.xreplace({number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)})
        if isinstance(found, sympy.MatrixBase):
            return found.applyfunc(lambda entry: sympy.nsimplify(entry, rational=True))
    return None


def answered(wanted: str, given: str | None = None) -> bool:
    """Whether `wanted` can be read; with `given`, whether they are equal."""
    from math_verify import verify  # optional, and slow to import

    right = parsed(wanted)
    if right is None or given is None:
        return right is not None
    other = parsed(given)
    return other is not None and verify(right, other, allow_set_relation_comp=True, timeout_seconds=None)


if __name__ == "__main__":
    main()
