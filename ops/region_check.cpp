// RegionCheck: cuts a region out of the program's graph with sizes put in, interprets it, compares.
//
// Tested by tests/python/test_compare.py.
#include "ops/region_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "jit/base/eight_bits.h"
#include "ops/program_state.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using graph::Node;
using graph::Op;
using graph::OpClass;
using graph::Tensor;
using graph::ValueId;

bool is_source(const Node& node) { return node.op == Op::constant || node.op == Op::scalar; }

// The sizes of this run, by symbol.
std::map<std::string, graph::Dim> sizes(const Program::State& state) {
  std::map<std::string, graph::Dim> result;
  for (std::size_t i = 0; i < state.dims.symbols().size(); ++i) {
    result.emplace(state.dims.symbols()[i], state.symbol_values[i]);
  }
  return result;
}

graph::Shape concrete(graph::Shape shape, const std::map<std::string, graph::Dim>& values) {
  for (graph::Dim& dim : shape) dim = dim.substitute(values);
  return shape;
}

graph::Attributes concrete(graph::Attributes attributes,
                           const std::map<std::string, graph::Dim>& values) {
  for (auto& [key, attribute] : attributes) {
    if (auto* shape = std::get_if<graph::Shape>(&attribute)) *shape = concrete(*shape, values);
  }
  return attributes;
}

Result<Tensor> read_view(const TensorView& view) {
  Result<Tensor> tensor = Tensor::make(view.dtype, view.shape);
  if (tensor && !tensor->bytes.empty()) {
    std::memcpy(tensor->bytes.data(), view.data, tensor->bytes.size());
  }
  return tensor;
}

Result<Tensor> read_cache(const KvCache& cache, std::int64_t tokens) {
  const DataType type = cache.dtype() == DataType::i8 ? DataType::f32 : cache.dtype();
  Result<Tensor> tensor =
      Tensor::make(type, {2, cache.batch(), cache.kv_heads(), tokens, cache.head_dim()});
  if (!tensor) return tensor;
  std::byte* out = tensor->bytes.data();
  cache.read(tokens, type, out, out + tensor->bytes.size() / 2);
  return tensor;
}

double largest(const Tensor& tensor) {
  double result = 0;
  for (std::int64_t i = 0; i < tensor.count(); ++i) {
    const double value = std::abs(tensor.get(i));
    if (std::isfinite(value)) result = std::max(result, value);
  }
  return result;
}

// The largest Euclidean norm of a row.
double largest_row(const Tensor& tensor) {
  const std::int64_t columns = tensor.shape.empty() ? 1 : tensor.shape.back();
  double result = 0;
  for (std::int64_t row = 0; columns > 0 && row < tensor.count() / columns; ++row) {
    double sum = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      sum += std::pow(tensor.get(row * columns + i), 2);
    }
    result = std::max(result, std::sqrt(sum));
  }
  return std::isfinite(result) ? result : 0;
}

double unit(DataType type) {  // of rounding
  if (type == DataType::i8)
    return 0.5 / eight_bits::kMost;  // of a cache: relative to a row's largest
  return type == DataType::bf16 ? 0x1p-8 : type == DataType::f16 ? 0x1p-11 : 0x1p-24;
}

using Values = std::map<ValueId, Tensor>;  // of a case: those that are tensors

// How many roundings of fp32 the node puts on the way to an element, and how large numbers get.
struct Path {
  double roundings = 1, magnitude = 0;
};

