// Element access with exact rounding, and the text of tensors.
//
// Tested by interpret_test.
#include "graph/tensor.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "graph/parse_type.h"

namespace tilewright::graph {
namespace {

// Enough for a test, small enough that hostile text cannot exhaust memory.
constexpr std::int64_t max_elements = std::int64_t{1} << 28;

struct FloatFormat {
  int significant_bits;  // with the hidden one
  int minimum_exponent;  // of the smallest normal number 2^e
  double maximum;
};

FloatFormat format(DataType dtype) {
  if (dtype == DataType::bf16) return {8, -126, 0x1.fep127};
  if (dtype == DataType::f16) return {11, -14, 65504.0};
  return {24, -126, std::numeric_limits<float>::max()};
}

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void store(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

double decode_f16(std::uint16_t bits) {
  int exponent = (bits >> 10) & 0x1f;
  double mantissa = bits & 0x3ff;
  double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 0x1f) {
    magnitude = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// REQUIRES: value is representable
std::uint16_t encode_f16(double value) {
  std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  double magnitude = std::abs(value);
  if (std::isnan(value)) return 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  if (magnitude < 0x1p-14) {
    return sign | static_cast<std::uint16_t>(std::ldexp(magnitude, 24));
  }
  int exponent = std::ilogb(magnitude);
  auto mantissa = static_cast<std::uint16_t>(std::ldexp(magnitude, 10 - exponent) - 1024);
  return static_cast<std::uint16_t>(sign | ((exponent + 15) << 10) | mantissa);
}

std::uint16_t encode_bf16(double value) {
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(value)) >> 16);
}

template <class T>
T saturate(double value) {
  if (std::isnan(value)) return 0;
  // 2^digits is the first value out of range and, unlike the maximum, exact in double.
  double limit = std::ldexp(1.0, std::numeric_limits<T>::digits);
  if (value >= limit) return std::numeric_limits<T>::max();
  double minimum = static_cast<double>(std::numeric_limits<T>::min());
  if (value <= minimum) return std::numeric_limits<T>::min();
  return static_cast<T>(value);
}

// A float as the text of a tensor: integers without a fraction.
std::string element_text(const Tensor& tensor, std::int64_t i) {
  if (!is_float(tensor.dtype)) return fmt::format("{}", tensor.get_integer(i));
  double value = tensor.get(i);
  if (tensor.dtype == DataType::f64 || !std::isfinite(value)) return fmt::format("{}", value);
  return fmt::format("{}", static_cast<float>(value));
}

Result<double> read_number(Lexer& lexer) {
  double sign = lexer.accept("-") ? -1 : 1;
  if (auto number = lexer.number()) {
    if (!number->in_range) return Error{"number out of range"};
    return sign * number->floating;
  }
  if (lexer.accept_word("inf")) return sign * std::numeric_limits<double>::infinity();
  if (lexer.accept_word("nan")) return std::numeric_limits<double>::quiet_NaN();
  if (lexer.accept_word("true")) return 1.0;
  if (lexer.accept_word("false")) return 0.0;
  return Error{fmt::format("number expected, found {}", lexer.next())};
}

// Integers beyond 2^53 are exact; those beyond the type wrap.
Status read_element(Lexer& lexer, Tensor& tensor, std::int64_t i) {
  Lexer lookahead = lexer;
  bool negative = lookahead.accept("-");
  auto number = lookahead.number();
  if (number && number->is_integer && number->in_range && !is_float(tensor.dtype)) {
    std::uint64_t bits = negative ? 0 - number->integer : number->integer;
    tensor.set_integer(i, static_cast<std::int64_t>(bits));
    lexer = lookahead;
    return {};
  }
  Result<double> value = read_number(lexer);
  if (!value) return value.error();
  tensor.set(i, *value);
  return {};
}

// A linear congruential generator (Knuth's MMIX constants) and Box-Muller: the same numbers on
// every platform, which the standard library's distributions do not promise.
void fill_random(Tensor& tensor, std::uint64_t seed) {
  std::uint64_t state = seed;
  auto uniform = [&state] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (static_cast<double>(state >> 11) + 0.5) * 0x1p-53;
  };
  for (int i = 0; i < 4; ++i) uniform();
  for (std::int64_t i = 0; i < tensor.count(); ++i) {
    double radius = std::sqrt(-2 * std::log(uniform()));
    tensor.set(i, radius * std::cos(6.283185307179586 * uniform()));
  }
}

Status read_elements(Lexer& lexer, Tensor& tensor) {
  for (std::int64_t i = 0; i < tensor.count(); ++i) {
    if (i > 0 && !lexer.accept(",")) {
      return Error{fmt::format("{} elements expected, found {}", tensor.count(), i)};
    }
    if (Status status = read_element(lexer, tensor, i); !status) return status;
  }
  if (!lexer.accept("}")) return Error{fmt::format("'}}' expected, found {}", lexer.next())};
  return {};
}

}  // namespace

