// Tails: the last items of each thread's share of a step, which go to whoever is free.
//
// Threads with equal shares are not done at the same time: a virtual CPU is taken away for a while,
// or memory serves one core better than the other. In decode of a 135M model on two shared virtual
// CPUs who came first to a barrier waited there for 7 to 25 microseconds, 150 times in a token of 7
// to 10 ms (perf/results/tails-zen4.md). So a thread computes the first part of its share at once,
// then the rest, its tail, piece by piece, and then pieces of its neighbours' tails. What an item's
// result is does not depend on who computes it nor with which others.
//
// A thread's claim counts how many pieces of its tail are taken. It names the turn that it counts
// for and so needs no reset. Turns are 48 bits, 256 a step: more than a year of steps of 30 us.
//
// Tested by tails_test, program_test and task_test.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>

#include "ops/threads.h"

namespace tilewright::ops {

constexpr std::int64_t kMostPieces = 0xffff;
constexpr std::uint64_t kTurnsOfStep = 256;

struct alignas(64) Claim {
  std::atomic<std::uint64_t> taken{0};  // turn << 16 | pieces
};

// What the threads of a team share out between two barriers.
struct Turn {
  std::span<Claim> claims = {};  // one per thread
  std::uint64_t number = 0;      // never used before; 0: threads keep to their shares

  // Of the parts of a step that barriers separate.
  Turn part(std::int64_t index) const {
    const bool has_number = number != 0 && index < static_cast<std::int64_t>(kTurnsOfStep);
    return {claims, has_number ? number + static_cast<std::uint64_t>(index) : 0};
  }

  // The next of `pieces` (at most kMostPieces) of a thread's, if one is left. Any thread may ask.
  std::optional<std::int64_t> take(int owner, std::int64_t pieces) const {
    std::atomic<std::uint64_t>& claim = claims[static_cast<std::size_t>(owner)].taken;
    std::uint64_t seen = claim.load(std::memory_order_relaxed);
    while (true) {
      const std::uint64_t taken = seen >> 16 == number ? seen & 0xffff : 0;
      if (taken >= static_cast<std::uint64_t>(pieces)) return std::nullopt;
      // What the pieces hold is published by the barrier, not here.
      if (claim.compare_exchange_weak(seen, number << 16 | (taken + 1),
                                      std::memory_order_relaxed)) {
        return static_cast<std::int64_t>(taken);
      }
    }
  }
};

// Items to share out, and what one reads from memory or takes as long as reading so many bytes.
// Where they are unequal, a type of their own takes the place of this one (attention_task.cpp).
struct Items {
  std::int64_t count, bytes;
  WorkRange share(int thread, int threads) const { return ops::share(count, thread, threads); }
};

// A thread's share of items: its head, and the pieces of its tail.
struct TailShare {
  WorkRange head;
  std::int64_t end, piece_items;

  // A piece costs its claim and a kernel's first loads, and steps of 10 to 20 us lost by that: they
  // have no tail. Even, since kernels read two panels at once.
  template <class AnyItems = Items>
  TailShare(const AnyItems& items, int thread, int threads) {
    constexpr std::int64_t pieces_of_share = 16, pieces_of_tail = 4, least_bytes = 256 << 10;
    const WorkRange all = items.share(thread, threads);
    const std::int64_t smallest_share = items.count / threads;
    const std::int64_t least = std::max(least_bytes / std::max<std::int64_t>(items.bytes, 1),
                                        smallest_share / pieces_of_share);
    piece_items = (least + 2) / 2 * 2;
    const std::int64_t tail =
        std::min(pieces_of_tail * smallest_share / pieces_of_share, all.end - all.begin);
    head = {all.begin, all.end - tail / piece_items * piece_items};
    end = all.end;
  }
  std::int64_t pieces() const { return (end - head.end) / piece_items; }
  WorkRange piece(std::int64_t index) const {
    const std::int64_t begin = head.end + index * piece_items;
    return {begin, begin + piece_items};
  }
};

// Calls compute(range) for what one thread of a team computes of the items: without a number
// its share, else its head and the pieces that it takes of its own tail and its next neighbours'.
template <class AnyItems = Items, class Compute>
void share_with_tails(const AnyItems& items, int thread, int threads, const Turn& turn,
                      Compute&& compute) {
  if (turn.number == 0 || threads == 1) return compute(items.share(thread, threads));
  const TailShare own(items, thread, threads);
  if (own.head.begin < own.head.end) compute(own.head);
  // More would be many looks at what others write, for little.
  constexpr int neighbours = 4;
  for (int i = 0; i < std::min(threads, neighbours); ++i) {
    const int owner = (thread + i) % threads;
    const TailShare tail(items, owner, threads);
    while (const auto piece = turn.take(owner, tail.pieces())) compute(tail.piece(*piece));
  }
}

// Items of unequal work, each for one thread of a team: for who asks first or, without a number or
// of more than kMostPieces, every so-many-th.
class TakenItems {
 public:
  TakenItems(std::int64_t count, int thread, int threads, const Turn& turn)
      : turn_(turn),
        count_(count),
        threads_(threads),
        in_turn_(turn.number != 0 && threads > 1 && count <= kMostPieces),
        next_(in_turn_ ? -1 : thread - threads) {}

  // Whether an item is this thread's. Ask of all of them, in order, each when those before it are
  // computed: nobody has an item that he does not compute at once.
  bool takes(std::int64_t item) {
    if (next_ < item) next_ = in_turn_ ? turn_.take(0, count_).value_or(count_) : next_ + threads_;
    return next_ == item;
  }

 private:
  Turn turn_;
  std::int64_t count_;
  int threads_;
  bool in_turn_;
  std::int64_t next_;
};

}  // namespace tilewright::ops
