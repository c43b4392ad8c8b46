// Scalar types: conversions between memory and double by arithmetic, not by bit tricks, so that
// they check the kernels' bit tricks.
//
// Tested by rope_kernel_test.
#include "ops/scalar_type.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace tilewright::ops {
namespace {

using graph::DataType;

// A binary format smaller than f32: value = significand * 2^(exponent - significand_bits).
struct SmallFloat {
  int significand_bits;  // stored ones
  int exponent_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int smallest_exponent() const { return 1 - bias(); }
  std::uint16_t infinity() const {
    return static_cast<std::uint16_t>(((1 << exponent_bits) - 1) << significand_bits);
  }
};

constexpr SmallFloat kBf16{7, 8};
constexpr SmallFloat kF16{10, 5};

double decode(const SmallFloat& format, std::uint16_t bits) {
  const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
  const int magnitude = bits & 0x7fff;
  if (magnitude > format.infinity()) return std::numeric_limits<double>::quiet_NaN();
  if (magnitude == format.infinity()) return sign * std::numeric_limits<double>::infinity();
  const int fraction = magnitude & ((1 << format.significand_bits) - 1);
  const int exponent = magnitude >> format.significand_bits;
  if (exponent == 0) {
    return sign * std::ldexp(fraction, format.smallest_exponent() - format.significand_bits);
  }
  return sign * std::ldexp(fraction + (1 << format.significand_bits),
                           exponent - format.bias() - format.significand_bits);
}

// In units of the last place at that exponent; a carry into the next exponent encodes itself.
std::uint16_t encode(const SmallFloat& format, double value) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) {
    const int quiet = format.infinity() | (1 << (format.significand_bits - 1));
    return static_cast<std::uint16_t>(sign | quiet);
  }
  if (value == 0) return sign;
  if (std::isinf(value)) return static_cast<std::uint16_t>(sign | format.infinity());
  const int exponent = std::max(std::ilogb(value), format.smallest_exponent());
  const double units =
      std::nearbyint(std::ldexp(std::abs(value), format.significand_bits - exponent));
  const double magnitude =
      units + std::ldexp(exponent - format.smallest_exponent(), format.significand_bits);
  const double limited = std::min<double>(magnitude, format.infinity());
  return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(limited));
}

template <class T>
double read(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return static_cast<double>(value);
}

template <class T>
void write(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

}  // namespace

double rounded_to(DataType type, double value) {
  if (type == DataType::bf16) return decode(kBf16, encode(kBf16, value));
  if (type == DataType::f16) return decode(kF16, encode(kF16, value));
  return type == DataType::f32 ? static_cast<float>(value) : value;
}

double read_scalar(DataType type, const void* from) {
  switch (type) {
    case DataType::f32:
      return read<float>(from);
    case DataType::bf16:
      return decode(kBf16, static_cast<std::uint16_t>(read<std::uint16_t>(from)));
    case DataType::f16:
      return decode(kF16, static_cast<std::uint16_t>(read<std::uint16_t>(from)));
    case DataType::f64:
      return read<double>(from);
    case DataType::i64:
      return read<std::int64_t>(from);
    case DataType::i32:
      return read<std::int32_t>(from);
    case DataType::i16:
      return read<std::int16_t>(from);
    case DataType::i8:
      return read<std::int8_t>(from);
    case DataType::u8:
      return read<std::uint8_t>(from);
    case DataType::boolean:
      return read<std::uint8_t>(from) != 0;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

void write_scalar(DataType type, void* to, double value) {
  switch (type) {
    case DataType::f32:
      return write(to, static_cast<float>(value));
    case DataType::bf16:
      return write(to, encode(kBf16, value));
    case DataType::f16:
      return write(to, encode(kF16, value));
    case DataType::f64:
      return write(to, value);
    case DataType::i64:
      return write(to, static_cast<std::int64_t>(value));
    case DataType::i32:
      return write(to, static_cast<std::int32_t>(value));
    case DataType::i16:
      return write(to, static_cast<std::int16_t>(value));
    case DataType::i8:
      return write(to, static_cast<std::int8_t>(value));
    case DataType::u8:
      return write(to, static_cast<std::uint8_t>(value));
    case DataType::boolean:
      return write(to, static_cast<std::uint8_t>(value != 0));
  }
}

}  // namespace tilewright::ops
