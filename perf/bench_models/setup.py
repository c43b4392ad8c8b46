"""Makes the systems' environments, once: pinned packages by name, and what breaks them removed.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from bench_models import cells, gate, models, places, session, text
from bench_models.systems import ENVIRONMENTS, QUICK_SYSTEMS, SYSTEMS, Environment

NOTE = "bench-note.txt"
Say = Callable[[str], None]


def stamp_of(environment: Environment) -> str:
    """What an environment was made from."""
    return "\n".join([*environment.packages, "-", *environment.remove]) + "\n"


def make(name: str, say: Say = print) -> str:
    """Makes one environment unless it is there; returns "" or the reason why it could not."""
    environment = ENVIRONMENTS[name]
    folder = places.home() / "venvs" / name
    stamp = folder / "bench-packages.txt"
    if stamp.exists() and stamp.read_text() == stamp_of(environment):
        say(f"{name}: there")
        return ""
    say(f"{name}: installing {' '.join(environment.packages)}")
    python = str(places.python_of(name))
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", *environment.packages],
    ]
    if environment.remove:
        commands.append([*pip, "uninstall", "--yes", *environment.remove])
    if environment.probe:
        commands.append([python, "-c", f"import {environment.probe}"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            say(f"{name}: failed: {reason}")
            return reason
    if environment.safe_build:
        note = _check_instructions(name, pip, environment, say)
        (folder / NOTE).write_text(note)
    stamp.write_text(stamp_of(environment))
    listing = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=False)
    (folder / "bench-freeze.txt").write_text(listing.stdout)
    say(f"{name}: ready")
    return ""


def _check_instructions(name: str, pip: list[str], environment: Environment, say: Say) -> str:
    """Runs a tiny model in every dtype; after an illegal instruction builds again, more carefully.

    Returns what to tell readers of the results.
    """
    system = next(key for key, value in SYSTEMS.items() if value.environment == name)
    for dtype in SYSTEMS[system].dtypes:
        plan = session.Plan([system], threads=2, starts=False, accuracy=False, say=lambda _: None)
        cell = cells.Cell("tiny", dtype, 32, 2, 1)
        directory = models.directory_of("tiny")
        row = session.start(plan, system, cell, directory, text.prompts_of(cell, directory))
        if row.worker is not None:
            row.worker.close()
        if "SIGILL" in row.reason:
            say(f"{name}: {dtype} died of an illegal instruction; building without AMX")
            options = ["--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", ":all:"]
            command = [*pip, "install", *options, environment.packages[0]]
            subprocess.run(command, env={**os.environ, **environment.safe_build}, check=True)
            return f"built with {environment.safe_build}: the native build died on {dtype}"
    return ""


def _load_quick(say: Say) -> None:
    """Loads each system of --quick once, so that its converted models and Inductor's compiled code
    are there: they take minutes, and every later --quick must end within five."""
    for cell in cells.quick_cells(gate.measure(threads=2)["arithmetic"]):
        directory = models.directory_of(cell.model)
        for name in QUICK_SYSTEMS:
            plan = session.Plan([name], 2, kept_caches=places.home() / "caches", say=say)
            row = session.start(plan, name, cell, directory, text.prompts_of(cell, directory))
            if row.worker is not None:
                row.worker.close()
            else:
                say(f"{name}: {row.reason}")


def make_all(names: list[str], say: Say = print) -> dict[str, str]:
    """name -> reason of what failed. Also builds the probe of the machine's limits, and loads the
    systems of --quick once when their environment is asked for."""
    gate.program()
    reasons = {name: make(name, say) for name in names}
    if "openvino" in names:
        _load_quick(say)
    return {name: reason for name, reason in reasons.items() if reason}
