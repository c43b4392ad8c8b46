// WeightStore: see weights.h. Tested by program_test.
#include "ops/weights.h"

#include <fmt/format.h>
#include <malloc.h>  // glibc

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <optional>
#include <utility>

#include "ops/gemm/exact.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/kept_weights.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

// The largest magnitude among floating values: patterns without their sign are ordered as these
// are, NaN above infinity.
template <class Pattern>
Pattern largest_pattern(const Pattern* values, std::int64_t count) {
  constexpr auto magnitude = static_cast<Pattern>(std::numeric_limits<Pattern>::max() >> 1);
  Pattern largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<Pattern>(values[i] & magnitude));
  }
  return largest;
}

// The same of a panel, as the pattern of an fp32.
std::uint32_t largest_of_panel(const PackedWeight& weight, std::int64_t panel) {
  const graph::DataType dtype = weight.form.dtype;
  if (weight.form.twelve_bits) {
    std::vector<std::uint16_t> column(static_cast<std::size_t>(weight.k));
    std::uint16_t largest = 0;
    for (std::int64_t i = 0; i < panel_columns(); ++i) {
      twelve_bits::unpack_column(reinterpret_cast<const std::byte*>(weight.data.get()), panel, i,
                                 weight.k, column.data());
      largest = std::max(largest, largest_pattern(column.data(), weight.k));
    }
    return widen(dtype, largest);
  }
  const std::int64_t bytes = packed_bytes(panel_columns(), weight.k, dtype);
  const char* data = weight.data.get() + panel * bytes;
  if (dtype == graph::DataType::f32) {
    return largest_pattern(reinterpret_cast<const std::uint32_t*>(data), bytes / 4);
  }
  return widen(dtype, largest_pattern(reinterpret_cast<const std::uint16_t*>(data), bytes / 2));
}

// Calls visit(panel), on as many threads as the process has: each first touches the pages that it
// will read in decode.
template <class Visit>
void each_panel(std::int64_t n, Visit&& visit) {
  run_team(default_threads(), [&](int thread, int threads) {
    const WorkRange panels = share(panel_count(n), thread, threads);
    for (std::int64_t i = panels.begin; i < panels.end; ++i) visit(i);
  });
}

}  // namespace

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
    WeightForms forms, KeptWeights* kept, bool keep) {
  Item item{{}, blocks, k, source, gated, forms.exact, nullptr, {}};
  item.identity = identify(item);
  std::lock_guard lock(mutex_);
  Result<std::shared_ptr<const PackedWeight>> found = known(item);
  if (!found || *found != nullptr) return found;
  const auto make = [&] { return packed(item, forms); };
  Result<std::shared_ptr<const PackedWeight>> weight =
      kept == nullptr ? make()
                      : kept->obtain({blocks, k, source, gated, forms, ahead_.get()}, keep, make);
  if (!weight) return weight;
  item.weight = *weight;
  items_.push_back(std::move(item));
  return weight;
}

Result<std::shared_ptr<const PackedWeight>> WeightStore::known(const Item& item) const {
  for (const Item& known : items_) {
    if (known.identity == item.identity) return known.weight;
  }
  for (const WeightBlock& block : item.blocks) {
    if (is_token(block.data)) return Error{"its weight is packed in another form already"};
  }
  return std::shared_ptr<const PackedWeight>();
}

Result<std::shared_ptr<const PackedWeight>> WeightStore::in_place(
    const std::vector<WeightBlock>& blocks, std::int64_t k, graph::DataType source, bool gated,
    WeightForms forms) {
  Item item{{}, blocks, k, source, gated, forms.exact, nullptr, {}};
  item.identity = identify(item);
  std::lock_guard lock(mutex_);
  Result<std::shared_ptr<const PackedWeight>> found = known(item);
  if (!found || *found != nullptr) return found;
  auto weight = std::make_shared<PackedWeight>();
  for (const WeightBlock& block : blocks) weight->n += block.rows;
  weight->k = k;
  weight->bytes = weight->n * k * graph::size_in_bytes(source);
  weight->form.dtype = source;
  weight->in_place = WeightSource{blocks, gated};
  return std::shared_ptr<const PackedWeight>(weight);
}

PackedForm WeightStore::assumed_form(const Item& item, bool twelve_bits) const {
  PackedForm form;
  const bool narrows = item.exact && item.source == graph::DataType::f32;
  form.dtype = narrows ? assumed_->fits : item.source;
  form.twelve_bits = twelve_bits && form.dtype == graph::DataType::bf16 && assumed_->twelve_bits;
  return form;
}

