// References of normalisations, contractions and the LLM composites.
//
// A composite rounds once, at its end: what lies between is in double. A kernel that rounds its
// accumulators to f32 differs from this by the error that its test allows.
//
// Tested by interpret_test, filetests/run.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "graph/reference.h"

namespace tilewright::graph::reference {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// function(row values, first offset) for every row of operand 0.
template <class Function>
Status each_row(Step& step, Function function) {
  const Tensor& x = step.tensor(0);
  std::int64_t columns = x.shape.back();
  for (std::int64_t begin = 0; begin < x.count(); begin += columns) {
    std::vector<double> row;
    for (std::int64_t i = 0; i < columns; ++i) row.push_back(x.get(begin + i));
    function(row);
    for (std::int64_t i = 0; i < columns; ++i) {
      step.result.set(begin + i, row[static_cast<std::size_t>(i)]);
    }
  }
  return {};
}

double mean_of(const std::vector<double>& row) {
  double sum = 0;
  for (double value : row) sum += value;
  return sum / static_cast<double>(row.size());
}

// In place.
void softmax_row(std::vector<double>& row) {
  double largest = -infinity;
  for (double value : row) largest = std::isnan(value) ? value : std::max(largest, value);
  double sum = 0;
  for (double& value : row) sum += value = std::exp(value - largest);
  for (double& value : row) value /= sum;
}

// sum over k of x[row, k] * w[column, k], or w[k, column]
double dot(const Tensor& x, std::int64_t row, const Tensor& w, std::int64_t column,
           bool transposed = false) {
  std::int64_t k = w.shape[transposed ? 0 : 1], columns = w.shape[1];
  double sum = 0;
  for (std::int64_t i = 0; i < k; ++i) {
    sum += x.get(row * k + i) * w.get(transposed ? i * columns + column : column * k + i);
  }
  return sum;
}

AttentionOperands form_of(const Step& step) {
  return attention_operands(step.is_cache(1), step.operands.size(), step.node.attributes);
}

// Keys and values of attention, from a cache or from tensors [b, kv_heads, t, d].
struct KeysAndValues {
  const Cache* cache = nullptr;
  const Tensor* k = nullptr;
  const Tensor* v = nullptr;

  std::int64_t heads() const { return cache != nullptr ? cache->kv_heads : k->shape[1]; }
  std::int64_t tokens() const { return cache != nullptr ? cache->tokens : k->shape[2]; }
  std::int64_t value_size() const { return cache != nullptr ? cache->head_dim : v->shape[3]; }
  double key(std::int64_t b, std::int64_t head, std::int64_t token, std::int64_t i) const {
    if (cache != nullptr) return cache->keys[cache->index(token, b, head, i)];
    return k->get(offset_of({b, head, token, i}, k->shape));
  }
  double value(std::int64_t b, std::int64_t head, std::int64_t token, std::int64_t i) const {
    if (cache != nullptr) return cache->values[cache->index(token, b, head, i)];
    return v->get(offset_of({b, head, token, i}, v->shape));
  }
};

// What the mask adds to the score of one key.
double mask_term(const Tensor& mask, const Sizes& at) {
  std::int64_t offset = offset_of(at, mask.shape);
  if (mask.dtype != DataType::boolean) return mask.get(offset);
  return mask.get_integer(offset) != 0 ? 0 : -infinity;
}

// The output row of query `query` of head `head` of sequence b.
std::vector<double> attend(const Step& step, const KeysAndValues& source, std::int64_t b,
                           std::int64_t head, std::int64_t query) {
  const Tensor& q = step.tensor(0);
  double scale = step.node.attribute<double>("scale");
  bool causal = step.node.attribute<bool>("causal");
  const AttentionOperands form = form_of(step);
  const auto per_head = [&](int operand) {
    return step.tensor(static_cast<std::size_t>(operand)).get(head);
  };
  const double softcap = step.node.attribute_or("softcap", 0.0);
  std::int64_t kv_head = head / (q.shape[1] / source.heads());
  std::int64_t tokens = source.tokens();
  // A cache ends with this step's tokens; plain tensors are aligned at their beginnings.
  std::int64_t last = source.cache != nullptr ? tokens - q.shape[2] + query : query;
  const std::int64_t first = last + 1 - step.node.attribute_or("window", last + 1);
  std::vector<double> scores;
  for (std::int64_t token = 0; token < tokens; ++token) {
    double score = 0;
    for (std::int64_t i = 0; i < q.shape[3]; ++i) {
      score += q.get(offset_of({b, head, query, i}, q.shape)) * source.key(b, kv_head, token, i);
    }
    score *= scale;
    if (softcap != 0) score = softcap * std::tanh(score / softcap);
    if (form.slopes >= 0) score += per_head(form.slopes) * static_cast<double>(token);
    if (form.mask >= 0) score += mask_term(step.tensor(3), {b, head, query, token});
    scores.push_back(causal && (token > last || token < first) ? -infinity : score);
  }
  if (form.sinks >= 0) scores.push_back(per_head(form.sinks));
  std::vector<double> result(static_cast<std::size_t>(source.value_size()), 0);
  // ATen's safe softmax: a query that may see nothing gives zeros.
  auto masked = [](double score) { return score == -infinity; };
  if (std::all_of(scores.begin(), scores.end(), masked)) return result;
  softmax_row(scores);
  for (std::int64_t token = 0; token < tokens; ++token) {
    double weight = scores[static_cast<std::size_t>(token)];
    for (std::size_t i = 0; i < result.size(); ++i) {
      // A masked key has no part, even if its value is not finite.
      if (weight == 0) continue;
      result[i] += weight * source.value(b, kv_head, token, static_cast<std::int64_t>(i));
    }
  }
  return result;
}

Status check_lengths(const Step& step, const KeysAndValues& source) {
  const Sizes& q = step.tensor(0).shape;
  if (source.cache != nullptr) {
    if (source.cache->batch != q[0] || source.cache->tokens < q[2]) {
      return Error{fmt::format("a cache of {} sequences and {} tokens for {} of {}",
                               source.cache->batch, source.cache->tokens, q[0], q[2])};
    }
    return {};
  }
  if (source.k->shape[2] != source.v->shape[2]) {
    return Error{fmt::format("{} keys and {} values", source.k->shape[2], source.v->shape[2])};
  }
  if (form_of(step).mask >= 0) {
    std::int64_t masked = step.tensor(3).shape.back();
    if (masked != 1 && masked != source.tokens()) {
      return Error{fmt::format("a mask of {} for {} keys", masked, source.tokens())};
    }
  }
  return {};
}

}  // namespace

