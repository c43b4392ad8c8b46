"""No kernel contains an instruction of an ISA step that it does not declare.

An independent decoder (iced-x86) says which CPUID features each instruction needs. The machine that
runs the tests may have them all, so running the code would prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import iced_x86
import pytest

from emitted_code import SOURCE, EmittedCode, emit_dump, kernel_dump

# A step of the ladder -> the CPUID features that it stands for (jit/base/target.h).
STEP_FEATURES = {
    "avx2": {"AVX", "AVX2", "FMA", "F16C", "BMI1", "BMI2"},
    "avx_vnni": {"AVX_VNNI"},
    "avx512": {"AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"},
    "avx512_vnni": {"AVX512_VNNI"},
    "avx512_bf16": {"AVX512_BF16"},
    "avx512_fp16": {"AVX512_FP16"},
    "amx_bf16": {"AMX_TILE", "AMX_BF16"},
    "amx_int8": {"AMX_TILE", "AMX_INT8"},
    "amx_fp16": {"AMX_TILE", "AMX_FP16"},
}
# Every x86-64 CPU has these; endbr64 is a NOP without CET.
BASE_FEATURES = {
    "INTEL8086",
    "INTEL186",
    "INTEL386",
    "INTEL486",
    "X64",
    "CMOV",
    "SSE",
    "SSE2",
    "CET_IBT",
}

FEATURE_NAMES = {
    value: name
    for name, value in vars(iced_x86.CpuidFeature).items()
    if name.isupper() and isinstance(value, int)
}


def decode(emitted: EmittedCode) -> Iterator[iced_x86.Instruction]:
    """The instructions of a kernel, without its constants."""
    yield from iced_x86.Decoder(64, emitted.code[: emitted.code_size])


def escapes(emitted: EmittedCode) -> list[str]:
    """Instructions that need more than the kernel declares."""
    allowed = set(BASE_FEATURES)
    for step in emitted.isa:
        allowed |= STEP_FEATURES[step]
    found = []
    for instruction in decode(emitted):
        if instruction.is_invalid:
            found.append(f"{emitted.name}: not an instruction at {instruction.ip:#x}")
            break
        needed = {FEATURE_NAMES[feature] for feature in instruction.cpuid_features()}
        if not needed <= allowed:
            missing = ", ".join(sorted(needed - allowed))
            found.append(f"{emitted.name}: `{instruction}` needs {missing}")
    return found


def unused_steps(emitted: EmittedCode) -> set[str]:
    """Steps that the kernel declares and no instruction needs."""
    needed = {
        FEATURE_NAMES[feature]
        for instruction in decode(emitted)
        for feature in instruction.cpuid_features()
    }
    return {step for step in emitted.isa if not needed & STEP_FEATURES[step]}


def check(kernels: list[EmittedCode]) -> None:
    assert kernels
    assert [escape for kernel in kernels for escape in escapes(kernel)] == []
    assert {kernel.name: unused_steps(kernel) for kernel in kernels if unused_steps(kernel)} == {}


@pytest.mark.parametrize("lanes", ["8", "16"])
def test_every_op(lanes: str) -> None:
    check(list(emit_dump("cases", lanes, "1")))


@pytest.mark.parametrize("lanes", ["8", "16"])
@pytest.mark.parametrize("registers", ["3", "40"])
def test_random_programs(lanes: str, registers: str) -> None:
    kernels = list(emit_dump("random", lanes, "50", registers))
    check(kernels)
    assert any(kernel.spills for kernel in kernels) == (registers == "40")


def test_filetests() -> None:
    folder = SOURCE / "tests" / "filetests" / "code"
    for path in sorted(folder.glob("*.vir")):
        rung = re.match(r"; test code (\w+)\n", path.read_text()).group(1)
        for higher in (rung, "amx_int8"):  # a higher rung must not change what is needed
            check(list(emit_dump("files", higher, str(path))))


def test_matrix_kernels() -> None:
    kernels = [
        EmittedCode(
            kernel["name"],
            kernel["rung"],
            frozenset(kernel["isa"].split("+")),
            bytes.fromhex(kernel["code"]),
            kernel["code_size"],
            kernel["spills"],
        )
        for kernel in kernel_dump()
    ]
    check(kernels)


def test_an_escape_is_found() -> None:
    """vaddps zmm0, zmm0, zmm0 in a kernel that declares avx2."""
    code = bytes.fromhex("62f17c4858c0c3")
    emitted = EmittedCode("bad", "avx2", frozenset({"avx2"}), code, len(code), 0)
    assert len(escapes(emitted)) == 1
    assert unused_steps(emitted) == {"avx2"}
