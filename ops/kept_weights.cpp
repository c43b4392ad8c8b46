// See kept_weights.h. Tested by kept_weights_test.
#include "ops/kept_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

// Adds the time until its end.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Threads that share less wait for each other longer than they work: the others are asleep at this
// point, and a virtual machine may not run them at once.
constexpr std::int64_t kWorthATeam = 8 << 20;

int team_for(std::int64_t bytes) { return bytes < kWorthATeam ? 1 : default_threads(); }

// The memory of a block, if it is without gaps.
std::optional<std::span<const std::byte>> memory_of(const WeightBlock& block, std::int64_t k,
                                                    std::int64_t element_bytes) {
  const std::int64_t length = (block.transposed ? block.rows : k) * element_bytes;
  if (block.row_stride != length) return std::nullopt;
  return std::span(static_cast<const std::byte*>(block.data),
                   static_cast<std::size_t>(block.rows * k * element_bytes));
}

constexpr const char* kTwelveBits = "bf16 in 12 bits";

std::string text_of(PackedForm form) {
  return form.twelve_bits ? kTwelveBits : std::string(graph::name(form.dtype));
}

std::optional<PackedForm> form_of(const std::string& text) {
  if (text == kTwelveBits) return PackedForm{graph::DataType::bf16, true};
  const std::optional<graph::DataType> dtype = graph::data_type(text);
  if (!dtype) return std::nullopt;
  return PackedForm{*dtype, false};
}

bool fetch_by_team(std::span<const std::byte> mapped) {
  const auto bytes = static_cast<std::int64_t>(mapped.size());
  std::atomic<bool> all = true;
  run_team(team_for(bytes), [&](int thread, int threads) {
    const auto part = share(bytes, thread, threads);
    if (!cache::fetch(mapped.subspan(static_cast<std::size_t>(part.begin),
                                     static_cast<std::size_t>(part.end - part.begin)))) {
      all = false;
    }
  });
  return all;
}

}  // namespace

KeptWeights::KeptWeights(cache::WeightDirectory directory, Policy policy, bool checked)
    : directory_(std::move(directory)), policy_(policy), checked_(checked) {}

std::string KeptWeights::key(const WeightRequest& request, bool keep, SourceHashes* ahead) {
  const std::optional<cache::ContentSecret> secret = directory_.secret(keep);
  if (!secret) return {};
  const std::int64_t element_bytes = graph::size_in_bytes(request.source);
  std::vector<std::span<const std::byte>> blocks;
  for (const WeightBlock& block : request.blocks) {
    const auto memory = memory_of(block, request.k, element_bytes);
    if (!memory) return {};
    blocks.push_back(*memory);
  }
  std::vector<cache::ContentHash> hashes;
  for (std::size_t i = 0; ahead != nullptr && i < blocks.size(); ++i) {
    const std::optional<cache::ContentHash> known = ahead->find(blocks[i]);
    if (!known) break;
    hashes.push_back(*known);
  }
  if (hashes.size() < blocks.size()) hashes = ContentHashes(blocks, *secret).all();
  std::string text =
      fmt::format("weight {}\n{} k={}{}{}{}\n", cache::kWeightFormat, graph::name(request.source),
                  request.k, request.gated ? " gated" : "", request.forms.exact ? " exact" : "",
                  request.forms.twelve_bits ? " 12" : "");
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    const WeightBlock& block = request.blocks[i];
    text += fmt::format("{}{} ", block.rows, block.transposed ? " transposed" : "");
    for (std::byte byte : hashes[i]) text += fmt::format("{:02x}", std::to_integer<int>(byte));
    text += '\n';
  }
  return text;
}

std::shared_ptr<const PackedWeight> KeptWeights::find(const std::string& key,
                                                      const WeightRequest& request) {
  auto weight = std::make_shared<PackedWeight>();
  for (const WeightBlock& block : request.blocks) weight->n += block.rows;
  weight->k = request.k;
  // A corrupt file may hold wrong numbers, as a corrupt checkpoint may, but nothing in it may lead
  // a kernel out of it.
  const auto usable = [&](const cache::MappedWeight& mapped) {
    const std::optional<PackedForm> form = form_of(mapped.form);
    const std::span data(mapped.data.get(), mapped.bytes);
    if (!form || !fetch_by_team(data)) return false;
    weight->form = *form;
    if (form->twelve_bits) return twelve_bits::is_whole(data, panel_count(weight->n), weight->k);
    const std::int64_t bytes =
        panel_count(weight->n) * packed_bytes(panel_columns(), weight->k, form->dtype);
    return mapped.bytes == static_cast<std::size_t>(bytes);
  };
  const auto mapped = directory_.map(key, checked_, usable);
  if (!mapped) return nullptr;
  weight->data = {mapped->data, reinterpret_cast<const char*>(mapped->data.get())};
  weight->bytes = static_cast<std::int64_t>(mapped->bytes);
  return weight;
}

Result<std::shared_ptr<const PackedWeight>> KeptWeights::obtain(const WeightRequest& request,
                                                                bool keep, const Pack& pack) {
  WeightCounters spent;
  Result<std::shared_ptr<const PackedWeight>> weight = obtain(request, keep, pack, spent);
  const std::lock_guard lock(mutex_);
  counters_.packed += spent.packed;
  counters_.mapped += spent.mapped;
  counters_.hash_seconds += spent.hash_seconds;
  counters_.map_seconds += spent.map_seconds;
  counters_.pack_seconds += spent.pack_seconds;
  counters_.write_seconds += spent.write_seconds;
  return weight;
}

Result<std::shared_ptr<const PackedWeight>> KeptWeights::obtain(const WeightRequest& request,
                                                                bool keep, const Pack& pack,
                                                                WeightCounters& spent) {
  keep = policy_ != Policy::off && (keep || policy_ == Policy::on);
  std::string name;
  if (policy_ != Policy::off) {
    const Stopwatch watch(spent.hash_seconds);
    name = key(request, keep, request.ahead);
  }
  if (!name.empty()) {
    const Stopwatch watch(spent.map_seconds);
    if (auto weight = find(name, request)) {
      spent.mapped = 1;
      return weight;
    }
  }
  Result<std::shared_ptr<const PackedWeight>> weight = [&] {
    const Stopwatch watch(spent.pack_seconds);
    return pack();
  }();
  if (!weight) return weight;
  spent.packed = 1;
  if (keep && !name.empty()) {
    const Stopwatch watch(spent.write_seconds);
    const std::span data((*weight)->data.get(), static_cast<std::size_t>((*weight)->bytes));
    // Somebody may have written the sources meanwhile: what was packed is then of neither content.
    if (key(request, keep, nullptr) == name) {
      directory_.save(name, text_of((*weight)->form), std::as_bytes(data));
    }
  }
  return weight;
}

std::unique_ptr<SourceHashes> KeptWeights::hash_ahead(std::vector<SourceHashes::Block> blocks) {
  if (!any()) return nullptr;
  return std::make_unique<SourceHashes>(std::move(blocks), directory_,
                                        SourceHashes::Options{.read_all = checked_});
}

bool KeptWeights::any() {
  return policy_ != Policy::off && directory_.secret(policy_ == Policy::on).has_value();
}

WeightCounters KeptWeights::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

}  // namespace tilewright::ops
