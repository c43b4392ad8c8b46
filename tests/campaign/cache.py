"""./dev campaign cache: what the kernel cache survives, as a table of faults with counts.

The tests of the cache, at full size (CAMPAIGN is set, see tests/fault_count.h), then the threads
under ThreadSanitizer and the readers of files under libFuzzer. Each is one row: how many cases, how
many went wrong. Rows are merged into perf/results/campaign-cache.json.

    ./dev campaign cache                     everything
    ./dev campaign cache mutation fuzz       some parts
    ./dev campaign cache --share 0.1         a tenth of the cases, at least those of the tests
    ./dev campaign cache --summary           the recorded rows as a table, nothing runs

ThreadSanitizer needs only GCC; libFuzzer needs Debian's clang-14 and libclang-rt-14-dev. Tested by
running it; the exit code is 1 if a row is wrong or could not be run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "perf" / "results" / "campaign-cache.json"
FUZZ_EXECUTIONS = 1_000_000
# What tests/file_reader.cpp reads with, of cache/.
READERS = [
    "entry",
    "file_contents",
    "pack",
    "recipe",
    "weight_header",
    "content_hash",
    "key",
    "sha256",
    "trusted_file",
]

Row = dict[str, Any]


def commit() -> str:
    """This commit, and whether the sources are other than its: parts record while others run."""

    def git(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!perf/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def run(command: list[str], log: Path, **more: str) -> bool:
    """Runs a command of the build or of a test; its output is in `log`."""
    with log.open("w") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **more},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode == 0


def build(preset: str, target: str) -> Path:
    log = Path(tempfile.gettempdir()) / f"tilewright-campaign-{target}.log"
    environment = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    configured = run(["cmake", "--preset", preset, "--log-level=WARNING"], log, **environment)
    command = ["cmake", "--build", "--preset", preset, "--target", target]
    if not configured or not run(command, log, **environment):
        raise RuntimeError(f"{target} does not build: see {log}")
    return ROOT / "build" / preset / "tests" / target


def recorded_faults(share: float, test: str, preset: str = "dev", only: str = "*") -> list[Row]:
    """The rows that a GoogleTest program records, and one for each test that just failed."""
    program = build(preset, test)
    with tempfile.TemporaryDirectory(prefix="tilewright-campaign-") as folder:
        report = Path(folder) / "report.json"
        command = [str(program), f"--gtest_output=json:{report}", f"--gtest_filter={only}"]
        log = Path(folder) / "log"
        run(command, log, CAMPAIGN=str(share))
        output = log.read_text(errors="replace")
        if not report.exists():
            return [{"fault": test, "tried": 0, "wrong": 1, "problem": output[-2000:]}]
        suites = json.loads(report.read_text())["testsuites"]
    rows = []
    for case in (case for suite in suites for case in suite["testsuite"]):
        failures = [failure["failure"] for failure in case.get("failures", [])]
        if "fault" not in case and not failures:
            continue
        row = {
            "fault": case.get("fault", f"{case['classname']}.{case['name']}"),
            "tried": int(case.get("tried", 0)),
            "wrong": int(case.get("wrong", 1)) or len(failures),
            "seconds": float(case["time"].rstrip("s")),
        }
        if failures:
            row["problem"] = failures[0]
        rows.append(row)
    return rows


def threads(share: float) -> list[Row]:
    """kernel_library_fault_test under ThreadSanitizer: a report is a failure of the program."""
    os.environ["TSAN_OPTIONS"] = "halt_on_error=1 exitcode=66"
    only = "*Threads*:*AFailure*"
    return [
        {**row, "fault": f"{row['fault']}, ThreadSanitizer"}
        for row in recorded_faults(share, "kernel_library_fault_test", "tsan", only)
    ]


def fuzz(share: float) -> list[Row]:
    """The readers under libFuzzer with AddressSanitizer and UndefinedBehaviorSanitizer."""
    row: Row = {"fault": "libFuzzer executions, all readers", "tried": 0, "wrong": 1}
    compiler = shutil.which("clang++") or shutil.which("clang++-14")
    if compiler is None:
        return [{**row, "problem": "needs clang-14 and libclang-rt-14-dev"}]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tilewright-campaign-") as folder:
        program, log = Path(folder) / "fuzz", Path(folder) / "log"
        sources = ["tests/file_reader_fuzz.cpp", "tests/file_reader.cpp"]
        sources += [f"cache/{name}.cpp" for name in READERS]
        command = [compiler, "-std=c++20", "-O1", "-g", "-march=x86-64-v2", "-I.", *sources]
        command += ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
        command += ["-l:libcrypto.a", "-l:libzstd.a", "-ldl", "-pthread", "-o", str(program)]
        if not run(command, log):
            return [{**row, "problem": log.read_text()[-2000:]}]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        limits = [
            f"-runs={int(share * FUZZ_EXECUTIONS)}",
            "-max_len=8192",
            "-malloc_limit_mb=64",
            "-seed=1",
        ]
        good = run([str(program), *limits, f"-artifact_prefix={folder}/", str(corpus)], log)
        output = log.read_text(errors="replace")
    done = re.search(r"Done (\d+) runs", output)
    row["tried"] = int(done.group(1)) if done else 0
    row["wrong"] = 0 if good and done else 1
    row["seconds"] = time.monotonic() - start
    if row["wrong"]:
        row["problem"] = output[-2000:]
    return [row]


PARTS: dict[str, Callable[[float], list[Row]]] = {
    "mutation": lambda share: recorded_faults(share, "cache_mutation_test"),
    "store": lambda share: recorded_faults(share, "cache_fault_test"),
    "kernels": lambda share: recorded_faults(share, "kernel_library_fault_test"),
    "threads": threads,
    "fuzz": fuzz,
}


def summary(rows: list[Row]) -> str:
    lines = ["| fault | cases | wrong | seconds |", "|---|---|---|---|"]
    for row in rows:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        lines.append(f"| {row['fault']} | {row['tried']:,} | {row['wrong']} | {seconds} |")
    return "\n".join(lines)


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = {"parts": {}}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--share", type=float, default=1, help="of the cases; default: 1, all")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--summary", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; have {', '.join(PARTS)}")
    if options.summary:
        parts = recorded()["parts"].values()
        print(summary([row for part in parts for row in part["rows"]]))
        return 0
    today = datetime.date.today().isoformat()
    origin = {"commit": commit(), "date": today, "share": options.share}
    rows: list[Row] = []
    for part in options.parts or PARTS:
        found = PARTS[part](options.share)
        rows += found
        for row in found:
            if "problem" in row:
                print(f"{row['fault']}: {row['problem']}", file=sys.stderr)
        if not options.no_record:
            results = recorded()  # as it is now: other parts may be running
            results["parts"][part] = {**origin, "rows": found}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(rows))
    return any(row["wrong"] or not row["tried"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
