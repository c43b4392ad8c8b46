"""Makes the systems' environments, once: pinned packages by name, and what breaks them removed.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from bench_models import gate, places
from bench_models.systems import ENVIRONMENTS, Environment


def stamp_of(environment: Environment) -> str:
    """What an environment was made from."""
    return "\n".join([*environment.packages, "-", *environment.remove]) + "\n"


def make(name: str, say: Callable[[str], None] = print) -> str:
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
    stamp.write_text(stamp_of(environment))
    listing = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=False)
    (folder / "bench-freeze.txt").write_text(listing.stdout)
    say(f"{name}: ready")
    return ""


def make_all(names: list[str], say: Callable[[str], None] = print) -> dict[str, str]:
    """name -> reason of what failed. Also builds the probe of the machine's limits."""
    gate.program()
    failed = {name: make(name, say) for name in names}
    return {name: reason for name, reason in failed.items() if reason}
