"""Whether a kernel's addresses can overflow 32 bits: interval arithmetic over its TTIR, for tensors past 2^31 elements.

Any one dimension (an argument, a loaded or truncated index) may be as large as DIM and a tensor as large as memory;
axis x of a grid counts up to 2^31, the others to CUDA's 65535. An i32 sum or product that can leave its range must not
reach an address.
"""

from __future__ import annotations

import re
from operator import add, floordiv, mul, sub

DIM = 1 << 26
WIDE = 1 << 48
LIMIT = 1 << 31
COPIES = "extsi extui splat broadcast expand_dims reshape trans convert_layout unsplat bitcast".split()
Interval = tuple[int, int, str]
"""(least, largest, the operation in which it may have overflowed, or nothing)."""


CORNERS = {"addi": add, "subi": sub, "muli": mul, "maxsi": max, "minsi": min, "divsi": floordiv}


def combined(op: str, left: Interval, right: Interval) -> tuple[int, int]:
    """The range of an operation's result, before it is cut to the type's bits."""
    (a, b, _), (c, d, _) = left, right
    if op == "remsi":
        return max(min(a, 0), 1 - d), min(max(b, 0), d - 1)
    if op == "divsi" and c < 1:  # by something unknown, never 0
        return min(a, 0), max(b, 0)
    corners = [CORNERS[op](x, y) for x in (a, b) for y in (c, d)]
    return min(corners), max(corners)


def overflows(ttir: str, bounds: dict[str, int]) -> list[str]:
    """The operations of a kernel that may overflow on the way to an address; `bounds` of program ids and arguments."""
    axes = {"x": LIMIT - 1, "y": 65535, "z": 65535} | bounds
    known: dict[str, Interval] = {f"%{name}": (0, bound, "") for name, bound in bounds.items()}
    found = []

    def value(name: str, bits: int) -> Interval:
        bound = DIM if bits <= 32 else WIDE
        return known.get(name, (-bound, bound, ""))

    for line in map(str.strip, ttir.splitlines()):
        line = re.sub(r"\s*loc\(.*$", "", line) if "tt.func" not in line else line
        loop = re.search(r"scf\.for (?:unsigned )?(%\w+) = (%\w+) to (%\w+) step .* : (i\d+)", line)
        if loop:
            bits = int(loop[4][1:])
            low, high = value(loop[2], bits), value(loop[3], bits)
            known[loop[1]] = (low[0], high[1], low[2] or high[2])
            for carried in re.findall(r"(%\w+) = %", line.partition("iter_args")[2]):
                known.pop(carried, None)
            continue
        match = re.match(r"(%\w+) = (?:arith|tt)\.(\w+) (.*)", line)
        if not match:
            for name in re.findall(r"^(%\w+)(?::\d+)? =", line):
                known.pop(name, None)
            continue
        name, op, rest = match.groups()
        operands, kind = re.findall(r"%[\w#]+", rest), re.search(r"i(\d+)>?$", rest)
        known.pop(name, None)
        if op == "addptr":
            offset = value(operands[1], 64)
            if offset[2]:
                found.append(offset[2])
        if kind is None:
            continue
        bits = int(kind[1])
        inputs = [value(operand, bits) for operand in operands]
        past = next((i[2] for i in inputs if i[2]), "")
        if op == "constant":
            number = re.match(r"(?:dense<)?(-?\d+|true|false)", rest)
            if number and number[1][-1].isdigit():
                known[name] = (int(number[1]), int(number[1]), "")
        elif op == "get_program_id":
            known[name] = (0, axes[rest[0]], "")
        elif op == "make_range":
            end, start = (int(re.search(rf"{word} = (\d+)", rest)[1]) for word in ("end", "start"))
            known[name] = (start, end - 1, "")
        elif op in COPIES and inputs:
            known[name] = value(operands[0], int(re.search(r"i(\d+)", rest)[1]) if "i" in rest else bits)
        elif op == "select":
            known[name] = (min(i[0] for i in inputs[1:]), max(i[1] for i in inputs[1:]), past)
        elif op in (*CORNERS, "remsi"):
            low, high = combined(op, *inputs)
            outside = bits <= 32 and (low < -LIMIT or high >= LIMIT)
            known[name] = (low, high, past or (line if outside else ""))
    return list(dict.fromkeys(found))
