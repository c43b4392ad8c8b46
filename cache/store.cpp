// The directory of entries: lookup, publication, pruning. See store.h. Tested by cache_test and
// cache_trust_test.
#include "cache/store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <mutex>
#include <new>

#include "cache/trusted_file.h"
#include "jit/base/fork_mutex.h"

namespace tilewright::cache {
namespace {

constexpr std::string_view kKernelSuffix = ".kernel", kPlanSuffix = ".plan";
constexpr std::int64_t kHour = 3600, kDay = 24 * kHour;

// Makes a directory and the missing ones above it, private to this user.
void make_directories(const std::string& path) {
  for (std::size_t end = path.find('/', 1); end != std::string::npos;
       end = path.find('/', end + 1)) {
    mkdir(path.substr(0, end).c_str(), 0700);  // what failed shows when the last one is opened
  }
}

std::vector<std::string> names_in(int directory) {
  std::vector<std::string> names;
  // A descriptor of its own: reading a directory moves the offset that duplicates share.
  const int own = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* stream = own < 0 ? nullptr : fdopendir(own);
  if (stream == nullptr) {
    FileDescriptor close_it(own);
    return names;
  }
  while (const dirent* entry = readdir(stream)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  closedir(stream);
  std::ranges::sort(names);
  return names;
}

// A reason that there is no memory to count is not worth a failure.
void count(std::map<std::string, std::uint64_t>& reasons, const std::string& reason) {
  try {
    ++reasons[reason];
  } catch (const std::bad_alloc&) {
  }
}

// Where an entry lives: a directory below objects/ and a file in it.
struct Place {
  std::string shard, file;
};

Place place_of(std::string_view generator, std::string_view key_text) {
  const std::string key = key_name(generator, key_text);
  return {key.substr(0, 2), key + std::string(is_plan(key_text) ? kPlanSuffix : kKernelSuffix)};
}

bool is_entry(std::string_view file) {
  return file.ends_with(kKernelSuffix) || file.ends_with(kPlanSuffix);
}

}  // namespace

struct Store::State {
  std::string directory;
  Mode mode = Mode::off;
  std::uint64_t max_bytes = 0;
  std::string generator;
  std::string problem;
  FileDescriptor root;  // invalid: the store always misses
  std::vector<std::shared_ptr<const Pack>> packs;

  mutable ForkMutex mutex;  // guards what follows
  Counters counters;
  bool sized = false;                    // total_bytes was measured
  std::uint64_t total_bytes = 0;         // of all entries, as far as we know
  std::uint64_t written_since_scan = 0;  // by us; others write too, so measure now and then

  // reason: why the file that is there was not used; "" if there is none.
  void miss(const std::string& reason) {
    const std::lock_guard lock(mutex);
    ++counters.misses;
    if (!reason.empty()) count(counters.rejects, reason);
  }

  std::optional<Entry> load_from_packs(std::string_view key_text, IsaMask host_isa) {
    for (const std::shared_ptr<const Pack>& pack : packs) {
      std::optional<Entry> entry = pack->find(key_text);
      if (!entry || (entry->required_isa & ~host_isa) != 0) continue;
      const std::lock_guard lock(mutex);
      ++counters.hits;
      ++counters.pack_hits;
      return entry;
    }
    return std::nullopt;
  }

  Result<FileDescriptor> open_shard(const std::string& shard, bool* absent) const {
    Result<FileDescriptor> objects = open_trusted_directory(root.get(), "objects", absent);
    if (!objects) return objects;
    return open_trusted_directory(objects->get(), shard, absent);
  }
  Result<FileDescriptor> make_shard(const std::string& shard) const {
    Result<FileDescriptor> objects = make_trusted_directory(root.get(), "objects");
    if (!objects) return objects;
    return make_trusted_directory(objects->get(), shard);
  }

