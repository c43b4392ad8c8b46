// Exact conversions between float and the 16-bit formats, as the hardware's instructions do them:
// the meaning that the interpreter gives to .f16 and .bf16 elements.
//
// Tested by vir_interpret_test (all 2^16 values, and rounding at every boundary).
#pragma once

#include <bit>
#include <cstdint>

namespace tilewright::jit::vir {

inline float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// vcvtph2ps: exact; a signalling NaN becomes quiet.
inline float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  if (exponent == 31) {
    const std::uint32_t quiet = mantissa != 0 ? 0x00400000u : 0;
    return std::bit_cast<float>(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// vcvtps2ph with rounding to nearest even: overflow gives infinity, subnormals are kept, a NaN
// keeps its sign and the top of its payload and becomes quiet.
inline std::uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  // 65520 = 65504 + half a step: it and everything above rounds to infinity.
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);

  const std::uint32_t exponent = magnitude >> 23;
  std::uint32_t significand = magnitude - (112u << 23);  // normal: the exponent's bits ride along
  std::uint32_t shift = 13;                              // how many low bits are rounded away
  if (exponent < 113) {
    // Subnormal: the unit is 2^-24. Below 2^-25 everything rounds to zero.
    if (exponent < 102) return static_cast<std::uint16_t>(sign);
    significand = (magnitude & 0x7fffffu) | 0x800000u;
    shift = 126 - exponent;
  }
  const std::uint32_t kept = significand >> shift;
  const std::uint32_t rest = significand & ((1u << shift) - 1);
  const std::uint32_t half = 1u << (shift - 1);
  const bool up = rest > half || (rest == half && (kept & 1) != 0);
  return static_cast<std::uint16_t>(sign | (kept + (up ? 1 : 0)));
}

}  // namespace tilewright::jit::vir
