"""docs/kernels.md lists exactly the Triton kernels and configs that exist, each with its traffic."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "kernels" / "aot"))

from kernel_table import ARCHITECTURES, label, specs, variants  # noqa: E402  # pyright: ignore[reportMissingImports]

PAGE = (ROOT / "docs" / "kernels.md").read_text()


def test_report_lists_every_kernel_and_config():
    rows = re.findall(r"^\| (\w+\.\w+) \| (?:fp32: )?([^|]*=[^|]*) \| [\d /]+", PAGE, re.M)
    assert sorted(rows) == sorted(
        (name, label(configs[ARCHITECTURES[0]])) for name, spec in specs() for _, configs in variants(spec)
    ), "docs/kernels.md is out of date: make kernel-report ARGS=--write"


def test_report_has_the_traffic_of_every_kernel():
    counted = re.findall(r"^\| (\w+\.\w+) \|(?: [^|]+ \|){5} [\d.]+ \|$", PAGE, re.M)
    assert counted == sorted(name for name, _ in specs()), "make kernel-report ARGS=--write"


def test_report_has_no_spills():
    figures = re.findall(r"(\d+) / (\d+) / \d+", PAGE.partition("<!-- report -->")[2])
    assert figures and all(spilled == "0" for _, spilled in figures)
