"""The wheel runs in a bare environment that has only torch: no compiler, nothing of this machine.

The environment sees torch and what torch requires, through links, and nothing else of the
environment that runs the tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# What the libraries in the wheel may need: the C and C++ runtimes, which torch needs too, and
# torch's own libraries (libgomp among them).
ALLOWED_LIBRARIES = re.compile(
    r"^(ld-linux-x86-64|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|torch_cpu|torch|c10))\.so[.0-9]*$"
)
# The command line's requirements; what the two lines of a user need is torch alone.
USED_BY_COMMANDS_ONLY = ("typer", "rich")

COMPILE_AND_RUN = """
import sys
import torch
import tilewright

model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32))
model = model.eval()
x = torch.randn(5, 64)
with torch.no_grad():
    expected = model(x)
    compiled = torch.compile(model, backend="tilewright")
    actual = compiled(x)
torch.testing.assert_close(actual, expected)
report = tilewright.explain(compiled).to_dict()
assert any(not region["fallback"] for region in report["regions"]), report
for name in ("typer", "rich", "transformers", "numpy"):
    assert name not in sys.modules, name
assert tilewright.__file__.startswith(sys.prefix), tilewright.__file__
gomp = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(gomp) == 1, gomp
print("ran", len(report["regions"]), "regions")
"""


def requirements(name: str, seen: dict[str, importlib.metadata.Distribution]) -> None:
    """Collects a distribution and what it requires, without extras."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return
    try:
        seen[key] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # a requirement for another platform
    for requirement in seen[key].requires or []:
        if "extra ==" not in requirement:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert match is not None
            requirements(match.group(), seen)


def link_torch(directory: Path) -> None:
    """Makes torch and its requirements importable from a directory, and nothing else."""
    directory.mkdir()
    distributions: dict[str, importlib.metadata.Distribution] = {}
    requirements("torch", distributions)
    for distribution in distributions.values():
        tops = {Path(file).parts[0] for file in distribution.files or []}
        for top in tops - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (directory / top).exists():
                (directory / top).symlink_to(source)


def run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).resolve().parents[2]
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(directory)]
    # The venv's cmake and ninja, as ./dev uses them: the build directory is shared.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run([*pip, *options, str(source)], {**os.environ, "PATH": path})
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment with torch and the wheel."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv" / "bin" / "python"
    link_torch(directory / "torch-only")
    (packages,) = (directory / "venv" / "lib").glob("python*/site-packages")
    (packages / "torch-only.pth").write_text(f"{directory / 'torch-only'}\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*install, "--no-deps", "--no-index", str(wheel)])
    yield python


def bare_environment(tmp_path: Path) -> dict[str, str]:
    # No PATH: no compiler, no tool can be found.
    kept = {key: value for key, value in os.environ.items() if key.startswith("TILEWRIGHT_")}
    return {
        **kept,
        "PATH": "/nonexistent",
        "HOME": str(tmp_path),
        "TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache"),
    }


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA")))
    assert any(re.fullmatch(r"tilewright/_core\..*so", name) for name in names), names
    assert "tilewright/bin/twc" in names
    assert "tilewright/__init__.py" in names
    strangers = [n for n in names if not re.match(r"tilewright(/|-[0-9.]+\.dist-info/)", n)]
    assert not strangers
    assert not [name for name in names if "libgomp" in name or "libcrypto" in name]
    needed = re.findall(r"^Requires-Dist: ([A-Za-z0-9._-]+)", metadata.decode(), re.MULTILINE)
    assert {"torch", *USED_BY_COMMANDS_ONLY} <= set(needed)


def test_libraries_need_only_what_torch_has(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    binaries = [*tmp_path.glob("tilewright/**/*.so"), tmp_path / "tilewright" / "bin" / "twc"]
    assert len(binaries) >= 2
    for binary in binaries:
        dynamic = run(["readelf", "-d", str(binary)])
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        assert needed
        assert not [name for name in needed if not ALLOWED_LIBRARIES.match(name)], needed
        assert not re.search(r"R(UN)?PATH", dynamic), dynamic


def test_model_compiles_in_a_bare_environment(bare_python: Path, tmp_path: Path) -> None:
    output = run([str(bare_python), "-c", COMPILE_AND_RUN], bare_environment(tmp_path))
    assert output.startswith("ran ")


def test_twc_runs_in_a_bare_environment(bare_python: Path, tmp_path: Path) -> None:
    text = "graph f(%x: f32[2, 3]) -> (f32[2, 3]) {\n  return %x\n}\n"
    file = tmp_path / "identity.graph"
    file.write_text(text)
    twc = str(bare_python.parent / "twc")
    assert "graph f(" in run([twc, "print", str(file)], bare_environment(tmp_path))
