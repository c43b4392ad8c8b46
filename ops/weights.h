// WeightStore: packed weights, shared by all programs of a model (prefill and decode, every graph
// of torch.compile).
//
// A packed weight is identified by the source blocks' addresses, its shape, type and packing. The
// store does not watch the sources: the front end calls forget() when a parameter changed or died.
//
// Thread-safe. Tested by program_test.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "graph/type.h"
#include "jit/base/result.h"
#include "ops/gemm/pack.h"
#include "ops/weight_memory.h"

namespace tilewright::ops {

struct PackedWeight {
  WeightBytes data;
  std::int64_t n = 0, k = 0, bytes = 0;
  graph::DataType dtype = graph::DataType::f32;
};

class WeightStore {
 public:
  // Packs (in parallel) or finds. blocks: row-major pieces of `source` stacked along n; gated: gate
  // and up. exact: fp32 that fits 16 bits is stored in them (exact.h); the result tells by its
  // dtype.
  Result<std::shared_ptr<const PackedWeight>> pack(const std::vector<WeightBlock>& blocks,
                                                   std::int64_t k, graph::DataType source,
                                                   bool gated, bool exact);
  // Drops what was packed from a source at this address; programs that use it keep their copy.
  void forget(const void* source);
  std::int64_t bytes() const;
  // Around capture and packing: fetches memory for so many bytes of packed weights meanwhile
  // (weight_memory.h).
  void reserve(std::int64_t bytes);
  void settle();

 private:
  struct Item {
    std::vector<const void*> sources;
    std::shared_ptr<const PackedWeight> weight;
  };
  mutable std::mutex mutex_;
  WeightMemory memory_;
  std::map<std::string, Item, std::less<>> items_;
};

}  // namespace tilewright::ops
