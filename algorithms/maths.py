"""A verifiable reward: does an answer hold the right number? Standard library only, for reward processes.

    reward.functions = ["trialign.algorithms.maths:maths"]

The number is what is in the last \\boxed{}, or else follows the last ####, or else the last one of the text. Numbers
are compared by value, exactly: 0.75, 3/4, \\frac{3}{4} and 75% are one, and so are 2 km and 2000 m.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple

UNITS: dict[str, tuple[str, Fraction]] = {
    word: (dimension, Fraction(factor))
    for dimension, units in {
        "length": {
            "mm millimeter millimeters millimetre millimetres": "1/1000",
            "cm centimeter centimeters centimetre centimetres": "1/100",
            "m meter meters metre metres": "1",
            "km kilometer kilometers kilometre kilometres": "1000",
            "inch inches": "127/5000",
            "ft foot feet": "381/1250",
            "mile miles": "201168/125",
        },
        "mass": {
            "mg milligram milligrams": "1/1000",
            "g gram grams": "1",
            "kg kilogram kilograms": "1000",
        },
        "time": {
            "s sec second seconds": "1",
            "min mins minute minutes": "60",
            "h hr hrs hour hours": "3600",
            "day days": "86400",
            "week weeks": "604800",
        },
        "volume": {"ml milliliter milliliters millilitre millilitres": "1/1000", "l liter liters litre litres": "1"},
        "money": {"¢ cent cents": "1/100", "$ dollar dollars usd": "1"},
    }.items()
    for words, factor in units.items()
    for word in words.split()
}
"""Unit -> what it measures, and how much of the dimension's own unit it is."""

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_OVER, _UNDER = (rf"(?:\{{\s*(?P<tex_{name}>-?\s*{_PLAIN})\s*\}}|(?P<digit_{name}>\d))" for name in ("over", "under"))
LONGEST = 200
"""Characters of a number; a model may write digits without end."""
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]\s*)?
    (?P<money>[$€£]\s*)?
    (?P<inner>-)?
    (?:
        (?:(?P<whole_tex>\d+)\s*)?\\frac\s*{_OVER}\s*{_UNDER}
      | (?:(?P<whole>\d+)\s+)?(?P<over>{_PLAIN})\s*/\s*(?P<under>{_PLAIN})(?!\s*/?\s*\d)
      | (?P<mantissa>{_PLAIN})\s*\\times\s*10\s*\^\s*\{{?\s*(?P<power>-?\d{{1,3}})\s*\}}?
      | (?P<base>\d{{1,9}})\s*\^\s*\{{?\s*(?P<exponent>-?\d{{1,3}})\s*\}}?
      | (?P<plain>{_PLAIN})(?:[eE](?P<e>[-+]?\d{{1,3}})(?!\w))?
    )
    \s*(?P<percent>%|percent\b|per\ cent\b)?
    (?:\s*(?P<unit>[A-Za-z¢$]+)(?![\w^/]))?
    """,
    re.VERBOSE,
)
_DIGITS = re.compile(r"[\d.,]*")
_BOXED_WORDS = re.compile(r"(?:[A-Za-z][A-Za-z ]*[:\s]\s*)?")
_REPLACED = (
    (re.compile(r"\\(?:left|right|displaystyle|[!;: ])"), ""),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:cdot|times)|×|·"), r"\\times "),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°"), ""),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"⁄"), "/"),
    (re.compile(r"\*\*|\\[()\[\]]"), ""),
)


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    unit: str = ""  # a key of UNITS, or none

    def equals(self, other: Number) -> bool:
        """By value. A percentage is also its hundredth part where the other side is none; units count where both have
        one."""
        mine, theirs = self.value, other.value
        if self.unit and other.unit:
            (dimension, factor), (wanted, wanted_factor) = UNITS[self.unit], UNITS[other.unit]
            return dimension == wanted and mine * factor == theirs * wanted_factor
        if self.percent and not other.percent:
            return theirs in (mine, mine / 100)
        if other.percent and not self.percent:
            return mine in (theirs, theirs / 100)
        return mine == theirs


def maths(prompts: list[str], completions: list[str], answer: list[Any], **fields: list) -> list[float]:
    """1 where a completion's number is that of the row's `answer`, else 0.

    Raises:
        ValueError: a row's answer holds no number.
    """
    return [float(correct(completion, wanted)) for completion, wanted in zip(completions, answer, strict=True)]


def correct(text: str, wanted: Any) -> bool:
    """Whether the text's number is the wanted one (a number, or a text that holds one).

    Raises:
        ValueError: `wanted` holds no number.
    """
    right = number_of(str(wanted)) if isinstance(wanted, str | int | float) and not isinstance(wanted, bool) else None
    if right is None:
        raise ValueError(f"answer={wanted!r:.60}: holds no number to compare with")
    given = number_of(text)
    return given is not None and given.equals(right)


def number_of(text: str) -> Number | None:
    """The number a text gives as its answer; None where there is none."""
    text = tidy(text)
    inside = last_boxed(text)
    if inside is not None:
        return boxed_number(inside)
    _, marked, after = text.rpartition("####")
    numbers = numbers_in(after if marked else text)
    if not numbers:
        return None
    return numbers[0] if marked else numbers[-1]


def tidy(text: str) -> str:
    """The text with TeX's and Unicode's ways of writing one thing made one."""
    text = re.sub(r"(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3})", "", text).replace("\\,", " ")
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = re.sub(r"[²³]", lambda match: {"²": "^2", "³": "^3"}[match[0]], text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    return text


def last_boxed(text: str) -> str | None:
    """What is between the braces of the last \\boxed; None where there is none, or it is not closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    opened = text.index("{", start)
    depth = 0
    for place in range(opened, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opened + 1 : place]
    return None


