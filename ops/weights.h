// WeightStore: packed weights, shared by all programs of a model (prefill and decode, every graph
// of torch.compile).
//
// A packed weight is identified by the source blocks' addresses, its shape, type and packing. The
// store does not watch the sources: the front end calls forget() when a parameter changed or died.
//
// Or a program that runs once reads a weight where its source lies (WeightStore::in_place).
//
// A source that was packed may give its memory back: release() returns a token that stands for its
// address from then on, and the packed weight is the only copy of its values, which unpack() reads.
//
// Thread-safe. Tested by program_test, weights_test, in_place_test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "graph/type.h"
#include "jit/base/fork_mutex.h"
#include "jit/base/result.h"
#include "ops/gemm/pack.h"
#include "ops/source_hashes.h"
#include "ops/weight_memory.h"

namespace tilewright::ops {

// What a weight is packed from.
struct WeightSource {
  std::vector<WeightBlock> blocks;  // as in pack.h
  bool gated = false;
};

struct PackedWeight {
  // Memory of its own, or pages of a file (kept_weights.h); null if it is read in place.
  std::shared_ptr<const char> data;
  std::int64_t n = 0, k = 0, bytes = 0;
  PackedForm form;
  // Whose values have the form's type: who multiplies packs panels as it comes to them.
  std::optional<WeightSource> in_place;
};

// Which forms a weight may be stored in, all without loss.
struct WeightForms {
  bool exact = true;                      // fp32 that fits 16 bits (exact.h)
  bool twelve_bits = false;               // bf16 (twelve_bits.h), where that is at most
  std::int64_t twelve_bits_percent = 84;  // of its size in 16 bits
};

// Stands for weights whose values are not there: what their values would have allowed.
struct AssumedValues {
  graph::DataType fits = graph::DataType::f32;  // of fp32 weights: bf16 or f16 if exactly so
  bool twelve_bits = false;                     // bf16 of few exponents
};

// Called during compile with the name of a constant that was packed and whose own memory nothing in
// the graph reads any more: its owner may release it at once, so that a model's weights are not in
// memory twice.
using PackedCallback = std::function<void(const std::string& name)>;

class KeptWeights;

class WeightStore {
 public:
  WeightStore() = default;
  // Nothing is read or packed: programs can be prepared (prewarm), not run.
  explicit WeightStore(AssumedValues assumed) : assumed_(assumed) {}

  // Packs (in parallel) or finds. blocks: row-major pieces of `source` stacked along n; gated: gate
  // and up. The result tells its form. Found in any form that `exact` allows: a weight that one
  // program has in 12 bits is not packed again for another. kept: where else to look, may be null;
  // keep: and to write what was packed.
  Result<std::shared_ptr<const PackedWeight>> pack(const std::vector<WeightBlock>& blocks,
                                                   std::int64_t k, graph::DataType source,
                                                   bool gated, WeightForms forms,
                                                   KeptWeights* kept = nullptr, bool keep = false);
  // What pack() made of it, else the weight as its source holds it, in the source's own type, which
  // the store does not remember. Error: its source has no memory any more.
  Result<std::shared_ptr<const PackedWeight>> in_place(const std::vector<WeightBlock>& blocks,
                                                       std::int64_t k, graph::DataType source,
                                                       bool gated, WeightForms forms);
  // Drops what was packed from this source; programs that use it keep their copy. Values that only
  // the store has stay until the last token for them is forgotten.
  void forget(const void* source);
  // Whether an address is a token.
  static bool is_token(const void* source);
  // Null if the source was not packed, or more than once: then its memory must stay.
  const void* release(const void* source);
  // Writes the source's rows, row-major in its own type, bit for bit as they were.
  Status unpack(const void* token, void* to) const;
  // The largest magnitude of a packed weight of fp32; infinity if any is no number. Read once. Of
  // weights that are not there 1.
  float largest_magnitude(const std::shared_ptr<const PackedWeight>& weight);
  std::int64_t bytes() const;
  // Before packing: address space for so many bytes of packed weights, and pages of it where that
  // begins soon (weight_memory.h); settle() ends that, and returns to the system what sources gave
  // back.
  void reserve(std::int64_t bytes, bool ask_ahead);
  // Or begins to hash sources that weights of `kept` will be looked for by, until settle().
  // REQUIRES: they stay as they are.
  void hash_ahead(std::vector<SourceHashes::Block> sources, KeptWeights& kept);
  void settle();

 private:
  struct Item {
    std::string identity;  // empty: a source changed, nothing may find it
    std::vector<WeightBlock> blocks;
    std::int64_t k = 0;
    graph::DataType source = graph::DataType::f32;
    bool gated = false, exact = false;
    std::shared_ptr<const PackedWeight> weight;
    std::optional<float> largest;  // once somebody asked
  };
  static std::string identify(const Item& item);
  // Null: it was not packed. Error: nor can it be.
  Result<std::shared_ptr<const PackedWeight>> known(const Item& item) const;
  Result<std::shared_ptr<const PackedWeight>> packed(const Item& item, WeightForms forms);

  PackedForm assumed_form(const Item& item, bool twelve_bits) const;

  const std::optional<AssumedValues> assumed_;
  mutable ForkMutex mutex_;
  WeightMemory memory_;
  std::unique_ptr<SourceHashes> ahead_;
  std::vector<Item> items_;
  std::uintptr_t last_token_ = 0, trimmed_token_ = 0;
};

}  // namespace tilewright::ops
