// Emits what a kernel does to read panels of weights in 12 bits (twelve_bits.h): it follows the
// steps of a panel and gives their weights as vectors of pairs of k, as they lie in the 16-bit
// layout.
//
// Tested by linear_test.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "jit/vir/builder.h"

namespace tilewright::ops {

class TwelveBitsReader {
 public:
  using Reg = jit::vir::Reg;

  explicit TwelveBitsReader(jit::vir::Builder& builder) : b_(builder) {}

  // At the first stretch of k of a panel, which has 128 of them.
  void begin_panel(Reg packed, Reg panel, std::int64_t k);
  // Around each_step, which a stretch has once, or more often, which costs a register.
  void begin_stretch(bool once = false);
  void end_stretch();

  // The steps of the stretch's first `count` of k, of several panels in turns, as often as wanted:
  // body(whose step it is, whether it is in 16 bits, its k) is emitted for both forms, in a loop
  // and for a rest of fewer than 8.
  using Body = std::function<void(std::size_t reader, bool plain, int length)>;
  static void each_step(std::span<TwelveBitsReader> readers, std::int64_t count, const Body& body);
  // Between stretches: where the next one begins. To be copied, not to be moved.
  Reg next_stretch() const { return stretch_; }
  // Likewise: asks for the next lines of the next stretch, or of what lies `distance`
  // bytes behind the beginning of the one before, if that is farther. ask_again: from `lines`
  // earlier. Nothing else of the reader works between the two; that costs no register.
  void ask_for_next(std::int64_t lines, std::int64_t distance);
  void ask_again(std::int64_t lines);
  // In such a body: asks for what follows `distance` bytes behind the step; 0: does not.
  void prefetch(std::int64_t distance, int level);
  // In such a body: the weights of k 4 * half and 4 * half + 1, and of the two behind them, of the
  // panel's vector of columns. A lane is a pair: the even k in its low 16 bits.
  std::array<Reg, 2> pairs(bool plain, int half, int vector);

  // The next stretch's first `count` of k, in steps of 8, as the 16-bit layout has them: written to
  // `to`, which is moved behind them. Asks for what follows `distance` bytes behind each step; 0:
  // does not.
  void unpack_stretch(std::int64_t count, Reg to, std::int64_t distance);
  // The same in another layout, whose steps are step_bytes: store(pair of the step, vector of
  // columns, the pairs).
  void unpack_stretch(std::int64_t count, Reg to, std::int64_t step_bytes, std::int64_t distance,
                      const std::function<void(int pair, int vector, Reg pairs)>& store);

 private:
  jit::vir::Builder& b_;
  Reg record_, stretch_;  // addresses of the stretch's record and steps
  Reg step_;              // address; the stretch's own if it has each_step once
  bool once_ = false;
  Reg table_, low_nibbles_;
};

}  // namespace tilewright::ops
