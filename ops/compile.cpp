// compile: see compile.h. This file walks the regions and decides where values lie; lower_*.cpp
// make the tasks. Tested by program_test, filetests/run.
#include "ops/compile.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>

#include "graph/tensor.h"
#include "ops/lowering.h"

namespace tilewright::ops {

using graph::Dim;
using graph::NodeId;
using graph::Op;
using graph::OpClass;
using graph::ValueId;

namespace {

bool is_view(const graph::Node& node) { return op_class(node.op) == OpClass::view; }
bool is_source(const graph::Node& node) { return node.op == Op::constant || node.op == Op::scalar; }

bool is_row_op(const graph::Node& node) {
  const OpClass kind = op_class(node.op);
  return kind == OpClass::elementwise || kind == OpClass::reduction ||
         kind == OpClass::normalisation;
}

// The name by which TILEWRIGHT_DISABLE knows an op besides its own.
std::string family(const graph::Node& node) {
  switch (node.op) {
    case Op::linear:
    case Op::expert_linear:
    case Op::matmul:
    case Op::gated_mlp_up:
      return "linear";
    case Op::rms_norm:
    case Op::layer_norm:
      return "norm";
    default:
      return op_class(node.op) == OpClass::elementwise ? "elementwise"
                                                       : std::string(graph::name(node.op));
  }
}

}  // namespace

Lowering::Lowering(const graph::Graph& graph, const std::map<std::string, TensorView>& constants,
                   const Target& target, const CompileOptions& options,
                   std::shared_ptr<KernelLibrary> kernels, std::shared_ptr<WeightStore> weights,
                   const PackedCallback& packed)
    : graph_(graph),
      constants_(constants),
      target_(target),
      options_(options),
      kernels_(std::move(kernels)),
      weights_(std::move(weights)),
      state_(std::make_unique<Program::State>()),
      layouts_(graph.values.size()),
      output_taken_(graph.outputs.size(), false),
      packed_callback_(packed) {
  std::int64_t values = 0;
  for (const auto& [name, constant] : constants_) values += element_count(constant);
  weight_forms_ = {options.exact_weights, values >= options.choices.twelve_bits_from,
                   options.choices.twelve_bits_percent};
}

Result<Program> Lowering::run() {
  state_->graph = graph_;
  state_->kernels = kernels_;
  state_->profile = options_.profile;
  if (Status bound = bind_constants(); !bound) return bound.error();
  in_place_ = options_.in_place && can_read_in_place();
  count_readers();
  bind_parameters();
  find_forwarded_values();
  std::size_t begin = 0;
  while (begin < graph_.nodes.size()) {
    std::size_t end = begin + 1;
    const int region = graph_.nodes[begin].region;
    while (region >= 0 && end < graph_.nodes.size() && graph_.nodes[end].region == region) ++end;
    std::vector<NodeId> nodes;
    for (std::size_t i = begin; i < end; ++i) nodes.push_back(static_cast<NodeId>(i));
    const std::size_t first_step = state_->steps.size();
    if (Status lowered = lower_region(nodes); !lowered) return lowered.error();
    state_->lowered.push_back({begin, end, first_step, state_->steps.size()});
    begin = end;
  }
  if (Status finished = finish_outputs(); !finished) return finished.error();
  if (!lookups_.empty()) return Error{"the linear layer of a tied table was not lowered"};
  for (const std::string& name : read_in_place_) {
    if (WeightStore::is_token(constants_.at(name).data)) {
      return Error{fmt::format("the memory of constant \"{}\" is needed", name)};
    }
  }
  std::set_difference(packed_.begin(), packed_.end(), read_in_place_.begin(), read_in_place_.end(),
                      std::back_inserter(state_->packed_sources));
  if (Status made = kernels_->flush(); !made) return made.error();
  state_->layouts = std::move(layouts_);
  state_->cache_of = std::move(cache_indices_);
  return Program(std::move(state_));
}

Status Lowering::bind_constants() const {
  for (const graph::Node& node : graph_.nodes) {
    if (node.op != Op::constant) continue;
    const graph::Type& expected = type(node.results[0]);
    Dim rows(0);
    for (const std::string& name : constant_sources(node.results[0])) {
      const auto found = constants_.find(name);
      if (found == constants_.end()) return Error{fmt::format("no constant \"{}\" given", name)};
      const TensorView& given = found->second;
      bool fits = given.dtype == expected.dtype && given.shape.size() == expected.shape.size();
      for (std::size_t axis = 1; fits && axis < given.shape.size(); ++axis) {
        fits = Dim(given.shape[axis]) == expected.shape[axis];
      }
      if (!fits) {
        return Error{
            fmt::format("constant \"{}\" is not of type {}", name, graph::print(expected))};
      }
      if (!given.shape.empty()) rows = rows + Dim(given.shape[0]);
    }
    if (!expected.shape.empty() && !(rows == expected.shape[0])) {
      return Error{fmt::format("constant \"{}\" is not of type {}",
                               node.attribute<std::string>("source"), graph::print(expected))};
    }
  }
  return {};
}

void Lowering::count_readers() {
  const auto read = [&](ValueId value) {
    for (const std::string& name : constant_sources(value)) ++readers_[constants_.at(name).data];
  };
  for (const graph::Node& node : graph_.nodes) {
    if (is_reshaped_constant(node)) continue;  // its readers count
    const bool looks_up = node.op == Op::embedding && is_tied(node);
    for (ValueId value : node.operands) {
      if (!looks_up || value != node.operands[0]) read(value);
    }
  }
  for (ValueId value : graph_.outputs) read(value);
}

void Lowering::bind_parameters() {
  for (ValueId parameter : graph_.parameters) {
    const graph::Value& value = graph_.value(parameter);
    if (value.type.is_cache) {
      cache_indices_[parameter] = static_cast<int>(state_->caches.size());
      state_->caches.push_back({value.name, value.type.dtype, value.type.shape[0].constant(),
                                value.type.shape[1].constant()});
      continue;
    }
    const int buffer = add_buffer({.kind = Buffer::Kind::input,
                                   .index = static_cast<int>(state_->inputs.size()),
                                   .element_bytes = graph::size_in_bytes(value.type.dtype)});
    state_->inputs.push_back({value.name, value.type.dtype, value.type.shape});
    state_->input_dims.emplace_back();
    for (const Dim& size : value.type.shape) state_->input_dims.back().push_back(dim(size));
    set_layout(parameter, {buffer, Dim(0), value.type.shape, row_major(value.type.shape)});
  }
  for (ValueId output : graph_.outputs) {
    const graph::Type& output_type = type(output);
    TensorOutput description{output_type.dtype, output_type.shape, {}};
    for (const Dim& size : output_type.shape) description.dims.push_back(dim(size));
    state_->outputs.push_back(std::move(description));
  }
}

// A rotated key or value that is only appended or concatenated is written where it will stay.
void Lowering::find_forwarded_values() {
  for (std::size_t i = 0; i < graph_.nodes.size(); ++i) {
    const graph::Node& node = graph_.nodes[i];
    if (node.op != Op::cat && node.op != Op::kv_append) continue;
    for (std::size_t j = node.op == Op::cat ? 0 : 1; j < node.operands.size(); ++j) {
      const ValueId value = node.operands[j];
      const graph::Node* producer = graph_.producer(value);
      if (producer == nullptr || producer->op != Op::rope || graph_.is_output(value)) continue;
      if (graph_.users(value).size() != 1 || !disabled_reason(*producer).empty()) continue;
      forwarded_[value] = {static_cast<NodeId>(i), static_cast<int>(j)};
    }
  }
}

std::string Lowering::disabled_reason(const graph::Node& node) const {
  for (const std::string& name : {std::string(graph::name(node.op)), family(node)}) {
    if (options_.disabled.contains(name)) return fmt::format("{} is disabled", name);
  }
  return "";
}

Status Lowering::lower_region(std::span<const NodeId> ids) {
  std::vector<NodeId> rows;
  bool only_rows = true;
  std::string name;
  for (NodeId id : ids) {
    const graph::Node& node = graph_.nodes[static_cast<std::size_t>(id)];
    if (is_view(node) || is_source(node)) continue;
    only_rows = only_rows && is_row_op(node) && disabled_reason(node).empty();
    rows.push_back(id);
    if (name.size() < 60) name += (name.empty() ? "" : "+") + std::string(graph::name(node.op));
  }
  begin_region(name);
  if (only_rows && rows.size() > 1) {
    // Views of what comes from outside are needed first; a view between the ops makes the region
    // unfit, and its nodes are lowered one by one.
    bool views_done = true;
    for (NodeId id : ids) {
      const graph::Node& node = graph_.nodes[static_cast<std::size_t>(id)];
      if (!is_view(node)) continue;
      views_done = views_done && layouts_[static_cast<std::size_t>(node.operands[0])].has_value();
      if (views_done) {
        if (Status done = lower_view(node); !done) return done;
      }
    }
    if (views_done) {
      if (lower_rows(rows).ok()) return {};
    }
  }
  for (NodeId id : ids) {
    if (Status done = lower_node(graph_.nodes[static_cast<std::size_t>(id)]); !done) return done;
  }
  return {};
}

Status Lowering::lower_node(const graph::Node& node) {
  if (is_source(node) || is_reshaped_constant(node)) return {};
  if (is_view(node)) return lower_view(node);
  if (node.op == Op::cache_keys || node.op == Op::cache_values || node.op == Op::causal_mask) {
    return Error{fmt::format("%{}: {} outside of attention", graph_.value(node.results[0]).name,
                             graph::name(node.op))};
  }
  std::string reason = disabled_reason(node);
  if (reason.empty()) {
    Status done = Error{"there is no kernel for " +
                        (node.op == Op::external ? node.attribute<std::string>("function") : "it")};
    const NodeId id = graph_.value(node.results[0]).producer;
    if (is_row_op(node)) {
      done = lower_rows(std::span(&id, 1));
      if (!done && lower_integers(node)) done = {};
    } else {
      switch (node.op) {
        case Op::linear:
          done = lower_linear(node);
          break;
        case Op::expert_linear:
          done = lower_expert_linear(node);
          break;
        case Op::gated_mlp_up:
          done = lower_gated_mlp(node);
          break;
        case Op::matmul:
          done = lower_matmul(node);
          break;
        case Op::rope:
          done = lower_rope(node);
          break;
        case Op::kv_append:
          done = lower_append(node);
          break;
        case Op::attention:
          done = lower_attention(node);
          break;
        case Op::embedding:
          done = lower_embedding(node);
          break;
        case Op::gather:
          done = lower_gather(node);
          break;
        case Op::cumsum:
          done = lower_cumsum(node);
          break;
        case Op::cat:
          done = lower_cat(node);
          break;
        case Op::top_values:
        case Op::top_indices:
          done = lower_largest(node);
          break;
        case Op::contiguous:
          done = lower_contiguous(node);
          break;
        case Op::arange:
          done = lower_arange(node);
          break;
        default:
          break;
      }
    }
    if (done) return {};
    reason = done.error().message;
  }
  return lower_host(node, reason);
}

Status Lowering::lower_view(const graph::Node& node) {
  const ValueId source = node.operands[0], result = node.results[0];
  if (layouts_[static_cast<std::size_t>(result)]) return {};
  std::optional<Layout> viewed = view(node, type(result), layout(source));
  if (!viewed) {
    viewed = view(node, type(result), contiguous(layout(source), type(source).dtype));
  }
  if (!viewed) return Error{fmt::format("%{}: not a view", graph_.value(result).name)};
  set_layout(result, *viewed);
  return {};
}

Status Lowering::finish_outputs() {
  begin_region("outputs");
  for (std::size_t i = 0; i < graph_.outputs.size(); ++i) {
    if (output_taken_[i]) continue;
    const ValueId value = graph_.outputs[i];
    const graph::Type& output_type = type(value);
    if (output_type.is_cache) return Error{"a cache cannot be an output"};
    const int buffer = add_buffer({.kind = Buffer::Kind::output,
                                   .index = static_cast<int>(i),
                                   .element_bytes = graph::size_in_bytes(output_type.dtype)});
    copy(layout(value), output_type.dtype,
         {buffer, Dim(0), output_type.shape, row_major(output_type.shape)}, output_type.dtype);
  }
  return {};
}

Layout Lowering::layout(ValueId value) {
  std::optional<Layout>& known = layouts_[static_cast<std::size_t>(value)];
  if (known) return *known;
  // Constants and scalars get memory when something other than a row kernel asks for them.
  const graph::Node& node = *graph_.producer(value);
  if (is_reshaped_constant(node)) {
    Layout whole = layout(node.operands[0]);
    known = view(node, type(value), whole).value_or(Layout{});
    return *known;
  }
  Result<Layout> constant = constant_layout(node);
  known = constant ? *constant : Layout{};
  return *known;
}

void Lowering::set_layout(ValueId value, Layout layout) {
  layouts_[static_cast<std::size_t>(value)] = std::move(layout);
}

Layout Lowering::destination(ValueId value) {
  const graph::Type& value_type = type(value);
  std::vector<Dim> strides = row_major(value_type.shape);
  if (auto forward = forwarded_.find(value); forward != forwarded_.end()) {
    const graph::Node& cat = graph_.nodes[static_cast<std::size_t>(forward->second.consumer)];
    if (cat.op == Op::cat) {
      if (!layouts_[static_cast<std::size_t>(cat.results[0])]) {
        set_layout(cat.results[0], destination(cat.results[0]));
      }
      Layout whole = layout(cat.results[0]);
      const auto axis = static_cast<std::size_t>(cat.attribute<std::int64_t>("axis"));
      for (int i = 0; i < forward->second.operand; ++i) {
        whole.offset = whole.offset + type(cat.operands[static_cast<std::size_t>(i)]).shape[axis] *
                                          whole.strides[axis];
      }
      whole.shape = value_type.shape;
      return whole;
    }
  }
  for (std::size_t i = 0; i < graph_.outputs.size(); ++i) {
    if (graph_.outputs[i] != value) continue;
    output_taken_[i] = true;
    const int buffer = add_buffer({.kind = Buffer::Kind::output,
                                   .index = static_cast<int>(i),
                                   .element_bytes = graph::size_in_bytes(value_type.dtype)});
    return {buffer, Dim(0), value_type.shape, strides};
  }
  return row_major_arena(value_type.shape, value_type.dtype);
}

Layout Lowering::row_major_arena(const graph::Shape& shape, graph::DataType dtype) {
  const int buffer = add_buffer({.kind = Buffer::Kind::arena,
                                 .elements = dim(graph::element_count(shape)),
                                 .element_bytes = graph::size_in_bytes(dtype)});
  return {buffer, Dim(0), shape, row_major(shape)};
}

int Lowering::add_buffer(Buffer buffer) {
  state_->buffers.push_back(buffer);
  return static_cast<int>(state_->buffers.size()) - 1;
}

int Lowering::constant_buffer(const void* data, graph::DataType dtype) {
  auto [found, added] = constant_buffers_.try_emplace(data, -1);
  if (added) {
    found->second = add_buffer({.kind = Buffer::Kind::constant,
                                .constant = const_cast<void*>(data),
                                .element_bytes = graph::size_in_bytes(dtype)});
  }
  return found->second;
}

std::vector<std::string> Lowering::constant_sources(ValueId value) const {
  const graph::Node* node = graph_.producer(value);
  if (node != nullptr && is_reshaped_constant(*node)) return constant_sources(node->operands[0]);
  if (node == nullptr || node->op != Op::constant) return {};
  return joined_constants(*node);
}

// The filters of a convolution as the rows of a matrix: the same memory, which may be packed.
bool Lowering::is_reshaped_constant(const graph::Node& node) const {
  const graph::Node* source = node.op == Op::reshape ? graph_.producer(node.operands[0]) : nullptr;
  return source != nullptr && source->op == Op::constant && joined_constants(*source).size() == 1;
}

std::vector<std::string> joined_constants(const graph::Node& node) {
  const auto& source = node.attribute<std::string>("source");
  std::vector<std::string> names;
  std::size_t begin = 0;
  while (true) {
    const std::size_t end = source.find(';', begin);
    names.push_back(source.substr(begin, end - begin));
    if (end == std::string::npos) return names;
    begin = end + 1;
  }
}

Result<Layout> Lowering::constant_layout(const graph::Node& node) {
  const graph::Type& constant_type = type(node.results[0]);
  if (node.op == Op::scalar) {
    auto element = std::make_shared<graph::Tensor>(
        graph::Tensor::of(constant_type.dtype, {}, std::array{node.attribute<double>("value")}));
    state_->keep_alive.push_back(element);
    return Layout{constant_buffer(element->bytes.data(), constant_type.dtype), Dim(0), {}, {}};
  }
  std::vector<const TensorView*> parts;
  std::size_t bytes = 0;
  for (const std::string& name : constant_sources(node.results[0])) {
    const TensorView& part = constants_.at(name);
    read_in_place_.insert(name);
    if (WeightStore::is_token(part.data)) return Error{fmt::format("\"{}\" is packed", name)};
    parts.push_back(&part);
    bytes += static_cast<std::size_t>(element_count(part) * graph::size_in_bytes(part.dtype));
  }
  const void* data = parts[0]->data;
  if (parts.size() > 1) {  // merged along axis 0: one after the other
    auto merged = std::make_shared<std::vector<char>>(bytes);
    char* at = merged->data();
    for (const TensorView* part : parts) {
      const auto size =
          static_cast<std::size_t>(element_count(*part) * graph::size_in_bytes(part->dtype));
      std::memcpy(at, part->data, size);
      at += size;
    }
    data = merged->data();
    state_->keep_alive.push_back(merged);
  }
  return Layout{constant_buffer(data, constant_type.dtype), Dim(0), constant_type.shape,
                row_major(constant_type.shape)};
}

Layout Lowering::contiguous(const Layout& source, graph::DataType dtype) {
  if (is_row_major(source)) return source;
  Layout result = row_major_arena(source.shape, dtype);
  copy(source, dtype, result, dtype);
  return result;
}

Layout Lowering::unit_columns(const Layout& source, graph::DataType dtype) {
  const bool fits =
      source.shape.empty() || source.strides.back() == Dim(1) || source.shape.back() == Dim(1);
  return fits ? source : contiguous(source, dtype);
}

std::vector<TaskLoop> Lowering::task_loops(std::span<const Layout> layouts, std::size_t axes) {
  std::vector<TaskLoop> loops;
  for (const Loop& loop : collapse(layouts, axes)) {
    TaskLoop& added = loops.emplace_back(TaskLoop{dim(loop.size), {}});
    for (const Dim& stride : loop.strides) added.strides.push_back(dim(stride));
  }
  return loops;
}

std::optional<Lowering::Matrix> Lowering::matrix(const Layout& source, graph::DataType dtype) {
  const Layout columns = unit_columns(source, dtype);
  const std::vector<Loop> loops = collapse(std::span(&columns, 1), columns.shape.size() - 1);
  if (loops.size() > 1) return std::nullopt;
  return Matrix{operand(columns, dtype), loops.empty() ? Dim(1) : loops[0].size,
                loops.empty() ? columns.shape.back() : loops[0].strides[0], columns.buffer};
}

Operand Lowering::operand(const Layout& layout, graph::DataType dtype) {
  return {layout.buffer, dim(layout.offset), graph::size_in_bytes(dtype)};
}

HeadStrides Lowering::head_strides(const Layout& layout) {
  return {dim(layout.strides[0]), dim(layout.strides[1]), dim(layout.strides[2])};
}

void Lowering::begin_region(std::string name) {
  region_name_ = std::move(name);
  new_step_ = true;
}

void Lowering::add_task(Task task, const std::vector<int>& reads, const std::vector<int>& writes,
                        const Dim& work, const std::string& kernel) {
  const bool host = std::holds_alternative<HostTask>(task);
  const bool waits = std::any_of(reads.begin(), reads.end(),
                                 [&](int buffer) { return step_writes_.contains(buffer); });
  const bool after_host = !state_->steps.empty() && state_->steps.back().host;
  if (new_step_ || waits || host || after_host) {
    state_->steps.emplace_back();
    step_writes_.clear();
    state_->steps.back().region = static_cast<int>(state_->regions.size());
    state_->regions.push_back({.name = region_name_,
                               .kernel = "",
                               .fallback = false,
                               .reason = "",
                               .isa = "",
                               .flops = 0,
                               .weight_bytes = 0});
    state_->steps.back().work = dim(Dim(0));
    new_step_ = false;
  }
  Step& step = state_->steps.back();
  const int index = static_cast<int>(state_->steps.size()) - 1;
  step.host = host;
  step.attention = step.attention || std::holds_alternative<AttentionTask>(task);
  step_work_ = step.tasks.empty() ? work : step_work_ + work;
  step.work = dim(step_work_);
  RegionReport& report = state_->regions[static_cast<std::size_t>(step.region)];
  if (!kernel.empty()) report.kernel += (report.kernel.empty() ? "" : "; ") + kernel;
  report.isa = isa_mask_name(target_.isa);
  for (const std::vector<int>* touched : {&reads, &writes}) {
    for (int buffer : *touched) {
      if (buffer < 0) continue;
      Buffer& used = state_->buffers[static_cast<std::size_t>(buffer)];
      if (used.first_step < 0) used.first_step = index;
      used.last_step = index;
    }
  }
  step_writes_.insert(writes.begin(), writes.end());
  step.tasks.push_back(std::move(task));
}

Result<Program> compile(const graph::Graph& graph,
                        const std::map<std::string, TensorView>& constants, const Target& target,
                        const CompileOptions& options, std::shared_ptr<KernelLibrary> kernels,
                        std::shared_ptr<WeightStore> weights, const PackedCallback& packed) {
  if (!target.has(Isa::avx2)) {
    return Error{"this CPU has no AVX2 (with FMA, F16C and BMI): nothing can be compiled for it"};
  }
  return Lowering(graph, constants, target, options, std::move(kernels), std::move(weights), packed)
      .run();
}

}  // namespace tilewright::ops
