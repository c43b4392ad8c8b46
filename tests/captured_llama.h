// Graphs of Llama-shaped decoders as the front ends capture them, node for node, for tests of
// passes: unfused norms and rope, conversions that do nothing, a factor 1.0, views per layer.
//
// Used by passes_test.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "graph/graph.h"

namespace tilewright::graph {

enum class Capture {
  prefill,   // torch.compile: caches start empty, keys and values are returned
  decode,    // torch.compile: caches are inputs, new ones (cat) are returned
  in_cache,  // llm.optimize: caches are parameters that kv_append writes
};

struct Llama {
  Capture capture = Capture::decode;
  int layers = 2;
  std::int64_t hidden = 12, heads = 4, kv_heads = 2, head_dim = 4, mlp = 20, vocabulary = 24;
  DataType dtype = DataType::f32;
};

class CapturedLlama {
 public:
  explicit CapturedLlama(const Llama& shape) : shape_(shape) { graph_.name = "llama"; }

  Graph build() {
    const ValueId tokens = graph_.add_parameter("tokens", tensor(DataType::i64, {batch_, length_}));
    const ValueId positions =
        graph_.add_parameter("positions", tensor(DataType::i64, {batch_, length_}));
    const ValueId table = weight("embed_tokens", {shape_.vocabulary, shape_.hidden});
    ValueId x = add(Op::embedding, {table, tokens});
    rotary_table(positions);
    for (int i = 0; i < shape_.layers; ++i) x = layer(x, "layers." + std::to_string(i) + ".");
    x = norm(x, "norm");
    const Attributes last = {
        {"axis", std::int64_t{1}}, {"start", Shape{length_ - 1}}, {"end", Shape{length_}}};
    graph_.outputs.push_back(add(Op::linear, {add(Op::slice, {x}, last), table}));
    return std::move(graph_);
  }

 private:
  static Type tensor(DataType type, Shape shape) { return {type, std::move(shape), false, "", ""}; }
  ValueId add(Op op, std::vector<ValueId> operands, Attributes attributes = {}) {
    return graph_.append(op, std::move(operands), std::move(attributes)).value();
  }
  ValueId weight(const std::string& name, Shape shape) {
    return graph_.add_constant(name + ".weight", tensor(shape_.dtype, std::move(shape)));
  }
  ValueId scalar(double value) { return add(Op::scalar, {}, {{"value", value}}); }
  ValueId convert(ValueId x, DataType type) { return add(Op::convert, {x}, {{"dtype", type}}); }
  ValueId reshape(ValueId x, Shape shape) {
    return add(Op::reshape, {x}, {{"shape", std::move(shape)}});
  }
  ValueId swap_heads(ValueId x) {
    return add(Op::permute, {x}, {{"order", std::vector<std::int64_t>{0, 2, 1, 3}}});
  }
  ValueId cat(ValueId a, ValueId b, std::int64_t axis) {
    return add(Op::cat, {a, b}, {{"axis", axis}});
  }

  void rotary_table(ValueId positions) {
    const ValueId frequencies =
        graph_.add_constant("rotary.inv_freq", tensor(DataType::f32, {shape_.head_dim / 2}));
    ValueId angles = convert(reshape(positions, {batch_, length_, 1}), DataType::f32);
    angles = add(Op::mul, {angles, convert(frequencies, DataType::f32)});
    angles = cat(angles, angles, 2);
    auto scaled = [&](Op function) {
      return convert(add(Op::mul, {add(function, {angles}), scalar(1.0)}), shape_.dtype);
    };
    cos_ = scaled(Op::cos);
    sin_ = scaled(Op::sin);
  }

  ValueId norm(ValueId x, const std::string& name) {
    const ValueId wide = convert(x, DataType::f32);
    const ValueId squares = add(Op::pow, {wide}, {{"exponent", 2.0}});
    const ValueId mean = add(Op::add, {add(Op::mean, {squares}), scalar(1e-5)});
    const ValueId normal = add(Op::mul, {wide, add(Op::rsqrt, {mean})});
    return add(Op::mul, {weight(name, {shape_.hidden}), convert(normal, shape_.dtype)});
  }

