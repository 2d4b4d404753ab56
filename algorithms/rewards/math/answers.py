"""The final answer of a response: after its reasoning, in its last box, after ####, after "the answer is"."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from .arithmetic import NoValue, plain
from .numerals import LONGEST, MONEY, Number
from .tex import boxes_at_end, last_boxed, tidy
from .units import SCALES, known, unit_of

_REASONING = re.compile(r"</\s*(?:think|thinking|thought|reasoning|reason|analysis)\s*>", re.IGNORECASE)
_MARKERS = re.compile(r"\banswer\b(?:\s+(?:to|of|for)\b[^.:\n]{0,60})?\s*(?:\bis\b|:|=|\bwas\b)\s*:?", re.IGNORECASE)
_CLAUSE = re.compile(r"(?:[^.\n!?]|\.(?=\S)|!(?=[\d)=])|\?(?=\S))*")
_HEDGED = re.compile(r"[<>]|\\(?:le|ge|ne|in|pm)\b|\b(?:between|least|most|than|not|either|or)\b", re.IGNORECASE)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)

LONGEST_TEXT = 4000
"""Characters at the end of a text that an expression is looked for in."""

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_OVER, _UNDER = (rf"(?:\{{\s*(?P<tex_{name}>-?\s*{_PLAIN})\s*\}}|(?P<digit_{name}>\d))" for name in ("over", "under"))
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]\s*)?
    (?P<money>[{MONEY}]\s*)?
    (?P<inner>-)?
    (?:
        (?:(?P<whole_tex>\d+)\s*)?\\frac\s*{_OVER}\s*{_UNDER}
      | (?:(?P<whole>\d+)\s+)?(?P<over>{_PLAIN})\s*/\s*(?P<under>{_PLAIN})(?!\s*/?\s*\d)
      | (?P<mantissa>{_PLAIN})\s*\\times\s*10\s*\^\s*\{{?\s*(?P<power>-?\d{{1,3}})\s*\}}?
      | (?P<base>\d{{1,9}})\s*\^\s*\{{?\s*(?P<exponent>-?\d{{1,3}})\s*\}}?
      | (?P<plain>{_PLAIN})(?:[eE](?P<e>[-+]?\d{{1,3}})(?!\w))?
    )
    \s*(?P<percent>%|percent\b|per\ cent\b)?
    (?:\s*(?P<unit>[A-Za-z{MONEY}]+)(?![\w^/]))?
    """,
    re.VERBOSE,
)
_DIGITS = re.compile(r"[\d.,]*")
_COEFFICIENT = re.compile(r"\s*\\(?:sqrt|pi|log|ln|sin|cos|tan|infty|theta|alpha|frac)(?![A-Za-z])")


class Answer(NamedTuple):
    """A normalized final answer."""

    text: str
    found: Literal["box", "clause", "text"]  # it is all of a box; begins a clause; is somewhere in a text
    boxes: tuple[str, ...] = ()  # the boxes at the end, that one among them


def final_answer(response: str) -> Answer:
    """The final answer of a response; a truncated one ("\\boxed{3" and no more) is empty."""
    response = _REASONING.split(response)[-1]
    within, closed, _ = response.rpartition("</answer>")
    if closed:
        response = within.rpartition("<answer>")[2]
    inside = last_boxed(response)
    if inside is not None:
        nested = last_boxed(inside)
        return Answer(tidy(inside if nested is None else nested), "box", tuple(map(tidy, boxes_at_end(response))))
    _, mark, after = response.rpartition("####")
    if mark:
        return Answer(tidy(after.strip().partition("\n")[0]), "clause")
    if closed:
        return Answer(tidy(response), "clause")
    for marker in reversed(list(_MARKERS.finditer(response))):
        clause = _CLAUSE.match(response, marker.end())
        if clause and clause[0].strip():
            return Answer(tidy(clause[0]), "clause")
    return Answer(response, "text")


def stated_number(answer: Answer) -> Number | None:
    """Of a clause the first number after its last equals sign; of a text its last number."""
    if answer.found == "text":
        numbers = numbers_in(tidy(answer.text))
        return numbers[-1] if numbers else None
    if _HEDGED.search(answer.text):
        return None
    numbers = numbers_in(answer.text.rpartition("=")[2])
    return numbers[0] if numbers else None


def stated_expression(answer: Answer) -> str:
    """The expression of an answer: of an unmarked text its last formula, or its last line."""
    if answer.found != "text":
        return answer.text
    answer = answer._replace(text=answer.text[-LONGEST_TEXT:])
    formulas = [next(group for group in match.groups() if group) for match in _MATH.finditer(answer.text)]
    if formulas:
        return tidy(formulas[-1])
    lines = answer.text.strip().splitlines()
    return tidy(lines[-1]) if lines else ""


def last_choice(text: str) -> str:
    """The last letter of a choice, A to J, in brackets or alone; "" where there is none."""
    found = re.findall(r"\(([A-J])\)", text) or re.findall(r"(?<![\w'$\\])([B-J]|A(?=\W*$))(?![\w'])", text)
    return found[-1] if found else ""


def numbers_in(text: str) -> list[Number]:
    """All numbers of a tidied text in their order."""
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
        number = None if _COEFFICIENT.match(text, match.end()) or _variable(match) else _number_of(match)
        if number is not None:
            found.append(number)
        place = max(match.end(), place + 1)
    return found


def _variable(match: re.Match[str]) -> bool:
    """Whether the letter after a number is a variable: 3x."""
    unit = match["unit"] or ""
    return len(unit) == 1 and unit.isalpha() and not known(unit) and match.start("unit") == match.end("plain")


def is_sign(text: str, place: int, apart: bool) -> bool:
    """Whether the + or - at `place` belongs to the number after it, rather than standing between two."""
    before = text[:place]
    if apart:  # "5 - 3", but "= - 3"
        return not before.strip() or before.rstrip()[-1] in "=({[:$"
    return not before or not re.match(r"[\w)\]}.%]", before[-1])


def _number_of(match: re.Match[str]) -> Number | None:
    """The number of a match; None where it divides by 0 or is too long."""
    if len(match[0]) > LONGEST:
        return None
    group = match.groupdict()
    over, under = group["tex_over"] or group["digit_over"], group["tex_under"] or group["digit_under"]
    try:
        if over and under:
            value = _ratio(over, under, group["whole_tex"])
        elif group["over"]:
            value = _ratio(group["over"], group["under"], group["whole"])
        elif group["mantissa"]:
            value = plain(group["mantissa"]) * Fraction(10) ** int(group["power"])
        elif group["base"]:
            value = Fraction(group["base"]) ** int(group["exponent"])
        else:
            value = plain(group["plain"]) * Fraction(10) ** int(group["e"] or 0)
    except (NoValue, ZeroDivisionError):
        return None
    if (group["sign"] or "").strip() == "-":
        value = -value
    if group["inner"]:
        value = -value
    word = group["unit"] or ""
    value *= SCALES.get(word.lower().removesuffix("s"), 1)
    unit = unit_of(word) or unit_of((group["money"] or "").strip())
    return Number(value, bool(group["percent"]), unit)


def _ratio(over: str, under: str, whole: str | None) -> Fraction:
    return Fraction(whole or 0) + plain(over.replace("-", "").strip()) * (-1 if "-" in over else 1) / plain(under)
