// Types of graph values: element type and a shape whose dimensions may be symbolic.
//
// A Dim is a polynomial over named symbols with integer coefficients, in one canonical form, so
// that equality is structural: `past + s`, `2*b*s`, `64`. A weight's encoding and layout are part
// of its type (Type::encoding), never an op's: a pass changes them and every op that reads weights
// gets every encoding at once.
//
// Text: f32[b, s, 576]   i64[]   bf16[past + s]   cache<f32, 3 x 64>
//
// Tested by graph_test, filetests/parse.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "jit/base/result.h"

namespace tilewright::graph {

enum class DataType : std::uint8_t {
  f32,
  bf16,
  f16,
  f64,
  i64,
  i32,
  i16,
  i8,
  u8,
  boolean
};  // text: "bool"
std::string_view name(DataType type);
std::optional<DataType> data_type(std::string_view name);
int size_in_bytes(DataType type);
bool is_float(DataType type);

// Values of symbols at run time.
using SymbolValues = std::map<std::string, std::int64_t, std::less<>>;

class Dim {
 public:
  Dim(std::int64_t value = 0);
  static Dim symbol(std::string name);
  static Result<Dim> parse(std::string_view text);

  bool is_constant() const;
  std::int64_t constant() const;             // REQUIRES: is_constant()
  std::vector<std::string> symbols() const;  // in order
  // Error names a symbol without a value.
  Result<std::int64_t> evaluate(const SymbolValues& values) const;
  // Exact quotient if the division leaves no remainder for every value of the symbols.
  std::optional<Dim> divide_exactly(const Dim& divisor) const;
  Dim substitute(const std::map<std::string, Dim>& replacements) const;
  std::string print() const;
  // product of symbols (sorted, with repetition) -> coefficient; {} is the constant term.
  const std::map<std::vector<std::string>, std::int64_t>& terms() const { return terms_; }

  friend Dim operator+(const Dim& a, const Dim& b);
  friend Dim operator-(const Dim& a, const Dim& b);
  friend Dim operator*(const Dim& a, const Dim& b);
  friend bool operator==(const Dim&, const Dim&) = default;

 private:
  // product of symbols (sorted, with repetition) -> coefficient; no zero coefficients; {} is the
  // constant term
  std::map<std::vector<std::string>, std::int64_t> terms_;
};

using Shape = std::vector<Dim>;
std::string print(const Shape& shape);
Dim element_count(const Shape& shape);

// A tensor, or the key/value cache of one layer (kv_heads x head_dim, element type; its length is
// run-time state).
struct Type {
  DataType dtype = DataType::f32;
  Shape shape = {};
  bool is_cache = false;      // then shape = {kv_heads, head_dim}
  std::string encoding = {};  // of a constant: "" (plain), "exact_bf16", ...
  std::string layout = {};    // of a constant: "" (row major), "tile16", ...
  friend bool operator==(const Type&, const Type&) = default;
};
std::string print(const Type& type);
Result<Type> parse_type(std::string_view text);

}  // namespace tilewright::graph
