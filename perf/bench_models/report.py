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

OURS, AHEAD, BEHIND, EVEN = "#0f766e", "#15803d", "#b91c1c", "#6b7280"
PHASES = (
    ("process", "process", "#cbd5e1"),
    ("import", "import", "#94a3b8"),
    ("weights", "read weights", "#60a5fa"),
    ("prepare", "prepare or compile ahead", "#1d4ed8"),
    ("capture", "capture", "#f59e0b"),
    ("passes_and_packing", "passes and packing", "#d97706"),
    ("emission", "emission", "#b45309"),
    ("first", "rest of the first token", "#a78bfa"),
)
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


def title_of(cell: dict[str, Any]) -> str:
    """Short, for axes."""
    return f"{cell['model']} {cell['dtype']}, prompt {cell['prompt']}, batch {cell['batch']}"


def is_ours(name: str) -> bool:
    return name.split(":")[0] == "tilewright"


def running(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in cell["systems"] if row["status"] == "ok"]


def best_peer(cell: dict[str, Any], part: str) -> dict[str, Any] | None:
    """The peer that the baseline is least ahead of, wrong ones excluded."""
    peers = [
        row
        for row in running(cell)
        if not is_ours(row["system"])
        and part in row.get("ratio", {})
        and not row.get("accuracy", {}).get("wrong")
    ]
    return min(peers, key=lambda row: row["ratio"][part]["median"], default=None)


def verdict_of(ratio: dict[str, float]) -> str:
    """ahead, behind, or even when the interval holds 1."""
    if ratio["low"] > 1:
        return "ahead"
    return "behind" if ratio["high"] < 1 else "even"


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
    if row.get("accuracy", {}).get("wrong"):
        return '<td class="none" title="its tokens or logits are wrong">wrong</td>'
    return heat(row.get("ratio", {}).get(part))


def start_phases(start: dict[str, Any]) -> dict[str, float]:
    """The parts of a start, which add up to its total."""
    details = start.get("details", {})
    weights = details.get("weights", 0.0)
    inner = {
        key: float(details.get(key, 0.0)) for key in ("capture", "passes_and_packing", "emission")
    }
    parts = {
        "process": start["process"],
        "import": start["import"],
        "weights": weights,
        "prepare": max(0.0, start["load"] - weights),
        "first": max(0.0, start["first_token"] - sum(inner.values())),
    }
    return {**parts, **inner}


def ratio_figure(cells: list[dict[str, Any]], part: str) -> Any:
    """Points with intervals: how many times faster the baseline is than each peer. One panel per
    cell, the closest peer on top."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = []
    for cell in cells:
        rows = [row for row in running(cell) if part in row.get("ratio", {})]
        rows = [row for row in rows if not is_ours(row["system"])]
        if rows:
            panels.append((cell, sorted(rows, key=lambda row: -row["ratio"][part]["median"])))
    if not panels:
        return go.Figure()
    counts = [len(rows) + 1.2 for _, rows in panels]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=counts,
        vertical_spacing=min(0.06, 0.9 / len(panels)),
        subplot_titles=[title_of(cell) for cell, _ in panels],
    )
    colors = {"ahead": AHEAD, "behind": BEHIND, "even": EVEN}
    for panel, (_, rows) in enumerate(panels, 1):
        ratios = [row["ratio"][part] for row in rows]
        shades = [colors[verdict_of(ratio)] for ratio in ratios]
        for row, ratio, shade in zip(rows, ratios, shades, strict=True):
            figure.add_trace(
                go.Scatter(
                    x=[ratio["median"]],
                    y=[row["system"]],
                    error_x={
                        "type": "data",
                        "array": [ratio["high"] - ratio["median"]],
                        "arrayminus": [ratio["median"] - ratio["low"]],
                        "thickness": 2,
                        "width": 4,
                    },
                    mode="markers+text",
                    cliponaxis=False,
                    text=[f"{ratio['median']:.2f}x"],
                    textposition="top center",
                    textfont={"size": 11, "color": shade},
                    marker={"size": 9, "color": shade},
                    showlegend=False,
                    hovertemplate=f"{ratio['median']:.3f} [{ratio['low']:.3f}, "
                    f"{ratio['high']:.3f}]<extra>{row['system']}</extra>",
                ),
                row=panel,
                col=1,
            )
    figure.add_vline(x=1, line={"color": "#111827", "width": 1})
    figure.update_xaxes(
        type="log",
        tickvals=[0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8],
        gridcolor="#e5e7eb",
        showticklabels=True,
    )
    figure.update_xaxes(
        title=f"{part}: times faster than this system Tilewright is (log scale)",
        row=len(panels),
        col=1,
    )
    figure.update_layout(height=110 + 34 * sum(counts) + 30 * len(panels))
    return figure


def limit_figure(cells: list[dict[str, Any]], part: str) -> Any:
    """Bars: which share of the measured limit each system reaches."""
    import plotly.graph_objects as go

    figure = go.Figure()
    titles, names, shares, colors = [], [], [], []
    for cell in reversed(cells):
        for row in sorted(running(cell), key=lambda row: row[f"share_of_{part}_limit"]):
            titles.append(title_of(cell))
            names.append(row["system"])
            shares.append(100 * row[f"share_of_{part}_limit"])
            colors.append(OURS if is_ours(row["system"]) else "#94a3b8")
    figure.add_trace(
        go.Bar(
            x=shares,
            y=[titles, names],
            orientation="h",
            marker={"color": colors},
            text=[f"{share:.0f} %" for share in shares],
            textposition="outside",
            cliponaxis=False,
        )
    )
    figure.add_vline(x=100, line={"color": "#111827", "width": 1, "dash": "dot"})
    figure.update_xaxes(
        title=f"{part}: % of the limit measured in the same run",
        gridcolor="#e5e7eb",
        range=[0, max([105, *(1.1 * share for share in shares)])],
    )
    figure.update_layout(height=110 + 27 * len(shares), showlegend=False, bargap=0.25)
    return figure


def start_figure(cells: list[dict[str, Any]]) -> Any:
    """Stacked bars: a fresh process until its first token, with empty and with filled caches."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows: list[tuple[str, str, dict[str, float]]] = []
    seen = set()
    for cell in cells:
        for row in running(cell):
            for kind in ("warm", "cold"):
                start = row["start"].get(kind, {})
                once = (cell["model"], cell["dtype"], row["system"], kind)
                if "total" in start and once not in seen:
                    seen.add(once)
                    title = f"{cell['model']} {cell['dtype']}, {kind}"
                    rows.append((title, row["system"], start_phases(start)))
    rows.sort(key=lambda entry: (entry[0], -sum(entry[2].values())), reverse=False)
    rows.reverse()
    for key, label, color in PHASES:
        figure.add_trace(
            go.Bar(
                x=[phases.get(key, 0.0) for *_, phases in rows],
                y=[[title for title, *_ in rows], [name for _, name, _ in rows]],
                orientation="h",
                name=label,
                marker={"color": color},
                hovertemplate="%{x:.2f} s<extra>" + label + "</extra>",
            )
        )
    longest = max((sum(phases.values()) for *_, phases in rows), default=1.0)
    for title, name, phases in rows:
        total = sum(phases.values())
        figure.add_trace(
            go.Scatter(
                x=[total + 0.01 * longest],
                y=[[title], [name]],
                mode="text",
                text=[f"{total:.1f} s"],
                textposition="middle right",
                showlegend=False,
                hoverinfo="skip",
            )
        )
    figure.update_xaxes(
        title="seconds from the start of the process to the first token",
        gridcolor="#e5e7eb",
        range=[0, 1.1 * longest],
    )
    figure.update_layout(
        barmode="stack",
        height=150 + 27 * len(rows),
        bargap=0.25,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )
    return figure


