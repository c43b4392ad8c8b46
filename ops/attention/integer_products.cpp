// See integer_products.h.
//
// Tested by attention_test.
#include "ops/attention/integer_products.h"

#include <array>
#include <vector>

#include "ops/attention/head_vectors.h"
#include "ops/attention/lane_sums.h"
#include "ops/attention/transpose.h"
#include "ops/columns.h"

namespace tilewright::ops {

using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

namespace {

constexpr float kLargestQuery = 127 * 256 + 127;  // both of its bytes are signed
constexpr float kLargestWeight = 255 * 256 + 255;
constexpr float kSmallest = 0x1p-112f;  // what the integers are made with is finite from here on

// largest / most, by which numbers are multiplied to be integers; 0 if that is not finite.
Reg integers_per_unit(Builder& b, float largest, Reg most) {
  return b.select(b.less(most, b.splat(kSmallest)), b.zero(), b.vdiv(b.splat(largest), most));
}

}  // namespace

void split_query(Builder& b, const AttentionKernel& spec, Reg from, Reg to) {
  const HeadVectors head(spec.head_dim, spec.lanes);
  const auto columns = [&](int v) { return load(b, spec.input, from, head.columns(v)); };
  Reg zero = b.zero(), most = b.zero(), not_finite = b.zero();
  for (int v = 0; v < head.count(); ++v) {
    Reg x = columns(v);
    most = b.vmax(most, b.vand(x, b.splat_bits(0x7fffffff)));
    b.fma(not_finite, x, zero);  // NaN where a number is not finite, else zero
  }
  most = b.reduce_max(most);
  Reg per_unit = integers_per_unit(b, kLargestQuery, most), sum = b.zero();
  for (int v = 0; v < head.count(); ++v) {
    Reg integers = b.to_i32(b.vmul(columns(v), per_unit));
    sum = b.iadd(sum, integers);
    // The upper byte stands for what is nearest to the integer: the lower is signed.
    Reg upper = b.vshift_right(b.iadd(integers, b.splat_bits(128)), 8);
    b.store(Element::u8, b.at(to, v * spec.lanes), upper);
    b.store(Element::u8, b.at(to, spec.head_dim + v * spec.lanes), integers);
  }
  Reg unit = b.vmul(most, b.splat(1 / kLargestQuery));
  unit = b.vadd(unit, lane_sum(b, &Builder::vadd, not_finite));
  b.store_one(Element::f32, b.at(to, 2 * spec.head_dim), unit);
  b.store_one(Element::i32, b.at(to, 2 * spec.head_dim + 4),
              b.vshift_left(lane_sum(b, &Builder::iadd, sum), 7));
}

IntegerKeySums::IntegerKeySums(Builder& builder, const AttentionKernel& spec)
    : b_(builder), spec_(spec), at_(spec) {}

void IntegerKeySums::write(int keys, Reg scores, const KeyAddress& address) {
  if (keys == 1) return write_one(scores, address);
  // Bytes of a vector of keys turned, a register has 4 columns of all of them, which a query's 4,
  // broadcast, meet: no sum goes across lanes, and the keys are turned once for all heads.
  for (int first = 0; first < spec_.head_dim; first += kBytesOfVector) {
    std::vector<Reg> square;
    for (int key = 0; key < keys; ++key) square.push_back(unsigned_bytes(address(key, first)));
    square = transpose(b_, square);
    for_heads(scores, [&](Reg query, Reg to) {
      // Two sums of each plane: one waits for itself longer than the next product takes.
      std::array sums{b_.zero(), b_.zero(), b_.zero(), b_.zero()};
      for (int i = 0; i < keys; ++i) {
        for (int plane = 0; plane < 2; ++plane) {
          const std::int64_t offset = plane * spec_.head_dim + first + 4 * i;
          b_.dot_bytes(sums[static_cast<std::size_t>(2 * plane + i % 2)],
                       square[static_cast<std::size_t>(i)],
                       b_.broadcast(Element::i32, b_.at(query, offset)));
        }
      }
      Reg upper = b_.iadd(sums[0], sums[1]), lower = b_.iadd(sums[2], sums[3]);
      Reg sum = b_.iadd(b_.vshift_left(upper, 8), lower);
      if (first > 0) sum = b_.iadd(sum, b_.load(Element::i32, b_.at(to)));
      const bool is_last = first + kBytesOfVector == spec_.head_dim;
      if (is_last) {
        b_.store(Element::f32, b_.at(to), as_float(sum, query));
      } else {
        b_.store(Element::i32, b_.at(to), sum);
      }
    });
  }
}

void IntegerKeySums::write_one(Reg scores, const KeyAddress& address) {
  for_heads(scores, [&](Reg query, Reg to) {
    std::array sums{b_.zero(), b_.zero()};
    for (int first = 0; first < spec_.head_dim; first += kBytesOfVector) {
      Reg bytes = unsigned_bytes(address(0, first));
      for (std::size_t plane = 0; plane < sums.size(); ++plane) {
        const std::int64_t offset = static_cast<int>(plane) * spec_.head_dim + first;
        b_.dot_bytes(sums[plane], bytes, b_.load(Element::i32, b_.at(query, offset)));
      }
    }
    Reg sum = b_.iadd(b_.vshift_left(sums[0], 8), sums[1]);
    b_.store_one(Element::f32, b_.at(to), as_float(lane_sum(b_, &Builder::iadd, sum), query));
  });
}

Reg IntegerKeySums::unsigned_bytes(const Address& address) {
  return b_.vxor(b_.load(Element::i32, address), b_.splat_bits(0x80808080));
}

Reg IntegerKeySums::as_float(Reg sum, Reg query) {
  sum = b_.isub(sum, b_.broadcast(Element::i32, b_.at(query, 2 * spec_.head_dim + 4)));
  return b_.vmul(b_.to_f32(sum), b_.broadcast(Element::f32, b_.at(query, 2 * spec_.head_dim)));
}

void IntegerKeySums::for_heads(Reg scores, const std::function<void(Reg, Reg)>& body) {
  Reg query = b_.add(b_.arg(AttentionArgs::scratch), TokenLayout::queries), to = b_.copy(scores);
  b_.loop(b_.constant(spec_.group), [&] {
    body(query, to);
    b_.add_to(query, at_.query_bytes);
    b_.add_to(to, TokenLayout::score_bytes);
  });
}

void split_weights(Builder& b, Reg row, Reg vectors, Reg most, Reg planes, Reg unit) {
  Reg per_unit = integers_per_unit(b, kLargestWeight, most);
  b.store_one(Element::f32, b.at(unit), b.vmul(most, b.splat(1 / kLargestWeight)));
  Reg from = b.copy(row), to = b.copy(planes);
  b.loop(b.copy(vectors), [&] {
    Reg integers = b.to_i32(b.vmul(b.load(Element::f32, b.at(from)), per_unit));
    b.store(Element::u8, b.at(to), b.vshift_right(integers, 8));
    b.store(Element::u8, b.at(to, kChunkKeys), integers);
    b.add_to(from, b.vector_bytes());
    b.add_to(to, b.lanes());
  });
}

}  // namespace tilewright::ops
