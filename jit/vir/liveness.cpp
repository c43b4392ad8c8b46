// Liveness by data flow over bit sets, one bit per virtual register. See liveness.h.
//
// Tested by linear_scan_test.
#include "jit/vir/liveness.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>

#include "jit/vir/signature.h"

namespace tilewright::jit::vir {
namespace {

// All registers of a function in one dense numbering: the arguments' pointer, gprs, vectors, masks,
// tiles.
class Numbering {
 public:
  explicit Numbering(const Function& f)
      : first_vec_(1 + f.gpr_count),
        first_mask_(first_vec_ + f.vec_count),
        first_tile_(first_mask_ + f.mask_count),
        count_(first_tile_ + f.tile_count) {}

  std::size_t count() const { return static_cast<std::size_t>(count_); }
  std::size_t index(Reg reg) const {
    if (reg == kArgsPointer) return 0;
    const std::array first = {1, first_vec_, first_mask_, first_tile_};  // by kind
    return static_cast<std::size_t>(first[static_cast<std::size_t>(reg.kind)] + reg.id);
  }
  Reg reg(std::size_t index) const {
    const int i = static_cast<int>(index);
    if (i == 0) return kArgsPointer;
    if (i < first_vec_) return {Kind::gpr, i - 1};
    if (i < first_mask_) return {Kind::vec, i - first_vec_};
    if (i < first_tile_) return {Kind::mask, i - first_mask_};
    return {Kind::tile, i - first_tile_};
  }

 private:
  int first_vec_, first_mask_, first_tile_, count_;
};

class BitSet {
 public:
  explicit BitSet(std::size_t bits) : words_((bits + 63) / 64) {}
  void set(std::size_t i) { words_[i / 64] |= std::uint64_t{1} << (i % 64); }
  void clear(std::size_t i) { words_[i / 64] &= ~(std::uint64_t{1} << (i % 64)); }
  void merge(const BitSet& other) {
    for (std::size_t w = 0; w < words_.size(); ++w) words_[w] |= other.words_[w];
  }
  // Adds those of `from` that are not in `without`; returns whether there were new ones.
  bool merge_difference(const BitSet& from, const BitSet& without) {
    std::uint64_t added = 0;
    for (std::size_t w = 0; w < words_.size(); ++w) {
      const std::uint64_t bits = from.words_[w] & ~without.words_[w];
      added |= bits & ~words_[w];
      words_[w] |= bits;
    }
    return added != 0;
  }
  template <class Visit>
  void for_each(Visit&& visit) const {
    for (std::size_t w = 0; w < words_.size(); ++w) {
      for (std::uint64_t rest = words_[w]; rest != 0; rest &= rest - 1) {
        visit(w * 64 + static_cast<std::size_t>(__builtin_ctzll(rest)));
      }
    }
  }

 private:
  std::vector<std::uint64_t> words_;
};

// A run of instructions that ends with a structure op or with the function. Control enters only at
// the beginning: every target of a jump is the instruction after a structure op.
struct Block {
  int first = 0, last = 0;
  std::vector<int> successors;  // blocks
};

// What the structure ops say about one function.
struct Structure {
  std::vector<Block> blocks;
  std::vector<int> depth;         // per instruction: loops around it; a loop's own ops included
  std::vector<bool> inner;        // per instruction: inside a loop without loops
  std::vector<Reg> loop_counter;  // per instruction: of the loop that an endloop closes
};

class StructureScan {
 public:
  explicit StructureScan(const Function& f) : f_(f) {
    const std::size_t count = f.code.size();
    s_.depth.assign(count, 0);
    s_.inner.assign(count, false);
    s_.loop_counter.assign(count, Reg{});
    after_.assign(count, -1);
  }

  Structure run() {
    for (int i = 0; i < static_cast<int>(f_.code.size()); ++i) visit(i);
    if (first_ < static_cast<int>(f_.code.size())) close(static_cast<int>(f_.code.size()) - 1);
    link();
    return std::move(s_);
  }

 private:
  struct Open {
    int begin, middle;  // middle: the else
    bool contains_loop;
  };

