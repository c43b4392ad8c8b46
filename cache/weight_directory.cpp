// See weight_directory.h. Tested by weight_directory_test.
#include "cache/weight_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <ctime>
#include <filesystem>
#include <mutex>

#include "cache/trusted_file.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14; Debian 12's headers have it, older ones do not
#endif

namespace tilewright::cache {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFolder = "weights";
constexpr const char* kSuffix = ".weight";
constexpr const char* kSecret = "weights.secret";
constexpr const char* kSources = "weights.sources";
constexpr std::size_t kMostSourceBytes = 16 << 20;
constexpr std::int64_t kHour = 3600, kDay = 24 * kHour;

// Reads [0, size) of a file that is not shorter. Error: the reason.
Result<std::vector<std::byte>> read_beginning(int file, std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::size_t done = 0;
  while (done < size) {
    const ssize_t count = pread(file, bytes.data() + done, size - done, static_cast<off_t>(done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return Error{system_reason("read")};
    if (count == 0) return Error{"too short"};
    done += static_cast<std::size_t>(count);
  }
  return bytes;
}

Result<WeightHeader> read_header(const OpenedFile& file) {
  if (file.size < kWeightPage) return Error{"too short"};
  const auto first_page = read_beginning(file.descriptor.get(), kWeightPage);
  if (!first_page) return first_page.error();
  const Result<std::size_t> length = header_bytes(*first_page);
  if (!length) return length.error();
  if (*length > file.size) return Error{"too short"};
  const auto bytes = read_beginning(file.descriptor.get(), *length);
  if (!bytes) return bytes.error();
  return decode(*bytes, file.size);
}

std::span<const std::byte> view(const MappedWeight& weight) {
  return {weight.data.get(), weight.bytes};
}

// Shared, from a descriptor that cannot write: nothing in the process can make it writable. From
// the file's beginning, so that its huge pages are ours.
Result<MappedWeight> map_data(const OpenedFile& file, const WeightHeader& header) {
  const std::size_t size = file.size;
  void* memory = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.descriptor.get(), 0);
  if (memory == MAP_FAILED) return Error{system_reason("mmap")};
  // Makes readahead fetch huge pages where the file system has them: decode then runs as from
  // anonymous huge pages, else up to 7 % slower.
  madvise(memory, size, MADV_HUGEPAGE);
  const std::shared_ptr<const void> mapping(memory, [size](void* begin) { munmap(begin, size); });
  const auto* data = static_cast<const std::byte*>(memory) + header.data_offset;
  return MappedWeight{{mapping, data}, header.data_bytes, header.form};
}

bool is_intact(const MappedWeight& weight, const WeightHeader& header) {
  return fetch(view(weight)) && content_hash(view(weight)) == header.content;
}

}  // namespace

struct WeightDirectory::State {
  std::string directory;
  Mode mode = Mode::off;
  std::uint64_t max_bytes = 0;
  std::string generator;
  FileDescriptor root;  // invalid: nothing is found or kept

  mutable std::mutex mutex;  // guards what follows
  WeightCounters counters;
  std::optional<ContentSecret> secret;
  std::optional<std::uint64_t> total_bytes;  // of the whole cache, as far as we know

  std::nullopt_t miss(const std::string& reject = {}) {
    const std::lock_guard lock(mutex);
    ++counters.misses;
    if (!reject.empty()) ++counters.rejects[reject];
    return std::nullopt;
  }

  std::string name_of(std::string_view key_text) const {
    return key_name(generator, key_text) + kSuffix;
  }
  std::string path() const { return directory + "/" + kFolder; }

