// WeightDirectory: packed weights on disk, mapped read-only, so that a start packs nothing and all
// processes that compute with a weight share its pages.
//
// One immutable file per packed weight at weights/<key>.weight below the kernel cache, published
// whole and on the disk before it has its name. Unlike kernels, a weight is data: it is not read
// whole to be verified, but trusted as the checkpoint is that it was made of; its header is.
// A mapping outlives the file's name, so pruning never hurts a reader.
//
// Nothing here fails a program: whatever goes wrong is a miss or a failed write, counted with its
// reason. Thread-safe, and any number of processes may share a directory. Tested by
// weight_directory_test.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/content_hash.h"
#include "cache/file_contents.h"
#include "cache/key.h"
#include "cache/store.h"
#include "cache/weight_header.h"
#include "jit/base/result.h"

namespace tilewright::cache {

struct WeightCounters {
  std::uint64_t hits = 0, misses = 0, writes = 0, write_failures = 0;
  std::map<std::string, std::uint64_t> rejects;  // a file was there but not used, by reason
  std::string write_problem;                     // why the last write failed
};

// A weight of the directory. Its pages come from the file, are read-only, and stay valid while
// anybody holds `data`.
struct MappedWeight {
  std::shared_ptr<const std::byte> data;
  std::size_t bytes = 0;
  std::string form;  // as given to save()
};

struct WeightListing {
  std::string file;     // relative to the cache's directory
  std::string problem;  // why it would not be used, "" if it is good
  std::uint64_t bytes = 0;
  std::int64_t modified = 0;  // seconds since 1970
  bool current = false;       // made by this build's generator
  std::string key_text, form;
};

class WeightDirectory {
 public:
  using Look = std::function<bool(const MappedWeight&)>;

  // directory: the kernel cache's. max_bytes limits kernels and weights together: a weight is kept
  // if it fits after weights that nobody used for a day are gone; 0 is no limit.
  static WeightDirectory open(const std::string& directory, Mode mode, std::uint64_t max_bytes,
                              std::string_view generator = generator_hash());
  ~WeightDirectory();
  WeightDirectory(WeightDirectory&&) noexcept;
  WeightDirectory& operator=(WeightDirectory&&) noexcept;

  // What content hashes are taken with. Without one nothing can be found or kept; none is there
  // until a weight is to be kept (`make`).
  std::optional<ContentSecret> secret(bool make);

  // What is known of files from which weights were read; REQUIRES: there is a secret.
  FileContents file_contents();
  // Keeps it for later processes, which find nothing of a file if this fails: no error. Of several
  // processes at once the last one's stays.
  bool keeps_file_contents() const;
  void save(const FileContents& contents);

  // The weight of this key. checked: its data is read and compared with its hash. usable: the
  // caller's own look at it; false is a reject.
  std::optional<MappedWeight> map(std::string_view key_text, bool checked, const Look& usable);
  // Keeps a weight for later processes. One that is there already stays as it is.
  void save(std::string_view key_text, std::string_view form, std::span<const std::byte> data);

  // In order of file name; checked: as map().
  std::vector<WeightListing> list(bool checked) const;
  WeightCounters counters() const;

 private:
  struct State;
  explicit WeightDirectory(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Brings the pages of a mapped weight, or a part of one, into memory. False: they cannot be read,
// and a touch would end the process.
bool fetch(std::span<const std::byte> mapped);

}  // namespace tilewright::cache
