// Lowering of rope, cache appends and attention.
// Tested by program_test.
#include <fmt/format.h>

#include <utility>

#include "ops/attention/merge_kernel.h"
#include "ops/attention/prefill_kernel.h"
#include "ops/gemm/arithmetic.h"
#include "ops/lowering.h"
#include "ops/quantize_kernel.h"
#include "ops/rope_kernel.h"

namespace tilewright::ops {

using graph::DataType;
using graph::Dim;
using graph::Op;
using graph::Shape;
using graph::ValueId;

Status Lowering::lower_rope(const graph::Node& node) {
  const ValueId input = node.operands[0], result = node.results[0];
  const Shape& shape = type(result).shape;
  if (shape.size() != 4) return Error{"rope takes [batch, heads, tokens, head_dim]"};
  if (node.attribute<std::string>("style") != "half")
    return Error{"only the half style has a kernel"};
  if (!shape[3].is_constant()) return Error{"its head_dim is symbolic"};
  RopeKernel spec{target_.lanes(), static_cast<int>(shape[3].constant()), type(input).dtype,
                  type(node.operands[1]).dtype, type(result).dtype};
  if (type(node.operands[2]).dtype != spec.table) return Error{"cos and sin differ in dtype"};

  Layout x = unit_columns(layout(input), spec.input);
  Layout tables[2];
  for (int i = 0; i < 2; ++i) {
    const ValueId table = node.operands[static_cast<std::size_t>(i) + 1];
    tables[i] = broadcast(unit_columns(layout(table), spec.table), shape);
    if (!(tables[i].strides[3] == Dim(1))) return Error{"cos and sin repeat along head_dim"};
  }
  // One row of the tables serves all of an axis: the heads, wherever the model has them.
  const auto is_shared = [&](std::size_t axis) {
    return shape[axis] == Dim(1) ||
           (tables[0].strides[axis] == Dim(0) && tables[1].strides[axis] == Dim(0));
  };
  const bool tokens_first = !is_shared(1);
  if (tokens_first && !is_shared(2)) return Error{"cos and sin differ between heads"};
  for (int axis : {0, 1, 2}) {
    if (!(tables[0].strides[static_cast<std::size_t>(axis)] ==
          tables[1].strides[static_cast<std::size_t>(axis)])) {
      return Error{"cos and sin lie differently"};
    }
  }
  const auto heads_first = [&](Layout& layout) {
    if (!tokens_first) return;
    std::swap(layout.shape[1], layout.shape[2]);
    std::swap(layout.strides[1], layout.strides[2]);
  };
  for (Layout* layout : {&x, &tables[0], &tables[1]}) heads_first(*layout);
  RopeTask task;
  task.batch = dim(x.shape[0]);
  task.heads = dim(x.shape[1]);
  task.tokens = dim(x.shape[2]);
  task.x = operand(x, spec.input);
  task.x_strides = head_strides(x);
  task.cosine = operand(tables[0], spec.table);
  task.sine = operand(tables[1], spec.table);
  task.table_strides = head_strides(tables[0]);

  int written = 0;
  std::string kernels;  // of the report
  auto forward = forwarded_.find(result);
  const graph::Node* consumer =
      forward == forwarded_.end()
          ? nullptr
          : &graph_.nodes[static_cast<std::size_t>(forward->second.consumer)];
  const auto cache =
      consumer == nullptr ? cache_indices_.end() : cache_indices_.find(consumer->operands[0]);
  if (consumer != nullptr && consumer->op == Op::kv_append && cache != cache_indices_.end() &&
      !tokens_first) {
    const CacheParameter& parameter = state_->caches[static_cast<std::size_t>(cache->second)];
    if (parameter.dtype == DataType::i8) {
      const QuantizeKernel quantize{spec.lanes, spec.head_dim, spec.output};
      kernels = print(quantize);
      task.quantize = kernels_->request(kernels, [quantize] { return build(quantize); });
      task.scratch_row_bytes = spec.head_dim * graph::size_in_bytes(spec.output);
    } else {
      spec.output = parameter.dtype;
    }
    task.destination.cache = cache->second;
    task.destination.values = forward->second.operand == 2;
    written = cache_token(cache->second);
  } else {
    if (consumer != nullptr && consumer->op == Op::kv_append) forwarded_.erase(forward);
    Layout y = destination(result);
    set_layout(result, y);
    heads_first(y);
    task.destination.tensor = operand(y, spec.output);
    task.destination.strides = head_strides(y);
    written = y.buffer;
  }
  const std::string specification = print(spec);
  task.kernel = kernels_->request(specification, [spec] { return build(spec); });
  add_task(std::move(task), {x.buffer, tables[0].buffer, tables[1].buffer}, {written},
           work_of(graph_, node), specification + kernels);
  return {};
}

Status Lowering::lower_append(const graph::Node& node) {
  const auto found = cache_indices_.find(node.operands[0]);
  if (found == cache_indices_.end()) return Error{"its cache is not a parameter"};
  const int cache = found->second;
  cache_indices_[node.results[0]] = cache;
  CacheParameter& parameter = state_->caches[static_cast<std::size_t>(cache)];
  if (parameter.appended) return Error{"a cache can be appended to once per step"};
  const Shape& shape = type(node.operands[1]).shape;
  parameter.appended = true;
  parameter.batch = dim(shape[0]);
  parameter.tokens = dim(shape[2]);
  for (std::size_t i : {1, 2}) {
    const ValueId value = node.operands[i];
    const auto forward = forwarded_.find(value);
    if (forward != forwarded_.end()) continue;
    const Layout x = unit_columns(layout(value), type(value).dtype);
    AppendTask task;
    task.batch = dim(shape[0]);
    task.heads = dim(shape[1]);
    task.tokens = dim(shape[2]);
    task.columns = parameter.head_dim;
    task.x = operand(x, type(value).dtype);
    task.x_strides = head_strides(x);
    task.destination.cache = cache;
    task.destination.values = i == 2;
    const auto add = [&](const auto& spec) {
      const std::string specification = print(spec);
      task.kernel = kernels_->request(specification, [spec] { return build(spec); });
      add_task(std::move(task), {x.buffer}, {cache_token(cache)}, Dim(0), specification);
    };
    const DataType from = type(value).dtype;
    task.quantizes = parameter.dtype == DataType::i8;
    if (task.quantizes) {
      add(QuantizeKernel{target_.lanes(), static_cast<int>(parameter.head_dim), from});
    } else {
      add(CopyKernel{target_.lanes(), from, parameter.dtype});
    }
  }
  return {};
}

Status Lowering::lower_attention(const graph::Node& node) {
  const ValueId query = node.operands[0], result = node.results[0];
  const Shape& shape = type(query).shape;
  const auto cache = cache_indices_.find(node.operands[1]);
  const bool cached = cache != cache_indices_.end();
  if (shape.size() != 4) return Error{"attention takes [batch, heads, tokens, head_dim]"};
  const Dim kv_heads = cached ? type(node.operands[1]).shape[0] : type(node.operands[1]).shape[1];
  if (!shape[1].is_constant() || !shape[3].is_constant() || !kv_heads.is_constant()) {
    return Error{"its heads or head_dim are symbolic"};
  }
  if (shape[1].constant() % kv_heads.constant() != 0) return Error{"heads do not divide evenly"};
  const graph::AttentionOperands form =
      graph::attention_operands(cached, node.operands.size(), node.attributes);

  AttentionTask task;
  task.spec.lanes = target_.lanes();
  task.spec.prefetch_level = static_cast<int>(options_.choices.prefetch_keys_level);
  task.spec.prefetch_only_jumps = options_.choices.prefetch_only_jumps != 0;
  task.spec.group = static_cast<int>(shape[1].constant() / kv_heads.constant());
  task.spec.head_dim = static_cast<int>(shape[3].constant());
  task.spec.input = type(query).dtype;
  task.spec.cache = type(node.operands[1]).dtype;
  task.scale = static_cast<float>(node.attribute<double>("scale"));
  task.softcap = static_cast<float>(node.attribute_or("softcap", 0.0));
  task.spec.softcap = task.softcap != 0;
  task.window = node.attribute_or("window", std::int64_t{0});
  task.causal = node.attribute<bool>("causal");
  task.batch = dim(shape[0]);
  task.kv_heads = dim(kv_heads);
  task.queries = dim(shape[2]);
  std::vector<int> reads;

  const Layout q = unit_columns(layout(query), task.spec.input);
  task.q = operand(q, task.spec.input);
  task.q_strides = head_strides(q);
  reads.push_back(q.buffer);
  if (cached) {
    task.cache = cache->second;
    reads.push_back(cache_token(cache->second));
  } else {
    const ValueId keys = node.operands[1], values = node.operands[2];
    if (type(keys).shape.size() != 4 || !(type(values).shape[3] == shape[3])) {
      return Error{"keys and values have different head_dims"};
    }
    if (type(values).dtype != task.spec.cache) return Error{"keys and values differ in dtype"};
    const Layout k = unit_columns(layout(keys), task.spec.cache);
    const Layout v = unit_columns(layout(values), task.spec.cache);
    task.k = operand(k, task.spec.cache);
    task.v = operand(v, task.spec.cache);
    task.k_strides = head_strides(k);
    task.v_strides = head_strides(v);
    task.keys = dim(type(keys).shape[2]);
    task.values_keys = dim(type(values).shape[2]);
    reads.insert(reads.end(), {k.buffer, v.buffer});
    if (form.mask >= 0) {
      const ValueId mask = node.operands[3];
      const DataType mask_type = type(mask).dtype;
      if (mask_type != DataType::boolean && mask_type != DataType::f32) {
        return Error{"its mask is neither bool nor f32"};
      }
      Shape full = shape;
      full[3] = type(keys).shape[2];
      const Layout rows = broadcast(unit_columns(layout(mask), mask_type), full);
      if (!(rows.strides[1] == Dim(0)) && task.spec.group > 1) {
        return Error{"its mask differs between heads that share keys"};
      }
      if (!(rows.strides[3] == Dim(1)) && !(full[3] == Dim(1))) {
        return Error{"its mask repeats along the keys"};
      }
      task.spec.mask = mask_type == DataType::boolean ? MaskKind::boolean : MaskKind::additive;
      task.mask = operand(rows, mask_type);
      task.mask_strides = head_strides(rows);
      reads.push_back(rows.buffer);
    }
  }
  task.spec.slopes = form.slopes >= 0;
  task.spec.sinks = form.sinks >= 0;
  for (auto [index, numbers] : {std::pair(form.slopes, &task.slopes), {form.sinks, &task.sinks}}) {
    if (index < 0) continue;
    const ValueId value = node.operands[static_cast<std::size_t>(index)];
    const Layout row = contiguous(layout(value), DataType::f32);
    *numbers = operand(row, DataType::f32);
    reads.push_back(row.buffer);
  }
  if (Status possible = supported(task.spec); !possible) return possible;

  Layout output = destination(result);
  if (state_->buffers[static_cast<std::size_t>(output.buffer)].kind == Buffer::Kind::arena) {
    // As [batch, tokens, heads, head_dim] in memory: what the output projection reads needs no
    // copy.
    output.strides = {shape[1] * shape[2] * shape[3], shape[3], shape[1] * shape[3], Dim(1)};
  }
  set_layout(result, output);
  task.output = operand(output, task.spec.input);
  task.output_strides = head_strides(output);
  task.spec.dots = attention_by_dots(target_, task.spec);
  task.spec.integers = attention_in_integers(target_, task.spec);
  const AttentionKernel spec = task.spec;
  const std::string specification = print(spec);
  task.kernel = kernels_->request(specification, [spec] { return build(spec); });
  task.merge = kernels_->request(print_merge(spec), [spec] { return build_merge(spec); });
  task.few_queries = options_.choices.few_queries;
  task.arithmetic = choose_arithmetic(target_, spec);
  const PrefillKernel prefill{spec, task.arithmetic};
  task.prefill = kernels_->request(print(prefill), [prefill] { return build(prefill); });
  const std::string report = fmt::format("{}; many queries: {}", specification, print(prefill));
  add_task(std::move(task), reads, {output.buffer}, Dim(0), report);
  return {};
}

}  // namespace tilewright::ops
