// Dims as polynomials, and the text of types.
//
// Terms are ordered by degree, highest first, then by their symbols: the order in which they are
// printed, and the monomial order of the division. Arithmetic is modulo 2^64: a shape that large
// cannot exist, and evaluate() reports an overflow.
//
// Tested by graph_test.
#include "graph/type.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>

namespace tilewright::graph {
namespace {

using Monomial = std::vector<std::string>;
using Terms = std::map<Monomial, std::int64_t>;

struct DataTypeRow {
  DataType type;
  std::string_view name;
  int bytes;
  bool is_float;
};
constexpr std::array<DataTypeRow, 10> data_types{{{DataType::f32, "f32", 4, true},
                                                  {DataType::bf16, "bf16", 2, true},
                                                  {DataType::f16, "f16", 2, true},
                                                  {DataType::f64, "f64", 8, true},
                                                  {DataType::i64, "i64", 8, false},
                                                  {DataType::i32, "i32", 4, false},
                                                  {DataType::i16, "i16", 2, false},
                                                  {DataType::i8, "i8", 1, false},
                                                  {DataType::u8, "u8", 1, false},
                                                  {DataType::boolean, "bool", 1, false}}};

const DataTypeRow& row(DataType type) { return data_types[static_cast<std::size_t>(type)]; }

std::int64_t wrapping_add(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
}
std::int64_t wrapping_multiply(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
}

void add_term(Terms& terms, const Monomial& monomial, std::int64_t coefficient) {
  if (coefficient == 0) return;
  auto [place, inserted] = terms.try_emplace(monomial, coefficient);
  if (inserted) return;
  place->second = wrapping_add(place->second, coefficient);
  if (place->second == 0) terms.erase(place);
}

// a comes before b in print order.
bool before(const Monomial& a, const Monomial& b) {
  return a.size() != b.size() ? a.size() > b.size() : a < b;
}

// REQUIRES: terms is not empty
Terms::const_iterator leading(const Terms& terms) {
  return std::min_element(terms.begin(), terms.end(),
                          [](const auto& a, const auto& b) { return before(a.first, b.first); });
}

// The monomial and coefficient that times `b` gives `a`, if there are any.
std::optional<Terms::value_type> quotient(const Terms::value_type& a, const Terms::value_type& b) {
  if (b.second == -1 && a.second == std::numeric_limits<std::int64_t>::min()) return std::nullopt;
  if (a.second % b.second != 0) return std::nullopt;
  if (!std::includes(a.first.begin(), a.first.end(), b.first.begin(), b.first.end())) {
    return std::nullopt;
  }
  Monomial rest;
  std::set_difference(a.first.begin(), a.first.end(), b.first.begin(), b.first.end(),
                      std::back_inserter(rest));
  return Terms::value_type(std::move(rest), a.second / b.second);
}

// One printed term without its sign; the magnitude is unsigned because -2^63 has no negation.
std::string print_term(const Monomial& monomial, std::int64_t coefficient) {
  std::uint64_t magnitude = static_cast<std::uint64_t>(coefficient);
  if (coefficient < 0) magnitude = 0 - magnitude;
  if (monomial.empty()) return fmt::format("{}", magnitude);
  std::string symbols = fmt::format("{}", fmt::join(monomial, "*"));
  return magnitude == 1 ? symbols : fmt::format("{}*{}", magnitude, symbols);
}

}  // namespace

std::string_view name(DataType type) { return row(type).name; }
int size_in_bytes(DataType type) { return row(type).bytes; }
bool is_float(DataType type) { return row(type).is_float; }

std::optional<DataType> data_type(std::string_view name) {
  for (const DataTypeRow& candidate : data_types) {
    if (candidate.name == name) return candidate.type;
  }
  return std::nullopt;
}

Dim::Dim(std::int64_t value) {
  if (value != 0) terms_[{}] = value;
}

Dim Dim::symbol(std::string name) {
  Dim dim;
  dim.terms_[{std::move(name)}] = 1;
  return dim;
}

bool Dim::is_constant() const {
  return terms_.empty() || (terms_.size() == 1 && terms_.begin()->first.empty());
}

std::int64_t Dim::constant() const { return terms_.empty() ? 0 : terms_.begin()->second; }

std::vector<std::string> Dim::symbols() const {
  std::vector<std::string> symbols;
  for (const auto& [monomial, coefficient] : terms_) {
    symbols.insert(symbols.end(), monomial.begin(), monomial.end());
  }
  std::sort(symbols.begin(), symbols.end());
  symbols.erase(std::unique(symbols.begin(), symbols.end()), symbols.end());
  return symbols;
}

Result<std::int64_t> Dim::evaluate(const SymbolValues& values) const {
  std::int64_t sum = 0;
  for (const auto& [monomial, coefficient] : terms_) {
    std::int64_t product = coefficient;
    for (const std::string& symbol : monomial) {
      auto value = values.find(symbol);
      if (value == values.end()) return Error{fmt::format("symbol '{}' has no value", symbol)};
      if (__builtin_mul_overflow(product, value->second, &product)) {
        return Error{fmt::format("{} overflows", print())};
      }
    }
    if (__builtin_add_overflow(sum, product, &sum)) {
      return Error{fmt::format("{} overflows", print())};
    }
  }
  return sum;
}

std::optional<Dim> Dim::divide_exactly(const Dim& divisor) const {
  if (divisor.terms_.empty()) return std::nullopt;
  auto divisor_leading = leading(divisor.terms_);
  Dim rest = *this;
  Dim result;
  // Each round removes the leading term and adds only smaller ones, so this ends.
  while (!rest.terms_.empty()) {
    auto term = quotient(*leading(rest.terms_), *divisor_leading);
    if (!term) return std::nullopt;
    Dim factor;
    factor.terms_.insert(*term);
    add_term(result.terms_, term->first, term->second);
    rest = rest - factor * divisor;
  }
  return result;
}

Dim Dim::substitute(const std::map<std::string, Dim>& replacements) const {
  Dim result;
  for (const auto& [monomial, coefficient] : terms_) {
    Dim product = coefficient;
    for (const std::string& symbol : monomial) {
      auto replacement = replacements.find(symbol);
      product =
          product * (replacement == replacements.end() ? Dim::symbol(symbol) : replacement->second);
    }
    result = result + product;
  }
  return result;
}

std::string Dim::print() const {
  if (terms_.empty()) return "0";
  std::vector<std::pair<Monomial, std::int64_t>> ordered(terms_.begin(), terms_.end());
  std::sort(ordered.begin(), ordered.end(),
            [](const auto& a, const auto& b) { return before(a.first, b.first); });
  std::string text;
  for (const auto& [monomial, coefficient] : ordered) {
    if (text.empty()) {
      text = coefficient < 0 ? "-" : "";
    } else {
      text += coefficient < 0 ? " - " : " + ";
    }
    text += print_term(monomial, coefficient);
  }
  return text;
}

Dim operator+(const Dim& a, const Dim& b) {
  Dim sum = a;
  for (const auto& [monomial, coefficient] : b.terms_) {
    add_term(sum.terms_, monomial, coefficient);
  }
  return sum;
}

Dim operator-(const Dim& a, const Dim& b) { return a + b * Dim(-1); }

Dim operator*(const Dim& a, const Dim& b) {
  Dim product;
  for (const auto& [a_monomial, a_coefficient] : a.terms_) {
    for (const auto& [b_monomial, b_coefficient] : b.terms_) {
      Monomial monomial;
      std::merge(a_monomial.begin(), a_monomial.end(), b_monomial.begin(), b_monomial.end(),
                 std::back_inserter(monomial));
      add_term(product.terms_, monomial, wrapping_multiply(a_coefficient, b_coefficient));
    }
  }
  return product;
}

Dim element_count(const Shape& shape) {
  Dim count = 1;
  for (const Dim& dim : shape) count = count * dim;
  return count;
}

std::string print(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i != 0) text += ", ";
    text += shape[i].print();
  }
  return text + "]";
}

std::string print(const Type& type) {
  std::string text;
  if (type.is_cache) {
    text = fmt::format("cache<{}", name(type.dtype));
    for (std::size_t i = 0; i < type.shape.size(); ++i) {
      text += (i == 0 ? ", " : " x ") + type.shape[i].print();
    }
    text += ">";
  } else {
    text = std::string(name(type.dtype)) + print(type.shape);
  }
  if (!type.encoding.empty()) text += " encoding=" + type.encoding;
  if (!type.layout.empty()) text += " layout=" + type.layout;
  return text;
}

}  // namespace tilewright::graph
