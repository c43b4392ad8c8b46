// Binds symbols and arguments, then runs the nodes in order.
//
// Values are copied at every step; a write makes a new value and also replaces the argument that
// it belongs to, which is right because verify() lets nobody read an overwritten value.
//
// Tested by interpret_test, filetests/run.
#include "graph/interpret.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "graph/reference.h"
#include "jit/base/eight_bits.h"

namespace tilewright::graph {
namespace {

using reference::Sizes;

Result<Sizes> evaluate(const Shape& shape, const SymbolValues& symbols) {
  Sizes sizes;
  for (const Dim& dim : shape) {
    Result<std::int64_t> size = dim.evaluate(symbols);
    if (!size) return size.error();
    sizes.push_back(*size);
  }
  return sizes;
}

std::optional<std::string> only_symbol(const Dim& dim) {
  std::vector<std::string> symbols = dim.symbols();
  if (symbols.size() != 1 || dim != Dim::symbol(symbols[0])) return std::nullopt;
  return symbols[0];
}

class Interpreter {
 public:
  Interpreter(const Graph& graph, std::span<Argument> arguments, const Constants& constants,
              SymbolValues symbols)
      : graph_(graph),
        arguments_(arguments),
        constants_(constants),
        symbols_(std::move(symbols)),
        values_(graph.values.size()),
        argument_of_(graph.values.size(), -1) {}

  Result<std::vector<Tensor>> run() {
    if (Status status = bind(); !status) return status.error();
    for (const Node& node : graph_.nodes) {
      if (Status status = run_node(node); !status) {
        return Error{fmt::format("{}: {}", name(node.op), status.error().message)};
      }
    }
    std::vector<Tensor> outputs;
    for (ValueId id : graph_.outputs) {
      const Argument& value = values_[index(id)];
      const Cache* cache = std::get_if<Cache>(&value);
      outputs.push_back(cache != nullptr ? cache->contents() : std::get<Tensor>(value));
    }
    return outputs;
  }

 private:
  static std::size_t index(ValueId id) { return static_cast<std::size_t>(id); }

  Status bind() {
    if (arguments_.size() != graph_.parameters.size()) {
      return Error{fmt::format("{} arguments for {} parameters", arguments_.size(),
                               graph_.parameters.size())};
    }
    for (std::size_t i = 0; i < arguments_.size(); ++i) bind_symbols(i);
    for (std::size_t i = 0; i < arguments_.size(); ++i) {
      if (Status status = bind_argument(i); !status) {
        return Error{fmt::format("%{}: {}", graph_.value(graph_.parameters[i]).name,
                                 status.error().message)};
      }
    }
    return {};
  }

  void bind_symbols(std::size_t i) {
    const Type& type = graph_.type(graph_.parameters[i]);
    const auto* tensor = std::get_if<Tensor>(&arguments_[i]);
    if (tensor == nullptr || tensor->shape.size() != type.shape.size()) return;
    for (std::size_t axis = 0; axis < type.shape.size(); ++axis) {
      if (auto symbol = only_symbol(type.shape[axis])) {
        symbols_.try_emplace(*symbol, tensor->shape[axis]);
      }
    }
  }

  Status bind_argument(std::size_t i) {
    ValueId id = graph_.parameters[i];
    if (Status status = fits(graph_.type(id), arguments_[i]); !status) return status;
    values_[index(id)] = arguments_[i];
    argument_of_[index(id)] = static_cast<int>(i);
    return {};
  }

  Status fits(const Type& type, const Argument& argument) const {
    Result<Sizes> shape = evaluate(type.shape, symbols_);
    if (!shape) return shape.error();
    bool equal = type.is_cache == std::holds_alternative<Cache>(argument);
    if (equal && type.is_cache) {
      const auto& cache = std::get<Cache>(argument);
      equal = cache.dtype == type.dtype && *shape == Sizes{cache.kv_heads, cache.head_dim};
    } else if (equal) {
      const auto& tensor = std::get<Tensor>(argument);
      equal = tensor.dtype == type.dtype && tensor.shape == *shape;
    }
    if (equal) return {};
    return Error{fmt::format("the argument is not {}", print(type))};
  }

