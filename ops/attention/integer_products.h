// Attention over a cache of 8 bits in integers: vpdpbusd adds the products of four bytes at a time,
// without widening a key or value.
//
// A query, and a chunk's weights of one head (each times its value's scale), become integers of 16
// bits beside one f32 unit, so that x is about unit * integer: no element is further off than half
// a unit, 2^-16 of a query's largest and 2^-17 of the largest weight. The keys and values that they
// meet are known to 1/254 of a row's largest, 2^-8. The bytes of an integer lie apart, in a plane
// of upper ones and a plane of lower ones, and each plane is multiplied by what is cached:
//
//   queries   integer = 256 * upper + lower, both signed; vpdpbusd wants its other factor unsigned,
//             so that of a key k + 128 is taken, and 128 * the sum of the query's integers from the
//             sum
//   weights   integer = 256 * upper + lower, both unsigned
//
// Sums of integers are exact: their order, and where blocks end, changes no bit.
//
// The three steps here; the sums of values are in token_products.h. Tested by attention_test.
#pragma once

#include <cstdint>
#include <functional>

#include "jit/vir/builder.h"
#include "ops/attention/attention_kernel.h"
#include "ops/attention/token_products.h"

namespace tilewright::ops {

// Columns come in whole vectors of bytes, so many at most: a sum of products fits 32 bits.
inline constexpr int kBytesOfVector = 64, kMostIntegerColumns = 512;

// Writes the integers of the query of one head at `from`: its planes, [2][head_dim] bytes from `to`
// on, then the unit (f32) and what is to be taken from a sum (i32). The unit of a query that is not
// finite is NaN.
void split_query(jit::vir::Builder& builder, const AttentionKernel& spec, jit::vir::Reg from,
                 jit::vir::Reg to);

// The products of keys with the queries of a group, which were split to where TokenLayout has them.
class IntegerKeySums {
 public:
  IntegerKeySums(jit::vir::Builder& builder, const AttentionKernel& spec);

  // Of `keys` keys, a vector of them or one, as f32, still to be multiplied by the keys' scales: of
  // the first head to `scores`, of each other a row further on.
  using KeyAddress = std::function<jit::vir::Address(int key, std::int64_t byte)>;
  void write(int keys, jit::vir::Reg scores, const KeyAddress& address);

 private:
  void write_one(jit::vir::Reg scores, const KeyAddress& address);
  jit::vir::Reg unsigned_bytes(const jit::vir::Address& address);
  jit::vir::Reg as_float(jit::vir::Reg sum, jit::vir::Reg query);
  // body(query, where its scores go)
  void for_heads(jit::vir::Reg scores,
                 const std::function<void(jit::vir::Reg, jit::vir::Reg)>& body);

  jit::vir::Builder& b_;
  const AttentionKernel& spec_;
  TokenLayout at_;
};

// Writes the planes of weights, [2][kChunkKeys] bytes from `planes` on, and their unit (f32) to
// `unit`, from `vectors` vectors of f32 weights at `row`, of which `most` is the largest, in all
// lanes. Weights of which none reaches 2^-112 become zero.
void split_weights(jit::vir::Builder& builder, jit::vir::Reg row, jit::vir::Reg vectors,
                   jit::vir::Reg most, jit::vir::Reg planes, jit::vir::Reg unit);

}  // namespace tilewright::ops
