// See file_contents.h. Tested by file_contents_test.
#include "cache/file_contents.h"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <sstream>

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342  // in linux/magic.h since 5.15
#endif

namespace tilewright::cache {
namespace {

constexpr std::string_view kTitle = "tilewright sources 1";
constexpr std::size_t kMostFiles = 256;
constexpr std::int64_t kSecond = 1'000'000'000;

std::int64_t nanoseconds(const timespec& time) { return time.tv_sec * kSecond + time.tv_nsec; }

std::string hexadecimal(const ContentHash& hash) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string text;
  for (std::byte byte : hash) {
    text += digits[std::to_integer<std::size_t>(byte >> 4)];
    text += digits[std::to_integer<std::size_t>(byte & std::byte{15})];
  }
  return text;
}

std::optional<ContentHash> hash_of(std::string_view digits) {
  ContentHash hash;
  if (digits.size() != 2 * hash.size()) return std::nullopt;
  for (std::size_t i = 0; i < hash.size(); ++i) {
    unsigned value = 0;
    const char* begin = digits.data() + 2 * i;
    if (std::from_chars(begin, begin + 2, value, 16).ptr != begin + 2) return std::nullopt;
    hash[i] = static_cast<std::byte>(value);
  }
  return hash;
}

ContentHash seal(std::string_view text, const ContentSecret& secret) {
  return content_hash(std::as_bytes(std::span(text)), secret);
}

}  // namespace

std::optional<FileState> state_of(int file) {
  struct statfs system;
  if (fstatfs(file, &system) != 0) return std::nullopt;
  // All of ext2, 3 and 4; both note the time when a mapped page is written first.
  if (system.f_type != EXT4_SUPER_MAGIC && system.f_type != XFS_SUPER_MAGIC) return std::nullopt;
  struct stat status;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
  return FileState{status.st_dev, status.st_ino, static_cast<std::uint64_t>(status.st_size),
                   nanoseconds(status.st_mtim), nanoseconds(status.st_ctim)};
}

std::optional<FileState> lasting_state(int file, std::chrono::seconds age) {
  const auto is_old = [age](const FileState& state) {
    timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now) != 0) return false;
    return nanoseconds(now) - state.changed >= age.count() * kSecond;
  };
  const std::optional<FileState> before = state_of(file);
  // A young one is not waited for: all of it may have to go to the disk.
  if (!before || !is_old(*before) || fsync(file) != 0) return std::nullopt;
  const std::optional<FileState> state = state_of(file);
  if (!state || !is_old(*state)) return std::nullopt;
  return state;
}

FileContents FileContents::parse(std::string_view text, const ContentSecret& secret) {
  FileContents contents;
  constexpr std::size_t last_line = 2 * sizeof(ContentHash) + 1;
  if (text.size() < last_line) return {};
  const std::size_t end = text.size() - last_line;
  if (text.substr(end) != hexadecimal(seal(text.substr(0, end), secret)) + '\n') return {};

  std::istringstream lines{std::string(text.substr(0, end))};
  std::string line;
  if (!std::getline(lines, line) || line != kTitle) return {};
  while (std::getline(lines, line)) {
    std::istringstream fields(line);
    std::string first, digits;
    fields >> first;
    if (first == "file") {
      File& file = contents.files_.emplace_back();
      fields >> file.state.device >> file.state.inode >> file.state.bytes >> file.state.modified >>
          file.state.changed;
      if (!fields) return {};
      continue;
    }
    FilePart part;
    fields.seekg(0);
    fields >> part.offset >> part.bytes >> digits;
    const std::optional<ContentHash> hash = hash_of(digits);
    if (!fields || !hash || contents.files_.empty()) return {};
    contents.files_.back().parts[part] = *hash;
  }
  if (contents.text(secret) != text) return {};  // of another form than ours
  return contents;
}

std::string FileContents::text(const ContentSecret& secret) const {
  std::ostringstream text;
  text << kTitle << '\n';
  for (const File& file : files_) {
    const FileState& state = file.state;
    text << "file " << state.device << ' ' << state.inode << ' ' << state.bytes << ' '
         << state.modified << ' ' << state.changed << '\n';
    for (const auto& [part, hash] : file.parts) {
      text << part.offset << ' ' << part.bytes << ' ' << hexadecimal(hash) << '\n';
    }
  }
  const std::string sealed = text.str();
  return sealed + hexadecimal(seal(sealed, secret)) + '\n';
}

std::optional<ContentHash> FileContents::find(const FileState& file, FilePart part) const {
  const auto known = std::ranges::find(files_, file, &File::state);
  if (known == files_.end()) return std::nullopt;
  const auto found = known->parts.find(part);
  if (found == known->parts.end()) return std::nullopt;
  return found->second;
}

void FileContents::add(const FileState& file, FilePart part, const ContentHash& hash) {
  auto known = std::ranges::find(files_, file, &File::state);
  if (known == files_.end()) {
    std::erase_if(files_, [&](const File& other) {
      return other.state.device == file.device && other.state.inode == file.inode;
    });
    if (files_.size() == kMostFiles) files_.erase(files_.begin());
    known = files_.insert(files_.end(), File{file, {}});
  }
  known->parts[part] = hash;
}

}  // namespace tilewright::cache