def memory_figure(cells: list[dict[str, Any]]) -> Any:
    """Bars: peak and steady resident memory."""
    import plotly.graph_objects as go

    figure = go.Figure()
    entries = [
        (title_of(cell), row["system"], row["memory"])
        for cell in reversed(cells)
        if cell["batch"] == 1
        for row in sorted(running(cell), key=lambda row: -row["memory"].get("peak_mb", 0))
    ]
    for key, label, color in (
        ("resident_mb", "after the run", "#0ea5e9"),
        ("peak_mb", "peak", "#cbd5e1"),
    ):
        figure.add_trace(
            go.Bar(
                x=[memory.get(key, 0) / 1000 for *_, memory in entries],
                y=[[title for title, *_ in entries], [name for _, name, _ in entries]],
                orientation="h",
                name=label,
                marker={"color": color},
                text=[f"{memory.get(key, 0) / 1000:.2f}" for *_, memory in entries],
                textposition="outside",
                cliponaxis=False,
            )
        )
    figure.update_xaxes(title="resident memory, GB", gridcolor="#e5e7eb")
    figure.update_layout(
        height=150 + 44 * len(entries), legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return figure


def history_figure(records: list[dict[str, Any]], machine: str) -> Any | None:
    """Lines: our share of the limit over commits, per cell."""
    import plotly.graph_objects as go

    lines: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        if latest.machine_of(record) != machine:
            continue
        for cell in record["cells"]:
            for row in running(cell):
                if row["system"] == "tilewright":
                    for part in ("prefill", "decode"):
                        point = (
                            f"{record['date'][5:16].replace('T', ' ')} {record['commit'][:8]}",
                            100 * row[f"share_of_{part}_limit"],
                        )
                        lines.setdefault(f"{title_of(cell)}: {part}", []).append(point)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = go.Figure()
    for name, points in lines.items():
        if len(points) > 1:
            figure.add_trace(
                go.Scatter(x=[p[0] for p in points], y=[p[1] for p in points], name=name)
            )
    figure.update_yaxes(title="% of the measured limit", rangemode="tozero", gridcolor="#e5e7eb")
    figure.update_layout(height=420, legend={"orientation": "h", "y": -0.35})
    return figure


def drawn(figure: Any, first: bool = False) -> str:
    """A figure as HTML; the first one brings the script."""
    figure.update_layout(
        template="plotly_white",
        margin={"l": 10, "r": 50, "t": 60, "b": 50},
        font={"family": "system-ui, Segoe UI, DejaVu Sans, sans-serif", "size": 13},
    )
    figure.update_yaxes(automargin=True)
    body: str = figure.to_html(
        full_html=False, include_plotlyjs=first, config={"displayModeBar": False}
    )
    return f"<figure>{body}</figure>"


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
        kind = "wrong" if found.get("wrong") else "ours" if is_ours(row["system"]) else ""
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
            color = {"ahead": AHEAD, "behind": BEHIND, "even": EVEN}[verdict_of(ratio)]
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
