// Liveness in one pass. See liveness.h.
//
// Tested by linear_scan_test.
#include "jit/vir/liveness.h"

#include <algorithm>
#include <cstddef>

#include "jit/vir/definitions.h"
#include "jit/vir/signature.h"

namespace tilewright::jit::vir {
namespace {

struct Loop {
  int begin = 0, end = 0;  // instructions
  bool contains_loop = false;
};

// In the order of their beginnings.
std::vector<Loop> find_loops(const Function& f) {
  std::vector<Loop> loops;
  std::vector<std::size_t> open;
  for (std::size_t i = 0; i < f.code.size(); ++i) {
    if (f.code[i].op == Op::loop) {
      if (!open.empty()) loops[open.back()].contains_loop = true;
      open.push_back(loops.size());
      loops.push_back({.begin = static_cast<int>(i)});
    } else if (f.code[i].op == Op::endloop) {
      loops[open.back()].end = static_cast<int>(i);
      open.pop_back();
    }
  }
  return loops;
}

double power_of_ten(int depth) {
  double result = 1;
  for (int i = 0; i < std::min(depth, 12); ++i) result *= 10;
  return result;
}

class IntervalScan {
 public:
  explicit IntervalScan(const Function& f)
      : f_(f),
        numbering_(f),
        definitions_(numbering_.count()),
        place_(numbering_.count(), kNowhere),
        loops_(find_loops(f)) {
    intervals_.reserve(numbering_.count());
  }

  std::vector<Interval> run() && {
    // It arrives before the first instruction.
    const std::size_t args = numbering_.index(kArgsPointer);
    definitions_.define(args);
    place_[args] = 0;
    intervals_.push_back({.reg = kArgsPointer, .begin = -1, .end = -1});
    for (int i = 0; i < static_cast<int>(f_.code.size()); ++i) visit(i);
    if (intervals_.front().end < 0) intervals_.erase(intervals_.begin());
    return std::move(intervals_);
  }

 private:
  static constexpr int kNowhere = -1;

  void visit(int i) {
    const Instruction& in = f_.code[static_cast<std::size_t>(i)];
    if (in.op == Op::loop) {
      // A loop's own ops count as inside.
      open_.push_back(&loops_[next_loop_++]);
      enter(static_cast<int>(open_.size()));
    }
    visit_operands(in, i);
    switch (in.op) {
      case Op::loop:
        return definitions_.begin_loop();
      case Op::endloop: {
        const Reg counter = f_.code[static_cast<std::size_t>(open_.back()->begin)].src[0];
        use(counter, 2 * i);
        define(counter, 2 * i + 1);
        open_.pop_back();
        enter(static_cast<int>(open_.size()));
        return definitions_.end_loop();
      }
      case Op::if_:
        return definitions_.begin_if();
      case Op::else_:
        return definitions_.begin_else();
      case Op::endif:
        return definitions_.end_if();
      default:
        return;
    }
  }

  void visit_operands(const Instruction& in, int i) {
    const Signature& signature = vir::signature(in.op);
    const auto source_count = static_cast<std::size_t>(signature.source_count);
    each_source(in, [&](Reg reg) { use(reg, 2 * i); });
    if (in.op == Op::garg) use(kArgsPointer, 2 * i);
    for (std::size_t k = 0; k < source_count; ++k) {
      if (is_read_write(signature.source[k])) define(in.src[k], 2 * i + 1);
    }
    if (signature.definition == 0) return;
    Interval& defined = define(in.dst, 2 * i + 1);
    if (source_count > 0 && !defined.hint.valid() && in.src[0].kind == in.dst.kind &&
        in.src[0] != in.dst) {
      defined.hint = in.src[0];
    }
  }

  void enter(int depth) {
    weight_ = power_of_ten(depth);
    in_inner_loop_ = depth > 0 && !open_.back()->contains_loop;
  }

  Interval& touch(std::size_t index, int position) {
    Interval& interval = intervals_[static_cast<std::size_t>(place_[index])];
    interval.end = std::max(interval.end, position);
    interval.weight += weight_;
    interval.in_inner_loop |= in_inner_loop_;
    return interval;
  }

  void use(Reg reg, int position) {
    const std::size_t index = numbering_.index(reg);
    Interval& interval = touch(index, position);
    // Around the back edge of the loops within that of the definition, the outermost of them last.
    const int depth = definitions_.depth(index);
    if (depth == definitions_.loops()) return;
    interval.end = std::max(interval.end, 2 * open_[static_cast<std::size_t>(depth)]->end + 1);
  }

  Interval& define(Reg reg, int position) {
    const std::size_t index = numbering_.index(reg);
    if (place_[index] == kNowhere) {
      place_[index] = static_cast<int>(intervals_.size());
      intervals_.push_back({.reg = reg, .begin = position, .end = position});
    }
    definitions_.define(index);
    return touch(index, position);
  }

  const Function& f_;
  Numbering numbering_;
  Definitions definitions_;
  std::vector<int> place_;  // by number: of its interval
  std::vector<Interval> intervals_;
  std::vector<Loop> loops_;
  std::size_t next_loop_ = 0;
  std::vector<const Loop*> open_;
  double weight_ = 1;  // of one use, here
  bool in_inner_loop_ = false;
};

}  // namespace

std::vector<Interval> live_intervals(const Function& f) { return IntervalScan(f).run(); }

}  // namespace tilewright::jit::vir