Path path_of(const graph::Graph& graph, const Node& node, const Values& values) {
  constexpr double function = 8;  // of the polynomials, in units; math_test has the sharp bounds
  const auto operand = [&](std::size_t i) -> const Tensor* {
    const auto found = i < node.operands.size() ? values.find(node.operands[i]) : values.end();
    return found == values.end() ? nullptr : &found->second;
  };
  const Tensor* x = operand(0);
  if (x == nullptr) return {};
  const double columns = x->shape.empty() ? 1 : static_cast<double>(x->shape.back());
  const double magnitude = largest(*x);
  switch (op_class(node.op)) {
    case OpClass::contraction: {
      double weight = 0;
      for (std::size_t i = 1; i < node.operands.size(); ++i) {
        if (operand(i) != nullptr) weight = std::max(weight, largest(*operand(i)));
      }
      const double products = largest_row(*x) * std::sqrt(columns) * weight;
      // The two products of a gated MLP are multiplied.
      if (node.op == Op::gated_mlp_up) return {2 * columns + function, products * (1 + products)};
      return {columns + function, products};
    }
    case OpClass::reduction:
    case OpClass::normalisation:
      return {columns + function * (1 + (node.op == Op::softmax ? magnitude : 0)), magnitude};
    case OpClass::composite: {
      if (node.op != Op::attention) return {4, magnitude};
      // An error of a score is one of its weight; the result lies among the values.
      const Tensor* keys = operand(1);  // of a cache: keys and values
      if (keys == nullptr) return {columns, magnitude};
      const Tensor* values_of_keys = graph.type(node.operands[1]).is_cache ? keys : operand(2);
      const auto count = static_cast<double>(keys->shape[keys->shape.size() - 2]);
      const double score =
          largest_row(*x) * largest_row(*keys) * std::abs(node.attribute<double>("scale"));
      return {count + function + 2 * (columns + function) * (1 + score),
              values_of_keys == nullptr ? magnitude : largest(*values_of_keys)};
    }
    case OpClass::elementwise: {
      const bool grows = node.op == Op::exp || node.op == Op::pow;
      return {function * (1 + (grows ? magnitude : 0)), magnitude};
    }
    default:
      return {0, magnitude};
  }
}

double bound_of(const graph::Graph& graph, const Values& values) {
  double units = 0, magnitude = 0;
  for (const auto& [value, tensor] : values) {
    const Node* producer = graph.producer(value);
    if (graph::is_float(tensor.dtype) && (producer == nullptr || !is_source(*producer))) {
      magnitude = std::max(magnitude, largest(tensor));
    }
  }
  for (const Node& node : graph.nodes) {
    if (is_source(node) || op_class(node.op) == OpClass::view) continue;
    const Path path = path_of(graph, node, values);
    units += path.roundings * unit(DataType::f32);
    const DataType type = graph.type(node.results[0]).dtype;
    if (unit(type) > unit(DataType::f32)) units += 2 * unit(type);
    magnitude = std::max(magnitude, path.magnitude);
  }
  return units * magnitude + 0x1p-126;
}

double difference(const Tensor& actual, const Tensor& expected) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  double result = 0;
  for (std::int64_t i = 0; i < actual.count(); ++i) {
    if (!graph::is_float(actual.dtype)) {
      if (actual.get_integer(i) != expected.get_integer(i)) return infinite;
      continue;
    }
    const double a = actual.get(i), e = expected.get(i);
    if (a == e || (std::isnan(a) && std::isnan(e))) continue;
    const double distance = std::abs(a - e);
    if (std::isnan(distance)) return infinite;
    result = std::max(result, distance);
  }
  return result;
}

std::string as_text(const graph::Graph& graph, const std::vector<graph::Argument>& arguments,
                    const graph::Constants& constants, const std::vector<Tensor>& outputs,
                    double bound) {
  std::string text = "; test run\n; The outputs below are those of the program.\n";
  text += fmt::format("; tolerance {}\n{}", bound, graph::print(graph));
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const auto* tensor = std::get_if<Tensor>(&arguments[i]);
    text += fmt::format(
        "; input %{} = {}\n", graph.value(graph.parameters[i]).name,
        graph::print(tensor ? *tensor : std::get<graph::Cache>(arguments[i]).contents()));
  }
  for (const auto& [name, tensor] : constants) {
    text += fmt::format("; const \"{}\" = {}\n", name, graph::print(tensor));
  }
  for (const Tensor& output : outputs) text += fmt::format("; output {}\n", graph::print(output));
  return text;
}

}  // namespace

RegionCheck::RegionCheck(const Program& program, const std::map<std::string, TensorView>& constants)
    : program_(program), constants_(constants) {
  find_regions();
}

bool RegionCheck::readable(ValueId value) const {
  const Program::State& state = program_.state();
  const auto& layout = state.layouts[static_cast<std::size_t>(value)];
  const Node* producer = state.graph.producer(value);
  return state.cache_of.contains(value) || (producer != nullptr && is_source(*producer)) ||
         (layout && layout->buffer >= 0);
}

// What is written straight into a cache is no value in memory: its region ends where it is read.
void RegionCheck::find_regions() {
  const Program::State& state = program_.state();
  for (const LoweredRegion& part : state.lowered) {
    if (!regions_.empty()) {
      Region& last = regions_.back();
      const std::vector<ValueId> results = results_of(last);
      if (!std::all_of(results.begin(), results.end(), [&](ValueId v) { return readable(v); })) {
        last.end_node = part.end_node;
        last.end_step = part.end_step;
        continue;
      }
    }
    regions_.push_back({part.first_node, part.end_node, part.first_step, part.end_step});
  }
  std::erase_if(regions_, [](const Region& r) { return r.first_step == r.end_step; });
}

