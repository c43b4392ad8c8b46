// KeptWeights: packed weights that are kept on disk (cache/weight_directory.h), found by what their
// sources hold.
//
// A packed weight is named by the hash of every byte of its sources, their shapes and the forms
// that were allowed, never by a file's name or time or by samples: whatever was written, and
// however, is packed anew. Hashing runs at the speed of memory on all threads, a tenth to a
// fiftieth of the time of packing.
//
// Thread-safe. Tested by kept_weights_test.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cache/weight_directory.h"
#include "graph/type.h"
#include "ops/source_hashes.h"
#include "ops/weights.h"

namespace tilewright::ops {

// Of all weights of a process: packed from their sources, mapped from a file, written to one.
struct WeightCounters {
  std::uint64_t packed = 0, mapped = 0;
  double hash_seconds = 0, map_seconds = 0, pack_seconds = 0, write_seconds = 0;
};

// What is asked for: as WeightStore::pack().
struct WeightRequest {
  std::span<const WeightBlock> blocks;
  std::int64_t k = 0;
  graph::DataType source = graph::DataType::f32;
  bool gated = false;
  WeightForms forms;
  SourceHashes* ahead = nullptr;  // of some of the blocks, if anybody began
};

class KeptWeights {
 public:
  enum class Policy : std::uint8_t { off, automatic, on };

  // automatic: weights are looked for, and kept where compile() is told to; on: all are kept.
  // checked: every mapped weight is read and compared with its hash first.
  KeptWeights(cache::WeightDirectory directory, Policy policy, bool checked);

  using Pack = std::function<Result<std::shared_ptr<const PackedWeight>>()>;

  // Finds the weight or has it made by `pack`, and keeps it if `keep` or the policy says so.
  Result<std::shared_ptr<const PackedWeight>> obtain(const WeightRequest& request, bool keep,
                                                     const Pack& pack);

  // Begins to hash what weights will be looked for by; null if none will be.
  std::unique_ptr<SourceHashes> hash_ahead(std::vector<SourceHashes::Block> blocks);

  // Whether this directory holds, or held, any weight, or is to. If not nothing is looked for, nor
  // hashed. With `on` it makes the secret that hashing needs, with the other policies nothing.
  bool any();
  WeightCounters counters() const;
  const cache::WeightDirectory& directory() const { return directory_; }

 private:
  // Empty: it cannot be named, or there is nothing to find.
  std::string key(const WeightRequest& request, bool keep, SourceHashes* ahead);
  std::shared_ptr<const PackedWeight> find(const std::string& key, const WeightRequest& request);
  Result<std::shared_ptr<const PackedWeight>> obtain(const WeightRequest& request, bool keep,
                                                     const Pack& pack, WeightCounters& spent);

  cache::WeightDirectory directory_;
  Policy policy_;
  bool checked_;
  mutable std::mutex mutex_;
  WeightCounters counters_;
};

}  // namespace tilewright::ops
