// MappedFiles: which part of which file memory maps.
//
// The tensors of a checkpoint that was loaded as it is (safetensors, same element type) are private
// mappings of its file: while nobody wrote them, their values are the file's. Reads
// /proc/self/maps once; what was mapped since is not known.
//
// Not thread-safe. Tested by source_hashes_test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/file_contents.h"
#include "cache/trusted_file.h"

namespace tilewright::ops {

class MappedFiles {
 public:
  static MappedFiles read();

  struct Place {
    std::shared_ptr<const cache::FileDescriptor> file;
    cache::FilePart part;
  };
  // Nothing if `memory` does not lie in one private mapping of a file that has its name still.
  // Whether the memory still holds what the file does is another question (clean_pages.h).
  std::optional<Place> find(std::span<const std::byte> memory);

 private:
  struct Mapping {
    std::uintptr_t begin = 0, end = 0;
    std::uint64_t offset = 0, device = 0, inode = 0;
    std::string path;
  };
  std::shared_ptr<const cache::FileDescriptor> opened(const Mapping& mapping);

  std::vector<Mapping> mappings_;  // by address
  std::map<std::string, std::shared_ptr<const cache::FileDescriptor>>
      files_;  // by path; may be null
};

}  // namespace tilewright::ops
