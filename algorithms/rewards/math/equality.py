"""Equality of answers: numbers exactly, lists, points and intervals entry by entry, the rest by `math-verify`.

All texts are tidied ones (`tex.tidy`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .numerals import CHOICE, Number, equal_sides, is_quantity, numeral, split_at
from .symbolic import Symbolic
from .tex import UPRIGHT
from .units import Unit, unit_of

MISSING = frozenset(("", "none", "null", "nan", "n/a", "na", "?", "-", "proof", "notfound", "not found", "inf", "-inf"))
"""Placeholders of datasets for a missing answer."""
WORDS = 8
"""Words of an answer that is not mathematics."""

symbolic = Symbolic()
_SPACE = re.compile(rf"[\s{UPRIGHT}$]+")
_TEXT = re.compile(r"[A-Za-z][A-Za-z'-]*(?:\s+[A-Za-z][A-Za-z'-]*)*")
_JOINED = re.compile(r"\s*(?:[,;]?\s*\b(?:and|or)\b|[,;])\s*")
_UNITS = re.compile(
    rf"(.*[\d\\}})].*?)\s+((?:(?:{UPRIGHT}[A-Za-z]|[a-z]{{2,3}}(?=\s*(?:$|[\^/]))|[A-Za-z]{{4,}}|per|/)"
    r"(?:\s*\^\s*\{?\d\}?)?\s*)+)"
)
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*degrees?\b")
_BOUNDED = re.compile(r"\s*[A-Za-z]\s*(<|>|\\le|\\ge)\s*([^<>=,]+?)\s*")
_RATIO = re.compile(r"(?<=\d)\s*\bto\b\s*(?=\d)")
_GROUP = re.compile(r",\d{3}(?!\d)")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|cup|cap)(?![A-Za-z])")
_MEMBER = re.compile(rf"\s*{UPRIGHT}?[A-Za-z]\s*\\in\s*(?=\\\{{|[(\[])")
_CONSTANTS = re.compile(r"\\(?![bp]?mod)[A-Za-z]+|[ei](?![A-Za-z])|\bdegrees?\b")
_OPEN = re.compile(r"[A-Za-z,;:]|\\[{}]|\.\.\.|\bmod\b")


class Entries(NamedTuple):
    """A list of answers."""

    kind: str  # "{}", "()", "[]", "[)", "(]"; "" for a list without brackets
    entries: list[str]


def readable(wanted: str) -> bool:
    """Whether a reference can be compared with answers."""
    if wanted.strip().strip(".").lower() in MISSING:
        return False
    if numeral(wanted) is not None or choice(wanted) or words(wanted):
        return True
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", wanted)) > WORDS:
        return False  # prose
    several = entries(wanted)
    if several:
        return all(readable(entry) or symbolic.readable(entry) for entry in map(unnamed, several.entries))
    return symbolic.readable(expression(wanted))


def equal(wanted: str, given: str) -> bool:
    """Whether an answer equals the reference."""
    if choice(wanted):
        label = CHOICE.match(wanted)  # (E) 42 is chosen by its letter, or by its value
        if choice(given) or label is None or label.end() == len(wanted):
            return (choice(given) or choice(given.upper())) == choice(wanted)
        return equal(wanted[label.end() :], given)
    right = numeral(wanted)
    if right is not None:
        return is_number(given, right)
    if squeezed(wanted) == squeezed(given):
        return True
    if words(wanted):
        return words(wanted) == words(given)
    wanted_parts, given_parts = entries(wanted), entries(given)
    if wanted_parts and given_parts:
        return same_entries(wanted_parts, given_parts)
    if "\\cup" in wanted + given:
        wanted, given = as_union(wanted), as_union(given)
    elif wanted_parts and not _RELATION.search(given):
        return False
    if label := CHOICE.match(given):
        given = given[label.end() :] or given
    if not _RELATION.search(wanted) and not _RELATION.search(given):
        return same_sides(wanted, given)
    return symbolic.equal(expression(wanted), expression(given))


def is_number(given: str, right: Number) -> bool:
    """Whether an answer equals a number, as written or as the value of an expression without variables."""
    number = numeral(given)
    if number is not None:
        return number.equals(right)
    sides = equal_sides(given) if right.base == 10 else None
    if sides is None:
        return False
    exact = rf"\frac{{{right.value.numerator}}}{{{right.value.denominator}}}"
    for side in sides:
        number = numeral(side)
        if number is not None and not number.equals(right):
            return False
        if number is None and (_OPEN.search(_CONSTANTS.sub("", side)) or not symbolic.equal(exact, expression(side))):
            return False
    return True


def same_sides(wanted: str, given: str) -> bool:
    """Equations and expressions: `y = 2x + 3` is asked for by that or by `2x + 3`, and `x + 1 = 5` is not `5`."""
    names, wanted_parts = named_sides(wanted)
    others, given_parts = named_sides(given)
    if len(wanted_parts) > 1 or len(given_parts) > 1:  # an equation that no name solves
        if len(wanted_parts) == 1 and not names:
            return all(symbolic.equal(expression(wanted_parts[0]), expression(side)) for side in given_parts)
        return symbolic.equal(expression(wanted), expression(given))
    if names and others and squeezed(names) != squeezed(others):
        return symbolic.equal(expression(wanted), expression(given))
    if squeezed(wanted_parts[0]) == squeezed(given_parts[0]):
        return True
    number = numeral(wanted_parts[0])
    if number is not None:
        return is_number(given_parts[0], number)
    several, other = entries(wanted_parts[0]), entries(given_parts[0])
    if several and other:
        return same_entries(several, other)
    (left, unit), (right, its) = without_unit(wanted_parts[0]), without_unit(given_parts[0])
    return (not unit or not its or unit == its) and symbolic.equal(expression(left), expression(right))


def as_union(text: str) -> str:
    """`x < 1 or x > 2` as a union of intervals; another text as it is."""
    intervals = []
    for part in re.split(r"\s*,?\s*\bor\b\s*|,", text.replace(UPRIGHT, "")):
        match = _BOUNDED.fullmatch(part)
        if match is None:
            return text
        low, bound = match[1] in (">", "\\ge"), match[2]
        closed = match[1].startswith("\\")
        intervals.append(f"{'[('[not closed]}{bound},\\infty)" if low else f"(-\\infty,{bound}{'])'[not closed]}")
    return "\\cup ".join(intervals) if len(intervals) > 1 else text


def without_unit(text: str) -> tuple[str, Unit | None]:
    """An expression without the unit or the words after it, and the unit where it is known: `12\\pi cm^2`."""
    match = _UNITS.fullmatch(text)
    if match is None:
        return text, None
    return match[1], unit_of(match[2].replace(UPRIGHT, ""))


def alternatives(text: str) -> list[str]:
    """The answers of `2\\sqrt{3} \\approx 3.46`: the exact one and its decimals; none where they differ."""
    parts = [part for part in text.split("\\approx") if part.strip()]
    parts = parts[1:] if len(parts) == 2 and is_quantity(parts[0]) else parts
    if len(parts) == 2:
        left, right = map(numeral, parts)
        if right is None or (left and abs(left.value - right.value) > abs(left.value) / 100):
            return []
    return parts if len(parts) < 3 else []


def named_sides(text: str) -> tuple[str, list[str]]:
    """The name before an equation's sign, or "", and the sides after it."""
    sides = [side for side in split_at(text.replace("==", "="), "=") if side.strip()] or [text]
    if len(sides) > 1 and is_quantity(sides[0]):
        return sides[0], sides[1:]
    return "", sides


