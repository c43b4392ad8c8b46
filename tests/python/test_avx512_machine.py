"""AVX-512 kernels do what VIR means, proved from their bytes on a machine without AVX-512.

emit_dump gives the bytes of each case and the memory that the VIR interpreter left; avx512_machine
executes the bytes. The two share no code.
"""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from amx_instructions import STEPS
from avx512_floats import fused, round_to_f32
from avx512_machine import FaultError, Machine
from emitted_code import EmittedCode, emit_dump

ARGS, INPUT, AREA, OUTPUT = 0x1000_0000, 0x2000_0000, 0x3000_0010, 0x4000_0000


def run(emitted: EmittedCode) -> tuple[bytes, bytes]:
    """The area and the output after the kernel ran."""
    machine = Machine(emitted.code, emitted.code_size, STEPS)
    machine.memory.map(ARGS, struct.pack("<3q", INPUT, AREA, OUTPUT), writable=False)
    machine.memory.map(INPUT, emitted.input, writable=False)
    area = machine.memory.map(AREA, emitted.area, writable=True)
    output = machine.memory.map(OUTPUT, bytes(emitted.output_size), writable=True)
    machine.run(ARGS)
    upper = [lanes[4:] for lanes in machine.zmm[:16]]
    if "avx512" in emitted.isa:
        assert not any(map(any, upper)), "no vzeroupper"
    return bytes(area), bytes(output)


def equal(emitted: EmittedCode, actual: bytes) -> bool:
    if actual == emitted.expected_output:
        return True
    if not emitted.float_result:
        return False
    got = np.frombuffer(actual, np.float32)
    want = np.frombuffer(emitted.expected_output, np.float32)
    same = got.view(np.uint32) == want.view(np.uint32)
    return bool((same | (np.isnan(got) & np.isnan(want))).all())


def check(emitted: EmittedCode) -> None:
    area, output = run(emitted)
    assert area == emitted.expected_area, emitted.name
    assert equal(emitted, output), emitted.name


def test_every_op() -> None:
    cases = list(emit_dump("cases", "16", "3"))
    assert len(cases) > 300
    for emitted in cases:
        check(emitted)


@pytest.mark.parametrize("registers", ["3", "12", "40"])
def test_random_programs(registers: str) -> None:
    """With 40 registers of each kind: spilled general registers, vectors and masks."""
    programs = list(emit_dump("random", "16", "60", registers))
    assert any(emitted.spills for emitted in programs) == (registers != "3")
    for emitted in programs:
        check(emitted)


def test_the_machine_finds_wrong_code() -> None:
    """One changed opcode byte of a kernel: an addition becomes a multiplication."""
    (emitted,) = (case for case in emit_dump("cases", "16", "1") if case.name == "vadd_0")
    vaddps_zmm = bytes.fromhex("58")
    position = emitted.code.index(vaddps_zmm)
    code = emitted.code[:position] + bytes.fromhex("59") + emitted.code[position + 1 :]
    wrong = EmittedCode(**{**vars(emitted), "code": code})
    with pytest.raises(AssertionError):
        check(wrong)


def test_the_machine_guards_memory() -> None:
    """A case whose area is one byte short faults; so does a write to the input."""
    (emitted,) = (case for case in emit_dump("cases", "16", "1") if case.name == "vload.u8_0")
    with pytest.raises(FaultError):
        check(EmittedCode(**{**vars(emitted), "area": emitted.area[:-1]}))
    store = bytes.fromhex("488b0f 48c70100000000 c3".replace(" ", ""))  # stores to args[0]
    with pytest.raises(FaultError, match="read-only"):
        run(EmittedCode("store", "avx512", frozenset(), store, len(store), 0, input=bytes(8)))


def test_fused_rounds_once() -> None:
    a = float(np.float32(1 + 2**-12))
    assert fused(a, a, -1.0) == float(Fraction(a) ** 2 - 1)  # exact in a float
    tie = round_to_f32(Fraction(2**24 + 1))
    assert tie == 2.0**24
    assert round_to_f32(Fraction(3, 2**150)) == 2 * 2.0**-149
    assert round_to_f32(Fraction(2**128)) == float("inf")
    assert round_to_f32(Fraction(-(2**2000))) == float("-inf")
