"""The rules that keep the layers apart and the files readable, checked on every file under git.

Tested by itself: each rule has an example that must break it (test_rules_can_fail).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_LINES = 800
MAX_COLUMNS = 100
CPP = (".h", ".cpp", ".def")

# Layer -> the top-level folders it may include from. jit/base counts as a folder of its own.
MAY_INCLUDE = {
    "jit/base": {"jit/base"},
    "jit": {"jit/base", "jit"},
    "graph": {"jit/base", "graph"},
    "cache": {"jit/base", "cache"},
    "ops": {"jit/base", "jit", "graph", "cache", "ops"},
    "frontends/cli": {"jit/base", "jit", "graph", "cache", "ops", "frontends/cli"},
    "frontends/torch": {"jit/base", "jit", "graph", "cache", "ops", "frontends/torch"},
}
LAYERS = sorted(MAY_INCLUDE, key=len, reverse=True)

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
LINE_COMMENT = re.compile(r"//[^\n]*")
LAZY_STATIC = re.compile(r"^\s+static (?!constinit|constexpr)[^()\n]*[=;{]", re.MULTILINE)
STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')


def layer_of(path: str) -> str | None:
    return next((layer for layer in LAYERS if path.startswith(layer + "/")), None)


def opening_comment(path: str, text: str) -> str:
    """The comment or docstring that a file opens with."""
    if path.endswith(".py"):
        match = re.match(r'(?:#[^\n]*\n)*\s*[rR]?"""(.*?)"""', text, re.DOTALL)
    elif path.endswith(CPP):
        match = re.match(r"((?://[^\n]*\n)+)", text)
    else:
        match = re.match(r"((?:#[^\n]*\n)+)", text)
    return match.group(1) if match else ""


def violations(path: str, text: str) -> Iterator[str]:
    """What is wrong with one file, as sentences."""
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        yield f"{path}: {len(lines)} lines, more than {MAX_LINES}"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS and not path.endswith(".md"):
            yield f"{path}:{number}: {len(line)} columns, more than {MAX_COLUMNS}"
    if path.endswith((*CPP, ".py")):
        comment = opening_comment(path, text)
        if "Tested by" not in comment and not path.startswith(("tests/", "perf/")):
            yield f"{path}: does not open with a comment that says what it is tested by"
        if not comment:
            yield f"{path}: does not open with a comment"
    if path.endswith(CPP):
        yield from cpp_violations(path, text)


def cpp_violations(path: str, text: str) -> Iterator[str]:
    layer = layer_of(path)
    if layer is None:
        return
    for included in INCLUDE.findall(text):
        other = layer_of(included)
        if other is not None and other not in MAY_INCLUDE[layer]:
            yield f"{path}: {layer} must not include {included}"
        if included.startswith("xbyak/") and not path.startswith("jit/assembler"):
            yield f"{path}: only jit/assembler may include {included}"
        is_torch = included.startswith(("torch/", "ATen/", "c10/", "caffe2/"))
        if is_torch and layer != "frontends/torch":
            yield f"{path}: only frontends/torch may include {included}"
    code = STRING.sub('""', LINE_COMMENT.sub("", text))
    if layer in ("jit", "jit/base", "graph", "ops") and re.search(r"\bvirtual\b", code):
        yield f"{path}: virtual in {layer}"
    is_core = layer in ("jit", "jit/base", "graph", "ops", "cache")
    if is_core and path != "jit/base/fork_mutex.cpp" and LAZY_STATIC.search(code):
        yield f"{path}: a static that is made by its first use; a ForkStatic survives fork()"


def files_of_the_project(source_directory: Path) -> dict[str, str]:
    """Path -> text of every source file under git, or about to be."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source_directory,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    endings = (*CPP, ".py", ".cmake", "CMakeLists.txt", "dev")
    paths = [path for path in listing.stdout.split("\0") if path.endswith(endings)]
    files = {path: source_directory / path for path in paths}
    return {path: file.read_text("utf-8") for path, file in files.items() if file.exists()}


def test_every_file_follows_the_rules(source_directory: Path) -> None:
    files = files_of_the_project(source_directory)
    found = [sentence for path in files for sentence in violations(path, files[path])]
    assert not found, "\n".join(found)


def test_every_test_that_a_file_names_exists(source_directory: Path) -> None:
    files = files_of_the_project(source_directory)
    tests = {Path(path).stem for path in files if path.startswith("tests/")}
    missing = []
    for path, text in files.items():
        if path.startswith("tests/"):
            continue
        _, _, named = opening_comment(path, text).partition("Tested by")
        names = re.findall(r"\b(?:\w+_test|test_\w+)\b", named)
        missing += [f"{path}: there is no {name}" for name in names if name not in tests]
    assert not missing, "\n".join(missing)


def test_every_source_is_built(source_directory: Path) -> None:
    """A file that no CMakeLists.txt names would rot, and a test that none names would not run."""
    files = files_of_the_project(source_directory)
    unbuilt = []
    for path in files:
        if not path.endswith(".cpp"):
            continue
        # The nearest CMakeLists.txt above the file names it relative to itself.
        folder = Path(path).parent
        while f"{folder}/CMakeLists.txt" not in files:
            folder = folder.parent
        name = str(Path(path).relative_to(folder))
        lists = files[f"{folder}/CMakeLists.txt"]
        registered = rf"tilewright_test\({re.escape(name.removesuffix('.cpp'))}\s"
        if not re.search(rf"(^|\s|\(){re.escape(name)}\b", lists) and not re.search(
            registered, lists
        ):
            unbuilt.append(f"{path}: not named in {folder}/CMakeLists.txt")
    assert not unbuilt, "\n".join(unbuilt)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("graph/x.h", '// X. Tested by x.\n#include "jit/emit.h"\n', "must not include"),
        ("graph/x.h", '// X. Tested by x.\n#include "cache/store.h"\n', "must not include"),
        ("cache/x.h", '// X. Tested by x.\n#include "graph/graph.h"\n', "must not include"),
        ("jit/x.h", '// X. Tested by x.\n#include "ops/program.h"\n', "must not include"),
        ("jit/base/x.h", '// X. Tested by x.\n#include "jit/emit.h"\n', "must not include"),
        ("jit/emit.cpp", "// X. Tested by x.\n#include <xbyak/xbyak.h>\n", "only jit/assembler"),
        ("ops/x.cpp", "// X. Tested by x.\n#include <torch/torch.h>\n", "only frontends/torch"),
        ("ops/x.cpp", "// X. Tested by x.\nstruct A { virtual void f(); };\n", "virtual"),
        ("ops/x.cpp", "// X. Tested by x.\nA& a() {\n  static A a = make();\n}\n", "ForkStatic"),
        ("ops/x.cpp", "// X. Tested by x.\nA& a() {\n  static A a;\n}\n", "ForkStatic"),
        ("ops/x.cpp", "// X.\n", "tested by"),
        ("ops/x.py", "import os\n", "does not open with a comment"),
        ("ops/x.cpp", "// X. Tested by x.\n" * 801, "lines, more than"),
        ("ops/x.cpp", "// X. Tested by x.\n//" + "x" * 99, "columns, more than"),
    ],
)
def test_rules_can_fail(path: str, text: str, expected: str) -> None:
    assert any(expected in sentence for sentence in violations(path, text))


def test_rules_accept_what_is_right() -> None:
    text = '// X: no virtual here. Tested by x.\n#include "jit/base/result.h"\n'
    assert not list(violations("graph/x.h", text))
    text = '"""X.\n\nTested by x.\n"""\n'
    assert not list(violations("frontends/torch/tilewright/x.py", text))
