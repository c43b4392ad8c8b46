// Reads the directives line by line, and compares results with what they expect.
//
// Tested by filetests/run.
#include "graph/run_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace tilewright::graph {
namespace {

class Reader {
 public:
  Reader(const Graph& graph, RunCase& run) : graph_(graph), run_(run) {}

  Status line(std::string_view text) {
    if (!text.starts_with(';')) return {};
    Lexer lexer(text.substr(1));
    if (lexer.accept_word("input")) return input(lexer);
    if (lexer.accept_word("const")) return constant(lexer);
    if (lexer.accept_word("symbol")) return symbol(lexer);
    if (lexer.accept_word("tolerance")) {
      auto number = lexer.number();
      if (!number) return Error{"a number expected after 'tolerance'"};
      run_.tolerance = number->floating;
    } else if (lexer.accept_word("output")) {
      Result<Tensor> tensor = whole_tensor(lexer);
      if (!tensor) return tensor.error();
      run_.outputs.push_back(std::move(*tensor));
    }
    return {};
  }

  Status finish() {
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      const Value& parameter = graph_.value(graph_.parameters[i]);
      if (inputs_[i]) {
        run_.arguments.push_back(std::move(*inputs_[i]));
      } else if (parameter.type.is_cache) {
        Result<Cache> cache = empty_cache(parameter.type);
        if (!cache) return cache.error();
        run_.arguments.push_back(std::move(*cache));
      } else {
        return Error{fmt::format("no '; input %{} = ...'", parameter.name)};
      }
    }
    return {};
  }

 private:
  static Result<Tensor> whole_tensor(Lexer& lexer) {
    Result<Tensor> tensor = read_tensor(lexer);
    if (tensor && !lexer.at_end()) return Error{fmt::format("unexpected {}", lexer.next())};
    return tensor;
  }

  Status input(Lexer& lexer) {
    if (!lexer.accept("%")) return Error{"'%' expected"};
    auto name = lexer.dotted();
    if (!name || !lexer.accept("=")) return Error{"'; input %name = tensor' expected"};
    Result<Tensor> tensor = whole_tensor(lexer);
    if (!tensor) return tensor.error();
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      const Value& parameter = graph_.value(graph_.parameters[i]);
      if (parameter.name != *name) continue;
      if (!parameter.type.is_cache) {
        inputs_[i] = std::move(*tensor);
        return {};
      }
      Result<Cache> cache = Cache::from_contents(*tensor, parameter.type.dtype);
      if (!cache) return cache.error();
      inputs_[i] = std::move(*cache);
      return {};
    }
    return Error{fmt::format("%{} is not a parameter", *name)};
  }

  Status constant(Lexer& lexer) {
    auto source = lexer.string();
    if (!source || !lexer.accept("=")) return Error{"'; const \"name\" = tensor' expected"};
    Result<Tensor> tensor = whole_tensor(lexer);
    if (!tensor) return tensor.error();
    run_.constants[*source] = std::move(*tensor);
    return {};
  }

  Status symbol(Lexer& lexer) {
    auto name = lexer.identifier();
    if (!name || !lexer.accept("=")) return Error{"'; symbol name = number' expected"};
    auto number = lexer.number();
    if (!number || !number->is_integer || number->integer > (std::uint64_t{1} << 48)) {
      return Error{"a size expected"};
    }
    run_.symbols[std::string(*name)] = static_cast<std::int64_t>(number->integer);
    return {};
  }

  Result<Cache> empty_cache(const Type& type) const {
    Result<std::int64_t> heads = type.shape[0].evaluate(run_.symbols);
    Result<std::int64_t> head_dim = type.shape[1].evaluate(run_.symbols);
    if (!heads) return heads.error();
    if (!head_dim) return head_dim.error();
    return Cache{type.dtype, 0, *heads, *head_dim, 0, {}, {}};
  }

  const Graph& graph_;
  RunCase& run_;
  std::vector<std::optional<Argument>> inputs_{graph_.parameters.size()};
};

bool close(double actual, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (actual == expected) return true;
  return std::abs(actual - expected) <= tolerance * std::max(1.0, std::abs(expected));
}

}  // namespace

Result<RunCase> parse_run_case(const Graph& graph, std::string_view text) {
  RunCase run;
  Reader reader(graph, run);
  int line = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    std::size_t end = std::min(text.find('\n', begin), text.size());
    ++line;
    if (Status status = reader.line(text.substr(begin, end - begin)); !status) {
      return Error{fmt::format("line {}: {}", line, status.error().message)};
    }
    begin = end + 1;
  }
  if (Status status = reader.finish(); !status) {
    return Error{fmt::format("line {}: {}", line, status.error().message)};
  }
  return run;
}

Status compare(const Tensor& actual, const Tensor& expected, double tolerance) {
  if (actual.dtype != expected.dtype || actual.shape != expected.shape) {
    return Error{fmt::format("{}[{}] instead of {}[{}]", name(actual.dtype),
                             fmt::join(actual.shape, ", "), name(expected.dtype),
                             fmt::join(expected.shape, ", "))};
  }
  for (std::int64_t i = 0; i < actual.count(); ++i) {
    bool equal = is_float(actual.dtype) ? close(actual.get(i), expected.get(i), tolerance)
                                        : actual.get_integer(i) == expected.get_integer(i);
    if (equal) continue;
    return Error{fmt::format("element {}: {} instead of {}", i, actual.get(i), expected.get(i))};
  }
  return {};
}

}  // namespace tilewright::graph
