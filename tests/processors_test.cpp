// What the operating system allows: control groups as directories of a test, the mask of a thread.
#include "jit/base/processors.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <stdlib.h>

#include <fstream>
#include <map>
#include <string>
#include <thread>

namespace tilewright {
namespace {

using Files = std::map<std::string, std::string>;  // below the root: contents

std::optional<int> quota_of(const Files& files) {
  std::string name = std::filesystem::temp_directory_path() / "tilewright-quota-XXXXXX";
  if (mkdtemp(name.data()) == nullptr) return -1;
  const std::filesystem::path root = name;
  for (const auto& [file, text] : files) {
    std::filesystem::create_directories((root / file).parent_path());
    std::ofstream(root / file) << text;
  }
  const std::optional<int> quota = read_quota(root);
  std::filesystem::remove_all(root);
  return quota;
}

// Of a process in the group /a/b of version 2.
std::optional<int> quota_of_two(const std::string& outer, const std::string& inner) {
  return quota_of({{"proc/self/cgroup", "0::/a/b\n"},
                   {"sys/fs/cgroup/a/cpu.max", outer},
                   {"sys/fs/cgroup/a/b/cpu.max", inner}});
}

TEST(Quota, IsRoundedUpAndAtLeastOne) {
  EXPECT_EQ(quota_of_two("max 100000\n", "150000 100000\n"), 2);
  EXPECT_EQ(quota_of_two("max 100000\n", "200000 100000\n"), 2);
  EXPECT_EQ(quota_of_two("max 100000\n", "200001 100000\n"), 3);
  EXPECT_EQ(quota_of_two("max 100000\n", "1000 100000\n"), 1);
  EXPECT_EQ(quota_of_two("max 100000\n", "9223372036854775807 1\n"), 2147483647);
}

TEST(Quota, TheSmallestOfAllParentsCounts) {
  EXPECT_EQ(quota_of_two("300000 100000\n", "500000 100000\n"), 3);
  EXPECT_EQ(quota_of_two("700000 100000\n", "500000 100000\n"), 5);
  EXPECT_EQ(quota_of_two("max 100000\n", "max 100000\n"), std::nullopt);
  EXPECT_EQ(quota_of({{"proc/self/cgroup", "0::/a/b\n"},
                      {"sys/fs/cgroup/cpu.max", "400000 100000\n"},
                      {"sys/fs/cgroup/a/b/cpu.max", "max 100000\n"}}),
            4);
}

TEST(Quota, OfAContainerThatSeesItsOwnGroupAsTheRoot) {
  EXPECT_EQ(
      quota_of({{"proc/self/cgroup", "0::/\n"}, {"sys/fs/cgroup/cpu.max", "250000 100000\n"}}), 3);
  EXPECT_EQ(quota_of({{"proc/self/cgroup", "0::/docker/4711\n"},
                      {"sys/fs/cgroup/cpu.max", "250000 100000\n"}}),
            3);
  EXPECT_EQ(quota_of({{"proc/self/cgroup", "0::/../../other\n"},
                      {"sys/fs/cgroup/cpu.max", "250000 100000\n"}}),
            3);
}

TEST(Quota, OfVersionOne) {
  const std::string memberships = "9:name=systemd:/s\n4:memory:/a\n3:cpuset:/a\n";
  const auto of = [&](const std::string& line, const std::string& mounted,
                      const std::string& quota) {
    return quota_of({{"proc/self/cgroup", memberships + line},
                     {"sys/fs/cgroup/" + mounted + "/a/b/cpu.cfs_quota_us", quota},
                     {"sys/fs/cgroup/" + mounted + "/a/b/cpu.cfs_period_us", "50000\n"},
                     {"sys/fs/cgroup/" + mounted + "/cpu.cfs_quota_us", "-1\n"},
                     {"sys/fs/cgroup/" + mounted + "/cpu.cfs_period_us", "100000\n"},
                     {"sys/fs/cgroup/memory/a/cpu.cfs_quota_us", "1\n"},
                     {"sys/fs/cgroup/memory/a/cpu.cfs_period_us", "1\n"}});
  };
  EXPECT_EQ(of("1:cpu:/a/b\n0::/\n", "cpu", "75000\n"), 2);
  EXPECT_EQ(of("1:cpu,cpuacct:/a/b\n", "cpu,cpuacct", "175000\n"), 4);
  EXPECT_EQ(of("1:cpuacct,cpu:/a/b\n", "cpu", "175000\n"), 4);
  EXPECT_EQ(of("1:cpu:/a/b\n", "cpu", "-1\n"), std::nullopt);
  EXPECT_EQ(of("1:cpuacct:/a/b\n", "cpuacct", "75000\n"), std::nullopt);
}

TEST(Quota, WhatCannotBeReadIsNoLimit) {
  EXPECT_EQ(quota_of({}), std::nullopt);
  for (const char* memberships : {"", "\n", "0\n", "0:\n", "0:cpu\n", ":::::\n"}) {
    EXPECT_EQ(quota_of({{"proc/self/cgroup", memberships}}), std::nullopt) << memberships;
  }
  for (const char* text :
       {"", "\n", "  ", "100000", "100000 ", "100000 0\n", "0 100000\n", "-5 100000\n",
        "1e5 100000\n", "100000 x\n", "max\n", "99999999999999999999 100000\n"}) {
    EXPECT_EQ(quota_of_two("max 100000\n", text), std::nullopt) << text;
    EXPECT_EQ(quota_of_two("600000 100000\n", text), 6) << text;
  }
}

TEST(Quota, OfThisMachineIsPositiveIfThereIsOne) {
  EXPECT_EQ(current_quota(), read_quota("/"));
  EXPECT_GE(current_quota().value_or(1), 1);
}

TEST(Processors, SetsCountAndMeet) {
  ProcessorSet a, b;
  EXPECT_EQ(a.count(), 0);
  EXPECT_FALSE(a.meets(b));
  a.add(0);
  a.add(63);
  a.add(64);
  a.add(8191);
  a.add(8192);
  b.add(65);
  EXPECT_EQ(a.count(), 4);
  EXPECT_FALSE(a.meets(b));
  b.add(8191);
  EXPECT_TRUE(a.meets(b));
}

TEST(Processors, TheMaskIsThatOfTheCallingThread) {
  const int before = ProcessorSet::allowed().count();
  EXPECT_GE(before, 1);
  std::thread([] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    EXPECT_EQ(ProcessorSet::allowed().count(), 1);
  }).join();
  EXPECT_EQ(ProcessorSet::allowed().count(), before);
}

}  // namespace
}  // namespace tilewright
