"""tilewright cache: over directories and packs, as text and as JSON, with exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny_models import llama_config

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a tiny model for two rungs, in `cache`, and its pack, `kernels.pack`."""
    import sys

    base = tmp_path_factory.mktemp("filled")
    llama_config(2).save_pretrained(base)
    subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "prewarm", str(base / "config.json"),
         "--isa", "avx2,avx_vnni", "--pack", str(base / "kernels.pack")],
        env={**os.environ, "TILEWRIGHT_CACHE_DIR": str(base / "cache")},
        check=True,
        capture_output=True,
    )  # fmt: skip
    return base


@pytest.fixture
def places(filled: Path, tmp_path: Path) -> list[str]:
    """A directory and a pack of the same kernels, for one test to change."""
    shutil.copytree(filled / "cache", tmp_path / "cache")
    shutil.copy2(filled / "kernels.pack", tmp_path / "kernels.pack")
    return [str(tmp_path / "cache"), str(tmp_path / "kernels.pack")]


def entries(command, place: str) -> list[dict]:
    return json.loads(command("cache", "ls", "--at", place, "--json").stdout)["entries"]


def test_directory_and_pack_are_alike(command, places: list[str]) -> None:
    of_directory, of_pack = (
        sorted(entries(command, place), key=lambda e: e["id"]) for place in places
    )
    same = ("id", "name", "key", "isa", "code_bytes", "generator", "current", "problem")
    assert [[e[k] for k in same] for e in of_directory] == [[e[k] for k in same] for e in of_pack]
    assert len(of_pack) > 10
    table = command("cache", "ls", "--at", places[1]).stdout
    assert of_pack[0]["id"][:12] in table and "this build" in table
    for place in places:
        assert json.loads(command("cache", "verify", place, "--json").stdout)["bad"] == []


def test_show_and_diff(command, places: list[str]) -> None:
    rows = entries(command, places[1])
    one = rows[0]
    # The same kernel for two rungs: another key, the same code.
    text = one["key"].rsplit("isa ", 1)[0]
    twins = [e["id"] for e in rows if e["key"].startswith(text + "isa ")]
    assert len(twins) == 2
    for place in places:
        shown = json.loads(command("cache", "show", one["id"][:16], "--at", place, "--json").stdout)
        assert shown["key"] == one["key"] and len(shown["code"]) == 2 * one["code_bytes"]
        assert shown["recipe"].startswith("vir ")
        plain = command("cache", "show", one["id"], "--at", place).stdout
        assert shown["recipe"].strip() in plain
        done = command("cache", "diff", *twins, "--at", place, code=1).stdout
        assert "+isa avx2" in done and "code: the same" in done
        command("cache", "diff", twins[0], twins[0], "--at", place)
    command("cache", "show", "zz", "--at", places[0], code=1)
    command("cache", "show", "", "--at", places[0], code=1)  # of many


def test_verify_finds_damage(command, places: list[str]) -> None:
    directory, pack = places
    victim = Path(directory) / entries(command, directory)[0]["file"]
    damaged = bytearray(victim.read_bytes())
    damaged[-40] ^= 1
    victim.write_bytes(damaged)
    done = command("cache", "verify", directory, "--json", code=1)
    bad = json.loads(done.stdout)["bad"]
    assert [e["problem"] for e in bad] == ["wrong digest"] and victim.name in done.stderr
    listed = command("cache", "ls", "--at", directory, "--json").stdout
    assert json.loads(listed)["rejects"] == {"wrong digest": 1}
    assert "not used: wrong digest (1)" in command("cache", "ls", "--at", directory).stdout

    victim.parent.chmod(0o777)  # nothing in it is looked at, and that is said
    said = command("cache", "verify", directory, code=1).stderr
    assert f"objects/{victim.parent.name}: directory writable by others" in said
    victim.parent.chmod(0o700)

    Path(pack).chmod(0o644)
    damaged = bytearray(Path(pack).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path(pack).write_bytes(damaged)
    assert "wrong digest" in command("cache", "verify", pack, code=1).stderr
    command("cache", "ls", "--at", pack, code=1)
    command("cache", "import", pack, code=1)


def test_export_and_import(command, places: list[str], fresh_cache: Path, tmp_path: Path) -> None:
    directory, pack = places
    exported = tmp_path / "exported.pack"
    made = json.loads(command("cache", "export", str(exported), "--at", directory, "--json").stdout)
    assert exported.read_bytes() == Path(pack).read_bytes()  # whichever way they went
    inside = entries(command, pack)
    assert made["kernels"] == sum(entry["kind"] == "kernel" for entry in inside) < len(inside)

    first = json.loads(command("cache", "import", pack, "--json").stdout)
    assert first["written"] == first["entries"] == len(inside)
    assert Path(first["directory"]) == fresh_cache
    again = json.loads(command("cache", "import", pack, "--json").stdout)
    assert again["written"] == 0
    command("cache", "export", str(exported))
    assert exported.read_bytes() == Path(pack).read_bytes()


def test_gc(command, places: list[str]) -> None:
    before = len(entries(command, places[0]))
    same = json.loads(command("cache", "gc", "--at", places[0], "--json").stdout)
    assert same["removed"] == 0
    half = sum(e["bytes"] for e in entries(command, places[0])) // 2
    done = json.loads(
        command("cache", "gc", "--at", places[0], "--max-size", str(half), "--json").stdout
    )
    assert 0 < done["removed"] == before - len(entries(command, places[0])) < before
    command("cache", "gc", "--max-size", "much", code=2)


def test_an_empty_cache(command) -> None:
    assert json.loads(command("cache", "ls", "--json").stdout)["entries"] == []
    command("cache", "verify")


def test_objdump_names_the_kernels_of_a_prewarm(command, places: list[str]) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is missing")
    done = subprocess.run(
        ["objdump", "-t", "-d", "--no-show-raw-insn", places[1]], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    # Equal code lies there once, under all of its names; a listing shows one of them.
    for entry in entries(command, places[1]):  # plans, too, in the table of symbols
        assert f"{entry['name']}.{entry['id'][:8]}\n" in done.stdout
    assert "ret" in done.stdout