  void touch(int folder, const std::string& name, const FileIdentity& file) const;
  void discard(int folder, const std::string& name, const FileIdentity& file) const;
  bool make_room(int folder, std::uint64_t bytes);
  Status write(std::string_view key_text, std::string_view form, std::span<const std::byte> data);
};

namespace {

// Of all files below a path, as far as they can be looked at.
std::uint64_t size_of_all(const std::string& path) {
  std::uint64_t total = 0;
  std::error_code failed;
  const auto options = fs::directory_options::skip_permission_denied;
  for (fs::recursive_directory_iterator at(path, options, failed), end; !failed && at != end;
       at.increment(failed)) {
    std::error_code ignored;
    if (at->is_regular_file(ignored)) {
      const std::uintmax_t size = at->file_size(ignored);
      if (!ignored) total += size;
    }
  }
  return total;
}

std::vector<std::string> names_in(const std::string& path) {
  std::vector<std::string> names;
  std::error_code failed;
  for (fs::directory_iterator at(path, failed), end; !failed && at != end; at.increment(failed)) {
    names.push_back(at->path().filename().string());
  }
  std::ranges::sort(names);
  return names;
}

}  // namespace

// Unused weights go first; a used one is made young at most once a day, to spare the disk.
void WeightDirectory::State::touch(int folder, const std::string& name,
                                   const FileIdentity& file) const {
  if (mode != Mode::read_write || !file.own || std::time(nullptr) - file.modified < kDay) return;
  const timespec now[2] = {{0, UTIME_OMIT}, {0, UTIME_NOW}};
  utimensat(folder, name.c_str(), now, AT_SYMLINK_NOFOLLOW);
}

// Removes a corrupt file of ours, unless another process has replaced it meanwhile.
void WeightDirectory::State::discard(int folder, const std::string& name,
                                     const FileIdentity& file) const {
  if (mode != Mode::read_write || !file.own) return;
  struct stat status;
  if (fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) return;
  if (status.st_dev == file.device && status.st_ino == file.inode) {
    unlinkat(folder, name.c_str(), 0);
  }
}

// Whether so many bytes more fit. Weights of which a process may be making use now are not pushed
// out: a model that does not fit would else write itself anew at every start.
bool WeightDirectory::State::make_room(int folder, std::uint64_t bytes) {
  if (max_bytes == 0) return true;
  const std::lock_guard lock(mutex);
  if (!total_bytes) total_bytes = size_of_all(directory);
  if (*total_bytes + bytes <= max_bytes) {
    *total_bytes += bytes;
    return true;
  }
  total_bytes = size_of_all(directory);
  // One process at a time. The lock is on the folder itself and goes with its holder.
  if (flock(folder, LOCK_EX | LOCK_NB) == 0) {
    std::vector<std::pair<std::int64_t, std::string>> old;
    const std::int64_t now = std::time(nullptr);
    for (const std::string& name : names_in(path())) {
      struct stat status;
      if (fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
      const std::int64_t age = now - status.st_mtim.tv_sec;
      if (age > (name.starts_with(kTemporaryPrefix) ? kHour : kDay)) old.emplace_back(-age, name);
    }
    std::ranges::sort(old);
    for (const auto& [age, name] : old) {
      if (*total_bytes + bytes <= max_bytes) break;
      struct stat status;
      if (fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
      if (unlinkat(folder, name.c_str(), 0) != 0) continue;
      *total_bytes -= std::min(*total_bytes, static_cast<std::uint64_t>(status.st_size));
    }
    flock(folder, LOCK_UN);
  }
  if (*total_bytes + bytes > max_bytes) return false;
  *total_bytes += bytes;
  return true;
}

WeightDirectory::WeightDirectory(std::unique_ptr<State> state) : state_(std::move(state)) {}
WeightDirectory::~WeightDirectory() = default;
WeightDirectory::WeightDirectory(WeightDirectory&&) noexcept = default;
WeightDirectory& WeightDirectory::operator=(WeightDirectory&&) noexcept = default;

WeightDirectory WeightDirectory::open(const std::string& directory, Mode mode,
                                      std::uint64_t max_bytes, std::string_view generator) {
  auto state = std::make_unique<State>();
  state->directory = directory;
  state->mode = mode;
  state->max_bytes = max_bytes;
  state->generator = generator;
  bool absent = false;
  if (mode != Mode::off && directory.starts_with('/')) {
    Result<FileDescriptor> root = open_trusted_directory(AT_FDCWD, directory, &absent);
    if (root) state->root = std::move(*root);  // Store says why not, if it is not
  }
  return WeightDirectory(std::move(state));
}

std::optional<ContentSecret> WeightDirectory::secret(bool make) {
  const std::lock_guard lock(state_->mutex);
  if (state_->secret || !state_->root.valid()) return state_->secret;
  ContentSecret secret;
  if (make && state_->mode == Mode::read_write) {
    const auto size = static_cast<ssize_t>(secret.size());
    const std::span<const std::byte> piece(secret);
    if (getrandom(secret.data(), secret.size(), 0) != size) return std::nullopt;
    // Of several processes the first one's stays, and all read that.
    if (!publish_synced_file(state_->root.get(), kSecret, std::span(&piece, 1))) {
      return std::nullopt;
    }
  }
  bool absent = false;
  const auto file = read_trusted_file(state_->root.get(), kSecret, secret.size(), &absent);
  if (!file || file->bytes.size() != secret.size()) return std::nullopt;
  std::ranges::copy(file->bytes, secret.begin());
  state_->secret = secret;
  return secret;
}

FileContents WeightDirectory::file_contents() {
  const std::optional<ContentSecret> key = secret(false);
  if (!key) return {};
  bool absent = false;
  const auto file = read_trusted_file(state_->root.get(), kSources, kMostSourceBytes, &absent);
  if (!file) return {};
  return FileContents::parse(
      {reinterpret_cast<const char*>(file->bytes.data()), file->bytes.size()}, *key);
}

bool WeightDirectory::keeps_file_contents() const {
  return state_->root.valid() && state_->mode == Mode::read_write;
}

void WeightDirectory::save(const FileContents& contents) {
  const std::optional<ContentSecret> key = secret(false);
  if (!key || !keeps_file_contents()) return;
  const std::string text = contents.text(*key);
  if (text.size() > kMostSourceBytes) return;
  (void)replace_file(state_->root.get(), kSources, std::as_bytes(std::span(text)));
}

std::optional<MappedWeight> WeightDirectory::map(std::string_view key_text, bool checked,
                                                 const Look& usable) {
  if (!state_->root.valid()) return state_->miss();
  bool absent = false;
  const auto folder = open_trusted_directory(state_->root.get(), kFolder, &absent);
  if (!folder) return state_->miss(absent ? std::string() : folder.error().message);
  const std::string name = state_->name_of(key_text);
  const Result<OpenedFile> file = open_trusted_file(folder->get(), name, &absent);
  if (!file) return state_->miss(absent ? std::string() : file.error().message);

  const Result<WeightHeader> header = read_header(*file);
  if (!header) {
    state_->discard(folder->get(), name, *file);
    return state_->miss(header.error().message);
  }
  if (header->generator != state_->generator || header->key_text != key_text) {
    return state_->miss("other key");
  }
  Result<MappedWeight> weight = map_data(*file, *header);
  if (!weight) return state_->miss(weight.error().message);
  const char* problem = nullptr;
  if (checked && !is_intact(*weight, *header)) {
    problem = "wrong content";
  } else if (usable && !usable(*weight)) {
    problem = "not usable";
  }
  if (problem != nullptr) {
    state_->discard(folder->get(), name, *file);
    return state_->miss(problem);
  }
  state_->touch(folder->get(), name, *file);
  const std::lock_guard lock(state_->mutex);
  ++state_->counters.hits;
  return std::move(*weight);
}

Status WeightDirectory::State::write(std::string_view key_text, std::string_view form,
                                     std::span<const std::byte> data) {
  WeightHeader header;
  header.generator = generator;
  header.key_text = key_text;
  header.form = form;
  header.data_bytes = data.size();
  header.content = content_hash(data);
  const Result<std::vector<std::byte>> bytes = encode(header);
  if (!bytes) return bytes.error();
  const Result<FileDescriptor> folder = make_trusted_directory(root.get(), kFolder);
  if (!folder) return folder.error();
  const std::string name = name_of(key_text);
  if (faccessat(folder->get(), name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) return {};
  if (!make_room(folder->get(), bytes->size() + data.size())) {
    return Error{"the cache would be larger than TILEWRIGHT_CACHE_MAX_SIZE"};
  }
  const std::array<std::span<const std::byte>, 2> pieces = {std::span(*bytes), data};
  return publish_synced_file(folder->get(), name, pieces);
}

void WeightDirectory::save(std::string_view key_text, std::string_view form,
                           std::span<const std::byte> data) {
  if (!state_->root.valid() || state_->mode != Mode::read_write) return;
  const Status written = state_->write(key_text, form, data);
  const std::lock_guard lock(state_->mutex);
  ++(written ? state_->counters.writes : state_->counters.write_failures);
  if (!written) state_->counters.write_problem = written.error().message;
}

std::vector<WeightListing> WeightDirectory::list(bool checked) const {
  std::vector<WeightListing> listings;
  if (!state_->root.valid()) return listings;
  bool absent = false;
  const auto folder = open_trusted_directory(state_->root.get(), kFolder, &absent);
  if (!folder && !absent) {
    WeightListing& listing = listings.emplace_back();
    listing.file = kFolder;
    listing.problem = folder.error().message;
  }
  if (!folder) return listings;
  for (const std::string& name : names_in(state_->path())) {
    if (!name.ends_with(kSuffix)) continue;
    WeightListing listing;
    listing.file = std::string(kFolder) + "/" + name;
    const Result<OpenedFile> file = open_trusted_file(folder->get(), name, &absent);
    if (absent) continue;
    const Result<WeightHeader> header =
        file ? read_header(*file) : Result<WeightHeader>(file.error());
    if (file) {
      listing.bytes = file->size;
      listing.modified = file->modified;
    }
    if (!header) {
      listing.problem = header.error().message;
    } else {
      listing.current = header->generator == state_->generator;
      listing.key_text = header->key_text;
      listing.form = header->form;
      if (key_name(header->generator, header->key_text) + kSuffix != name) {
        listing.problem = "other key";
      } else if (checked) {
        const Result<MappedWeight> weight = map_data(*file, *header);
        if (!weight) {
          listing.problem = weight.error().message;
        } else if (!is_intact(*weight, *header)) {
          listing.problem = "wrong content";
        }
      }
    }
    listings.push_back(std::move(listing));
  }
  return listings;
}

WeightCounters WeightDirectory::counters() const {
  const std::lock_guard lock(state_->mutex);
  return state_->counters;
}

bool fetch(std::span<const std::byte> mapped) {
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped.data()) / kWeightPage * kWeightPage;
  const auto end = reinterpret_cast<std::uintptr_t>(mapped.data()) + mapped.size();
  if (begin >= end) return true;
  void* memory = reinterpret_cast<void*>(begin);
  if (madvise(memory, end - begin, MADV_POPULATE_READ) == 0) return true;
  return errno == EINVAL;  // an older kernel: pages come when they are touched
}

}  // namespace tilewright::cache
