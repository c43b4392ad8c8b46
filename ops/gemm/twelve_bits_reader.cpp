// See twelve_bits_reader.h. Tested by linear_test.
#include "ops/gemm/twelve_bits_reader.h"

#include "ops/gemm/twelve_bits.h"

namespace tilewright::ops {

using jit::vir::Element;
using twelve_bits::kHalfBytes;
using twelve_bits::kStepLength;

namespace {

constexpr int kLineBytes = 64;
constexpr int kPairBytes = 128;  // of a panel: 32 columns x 2 k x 2 bytes

}  // namespace

void TwelveBitsReader::begin_panel(Reg packed, Reg panel, std::int64_t k) {
  const Reg entry = b_.add(packed, b_.mul(panel, twelve_bits::entry_bytes(k)));
  stretch_ = b_.add(packed, b_.load_gpr(Element::i64, b_.at(entry)));
  record_ = b_.add(entry, twelve_bits::kRecordsOffset);
}

void TwelveBitsReader::begin_stretch() { step_ = b_.copy(stretch_); }

void TwelveBitsReader::end_stretch() {
  b_.assign(stretch_, step_);
  b_.add_to(record_, twelve_bits::kRecordBytes);
}

void TwelveBitsReader::each_step(std::int64_t count,
                                 const std::function<void(bool plain, int length)>& body) {
  b_.assign(step_, stretch_);
  table_ = b_.broadcast_16_bytes(b_.at(record_));
  low_nibbles_ = b_.splat_bits(0x0f0f0f0f);
  const Reg flags = b_.load_gpr(Element::u16, b_.at(record_, twelve_bits::kFlagsOffset));
  const auto either = [&](int length) {
    b_.if_nonzero(
        b_.bit_and(flags, 1), [&] { step(true, length, body); },
        [&] { step(false, length, body); });
  };
  const std::int64_t steps = count / kStepLength;
  if (steps > 0) {
    // Few stretches have a step in 16 bits: the others run without a branch per step.
    b_.if_nonzero(
        flags,
        [&] {
          b_.loop(b_.constant(steps), [&] {
            either(kStepLength);
            b_.assign(flags, b_.shift_right(flags, 1));
          });
        },
        [&] { b_.loop(b_.constant(steps), [&] { step(false, kStepLength, body); }); });
  }
  if (count % kStepLength != 0) either(static_cast<int>(count % kStepLength));
}

void TwelveBitsReader::step(bool plain, int length, const std::function<void(bool, int)>& body) {
  body(plain, length);
  b_.add_to(step_, plain ? twelve_bits::kPlainStepBytes : twelve_bits::kStepBytes);
}

void TwelveBitsReader::prefetch(std::int64_t distance, int level) {
  if (distance == 0) return;
  for (int line = 0; line < twelve_bits::kStepBytes; line += kLineBytes) {
    b_.prefetch(b_.at(step_, distance + line), level);
  }
}

void TwelveBitsReader::unpack_stretch(std::int64_t count, Reg to, std::int64_t distance) {
  const auto store = [&](int pair, int vector, Reg pairs) {
    b_.store(Element::i32, b_.at(to, pair * kPairBytes + vector * b_.vector_bytes()), pairs);
  };
  unpack_stretch(count, to, twelve_bits::kPlainStepBytes, distance, store);
}

void TwelveBitsReader::unpack_stretch(
    std::int64_t count, Reg to, std::int64_t step_bytes, std::int64_t distance,
    const std::function<void(int pair, int vector, Reg pairs)>& store) {
  const int vectors = kPairBytes / b_.vector_bytes();
  each_step(count, [&](bool plain, int) {
    prefetch(distance, 1);
    for (int half = 0; half < 2; ++half) {
      for (int vector = 0; vector < vectors; ++vector) {
        const std::array<Reg, 2> loaded = pairs(plain, half, vector);
        for (int pair = 0; pair < 2; ++pair) {
          store(2 * half + pair, vector, loaded[static_cast<std::size_t>(pair)]);
        }
      }
    }
    b_.add_to(to, step_bytes);
  });
  end_stretch();
}

std::array<jit::vir::Reg, 2> TwelveBitsReader::pairs(bool plain, int half, int vector) {
  const auto load = [&](int offset) {
    return b_.load(Element::i32, b_.at(step_, offset + vector * b_.vector_bytes()));
  };
  if (plain) return {load(2 * half * kPairBytes), load((2 * half + 1) * kPairBytes)};
  Reg places = load(twelve_bits::kIndicesOffset);
  if (half != 0) places = b_.vshift_right(places, 4);
  const Reg high = b_.lookup_bytes(table_, b_.vand(places, low_nibbles_));
  const Reg low = load(half * kHalfBytes);
  return {b_.interleave_low(low, high), b_.interleave_high(low, high)};
}

}  // namespace tilewright::ops