std::int64_t element_count(std::span<const std::int64_t> shape) {
  std::int64_t count = 1;
  for (std::int64_t size : shape) {
    if (size < 0 || size > max_elements) return -1;
    count *= size;
    if (count > max_elements) return -1;
  }
  return count;
}

double round_to(DataType dtype, double value) {
  if (dtype == DataType::f64 || !std::isfinite(value) || value == 0) return value;
  FloatFormat form = format(dtype);
  int exponent = std::max(std::ilogb(value), form.minimum_exponent);
  int unit = exponent - form.significant_bits + 1;
  double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
  if (std::abs(rounded) > form.maximum) {
    return std::copysign(std::numeric_limits<double>::infinity(), value);
  }
  return rounded;
}

Result<Tensor> Tensor::make(DataType dtype, std::vector<std::int64_t> shape) {
  std::int64_t count = graph::element_count(shape);
  if (count < 0) return Error{fmt::format("no tensor of shape [{}]", fmt::join(shape, ", "))};
  Tensor tensor{dtype, std::move(shape), {}};
  tensor.bytes.resize(static_cast<std::size_t>(count * size_in_bytes(dtype)));
  return tensor;
}

Tensor Tensor::of(DataType dtype, std::vector<std::int64_t> shape, std::span<const double> values) {
  Tensor tensor = *make(dtype, std::move(shape));
  for (std::size_t i = 0; i < values.size(); ++i) {
    tensor.set(static_cast<std::int64_t>(i), values[i]);
  }
  return tensor;
}

double Tensor::get(std::int64_t i) const {
  const std::byte* from = bytes.data() + i * size_in_bytes(dtype);
  switch (dtype) {
    case DataType::f32:
      return load<float>(from);
    case DataType::f64:
      return load<double>(from);
    case DataType::f16:
      return decode_f16(load<std::uint16_t>(from));
    case DataType::bf16:
      return std::bit_cast<float>(std::uint32_t{load<std::uint16_t>(from)} << 16);
    default:
      return static_cast<double>(get_integer(i));
  }
}

void Tensor::set(std::int64_t i, double value) {
  std::byte* to = bytes.data() + i * size_in_bytes(dtype);
  double rounded = is_float(dtype) ? round_to(dtype, value) : value;
  switch (dtype) {
    case DataType::f32:
      return store(to, static_cast<float>(rounded));
    case DataType::f64:
      return store(to, rounded);
    case DataType::f16:
      return store(to, encode_f16(rounded));
    case DataType::bf16:
      return store(to, encode_bf16(rounded));
    case DataType::i64:
      return store(to, saturate<std::int64_t>(value));
    case DataType::i32:
      return store(to, saturate<std::int32_t>(value));
    case DataType::i16:
      return store(to, saturate<std::int16_t>(value));
    case DataType::i8:
      return store(to, saturate<std::int8_t>(value));
    case DataType::u8:
      return store(to, saturate<std::uint8_t>(value));
    case DataType::boolean:
      return store(to, std::uint8_t{value != 0});
  }
}

