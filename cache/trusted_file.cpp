// Checked reading and atomic writing of files. See trusted_file.h. Tested by cache_trust_test.
#include "cache/trusted_file.h"

#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace tilewright::cache {
namespace {

// A file size limit (RLIMIT_FSIZE) kills a writer by SIGXFSZ. While this lives, the write fails
// with EFBIG instead, which is only a kernel that is not kept.
class BlockFileSizeSignal {
 public:
  BlockFileSizeSignal() {
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGXFSZ);
    blocked_ = pthread_sigmask(SIG_BLOCK, &signal_, &before_) == 0;
  }
  ~BlockFileSizeSignal() {
    if (!blocked_) return;
    // The signal that the write left pending goes to this thread; take it before unblocking.
    if (sigismember(&before_, SIGXFSZ) == 0) {
      const timespec now = {};
      while (sigtimedwait(&signal_, nullptr, &now) > 0) {
      }
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  BlockFileSizeSignal(const BlockFileSizeSignal&) = delete;
  BlockFileSizeSignal& operator=(const BlockFileSizeSignal&) = delete;

 private:
  sigset_t signal_, before_;
  bool blocked_ = false;
};

// Why a file of this owner and mode must not be used, or nullptr.
const char* distrust(const struct stat& status) {
  if (status.st_uid != geteuid() && status.st_uid != 0) return "belongs to another user";
  if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) return "writable by others";
  return nullptr;
}

using Pieces = std::span<const std::span<const std::byte>>;

// What is published, and how.
struct Content {
  Pieces pieces;
  mode_t mode = 0600;
  bool synced = false;
};

Status write_all(int file, const Content& content) {
  std::size_t size = 0;
  for (const auto& piece : content.pieces) size += piece.size();
  // Space is claimed first: a full disk is found here and not half way.
  if (int error = posix_fallocate(file, 0, static_cast<off_t>(size)); error != 0) {
    errno = error;
    if (error != EOPNOTSUPP && error != EINVAL) return Error{system_reason("fallocate")};
  }
  // In one call where that is possible: the size of a call decides the size of the page cache's
  // pages, and those of a mapped file are best huge, from its beginning.
  std::vector<iovec> left;
  for (const auto& piece : content.pieces) {
    left.push_back({const_cast<std::byte*>(piece.data()), piece.size()});
  }
  for (auto next = left.begin(); next != left.end();) {
    const ssize_t count = writev(file, &*next, static_cast<int>(left.end() - next));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return Error{system_reason("write")};
    auto done = static_cast<std::size_t>(count);
    for (; next != left.end() && done >= next->iov_len; ++next) done -= next->iov_len;
    if (next == left.end()) break;
    next->iov_base = static_cast<std::byte*>(next->iov_base) + done;
    next->iov_len -= done;
  }
  if (content.synced && fsync(file) != 0) return Error{system_reason("fsync")};
  return {};
}

// Names come from random bits, not from the process id: containers that share a directory have
// equal process ids.
std::string temporary_name() {
  std::array<unsigned char, 16> bits = {};
  if (getrandom(bits.data(), bits.size(), 0) < 0) return {};
  std::string name = kTemporaryPrefix;
  for (unsigned char byte : bits) {
    std::array<char, 3> digits;
    std::snprintf(digits.data(), digits.size(), "%02x", byte);
    name += digits.data();
  }
  return name;
}

// The way for file systems without O_TMPFILE (NFS, overlay on some kernels) or without /proc.
Status publish_by_rename(int directory, const std::string& name, const Content& content) {
  const std::string temporary = temporary_name();
  if (temporary.empty()) return Error{system_reason("getrandom")};
  const int flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  FileDescriptor file(openat(directory, temporary.c_str(), flags, content.mode));
  if (!file.valid()) return Error{system_reason("open")};
  Status status = write_all(file.get(), content);
  if (status && renameat(directory, temporary.c_str(), directory, name.c_str()) != 0) {
    status = Error{system_reason("rename")};
  }
  if (!status) unlinkat(directory, temporary.c_str(), 0);
  return status;
}

Status publish(int directory, const std::string& name, const Content& content) {
  const BlockFileSizeSignal no_signal;
  FileDescriptor file(openat(directory, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, content.mode));
  if (!file.valid()) return publish_by_rename(directory, name, content);
  if (Status status = write_all(file.get(), content); !status) return status;
  // linkat of the descriptor itself (AT_EMPTY_PATH) needs a capability; its /proc name does not.
  const std::string proc = "/proc/self/fd/" + std::to_string(file.get());
  if (linkat(AT_FDCWD, proc.c_str(), directory, name.c_str(), AT_SYMLINK_FOLLOW) == 0) return {};
  if (errno == EEXIST) return {};
  return publish_by_rename(directory, name, content);
}

}  // namespace

FileDescriptor::~FileDescriptor() {
  if (descriptor_ >= 0) close(descriptor_);
}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = other.release();
  }
  return *this;
}

