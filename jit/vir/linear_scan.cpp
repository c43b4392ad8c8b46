// Linear scan over the intervals of one class of registers at a time. See linear_scan.h.
//
// Tested by linear_scan_test.
#include "jit/vir/linear_scan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace tilewright::jit::vir {
namespace {

constexpr int kFrameAlignment = 16;

// An interval of one class: a virtual register, or a temporary of one instruction.
struct Item {
  Interval interval;
  int temporary = -1;  // index into Allocation::temporaries
  int reg = -1;        // what it got; -1: spilled
  bool is_temporary() const { return temporary >= 0; }
};

// The numbers of registers of all pools are below; a set of them is a word.
constexpr int kMostRegisters = 64;
std::uint64_t bit(int reg) { return std::uint64_t{1} << reg; }

// One pass over the items, which are in order of their beginnings. `by_number` has room for every
// register of the function.
class Scan {
 public:
  Scan(std::vector<Item>& items, std::span<const int> pool, const Numbering& numbering,
       std::vector<const Item*>& by_number)
      : items_(items), pool_(pool), numbering_(numbering), by_number_(by_number) {}

  // Returns the number of spilled registers.
  int run() {
    int spills = 0;
    for (Item& item : items_) {
      if (!item.is_temporary()) by_number_[numbering_.index(item.interval.reg)] = &item;
      expire(item.interval.begin);
      item.reg = free_register(item);
      if (item.reg < 0) {
        evict_for(item);
        ++spills;
      }
      if (item.reg < 0) continue;
      active_[static_cast<std::size_t>(item.reg)] = &item;
      ends_[static_cast<std::size_t>(item.reg)] = item.interval.end;
      taken_ |= bit(item.reg);
      next_end_ = std::min(next_end_, item.interval.end);
    }
    return spills;
  }

 private:
  template <class Visit>
  void each_taken(Visit&& visit) {
    for (std::uint64_t rest = taken_; rest != 0; rest &= rest - 1) visit(std::countr_zero(rest));
  }

  void expire(int position) {
    if (next_end_ >= position) return;
    int next_end = std::numeric_limits<int>::max();
    each_taken([&](int reg) {
      const int end = ends_[static_cast<std::size_t>(reg)];
      if (end < position) {
        taken_ &= ~bit(reg);
      } else {
        next_end = std::min(next_end, end);
      }
    });
    next_end_ = next_end;
  }

  // Of an item that began before: a hint is a source.
  const Item* find(Reg reg) const {
    return reg.valid() ? by_number_[numbering_.index(reg)] : nullptr;
  }

  int free_register(const Item& item) const {
    const auto taken = [this](int reg) { return (taken_ & bit(reg)) != 0; };
    // A result in the register of the source that dies here saves a move.
    if (const Item* source = find(item.interval.hint);
        source != nullptr && source->reg >= 0 && source->interval.end + 1 == item.interval.begin &&
        !taken(source->reg)) {
      return source->reg;
    }
    const auto found = std::find_if_not(pool_.begin(), pool_.end(), taken);
    return found == pool_.end() ? -1 : *found;
  }

  // Spills the lightest of the active registers and `item`; of equals, the one that ends last, and
  // of those `item`, or else the one that began first.
  void evict_for(Item& item) {
    Item* victim = item.is_temporary() ? nullptr : &item;
    const auto better = [&](const Item* a, const Item* b) {
      if (a->interval.weight != b->interval.weight) return a->interval.weight < b->interval.weight;
      if (a->interval.end != b->interval.end) return a->interval.end > b->interval.end;
      return b != &item && a < b;
    };
    each_taken([&](int reg) {
      Item* other = active_[static_cast<std::size_t>(reg)];
      if (other->is_temporary()) return;
      if (victim == nullptr || better(other, victim)) victim = other;
    });
    if (victim == nullptr || victim == &item) return;
    item.reg = victim->reg;
    victim->reg = -1;
  }

  std::vector<Item>& items_;
  std::span<const int> pool_;
  const Numbering& numbering_;
  std::vector<const Item*>& by_number_;
  std::array<Item*, kMostRegisters> active_;        // by register, of those that are taken
  std::array<int, kMostRegisters> ends_;            // where they end
  std::uint64_t taken_ = 0;                         // a bit for each register
  int next_end_ = std::numeric_limits<int>::max();  // no active item ends before
};

// What both attempts for one class came to. The scratch registers are the last of the pool.
struct ClassResult {
  std::vector<Item> items;
  std::vector<int> scratch;
};

class Allocator {
 public:
  Allocator(const Function& function, const RegisterFile& file)
      : file_(file),
        numbering_(function),
        by_number_(numbering_.count()),
        vector_bytes_(4 * function.lanes) {
    const std::array counts = {function.gpr_count, function.vec_count, function.mask_count,
                               function.tile_count};  // by kind
    for (std::size_t k = 0; k < counts.size(); ++k) {
      result_.homes[k].resize(static_cast<std::size_t>(counts[k]));
    }
  }