std::int64_t Tensor::get_integer(std::int64_t i) const {
  const std::byte* from = bytes.data() + i * size_in_bytes(dtype);
  switch (dtype) {
    case DataType::i64:
      return load<std::int64_t>(from);
    case DataType::i32:
      return load<std::int32_t>(from);
    case DataType::i16:
      return load<std::int16_t>(from);
    case DataType::i8:
      return load<std::int8_t>(from);
    case DataType::u8:
    case DataType::boolean:
      return load<std::uint8_t>(from);
    default:
      return saturate<std::int64_t>(get(i));
  }
}

void Tensor::set_integer(std::int64_t i, std::int64_t value) {
  std::byte* to = bytes.data() + i * size_in_bytes(dtype);
  switch (dtype) {
    case DataType::i64:
      return store(to, value);
    case DataType::i32:
      return store(to, static_cast<std::int32_t>(value));
    case DataType::i16:
      return store(to, static_cast<std::int16_t>(value));
    case DataType::i8:
      return store(to, static_cast<std::int8_t>(value));
    case DataType::u8:
      return store(to, static_cast<std::uint8_t>(value));
    case DataType::boolean:
      return store(to, std::uint8_t{value != 0});
    default:
      return set(i, static_cast<double>(value));
  }
}

void Tensor::copy(std::int64_t i, const Tensor& source, std::int64_t j) {
  auto size = static_cast<std::size_t>(size_in_bytes(dtype));
  std::memcpy(bytes.data() + static_cast<std::size_t>(i) * size,
              source.bytes.data() + static_cast<std::size_t>(j) * size, size);
}

std::vector<double> Tensor::values() const {
  std::vector<double> result;
  for (std::int64_t i = 0; i < count(); ++i) result.push_back(get(i));
  return result;
}

std::string print(const Tensor& tensor) {
  std::string text = fmt::format("{}[{}] {{", name(tensor.dtype), fmt::join(tensor.shape, ", "));
  for (std::int64_t i = 0; i < tensor.count(); ++i) {
    text += (i == 0 ? "" : ", ") + element_text(tensor, i);
  }
  return text + "}";
}

Result<Tensor> read_tensor(Lexer& lexer) {
  Result<Type> type = read_type(lexer);
  if (!type) return type.error();
  std::vector<std::int64_t> shape;
  for (const Dim& dim : type->shape) {
    if (!dim.is_constant()) return Error{"the shape of a tensor is made of numbers"};
    shape.push_back(dim.constant());
  }
  if (type->is_cache) return Error{"a tensor expected, found a cache"};
  Result<Tensor> tensor = Tensor::make(type->dtype, std::move(shape));
  if (!tensor) return tensor;
  if (lexer.accept("{")) {
    if (Status status = read_elements(lexer, *tensor); !status) return status.error();
    return tensor;
  }
  bool random = lexer.accept_word("random");
  if ((!random && !lexer.accept_word("fill")) || !lexer.accept("(")) {
    return Error{"{elements}, fill(value) or random(seed) expected"};
  }
  Result<double> number = read_number(lexer);
  if (!number) return number.error();
  if (!lexer.accept(")")) return Error{"')' expected"};
  if (random) {
    fill_random(*tensor, saturate<std::uint64_t>(*number));
  } else {
    for (std::int64_t i = 0; i < tensor->count(); ++i) tensor->set(i, *number);
  }
  return tensor;
}

Result<Tensor> parse_tensor(std::string_view text) {
  Lexer lexer(text);
  Result<Tensor> tensor = read_tensor(lexer);
  if (tensor && !lexer.at_end()) return Error{fmt::format("unexpected {}", lexer.next())};
  return tensor;
}

}  // namespace tilewright::graph