  ValueId heads(ValueId x, const std::string& name, std::int64_t count) {
    x = add(Op::linear, {x, weight(name, {count * shape_.head_dim, shape_.hidden})});
    return swap_heads(reshape(x, {batch_, length_, count, shape_.head_dim}));
  }

  ValueId half(ValueId x, std::int64_t start) {
    return add(Op::slice, {x},
               {{"axis", std::int64_t{3}},
                {"start", Shape{start}},
                {"end", Shape{start + shape_.head_dim / 2}}});
  }

  ValueId rope(ValueId x) {
    const Shape broadcast = {batch_, 1, length_, shape_.head_dim};
    const ValueId cos = reshape(cos_, broadcast), sin = reshape(sin_, broadcast);
    const ValueId straight = add(Op::mul, {x, cos});
    const ValueId low = half(x, 0), high = half(x, shape_.head_dim / 2);
    const ValueId rotated = add(Op::mul, {cat(add(Op::neg, {high}), low, 3), sin});
    return add(Op::add, {straight, rotated});
  }

  ValueId attention(ValueId x, const std::string& name) {
    ValueId q = heads(x, name + "q_proj", shape_.heads);
    ValueId k = heads(x, name + "k_proj", shape_.kv_heads);
    ValueId v = heads(x, name + "v_proj", shape_.kv_heads);
    q = rope(q);
    k = rope(k);
    const bool causal = shape_.capture != Capture::decode;
    const Attributes attributes = {{"scale", 0.5}, {"causal", causal}};
    if (shape_.capture == Capture::in_cache) {
      const ValueId cache = graph_.add_parameter(
          name + "kv", Type{shape_.dtype, {shape_.kv_heads, shape_.head_dim}, true, "", ""});
      return add(Op::attention, {q, add(Op::kv_append, {cache, k, v})}, attributes);
    }
    const Dim past = shape_.capture == Capture::prefill ? Dim(0) : Dim::symbol("past");
    const Type before = tensor(shape_.dtype, {batch_, shape_.kv_heads, past, shape_.head_dim});
    auto append = [&](const std::string& cache, ValueId x) {
      if (shape_.capture == Capture::prefill) {
        // An empty piece: no constant may have a symbol in its type.
        const Attributes none = {{"axis", std::int64_t{2}}, {"start", Shape{0}}, {"end", Shape{0}}};
        return cat(add(Op::slice, {x}, none), x, 2);
      }
      return cat(graph_.add_parameter(cache, before), x, 2);
    };
    k = append(name + "k", k);
    v = append(name + "v", v);
    graph_.outputs.push_back(k);
    graph_.outputs.push_back(v);
    return add(Op::attention, {q, k, v}, attributes);
  }

  ValueId layer(ValueId x, const std::string& name) {
    const std::int64_t width = shape_.heads * shape_.head_dim;
    ValueId a = attention(norm(x, name + "input_layernorm"), name + "self_attn.");
    a = reshape(a, {batch_, shape_.heads, length_, shape_.head_dim});
    a = reshape(swap_heads(a), {batch_, length_, width});
    a = add(Op::linear, {a, weight(name + "self_attn.o_proj", {shape_.hidden, width})});
    x = convert(add(Op::add, {x, a}), shape_.dtype);
    const ValueId n = norm(x, name + "post_attention_layernorm");
    const ValueId gate = weight(name + "mlp.gate_proj", {shape_.mlp, shape_.hidden});
    const ValueId activated = add(Op::silu, {add(Op::linear, {n, gate})});
    const ValueId up = weight(name + "mlp.up_proj", {shape_.mlp, shape_.hidden});
    const ValueId m = add(Op::mul, {activated, add(Op::linear, {n, up})});
    const ValueId down = weight(name + "mlp.down_proj", {shape_.hidden, shape_.mlp});
    return add(Op::add, {x, add(Op::linear, {m, down})});
  }

  Llama shape_;
  Graph graph_;
  const Dim batch_ = Dim::symbol("b"), length_ = Dim::symbol("s");
  ValueId cos_ = ValueId::none, sin_ = ValueId::none;
};

}  // namespace tilewright::graph
