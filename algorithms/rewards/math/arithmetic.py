"""Exact values of arithmetic as TeX and plain text write it: `1 1/2`, `-\\frac{3}{4}`, `2^{10}`, `0.\\overline{3}`.

The text is a tidied one (`tex.tidy`). One with a letter, or without a rational value, raises `NoValue`.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

LARGEST = 4096
"""Bits of a numerator or denominator; a model may write powers without end."""
DEEPEST = 50
"""Brackets within brackets."""

_DIGITS = (
    r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?"  # 1,234.5
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])(?:\.\d+)?"  # 12,34,567 as India writes it
    r"|\d{1,3}(?: \d{3})+,\d{1,2}(?!\d)"  # 1 234,56
    r"|\d{1,3}(?:[ ']\d{3})+(?!\d)(?:\.\d+)?"  # 1 234, 1'234
    r"|\d{1,3}(?:\.\d{3})+,\d+(?![\d,])|\d{1,3}(?:\.\d{3}){2,}(?![\d.])"  # 1.234,50
    r"|\d+\.\d+|\d+\.(?!\w)|\d+|\.\d+"
)
_NUMBER = re.compile(_DIGITS)
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))(?:\s*\\dot\s*(?:\{\s*\d\s*\}|\d))?|\((\d+)\))"
)
_EXPONENT = re.compile(r"[eE]([-+]?\d{1,4})(?![\w.])")
_FRACTION = re.compile(r"\\frac\s*")
_ROOT = re.compile(r"(?:\\sqrt|√)\s*(?:\[\s*(\d)\s*\])?\s*")
_TIMES = re.compile(r"\s*(?:\\times(?![A-Za-z])|\*|[xX]\s*(?=10\s*\^))\s*")
_OVER = re.compile(r"\s*(?:/|\\div(?![A-Za-z])|÷)\s*")
_MIXED = re.compile(r"\s+(\d+)\s*/\s*(\d+)(?!\s*[/\d.,])")
_OPEN = {"(": ")", "{": "}", "[": "]"}


class NoValue(Exception):
    """The text is not arithmetic, or its value is not a rational number of reasonable size."""


def value_of(text: str) -> tuple[Fraction, int]:
    """The value of the longest arithmetic that a text begins with, and where it ends.

    Raises:
        NoValue: there is none.
    """
    reader = _Reader(text)
    return reader.sum(), reader.place


class _Reader:
    """Recursive descent over a text."""

    def __init__(self, text: str):
        self.text, self.place, self.depth = text, 0, 0

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.place)
        if match:
            self.place = match.end()
        return match

    def space(self) -> None:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NoValue
        self.space()
        sign = self.text[self.place : self.place + 1]
        if sign in ("+", "-"):
            self.place += 1
        value = self.product() * (-1 if sign == "-" else 1)
        while True:
            before = self.place
            self.space()
            sign = self.text[self.place : self.place + 1]
            if not sign or sign not in "+-":
                self.place = before
                break
            self.place += 1
            try:
                value += self.product() * (-1 if sign == "-" else 1)
            except NoValue:  # no term follows: the sum ends before the sign
                self.place = before
                break
        self.depth -= 1
        return _sized(value)

    def product(self) -> Fraction:
        value = self.power()
        while True:
            before = self.place
            times, over = self.take(_TIMES), None
            if not times:
                over = self.take(_OVER)
            if not times and not over and self.text[self.place : self.place + 1] not in ("(", "\\"):
                return value
            try:
                factor = self.signed() if times or over else self.power()
            except NoValue:
                self.place = before
                return value
            if over and not factor:
                raise NoValue
            value = _sized(value / factor if over else value * factor)

    def signed(self) -> Fraction:
        """A factor after an operator, which may bring its sign: 3 * -2."""
        self.space()
        negative = self.text[self.place : self.place + 1] == "-"
        self.place += negative
        return -self.power() if negative else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while True:
            before = self.place
            self.space()
            mark = self.text[self.place : self.place + 1]
            if mark == "!" and self.text[self.place + 1 : self.place + 2] not in ("!", "="):
                self.place += 1
                if base.denominator != 1 or not 0 <= base <= 300:
                    raise NoValue
                base = Fraction(math.factorial(int(base)))
            elif mark == "^":
                self.place += 1
                base = _raised(base, self.argument(signed=True))
            else:
                self.place = before
                return base

    def argument(self, signed: bool = False) -> Fraction:
        """An argument of a TeX command: something in braces, or one character."""
        self.space()
        mark = self.text[self.place : self.place + 1]
        if mark in ("{", "("):
            return self.bracketed()
        if mark == "\\":
            return self.power()
        if signed:  # 10^-3 and 10^12, as plain text writes them
            match = re.compile(r"[-+]?\d+").match(self.text, self.place)
        else:
            match = re.compile(r"\d").match(self.text, self.place)
        if not match or len(match[0]) > 6:
            raise NoValue
        self.place = match.end()
        return Fraction(int(match[0]))

    def bracketed(self) -> Fraction:
        close = _OPEN[self.text[self.place]]
        self.place += 1
        value = self.sum()
        self.space()
        if self.text[self.place : self.place + 1] != close:
            raise NoValue
        self.place += 1
        return value

    def atom(self) -> Fraction:
        self.space()
        if self.text[self.place : self.place + 1] in ("(", "{"):
            return self.bracketed()
        if self.take(_FRACTION):
            over, under = self.argument(), self.argument()
            if not under:
                raise NoValue
            return over / under
        if root := self.take(_ROOT):
            return _root(self.argument(), int(root[1] or 2))
        if match := self.take(_REPEATING):
            return _repeating(match[1], match[2], match[3] or match[4] or match[5])
        match = self.take(_NUMBER)
        if not match:
            raise NoValue
        value = plain(match[0])
        if match[0].isdigit() and (mixed := self.take(_MIXED)):
            if not int(mixed[2]):
                raise NoValue
            return value + Fraction(int(mixed[1]), int(mixed[2]))
        if match[0].isdigit() and re.compile(r"\s*\\frac\b|\s*\\frac(?=\d)").match(self.text, self.place):
            self.space()
            return value + self.atom()  # 2\frac{1}{2}
        if scale := self.take(_EXPONENT):
            value *= _raised(Fraction(10), Fraction(int(scale[1])))
        return value


def plain(digits: str) -> Fraction:
    """The value of digits with separators.

    Raises:
        NoValue: there are too many of them.
    """
    if len(digits) > LARGEST // 4:
        raise NoValue
    if re.search(r"\.\d{3},|\.\d{3}\.| \d{3},", digits):  # a comma begins the decimals
        digits = digits.replace(".", "").replace(",", ".")
    return Fraction(re.sub(r"[ ',]", "", digits).rstrip(".") or "0")


def _sized(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST:
        raise NoValue
    return value


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _raised(_root(base, exponent.denominator), Fraction(exponent.numerator))
    power = int(exponent)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(power) * bits > 2 * LARGEST or (not base and power <= 0):
        raise NoValue
    return _sized(base**power)


def _root(value: Fraction, degree: int) -> Fraction:
    if value < 0 or not 1 <= degree <= 20:
        raise NoValue
    return Fraction(_whole_root(value.numerator, degree), _whole_root(value.denominator, degree))


def _whole_root(value: int, degree: int) -> int:
    root = math.isqrt(value) if degree == 2 else round(value ** (1 / degree)) if value.bit_length() < 1000 else 0
    for candidate in (root - 1, root, root + 1):
        if candidate >= 0 and candidate**degree == value:
            return candidate
    raise NoValue


def _repeating(whole: str, fixed: str, repeated: str) -> Fraction:
    if len(whole) + len(fixed) + len(repeated) > LARGEST // 8:
        raise NoValue
    head = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return head + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
