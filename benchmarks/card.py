"""
Copies the speed table of docs/performance.md into README.md and draws the model card's bar chart from it.

    python benchmarks/card.py

The table is the only source of these numbers: edit it after a new measurement, then run this script.
"""

import re
from pathlib import Path

from matplotlib.figure import Figure


ROOT = Path(__file__).parents[1]
SOURCE, CARD, PICTURE = ROOT / "docs" / "performance.md", ROOT / "README.md", ROOT / "assets" / "speed.png"
BEGIN, END = "<!-- begin: speed -->", "<!-- end: speed -->"
CARD_COLUMNS = ("network", "runtime", "dtype", "seconds", "× published code", "memory (GiB)")
COLOURS = {"this project": "#1b7837", "published code": "#762a83"}  # the colours of picture.py
OTHER_COLOUR = "#2166ac"
ABSENT = "-"


def between_markers(text: str) -> str:
    """Returns what stands between the markers.

    Raises:
        ValueError: The text has no markers.
    """
    match = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", text, re.DOTALL)
    if match is None:
        raise ValueError(f"there is no line {BEGIN} with a line {END} after it")
    return match.group(1)


def read_table(text: str) -> list[dict[str, str]]:
    """Reads a Markdown table into one dict per row, from column titles to cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    titles, _, *rows = lines
    return [dict(zip(titles, row, strict=True)) for row in rows]


def write_table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> str:
    """Returns a Markdown table of the given columns. Numbers are aligned to the right."""
    alignments = ["---:" if re.match(r"[\d-]", rows[0][column]) else "---" for column in columns]
    lines = [columns, alignments, *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: list[dict[str, str]]) -> Figure:
    """Draws one panel of bars per network: seconds of each runtime, with the ratio to the published code."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    panels_rows = [[row for row in rows if row["network"] == network] for network in networks]
    figure = Figure(figsize=(10, 0.34 * max(map(len, panels_rows)) + 0.9), layout="constrained")
    for panel, network, panel_rows in zip(
        figure.subplots(1, len(networks), squeeze=False)[0], networks, panels_rows, strict=True
    ):
        seconds = [float(row["seconds"]) for row in panel_rows]
        panel.barh(range(len(panel_rows)), seconds, color=[bar_colour(row["runtime"]) for row in panel_rows])
        for place, row in enumerate(panel_rows):
            ratio = "" if row["× published code"] in (ABSENT, "1.00") else f"  ({row['× published code']}×)"
            panel.text(seconds[place], place, f" {row['seconds']} s{ratio}", va="center", fontsize=9)
        names = [f"{row['runtime'].replace(' (our export)', '')}, {row['dtype']}" for row in panel_rows]
        panel.set_yticks(range(len(panel_rows)), names, fontsize=9)
        panel.set_title(f"{network}: seconds per picture at 1024²", loc="left", fontsize=10)
        panel.set_xlim(0, 1.3 * max(seconds))
        panel.set_ylim(max(map(len, panels_rows)) - 0.5, -0.5)  # bars of one height in all panels, the first on top
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def bar_colour(runtime: str) -> str:
    return COLOURS.get(runtime, OTHER_COLOUR)


def main():
    rows = read_table(between_markers(SOURCE.read_text(encoding="utf-8")))
    card = CARD.read_text(encoding="utf-8")
    card = card.replace(between_markers(card), write_table(rows, CARD_COLUMNS))
    CARD.write_text(card, encoding="utf-8")
    draw(rows).savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