int FileDescriptor::release() {
  const int descriptor = descriptor_;
  descriptor_ = -1;
  return descriptor;
}

std::string system_reason(const char* call) {
  const char* name = strerrorname_np(errno);
  return std::string(call) + ": " + (name != nullptr ? name : "unknown error");
}

bool has_foreign_privileges() { return getauxval(AT_SECURE) != 0; }

std::string user_directory(const char* variable, const char* below_home) {
  if (has_foreign_privileges()) return {};
  // A relative path would depend on the working directory; the XDG specification ignores it too.
  const char* given = secure_getenv(variable);
  if (given != nullptr && given[0] == '/') return std::string(given) + "/tilewright";
  const char* home = secure_getenv("HOME");
  if (home != nullptr && home[0] == '/') return std::string(home) + below_home + "/tilewright";
  return {};
}

Result<FileDescriptor> open_trusted_directory(int parent, const std::string& path, bool* absent) {
  const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  FileDescriptor directory(openat(parent, path.c_str(), flags));
  *absent = !directory.valid() && errno == ENOENT;
  if (!directory.valid() && (errno == ENOTDIR || errno == ELOOP)) {
    return Error{"directory is a link or a file"};
  }
  if (!directory.valid()) return Error{"directory " + system_reason("open")};
  struct stat status;
  if (fstat(directory.get(), &status) != 0) return Error{"directory " + system_reason("stat")};
  if (const char* reason = distrust(status)) return Error{std::string("directory ") + reason};
  return directory;
}

Result<FileDescriptor> make_trusted_directory(int parent, const std::string& path) {
  if (mkdirat(parent, path.c_str(), 0700) != 0 && errno != EEXIST) {
    return Error{"directory " + system_reason("mkdir")};
  }
  bool absent = false;
  return open_trusted_directory(parent, path, &absent);
}

namespace {

Result<OpenedFile> open_file(int directory, const std::string& name, bool must_be_trusted,
                             bool* absent) {
  // O_NONBLOCK: a FIFO in the place of a file must not hang the process.
  const int flags = O_RDONLY | O_NONBLOCK | O_CLOEXEC | (must_be_trusted ? O_NOFOLLOW : 0);
  OpenedFile file;
  file.descriptor = FileDescriptor(openat(directory, name.c_str(), flags));
  *absent = !file.descriptor.valid() && errno == ENOENT;
  if (!file.descriptor.valid()) {
    if (errno == ELOOP) return Error{"symbolic link"};
    return Error{system_reason("open")};
  }
  struct stat status;
  if (fstat(file.descriptor.get(), &status) != 0) return Error{system_reason("stat")};
  if (!S_ISREG(status.st_mode)) return Error{"not a regular file"};
  if (const char* reason = distrust(status); reason != nullptr && must_be_trusted) {
    return Error{reason};
  }
  file.device = status.st_dev;
  file.inode = status.st_ino;
  file.own = status.st_uid == geteuid();
  file.modified = status.st_mtim.tv_sec;
  file.size = static_cast<std::uint64_t>(status.st_size);
  return file;
}

Result<TrustedFile> read_file(int directory, const std::string& name, std::size_t max_bytes,
                              bool must_be_trusted, bool* absent) {
  Result<OpenedFile> opened = open_file(directory, name, must_be_trusted, absent);
  if (!opened) return opened.error();
  if (opened->size > max_bytes) return Error{"too long"};

  TrustedFile file;
  static_cast<FileIdentity&>(file) = *opened;
  file.bytes.resize(static_cast<std::size_t>(opened->size));
  std::size_t done = 0;
  while (done < file.bytes.size()) {
    const ssize_t count =
        read(opened->descriptor.get(), file.bytes.data() + done, file.bytes.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return Error{system_reason("read")};
    if (count == 0) break;  // shortened while we read: what is left fails its digest
    done += static_cast<std::size_t>(count);
  }
  file.bytes.resize(done);
  return file;
}

}  // namespace

Result<OpenedFile> open_trusted_file(int directory, const std::string& name, bool* absent) {
  return open_file(directory, name, true, absent);
}

Result<TrustedFile> read_trusted_file(int directory, const std::string& name, std::size_t max_bytes,
                                      bool* absent) {
  return read_file(directory, name, max_bytes, true, absent);
}

Result<TrustedFile> read_any_file(int directory, const std::string& name, std::size_t max_bytes,
                                  bool* absent) {
  return read_file(directory, name, max_bytes, false, absent);
}

Status publish_file(int directory, const std::string& name, std::span<const std::byte> bytes) {
  return publish(directory, name, {Pieces(&bytes, 1)});
}

Status replace_file(int directory, const std::string& name, std::span<const std::byte> bytes) {
  const BlockFileSizeSignal no_signal;
  return publish_by_rename(directory, name, {Pieces(&bytes, 1)});
}

Status publish_synced_file(int directory, const std::string& name, Pieces pieces) {
  return publish(directory, name, {pieces, 0400, true});
}

}  // namespace tilewright::cache
