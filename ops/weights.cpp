// WeightStore: see weights.h. Tested by program_test.
#include "ops/weights.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <cstdlib>

#include "ops/gemm/linear_kernel.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

std::unique_ptr<char, void (*)(void*)> allocate_weight(std::int64_t bytes) {
  // 2 MiB alignment lets the kernel back it with huge pages: fewer TLB misses while decode streams
  // all weights.
  constexpr std::size_t huge_page = 2u << 20;
  const auto size = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
  const std::size_t alignment = size >= huge_page ? huge_page : 64;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (memory != nullptr && alignment == huge_page) madvise(memory, rounded, MADV_HUGEPAGE);
  return {static_cast<char*>(memory), std::free};
}

}  // namespace

Result<std::shared_ptr<const PackedWeight>> WeightStore::pack(
    const std::vector<WeightBlock>& blocks, std::int64_t k, graph::DataType dtype, bool gated) {
  std::int64_t n = 0;
  std::string identity = fmt::format("{} {} {}", graph::name(dtype), k, gated ? "gated" : "plain");
  for (const WeightBlock& block : blocks) {
    n += block.rows;
    identity += fmt::format(" {}:{}:{}", block.data, block.rows, block.row_stride);
  }
  std::lock_guard lock(mutex_);
  if (auto found = items_.find(identity); found != items_.end()) return found->second.weight;

  auto weight = std::make_shared<PackedWeight>();
  weight->n = n;
  weight->k = k;
  weight->dtype = dtype;
  weight->bytes = packed_bytes(n, k, dtype);
  weight->data = allocate_weight(weight->bytes);
  if (!weight->data) {
    return Error{fmt::format("out of memory for {} bytes of packed weights", weight->bytes)};
  }
  // As many threads as the process has: each first touches the pages that it will read in decode.
  run_team(default_threads(), [&](int thread, int threads) {
    const WorkRange panels = share(panel_count(n), thread, threads);
    pack_panels(blocks, k, dtype, gated, panels.begin, panels.end, weight->data.get());
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

}  // namespace tilewright::ops
