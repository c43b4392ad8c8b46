"""All results as one HTML page that needs nothing else: who is ahead, and by how much.

Runs in the environment "report", which has plotly. The page embeds its script, so that it opens
anywhere; figures are drawn from the latest measurement of every cell, history from all files.
Tested by tests/python/test_bench_models.py (everything but plotly's drawing).
"""

from __future__ import annotations

import html
import math
import sys
from pathlib import Path
from typing import Any

from bench_models import latest, places, results
from bench_models.figures import (
    COLORS,
    drawn,
    history_figure,
    limit_figure,
    memory_figure,
    ratio_figure,
    start_figure,
)
from bench_models.latest import is_ours, running, title_of, verdict_of

STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;color:#111827;
margin:0;background:#f8fafc}
main{max-width:1180px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:27px;margin:0 0 2px}h2{font-size:19px;margin:38px 0 4px}
.sub{color:#6b7280;margin:0 0 18px}.cards{display:grid;gap:12px;
grid-template-columns:repeat(auto-fit,minmax(250px,1fr));margin:18px 0}
.card{background:#fff;border:1px solid #e5e7eb;border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:25px;line-height:1.2}.card span{color:#6b7280;font-size:13px}
.good b{color:#15803d}.bad b{color:#b91c1c}
figure{background:#fff;border:1px solid #e5e7eb;border-radius:10px;margin:12px 0;padding:8px}
table{border-collapse:collapse;background:#fff;font-size:13px;width:100%;margin:10px 0 22px}
th,td{border-bottom:1px solid #e5e7eb;padding:5px 8px;text-align:right;white-space:nowrap}
th{background:#f1f5f9;font-weight:600}td:first-child,th:first-child{text-align:left}
tr.ours td{background:#f0fdfa;font-weight:600}tr.failed td{color:#6b7280;white-space:normal}
tr.wrong td{color:#b91c1c}table.heat td,table.heat th{text-align:center}
table.heat td:first-child{text-align:left}td.none{color:#9ca3af}div.wide{overflow-x:auto}
p.note{color:#4b5563;max-width:860px}details{margin:8px 0}
"""


def best_peer(cell: dict[str, Any], part: str) -> dict[str, Any] | None:
    """The peer that the baseline is least ahead of, wrong ones excluded."""
    peers = [
        row
        for row in running(cell)
        if not is_ours(row["system"]) and part in row.get("ratio", {}) and not row.get("wrong")
    ]
    return min(peers, key=lambda row: row["ratio"][part]["median"], default=None)


def summary(cells: list[dict[str, Any]], part: str) -> tuple[str, str, str]:
    """(figure, words, class) of a card: against the best peer of each cell."""
    found = [(cell, best_peer(cell, part)) for cell in cells]
    pairs = [(cell, peer["ratio"][part], peer["system"]) for cell, peer in found if peer]
    if not pairs:
        return "-", f"{part}: nothing to compare with", ""
    ahead = sum(verdict_of(ratio) == "ahead" for _, ratio, _ in pairs)
    worst = min(pairs, key=lambda pair: pair[1]["median"])
    best = max(pairs, key=lambda pair: pair[1]["median"])
    words = (
        f"{part}: cells in which we beat the best peer. Best {best[1]['median']:.2f}x "
        f"({best[0]['model']} {best[0]['dtype']}, {best[2]}), "
        f"worst {worst[1]['median']:.2f}x ({worst[0]['model']} {worst[0]['dtype']}, {worst[2]})"
    )
    kind = "good" if 2 * ahead > len(pairs) else "bad"
    return f"{ahead} of {len(pairs)}", words, kind


def heat(ratio: dict[str, float] | None) -> str:
    """A table cell: the ratio on green, red or grey, stronger the further it is from 1."""
    if ratio is None:
        return "<td>-</td>"
    verdict = verdict_of(ratio)
    strength = min(1.0, abs(math.log2(ratio["median"]))) * 0.45 + 0.12
    color = {"ahead": "21,128,61", "behind": "185,28,28", "even": "107,114,128"}[verdict]
    alpha = 0.08 if verdict == "even" else strength
    text = f"{ratio['median']:.2f}x"
    return f'<td style="background:rgba({color},{alpha:.2f})" title="{verdict}">{text}</td>'


def overview(cells: list[dict[str, Any]]) -> str:
    """All ratios at a glance: a table for decode and one for prefill, a line per cell."""
    found: dict[str, str] = {}  # name -> why it ran in no cell, or ""
    for cell in cells:
        for row in cell["systems"]:
            if is_ours(row["system"]):
                continue
            reason = "" if row["status"] == "ok" else row["reason"]
            found[row["system"]] = reason and found.get(row["system"], reason)
    peers = [name for name, reason in found.items() if not reason]
    lines = []
    for part in ("decode", "prefill"):
        lines.append(f"<div class='wide'><table class='heat'><tr><th>{part}</th>")
        lines += [f"<th>{html.escape(peer).replace(':', ':<br>')}</th>" for peer in peers]
        lines.append("</tr>")
        for cell in cells:
            rows = {row["system"]: row for row in cell["systems"]}
            lines.append(f"<tr><td>{html.escape(title_of(cell))}</td>")
            lines += [_overview_entry(rows.get(peer), part) for peer in peers]
            lines.append("</tr>")
        lines.append("</table></div>")
    for name, reason in found.items():
        if reason:
            lines.append(
                f"<p class='note'><b>{html.escape(name)}</b> did not run: {html.escape(reason)}</p>"
            )
    return "".join(lines)


def _overview_entry(row: dict[str, Any] | None, part: str) -> str:
    if row is None or row["status"] != "ok":
        why = "not run" if row is None else row["reason"]
        return f'<td class="none" title="{html.escape(why)}">none</td>'
    if row.get("wrong"):
        return '<td class="none" title="its tokens or logits are wrong">wrong</td>'
    return heat(row.get("ratio", {}).get(part))


def _interval(row: dict[str, Any], part: str) -> str:
    ratio = row.get("ratio", {}).get(part)
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def cell_table(cell: dict[str, Any]) -> str:
    """Every figure of a cell, failures with their reasons."""
    heads = (
        "system",
        "first token ms",
        "ms/token",
        "tokens/s",
        "prefill ratio",
        "decode ratio",
        "% of limits",
        "tokens",
        "KL",
        "same top",
        "perplexity",
        "weights/act/KV/head",
    )
    lines = ["<table><tr>", *(f"<th>{head}</th>" for head in heads), "</tr>"]
    for row in cell["systems"]:
        name = html.escape(row["system"])
        if row["status"] != "ok":
            reason = html.escape(row["reason"])
            span = len(heads) - 1
            lines.append(
                f'<tr class="failed"><td>{name}</td>'
                f'<td colspan="{span}" style="text-align:left">{reason}</td></tr>'
            )
            continue
        found = row.get("accuracy", {})
        measured = "divergence" in found
        fields = (
            name,
            f"{1e3 * row['prefill_seconds']['median']:.1f}",
            f"{1e3 * row['decode_seconds_per_token']['median']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            _interval(row, "prefill"),
            _interval(row, "decode"),
            f"{100 * row['share_of_prefill_limit']:.0f}, {100 * row['share_of_decode_limit']:.0f}",
            html.escape(row["tokens"]),
            f"{found['divergence']:.1e}" if measured else "-",
            f"{100 * found['same_top']:.0f} %" if measured else "-",
            f"{found['perplexity']:.3f}" if measured else "-",
            html.escape(latest.precision_of(row)),
        )
        kind = "wrong" if row.get("wrong") else "ours" if is_ours(row["system"]) else ""
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{f}</td>" for f in fields) + "</tr>")
    limit = cell["limit"]
    caption = (
        f"<h3>{html.escape(title_of(cell))}</h3><p class='sub'>limits: "
        f"{1e3 * limit['prefill_seconds']:.1f} ms prefill at {limit['peak_gflops']:.0f} GFLOPS, "
        f"{1e3 * limit['decode_seconds']:.2f} ms/token at {limit['read_gb_per_second']:.1f} GB/s; "
        f"{html.escape(cell['file'])}</p>"
    )
    return f"{caption}<div class='wide'>{''.join(lines)}</table></div>"


def ops_table(record: dict[str, Any]) -> str:
    """Single ops of one run."""
    heads = ("case", "us", "GB/s", "GFLOPS", "% of limit", "vs ATen", "vs oneDNN", "rel. error")
    lines = ["<table><tr>", *(f"<th>{head}</th>" for head in heads), "</tr>"]
    for case in record["cases"]:
        own = case["implementations"]["tilewright"]
        peers = case["implementations"]
        if "seconds" not in own:
            reason = html.escape(own.get("reason", "no block was kept"))
            lines.append(
                f'<tr class="failed"><td>{html.escape(case["case"])}</td>'
                f'<td colspan="7" style="text-align:left">{reason}</td></tr>'
            )
            continue
        fields = [
            html.escape(case["case"]),
            f"{1e6 * own['seconds']['median']:.0f}",
            f"{own['gb_per_second']:.1f}",
            f"{own['gflops']:.0f}",
            f"{100 * own['share_of_limit']:.0f}",
        ]
        for peer in ("aten", "onednn"):
            ratio = peers.get(peer, {}).get("ratio")
            if ratio is None:
                fields.append("-")
                continue
            color = COLORS[verdict_of(ratio)]
            text = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            fields.append(f'<span style="color:{color}">{text}</span>')
        fields.append(f"{own['relative_error']:.0e}")
        lines.append("<tr>" + "".join(f"<td>{field}</td>" for field in fields) + "</tr>")
    return "".join(lines) + "</table>"


def span_of(shares: list[float]) -> str:
    """From the least to the most, in per cent."""
    ends = sorted({f"{100 * share:.0f}" for share in (min(shares), max(shares))}, key=float)
    return f"{' to '.join(ends)} %"


def machine_section(
    machine: str, cells: list[dict[str, Any]], records: list[dict[str, Any]], first: bool
) -> str:
    """Everything about one machine."""
    cards = []
    for part in ("decode", "prefill"):
        figure, words, kind = summary(cells, part)
        cards.append(
            f'<div class="card {kind}"><b>{figure}</b><span>{html.escape(words)}</span></div>'
        )
    shares = [
        row["share_of_decode_limit"]
        for cell in cells
        for row in running(cell)
        if row["system"] == "tilewright"
    ]
    if shares:
        cards.append(
            f'<div class="card"><b>{span_of(shares)}</b><span>'
            "of the measured limit of decode is what Tilewright reaches</span></div>"
        )
    parts = [
        f"<h2>{html.escape(machine)}</h2><div class='cards'>{''.join(cards)}</div>",
        "<h2>Who is ahead, and by how much</h2><p class='note'>How many times faster Tilewright is "
        "than each system: green ahead, red behind, grey undecided.</p>",
        overview(cells),
        "<p class='note'>Right of the line Tilewright is "
        "faster. Bars are 95 % intervals of the median ratio of interleaved runs; grey means that "
        "the interval holds 1. Ratios are per cell, at the precision in the table below.</p>",
        drawn(ratio_figure(cells, "decode"), first),
        drawn(ratio_figure(cells, "prefill")),
        "<h2>How near the limit</h2><p class='note'>Decode: bytes of weights and cache over the "
        "read bandwidth just measured. Prefill: operations over the measured peak. More than "
        "100 %: weights are counted in the cell's dtype, and fp32 ones that fit 16 bits are read "
        "as such; or the machine was slower while its limits were measured.</p>",
        drawn(limit_figure(cells, "decode")),
        drawn(limit_figure(cells, "prefill")),
    ]
    if any("total" in row["start"].get("cold", {}) for cell in cells for row in running(cell)):
        parts += ["<h2>From nothing to the first token</h2>", drawn(start_figure(cells))]
    parts += ["<h2>Memory</h2>", drawn(memory_figure(cells))]
    history = history_figure(records, machine)
    if history is not None:
        parts += ["<h2>Tilewright over commits</h2>", drawn(history)]
    parts.append("<h2>Every figure</h2>")
    parts += [cell_table(cell) for cell in cells]
    return "\n".join(parts)


def page_of(records: list[dict[str, Any]], ops: list[dict[str, Any]]) -> str:
    """The whole page."""
    newest = records[-1]
    head = (
        f"<h1>Tilewright beside the field</h1><p class='sub'>LLM inference on x86 CPUs. Latest run "
        f"{html.escape(newest['date'][:16].replace('T', ' '))} UTC, commit "
        f"{html.escape(newest['commit'])}, {newest['machine']['threads']} threads.</p>"
    )
    sections = []
    for number, (machine, cells) in enumerate(latest.latest_cells(records).items()):
        sections.append(machine_section(machine, cells, records, number == 0))
    by_set: dict[str, dict[str, Any]] = {record["file"]: record for record in ops}
    for record in by_set.values():
        sections.append(
            f"<h2>Single ops ({html.escape(record['file'])})</h2><p class='note'>Cold weights, in "
            "one process; ratios above 1 mean that Tilewright is faster.</p>" + ops_table(record)
        )
    versions = {
        row["system"]: row["versions"]
        for record in records
        for cell in record["cells"]
        for row in running(cell)
    }
    listing = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='text-align:left'>"
        f"{html.escape(', '.join(f'{k} {v}' for k, v in found.items()))}</td></tr>"
        for name, found in sorted(versions.items())
    )
    method = (
        f"<h2>Method</h2><p class='note'>{html.escape(newest['method'])}</p>"
        f"<table>{listing}</table>"
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Tilewright beside the "
        f"field</title><style>{STYLE}</style></head><body><main>{head}{''.join(sections)}{method}"
        "</main></body></html>"
    )


def main() -> int:
    """python -m bench_models.report PAGE"""
    records = results.read_all("models", places.RESULTS)
    if not records:
        print("no results of models yet: run ./dev bench models", file=sys.stderr)
        return 2
    page = Path(sys.argv[1])
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page_of(records, results.read_all("ops", places.RESULTS)))
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