def choice(text: str) -> str:
    """The letter of a choice, A to J: what `C`, `(C)`, `C.` and `(C) 3` choose; "" where the text is none."""
    bare = re.sub(r"^(?:option|choice|answer)\b:?", "", text.strip().strip("$").strip(), flags=re.IGNORECASE).strip()
    if match := re.fullmatch(rf"{UPRIGHT}?([A-J])\.?", bare):
        return match[1]
    match = CHOICE.match(bare)
    if match is None:
        return ""
    return (match[1] or match[2] or re.sub(r"[^A-J]", "", match[0])).upper()


def words(text: str) -> str:
    """An answer in words, in small letters and without articles; "" where the text is none."""
    bare = " ".join(text.replace(UPRIGHT, "").strip().strip("$.\"'").split())
    if not _TEXT.fullmatch(bare) or len(bare) < 2 or len(bare.split()) > WORDS:
        return ""
    if len(bare) == 2 and bare.lower() != "no":  # a product
        return ""
    bare = bare.lower()
    return re.sub(r"^(?:the answer is|answer is|it is|the|an?)\s+(?=\w)", "", bare)


def squeezed(text: str) -> str:
    """A text without white space, upright marks and the dot at its end."""
    return _SPACE.sub("", _RATIO.sub(":", text)).rstrip(".").removeprefix("+")


