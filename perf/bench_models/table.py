"""Results as a table for the terminal. Tested by tests/python/test_bench_models.py."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from bench_models import goals, latest


def interval(ratio: dict[str, float] | None) -> str:
    """1.23 [1.20, 1.26]"""
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def seconds(value: float | None) -> str:
    """Of a start, or a dash."""
    return "-" if value is None else f"{value:.1f}"


def error_of(system: dict[str, Any]) -> str:
    """The divergence, marked when it is more than rounding."""
    found = system.get("accuracy") or {}
    if "divergence" not in found:
        return "-"
    return f"{found['divergence']:.1e}" + (" WRONG" if found.get("wrong") else "")


def cell_title(cell: dict[str, Any]) -> str:
    """What the cell is."""
    return (
        f"{cell['model']} {cell['dtype']}, prompt {cell['prompt']}, {cell['new']} new, "
        f"batch {cell['batch']}"
    )


def print_cell(cell: dict[str, Any], console: Console) -> None:
    """One table per cell. Ratios are times faster than this system the baseline is."""
    table = Table(title=cell_title(cell), title_justify="left", title_style="bold")
    columns = (
        "system", "first token ms", "ms/token", "tokens/s", "limit % (prefill, decode)",
        f"{cell['baseline']} ahead: prefill", "decode", "start s cold, warm", "RSS MB peak, now",
        "blocks kept, dropped", "tokens", "KL", "weights/act/kv/head",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("system", "tokens") else "right")
    for system in cell["systems"]:
        if system["status"] != "ok":
            table.add_row(system["system"], system["reason"][:60], style="dim")
            continue
        start = system["start"]
        cold, warm = (start.get(kind, {}).get("total") for kind in ("cold", "warm"))
        ratio = system.get("ratio", {})
        memory = system["memory"]
        table.add_row(
            system["system"],
            f"{1e3 * system['prefill_seconds']['median']:.1f}",
            f"{1e3 * system['decode_seconds_per_token']['median']:.2f}",
            f"{system['decode_tokens_per_second']:.1f}",
            f"{100 * system['share_of_prefill_limit']:.0f}, "
            f"{100 * system['share_of_decode_limit']:.0f}",
            interval(ratio.get("prefill")),
            interval(ratio.get("decode")),
            f"{seconds(cold)}, {seconds(warm)}",
            f"{memory.get('peak_mb', 0):.0f}, {memory.get('resident_mb', 0):.0f}",
            f"{system['kept']}, {system['dropped']}",
            system["tokens"],
            error_of(system),
            latest.precision_of(system),
        )
    console.print(table)


def print_record(record: dict[str, Any], console: Console) -> None:
    """A whole run."""
    machine = record["machine"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, commit {record['commit']}; "
        f"{record['read_gb_per_second']:.1f} GB/s"
    )
    for cell in record["cells"]:
        print_cell(cell, console)
    versions: dict[str, str] = {}
    for cell in record["cells"]:
        for system in cell["systems"]:
            if system["status"] == "ok":
                found = " ".join(f"{k} {v}" for k, v in system["versions"].items())
                versions[system["system"]] = found
    for name, found in versions.items():
        console.print(f"  {name}: {found}", style="dim")


def print_ops(record: dict[str, Any], console: Console) -> None:
    """Single ops: a line per case, ratios are times faster than the peer we are."""
    table = Table(title=f"ops, {record['machine']['cpu']}", title_justify="left")
    columns = (
        "case", "us", "GB/s", "GFLOPS", "% of limit", "error", "vs aten", "vs onednn", "blocks"
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in record["cases"]:
        own = row["implementations"]["tilewright"]
        against = [
            interval(row["implementations"].get(peer, {}).get("ratio"))
            for peer in ("aten", "onednn")
        ]
        if "seconds" not in own:
            reason = own.get("reason", "no block was kept")
            table.add_row(row["case"], reason[:60], "", "", "", "", *against, "", style="dim")
            continue
        table.add_row(
            row["case"],
            f"{1e6 * own['seconds']['median']:.0f}",
            f"{own['gb_per_second']:.1f}",
            f"{own['gflops']:.0f}",
            f"{100 * own['share_of_limit']:.0f}",
            f"{own['relative_error']:.0e}",
            *against,
            f"{own['kept']}+{own['dropped']}",
        )
    console.print(table)


def print_goals(rows: list[goals.Standing], console: Console) -> None:
    """What matmul is to reach, and the worst and the median of the cases."""
    table = Table(title="goals: worst / median of the cases", title_justify="left")
    for column in ("cases", "how many", "share of limit", "goal", "x best peer", "goal"):
        table.add_column(column, justify="left" if column == "cases" else "right")
    for row in rows:
        if row.reason:
            table.add_row(row.goal.title, row.reason, style="dim")
            continue
        share, ratio = row.goal.share, row.goal.ratio
        table.add_row(
            row.goal.title,
            str(len(row.shares)),
            f"{min(row.shares):.2f} / {statistics.median(row.shares):.2f}",
            f"{share:.2f}" if share else "-",
            f"{min(row.ratios):.2f} / {statistics.median(row.ratios):.2f}",
            f"{ratio:.2f}",
        )
    console.print(table)


def print_encoder(record: dict[str, Any], console: Console) -> None:
    """A line per system; ratios are times faster than it the first one is."""
    (case,) = record["cases"]
    first = next(iter(case["implementations"]))
    title = f"{case['case']}; {record['machine']['cpu']}"
    table = Table(title=title, title_justify="left")
    columns = ("system", "ms", "GFLOPS", "% of limit", f"{first} ahead", "error", "own flops %",
               "blocks")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, row in case["implementations"].items():
        if "seconds" not in row:
            table.add_row(name, row.get("reason", "no block was kept")[:60], style="dim")
            continue
        share = row.get("own_flops_share")
        table.add_row(
            name,
            f"{1e3 * row['seconds']['median']:.0f}",
            f"{row['gflops']:.0f}",
            f"{100 * row['share_of_limit']:.0f}",
            interval(row["ratio"]),
            f"{row['relative_error']:.0e}",
            "-" if share is None else f"{100 * share:.2f}",
            f"{row['kept']}+{row['dropped']}",
        )
    console.print(table)


def print_decode(cases: list[dict[str, Any]], console: Console) -> None:
    """A line per phase of memory that a case met."""
    table = Table(title="decode, memory read between tokens", title_justify="left")
    for column in ("case", "tokens", "ms a token", "memory GB/s", "share of memory"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        if not case["phases"]:
            table.add_row(
                case["case"], f"0 of {case['tokens']}", "-", "-", "memory never held still"
            )
        for phase in case["phases"]:
            table.add_row(
                case["case"],
                f"{phase['tokens']} of {case['tokens']}",
                f"{phase['milliseconds']:.2f}",
                f"{phase['read_gb_per_second']:.1f}",
                f"{100 * phase['share']:.0f} %",
            )
    console.print(table)


def print_ways(case: dict[str, Any], console: Console) -> None:
    """A line per way to generate; ratios are times faster than it the first one is."""
    first = next(iter(case["ways"]))
    table = Table(title=case["case"], title_justify="left")
    for column in ("way", "tokens/s", f"{first} ahead", "lonely tokens", "blocks"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in case["ways"].items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else "-",
            interval(row["ratio"]) if "ratio" in row else "-",
            f"{row['alike']} of {case['requests']}",
            f"{row['kept']}+{row['dropped']}" if "kept" in row else "-",
        )
    console.print(table)
