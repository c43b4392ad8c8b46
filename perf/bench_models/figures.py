"""The figures of the page of results (report.py), drawn with plotly.

Each takes cells of latest.py and returns a figure; `drawn` makes HTML of it.
Tested by tests/python/test_bench_models.py (`start_phases`; the drawing itself was looked at).
"""

from __future__ import annotations

from typing import Any

from bench_models import latest
from bench_models.latest import is_ours, running, title_of, verdict_of

OURS = "#0f766e"
COLORS = {"ahead": "#15803d", "behind": "#b91c1c", "even": "#6b7280"}
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
    for panel, (_, rows) in enumerate(panels, 1):
        ratios = [row["ratio"][part] for row in rows]
        shades = [COLORS[verdict_of(ratio)] for ratio in ratios]
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