Result<std::shared_ptr<const PackedWeight>> WeightStore::packed(const Item& item,
                                                                WeightForms forms) {
  const bool narrows = item.exact && item.source == graph::DataType::f32;
  const graph::DataType dtype = narrows ? exact_type(item.blocks, item.k) : item.source;
  std::int64_t n = 0;
  for (const WeightBlock& block : item.blocks) n += block.rows;
  if (assumed_) {
    auto weight = std::make_shared<PackedWeight>();
    weight->n = n;
    weight->k = item.k;
    weight->form = assumed_form(item, forms.twelve_bits);
    return std::shared_ptr<const PackedWeight>(weight);
  }
  const std::int64_t panel_bytes = packed_bytes(panel_columns(), item.k, dtype);
  auto weight = std::make_shared<PackedWeight>();
  weight->n = n;
  weight->k = item.k;
  weight->form.dtype = dtype;
  weight->bytes = panel_count(n) * panel_bytes;

  // A panel in 16 bits, from which its 12 are made. Made twice: it stays in L2, and memory for a
  // second copy of the weight would cost more.
  const auto with_pairs = [&](std::int64_t panel, auto&& visit) {
    std::vector<std::uint16_t> pairs(static_cast<std::size_t>(panel_bytes / 2));
    pack_panel(item.blocks, item.k, item.source, dtype, item.gated, panel, pairs.data());
    visit(pairs.data());
  };
  std::optional<twelve_bits::Packer> packer;
  if (forms.twelve_bits && dtype == graph::DataType::bf16) {
    packer.emplace(panel_count(n), item.k);
    each_panel(n, [&](std::int64_t i) {
      with_pairs(i, [&](const std::uint16_t* pairs) { packer->inspect(i, pairs); });
    });
    const std::int64_t bytes = packer->place();
    weight->form.twelve_bits = 100 * bytes <= forms.twelve_bits_percent * weight->bytes;
    if (weight->form.twelve_bits) weight->bytes = bytes;
  }

  WeightBytes memory = memory_.allocate(static_cast<std::size_t>(weight->bytes));
  if (!memory) {
    return Error{fmt::format("out of memory for {} bytes of packed weights", weight->bytes)};
  }
  auto* to = reinterpret_cast<std::byte*>(memory.get());
  if (weight->form.twelve_bits) {
    each_panel(n, [&](std::int64_t i) {
      with_pairs(i, [&](const std::uint16_t* pairs) { packer->pack(i, pairs, to); });
    });
  } else {
    each_panel(n, [&](std::int64_t i) {
      pack_panel(item.blocks, item.k, item.source, dtype, item.gated, i, to + i * panel_bytes);
    });
  }
  weight->data = std::move(memory);
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
  if (ahead_) ahead_->wait();  // who reads sources ahead is done: from here on they may be freed
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
      unpack_block(item.weight->data.get(), item.blocks, i, item.k, item.weight->form, item.source,
                   item.gated, to);
      return {};
    }
  }
  return Error{"these weights are gone"};
}

float WeightStore::largest_magnitude(const std::shared_ptr<const PackedWeight>& weight) {
  if (assumed_) return 1;
  const std::lock_guard lock(mutex_);
  const auto item = std::ranges::find(items_, weight, &Item::weight);
  if (item != items_.end() && item->largest) return *item->largest;
  std::atomic<std::uint32_t> largest{0};
  each_panel(weight->n, [&](std::int64_t panel) {
    const std::uint32_t found = largest_of_panel(*weight, panel);
    std::uint32_t known = largest.load();
    while (known < found && !largest.compare_exchange_weak(known, found)) {
    }
  });
  const float infinity = std::numeric_limits<float>::infinity();
  const bool finite = largest < std::bit_cast<std::uint32_t>(infinity);
  const float magnitude = finite ? std::bit_cast<float>(largest.load()) : infinity;
  if (item != items_.end()) item->largest = magnitude;
  return magnitude;
}

std::int64_t WeightStore::bytes() const {
  std::lock_guard lock(mutex_);
  std::int64_t sum = 0;
  for (const Item& item : items_) sum += item.weight->bytes;
  return sum;
}

void WeightStore::reserve(std::int64_t bytes, bool ask_ahead) {
  std::lock_guard lock(mutex_);
  memory_.reserve(static_cast<std::size_t>(bytes), ask_ahead);
}

void WeightStore::hash_ahead(std::vector<SourceHashes::Block> sources, KeptWeights& kept) {
  std::lock_guard lock(mutex_);
  ahead_ = kept.hash_ahead(std::move(sources));
}

void WeightStore::settle() {
  std::lock_guard lock(mutex_);
  if (ahead_) ahead_->learn();
  ahead_.reset();
  memory_.settle();
#ifdef __GLIBC__
  // Released weights below malloc's threshold (32 MB) stay in its free lists: 0.65 GB of a model
  // with 1.2 G parameters.
  if (last_token_ != trimmed_token_) malloc_trim(0);
  trimmed_token_ = last_token_;
#endif
}

}  // namespace tilewright::ops
