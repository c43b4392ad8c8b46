"""Of all result files, what a reader wants to see: each cell's latest measurement on one machine.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

from typing import Any


def title_of(cell: dict[str, Any]) -> str:
    """Short, for axes."""
    return f"{cell['model']} {cell['dtype']}, prompt {cell['prompt']}, batch {cell['batch']}"


def is_ours(name: str) -> bool:
    return name.split(":")[0] == "tilewright"


def running(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in cell["systems"] if row["status"] == "ok"]


def verdict_of(ratio: dict[str, float]) -> str:
    """ahead, behind, or even when the interval holds 1."""
    if ratio["low"] > 1:
        return "ahead"
    return "behind" if ratio["high"] < 1 else "even"


def is_wrong(row: dict[str, Any], dtype: str) -> bool:
    """By its logits; where nobody looked at them, in fp32, by other greedy tokens than eager's."""
    if "wrong" in row.get("accuracy", {}):
        return bool(row["accuracy"]["wrong"])
    return dtype == "fp32" and str(row.get("tokens", "")).startswith("first ")


def machine_of(record: dict[str, Any]) -> str:
    """Runs on different kinds of machine never mix."""
    return f"{record['machine']['cpu']}, {record['machine']['isa'][-1]}"


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two measurements the same cell: not the number of new tokens, which decode's slope
    does not depend on."""
    return (cell["model"], cell["dtype"], cell["prompt"], cell["batch"])


def latest_cells(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """machine -> its cells, each with the latest row of every system and where it came from.

    Rows of one cell may come from different runs; ratios stay right, as each is paired with the
    baseline of its own run.
    """
    machines: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for record in records:  # oldest first
        cells = machines.setdefault(machine_of(record), {})
        for cell in record["cells"]:
            kept = cells.setdefault(key_of(cell), {**cell, "systems": []})
            rows = {row["system"]: row for row in kept["systems"]}
            for row in cell["systems"]:
                before = rows.get(row["system"])
                if row["status"] == "ok" or before is None or before["status"] != "ok":
                    starts = {**(before or {}).get("start", {}), **row.get("start", {})}
                    rows[row["system"]] = {
                        **row,
                        "start": starts,  # not every run measures both
                        "wrong": is_wrong(row, cell["dtype"]),
                        "commit": record["commit"],
                        "file": record.get("file", ""),
                    }
            kept |= {"systems": list(rows.values()), "limit": cell["limit"]}
            kept["file"] = record.get("file", "")
            kept["commit"] = record["commit"]
    order = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
    return {
        machine: sorted(
            cells.values(), key=lambda c: (c["model"], order[c["dtype"]], c["batch"], c["prompt"])
        )
        for machine, cells in machines.items()
    }


def precision_of(system: dict[str, Any]) -> str:
    """weights / arithmetic / KV / head"""
    short = {"float32": "fp32", "f32": "fp32", "bfloat16": "bf16", "float16": "fp16", "f16": "fp16"}
    parts = []
    for key in ("weights", "activations", "kv", "head"):
        value = system["precision"].get(key, "?")
        parts.append(short.get(value, value))
    return "/".join(parts)
