// WeightStore: see weights.h. Tested by program_test.
#include "ops/weights.h"

#include <fmt/format.h>
#include <malloc.h>  // glibc

#include "ops/gemm/exact.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/threads.h"

namespace tilewright::ops {

std::string WeightStore::identify(const Item& item) {
  std::string text = fmt::format("{} {} {} {}", graph::name(item.source), item.k,
                                 item.gated ? "gated" : "separate", item.exact ? "exact" : "plain");
  for (const WeightBlock& block : item.blocks) {
    text += fmt::format(" {}:{}:{}{}", block.data, block.rows, block.row_stride,
                        block.transposed ? "t" : "");
  }
  return text;
}

Result<std::shared_ptr<const PackedWeight>> WeightStore::pack(
    const std::vector<WeightBlock>& blocks, std::int64_t k, graph::DataType source, bool gated,
    bool exact) {
  Item item{{}, blocks, k, source, gated, exact, nullptr};
  item.identity = identify(item);
  std::int64_t n = 0;
  for (const WeightBlock& block : blocks) n += block.rows;
  std::lock_guard lock(mutex_);
  for (const Item& known : items_) {
    if (known.identity == item.identity) return known.weight;
  }
  for (const WeightBlock& block : blocks) {
    if (is_token(block.data)) return Error{"its weight is packed in another form already"};
  }

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
  item.weight = weight;
  items_.push_back(std::move(item));
  return std::shared_ptr<const PackedWeight>(weight);
}

void WeightStore::forget(const void* source) {
  std::lock_guard lock(mutex_);
  std::erase_if(items_, [source](Item& item) {
    bool mentions = false, needed = false;
    for (WeightBlock& block : item.blocks) {
      if (block.data == source) {
        mentions = true;
        block.data = nullptr;
      }
      needed = needed || is_token(block.data);
    }
    if (mentions) item.identity.clear();
    return mentions && !needed;
  });
}

bool WeightStore::is_token(const void* source) {
  // The upper half of the address space is the kernel's.
  return (reinterpret_cast<std::uintptr_t>(source) >> 63) != 0;
}

const void* WeightStore::release(const void* source) {
  std::lock_guard lock(mutex_);
  WeightBlock* only = nullptr;
  Item* owner = nullptr;
  for (Item& item : items_) {
    for (WeightBlock& block : item.blocks) {
      if (block.data != source) continue;
      if (only != nullptr) return nullptr;
      only = &block;
      owner = &item;
    }
  }
  if (only == nullptr || owner->identity.empty()) return nullptr;
  only->data = reinterpret_cast<const void*>(std::uintptr_t{1} << 63 | ++last_token_ << 12);
  owner->identity = identify(*owner);
  return only->data;
}

Status WeightStore::unpack(const void* token, void* to) const {
  std::lock_guard lock(mutex_);
  for (const Item& item : items_) {
    for (std::size_t i = 0; i < item.blocks.size(); ++i) {
      if (item.blocks[i].data != token) continue;
      unpack_block(item.weight->data.get(), item.blocks, i, item.k, item.weight->dtype, item.source,
                   item.gated, to);
      return {};
    }
  }
  return Error{"these weights are gone"};
}

std::int64_t WeightStore::bytes() const {
  std::lock_guard lock(mutex_);
  std::int64_t sum = 0;
  for (const Item& item : items_) sum += item.weight->bytes;
  return sum;
}

void WeightStore::reserve(std::int64_t bytes) {
  std::lock_guard lock(mutex_);
  memory_.reserve(static_cast<std::size_t>(bytes));
}

void WeightStore::settle() {
  std::lock_guard lock(mutex_);
  memory_.settle();
#ifdef __GLIBC__
  // Released weights below malloc's threshold (32 MB) stay in its free lists: 0.65 GB of a model
  // with 1.2 G parameters.
  if (last_token_ != trimmed_token_) malloc_trim(0);
  trimmed_token_ = last_token_;
#endif
}

}  // namespace tilewright::ops
