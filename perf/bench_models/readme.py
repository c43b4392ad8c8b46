"""The table of figures in README.md, written from the result files between two markers.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_models import latest, places, results

BEGIN = "<!-- figures: written by ./dev bench report --readme -->"
END = "<!-- end of figures -->"


def _start(row: dict[str, Any], kind: str) -> str:
    total = row["start"].get(kind, {}).get("total")
    return "-" if total is None else f"{total:.1f}"


def _ratio(row: dict[str, Any], part: str) -> str:
    found = row.get("ratio", {}).get(part)
    return f" ({found['median']:.2f}x)" if found else ""


def _closest(cell: dict[str, Any]) -> float:
    """The least ratio of any system that is not ours."""
    peers = [row for row in latest.running(cell) if not latest.is_ours(row["system"])]
    ratios = [found["median"] for row in peers for found in row.get("ratio", {}).values()]
    return min(ratios, default=0.0)


def table_of(cells: list[dict[str, Any]]) -> list[str]:
    """One per model and dtype: of the smallest batch the prompt that most systems were measured
    with, the one with the closest peer of those; and batch 16."""
    lines: list[str] = []
    kinds = sorted({(cell["model"], cell["dtype"]) for cell in cells}, reverse=True)
    for model, dtype in kinds:
        of_kind = [cell for cell in cells if (cell["model"], cell["dtype"]) == (model, dtype)]
        smallest = min(cell["batch"] for cell in of_kind)
        single = [cell for cell in of_kind if cell["batch"] == smallest]
        main = max(single, key=lambda cell: (len(latest.running(cell)), -_closest(cell)))
        wide = {
            row["system"]: row
            for cell in of_kind
            if cell["batch"] == 16
            for row in cell["systems"]
            if row["status"] == "ok"
        }
        lines += [
            "",
            f"**{model}, {dtype}**, prompt {main['prompt']}, batch {smallest} ([{main['file']}]"
            f"(perf/results/{main['file']})). In brackets: how many times faster "
            f"{main['baseline']} is, within one interleaved run; rows of different "
            "runs differ in their absolute times.",
            "",
            "| system | first token ms | ms/token | % of limit | batch 16 tokens/s | peak RSS MB "
            "| cold, warm start s | tokens |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in main["systems"]:
            if row["status"] != "ok":
                lines.append(f"| {row['system']} | {row['reason'][:80]} | | | | | | |")
                continue
            batch = wide.get(row["system"])
            many = f"{batch['decode_tokens_per_second']:.0f}" if batch else "-"
            wrong = ", WRONG" if row.get("wrong") else ""
            shares = (row["share_of_prefill_limit"], row["share_of_decode_limit"])
            fields = [
                row["system"],
                f"{1e3 * row['prefill_seconds']['median']:.0f}{_ratio(row, 'prefill')}",
                f"{1e3 * row['decode_seconds_per_token']['median']:.1f}{_ratio(row, 'decode')}",
                ", ".join(f"{100 * share:.0f}" for share in shares),
                many,
                f"{row['memory'].get('peak_mb', 0):.0f}",
                f"{_start(row, 'cold')}, {_start(row, 'warm')}",
                row["tokens"] + wrong,
            ]
            lines.append(f"| {' | '.join(fields)} |")
    return lines


def block_of(records: list[dict[str, Any]]) -> str:
    """What stands between the markers."""
    lines = [BEGIN]
    for machine, cells in latest.latest_cells(records).items():
        threads = records[-1]["machine"]["threads"]
        lines += ["", f"On {machine}, {threads} cores:"]
        lines += table_of(cells)
    return "\n".join([*lines, "", END])


def rewrite(path: Path, folder: Path = places.RESULTS) -> bool:
    """Returns whether the file changed. ValueError when it has no markers."""
    before = path.read_text()
    if BEGIN not in before or END not in before:
        raise ValueError(f"{path} has no block '{BEGIN}' ... '{END}'")
    records = results.read_all("models", folder)
    if not records:
        return False
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    after = head + block_of(records) + tail
    path.write_text(after)
    return after != before
