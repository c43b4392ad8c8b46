// Type rules of norms, contractions and the LLM composites.
//
// The result has the dtype of operand 0: weights, tables and masks may have another one, because
// how they are stored is a pass's choice.
//
// Tested by graph_test, filetests/verify.
#include <algorithm>
#include <array>

#include "graph/type_rules.h"

namespace tilewright::graph::type_rules {
namespace {

Status all_float(const Arguments& a) {
  for (const Type& operand : a.operands) {
    if (is_float(operand.dtype)) continue;
    return error("{} needs floating point operands, found {}", name(a.op), print(operand));
  }
  return {};
}

Result<Type> norm(const Arguments& a) {
  if (Status status = all_float(a); !status) return status.error();
  if (a.shape(0).empty()) return error("{} needs at least one axis", name(a.op));
  for (const Type& parameter : a.operands.subspan(1)) {
    if (parameter.shape == Shape{a.shape(0).back()}) continue;
    return error("{} over {} has a weight or bias {}", name(a.op), print(a.shape(0)),
                 print(parameter));
  }
  return tensor(a.operand(0).dtype, a.shape(0));
}

Status known_activation(const Arguments& a) {
  constexpr std::array<std::string_view, 5> known{"", "silu", "gelu", "gelu_tanh", "relu"};
  std::string activation = a.attribute_or<std::string>("activation", "");
  if (std::find(known.begin(), known.end(), activation) != known.end()) return {};
  return error("unknown activation \"{}\"", activation);
}

// x[..., k] times w[n, k]: [..., n]
Result<Shape> contract(const Arguments& a, const Shape& weight) {
  const Shape& x = a.shape(0);
  if (x.empty() || weight.size() != 2 || x.back() != weight[1]) {
    return error("{} of {} with a weight {}", name(a.op), print(x), print(weight));
  }
  Shape shape = x;
  shape.back() = weight[0];
  return shape;
}

// q, k, v, cache: [b, heads, s, d] and {kv_heads, d}.
Status heads_match(const Arguments& a, const Shape& q, const Dim& kv_heads) {
  const Dim& heads = q[1];
  if (!heads.divide_exactly(kv_heads)) {
    return error("{} query heads with {} key heads in {}", heads.print(), kv_heads.print(),
                 name(a.op));
  }
  return {};
}

Result<Type> attention_with_cache(const Arguments& a) {
  const Shape& q = a.shape(0);
  const Shape& cache = a.shape(1);
  if (!a.attribute<bool>("causal")) return error("attention over a cache is causal");
  if (q[3] != cache[1]) return error("attention of {} over {}", print(q), print(a.operand(1)));
  if (Status status = heads_match(a, q, cache[0]); !status) return status.error();
  return tensor(a.operand(0).dtype, q);
}

Status mask_fits(const Arguments& a) {
  const Type& mask = a.operand(3);
  if (mask.is_cache || (mask.dtype != DataType::boolean && !is_float(mask.dtype))) {
    return error("attention needs a bool or floating point mask, found {}", print(mask));
  }
  const Shape& q = a.shape(0);
  const Dim& keys = a.shape(1)[2];
  Shape shape = mask.shape;
  if (shape.empty() || shape.size() > 4 ||
      (shape.back() != Dim(1) && !may_be_equal(shape.back(), keys))) {
    return error("mask {} for {} queries and {} keys", print(mask.shape), q[2].print(),
                 keys.print());
  }
  shape.back() = 1;  // its length is compared with the keys at run time
  if (!broadcasts_to(shape, {q[0], q[1], q[2], 1})) {
    return error("mask {} does not broadcast to queries {}", print(mask.shape), print(q));
  }
  return {};
}

}  // namespace

Result<Type> rms_norm(const Arguments& a) { return norm(a); }
Result<Type> layer_norm(const Arguments& a) { return norm(a); }

Result<Type> linear(const Arguments& a) {
  if (Status status = all_float(a); !status) return status.error();
  if (Status status = known_activation(a); !status) return status.error();
  bool bias = a.attribute_or("bias", false), residual = a.attribute_or("residual", false);
  std::size_t expected = 2 + bias + residual;
  if (a.operands.size() != expected) {
    return error("linear with bias = {} and residual = {} takes {} operands, found {}", bias,
                 residual, expected, a.operands.size());
  }
  Shape weight = a.shape(1);
  if (a.attribute_or("transposed", false) && weight.size() == 2) std::swap(weight[0], weight[1]);
  Result<Shape> shape = contract(a, weight);
  if (!shape) return shape.error();
  if (bias && a.shape(2) != Shape{shape->back()}) {
    return error("bias {} for {} columns", print(a.shape(2)), shape->back().print());
  }
  if (residual && a.operands.back() != tensor(a.operand(0).dtype, *shape)) {
    return error("residual {} for a result {}", print(a.operands.back()), print(*shape));
  }
  return tensor(a.operand(0).dtype, std::move(*shape));
}

Result<Type> expert_linear(const Arguments& a) {
  const Shape &x = a.shape(0), &w = a.shape(1), &indices = a.shape(2);
  const bool bias = a.attribute_or("bias", false), turned = a.attribute_or("transposed", false);
  const DataType type = a.operand(0).dtype;
  if (a.operands.size() != (bias ? 4u : 3u) || x.size() != 2 || w.size() != 3 ||
      indices.size() != 2 || !is_float(type) || !is_float(a.operand(1).dtype) ||
      a.operand(2).dtype != DataType::i64 || x[0] != indices[0] || x[1] != w[turned ? 1 : 2]) {
    return error("expert_linear of {}, {} and {}", print(a.operand(0)), print(a.operand(1)),
                 print(a.operand(2)));
  }
  const Dim& columns = w[turned ? 2 : 1];
  if (bias && a.shape(3) != Shape{w[0], columns}) {
    return error("bias {} for {} experts of {} columns", print(a.shape(3)), w[0].print(),
                 columns.print());
  }
  return tensor(type, {x[0] * indices[1], columns});
}

Result<Type> matmul(const Arguments& a) {
  if (Status status = all_float(a); !status) return status.error();
  if (a.operand(0).dtype != a.operand(1).dtype) return error("matmul of different dtypes");
  Shape left = a.shape(0), right = a.shape(1);
  if (left.size() < 2 || right.size() < 2) return error("matmul needs operands of rank 2 or more");
  Dim rows = left[left.size() - 2], columns = right.back();
  if (left.back() != right[right.size() - 2]) {
    return error("matmul of {} and {}", print(left), print(right));
  }
  left.resize(left.size() - 2);
  right.resize(right.size() - 2);
  Result<Shape> shape = broadcast(left, right);
  if (!shape) return shape.error();
  shape->push_back(rows);
  shape->push_back(columns);
  return tensor(a.operand(0).dtype, std::move(*shape));
}

Result<Type> gated_mlp_up(const Arguments& a) {
  if (Status status = all_float(a); !status) return status.error();
  if (Status status = known_activation(a); !status) return status.error();
  if (a.shape(1) != a.shape(2)) {
    return error("gate {} and up {} differ", print(a.shape(1)), print(a.shape(2)));
  }
  Result<Shape> shape = contract(a, a.shape(1));
  if (!shape) return shape.error();
  return tensor(a.operand(0).dtype, std::move(*shape));
}

Result<Type> rope(const Arguments& a) {
  if (Status status = all_float(a); !status) return status.error();
  if (a.attribute<std::string>("style") != "half") return error("style must be \"half\"");
  const Shape& x = a.shape(0);
  if (x.size() != 4) return error("rope needs [b, heads, s, d], found {}", print(x));
  if (x[3].is_constant() && x[3].constant() % 2 != 0) {
    return error("rope over {} elements, an odd number", x[3].print());
  }
  if (!broadcasts_to(a.shape(1), x) || !broadcasts_to(a.shape(2), x)) {
    return error("tables {} and {} do not broadcast to {}", print(a.shape(1)), print(a.shape(2)),
                 print(x));
  }
  return tensor(a.operand(0).dtype, x);
}

Result<Type> kv_append(const Arguments& a) {
  for (std::size_t i : {1, 2}) {
    if (is_float(a.operand(i).dtype)) continue;
    return error("kv_append of {}", print(a.operand(i)));
  }
  if (!a.operand(0).is_cache || a.operand(1).is_cache || a.operand(2).is_cache) {
    return error("kv_append needs a cache, keys and values");
  }
  const Shape& cache = a.shape(0);
  const Shape& k = a.shape(1);
  if (k != a.shape(2) || k.size() != 4 || k[1] != cache[0] || k[3] != cache[1]) {
    return error("kv_append of {} and {} to {}", print(k), print(a.shape(2)), print(a.operand(0)));
  }
  return a.operand(0);
}

namespace {

Result<Type> cache_contents(const Arguments& a) {
  const Type& cache = a.operand(0);
  const Shape& shape = a.attribute<Shape>("shape");
  const DataType dtype = a.attribute_or("dtype", cache.dtype);
  if (!cache.is_cache || shape.size() != 4 || shape[1] != cache.shape[0] ||
      shape[3] != cache.shape[1] || !is_float(dtype)) {
    return error("{} {} of {}", name(a.op), print(shape), print(cache));
  }
  return tensor(dtype, shape);
}

}  // namespace

Result<Type> cache_keys(const Arguments& a) { return cache_contents(a); }
Result<Type> cache_values(const Arguments& a) { return cache_contents(a); }

Result<Type> causal_mask(const Arguments& a) {
  const Shape& shape = a.attribute<Shape>("shape");
  const DataType dtype = a.attribute_or("dtype", DataType::f32);
  if (shape.size() < 2 || !is_float(dtype)) return error("a mask {}", print(shape));
  if (a.attribute_or("window", std::int64_t{1}) < 1) return error("a window is positive");
  return tensor(dtype, shape);
}

namespace {

// The numbers per head, the window, and how many operands there are.
Status attention_form_fits(const Arguments& a) {
  const bool cache = a.operand(1).is_cache;
  const AttentionOperands form = attention_operands(cache, a.operands.size(), a.attributes);
  const std::size_t most = cache ? 2 : 4;
  const std::size_t plain =
      a.operands.size() - (form.slopes >= 0 ? 1 : 0) - (form.sinks >= 0 ? 1 : 0);
  if (plain > most || plain < (cache ? 2 : 3)) {
    return error("attention takes a cache, or keys and values");
  }
  for (int index : {form.slopes, form.sinks}) {
    if (index < 0) continue;
    const Type& numbers = a.operand(static_cast<std::size_t>(index));
    if (numbers != tensor(DataType::f32, {a.shape(0)[1]})) {
      return error("attention needs f32[{}] for its slopes and sinks, found {}",
                   a.shape(0)[1].print(), print(numbers));
    }
  }
  if (form.slopes >= 0 && form.sinks >= 0) return error("attention has slopes or sinks, not both");
  const bool causal = a.attribute<bool>("causal");
  if (form.mask >= 0 && causal) return error("attention is causal or has a mask, not both");
  if (a.attributes.contains("window") && (!causal || a.attribute<std::int64_t>("window") < 1)) {
    return error("a window is positive and of causal attention");
  }
  return {};
}

}  // namespace

Result<Type> attention(const Arguments& a) {
  const Type& q = a.operand(0);
  if (q.is_cache || !is_float(q.dtype) || q.shape.size() != 4) {
    return error("attention needs queries [b, heads, s, d], found {}", print(q));
  }
  if (a.operand(1).is_cache) {
    if (Status status = attention_form_fits(a); !status) return status.error();
    return attention_with_cache(a);
  }
  if (Status status = attention_form_fits(a); !status) return status.error();
  const Type& k = a.operand(1);
  const Type& v = a.operand(2);
  bool fits = !v.is_cache && is_float(k.dtype) && is_float(v.dtype) && k.shape.size() == 4 &&
              v.shape.size() == 4 && k.shape[0] == q.shape[0] && v.shape[0] == q.shape[0] &&
              k.shape[1] == v.shape[1] && k.shape[3] == q.shape[3] &&
              may_be_equal(k.shape[2], v.shape[2]);
  if (!fits) return error("attention of {}, {} and {}", print(q), print(k), print(v));
  if (Status status = heads_match(a, q.shape, k.shape[1]); !status) return status.error();
  if (attention_operands(false, a.operands.size(), a.attributes).mask >= 0) {
    if (Status status = mask_fits(a); !status) return status.error();
  }
  Shape shape = q.shape;
  shape[3] = v.shape[3];
  return tensor(q.dtype, std::move(shape));
}

}  // namespace tilewright::graph::type_rules
