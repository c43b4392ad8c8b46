// WeightStore: see weights.h. Tested by program_test.
#include "ops/weights.h"

#include <fmt/format.h>

#include "ops/gemm/exact.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/threads.h"

namespace tilewright::ops {

Result<std::shared_ptr<const PackedWeight>> WeightStore::pack(
    const std::vector<WeightBlock>& blocks, std::int64_t k, graph::DataType source, bool gated,
    bool exact) {
  std::int64_t n = 0;
  std::string identity = fmt::format("{} {} {} {}", graph::name(source), k,
                                     gated ? "gated" : "separate", exact ? "exact" : "plain");
  for (const WeightBlock& block : blocks) {
    n += block.rows;
    identity += fmt::format(" {}:{}:{}", block.data, block.rows, block.row_stride);
  }
  std::lock_guard lock(mutex_);
  if (auto found = items_.find(identity); found != items_.end()) return found->second.weight;

  const bool narrows = exact && source == graph::DataType::f32;
  const graph::DataType dtype = narrows ? exact_type(blocks, k) : source;
  auto weight = std::make_shared<PackedWeight>();
  weight->n = n;
  weight->k = k;
  weight->dtype = dtype;
  weight->bytes = packed_bytes(n, k, dtype);
  weight->data = memory_.allocate(static_cast<std::size_t>(weight->bytes));
  if (!weight->data) {
    return Error{fmt::format("out of memory for {} bytes of packed weights", weight->bytes)};
  }
  // As many threads as the process has: each first touches the pages that it will read in decode.
  run_team(default_threads(), [&](int thread, int threads) {
    const WorkRange panels = share(panel_count(n), thread, threads);
    pack_panels(blocks, k, source, dtype, gated, panels.begin, panels.end, weight->data.get());
  });
  Item item{{}, weight};
  for (const WeightBlock& block : blocks) item.sources.push_back(block.data);
  items_.emplace(std::move(identity), std::move(item));
  return std::shared_ptr<const PackedWeight>(weight);
}

void WeightStore::forget(const void* source) {
  std::lock_guard lock(mutex_);
  std::erase_if(items_, [source](const auto& item) {
    for (const void* candidate : item.second.sources) {
      if (candidate == source) return true;
    }
    return false;
  });
}

std::int64_t WeightStore::bytes() const {
  std::lock_guard lock(mutex_);
  std::int64_t sum = 0;
  for (const auto& [identity, item] : items_) sum += item.weight->bytes;
  return sum;
}

void WeightStore::reserve(std::int64_t bytes) {
  std::lock_guard lock(mutex_);
  memory_.reserve(static_cast<std::size_t>(bytes));
}

void WeightStore::settle() {
  std::lock_guard lock(mutex_);
  memory_.settle();
}

}  // namespace tilewright::ops
