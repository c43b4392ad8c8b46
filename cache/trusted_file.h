// Files whose content may be executed: opened without following links, owned by this user or root,
// writable by nobody else, read whole into private memory, written whole or not at all.
//
// Thread-safe. Tested by cache_trust_test.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "jit/base/result.h"

namespace tilewright::cache {

// Owns a file descriptor.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  ~FileDescriptor();
  FileDescriptor(FileDescriptor&& other) noexcept : descriptor_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;

  int get() const { return descriptor_; }
  bool valid() const { return descriptor_ >= 0; }
  int release();

 private:
  int descriptor_ = -1;
};

// "open: EACCES" for the current errno.
std::string system_reason(const char* call);

// Opens an existing directory below `parent` (AT_FDCWD for an absolute path) and checks that it is
// ours. Error: the reason; `absent` is set if there is no such directory.
Result<FileDescriptor> open_trusted_directory(int parent, const std::string& path, bool* absent);
// The same, making it (mode 0700) if it does not exist.
Result<FileDescriptor> make_trusted_directory(int parent, const std::string& path);

struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  bool own = false;  // owned by this user, not merely by root
  std::int64_t modified = 0;
};

struct OpenedFile : FileIdentity {
  FileDescriptor descriptor;
  std::uint64_t size = 0;
};

// Opens a file for reading. Error: the reason; `absent` is set if there is no such file.
Result<OpenedFile> open_trusted_file(int directory, const std::string& name, bool* absent);

struct TrustedFile : FileIdentity {
  std::vector<std::byte> bytes;
};

// Reads a whole file. Error: the reason; `absent` is set if there is no such file.
Result<TrustedFile> read_trusted_file(int directory, const std::string& name, std::size_t max_bytes,
                                      bool* absent);

// Reads a whole regular file, whoever owns it and by way of links too: for a file whose content is
// then compared with a digest that the caller knows. Errors as above.
Result<TrustedFile> read_any_file(int directory, const std::string& name, std::size_t max_bytes,
                                  bool* absent);

// Makes `name` with these bytes: other processes see all of it or nothing. A file that exists
// already is left alone, and that is success.
Status publish_file(int directory, const std::string& name, std::span<const std::byte> bytes);

// The same for several pieces, one after the other, of a file that is not verified whole when it is
// used: it is on the disk before it has its name, and nobody can write it by mistake (mode 0400).
Status publish_synced_file(int directory, const std::string& name,
                           std::span<const std::span<const std::byte>> pieces);

// The same, but a file that exists already is replaced by this one.
Status replace_file(int directory, const std::string& name, std::span<const std::byte> bytes);

// Whether this process runs with somebody else's privileges (AT_SECURE): its environment is an
// attacker's, and no file that it names may be read.
bool has_foreign_privileges();

// Our directory for a kind of the user's files: $VARIABLE/tilewright, else $HOME + below_home +
// "/tilewright". Empty if there is none, and always with foreign privileges.
std::string user_directory(const char* variable, const char* below_home);

// What publish_file calls its temporary files where the file system has no nameless ones.
constexpr const char* kTemporaryPrefix = ".tmp-";

}  // namespace tilewright::cache