  Allocation run(const std::vector<Interval>& intervals, std::span<const std::uint8_t> temps) {
    std::vector<Item> gprs, vectors, masks, tiles;
    vectors.reserve(intervals.size());
    std::size_t instruction = 0;
    const auto add_temporaries = [&](std::size_t end) {
      for (; instruction < end; ++instruction) {
        for (int t = 0; t < temps[instruction]; ++t) {
          vectors.push_back(temporary(static_cast<int>(instruction), t));
        }
      }
    };
    for (const Interval& interval : intervals) {
      const Kind kind = interval.reg.kind;
      if (kind == Kind::gpr) {
        gprs.push_back({interval});
      } else if (kind == Kind::tile) {
        tiles.push_back({interval});
      } else if (kind == Kind::vec || file_.mask.empty()) {
        // In order of beginnings: those of the instructions up to the one that defines this.
        add_temporaries(static_cast<std::size_t>(interval.begin / 2) + 1);
        vectors.push_back({interval});
      } else {
        masks.push_back({interval});
      }
    }
    add_temporaries(temps.size());
    result_.temporaries.assign(temps.size() * kTemporaries, -1);

    result_.gpr_scratch = settle(allocate_class(std::move(gprs), file_.gpr, kGprScratch), 8);
    for (int reg : result_.gpr_scratch) used_gprs_ |= bit(reg);
    result_.vec_scratch =
        settle(allocate_class(std::move(vectors), file_.vec, kVecScratch), vector_bytes_);
    result_.mask_scratch = settle(allocate_class(std::move(masks), file_.mask, kMaskScratch), 8);
    settle(allocate_class(std::move(tiles), file_.tile, 0), 0);
    for (int reg = 0; reg < kMostRegisters; ++reg) {
      if ((used_gprs_ & bit(reg)) != 0) result_.used_gprs.push_back(reg);
    }
    result_.frame_bytes =
        (result_.frame_bytes + kFrameAlignment - 1) / kFrameAlignment * kFrameAlignment;
    return std::move(result_);
  }

 private:
  static Item temporary(int instruction, int number) {
    Interval interval;
    interval.reg = {Kind::vec, -1};
    interval.begin = 2 * instruction;
    interval.end = 2 * instruction + 1;
    return {interval, instruction * kTemporaries + number};
  }

  ClassResult allocate_class(std::vector<Item> items, std::span<const int> pool,
                             int scratch_count) {
    ClassResult result{std::move(items), {}};
    if (Scan(result.items, pool, numbering_, by_number_).run() == 0) return result;
    const std::size_t kept = pool.size() - static_cast<std::size_t>(scratch_count);
    Scan(result.items, pool.first(kept), numbering_, by_number_).run();
    result.scratch.assign(pool.begin() + static_cast<std::ptrdiff_t>(kept), pool.end());
    return result;
  }

  // Records what a class got; returns its scratch registers.
  std::vector<int> settle(ClassResult result, int slot_bytes) {
    for (const Item& item : result.items) {
      const Interval& interval = item.interval;
      if (item.is_temporary()) {
        result_.temporaries[static_cast<std::size_t>(item.temporary)] = item.reg;
        continue;
      }
      Home& home = result_.home(interval.reg);
      if (item.reg >= 0) {
        home.reg = item.reg;
        if (interval.reg.kind == Kind::gpr) used_gprs_ |= bit(item.reg);
        continue;
      }
      home.slot = result_.frame_bytes;
      result_.frame_bytes += slot_bytes;
      ++result_.spills;
      if (interval.reg.kind == Kind::tile) ++result_.tile_spills;
      if (interval.in_inner_loop) ++result_.inner_loop_spills;
    }
    return std::move(result.scratch);
  }

  const RegisterFile& file_;
  Numbering numbering_;
  std::vector<const Item*> by_number_;
  int vector_bytes_;
  std::uint64_t used_gprs_ = 0;  // a bit for each register
  Allocation result_;
};

}  // namespace

Allocation allocate(const Function& function, const RegisterFile& file,
                    std::span<const std::uint8_t> temporary_count) {
  return Allocator(function, file).run(live_intervals(function), temporary_count);
}

}  // namespace tilewright::jit::vir
