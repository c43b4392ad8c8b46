"""What each instruction of a kernel with 16 lanes does, after Intel's manual: STEPS.

Exactly the instructions and operand forms that emission uses; another raises UnsupportedError.

Tested by test_avx512_machine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import iced_x86
import numpy as np
from iced_x86 import Instruction, OpKind

from avx512_floats import (
    bits_to_half,
    flush,
    fused,
    half_to_bits,
    round_to_f32,
    scale,
    signed,
    to_bits,
    to_float,
    to_int32,
)
from avx512_machine import (
    U64,
    Lanes,
    Machine,
    Step,
    UnsupportedError,
    memory_size,
    register_number,
    register_size,
    vector_lanes,
)

STEPS: dict[str, Step] = {}


def step(*names: str) -> Callable[[Step], Step]:
    def register(function: Step) -> Step:
        for name in names:
            STEPS[name] = function
        return function

    return register


@step("ENDBR64", "PREFETCHT0", "PREFETCHT1", "PREFETCHT2", "PREFETCHNTA")
def _nothing(machine: Machine, i: Instruction) -> None:
    pass


@step("MOV", "MOVZX")
def _mov(machine: Machine, i: Instruction) -> None:
    machine.put(i, machine.get(i, 1))


@step("MOVSXD")
def _movsxd(machine: Machine, i: Instruction) -> None:
    machine.put(i, signed(machine.get(i, 1), 32) & U64)


@step("LEA")
def _lea(machine: Machine, i: Instruction) -> None:
    machine.put(i, machine.address(i))


@step("PUSH")
def _push(machine: Machine, i: Instruction) -> None:
    machine.push(machine.get(i, 0))


@step("POP")
def _pop(machine: Machine, i: Instruction) -> None:
    machine.put(i, machine.pop())


@step("RET")
def _ret(machine: Machine, i: Instruction) -> None:
    machine.ip = machine.pop()


def arithmetic(name: str, compute: Callable[[int, int], int]) -> None:
    """A two-operand instruction on signed 64-bit integers that sets the flags."""

    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        exact = compute(signed(machine.get(i, 0)), signed(machine.get(i, 1)))
        machine.set_flags(exact & U64, overflow=signed(exact) != exact)
        if name not in ("CMP", "TEST"):
            machine.put(i, exact & U64)


arithmetic("ADD", lambda a, b: a + b)
arithmetic("SUB", lambda a, b: a - b)
arithmetic("CMP", lambda a, b: a - b)
arithmetic("AND", lambda a, b: a & b)
arithmetic("TEST", lambda a, b: a & b)
arithmetic("XOR", lambda a, b: a ^ b)


@step("NEG")
def _neg(machine: Machine, i: Instruction) -> None:
    machine.put(i, -machine.get(i, 0) & U64)


@step("DEC")
def _dec(machine: Machine, i: Instruction) -> None:
    exact = signed(machine.get(i, 0)) - 1
    machine.set_flags(exact & U64, overflow=signed(exact) != exact)
    machine.put(i, exact & U64)


@step("IMUL")
def _imul(machine: Machine, i: Instruction) -> None:
    first, second = (1, 2) if i.op_count == 3 else (0, 1)
    machine.put(i, machine.get(i, first) * signed(machine.get(i, second)) & U64)


@step("SHL")
def _shl(machine: Machine, i: Instruction) -> None:
    machine.put(i, machine.get(i, 0) << i.immediate(1) & U64)


@step("SAR")
def _sar(machine: Machine, i: Instruction) -> None:
    machine.put(i, signed(machine.get(i, 0)) >> i.immediate(1) & U64)


@step("BZHI")
def _bzhi(machine: Machine, i: Instruction) -> None:
    index = machine.get(i, 2) & 0xFF
    bits = machine.get(i, 1, register_size(i.op0_register))
    machine.put(i, bits & ((1 << index) - 1))


@step("CMOVG")
def _cmovg(machine: Machine, i: Instruction) -> None:
    value = machine.get(i, 1)
    if not machine.zero and machine.sign == machine.overflow:
        machine.put(i, value)


@step("CMOVS")
def _cmovs(machine: Machine, i: Instruction) -> None:
    value = machine.get(i, 1)
    if machine.sign:
        machine.put(i, value)


def jump(name: str, taken: Callable[[Machine], bool]) -> None:
    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        if taken(machine):
            machine.ip = i.near_branch_target


jump("JMP", lambda m: True)
jump("JE", lambda m: m.zero)
jump("JG", lambda m: not m.zero and m.sign == m.overflow)
jump("JLE", lambda m: m.zero or m.sign != m.overflow)


# --- vectors


def lanewise(name: str, compute: Callable[..., int]) -> None:
    """Each result lane from the same lane of every source."""

    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        sources = [machine.lanes(i, operand) for operand in range(1, i.op_count)]
        machine.put_lanes(i, [compute(*values) for values in zip(*sources, strict=True)])


def float_binary(name: str, compute: Callable[[np.float32, np.float32], np.float32]) -> None:
    def lane(a: int, b: int) -> int:
        with np.errstate(all="ignore"):
            result = compute(np.uint32(a).view(np.float32), np.uint32(b).view(np.float32))
        return int(result.view(np.uint32))

    lanewise(name, lane)


float_binary("VADDPS", lambda a, b: a + b)
float_binary("VSUBPS", lambda a, b: a - b)
float_binary("VMULPS", lambda a, b: a * b)
float_binary("VDIVPS", lambda a, b: a / b)
lanewise("VMAXPS", lambda a, b: a if to_float(a) > to_float(b) else b)
lanewise("VMINPS", lambda a, b: a if to_float(a) < to_float(b) else b)
lanewise("VSCALEFPS", lambda a, b: to_bits(scale(to_float(a), to_float(b))))
lanewise("VANDPS", lambda a, b: a & b)
lanewise("VORPS", lambda a, b: a | b)
lanewise("VXORPS", lambda a, b: a ^ b)
lanewise("VANDNPS", lambda a, b: ~a & b & 0xFFFF_FFFF)
lanewise("VPADDD", lambda a, b: (a + b) & 0xFFFF_FFFF)
lanewise("VPSUBD", lambda a, b: (a - b) & 0xFFFF_FFFF)
lanewise("VPMULLD", lambda a, b: a * b & 0xFFFF_FFFF)
lanewise("VCVTPS2DQ", to_int32)
lanewise("VCVTDQ2PS", lambda a: to_bits(round_to_f32(Fraction(signed(a, 32)))))


@step("VSQRTPS")
def _vsqrtps(machine: Machine, i: Instruction) -> None:
    with np.errstate(invalid="ignore"):
        values = np.sqrt(np.array(machine.lanes(i, 1), np.uint32).view(np.float32))
    machine.put_lanes(i, values.view(np.uint32).tolist())


@step("VRNDSCALEPS")
def _vrndscaleps(machine: Machine, i: Instruction) -> None:
    if i.immediate(2) != 8:  # to integers, nearest even
        raise UnsupportedError(str(i))
    with np.errstate(invalid="ignore"):
        values = np.rint(np.array(machine.lanes(i, 1), np.uint32).view(np.float32))
    machine.put_lanes(i, values.view(np.uint32).tolist())


def accumulate(name: str, compute: Callable[[float, float, float], float]) -> None:
    """Operand 0 is read and written."""

    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        w, a, b = (machine.lanes(i, operand) for operand in range(3))
        machine.put_lanes(
            i,
            [
                to_bits(compute(to_float(x), to_float(y), to_float(z)))
                for x, y, z in zip(w, a, b, strict=True)
            ],
        )


accumulate("VFMADD231PS", lambda w, a, b: fused(a, b, w))
accumulate("VFNMADD231PS", lambda w, a, b: fused(-a, b, w))
accumulate("VFMSUB231PS", lambda w, a, b: fused(a, b, -w))


@step("VDPBF16PS")
def _vdpbf16ps(machine: Machine, i: Instruction) -> None:
    w, a, b = (machine.lanes(i, operand) for operand in range(3))
    result = []
    for total, x, y in zip(w, a, b, strict=True):
        value = flush(to_float(total))
        for part in (lambda pair: pair & 0xFFFF_0000, lambda pair: pair << 16 & 0xFFFF_0000):
            factors = flush(to_float(part(x))), flush(to_float(part(y)))
            value = flush(fused(*factors, value))
        result.append(to_bits(value))
    machine.put_lanes(i, result)


@step("VPDPBUSD")
def _vpdpbusd(machine: Machine, i: Instruction) -> None:
    w, a, b = (machine.lanes(i, operand) for operand in range(3))
    result = []
    for total, x, y in zip(w, a, b, strict=True):
        products = (
            unsigned * signed(octet, 8)
            for unsigned, octet in zip(
                x.to_bytes(4, "little"), y.to_bytes(4, "little"), strict=True
            )
        )
        result.append((total + sum(products)) & 0xFFFF_FFFF)
    machine.put_lanes(i, result)


def shift(name: str, compute: Callable[[int, int], int]) -> None:
    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        values = machine.lanes(i, 1)
        machine.put_lanes(i, [compute(value, i.immediate(2)) & 0xFFFF_FFFF for value in values])


shift("VPSLLD", lambda value, bits: value << bits)
shift("VPSRLD", lambda value, bits: value >> bits)
shift("VPSRAD", lambda value, bits: signed(value, 32) >> bits)


@step("VPERMILPS")
def _vpermilps(machine: Machine, i: Instruction) -> None:
    control, values = i.immediate(2), machine.lanes(i, 1)
    machine.put_lanes(i, [values[n & ~3 | control >> 2 * (n & 3) & 3] for n in range(16)])


@step("VSHUFF32X4")
def _vshuff32x4(machine: Machine, i: Instruction) -> None:
    control, first, second = i.immediate(3), machine.lanes(i, 1), machine.lanes(i, 2)
    result: Lanes = []
    for part in range(4):  # 128 bits each: the lower two from the first source
        begin = 4 * (control >> 2 * part & 3)
        result += (first if part < 2 else second)[begin : begin + 4]
    machine.put_lanes(i, result)


@step("VSHUFPS")
def _vshufps(machine: Machine, i: Instruction) -> None:
    control, first, second = i.immediate(3), machine.lanes(i, 1), machine.lanes(i, 2)
    result: Lanes = []
    for begin in range(0, 16, 4):  # 128 bits each: the lower two from the first source
        for n in range(4):
            result.append((first if n < 2 else second)[begin + (control >> 2 * n & 3)])
    machine.put_lanes(i, result)


@step("VPERMPS")
def _vpermps(machine: Machine, i: Instruction) -> None:
    places, values = machine.lanes(i, 1), machine.lanes(i, 2)
    machine.put_lanes(i, [values[place & 15] for place in places])


@step("VMOVUPS")
def _vmovups(machine: Machine, i: Instruction) -> None:
    if i.op0_kind == OpKind.MEMORY:
        machine.store(i, machine.lanes(i, 1), 4, vector_lanes(i))
    else:
        machine.put_lanes(i, machine.lanes(i, 1))


@step("VMOVSS")
def _vmovss(machine: Machine, i: Instruction) -> None:
    if i.op0_kind == OpKind.MEMORY:
        machine.store(i, machine.lanes(i, 1), 4, 1)
    elif i.op1_kind == OpKind.MEMORY:
        machine.put_lanes(i, machine.load(i, 4, 1))
    else:
        raise UnsupportedError(str(i))


@step("VMOVD")
def _vmovd(machine: Machine, i: Instruction) -> None:
    machine.put_lanes(i, [machine.get(i, 1), *[0] * 15])


@step("VPBROADCASTD", "VBROADCASTSS")
def _broadcast32(machine: Machine, i: Instruction) -> None:
    if i.op1_kind == OpKind.MEMORY:
        value = machine.load(i, 4, 1)[0]
    elif iced_x86.RegisterExt.is_vector_register(i.op1_register):
        value = machine.lanes(i, 1)[0]
    else:
        value = machine.get(i, 1)
    machine.put_lanes(i, [value] * 16)


@step("VPBROADCASTW")
def _broadcast16(machine: Machine, i: Instruction) -> None:
    value = machine.load(i, 2, 1)[0]
    machine.put_lanes(i, [value << 16 | value] * 16)


@step("VBROADCASTI32X4")
def _vbroadcasti32x4(machine: Machine, i: Instruction) -> None:
    machine.put_lanes(i, machine.load(i, 4, 4)[:4] * 4)


def bytewise(name: str, compute: Callable[[bytes, bytes], list[int]]) -> None:
    """An instruction that handles each 128 bits of its sources alone, as bytes."""

    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        a, b = (b"".join(n.to_bytes(4, "little") for n in machine.lanes(i, k)) for k in (1, 2))
        result = b"".join(bytes(compute(a[n : n + 16], b[n : n + 16])) for n in range(0, 64, 16))
        machine.put_lanes(i, [int.from_bytes(result[n : n + 4], "little") for n in range(0, 64, 4)])


bytewise("VPSHUFB", lambda a, b: [0 if n & 0x80 else a[n & 15] for n in b])


def _interleaved(a: bytes, b: bytes, unit: int) -> list[int]:
    """Units of so many bytes of both, in turns."""
    pairs = ((a[i : i + unit], b[i : i + unit]) for i in range(0, len(a), unit))
    return [n for x, y in pairs for n in [*x, *y]]


bytewise("VPUNPCKLBW", lambda a, b: _interleaved(a[:8], b[:8], 1))
bytewise("VPUNPCKHBW", lambda a, b: _interleaved(a[8:], b[8:], 1))
bytewise("VPUNPCKLWD", lambda a, b: _interleaved(a[:8], b[:8], 2))
bytewise("VPUNPCKHWD", lambda a, b: _interleaved(a[8:], b[8:], 2))


@step("VPMOVZXWD")
def _vpmovzxwd(machine: Machine, i: Instruction) -> None:
    machine.put_lanes(i, machine.load(i, 2, vector_lanes(i)))


@step("VPMOVZXBD")
def _vpmovzxbd(machine: Machine, i: Instruction) -> None:
    machine.put_lanes(i, machine.load(i, 1, vector_lanes(i)))


@step("VPMOVSXBD")
def _vpmovsxbd(machine: Machine, i: Instruction) -> None:
    octets = machine.load(i, 1, vector_lanes(i))
    machine.put_lanes(i, [signed(octet, 8) & 0xFFFFFFFF for octet in octets])


@step("VCVTPH2PS")
def _vcvtph2ps(machine: Machine, i: Instruction) -> None:
    if i.op1_kind == OpKind.MEMORY:
        halves = machine.load(i, 2, vector_lanes(i))
    else:
        pairs = machine.lanes(i, 1)
        halves = [pairs[n // 2] >> 16 * (n % 2) & 0xFFFF for n in range(16)]
    machine.put_lanes(i, [half_to_bits(half) for half in halves])


@step("VCVTPS2PH")
def _vcvtps2ph(machine: Machine, i: Instruction) -> None:
    if i.immediate(2) != 0:  # nearest even
        raise UnsupportedError(str(i))
    count = register_size(i.op1_register) // 4
    halves = [bits_to_half(bits) for bits in machine.lanes(i, 1)]
    if i.op0_kind == OpKind.MEMORY:
        machine.store(i, halves, 2, count)
    else:
        halves[count:] = [0] * (16 - count)
        pairs = [halves[n] | halves[n + 1] << 16 for n in range(0, 16, 2)]
        machine.put_lanes(i, pairs + [0] * 8)


@step("VCVTSI2SS")
def _vcvtsi2ss(machine: Machine, i: Instruction) -> None:
    value = signed(machine.get(i, 2), 8 * register_size(i.op2_register))
    upper = machine.lanes(i, 1)[1:4]
    machine.put_lanes(i, [to_bits(round_to_f32(Fraction(value))), *upper, *[0] * 12])


@step("VPEXTRB", "VPEXTRW")
def _vpextr(machine: Machine, i: Instruction) -> None:
    if i.immediate(2) != 0:
        raise UnsupportedError(str(i))
    machine.store(i, machine.lanes(i, 1), memory_size(i), 1)


@step("VPMOVDW")
def _vpmovdw(machine: Machine, i: Instruction) -> None:
    values = machine.lanes(i, 1)
    if i.op0_kind == OpKind.MEMORY:
        machine.store(i, values, 2, vector_lanes(i))
        return
    halves = [value & 0xFFFF for value in values]
    machine.put_lanes(i, [halves[n] | halves[n + 1] << 16 for n in range(0, 16, 2)] + [0] * 8)


@step("VPMOVDB")
def _vpmovdb(machine: Machine, i: Instruction) -> None:
    machine.store(i, machine.lanes(i, 1), 1, vector_lanes(i))


@step("VZEROUPPER")
def _vzeroupper(machine: Machine, i: Instruction) -> None:
    for register in range(16):
        machine.zmm[register][4:] = [0] * 12


# --- masks


def compare(name: str, holds: Callable[[Instruction, int, int], bool]) -> None:
    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        pairs = zip(machine.lanes(i, 1), machine.lanes(i, 2), strict=True)
        bits = sum(holds(i, a, b) << n for n, (a, b) in enumerate(pairs))
        machine.k[register_number(i.op0_register)] = bits


PREDICATES: dict[int, Callable[[float, float], bool]] = {
    0x00: lambda a, b: a == b,  # EQ_OQ
    0x04: lambda a, b: not a == b,  # NEQ_UQ: true on NaN  # noqa: SIM201
    0x11: lambda a, b: a < b,  # LT_OQ
    0x12: lambda a, b: a <= b,  # LE_OQ
}
compare("VCMPPS", lambda i, a, b: PREDICATES[i.immediate(3)](to_float(a), to_float(b)))
compare("VPCMPEQD", lambda i, a, b: a == b)
compare("VPCMPGTD", lambda i, a, b: signed(a, 32) > signed(b, 32))


@step("VBLENDMPS")
def _vblendmps(machine: Machine, i: Instruction) -> None:
    mask = machine.mask(i)
    pairs = zip(machine.lanes(i, 1), machine.lanes(i, 2), strict=True)
    blended = [b if mask >> n & 1 else a for n, (a, b) in enumerate(pairs)]
    machine.zmm[register_number(i.op0_register)] = blended


@step("KMOVW")
def _kmovw(machine: Machine, i: Instruction) -> None:
    if i.op0_kind == OpKind.MEMORY:
        value = machine.k[register_number(i.op1_register)]
        machine.memory.write(machine.address(i), value.to_bytes(2, "little"))
        return
    if i.op1_kind == OpKind.REGISTER and iced_x86.RegisterExt.is_k(i.op1_register):
        value = machine.k[register_number(i.op1_register)]
    else:
        value = machine.get(i, 1, 2)
    machine.k[register_number(i.op0_register)] = value & 0xFFFF


def mask_binary(name: str, compute: Callable[[int, int], int]) -> None:
    @step(name)
    def _execute(machine: Machine, i: Instruction) -> None:
        a, b = (machine.k[register_number(i.op_register(n))] for n in (1, 2))
        machine.k[register_number(i.op0_register)] = compute(a, b) & 0xFFFF


mask_binary("KANDW", lambda a, b: a & b)
mask_binary("KORW", lambda a, b: a | b)
mask_binary("KANDNW", lambda a, b: ~a & b)
