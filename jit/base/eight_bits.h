// Eight bits: how a cache of i8 keeps a row of numbers, a token's keys or values of one head, as
// integers of 8 bits and one f32 scale, so that x is about scale * integer.
//
// A scale per row needs no calibration and nothing that comes later changes it, so a row depends on
// its own numbers only: not on the prompt, on how it was cut into pieces, or on threads. No element
// is further off than half a scale, which is 1/254 of the row's largest.
//
// A scale has 17 significant bits, rounded up: then scale * integer is an f32, exactly, and a row
// that was read as f32 and is written again is the same row, bit by bit. So is one that was of bf16
// or f16 and is read as that: its largest element comes back as it was, and so does the scale; the
// others are off by a quarter of a scale at most.
//
// Where numbers are not finite, or larger than a bf16 can be, the scale is NaN: the row has no
// value, as little as what would be computed from it otherwise. A row smaller than 127 * 2^-126 is
// zero.
//
// The one definition: the reference interpreter, KvCache and the tests of the kernel
// (ops/quantize_kernel.h) use it. Tested by interpret_test, quantize_kernel_test.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace tilewright::eight_bits {

inline constexpr float kMost = 127;                  // integers are within [-127, 127]
inline constexpr float kLargestRow = 0x1.fep127f;    // of bf16
inline constexpr float kSmallestScale = 0x1p-126f;   // the reciprocal is finite
inline constexpr std::uint32_t kDroppedBits = 0x7f;  // of a scale's 23

// Of a row whose largest magnitude is `most`, or NaN if it has one.
inline float scale_of(float most) {
  if (!(most <= kLargestRow)) return std::numeric_limits<float>::quiet_NaN();
  const float exact = most / kMost;
  if (exact < kSmallestScale) return 0;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(exact) + kDroppedBits) & ~kDroppedBits);
}

// Ties to even. Zero for the scales zero and NaN.
inline std::int8_t integer_of(float x, float scale) {
  if (!(scale > 0)) return 0;
  return static_cast<std::int8_t>(std::nearbyint(x / scale));
}

// Writes `count` integers; returns the scale. at(i): element i as f32.
template <class At>
float quantize(std::int64_t count, const At& at, std::int8_t* to) {
  float most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float magnitude = std::abs(at(i));
    if (!(magnitude <= most)) most = magnitude;
    if (std::isnan(most)) break;
  }
  const float scale = scale_of(most);
  for (std::int64_t i = 0; i < count; ++i) to[i] = integer_of(at(i), scale);
  return scale;
}

}  // namespace tilewright::eight_bits
