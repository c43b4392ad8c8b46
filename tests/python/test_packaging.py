"""The papers and settings of the package agree with each other.

The wheel itself is tested by test_wheel.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def test_backend_is_registered_with_dynamo() -> None:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert [point.value for point in points if point.name == "tilewright"] == [
        "tilewright.backend:backend"
    ]


def test_commands_are_registered() -> None:
    points = importlib.metadata.entry_points(group="console_scripts")
    values = {point.name: point.value for point in points}
    assert values["tilewright"] == "tilewright.cli:main"
    assert values["twc"] == "tilewright.twc:main"


def test_version_is_that_of_the_build(source_directory: Path) -> None:
    text = (source_directory / "CMakeLists.txt").read_text()
    match = re.search(r"project\(tilewright VERSION ([0-9.]+)", text)
    assert match is not None
    assert importlib.metadata.version("tilewright") == match.group(1)


def test_license_is_apache(source_directory: Path) -> None:
    assert "Apache License" in (source_directory / "LICENSE").read_text()[:200]


def hashes_of_sources(source: Path, output: Path, xbyak: Path) -> list[str]:
    """Of the generator, of the passes."""
    command = [
        "cmake",
        f"-DSOURCE_DIR={source}",
        f"-DXBYAK_DIR={xbyak}",
        f"-DOUTPUT={output}",
        "-P",
        str(source / "cache" / "hash_generator.cmake"),
    ]
    subprocess.run(command, check=True)
    hashes = re.findall(r'_hash\(\) { return "([0-9a-f]{64})"', output.read_text())
    assert len(hashes) == 2
    return hashes


def test_generator_hash_follows_content_and_not_place(
    source_directory: Path, tmp_path: Path
) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on this machine")
    trees = []
    for name in ("one", "two"):
        for folder in ("jit", "ops", "cache", "graph"):
            shutil.copytree(source_directory / folder, tmp_path / name / folder)
        (tmp_path / name / "xbyak").mkdir()
        (tmp_path / name / "xbyak" / "xbyak.h").write_text("// version 1\n")
        trees.append(tmp_path / name)

    def digests(tree: Path) -> list[str]:
        return hashes_of_sources(tree, tmp_path / "hash.cpp", tree / "xbyak")

    before = digests(trees[0])
    assert digests(trees[1]) == before
    header = trees[1] / "jit" / "emit.h"
    text = header.read_text()
    for path, changed in (
        (trees[1] / "graph" / "passes" / "new_pass.cpp", "// new\n"),
        (header, text + "\n"),
        (trees[1] / "ops" / "gemm" / "new_kernel.cpp", "// new\n"),
        (trees[1] / "xbyak" / "xbyak.h", "// version 2\n"),
    ):
        restore = path.read_text() if path.exists() else None
        path.write_text(changed)
        after, of_passes = digests(trees[1]), "graph" in path.parts
        assert (after[0] != before[0], after[1] != before[1]) == (not of_passes, of_passes), path
        if restore is None:
            path.unlink()
        else:
            path.write_text(restore)
    assert digests(trees[1]) == before
