// See mapped_files.h. Tested by source_hashes_test.
#include "ops/mapped_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <utility>

namespace tilewright::ops {

// proc_pid_maps(5): begin-end perms offset major:minor inode    path
MappedFiles MappedFiles::read() {
  MappedFiles files;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const std::size_t path = line.find('/');
    if (path == std::string::npos) continue;
    Mapping mapping;
    unsigned major = 0, minor = 0;
    char shared = 0;
    // A process of torch has a thousand lines; streams would take 4 us for each.
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %*3c%c %" SCNx64 " %x:%x %" SCNu64,
                    &mapping.begin, &mapping.end, &shared, &mapping.offset, &major, &minor,
                    &mapping.inode) != 7 ||
        shared != 'p') {
      continue;
    }
    mapping.device = makedev(major, minor);
    mapping.path = line.substr(path);
    files.mappings_.push_back(std::move(mapping));
  }
  return files;
}

std::optional<MappedFiles::Place> MappedFiles::find(std::span<const std::byte> memory) {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::uintptr_t end = begin + memory.size();
  const auto next = std::ranges::upper_bound(mappings_, begin, {}, &Mapping::begin);
  if (next == mappings_.begin()) return std::nullopt;
  const Mapping& mapping = *std::prev(next);
  if (end > mapping.end) return std::nullopt;
  auto file = opened(mapping);
  if (!file) return std::nullopt;
  return Place{std::move(file), {mapping.offset + (begin - mapping.begin), memory.size()}};
}

// By its name, which is the only way: it may be another file's by now.
std::shared_ptr<const cache::FileDescriptor> MappedFiles::opened(const Mapping& mapping) {
  const auto [known, is_new] = files_.try_emplace(mapping.path);
  if (is_new) {
    const int flags = O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    cache::FileDescriptor file(open(mapping.path.c_str(), flags));
    if (file.valid()) {
      known->second = std::make_shared<const cache::FileDescriptor>(std::move(file));
    }
  }
  struct stat status;
  if (!known->second || fstat(known->second->get(), &status) != 0) return nullptr;
  if (status.st_dev != mapping.device || status.st_ino != mapping.inode) return nullptr;
  return known->second;
}

}  // namespace tilewright::ops
