// Linear scan over the intervals of one class of registers at a time. See linear_scan.h.
//
// Tested by linear_scan_test.
#include "jit/vir/linear_scan.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <set>

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

// One pass over the items in order of their beginnings.
class Scan {
 public:
  Scan(std::vector<Item>& items, std::span<const int> pool) : items_(items), pool_(pool) {
    std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
      return a.interval.begin < b.interval.begin;
    });
    for (Item& item : items_) {
      const Reg reg = item.interval.reg;
      if (item.is_temporary() || !reg.valid()) continue;
      auto& numbered = by_number_[static_cast<std::size_t>(reg.kind)];
      const auto id = static_cast<std::size_t>(reg.id);
      if (numbered.size() <= id) numbered.resize(id + 1);
      numbered[id] = &item;
    }
  }

  // Returns the number of spilled registers.
  int run() {
    int spills = 0;
    for (Item& item : items_) {
      item.reg = -1;
      expire(item.interval.begin);
      item.reg = free_register(item);
      if (item.reg < 0) {
        evict_for(item);
        ++spills;
      }
      if (item.reg < 0) continue;
      active_.push_back(&item);
      taken_ |= bit(item.reg);
    }
    return spills;
  }

 private:
  void expire(int position) {
    std::erase_if(active_, [&](const Item* item) {
      if (item->interval.end >= position) return false;
      taken_ &= ~bit(item->reg);
      return true;
    });
  }

  const Item* find(Reg reg) const {
    const auto& numbered = by_number_[static_cast<std::size_t>(reg.kind)];
    const auto id = static_cast<std::size_t>(reg.id);
    return reg.valid() && id < numbered.size() ? numbered[id] : nullptr;
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

  // Spills the lightest of the active registers and `item`; of equals, the one that ends last.
  void evict_for(Item& item) {
    Item* victim = item.is_temporary() ? nullptr : &item;
    for (Item* other : active_) {
      if (other->is_temporary()) continue;
      if (victim == nullptr || other->interval.weight < victim->interval.weight ||
          (other->interval.weight == victim->interval.weight &&
           other->interval.end > victim->interval.end)) {
        victim = other;
      }
    }
    if (victim == nullptr || victim == &item) return;
    item.reg = victim->reg;
    victim->reg = -1;
    std::erase(active_, victim);
  }

  static std::uint64_t bit(int reg) { return std::uint64_t{1} << reg; }

  std::vector<Item>& items_;
  std::span<const int> pool_;
  std::vector<Item*> active_;
  std::uint64_t taken_ = 0;                            // registers of active_
  std::array<std::vector<const Item*>, 4> by_number_;  // by kind and virtual number
};

// Both attempts for one class. The scratch registers are the last of the pool.
struct ClassResult {
  std::vector<Item> items;
  std::vector<int> scratch;
};

ClassResult allocate_class(std::vector<Item> items, std::span<const int> pool, int scratch_count) {
  ClassResult result{std::move(items), {}};
  if (Scan(result.items, pool).run() == 0) return result;
  const std::size_t kept = pool.size() - static_cast<std::size_t>(scratch_count);
  Scan(result.items, pool.first(kept)).run();
  result.scratch.assign(pool.begin() + static_cast<std::ptrdiff_t>(kept), pool.end());
  return result;
}

// Allocation, or const Allocation.
template <class AnyAllocation>
auto& homes(AnyAllocation& allocation, Kind kind) {
  switch (kind) {
    case Kind::gpr:
      return allocation.gpr;
    case Kind::vec:
      return allocation.vec;
    case Kind::mask:
      return allocation.mask;
    default:
      return allocation.tile;
  }
}

class Allocator {
 public:
  Allocator(const Function& function, const RegisterFile& file)
      : file_(file), vector_bytes_(4 * function.lanes) {
    result_.gpr.resize(static_cast<std::size_t>(function.gpr_count));
    result_.vec.resize(static_cast<std::size_t>(function.vec_count));
    result_.mask.resize(static_cast<std::size_t>(function.mask_count));
    result_.tile.resize(static_cast<std::size_t>(function.tile_count));
  }

  Allocation run(const std::vector<Interval>& intervals, std::span<const std::uint8_t> temps) {
    std::vector<Item> gprs, vectors, masks, tiles;
    for (const Interval& interval : intervals) {
      const Kind kind = interval.reg.kind;
      const bool in_vectors = kind == Kind::vec || (kind == Kind::mask && file_.mask.empty());
      auto& items = kind == Kind::gpr    ? gprs
                    : kind == Kind::tile ? tiles
                    : in_vectors         ? vectors
                                         : masks;
      items.push_back({interval});
    }
    result_.temporaries.assign(temps.size() * kTemporaries, -1);
    for (std::size_t i = 0; i < temps.size(); ++i) {
      for (int t = 0; t < temps[i]; ++t) vectors.push_back(temporary(static_cast<int>(i), t));
    }
    result_.gpr_scratch = settle(allocate_class(std::move(gprs), file_.gpr, kGprScratch), 8);
    for (int reg : result_.gpr_scratch) used_gprs_.insert(reg);
    result_.vec_scratch =
        settle(allocate_class(std::move(vectors), file_.vec, kVecScratch), vector_bytes_);
    result_.mask_scratch = settle(allocate_class(std::move(masks), file_.mask, kMaskScratch), 8);
    settle(allocate_class(std::move(tiles), file_.tile, 0), 0);
    result_.used_gprs.assign(used_gprs_.begin(), used_gprs_.end());
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

  Home& home(Reg reg) {
    if (reg == kArgsPointer) return result_.args;
    return homes(result_, reg.kind)[static_cast<std::size_t>(reg.id)];
  }

  // Records what a class got; returns its scratch registers.
  std::vector<int> settle(const ClassResult& result, int slot_bytes) {
    for (const Item& item : result.items) {
      const Interval& interval = item.interval;
      if (item.is_temporary()) {
        result_.temporaries[static_cast<std::size_t>(item.temporary)] = item.reg;
        continue;
      }
      if (item.reg >= 0) {
        home(interval.reg).reg = item.reg;
        if (interval.reg.kind == Kind::gpr) used_gprs_.insert(item.reg);
        continue;
      }
      home(interval.reg).slot = result_.frame_bytes;
      result_.frame_bytes += slot_bytes;
      ++result_.spills;
      if (interval.reg.kind == Kind::tile) ++result_.tile_spills;
      if (interval.in_inner_loop) ++result_.inner_loop_spills;
    }
    return result.scratch;
  }

  const RegisterFile& file_;
  int vector_bytes_;
  Allocation result_;
  std::set<int> used_gprs_;
};

}  // namespace

const Home& Allocation::home(Reg reg) const {
  if (reg == kArgsPointer) return args;
  return homes(*this, reg.kind)[static_cast<std::size_t>(reg.id)];
}

Allocation allocate(const Function& function, const RegisterFile& file,
                    std::span<const std::uint8_t> temporary_count) {
  return Allocator(function, file).run(live_intervals(function), temporary_count);
}

}  // namespace tilewright::jit::vir
