"""What runs in a system's process: requests from stdin, answers to stdout, an engine between.

Needs nothing but Python and the engine's own packages. Whatever a library prints to stdout goes to
stderr instead, which is the worker's log.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def memory() -> dict[str, float]:
    """Peak and present resident memory of this process, in MB."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "VmRSS"):
            found[key] = int(value.split()[0]) / 1000
    return {"peak_mb": found["VmHWM"], "resident_mb": found["VmRSS"]}


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request says."""
    what = request["do"]
    if what == "load":
        begin = time.time()
        stamps = {"process": begin - request["spawned"]}
        engine.imports()
        stamps["import"] = time.time() - begin
        imported = memory()
        begin = time.time()
        engine.load(request)
        stamps["load"] = time.time() - begin
        # All tokens, although only the first counts here: static caches are as long as the first
        # call asks for, and a longer one would compile again.
        until = time.time() - request["spawned"]
        first = engine.generate(request["prompts"], request["new"])
        stamps["first_token"] = first["first_seconds"]
        stamps["total"] = until + first["first_seconds"]
        again = engine.generate(request["prompts"], 1)
        stamps["first_token_again"] = again["first_seconds"]
        return {
            "start": stamps,
            "start_details": engine.start_details(),
            "first_tokens": first["tokens"],
            "memory_imported": imported,
            "precision": engine.precision(),
            "versions": engine.versions(),
        }
    if what == "generate":
        result: dict[str, Any] = engine.generate(request["prompts"], request["new"])
        return result
    if what == "logits":
        engine.logits(request["tokens"], request["path"])
        return {"path": request["path"]}
    if what == "memory":
        return memory()
    if what == "convert":
        engine.imports()
        engine.convert(request)
        return {}
    raise ValueError(f"no request '{what}'")


def reason_of(error: BaseException) -> str:
    """An error in a line, its cause first: "could not load" alone tells no reader why, and tables
    cut long lines."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        parts.append(f"{type(seen).__name__}: {' '.join(str(seen).split())[:300]}")
        seen = seen.__cause__
    return "; hence ".join(reversed(parts))


def main() -> None:
    """Serves until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = importlib.import_module(sys.argv[1]).Engine()
    for line in sys.stdin:
        try:
            result = answer(engine, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            result = {"error": reason_of(error)}
        channel.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