Status softmax(Step& step) { return each_row(step, softmax_row); }

Status rms_norm(Step& step) {
  double eps = step.node.attribute<double>("eps");
  double offset = step.node.attribute_or("plus_one", false) ? 1 : 0;
  return each_row(step, [&](std::vector<double>& row) {
    double squares = 0;
    for (double value : row) squares += value * value;
    double factor = 1 / std::sqrt(squares / static_cast<double>(row.size()) + eps);
    for (std::size_t i = 0; i < row.size(); ++i) {
      row[i] *= factor;
      if (step.operands.size() > 1) {
        row[i] *= offset + step.tensor(1).get(static_cast<std::int64_t>(i));
      }
    }
  });
}

Status layer_norm(Step& step) {
  double eps = step.node.attribute<double>("eps");
  return each_row(step, [&](std::vector<double>& row) {
    double mean = mean_of(row), squares = 0;
    for (double value : row) squares += (value - mean) * (value - mean);
    double factor = 1 / std::sqrt(squares / static_cast<double>(row.size()) + eps);
    for (std::size_t i = 0; i < row.size(); ++i) {
      auto column = static_cast<std::int64_t>(i);
      row[i] = (row[i] - mean) * factor;
      if (step.operands.size() > 1) row[i] *= step.tensor(1).get(column);
      if (step.operands.size() > 2) row[i] += step.tensor(2).get(column);
    }
  });
}

// + bias, activation, + residual, in this order.
Status linear(Step& step) {
  const Tensor& w = step.tensor(1);
  bool bias = step.node.attribute_or("bias", false);
  bool residual = step.node.attribute_or("residual", false);
  std::string activation = step.node.attribute_or<std::string>("activation", "");
  const bool transposed = step.node.attribute_or("transposed", false);
  std::int64_t columns = w.shape[transposed ? 1 : 0];
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    std::int64_t column = i % columns;
    double sum = dot(step.tensor(0), i / columns, w, column, transposed);
    if (bias) sum += step.tensor(2).get(column);
    sum = activate(activation, sum);
    if (residual) sum += step.tensor(step.operands.size() - 1).get(i);
    step.result.set(i, sum);
  }
  return {};
}

Status expert_linear(Step& step) {
  const Tensor &x = step.tensor(0), &w = step.tensor(1), &indices = step.tensor(2);
  const bool transposed = step.node.attribute_or("transposed", false);
  const bool bias = step.node.attribute_or("bias", false);
  const std::int64_t k = x.shape[1], columns = w.shape[transposed ? 2 : 1];
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    const std::int64_t row = i / columns, column = i % columns;
    const std::int64_t expert = indices.get_integer(row);
    if (expert < 0 || expert >= w.shape[0]) {
      return Error{fmt::format("expert {} of {}", expert, w.shape[0])};
    }
    double sum = bias ? step.tensor(3).get(expert * columns + column) : 0;
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t place = transposed ? j * columns + column : column * k + j;
      sum += x.get(row / indices.shape[1] * k + j) * w.get(expert * k * columns + place);
    }
    step.result.set(i, sum);
  }
  return {};
}

