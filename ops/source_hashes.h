// SourceHashes: what the sources of a model's weights hold, as content hashes, ahead of time.
//
// Sources that map a file which an earlier process has hashed are not read at all
// (cache/file_contents.h): a checkpoint of 2.4 GB takes 0.2 to 0.4 s to read, and seconds from a
// disk. The others are hashed by a thread while Python looks for the model's plan
// (content_hashes.h), and learned for later processes where they map a file.
//
// REQUIRES: the sources stay as they are until wait() or the end. Not thread-safe. Tested by
// source_hashes_test.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cache/weight_directory.h"
#include "ops/background.h"
#include "ops/content_hashes.h"
#include "ops/mapped_files.h"

namespace tilewright::ops {

class SourceHashes {
 public:
  using Block = ContentHashes::Block;

  struct Options {
    bool read_all = false;          // whatever is known of files
    std::chrono::seconds age{120};  // a file is learned that nobody wrote for so long
  };

  // Begins in a thread of its own. REQUIRES: `directory` has a secret, and outlives this.
  SourceHashes(std::vector<Block> blocks, cache::WeightDirectory& directory, Options options);

  // Of exactly this block; nothing if it is none of them.
  std::optional<cache::ContentHash> find(Block block);
  // From here on nobody reads the sources.
  void wait();
  // Keeps what was hashed of files for later processes, if all of it was hashed; once.
  void learn();

  // How many blocks need not be read.
  std::size_t known() { return looked_up().known.size(); }

 private:
  struct Known {
    Block block;
    cache::ContentHash hash;
  };
  struct Unknown {  // of a file
    Block block;
    MappedFiles::Place place;
    cache::FileState state;
  };

  struct LookedUp {
    std::vector<Known> known;
    std::vector<Unknown> unlearned;
    std::optional<ContentHashes> hashes;  // of all others
  };
  std::unique_ptr<LookedUp> look_up() const;
  LookedUp& looked_up();

  const std::vector<Block> blocks_;
  cache::WeightDirectory& directory_;
  const cache::FileContents contents_;
  const Options options_;
  std::unique_ptr<LookedUp> looked_up_;
  Background thread_;
};

}  // namespace tilewright::ops
