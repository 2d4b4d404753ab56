"""docs/kernels.md names exactly the Triton kernels and configs that exist, and says of every one what it moves."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "kernels" / "aot"))

from kernel_table import ARCHITECTURES, label, specs, variants  # noqa: E402  # pyright: ignore[reportMissingImports]

PAGE = (ROOT / "docs" / "kernels.md").read_text()


def test_the_report_is_of_these_kernels_and_configs():
    rows = re.findall(r"^\| (\w+\.\w+) \| (?:fp32: )?([^|]*=[^|]*) \| [\d /]+", PAGE, re.M)
    assert sorted(rows) == sorted(
        (name, label(configs[ARCHITECTURES[0]])) for name, spec in specs() for _, configs in variants(spec)
    ), "docs/kernels.md is behind the kernels: make kernel-report ARGS=--write"


def test_the_report_says_what_every_kernel_moves():
    counted = re.findall(r"^\| (\w+\.\w+) \|(?: [^|]+ \|){5} [\d.]+ \|$", PAGE, re.M)
    assert counted == sorted(name for name, _ in specs()), "make kernel-report ARGS=--write"


def test_nothing_in_the_report_spills():
    figures = re.findall(r"(\d+) / (\d+) / \d+", PAGE.partition("<!-- report -->")[2])
    assert figures and all(spilled == "0" for _, spilled in figures)
