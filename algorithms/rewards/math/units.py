"""Units of measurement, such as `km/h` or `square feet`: dimensions and factors to base units."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """Dimensions as (dimension, power) in alphabetical order, and the factor to their base units."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction


_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "nm nanometer nanometers nanometre nanometres": "1/1000000000",
        "mm millimeter millimeters millimetre millimetres": "1/1000",
        "cm centimeter centimeters centimetre centimetres": "1/100",
        "dm decimeter decimeters decimetre decimetres": "1/10",
        "m meter meters metre metres": "1",
        "km kilometer kilometers kilometre kilometres": "1000",
        "in inch inches": "127/5000",
        "ft foot feet": "381/1250",
        "yd yard yards": "1143/1250",
        "mi mile miles": "201168/125",
    },
    "mass": {
        "mg milligram milligrams": "1/1000",
        "g gram grams": "1",
        "kg kilogram kilograms kilo kilos": "1000",
        "ton tons tonne tonnes": "1000000",
        "oz ounce ounces": "45359237/1600000",
        "lb lbs pound pounds": "45359237/100000",
    },
    "time": {
        "ms millisecond milliseconds": "1/1000",
        "s sec secs second seconds": "1",
        "min mins minute minutes": "60",
        "h hr hrs hour hours": "3600",
        "day days": "86400",
        "week weeks": "604800",
        "month months": "2629746",
        "year years yr yrs": "31556952",
    },
    "volume": {
        "ml milliliter milliliters millilitre millilitres": "1/1000",
        "cl centiliter centiliters centilitre centilitres": "1/100",
        "l liter liters litre litres": "1",
        "gal gallon gallons": "473176473/125000000",
        "quart quarts": "473176473/500000000",
        "pint pints": "473176473/1000000000",
    },
    "angle": {"degree degrees deg": "1"},
    "celsius": {"degreec degreesc celsius": "1"},
    "fahrenheit": {"degreef degreesf fahrenheit": "1"},
    "information": {"bit bits": "1", "byte bytes": "8"},
    "dollar": {"¢ cent cents": "1/100", "$ dollar dollars usd": "1"},
    "euro": {"€ euro euros eur": "1"},
    "pound sterling": {"£ gbp": "1"},
    "yen": {"¥ yen jpy": "1"},
    "rupee": {"₹ rupee rupees inr": "1"},
    "newton": {"N newton newtons": "1", "kN kilonewton kilonewtons": "1000"},
    "joule": {"J joule joules": "1", "kJ kilojoule kilojoules": "1000"},
    "watt": {"W watt watts": "1", "kW kilowatt kilowatts": "1000"},
    "volt": {"V volt volts": "1", "mV millivolt millivolts": "1/1000"},
    "ampere": {"A amp amps ampere amperes": "1", "mA milliamp milliamps": "1/1000"},
    "kelvin": {"K kelvin kelvins": "1"},
    "hertz": {"Hz hertz": "1", "kHz kilohertz": "1000", "MHz megahertz": "1000000"},
    "pascal": {"Pa pascal pascals": "1", "kPa kilopascal kilopascals": "1000"},
    "mole": {"mol mole moles": "1"},
    "ohm": {"Ω ohm ohms": "1", "kΩ kiloohm kiloohms": "1000"},
}
UNITS: dict[str, tuple[str, Fraction]] = {
    word: (dimension, Fraction(factor))
    for dimension, units in _TABLE.items()
    for words, factor in units.items()
    for word in words.split()
}
"""Word -> dimension and factor to its base unit."""

SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Factors of words after a number."""

_SPEEDS = {"mph": "miles per hour", "kmh": "km per h", "kph": "km per h"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_TOKEN = re.compile(r"\s*(?:(/|\bper\b|\ban?\b)|\^\s*\{?\s*(-?[1-4])\s*\}?|([A-Za-zΩ]+|[$€£¥₹¢])|([-.*·]))")


def known(word: str) -> str | None:
    """The key of `UNITS` that a word is; capitals count only where they tell units apart."""
    return word if word in UNITS else word.lower() if word.lower() in UNITS else None


def unit_of(text: str) -> Unit | None:
    """The unit of a text; None with an unknown word."""
    text = text.replace("\\times", "·")
    text = " ".join(_SPEEDS.get(word, word) for word in text.split())
    powers: dict[str, int] = {}
    factor, side, ahead, place = Fraction(1), 1, 1, 0
    last: tuple[str, int] | None = None  # the unit that a power after it belongs to
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        place = match.end()
        per, power, word, _ = match.groups()
        if per:
            side = -1
        elif power or (word and _POWERS.get(word.lower()) and word.lower().endswith("ed")):
            if last is None:
                return None
            name, was = last
            more = was * (int(power) if power else _POWERS[word.lower()]) - was
            powers[UNITS[name][0]] += more
            factor *= UNITS[name][1] ** more
            last = None
        elif word and word.lower() in _POWERS:
            ahead = _POWERS[word.lower()]
        elif word:
            name = known(word)
            if name is None:
                return None
            dimension, size = UNITS[name]
            last = name, side * ahead
            powers[dimension] = powers.get(dimension, 0) + side * ahead
            factor *= size ** (side * ahead)
            ahead = 1
    if last is None and not powers:
        return None
    if volume := powers.pop("volume", 0):  # a liter is a cubic decimeter
        powers["length"] = powers.get("length", 0) + 3 * volume
        factor /= Fraction(1000) ** volume
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), factor)