  Status run_node(const Node& node) {
    using Reference = Status (*)(reference::Step&);
    constexpr std::array<Reference, op_count> references{
#define GRAPH_OP(name, op_class, minimum, maximum, attributes) reference::name,
#include "graph/op_list.def"
#undef GRAPH_OP
    };
    if (node.op == Op::external) {
      return Error{fmt::format("{} has no reference", node.attribute<std::string>("function"))};
    }
    reference::Step step{node, {}, symbols_, constants_, {}, {}};
    for (ValueId operand : node.operands) step.operands.push_back(&values_[index(operand)]);
    ValueId id = node.results[0];
    const Type& type = graph_.type(id);
    if (!type.is_cache) {
      Result<Sizes> shape = evaluate(type.shape, symbols_);
      if (!shape) return shape.error();
      Result<Tensor> result = Tensor::make(type.dtype, std::move(*shape));
      if (!result) return result.error();
      step.result = std::move(*result);
    }
    Status status = references[static_cast<std::size_t>(node.op)](step);
    if (!status) return status;
    Argument& value = values_[index(id)];
    if (type.is_cache) {
      value = std::move(step.cache);
    } else {
      value = std::move(step.result);
    }
    if (node.op == Op::index_copy || node.op == Op::kv_append) {
      write_back(node.operands[0], id);
    }
    return {};
  }

  void write_back(ValueId overwritten, ValueId written) {
    int argument = argument_of_[index(overwritten)];
    argument_of_[index(written)] = argument;
    arguments_[static_cast<std::size_t>(argument)] = values_[index(written)];
  }

  const Graph& graph_;
  std::span<Argument> arguments_;
  const Constants& constants_;
  SymbolValues symbols_;
  // By ValueId. argument_of_: the argument whose storage the value is, or -1.
  std::vector<Argument> values_;
  std::vector<int> argument_of_;
};

// Of a cache, as a tensor.
DataType contents_type(DataType cache) { return cache == DataType::i8 ? DataType::f32 : cache; }

}  // namespace

Tensor Cache::contents() const {
  Tensor tensor = *Tensor::make(contents_type(dtype), {2, batch, kv_heads, tokens, head_dim});
  std::int64_t next = 0;
  for (const std::vector<double>* half : {&keys, &values}) {
    for (std::int64_t sequence = 0; sequence < batch; ++sequence) {
      for (std::int64_t head = 0; head < kv_heads; ++head) {
        for (std::int64_t token = 0; token < tokens; ++token) {
          for (std::int64_t i = 0; i < head_dim; ++i) {
            tensor.set(next++, (*half)[index(token, sequence, head, i)]);
          }
        }
      }
    }
  }
  return tensor;
}

Result<Cache> Cache::from_contents(const Tensor& contents, DataType dtype) {
  const std::vector<std::int64_t>& shape = contents.shape;
  if (shape.size() != 5 || shape[0] != 2) {
    return Error{"the contents of a cache are [2, batch, kv_heads, tokens, head_dim]"};
  }
  if (contents.dtype != contents_type(dtype)) {
    return Error{fmt::format("contents in {} of a cache in {}", name(contents.dtype), name(dtype))};
  }
  Cache cache{dtype, shape[1], shape[2], shape[4], shape[3], {}, {}};
  cache.keys.resize(static_cast<std::size_t>(contents.count() / 2));
  cache.values.resize(cache.keys.size());
  for (std::int64_t i = 0; i < contents.count(); i += cache.head_dim) {
    reference::Sizes at = reference::coordinates(i, shape);
    auto& half = at[0] == 0 ? cache.keys : cache.values;
    std::vector<double> row;
    for (std::int64_t d = 0; d < cache.head_dim; ++d) row.push_back(contents.get(i + d));
    row = cache.rounded(std::move(row));
    std::copy(row.begin(), row.end(),
              half.begin() + static_cast<std::ptrdiff_t>(cache.index(at[3], at[1], at[2], 0)));
  }
  return cache;
}

std::vector<double> Cache::rounded(std::vector<double> row) const {
  if (dtype != DataType::i8) {
    for (double& x : row) x = round_to(dtype, x);
    return row;
  }
  std::vector<std::int8_t> integers(row.size());
  const float scale = eight_bits::quantize(
      head_dim,
      [&](std::int64_t i) { return static_cast<float>(row[static_cast<std::size_t>(i)]); },
      integers.data());
  std::transform(integers.begin(), integers.end(), row.begin(),
                 [&](std::int8_t x) { return static_cast<double>(scale) * x; });
  return row;
}

Result<std::vector<Tensor>> interpret(const Graph& graph, std::span<Argument> arguments,
                                      const Constants& constants, SymbolValues symbols) {
  if (Status status = verify(graph); !status) return status.error();
  return Interpreter(graph, arguments, constants, std::move(symbols)).run();
}

}  // namespace tilewright::graph
