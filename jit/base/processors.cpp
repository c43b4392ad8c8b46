// See processors.h. Tested by processors_test.
#include "jit/base/processors.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <fstream>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>

namespace tilewright {
namespace {

using Path = std::filesystem::path;
using Limit = std::optional<int>;

Limit smaller(Limit a, Limit b) {
  if (!a || !b) return a ? a : b;
  return std::min(*a, *b);
}

// The first word of a text, and the text without it.
std::string_view take_word(std::string_view& text) {
  constexpr std::string_view blanks = " \t\n";
  text.remove_prefix(std::min(text.find_first_not_of(blanks), text.size()));
  const std::string_view word = text.substr(0, text.find_first_of(blanks));
  text.remove_prefix(word.size());
  return word;
}

// Microseconds per period, as CPUs. "max" and -1, which mean no limit, are no positive numbers.
Limit processors(std::string_view quota_word, std::string_view period_word) {
  const auto number = [](std::string_view word) {
    std::int64_t value = 0;
    const char* end = word.data() + word.size();
    const auto read = std::from_chars(word.data(), end, value);
    return read.ec == std::errc() && read.ptr == end ? value : 0;
  };
  const std::int64_t quota = number(quota_word), period = number(period_word);
  if (quota <= 0 || period <= 0) return std::nullopt;
  constexpr std::int64_t most = std::numeric_limits<int>::max();
  return static_cast<int>(std::min((quota - 1) / period + 1, most));
}

std::string first_line(const Path& file) {
  std::string line;
  std::ifstream stream(file);
  std::getline(stream, line);
  return line;
}

Limit limit_of_group(const Path& directory) {
  const std::string line = first_line(directory / "cpu.max");
  std::string_view both = line;
  const std::string_view quota = take_word(both);
  if (!quota.empty()) return processors(quota, take_word(both));
  const std::string old_quota = first_line(directory / "cpu.cfs_quota_us");
  const std::string old_period = first_line(directory / "cpu.cfs_period_us");
  std::string_view quota_text = old_quota, period_text = old_period;
  return processors(take_word(quota_text), take_word(period_text));
}

// A container often sees the name that its group has outside, while its own group is the root of
// what is mounted: directories that do not exist are passed on the way up.
Limit limit_of_group_and_parents(const Path& mounted, std::string_view group) {
  Limit limit;
  Path inside = Path(group).lexically_normal().relative_path();
  while (true) {
    limit = smaller(limit, limit_of_group(mounted / inside));
    if (inside.empty()) return limit;
    inside = inside.parent_path();
  }
}

bool lists(std::string_view controllers, std::string_view name) {
  while (!controllers.empty()) {
    const std::size_t length = std::min(controllers.find(','), controllers.size());
    if (controllers.substr(0, length) == name) return true;
    controllers.remove_prefix(std::min(length + 1, controllers.size()));
  }
  return false;
}

}  // namespace

ProcessorSet ProcessorSet::allowed() {
  ProcessorSet set;
  auto* mask = reinterpret_cast<cpu_set_t*>(set.words_.data());
  if (sched_getaffinity(0, sizeof set.words_, mask) != 0) set.add(0);
  return set;
}

void ProcessorSet::add(std::size_t processor) {
  if (processor / 64 < words_.size()) words_[processor / 64] |= std::uint64_t{1} << processor % 64;
}

int ProcessorSet::count() const {
  int count = 0;
  for (std::uint64_t word : words_) count += std::popcount(word);
  return count;
}

bool ProcessorSet::meets(const ProcessorSet& other) const {
  for (std::size_t i = 0; i < words_.size(); ++i) {
    if ((words_[i] & other.words_[i]) != 0) return true;
  }
  return false;
}

Limit read_quota(const Path& root) {
  Limit limit;
  const Path groups = root / "sys/fs/cgroup";
  std::ifstream memberships(root / "proc/self/cgroup");
  // "ID:CONTROLLERS:GROUP"; version 2 has no controllers.
  for (std::string line; std::getline(memberships, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == line.npos ? first : line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      limit = smaller(limit, limit_of_group_and_parents(groups, group));
    } else if (lists(controllers, "cpu")) {
      std::error_code ignored;
      const bool together = std::filesystem::is_directory(groups / controllers, ignored);
      limit = smaller(limit,
                      limit_of_group_and_parents(groups / (together ? controllers : "cpu"), group));
    }
  }
  return limit;
}

Limit current_quota() {
  using Clock = std::chrono::steady_clock;
  static constinit std::atomic<int> known{0};
  static constinit std::atomic<Clock::rep> due{std::numeric_limits<Clock::rep>::min()};
  // One thread reads, others take what was known: no step waits for another's files. Those that ask
  // during the very first reading know of no limit yet.
  const auto now = Clock::now().time_since_epoch();
  Clock::rep was_due = due.load();
  const Clock::rep next = (now + std::chrono::seconds(1)).count();
  if (now.count() >= was_due && due.compare_exchange_strong(was_due, next)) {
    known = read_quota("/").value_or(0);
  }
  const int limit = known;
  return limit > 0 ? Limit(limit) : std::nullopt;
}

}  // namespace tilewright
