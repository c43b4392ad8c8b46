// Disassembly through Debian's objdump, and perf's map file. See inspect.h.
//
// Tested by emit_test, filetests/code.
#include "jit/inspect.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

extern char** environ;

namespace tilewright::jit {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() { reset(); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  bool ok() const { return fd_ >= 0; }
  int get() const { return fd_; }
  void reset() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

Error failed(std::string_view what) { return {fmt::format("{}: {}", what, std::strerror(errno))}; }

bool write_all(int fd, const void* data, std::size_t size) {
  const auto* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = write(fd, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes += written;
    size -= static_cast<std::size_t>(written);
  }
  return true;
}

std::string read_all(int fd) {
  std::string text;
  std::array<char, 4096> buffer;
  while (true) {
    const ssize_t count = read(fd, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return text;
    text.append(buffer.data(), static_cast<std::size_t>(count));
  }
}

// objdump wants a file: an anonymous one, which it finds as its own descriptor 3.
constexpr int kCodeDescriptor = 3;

Result<std::string> run_objdump(std::span<const std::byte> code) {
  FileDescriptor file(memfd_create("tilewright-code", MFD_CLOEXEC));
  if (!file.ok() || !write_all(file.get(), code.data(), code.size())) return failed("memfd");
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return failed("pipe");
  FileDescriptor output(ends[0]), input(ends[1]);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, file.get(), kCodeDescriptor);
  std::array<std::string, 10> words = {"objdump",
                                       "-D",
                                       "-b",
                                       "binary",
                                       "-m",
                                       "i386:x86-64",
                                       "-M",
                                       "intel",
                                       "--no-show-raw-insn",
                                       fmt::format("/proc/self/fd/{}", kCodeDescriptor)};
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  pid_t child = 0;
  const int error = posix_spawnp(&child, "objdump", &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    return Error{fmt::format("objdump (Debian package binutils): {}", std::strerror(error))};
  }
  input.reset();
  std::string text = read_all(output.get());
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return Error{"objdump failed"};
  return text;
}

struct Line {
  std::uint64_t address;
  std::string text;                     // mnemonic and operands
  std::optional<std::uint64_t> target;  // of a jump
};

std::string_view trim(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

// "mov    rax,QWORD PTR [rip+0x10]        # 0x40" -> "mov rax,QWORD PTR [0x40]"
std::string simplify(std::string_view text) {
  std::string_view constant;
  if (const std::size_t comment = text.find('#'); comment != std::string_view::npos) {
    constant = trim(text.substr(comment + 1));
    text = text.substr(0, comment);
  }
  text = trim(text);
  const std::size_t space = text.find(' ');
  std::string result(text.substr(0, space));
  if (space != std::string_view::npos) {
    result += ' ';
    result += trim(text.substr(space));
  }
  const std::size_t open = result.find("[rip");
  if (!constant.empty() && open != std::string::npos) {
    const std::size_t close = result.find(']', open);
    result.replace(open, close - open + 1, fmt::format("[{}]", constant));
  }
  return result;
}

std::vector<Line> parse_listing(std::string_view listing) {
  std::vector<Line> lines;
  while (!listing.empty()) {
    const std::size_t newline = listing.find('\n');
    const std::string_view raw = listing.substr(0, newline);
    listing.remove_prefix(newline == std::string_view::npos ? listing.size() : newline + 1);
    const std::size_t colon = raw.find(":\t");  // "  1f:\tmov    rax,rbx"
    if (colon == std::string_view::npos) continue;
    Line line;
    line.address = std::strtoull(std::string(trim(raw.substr(0, colon))).c_str(), nullptr, 16);
    line.text = simplify(raw.substr(colon + 2));
    if (line.text.starts_with('j')) {
      const std::size_t target = line.text.find("0x");
      line.target = std::strtoull(line.text.c_str() + target, nullptr, 16);
      line.text.resize(target);
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

}  // namespace

Result<std::string> disassemble(std::span<const std::byte> code) {
  Result<std::string> listing = run_objdump(code);
  if (!listing.ok()) return listing.error();
  const std::vector<Line> lines = parse_listing(*listing);
  std::map<std::uint64_t, int> labels;
  for (const Line& line : lines) {
    if (line.target) labels[*line.target] = 0;
  }
  int count = 0;
  for (auto& [address, number] : labels) number = count++;
  std::string text;
  for (const Line& line : lines) {
    if (const auto label = labels.find(line.address); label != labels.end()) {
      text += fmt::format("L{}:\n", label->second);
    }
    text += line.text;
    if (line.target) text += fmt::format("L{}", labels[*line.target]);
    text += '\n';
  }
  return text;
}

Status write_perf_map(std::string_view name, const void* address, std::size_t size) {
  const std::string path = fmt::format("/tmp/perf-{}.map", getpid());
  FileDescriptor file(
      open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!file.ok()) return failed(path);
  struct stat info;
  if (fstat(file.get(), &info) != 0) return failed(path);
  if (!S_ISREG(info.st_mode) || info.st_uid != geteuid() || info.st_nlink != 1) {
    return Error{fmt::format("{}: not a file of this user", path)};
  }
  const std::string line =
      fmt::format("{:x} {:x} {}\n", reinterpret_cast<std::uintptr_t>(address), size, name);
  if (!write_all(file.get(), line.data(), line.size())) return failed(path);
  return {};
}

}  // namespace tilewright::jit