// What others than the region itself read.
std::vector<ValueId> RegionCheck::results_of(const Region& region) const {
  const graph::Graph& graph = program_.graph();
  std::vector<ValueId> results;
  for (std::size_t i = region.first_node; i < region.end_node; ++i) {
    if (is_source(graph.nodes[i])) continue;
    for (ValueId value : graph.nodes[i].results) {
      const std::vector<graph::NodeId> users = graph.users(value);
      const bool outside = std::any_of(users.begin(), users.end(), [&](graph::NodeId user) {
        return static_cast<std::size_t>(user) >= region.end_node;
      });
      if (outside || graph.is_output(value) || graph.type(value).is_cache) {
        results.push_back(value);
      }
    }
  }
  return results;
}

void RegionCheck::observe(std::size_t step, const Frame& frame) {
  for (const Region& region : regions_) {
    if (region.end_step == step && open_) {
      finish(*open_, results_.back(), frame);
      open_.reset();
    }
    if (region.first_step != step) continue;
    const Program::State& state = program_.state();
    RegionResult& result = results_.emplace_back();
    for (std::size_t i = region.first_step; i < region.end_step; ++i) {
      const RegionReport& report = state.regions[static_cast<std::size_t>(state.steps[i].region)];
      if (result.name != report.name) result.name += (result.name.empty() ? "" : "+") + report.name;
      result.kernel += (result.kernel.empty() ? "" : "; ") + report.kernel;
    }
    Result<Case> run = begin(region, frame);
    if (run) {
      open_ = std::move(*run);
    } else {
      result.reason = run.error().message;
    }
  }
}

Result<Tensor> RegionCheck::read(ValueId value, const Frame& frame) const {
  const Program::State& state = program_.state();
  if (const auto cache = state.cache_of.find(value); cache != state.cache_of.end()) {
    const auto index = static_cast<std::size_t>(cache->second);
    const bool appended = state.graph.producer(value) != nullptr;
    const KvCache& keys = *frame.caches[index];
    if (keys.ragged()) return Error{"a step of sequences of different lengths"};
    return read_cache(keys, keys.length() + (appended ? frame.dim(state.caches[index].tokens) : 0));
  }
  if (!readable(value)) {
    return Error{fmt::format("%{} is not in memory", state.graph.value(value).name)};
  }
  const Layout& layout = *state.layouts[static_cast<std::size_t>(value)];
  const auto values = sizes(state);
  TensorView view{nullptr, state.graph.type(value).dtype, {}};
  std::vector<std::int64_t> strides;
  for (std::size_t axis = 0; axis < layout.shape.size(); ++axis) {
    view.shape.push_back(layout.shape[axis].substitute(values).constant());
    strides.push_back(layout.strides[axis].substitute(values).constant());
  }
  Result<Tensor> tensor = Tensor::make(view.dtype, view.shape);
  if (!tensor) return tensor;
  const auto size = static_cast<std::size_t>(graph::size_in_bytes(view.dtype));
  const char* base = frame.buffers[static_cast<std::size_t>(layout.buffer)] +
                     layout.offset.substitute(values).constant() * static_cast<std::int64_t>(size);
  for (std::int64_t i = 0; i < tensor->count(); ++i) {
    std::int64_t rest = i, at = 0;
    for (std::size_t axis = view.shape.size(); axis-- > 0; rest /= view.shape[axis]) {
      at += rest % view.shape[axis] * strides[axis];
    }
    std::memcpy(tensor->bytes.data() + static_cast<std::size_t>(i) * size,
                base + at * static_cast<std::int64_t>(size), size);
  }
  return tensor;
}

