// FileContents: content hashes of parts of files, found by the files' states, so that a start need
// not read a checkpoint whose weights an earlier one has hashed.
//
// Whatever writes a file moves its time of change (ctime), which nobody can set; with device, inode
// and size it tells a file that was written from one that was not. Two holes are closed when a file
// is hashed: times are only as fine as the kernel's tick, so a file counts when it has been left
// alone for a while; and a page that a process has mapped and made dirty can be written again
// without a trace until it is on the disk, so it is brought there first (lasting_state). File
// systems of which this is not known have no states: memory (tmpfs), networks, FUSE, overlays.
//
// Kept as text in weights.sources beside the weights (cache/README.md), under a hash with their
// secret. Not thread-safe. Tested by file_contents_test.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/content_hash.h"

namespace tilewright::cache {

// Two equal ones, and the file has not been written in between.
struct FileState {
  std::uint64_t device = 0, inode = 0, bytes = 0;
  std::int64_t modified = 0, changed = 0;  // nanoseconds since 1970

  bool operator==(const FileState&) const = default;
};

struct FilePart {
  std::uint64_t offset = 0, bytes = 0;

  auto operator<=>(const FilePart&) const = default;
};

// Of an open file; nothing on file systems that promise too little.
std::optional<FileState> state_of(int file);

// The same, of a file that was left alone for `age`: who hashes it now and then finds it in this
// state has hashed what every later reader finds in this state. Waits for the disk if it has to.
std::optional<FileState> lasting_state(int file, std::chrono::seconds age);

class FileContents {
 public:
  // Empty if the text is not what this cache's processes wrote.
  static FileContents parse(std::string_view text, const ContentSecret& secret);
  std::string text(const ContentSecret& secret) const;

  std::optional<ContentHash> find(const FileState& file, FilePart part) const;
  // What was known of the file in other states is forgotten, and files beyond the newest 256.
  void add(const FileState& file, FilePart part, const ContentHash& hash);

 private:
  struct File {
    FileState state;
    std::map<FilePart, ContentHash> parts;
  };

  std::vector<File> files_;  // oldest first
};

}  // namespace tilewright::cache