def boxed_number(inside: str) -> Number | None:
    """The number that a box holds and nothing else: `x = 5 cm` is one, `x^2 + 5` is none."""
    inside = inside.rpartition("=")[2].strip().strip("$").rstrip(". ")
    words = _BOXED_WORDS.match(inside)
    for start in {words.end() if words else 0, 0}:
        match = _NUMBER.match(inside, start)
        if match and re.fullmatch(r"[A-Za-z¢$\s.]*(?:\^\s*\{?[23]\}?|/\s*[A-Za-z]+)?\s*", inside[match.end() :]):
            return made(match)
    return None


def numbers_in(text: str) -> list[Number]:
    """All numbers of a text in their order."""
    found, place = [], 0
    while match := _NUMBER.search(text, place):
        start = match.start()
        sign = match["sign"] or ""
        digits = start + len(sign)
        before = text[start - 1 : start] if sign else text[digits - 1 : digits] if digits else ""
        if sign and not is_sign(text, start, len(sign) > 1):
            place = start + len(sign)  # an operator: the number begins after it
            match = _NUMBER.match(text, place)
            if match is None:
                continue
            before = ""
        if not sign and re.match(r"[\w.^_{\\]", before):  # within a word, an index or a root
            rest = _DIGITS.match(text, start)
            place = max(rest.end() if rest else 0, start + 1)
            continue
        number = made(match)
        if number is not None:
            found.append(number)
        place = max(match.end(), place + 1)
    return found


def is_sign(text: str, place: int, apart: bool) -> bool:
    """Whether the + or - at `place` belongs to the number after it, rather than standing between two."""
    before = text[:place]
    if apart:  # "5 - 3", but "= - 3"
        return not before.strip() or before.rstrip()[-1] in "=({[:$"
    return not before or not re.match(r"[\w)\]}.%]", before[-1])


def made(match: re.Match[str]) -> Number | None:
    """The number of a match; None where it divides by 0 or is longer than anyone means."""
    if len(match[0]) > LONGEST:
        return None
    group = match.groupdict()
    over, under = group["tex_over"] or group["digit_over"], group["tex_under"] or group["digit_under"]
    if over and under:
        value = _ratio(over, under, group["whole_tex"])
    elif group["over"]:
        value = _ratio(group["over"], group["under"], group["whole"])
    elif group["mantissa"]:
        value = _plain(group["mantissa"]) * Fraction(10) ** int(group["power"])
    elif group["base"]:
        base = Fraction(group["base"])
        value = None if not base else base ** int(group["exponent"])
    else:
        value = _plain(group["plain"]) * Fraction(10) ** int(group["e"] or 0)
    if value is None:
        return None
    if (group["sign"] or "").strip() == "-":
        value = -value
    if group["inner"]:
        value = -value
    unit = (group["unit"] or "").lower()
    if not unit and (group["money"] or "").strip() == "$":
        unit = "$"
    return Number(value, bool(group["percent"]), unit if unit in UNITS else "")


def _plain(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))


def _ratio(over: str, under: str, whole: str | None) -> Fraction | None:
    below = _plain(under)
    return None if not below else Fraction(whole or 0) + _plain(over) / below
