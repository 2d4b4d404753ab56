"""The plot and the tables at the end of a run."""

import io

from rich.console import Console


def test_reward_table_escapes_markup_and_shortens_rewards(launched):
    console, tables = Console(width=140, file=io.StringIO(), record=True), launched("report.tables")
    before, after = ("How was it?", "It was [bold]bad[/bold].", -0.5), ("How was it?", "Great!\n", 0.75)
    console.print(tables.reward_table([before, (*before[:2], 3.3e38)], [after, (*after[:2], float("nan"))]))
    text = console.export_text()
    parts = ("How was it?", "It was [bold]bad[/bold].", "-0.50", "Great!", "+0.75", "+3.3e+38")
    assert all(part in text for part in parts) and "nan" not in text
