"""Normalization of TeX and Unicode notation, and contents of braces and boxes."""

from __future__ import annotations

import re
import unicodedata

UPRIGHT = "\x02"
"""Before a single letter that was set upright, as units are and variables are not: `5 \\mathrm{N}`."""

_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_BEFORE = (  # before NFKC, which would change them into something else
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+"), lambda match: f"^{{{match[0].translate(_RAISED)}}}"),
    (re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])"), " "),
    (re.compile(r"((?:\d[\u0304\u0305\u0307])+)"), lambda m: rf"\overline{{{re.sub(r'[^0-9]', '', m[0])}}}"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<=\d)(?:\\[,;:]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ""),
    (re.compile(r"µ|μ"), "u"),
)
_AFTER = (
    (re.compile(r"[−–‐‑﹣]"), "-"),
    (re.compile(r"⁄"), "/"),
    (re.compile(r"\\(?:[dtc]|nice|s)?frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), "."),
    (re.compile(r"\{([.:;])\}"), r"\1"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=$|[^A-Za-z])"), ""),
    (re.compile(r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:limits|nolimits|allowbreak|null)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:bf|rm|it|sf|tt|em|sc|bfseries|itshape|large|Large|huge|Huge|small)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:[hv]space|phantom|vphantom|hphantom)\*?\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\(?:color)\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:q?quad|(?:en|thin|med|thick|nobreak)?space|enskip|hfill)(?![A-Za-z])"), " "),
    (re.compile(r"\\text(dollar|euro|sterling|yen)(?![A-Za-z])(?:\{\})?"), lambda m: _MONEY[m[1]]),
    (re.compile(r"\\(pounds|euro)(?![A-Za-z])(?:\{\})?"), lambda m: _MONEY[m[1]]),
    (re.compile(r"\\textdegree(?![A-Za-z])(?:\{\})?|\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°"), " degree "),
    (re.compile(r"\bdegree\s+\x02?(C|F)\b"), r"degree\1 "),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\\\\s*$"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;:> ]|$)|~"), " "),
    (re.compile(r"(?<=[\d)}])\s*\*\*\s*(?=[\d({-])"), "^"),
    (re.compile(r"\*\*|__|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\^\s*\{?\s*(st|nd|rd|th)\b\s*\}?"), r"\1 "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·∙⋅*]"), r"\\times "),
    (re.compile(r"\\(?:leqslant|leq|le)(?![A-Za-z])|≤|<="), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge)(?![A-Za-z])|≥|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![A-Za-z])|\\not\s*(?:=|\\in(?![A-Za-z]))|≠|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:approx|simeq|cong|doteq|sim)(?![A-Za-z])|[≈≅≃∼]"), r"\\approx "),
    (re.compile(r"\\(?:varnothing|emptyset)(?![A-Za-z])|∅"), r"\\emptyset "),
    (re.compile(r"\\(?:ldots|dots|cdots|dotsc|dotsb|dotsm)(?![A-Za-z])"), "..."),
    (re.compile(r"√\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"√"), r"\\sqrt"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"±"), r"\\pm "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"∈"), r"\\in "),
    (re.compile(r"÷"), r"\\div "),
    (re.compile(r"\\(?:checkmark|square|blacksquare|qed)(?![A-Za-z])|[✓✔✅∎□■]"), " "),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\mu\s*(?=\x02?[mgslLAVF]\b)"), f"{UPRIGHT}u "),
    (re.compile(r"(?<=\d)\s*\{\s*([A-Za-z][A-Za-z ]*)\}"), r" \1"),  # 3{\rm cm}
    (re.compile(r"\\frac\s*\{\s*(\x02[A-Za-z]|[A-Za-z]{2,})\s*\}\s*\{\s*(\x02?[A-Za-z]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\{\s*([^{}\\]{1,40}?)\s*\\over\s+([^{}\\]{1,40}?)\s*\}"), r"\\frac{\1}{\2}"),
)
_MONEY = {"dollar": "$", "euro": "€", "sterling": "£", "pounds": "£", "yen": "¥"}
_WRAPPED = re.compile(
    r"\\(text|mathrm|textrm|textnormal|mbox|hbox|mathsf|textsf|operatorname\*?"
    r"|textbf|textit|texttt|emph|underline|mathbf|mathit|mathtt|boldsymbol|bm|pmb|bold|ensuremath|boxed"
    r"|fbox|colorbox|cancel)\s*\{([^{}]*)\}"
)
_ITALIC = ("mathit", "boldsymbol", "bm", "ensuremath", "boxed", "fbox", "colorbox", "mathbf")
_LETTER = re.compile(r"(?<![A-Za-z\\\x02])([A-Za-z])(?![A-Za-z])")


def tidy(text: str) -> str:
    """Normalized text: no white space commands, fonts or \\left, \\dfrac as \\frac."""
    for pattern, by in _BEFORE:
        text = pattern.sub(by, text)
    text = unicodedata.normalize("NFKC", text)
    for _ in range(8):  # fonts within fonts
        text, found = _WRAPPED.subn(_unwrapped, text)
        if not found:
            break
    for pattern, by in _AFTER:
        text = pattern.sub(by, text)
    return text


def _unwrapped(match: re.Match[str]) -> str:
    name, inside = match.groups()
    if name in _ITALIC:
        return f" {inside} " if name in ("boxed", "fbox") else inside
    marked = _LETTER.sub(rf"{UPRIGHT}\1", inside)
    return f" {marked} "


def closing(text: str, opened: int) -> int:
    """Where the bracket at `opened` is closed; -1 where it is not. Escaped braces are text."""
    pair = {"{": "}", "(": ")", "[": "]"}
    close, depth, place = pair[text[opened]], 0, opened
    while place < len(text):
        if text[place] == "\\" and text[opened] == "{":
            place += 2
            continue
        depth += (text[place] == text[opened]) - (text[place] == close)
        if depth == 0:
            return place
        place += 1
    return -1


def last_boxed(text: str) -> str | None:
    """Contents of the last \\boxed or \\fbox, also without braces (\\boxed3); "" where it is not closed, None where
    there is none."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*", text))
    while boxes:
        box = boxes.pop()
        rest = text[box.end() : box.end() + 1]
        if rest == "{":
            end = closing(text, box.end())
            return "" if end < 0 else text[box.end() + 1 : end]
        if rest == "\\":  # \boxed\frac12: a command and its arguments
            match = re.compile(r"\\[A-Za-z]+(?:\s*(?:\{[^{}]*\}|\d))*").match(text, box.end())
            return match[0] if match else ""
        if rest and not rest.isspace() and rest not in "`'\"$.,;:)]":
            return rest
    return None


def boxes_at_end(text: str) -> list[str]:
    """Contents of the last boxes of a text that only "and", "or", commas and the like stands between."""
    found, end = [], 0
    for box in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        between = text[end : box.start()]
        close = closing(text, box.end() - 1)
        if close < 0:
            break
        if found and not re.fullmatch(r"(?:[\s$,;.()\[\]\\]|and|or)*", between):
            found = []
        found.append(text[box.end() : close])
        end = close + 1
    return found