  void close(int last) {
    s_.blocks.push_back({first_, last, {}});
    after_[static_cast<std::size_t>(last)] = static_cast<int>(s_.blocks.size());
    first_ = last + 1;
  }

  void visit(int i) {
    const Instruction& in = f_.code[static_cast<std::size_t>(i)];
    if (in.op == Op::loop) ++depth_;
    s_.depth[static_cast<std::size_t>(i)] = depth_;
    switch (in.op) {
      case Op::loop:
        for (Open& open : open_) open.contains_loop = true;
        [[fallthrough]];
      case Op::if_:
        open_.push_back({i, -1, false});
        break;
      case Op::else_:
        open_.back().middle = i;
        break;
      case Op::endloop:
        end_loop(i);
        --depth_;
        break;
      case Op::endif:
        jumps_.push_back({open_.back().begin, open_.back().middle, i});
        open_.pop_back();
        break;
      default:
        return;
    }
    close(i);
  }

  void end_loop(int i) {
    const Open open = open_.back();
    open_.pop_back();
    const auto begin = static_cast<std::size_t>(open.begin);
    s_.loop_counter[static_cast<std::size_t>(i)] = f_.code[begin].src[0];
    if (!open.contains_loop) {
      std::fill(s_.inner.begin() + open.begin, s_.inner.begin() + i + 1, true);
    }
    loops_.push_back({open.begin, i});
  }

  int block_after(int instruction) const { return after_[static_cast<std::size_t>(instruction)]; }
  Block& block_ending_at(int i) { return s_.blocks[static_cast<std::size_t>(block_after(i) - 1)]; }
  void edge(int from_instruction, int to_after_instruction) {
    const int to = block_after(to_after_instruction);
    if (to < static_cast<int>(s_.blocks.size())) {
      block_ending_at(from_instruction).successors.push_back(to);
    }
  }

  void link() {
    for (const Block& block : s_.blocks) {
      const Op last = f_.code[static_cast<std::size_t>(block.last)].op;
      if (last != Op::else_) edge(block.last, block.last);  // falls through
    }
    for (const Loop& loop : loops_) {
      edge(loop.begin, loop.end);  // zero-trip
      edge(loop.end, loop.begin);  // back
    }
    for (const Branch& branch : jumps_) {
      edge(branch.begin, branch.middle >= 0 ? branch.middle : branch.end);
      if (branch.middle >= 0) edge(branch.middle, branch.end);
    }
  }