// A value from outside: a constant or scalar of its own, or a parameter with its present contents.
Status RegionCheck::add_operand(Case& run, ValueId value, const Frame& frame) const {
  if (run.mapped.contains(value)) return {};
  const graph::Graph& source = program_.graph();
  const graph::Value& given = source.value(value);
  const Node* producer = source.producer(value);
  if (producer != nullptr && producer->op == Op::constant) {
    for (const std::string& name : joined_constants(*producer)) {
      const auto found = constants_.find(name);
      if (found == constants_.end()) return Error{fmt::format("no constant \"{}\"", name)};
      Result<Tensor> tensor = read_view(found->second);
      if (!tensor) return tensor.error();
      run.constants[name] = std::move(*tensor);
    }
    run.mapped[value] =
        run.graph.add_constant(producer->attribute<std::string>("source"), given.type, given.name);
    run.graph.nodes.back().attributes = producer->attributes;
    return {};
  }
  if (producer != nullptr && producer->op == Op::scalar) {
    Result<ValueId> scalar = run.graph.append(Op::scalar, {}, producer->attributes, given.name);
    if (!scalar) return scalar.error();
    run.mapped[value] = *scalar;
    return {};
  }
  Result<Tensor> contents = read(value, frame);
  if (!contents) return contents.error();
  graph::Type type = given.type;
  type.shape = concrete(type.shape, sizes(program_.state()));
  run.mapped[value] = run.graph.add_parameter(given.name, type);
  if (!type.is_cache) {
    run.arguments.emplace_back(std::move(*contents));
    return {};
  }
  Result<graph::Cache> cache = graph::Cache::from_contents(*contents, type.dtype);
  if (!cache) return cache.error();
  run.arguments.emplace_back(std::move(*cache));
  return {};
}

Result<RegionCheck::Case> RegionCheck::begin(const Region& region, const Frame& frame) const {
  const graph::Graph& source = program_.graph();
  Case run;
  run.graph.name = "region";
  for (std::size_t i = region.first_node; i < region.end_node; ++i) {
    const Node& node = source.nodes[i];
    if (is_source(node)) continue;  // comes with its users
    if (node.op == Op::external) return Error{"it runs in PyTorch"};
    std::vector<ValueId> operands;
    for (ValueId operand : node.operands) {
      if (Status added = add_operand(run, operand, frame); !added) return added.error();
      operands.push_back(run.mapped.at(operand));
      const auto cache = program_.state().cache_of.find(operand);
      if (node.op != Op::attention || cache == program_.state().cache_of.end()) continue;
      const auto first = frame.caches[static_cast<std::size_t>(cache->second)]->first_keys();
      if (std::any_of(first.begin(), first.end(), [](std::int64_t key) { return key != 0; })) {
        return Error{"attention over a padded cache"};
      }
    }
    Result<ValueId> result = run.graph.append(node.op, std::move(operands),
                                              concrete(node.attributes, sizes(program_.state())),
                                              source.value(node.results[0]).name);
    if (!result) return result.error();
    run.mapped[node.results[0]] = *result;
  }
  run.outputs = results_of(region);
  for (ValueId output : run.outputs) run.graph.outputs.push_back(run.mapped.at(output));
  return run;
}

void RegionCheck::finish(const Case& run, RegionResult& result, const Frame& frame) const {
  std::vector<Tensor> actual;
  for (ValueId output : run.outputs) {
    Result<Tensor> tensor = read(output, frame);
    if (!tensor) {
      result.reason = tensor.error().message;
      return;
    }
    actual.push_back(std::move(*tensor));
  }
  // All values of the region, for the bound.
  graph::Graph wide = run.graph;
  for (const Node& node : run.graph.nodes) {
    for (ValueId value : node.results) {
      if (!run.graph.type(value).is_cache) wide.outputs.push_back(value);
    }
  }
  std::vector<graph::Argument> arguments = run.arguments;  // appending changes a cache
  const auto expected = graph::interpret(wide, arguments, run.constants);
  if (!expected) {
    result.reason = expected.error().message;
    return;
  }
  Values values;
  for (std::size_t i = run.outputs.size(); i < expected->size(); ++i) {
    values[wide.outputs[i]] = (*expected)[i];
  }
  for (std::size_t i = 0; i < run.arguments.size(); ++i) {
    if (const auto* tensor = std::get_if<Tensor>(&run.arguments[i])) {
      values[run.graph.parameters[i]] = *tensor;
      continue;
    }
    values[run.graph.parameters[i]] = std::get<graph::Cache>(run.arguments[i]).contents();
  }
  result.bound = bound_of(run.graph, values);
  for (std::size_t i = 0; i < actual.size(); ++i) {
    result.error = std::max(result.error, difference(actual[i], (*expected)[i]));
  }
  if (result.differs()) {
    result.text = as_text(run.graph, run.arguments, run.constants, actual, result.bound);
  }
}

}  // namespace tilewright::ops
