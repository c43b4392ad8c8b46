// Recursive descent over the text of dims, shapes and types.
//
//   dim    = ["-"] term {("+" | "-") term}      term = factor {"*" factor}
//   factor = integer | symbol | "-" factor | "(" dim ")"
//
// Limits keep hostile text from costing more than its length: a product of sums has as many terms
// as it likes.
//
// Tested by graph_test, filetests/parse.
#include "graph/parse_type.h"

#include <fmt/format.h>

#include <cmath>

namespace tilewright::graph {
namespace {

constexpr int max_depth = 32;
constexpr std::size_t max_terms = 64;
constexpr std::size_t max_degree = 16;
constexpr std::size_t max_rank = 16;
// Where the arithmetic of Dim wraps, less a margin for rounding.
constexpr double max_magnitude = 0x1p62;

Result<Dim> read_sum(Lexer& lexer, int depth);

Result<Dim> read_factor(Lexer& lexer, int depth) {
  if (depth > max_depth) return Error{"dimension nested too deeply"};
  if (lexer.accept("-")) {
    Result<Dim> factor = read_factor(lexer, depth + 1);
    if (!factor) return factor;
    return Dim(0) - *factor;
  }
  if (lexer.accept("(")) {
    Result<Dim> sum = read_sum(lexer, depth + 1);
    if (sum && !lexer.accept(")")) {
      return Error{fmt::format("')' expected in a dimension, found {}", lexer.next())};
    }
    return sum;
  }
  if (auto symbol = lexer.identifier()) return Dim::symbol(std::string(*symbol));
  std::string found = lexer.next();
  auto number = lexer.number();
  if (!number || !number->is_integer) {
    return Error{fmt::format("dimension expected, found {}", found)};
  }
  if (!number->in_range || number->floating > max_magnitude) {
    return Error{"number in a dimension is out of range"};
  }
  return Dim(static_cast<std::int64_t>(number->integer));
}

double magnitude(const Dim& dim) {
  double sum = 0;
  for (const auto& [symbols, coefficient] : dim.terms()) {
    sum += std::abs(static_cast<double>(coefficient));
  }
  return sum;
}

Status within_limits(const Dim& dim) {
  bool fits = dim.terms().size() <= max_terms;
  for (const auto& [symbols, coefficient] : dim.terms()) fits &= symbols.size() <= max_degree;
  return fits ? Status() : Error{"dimension is too complicated"};
}

Result<Dim> read_term(Lexer& lexer, int depth) {
  Result<Dim> product = read_factor(lexer, depth);
  while (product && lexer.accept("*")) {
    Result<Dim> factor = read_factor(lexer, depth);
    if (!factor) return factor;
    if (magnitude(*product) * magnitude(*factor) > max_magnitude) {
      return Error{"number in a dimension is out of range"};
    }
    *product = *product * *factor;
    if (Status status = within_limits(*product); !status) return status.error();
  }
  return product;
}

Result<Dim> read_sum(Lexer& lexer, int depth) {
  Result<Dim> sum = read_term(lexer, depth);
  while (sum) {
    bool plus = lexer.accept("+");
    if (!plus && !lexer.accept("-")) return sum;
    Result<Dim> term = read_term(lexer, depth);
    if (!term) return term;
    if (magnitude(*sum) + magnitude(*term) > max_magnitude) {
      return Error{"number in a dimension is out of range"};
    }
    *sum = plus ? *sum + *term : *sum - *term;
    if (Status status = within_limits(*sum); !status) return status.error();
  }
  return sum;
}

Error expected(std::string_view what, Lexer& lexer) {
  return Error{fmt::format("{} expected, found {}", what, lexer.next())};
}

Result<Type> read_cache(Lexer& lexer) {
  Type type;
  type.is_cache = true;
  if (!lexer.accept("<")) return expected("'<'", lexer);
  auto dtype = lexer.identifier();
  if (!dtype || !data_type(*dtype)) return Error{"element type expected after 'cache<'"};
  type.dtype = *data_type(*dtype);
  if (!lexer.accept(",")) return expected("','", lexer);
  Result<Dim> heads = read_dim(lexer);
  if (!heads) return heads.error();
  if (!lexer.accept_word("x")) return expected("'x'", lexer);
  Result<Dim> head_dim = read_dim(lexer);
  if (!head_dim) return head_dim.error();
  if (!lexer.accept(">")) return expected("'>'", lexer);
  type.shape = {*heads, *head_dim};
  return type;
}

Status read_storage(Lexer& lexer, std::string_view key, std::string& value) {
  if (!lexer.accept_word(key)) return {};
  if (!lexer.accept("=")) return expected("'='", lexer);
  auto word = lexer.identifier();
  if (!word) return expected(fmt::format("name of an {}", key), lexer);
  value = *word;
  return {};
}

template <class T, class Read>
Result<T> read_whole(std::string_view text, Read read) {
  Lexer lexer(text);
  Result<T> result = read(lexer);
  if (result && !lexer.at_end()) {
    return Error{fmt::format("unexpected {} in '{}'", lexer.next(), text)};
  }
  return result;
}

}  // namespace

Result<Dim> read_dim(Lexer& lexer) { return read_sum(lexer, 0); }

Result<Shape> read_shape(Lexer& lexer) {
  if (!lexer.accept("[")) return expected("'['", lexer);
  Shape shape;
  if (lexer.accept("]")) return shape;
  do {
    Result<Dim> dim = read_dim(lexer);
    if (!dim) return dim.error();
    shape.push_back(std::move(*dim));
    if (shape.size() > max_rank) return Error{"too many dimensions"};
  } while (lexer.accept(","));
  if (!lexer.accept("]")) return expected("']'", lexer);
  return shape;
}

Result<Type> read_type(Lexer& lexer) {
  std::string found = lexer.next();
  auto word = lexer.identifier();
  if (!word) return Error{fmt::format("type expected, found {}", found)};
  Type type;
  if (*word == "cache") {
    Result<Type> cache = read_cache(lexer);
    if (!cache) return cache;
    type = std::move(*cache);
  } else if (auto dtype = data_type(*word)) {
    Result<Shape> shape = read_shape(lexer);
    if (!shape) return shape.error();
    type.dtype = *dtype;
    type.shape = std::move(*shape);
  } else {
    return Error{fmt::format("unknown element type '{}'", *word)};
  }
  if (Status status = read_storage(lexer, "encoding", type.encoding); !status) {
    return status.error();
  }
  if (Status status = read_storage(lexer, "layout", type.layout); !status) return status.error();
  return type;
}

Result<Dim> Dim::parse(std::string_view text) { return read_whole<Dim>(text, read_dim); }

Result<Type> parse_type(std::string_view text) { return read_whole<Type>(text, read_type); }

}  // namespace tilewright::graph
