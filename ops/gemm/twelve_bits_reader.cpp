// See twelve_bits_reader.h. Tested by linear_test.
#include "ops/gemm/twelve_bits_reader.h"

#include <algorithm>

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

void TwelveBitsReader::begin_stretch(bool once) {
  once_ = once;
  step_ = once ? stretch_ : b_.copy(stretch_);
}

void TwelveBitsReader::end_stretch() {
  if (!once_) b_.assign(stretch_, step_);
  b_.add_to(record_, twelve_bits::kRecordBytes);
}

void TwelveBitsReader::ask_for_next(std::int64_t lines, std::int64_t distance) {
  const std::int64_t stretch = twelve_bits::kStretchSteps * twelve_bits::kStepBytes;
  const std::int64_t farther = std::max<std::int64_t>(distance - stretch, 0);
  for (std::int64_t line = 0; line < lines; ++line) {
    b_.prefetch(b_.at(stretch_, farther + line * kLineBytes), 1);
  }
  b_.add_to(stretch_, lines * kLineBytes);
}

void TwelveBitsReader::ask_again(std::int64_t lines) { b_.add_to(stretch_, -lines * kLineBytes); }

void TwelveBitsReader::each_step(std::span<TwelveBitsReader> readers, std::int64_t count,
                                 const Body& body) {
  jit::vir::Builder& b = readers[0].b_;
  const Reg low_nibbles = b.splat_bits(0x0f0f0f0f);
  // Bit 16 * i + s is set if step s of reader i is in 16 bits. Shifted by one after each of 16
  // steps, no reader's bits come to be those of the one below.
  Reg flags;
  for (std::size_t i = 0; i < readers.size(); ++i) {
    TwelveBitsReader& reader = readers[i];
    if (!reader.once_) b.assign(reader.step_, reader.stretch_);
    reader.table_ = b.broadcast_16_bytes(b.at(reader.record_));
    reader.low_nibbles_ = low_nibbles;
    const Reg own = b.load_gpr(Element::u16, b.at(reader.record_, twelve_bits::kFlagsOffset));
    flags = i == 0 ? own : b.add(flags, b.shift_left(own, 16 * static_cast<int>(i)));
  }
  const auto step = [&](std::size_t i, bool plain, int length) {
    body(i, plain, length);
    b.add_to(readers[i].step_, plain ? twelve_bits::kPlainStepBytes : twelve_bits::kStepBytes);
  };
  const auto either = [&](int length) {
    for (std::size_t i = 0; i < readers.size(); ++i) {
      b.if_nonzero(
          b.bit_and(flags, std::int64_t{1} << (16 * i)), [&] { step(i, true, length); },
          [&] { step(i, false, length); });
    }
  };
  const std::int64_t steps = count / kStepLength;
  if (steps > 0) {
    // Few stretches have a step in 16 bits: the others run without a branch per step.
    b.if_nonzero(
        flags,
        [&] {
          b.loop(b.constant(steps), [&] {
            either(kStepLength);
            b.assign(flags, b.shift_right(flags, 1));
          });
        },
        [&] {
          b.loop(b.constant(steps), [&] {
            for (std::size_t i = 0; i < readers.size(); ++i) step(i, false, kStepLength);
          });
        });
  }
  if (count % kStepLength != 0) either(static_cast<int>(count % kStepLength));
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
  each_step({this, 1}, count, [&](std::size_t, bool plain, int) {
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
