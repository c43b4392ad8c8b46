// The reference interpreter: what a graph means, one element after another, in double.
//
// Arithmetic is in double (int64 where a result is an integer) and every value is rounded once,
// when it is stored in its dtype. Slow and obviously right: kernels, passes and front ends are
// compared with it, and nothing else calls it. Each op is one function in reference_*.cpp.
//
// Thread-safe. Tested by interpret_test, filetests/run.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "graph/graph.h"
#include "graph/tensor.h"

namespace tilewright::graph {

// Keys and values of one layer. Elements are stored as double, already rounded to dtype; of i8,
// scale times integer (jit/base/eight_bits.h).
struct Cache {
  DataType dtype = DataType::f32;
  std::int64_t batch = 0, kv_heads = 0, head_dim = 0, tokens = 0;
  std::vector<double> keys, values;  // [tokens][batch][kv_heads][head_dim]: appending is appending

  std::size_t index(std::int64_t token, std::int64_t sequence, std::int64_t head,
                    std::int64_t i) const {
    return static_cast<std::size_t>(((token * batch + sequence) * kv_heads + head) * head_dim + i);
  }
  // [2, batch, kv_heads, tokens, head_dim]: keys, then values; of i8 as f32.
  Tensor contents() const;
  // Error: another shape, or another type than contents() of such a cache have.
  static Result<Cache> from_contents(const Tensor& contents, DataType dtype);
  // Row [head_dim] of numbers, as the cache stores them.
  std::vector<double> rounded(std::vector<double> row) const;
};

using Argument = std::variant<Tensor, Cache>;
using Constants = std::map<std::string, Tensor, std::less<>>;

// arguments: one per parameter; tensors and caches that the graph writes are updated in place.
// A symbol that is a whole dim of a parameter takes its value from the argument; others must be in
// symbols. A cache among the outputs is returned as its contents.
// Error: a graph that does not verify, arguments that do not fit, an external node, an index out of
// range.
Result<std::vector<Tensor>> interpret(const Graph& graph, std::span<Argument> arguments,
                                      const Constants& constants = {}, SymbolValues symbols = {});

}  // namespace tilewright::graph
