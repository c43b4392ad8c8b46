// ContentHashes: hashes of what blocks of memory hold, on all threads, or begun ahead of time.
//
// A start that finds its packed weights on disk waits for Python, which looks for the model's plan
// on one core, and for memory, since the hashes read every weight. begin() reads on another core
// meanwhile; who asks first helps with what is left (20 of 200 ms of a start, SmolLM2-135M bf16).
//
// REQUIRES: the blocks stay as they are until this is gone. Not thread-safe. A child after fork()
// has no thread and hashes everything itself. Tested by content_hashes_test.
#pragma once

#include <atomic>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "cache/content_hash.h"
#include "ops/background.h"

namespace tilewright::ops {

class ContentHashes {
 public:
  using Block = std::span<const std::byte>;

  ContentHashes(std::vector<Block> blocks, const cache::ContentSecret& secret);
  ~ContentHashes();
  ContentHashes(const ContentHashes&) = delete;
  ContentHashes& operator=(const ContentHashes&) = delete;

  // Hashes in a thread of its own from now on, if there is one to be had.
  void begin();
  // Of each block: the hash of the hashes of its pieces, in order, whoever computed them.
  const std::vector<cache::ContentHash>& all();
  bool complete() const { return of_blocks_.size() == blocks_.size(); }
  // Of exactly this block, once all are there; nothing if it is none of them.
  std::optional<cache::ContentHash> find(Block block);

 private:
  void work();

  std::vector<Block> blocks_, pieces_;
  std::vector<std::size_t> ends_;  // of each block, in pieces_
  std::vector<cache::ContentHash> of_pieces_, of_blocks_;
  cache::ContentSecret secret_;
  std::atomic<std::size_t> next_ = 0;
  Background thread_;
  bool is_begun_ = false;
};

}  // namespace tilewright::ops
