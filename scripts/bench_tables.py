"""Write the serving table of scripts/README.md and its chart from what `bench_serve.py --json` measured.

    python scripts/bench_tables.py out/serve.json

Below the table: on which machines, with which versions, when, and at which commits its rows were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from bench_serve import add

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BEGIN, END = "<!-- serving: made by scripts/bench_tables.py -->", "<!-- /serving -->"
FIGURES = ("per token, ms", "first token, ms", "start, s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "files", type=Path, nargs="+", help="what a later file compares, too, is taken from it"
    )
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="a page with the markers")
    parser.add_argument("--chart", type=Path, default=HERE / "serving.svg")
    given = parser.parse_args()
    measured = [row for file in given.files for row in json.loads(file.read_text())["rows"]]
    cases = [row["case"] for row in measured]
    rows: list[dict[str, Any]] = []
    for row in measured:
        rows = add(rows, row)
    rows.sort(key=lambda row: cases.index(row["case"]))
    page = given.page.read_text()
    if BEGIN not in page or END not in page:
        print(f"{given.page} has no lines {BEGIN} and {END}", file=sys.stderr)
        return 2
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    replace(given.page, f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
    chart(rows, given.chart)
    return 0


def ratio(row: dict[str, Any], side: str, figure: str) -> float | None:
    """How many times as fast the first side is as `side`; None where one of them has no figure."""
    ours, theirs = (row["sides"][each].get(figure) for each in (next(iter(row["sides"])), side))
    return statistics.median(theirs) / statistics.median(ours) if ours and theirs else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each comparison, then what was measured where."""
    lines = ["| case | against | starts | " + " | ".join(FIGURES) + " |", "|---" * (3 + len(FIGURES)) + "|"]
    for row in rows:
        ours, *others = row["sides"]
        for side in others:
            if error := row["sides"][side].get("error"):
                said = f"does not run: {error[:80]} |" + " |" * (len(FIGURES) - 1)
                lines.append(f"| {label(row)} | {against(row, side)} | | {said}")
                continue
            cells = [cell(row, ours, side, figure) for figure in FIGURES]
            lines.append(
                f"| {label(row)} | {against(row, side)} | {row['starts']} | " + " | ".join(cells) + " |"
            )
    places: dict[str, list[str]] = {}
    for about in (row["about"] for row in rows):
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        times = places.setdefault(f"{about['machine']}; {versions}", [])
        if (time := f"{about['date']}, commit {about['commit']}") not in times:
            times.append(time)
    for place, times in places.items():
        lines += ["", f"{place}; {'; '.join(times)}."]
    return "\n".join(lines)


def against(row: dict[str, Any], side: str) -> str:
    """What the first side is compared with: another implementation, or itself without an option."""
    kind, *more = next(iter(row["sides"])).split()
    other, *rest = side.split()
    return (
        side if other != kind else "the same without " + " ".join(word for word in more if word not in rest)
    )


def label(row: dict[str, Any]) -> str:
    how = "eager" if row["eager"] else "compiled"
    _, *more = next(iter(row["sides"])).split()
    ep, latent = (says if word in more else "" for word, says in (("ep", " ep=2"), ("latent", " latent")))
    return f"{row['model']}{latent}, tp={row['tp']}{ep}, {how}, batch {row['batch']}"


def cell(row: dict[str, Any], ours: str, side: str, figure: str) -> str:
    value = ratio(row, side, figure)
    numbers = (statistics.median(row["sides"][each][figure]) for each in (ours, side))
    said = (f"{number:,.0f}" if number >= 100 else f"{number:.3g}" for number in numbers)
    return f"**{value:.2f}** ({' / '.join(said)})"


def chart(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Bars of the ratios per token; the line is as fast."""
    bars = [
        (f"{label(row)}\nagainst {against(row, side)}", value)
        for row in rows
        for side in list(row["sides"])[1:]
        if (value := ratio(row, side, "per token, ms")) is not None
    ]
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.45 * len(bars)), layout="constrained")
    names, values = [name for name, _ in bars][::-1], [value for _, value in bars][::-1]
    drawn = axes.barh(names, values, color=["#4c78a8" if value >= 1 else "#e45756" for value in values])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast for each token (above 1: TorchTitan's classes are faster)")
    axes.tick_params(axis="y", labelsize=8)
    new = file.with_suffix(".new")
    with plt.rc_context({"svg.hashsalt": "titan"}):  # the same numbers make the same file
        figure.savefig(new, format="svg", metadata={"Date": None})
    plt.close(figure)
    os.replace(new, file)


def replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


if __name__ == "__main__":
    sys.exit(main())