Status gated_mlp_up(Step& step) {
  const Tensor& x = step.tensor(0);
  const std::string& activation = step.node.attribute<std::string>("activation");
  std::int64_t columns = step.tensor(1).shape[0];
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    std::int64_t row = i / columns, column = i % columns;
    double gate = dot(x, row, step.tensor(1), column);
    step.result.set(i, activate(activation, gate) * dot(x, row, step.tensor(2), column));
  }
  return {};
}

Status matmul(Step& step) {
  const Tensor& a = step.tensor(0);
  const Tensor& b = step.tensor(1);
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    Sizes at = coordinates(i, step.result.shape);
    std::int64_t row = at[at.size() - 2], column = at.back();
    double sum = 0;
    for (std::int64_t k = 0; k < a.shape.back(); ++k) {
      at[at.size() - 2] = row;
      at.back() = k;
      double left = a.get(offset_of(at, a.shape));
      at[at.size() - 2] = k;
      at.back() = column;
      sum += left * b.get(offset_of(at, b.shape));
    }
    step.result.set(i, sum);
  }
  return {};
}

// rotate_half(x) = (-second half, first half)
Status rope(Step& step) {
  const Tensor& x = step.tensor(0);
  std::int64_t size = x.shape[3], half = size / 2;
  for (std::int64_t i = 0; i < x.count(); ++i) {
    Sizes at = coordinates(i, x.shape);
    bool first = at[3] < half;
    double partner = first ? -x.get(i + half) : x.get(i - half);
    double cosine = step.tensor(1).get(offset_of(at, step.tensor(1).shape));
    double sine = step.tensor(2).get(offset_of(at, step.tensor(2).shape));
    step.result.set(i, x.get(i) * cosine + partner * sine);
  }
  return {};
}

Status kv_append(Step& step) {
  Cache cache = std::get<Cache>(*step.operands[0]);
  const Tensor& k = step.tensor(1);
  const Tensor& v = step.tensor(2);
  if (cache.tokens == 0) cache.batch = k.shape[0];
  if (cache.batch != k.shape[0]) {
    return Error{fmt::format("{} sequences to a cache of {}", k.shape[0], cache.batch)};
  }
  for (std::int64_t token = 0; token < k.shape[2]; ++token) {
    for (std::int64_t b = 0; b < cache.batch; ++b) {
      for (std::int64_t head = 0; head < cache.kv_heads; ++head) {
        for (auto [tensor, rows] : {std::pair(&k, &cache.keys), {&v, &cache.values}}) {
          std::vector<double> row;
          for (std::int64_t i = 0; i < cache.head_dim; ++i) {
            row.push_back(tensor->get(offset_of({b, head, token, i}, k.shape)));
          }
          row = cache.rounded(std::move(row));
          rows->insert(rows->end(), row.begin(), row.end());
        }
      }
    }
  }
  cache.tokens += k.shape[2];
  step.cache = std::move(cache);
  return {};
}

namespace {

Status cache_contents(Step& step, const std::vector<double> Cache::*contents) {
  const Cache& cache = std::get<Cache>(*step.operands[0]);
  const Sizes& shape = step.result.shape;
  if (cache.batch != shape[0] || cache.tokens != shape[2]) {
    return Error{fmt::format("{} sequences and {} tokens of a cache of {} and {}", shape[0],
                             shape[2], cache.batch, cache.tokens)};
  }
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    const Sizes at = coordinates(i, shape);
    step.result.set(
        i, (cache.*contents)[static_cast<std::size_t>(cache.index(at[2], at[0], at[1], at[3]))]);
  }
  return {};
}

}  // namespace

Status cache_keys(Step& step) { return cache_contents(step, &Cache::keys); }
Status cache_values(Step& step) { return cache_contents(step, &Cache::values); }

Status causal_mask(Step& step) {
  const Sizes& shape = step.result.shape;
  const std::int64_t queries = shape[shape.size() - 2], keys = shape.back();
  const std::int64_t window = step.node.attribute_or("window", keys);
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    const std::int64_t last = keys - queries + i / keys % queries, key = i % keys;
    step.result.set(i, key <= last && key > last - window ? 0 : -infinity);
  }
  return {};
}

Status attention(Step& step) {
  KeysAndValues source;
  if (step.is_cache(1)) {
    source.cache = &std::get<Cache>(*step.operands[1]);
  } else {
    source.k = &step.tensor(1);
    source.v = &step.tensor(2);
  }
  if (Status status = check_lengths(step, source); !status) return status;
  const Sizes& shape = step.result.shape;
  std::int64_t next = 0;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t head = 0; head < shape[1]; ++head) {
      for (std::int64_t query = 0; query < shape[2]; ++query) {
        for (double value : attend(step, source, b, head, query)) step.result.set(next++, value);
      }
    }
  }
  return {};
}

}  // namespace tilewright::graph::reference