  // Calls visit(shard descriptor, shard name, file name) for every file below objects/, and
  // refused(path, reason) for directories that are not to be trusted.
  void for_each_file(
      const std::function<void(int, const std::string&, const std::string&)>& visit,
      const std::function<void(const std::string&, const std::string&)>& refused = {}) const {
    bool absent = false;
    const auto refuse = [&](const std::string& path, const Error& reason) {
      if (!absent && refused) refused(path, reason.message);
    };
    const Result<FileDescriptor> objects = open_trusted_directory(root.get(), "objects", &absent);
    if (!objects) return refuse("objects", objects.error());
    for (const std::string& shard_name : names_in(objects->get())) {
      const auto shard = open_trusted_directory(objects->get(), shard_name, &absent);
      if (!shard) {
        refuse("objects/" + shard_name, shard.error());
        continue;
      }
      for (const std::string& name : names_in(shard->get())) visit(shard->get(), shard_name, name);
    }
  }

  std::uint64_t measure() const {
    std::uint64_t total = 0;
    for_each_file([&](int shard, const std::string&, const std::string& name) {
      struct stat status;
      if (fstatat(shard, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0) {
        total += static_cast<std::uint64_t>(status.st_size);
      }
    });
    return total;
  }

  Result<Entry> read(std::string_view key_text, IsaMask host_isa) const;
  Status write(const Entry& entry);
  void discard(int shard, const std::string& name, const TrustedFile& file) const;
  void touch(int shard, const std::string& name, const TrustedFile& file) const;
  void make_room(std::uint64_t bytes);
  std::uint64_t remove_oldest(std::uint64_t limit) const;
};

// Removes a corrupt file of ours, unless another process has replaced it meanwhile.
void Store::State::discard(int shard, const std::string& name, const TrustedFile& file) const {
  if (mode != Mode::read_write || !file.own) return;
  struct stat status;
  if (fstatat(shard, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) return;
  if (status.st_dev == file.device && status.st_ino == file.inode) unlinkat(shard, name.c_str(), 0);
}

// Pruning removes the oldest; a used entry is made young at most once a day, to spare the disk.
void Store::State::touch(int shard, const std::string& name, const TrustedFile& file) const {
  if (mode != Mode::read_write || !file.own || std::time(nullptr) - file.modified < kDay) return;
  const timespec now[2] = {{0, UTIME_OMIT}, {0, UTIME_NOW}};
  utimensat(shard, name.c_str(), now, AT_SYMLINK_NOFOLLOW);
}

Store::Store(std::unique_ptr<State> state) : state_(std::move(state)) {}
Store::~Store() = default;
Store::Store(Store&&) noexcept = default;
Store& Store::operator=(Store&&) noexcept = default;

Store Store::open(const std::string& directory, Mode mode, std::uint64_t max_bytes,
                  std::string_view generator) {
  auto state = std::make_unique<State>();
  state->directory = directory;
  state->mode = mode;
  state->max_bytes = max_bytes;
  state->generator = generator;
  const auto unusable = [&](const std::string& why) {
    state->problem = directory.empty() ? why : directory + ": " + why;
    return Store(std::move(state));
  };
  if (mode == Mode::off) return Store(std::move(state));
  if (has_foreign_privileges()) return unusable("not used with somebody else's privileges");
  if (directory.empty()) return unusable("no cache directory (HOME is not set)");
  if (directory.front() != '/') return unusable("not an absolute path");

  if (mode == Mode::read_write) make_directories(directory);
  bool absent = false;
  Result<FileDescriptor> root = mode == Mode::read_write
                                    ? make_trusted_directory(AT_FDCWD, directory)
                                    : open_trusted_directory(AT_FDCWD, directory, &absent);
  if (!root) return unusable(root.error().message);
  state->root = std::move(*root);
  if (mode == Mode::read_write && faccessat(state->root.get(), ".", W_OK, AT_EACCESS) != 0) {
    return unusable("not writable; kernels are loaded but not kept");
  }
  return Store(std::move(state));
}

Status Store::add_pack(std::shared_ptr<const Pack> pack) {
  if (pack->generator() != state_->generator) return Error{"made by another build"};
  state_->packs.push_back(std::move(pack));
  return {};
}

// Error: why the file is not used, "" if there is none.
Result<Entry> Store::State::read(std::string_view key_text, IsaMask host_isa) const {
  if (!root.valid()) return Error{};
  const Place place = place_of(generator, key_text);
  bool absent = false;
  const Result<FileDescriptor> shard = open_shard(place.shard, &absent);
  if (!shard) return absent ? Error{} : shard.error();
  const Result<TrustedFile> file =
      read_trusted_file(shard->get(), place.file, kEntryMaxBytes, &absent);
  if (!file) return absent ? Error{} : file.error();

  Result<DecodedEntry> decoded = decode(file->bytes);
  if (!decoded) {
    discard(shard->get(), place.file, *file);
    return decoded.error();
  }
  // Under this name, no other key can be right: the file was renamed or copied.
  if (decoded->generator != generator || decoded->entry.key_text != key_text) {
    discard(shard->get(), place.file, *file);
    return Error{"other key"};
  }
  if ((decoded->entry.required_isa & ~host_isa) != 0) return Error{"needs another CPU"};
  touch(shard->get(), place.file, *file);
  return std::move(decoded->entry);
}

Status Store::State::write(const Entry& entry) {
  const Result<std::vector<std::byte>> bytes = encode(entry, generator);
  if (!bytes) return bytes.error();
  if (max_bytes != 0 && bytes->size() > max_bytes) return Error{"larger than the cache"};
  make_room(bytes->size());
  const Place place = place_of(generator, entry.key_text);
  const Result<FileDescriptor> shard = make_shard(place.shard);
  if (!shard) return shard.error();
  return publish_file(shard->get(), place.file, *bytes);
}

// Memory that the system refuses costs an entry, never the program.
std::optional<Entry> Store::load(std::string_view key_text, IsaMask host_isa) {
  std::string reason;
  try {
    if (std::optional<Entry> entry = state_->load_from_packs(key_text, host_isa)) return entry;
    Result<Entry> entry = state_->read(key_text, host_isa);
    if (entry) {
      const std::lock_guard lock(state_->mutex);
      ++state_->counters.hits;
      return std::move(*entry);
    }
    reason = entry.error().message;
  } catch (const std::bad_alloc&) {
    reason = "out of memory";
  }
  state_->miss(reason);
  return std::nullopt;
}

void Store::save(const Entry& entry) {
  if (!state_->root.valid() || state_->mode != Mode::read_write) return;
  std::string reason;
  try {
    if (const Status written = state_->write(entry); !written) reason = written.error().message;
  } catch (const std::bad_alloc&) {
    reason = "out of memory";
  }
  const std::lock_guard lock(state_->mutex);
  if (reason.empty()) {
    ++state_->counters.writes;
  } else {
    ++state_->counters.write_failures;
    count(state_->counters.write_problems, reason);
  }
}

void Store::remove(std::string_view key_text) {
  if (!state_->root.valid() || state_->mode != Mode::read_write) return;
  const Place place = place_of(state_->generator, key_text);
  bool absent = false;
  const Result<FileDescriptor> shard = state_->open_shard(place.shard, &absent);
  if (shard) unlinkat(shard->get(), place.file.c_str(), 0);
}

// The total is measured before the first write and again when we have written a sixteenth of the
// limit, because other processes write too. Pruning goes to 7/8, so that it is rare.
void Store::State::make_room(std::uint64_t bytes) {
  if (max_bytes == 0) return;
  const std::lock_guard lock(mutex);
  if (!sized || written_since_scan > max_bytes / 16) {
    total_bytes = measure();
    written_since_scan = 0;
    sized = true;
  }
  if (total_bytes + bytes > max_bytes) {
    const std::uint64_t wanted = max_bytes - max_bytes / 8;
    remove_oldest(wanted > bytes ? wanted - bytes : 0);
    total_bytes = measure();
    written_since_scan = 0;
  }
  total_bytes += bytes;
  written_since_scan += bytes;
}

std::uint64_t Store::State::remove_oldest(std::uint64_t limit) const {
  // One process at a time. The lock is on the directory itself and goes with its holder.
  if (flock(root.get(), LOCK_EX | LOCK_NB) != 0) return 0;
  struct Candidate {
    std::int64_t modified;
    std::uint64_t bytes;
    std::string shard, name;
  };
  std::vector<Candidate> entries;
  std::uint64_t total = 0, removed = 0;
  const std::int64_t now = std::time(nullptr);
  for_each_file([&](int shard, const std::string& shard_name, const std::string& name) {
    struct stat status;
    if (fstatat(shard, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) return;
    // A clock that went back must not make an entry the youngest for ever.
    const std::int64_t modified = std::min<std::int64_t>(status.st_mtim.tv_sec, now);
    if (name.starts_with(kTemporaryPrefix)) {
      if (now - modified > kHour) unlinkat(shard, name.c_str(), 0);
    } else if (is_entry(name)) {
      entries.push_back({modified, static_cast<std::uint64_t>(status.st_size), shard_name, name});
      total += entries.back().bytes;
    }
  });
  std::ranges::stable_sort(entries, {}, &Candidate::modified);
  for (const Candidate& entry : entries) {
    if (total <= limit) break;
    bool absent = false;
    const Result<FileDescriptor> shard = open_shard(entry.shard, &absent);
    if (!shard || unlinkat(shard->get(), entry.name.c_str(), 0) != 0) continue;
    total -= entry.bytes;
    ++removed;
  }
  flock(root.get(), LOCK_UN);
  return removed;
}

std::uint64_t Store::prune(std::uint64_t max_bytes) {
  if (!state_->root.valid() || state_->mode != Mode::read_write) return 0;
  const std::lock_guard lock(state_->mutex);
  state_->sized = false;
  return state_->remove_oldest(max_bytes);
}

std::vector<Listing> Store::list() const {
  std::vector<Listing> listings;
  if (!state_->root.valid()) return listings;
  const auto visit = [&](int shard, const std::string& shard_name, const std::string& name) {
    if (!is_entry(name)) return;
    Listing listing;
    listing.file = "objects/" + shard_name + "/" + name;
    listing.plan = name.ends_with(kPlanSuffix);
    bool absent = false;
    const Result<TrustedFile> file = read_trusted_file(shard, name, kEntryMaxBytes, &absent);
    if (absent) return;
    const Result<DecodedEntry> decoded =
        file ? decode(file->bytes) : Result<DecodedEntry>(file.error());
    if (file) {
      listing.bytes = file->bytes.size();
      listing.modified = file->modified;
    }
    if (!decoded) {
      listing.problem = decoded.error().message;
    } else {
      const Entry& entry = decoded->entry;
      if (place_of(decoded->generator, entry.key_text).file != name) {
        listing.problem = "other key";
      }
      listing.current = decoded->generator == state_->generator;
      listing.generator = decoded->generator;
      listing.key_text = entry.key_text;
      listing.name = entry.name;
      listing.required_isa = entry.required_isa;
      listing.code_bytes = entry.code.size();
    }
    listings.push_back(std::move(listing));
  };
  state_->for_each_file(visit, [&](const std::string& path, const std::string& reason) {
    Listing& listing = listings.emplace_back();
    listing.file = path;
    listing.problem = reason;
  });
  return listings;
}

Counters Store::counters() const {
  const std::lock_guard lock(state_->mutex);
  return state_->counters;
}

const std::string& Store::problem() const { return state_->problem; }
const std::string& Store::directory() const { return state_->directory; }
Mode Store::mode() const { return state_->mode; }
bool Store::can_load() const { return state_->root.valid() || !state_->packs.empty(); }

std::string default_directory(std::string_view given) {
  if (has_foreign_privileges()) return {};
  return given.empty() ? user_directory("XDG_CACHE_HOME", "/.cache") : std::string(given);
}

}  // namespace tilewright::cache
