// Tensor: a small owning tensor for the reference interpreter, filetests and the CLI.
//
// Contiguous, element by element through double or int64; a value is rounded once (to nearest,
// ties to even) when it is stored. Text: `f32[2, 2] {1, 2.5, -inf, 0}`, `f32[4, 4] fill(0.5)`,
// `bf16[64, 64] random(7)` (normal numbers that depend on the seed only).
//
// Thread-compatible. Tested by interpret_test, filetests/run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/lexer.h"
#include "graph/type.h"

namespace tilewright::graph {

struct Tensor {
  DataType dtype = DataType::f32;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;

  // Zeros. Error: a negative size, or more bytes than a reference is for.
  static Result<Tensor> make(DataType dtype, std::vector<std::int64_t> shape);
  // REQUIRES: as many values as elements, few
  static Tensor of(DataType dtype, std::vector<std::int64_t> shape, std::span<const double> values);

  std::int64_t count() const {
    return static_cast<std::int64_t>(bytes.size()) / size_in_bytes(dtype);
  }
  // REQUIRES: 0 <= i < count()
  double get(std::int64_t i) const;
  void set(std::int64_t i, double value);
  // Exact for integers; a float is truncated, and saturated to the range.
  std::int64_t get_integer(std::int64_t i) const;
  void set_integer(std::int64_t i, std::int64_t value);
  // Copies one element bit by bit. REQUIRES: equal dtypes
  void copy(std::int64_t i, const Tensor& source, std::int64_t j);
  std::vector<double> values() const;
};

std::string print(const Tensor& tensor);
Result<Tensor> read_tensor(Lexer& lexer);
Result<Tensor> parse_tensor(std::string_view text);

// The number of elements of a shape; -1 if it is negative or absurdly large.
std::int64_t element_count(std::span<const std::int64_t> shape);

// To the nearest value of a float type, ties to even.
double round_to(DataType dtype, double value);

}  // namespace tilewright::graph