  struct Loop {
    int begin, end;
  };
  struct Branch {
    int begin, middle, end;
  };
  const Function& f_;
  Structure s_;
  std::vector<int> after_;  // for the last instruction of a block: the number of the next block
  std::vector<Open> open_;
  std::vector<Loop> loops_;
  std::vector<Branch> jumps_;
  int first_ = 0, depth_ = 0;
};

// Calls use(reg) and define(reg) for what an instruction reads and writes.
template <class Use, class Define>
void visit_operands(const Function& f, const Structure& s, int i, Use&& use, Define&& define) {
  const Instruction& in = f.code[static_cast<std::size_t>(i)];
  const Signature& signature = vir::signature(in.op);
  for (int k = 0; k < signature.source_count; ++k) use(in.src[static_cast<std::size_t>(k)]);
  if (signature.has_address) {
    use(in.address.base);
    if (in.address.index.valid()) use(in.address.index);
  }
  if (in.op == Op::garg) use(kArgsPointer);
  for (int k = 0; k < signature.source_count; ++k) {
    const auto source = static_cast<std::size_t>(k);
    if (is_read_write(signature.source[source])) define(in.src[source]);
  }
  if (signature.definition != 0) define(in.dst);
  if (in.op == Op::endloop) {
    use(s.loop_counter[static_cast<std::size_t>(i)]);
    define(s.loop_counter[static_cast<std::size_t>(i)]);
  }
}

struct BlockSets {
  explicit BlockSets(std::size_t bits) : in(bits), out(bits), defined(bits) {}
  BitSet in, out;  // live at its ends
  BitSet defined;
};

// Without what comes from successors: read before anything in the block writes it.
BlockSets own_sets(const Function& f, const Structure& s, const Block& block,
                   const Numbering& numbering) {
  BlockSets sets(numbering.count());
  for (int i = block.last; i >= block.first; --i) {
    visit_operands(
        f, s, i, [](Reg) {},
        [&](Reg reg) {
          sets.in.clear(numbering.index(reg));
          sets.defined.set(numbering.index(reg));
        });
    visit_operands(
        f, s, i, [&](Reg reg) { sets.in.set(numbering.index(reg)); }, [](Reg) {});
  }
  return sets;
}

std::vector<BlockSets> flow(const Function& f, const Structure& s, const Numbering& numbering) {
  std::vector<BlockSets> sets;
  for (const Block& block : s.blocks) sets.push_back(own_sets(f, s, block, numbering));
  bool changed = true;
  while (changed) {
    changed = false;
    for (std::size_t b = s.blocks.size(); b-- > 0;) {
      const Block& block = s.blocks[b];
      for (int next : block.successors) {
        sets[b].out.merge(sets[static_cast<std::size_t>(next)].in);
      }
      if (sets[b].in.merge_difference(sets[b].out, sets[b].defined)) changed = true;
    }
  }
  return sets;
}

double power_of_ten(int depth) {
  double result = 1;
  for (int i = 0; i < std::min(depth, 12); ++i) result *= 10;
  return result;
}

class IntervalBuilder {
 public:
  explicit IntervalBuilder(const Numbering& numbering)
      : numbering_(numbering), intervals_(numbering.count()) {
    for (std::size_t i = 0; i < intervals_.size(); ++i) {
      intervals_[i].reg = numbering.reg(i);
      intervals_[i].begin = std::numeric_limits<int>::max();
      intervals_[i].end = -1;
    }
  }

  void cover(std::size_t index, int position) {
    Interval& interval = intervals_[index];
    interval.begin = std::min(interval.begin, position);
    interval.end = std::max(interval.end, position);
  }

  void touch(Reg reg, int position, double weight, bool inner) {
    const std::size_t index = numbering_.index(reg);
    cover(index, position);
    intervals_[index].weight += weight;
    intervals_[index].in_inner_loop |= inner;
  }

  void hint(const Instruction& in) {
    const Signature& signature = vir::signature(in.op);
    if (signature.definition == 0 || signature.source_count == 0) return;
    Interval& interval = intervals_[numbering_.index(in.dst)];
    if (!interval.hint.valid() && in.src[0].kind == in.dst.kind && in.src[0] != in.dst) {
      interval.hint = in.src[0];
    }
  }

  std::vector<Interval> finish() && {
    if (intervals_[0].end >= 0) intervals_[0].begin = -1;  // arrives before the first instruction
    std::erase_if(intervals_, [](const Interval& interval) { return interval.end < 0; });
    return std::move(intervals_);
  }

 private:
  const Numbering& numbering_;
  std::vector<Interval> intervals_;
};

}  // namespace

std::vector<Interval> live_intervals(const Function& f) {
  const Numbering numbering(f);
  const Structure structure = StructureScan(f).run();
  const std::vector<BlockSets> sets = flow(f, structure, numbering);
  IntervalBuilder builder(numbering);
  for (std::size_t b = 0; b < structure.blocks.size(); ++b) {
    const Block& block = structure.blocks[b];
    sets[b].in.for_each([&](std::size_t index) { builder.cover(index, 2 * block.first); });
    sets[b].out.for_each([&](std::size_t index) { builder.cover(index, 2 * block.last + 1); });
  }
  for (int i = 0; i < static_cast<int>(f.code.size()); ++i) {
    const auto at = static_cast<std::size_t>(i);
    const double weight = power_of_ten(structure.depth[at]);
    const bool inner = structure.inner[at];
    visit_operands(
        f, structure, i, [&](Reg reg) { builder.touch(reg, 2 * i, weight, inner); },
        [&](Reg reg) { builder.touch(reg, 2 * i + 1, weight, inner); });
    builder.hint(f.code[at]);
  }
  return std::move(builder).finish();
}

}  // namespace tilewright::jit::vir
