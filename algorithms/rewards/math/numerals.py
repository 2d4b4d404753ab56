"""Numbers as people write them: with signs, separators, money, percentages, units, names, brackets."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from .arithmetic import NoValue, value_of
from .tex import UPRIGHT, closing
from .units import SCALES, Unit, known, unit_of

LONGEST = 200
"""Characters of a number with all that is around it; a model may write digits without end."""
MONEY = "$€£¥₹¢"


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    unit: Unit | None = None  # None: there is none, or none that is known
    base: int = 10  # that its digits are written in

    def equals(self, other: Number) -> bool:
        """By value. A percentage is also its hundredth part where the other side is none; units count where both have
        one; digits in another base than ten equal the same digits in the same base alone."""
        mine, other_unit = self.value, other.value
        if self.base != other.base:
            return False
        if self.unit and other.unit:
            return (
                self.unit.dimension == other.unit.dimension
                and mine * self.unit.factor == other_unit * other.unit.factor
            )
        if self.percent and not other.percent:
            return other_unit in (mine, mine / 100)
        if other.percent and not self.percent:
            return mine in (other_unit, other_unit / 100)
        return mine == other_unit


CHOICE = re.compile(rf"\s*(?:\(\s*{UPRIGHT}?([A-Ja-j])\s*\)|{UPRIGHT}?([A-J])(?:[.):](?=\s|$)|\s*\)))\s*")
"""The label of a choice: (C), C., C)."""
_LEADING = re.compile(r"\s*(?:\\approx|\\therefore|\\implies|\\Rightarrow|\\equiv|=|:)\s*")
_WORDS = re.compile(r"([A-Za-z][A-Za-z']*(?:[\s,]+[A-Za-z][A-Za-z']*){0,7})\s*(?::\s*|\s|(?=\$))")
_TRAILING = re.compile(r"(?:\s|[.,;:。，]|\\\\|\$)+$")
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?(?:\s+points?)?\b|per\s+cent\b|pct\b)", re.IGNORECASE)
_TAIL_WORD = re.compile(rf"{UPRIGHT}?[A-Za-zΩ]+|[{MONEY}]")
_TAIL = re.compile(
    rf"(?:\s*(?:{UPRIGHT}?[A-Za-zΩ][A-Za-z']*\.?|[{MONEY}]|/|\\times|\^\s*\{{?\s*-?[1-4]\s*\}}?|-(?=[A-Za-z])))*"
    r"(?:\s*\(\s*[A-Za-z][A-Za-z.\s]*\))?\s*"
)
_PAIRS = ("st", "nd", "rd", "th", "am", "pm", "of", "in")
"""Two letters after a number that are neither units nor two variables."""
_SCALE = re.compile(rf"\s*({'|'.join(SCALES)})s?\b", re.IGNORECASE)
_FURTHER = re.compile(rf"({UPRIGHT}?[A-Za-z]+\.?)(?:\s*,|\s+and\b)?\s*(\d.*)")
_NOT_ONE = frozenset(
    "or and to not than more less most least over under above below between greater smaller fewer bigger larger except"
    " mod modulo if when minus plus times divided at no neither nor either both sin cos tan cot sec csc log ln lg exp"
    " sqrt pi max gcd lcm lim det inf infinity undefined unless until without before after any all every".split()
)
"""Words around a number that make it another statement than that the answer is the number."""
_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*(?:\{\s*\(?\s*(\w+)\s*\)?\s*\}|\(\s*(\w+)\s*\)|(\d))\s*")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_NAME = r"(?:\\[A-Za-z]+\s*|[A-Za-z]'*)"
_INDEX = re.compile(r"_\s*(?:\{[^{}]*\}|\w)|(?<=[A-Za-z}'])\s*\([^()]*\)")
_QUANTITY = re.compile(rf"[-+/\s{{}}'|]*(?:{_NAME}[-+/\s{{}}']*)+")
_POINT = re.compile(r"\(\s*[A-Za-z](?:_\{?\w\}?)?(?:\s*,\s*[A-Za-z](?:_\{?\w\}?)?)+\s*\)")
_FUNCTIONS = re.compile(
    r"\\(?:sqrt|sin|cos|tan|log|ln|le|ge|ne|pm|mp|in|mod|pmod|bmod|approx|cup|cap|to|sum|int|prod|lim)\b"
)


def numeral(text: str) -> Number | None:
    """The number that a normalized text consists of: `x = 5 cm` is one, `x^2 + 5` is none, `x + 1 = 5` neither."""
    if len(text) > LONGEST:
        return None
    sides = equal_sides(text)
    if sides is None:
        return None
    numbers = [_alone(side) for side in sides]
    last = numbers[-1]
    if last is None or any(number is None or number.value != last.value for number in numbers[:-1]):
        return None
    return last


def equal_sides(text: str) -> list[str] | None:
    """The sides of an equation without the names before them: `x = 6/2 = 3` has `6/2` and `3`; a text that is no
    equation is its own only side. None where it is no statement of what something equals: `x >= 5`, `x + 1 = 5`."""
    text = text.replace("==", "=")
    if re.search(r"[<>≡]|\\(?:le|ge|ne|in|subset|cup|cap|to|pm|mp|mid|neq)(?![A-Za-z])", text):
        return None
    sides = split_at(text, "=")
    if len(sides) > 1 and not sides[0].strip():
        sides = sides[1:]
    if len(sides) == 2 and is_quantity(sides[1]):
        sides.reverse()  # 3 = x
    while len(sides) > 1 and is_quantity(sides[0]):
        sides = sides[1:]
    return sides


def is_quantity(text: str) -> bool:
    """Whether a side of an equation names what is asked for (`x`, `f(2)`, `AB`, `m + n`, `\\text{Area}`), rather than
    being an expression that x is still to be found in (`x + 1`, `-x`, `x^2`)."""
    plain = _INDEX.sub("", text).replace(UPRIGHT, "").strip().strip("$").strip()
    if _FUNCTIONS.search(plain) or "|" in plain or plain.startswith("-"):
        return False
    return bool(_QUANTITY.fullmatch(plain) or _POINT.fullmatch(text.strip()))


def split_at(text: str, mark: str) -> list[str]:
    """The parts of a text between marks that are in no brackets."""
    parts, depth, begin = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if char == mark and depth <= 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def _alone(text: str) -> Number | None:
    """The number of a text that is no equation."""
    text = _TRAILING.sub("", text.strip()).strip()
    while text.startswith("$") and text.endswith("$") and len(text) > 1:
        text = text[1:-1].strip()
    if match := _LEADING.match(text):
        return _alone(text[match.end() :])
    if text[:1] in ("(", "{") and closing(text, 0) == len(text) - 1:
        inside = text[1:-1]
        if text[0] == "(" and re.search(r"\d,\d{3}", inside):  # (1,234) is a point
            return None
        return _alone(inside)
    if text[:2] == "$ " or text[:1] == "$" and text.count("$") == 1 and not re.match(r"\$\s*[-+(]?\s*[.\d\\]", text):
        text = text[1:].strip()
    if (label := CHOICE.match(text)) and label.end() < len(text):
        return _alone(text[label.end() :])
    if text[:1] in ("+", "-") and text[1:].strip()[:1] not in ("+", "-", ""):
        number = _signed(text[1:].strip())
        return number if number is None or text[0] == "+" else number._replace(value=-number.value)
    return _signed(text)


def _signed(text: str) -> Number | None:
    """The number of a text whose sign is taken off."""
    if match := _BASE.fullmatch(text):
        return _in_base(match)
    words = _WORDS.match(text)
    if words and not _one(words[1]):
        words = None
    if words and not (known(words[1]) and len(words[1]) == 1):
        return _alone(text[words.end() :])
    money, negative = "", False
    if match := re.match(rf"\s*(?:US|USD|EUR|GBP|CA|A|Rs\.?)?\s*([{MONEY}])?\s*", text):
        if match[1] or match.end():
            rest = text[match.end() :]
            money, negative = match[1] or "", rest[:1] == "-"
            text = rest[1:].strip() if negative else rest
    try:
        value, end = value_of(text)
    except NoValue:
        return None
    percent = _PERCENT.match(text, end)
    end = percent.end() if percent else end
    if scale := _SCALE.match(text, end):
        value, end = value * SCALES[scale[1].lower()], scale.end()
    tail = re.sub(r"\.\.\.$", "", text[end:].strip()).replace("{}", "").strip()
    if further := _FURTHER.fullmatch(tail):
        return _compound(value, unit_of(further[1]), _alone(further[2]))
    if not _is_unit(tail, glued=end < len(text) and not text[end].isspace()):
        return None
    unit = unit_of(tail.replace(UPRIGHT, "").replace(".", "")) or unit_of(money)
    return Number(-value if negative else value, bool(percent), unit)


def _compound(value: Fraction, unit: Unit | None, rest: Number | None) -> Number | None:
    """5 feet 6 inches: the sum, where the second unit is a part of the first."""
    if (
        not unit
        or not rest
        or not rest.unit
        or rest.unit.dimension != unit.dimension
        or rest.unit.factor >= unit.factor
    ):
        return None
    return Number(value + rest.value * rest.unit.factor / unit.factor, unit=unit)


def _is_unit(tail: str, glued: bool) -> bool:
    """Whether the text after a number is a unit or words that leave it a number; nothing is one, `x` and `or 5` are
    not.

    Args:
        glued: there is no white space between.
    """
    if not tail:
        return True
    words = _TAIL_WORD.findall(tail)
    if not words or not _TAIL.fullmatch(tail) or not _one(tail):
        return False
    first = words[0]
    if len(first) == 1 and first.isalpha():  # else a variable
        return first in "msgLlhΩ" or (known(first) is not None and not glued)
    return first[0] == UPRIGHT or len(first) != 2 or known(first) is not None or first.lower() in _PAIRS


def _one(words: str) -> bool:
    """Whether words around a number leave it what it is."""
    found = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", "", words))
    return not any(word.lower() in _NOT_ONE for word in found) and not (
        len(found) == 1 and len(found[0]) == 1 and known(found[0]) is None and UPRIGHT not in words
    )


def _in_base(match: re.Match[str]) -> Number | None:
    written = next(group for group in match.groups()[1:] if group)
    base = _BASES.get(written.lower()) or (int(written) if written.isdigit() and len(written) < 3 else 0)
    try:
        return Number(Fraction(int(match[1], base)), base=base) if 2 <= base <= 36 else None
    except ValueError:
        return None
