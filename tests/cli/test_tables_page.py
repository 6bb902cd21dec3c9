"""docs/tables.md: what the command writes."""

from __future__ import annotations

import re
from pathlib import Path

from mnv2_fused.cli import tables as command
from mnv2_fused.cli.sheets import sheets
from mnv2_fused.paper import tables

ROOT = Path(__file__).resolve().parents[2]


def lines_of(page: str, title: str) -> list[str]:
    return [line for line in page.split(f"## {title}")[1].split("\n## ")[0].splitlines() if line.startswith("|")]


def test_the_page_has_what_the_command_counts(torchvision_mobilenetv2):
    """Whoever changes a count writes the page again."""
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    (sheet,) = sheets({"6": tables.table_6()})
    assert lines_of(page, sheet.title) == lines_of(sheet.markdown(), sheet.title)
    counted = {row["network"]: row for row in tables.table_4(None)["rows"] if "here" in row}
    for name, row in counted.items():
        (line,) = [line for line in lines_of(page, "Table 4") if line.startswith(f"| {name} |")]
        assert f"| {row['here']['parameters']:,} |" in line
        assert f"| {row['here']['multiply_adds'] / 1e6:.1f} M |" in line


def test_the_page_names_its_command_machine_and_picture():
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert "python -m mnv2_fused tables" in page
    assert re.search(r"^20\d\d-\d\d-\d\d, .+ cores,\s(scalar|avx2|avx512);\storch\s", page, re.MULTILINE)
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", page)
    assert (ROOT / "docs" / picture).is_file() and picture.endswith(command.PICTURE)
