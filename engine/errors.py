"""Text of an exception, as the rank that failed and the others report it."""

from __future__ import annotations


def cause(error: BaseException, *, notes: bool = True) -> str:
    """An exception's message, after its type where users do not cause it, and its notes (`add_note`)."""
    text, kind = str(error), type(error).__name__
    if not text or not isinstance(error, ValueError | OSError | ArithmeticError):
        text = f"{kind}: {text}" if text else kind
    return "\n".join((text, *getattr(error, "__notes__", ()))) if notes else text
