"""Single-precision arithmetic after the manual: exact values, one rounding.

Used by avx512_instructions.py. Tested by test_avx512_machine.py.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

SIGN_32 = 0x8000_0000


def signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def to_float(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def to_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def round_to_f32(value: Fraction) -> float:
    """The nearest float, ties to even; subnormals included."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    if exponent >= 128:  # beyond what a double holds, too, with vscalefps
        return -math.inf if value < 0 else math.inf
    unit = max(exponent - 23, -149)
    result = math.ldexp(round(magnitude / Fraction(2) ** unit), unit)
    if result >= 2.0**128:
        result = math.inf
    return math.copysign(result, value)


def fused(a: float, b: float, c: float) -> float:
    """a * b + c, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        with np.errstate(all="ignore"):
            return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact != 0:
        return round_to_f32(exact)
    product_sign = math.copysign(1, a) * math.copysign(1, b)
    if a * b == 0 and product_sign == math.copysign(1, c):
        return math.copysign(0.0, c)
    return 0.0


def flush(value: float) -> float:
    """vdpbf16ps takes and gives zero for subnormals."""
    return math.copysign(0.0, value) if 0 < abs(value) < 2.0**-126 else value


def scale(a: float, b: float) -> float:
    """vscalefps: a * 2^floor(b), with the manual's table for NaN, zero and infinity."""
    if math.isnan(b):
        return a if math.isnan(a) else b
    if math.isinf(b):
        if math.isnan(a):
            return math.inf if b > 0 else 0.0
        if (b > 0 and a == 0) or (b < 0 and math.isinf(a)):
            return math.nan
        return math.copysign(math.inf if b > 0 else 0.0, a)
    if not math.isfinite(a) or a == 0:
        return a
    power = max(-1000, min(1000, math.floor(b)))
    result = round_to_f32(Fraction(a) * Fraction(2) ** power)
    return math.copysign(result, a)


def half_to_bits(half: int) -> int:
    """vcvtph2ps of one element: a NaN becomes quiet and keeps its payload."""
    if half & 0x7C00 == 0x7C00 and half & 0x3FF:
        return (half & 0x8000) << 16 | 0x7FC0_0000 | (half & 0x3FF) << 13
    return to_bits(float(np.uint16(half).view(np.float16)))


def bits_to_half(bits: int) -> int:
    """vcvtps2ph of one element, rounded to nearest even."""
    if bits & 0x7F80_0000 == 0x7F80_0000 and bits & 0x7F_FFFF:
        return (bits & SIGN_32) >> 16 | 0x7E00 | (bits & 0x7F_FFFF) >> 13
    with np.errstate(over="ignore"):
        return int(np.uint32(bits).view(np.float32).astype(np.float16).view(np.uint16))


def to_int32(bits: int) -> int:
    value = to_float(bits)
    if not math.isfinite(value) or not -(2.0**31) <= round(value) < 2.0**31:
        return SIGN_32
    return round(value) & 0xFFFF_FFFF
