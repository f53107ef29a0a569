"""The benchmark's rows as a bar chart: time and memory of every subject, with a pair of panels for each case."""

from pathlib import Path

from matplotlib.figure import Figure


COLOURS = {
    "this project": "#1b7837",
    "this project, CUDA graph": "#5aae61",
    "this project, torch.compile": "#a6dba0",
    "plain formulation": "#bdbdbd",
    "published code": "#762a83",
}


def draw(rows: list[dict], environment: dict, file: Path):
    """
    Args:
        rows: Rows of `speed.py`. Rows with an error are omitted.
        environment: Conditions of the measurement, written below the chart.
        file: Output file, in any format of matplotlib.
    """
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        if "seconds" in row:
            cases.setdefault((row["model"], row["side"], row["batch"]), []).append(row)
    if not cases:
        raise ValueError("no row has a measurement, so there is nothing to draw")
    heights = [len(measured) + 1.5 for measured in cases.values()]
    figure = Figure(figsize=(11, 0.4 * sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False, height_ratios=heights)
    for (left, right), ((model, side, batch), measured) in zip(panels, cases.items(), strict=True):
        draw_bars(left, measured, "seconds", "{seconds:.3g} s", "faster_than_plain_float32", " ({:.1f}×)")
        left.set_title(f"{model}, {side}², batch {batch}: seconds (× plain float32)", loc="left", fontsize=10)
        draw_bars(right, measured, "memory_gib", "{memory_gib:.2f} GiB", "memory_percent_of_plain", " ({:.0f} %)")
        right.set_title("memory beyond the weights, GiB (% of plain, same dtype)", loc="left", fontsize=10)
        right.set_yticklabels([])
    figure.supxlabel(
        f"{environment['device']}, {environment['threads']} threads, PyTorch {environment['torch']}, "
        f"{environment['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(file, dpi=120)


def draw_bars(panel, rows: list[dict], field: str, label: str, ratio_field: str, ratio_label: str):
    values = [row.get(field) or 0 for row in rows]
    colours = [COLOURS.get(row["subject"], "#2166ac") for row in rows]
    panel.barh(range(len(rows)), values, color=colours)
    for position, row in enumerate(rows):
        if row.get(field) is not None:
            ratio = ratio_label.format(row[ratio_field]) if row.get(ratio_field) else ""
            panel.text(row[field], position, " " + label.format(**row) + ratio, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [f"{row['subject']}, {row['dtype']}" for row in rows], fontsize=8)
    panel.set_xlim(0, 1.35 * max(values, default=0) or 1)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