def expression(text: str) -> str:
    """A text as `math-verify` takes it."""
    text = text.replace(UPRIGHT, "").replace("Ω", "\\Omega ").strip().strip("$").rstrip(". ")
    angle = r"\\frac{\1\\pi}{180}" if _TRIGONOMETRY.search(text) else r"\1"
    return _DEGREES.sub(angle, _RATIO.sub(":", text))


def entries(text: str) -> Entries | None:
    """Entries of a list with its brackets; None if the text is not a list."""
    name, sides = named_sides(_MEMBER.sub("", text))
    text = expression(sides[0] if name and len(sides) == 1 else text).strip()
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    if text[:1] == "]" or text[-1:] == "[" and text[:1] in ("[", "]"):  # [1, 5[ as France writes it
        text = f"{'[' if text[0] == '[' else '('}{text[1:-1]}{']' if text[-1] == ']' else ')'}"
    kind = ""
    if text.startswith("\\{") and text.endswith("\\}"):
        kind, text = "{}", text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _whole(text):
        kind, text = text[0] + text[-1], text[1:-1]
    if re.search(r"\\begin|\\cup|\\cap|\\mid|[|<>]|\\(?:le|ge|ne)(?![A-Za-z])", text) and not kind:
        return None
    if not kind and "\\pm" in text and text.count("\\pm") == 1 and "," not in text:
        return Entries("", [text.replace("\\pm", sign) for sign in "+-"])
    parts = _split_list(text, grouped=not kind or re.search(r",\s", text) is not None)
    if len(parts) < 2 and kind != "{}":
        return None
    return Entries(kind, parts)


def _whole(text: str) -> bool:
    """Whether the first bracket is closed by the last; an interval's may differ."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return place == len(text) - 1
    return False


def _split_list(text: str, grouped: bool) -> list[str]:
    """The entries between commas, semicolons, `and`, `or` that are in no brackets.

    Args:
        grouped: a comma before three digits belongs to a number.
    """
    parts, depth, begin, place = [], 0, 0, 0
    while place < len(text):
        char = text[place]
        depth += (char in "({[") - (char in ")}]")
        joint = _JOINED.match(text, place) if depth <= 0 else None
        if joint and grouped and text[place - 1 : place].isdigit() and _GROUP.match(text, place):
            joint = None
        if joint and (place == 0 or char in ",; \t\n" or not text[place - 1].isalpha()):
            parts.append(text[begin:place])
            place = begin = joint.end()
            continue
        place += 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def unnamed(entry: str) -> str:
    """An entry without the name before it."""
    return named_entry(entry)[1]


def named_entry(entry: str) -> tuple[str, str]:
    """(name, value) of an entry such as `x = 3`; the name is "" where there is none."""
    name, sides = named_sides(entry)
    return (squeezed(name), sides[-1]) if name and len(sides) == 1 else ("", entry)


def same_entries(wanted: Entries, given: Entries) -> bool:
    """Equality of two lists: in the order of points and intervals, in any order otherwise; by name where they are
    named."""
    if wanted.kind != given.kind and {wanted.kind, given.kind} not in ({"", "{}"}, {"", "()"}):
        return False
    if len(wanted.entries) != len(given.entries):
        return False
    wanted_parts, given_parts = (list(map(named_entry, side.entries)) for side in (wanted, given))
    distinct = lambda side: len({name for name, _ in side}) == len(side) > 1 and all(name for name, _ in side)  # noqa: E731
    both = all(name for name, _ in [*wanted_parts, *given_parts])
    if not both:
        if (
            distinct(wanted_parts)
            or distinct(given_parts)
            or "()" in (wanted.kind, given.kind)
            or "[" in wanted.kind + given.kind
        ):
            return all(equal(a, b) for (_, a), (_, b) in zip(wanted_parts, given_parts, strict=True))
        wanted_parts, given_parts = ([("", value) for _, value in side] for side in (wanted_parts, given_parts))
    elif wanted.kind or given.kind:
        if wanted.kind not in ("", "{}") or given.kind not in ("", "{}"):
            return all(a[0] == b[0] and equal(a[1], b[1]) for a, b in zip(wanted_parts, given_parts, strict=True))
    for name, value in wanted_parts:
        found = next((i for i, (other, its) in enumerate(given_parts) if other == name and equal(value, its)), None)
        if found is None:
            return False
        del given_parts[found]
    return True
