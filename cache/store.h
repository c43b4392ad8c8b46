// Store: the cache on disk of kernels and plans, a directory of immutable self-verifying entries.
//
// One file per entry at objects/<first two hex digits>/<key>.kernel (or .plan), published whole by
// linkat (or rename), so no lock is needed for correctness: a reader sees a complete file or none,
// and two writers of one key write the same bytes. A load reads the file into private memory and
// verifies that copy; the path is never touched again and never mapped. Files and directories must
// belong to this user or root and be writable by nobody else, since what they hold is executed.
//
// Sealed packs (pack.h) stand before the directory: load() looks in them first, whatever the mode.
//
// Nothing here fails: whatever goes wrong is a miss, counted with its reason.
//
// Thread-safe, usable in a child after fork(), and any number of processes may share a directory.
// Tested by cache_test, cache_trust_test, cache_mutation_test and cache_fault_test.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache/entry.h"
#include "cache/key.h"
#include "cache/pack.h"
#include "jit/base/target.h"

namespace tilewright::cache {

enum class Mode : std::uint8_t { read_write, read_only, off };

struct Counters {
  std::uint64_t hits = 0;       // of packs, too
  std::uint64_t pack_hits = 0;  // of these
  std::uint64_t misses = 0, writes = 0, write_failures = 0;
  std::map<std::string, std::uint64_t> rejects;         // a file was there but not used, by reason
  std::map<std::string, std::uint64_t> write_problems;  // why write_failures
};

// One file of the cache, verified; or a directory of it that is not to be trusted, with the
// problem.
struct Listing {
  std::string file;     // relative to the directory
  bool plan = false;    // else a kernel
  std::string problem;  // why the entry would not be used, "" if it is good
  std::uint64_t bytes = 0;
  std::int64_t modified = 0;  // seconds since 1970
  bool current = false;       // made by this build's generator
  std::string generator;
  std::string key_text, name;
  IsaMask required_isa = 0;
  std::uint64_t code_bytes = 0;
};

class Store {
 public:
  // Never fails: an unusable directory gives a store that always misses, with problem() saying why.
  // max_bytes limits the size of all entries together (oldest go first); 0 is no limit.
  static Store open(const std::string& directory, Mode mode, std::uint64_t max_bytes,
                    std::string_view generator = generator_hash());
  ~Store();
  Store(Store&&) noexcept;
  Store& operator=(Store&&) noexcept;

  // Error: it is of another generator. Before other threads use the store.
  Status add_pack(std::shared_ptr<const Pack> pack);

  // The entry of this key, if it is there, whole, and runs on a host that has host_isa.
  std::optional<Entry> load(std::string_view key_text, IsaMask host_isa);
  // Keeps an entry for later processes. An entry that is there already stays as it is.
  void save(const Entry& entry);
  // Removes the entry of this key, which was found to be wrong.
  void remove(std::string_view key_text);

  std::vector<Listing> list() const;  // in order of file name
  // Removes the oldest entries until the rest fits, and what killed writers left behind. Returns
  // how many entries were removed; none while another process prunes.
  std::uint64_t prune(std::uint64_t max_bytes);

  Counters counters() const;
  // Why the store does not work, or does not keep anything; "" if all is well.
  const std::string& problem() const;
  const std::string& directory() const;
  Mode mode() const;
  // Whether there is anything to look in: a directory or a pack.
  bool can_load() const;

 private:
  struct State;
  explicit Store(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Where the cache is: `given` (TILEWRIGHT_CACHE_DIR, read by the caller) if not empty, else
// $XDG_CACHE_HOME/tilewright, else $HOME/.cache/tilewright. Empty if there is no such place, and
// always in a process that runs with somebody else's privileges (AT_SECURE): its environment is an
// attacker's.
std::string default_directory(std::string_view given = {});

}  // namespace tilewright::cache
