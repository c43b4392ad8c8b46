// How many cases a test of faults tries: few in every run of the tests, many in a campaign; and
// what it tells the campaign of them.
//
// Used by the *_fault_test and *_mutation_test; tests/campaign/cache.py sets CAMPAIGN to the share
// of a whole campaign's cases that it wants, and makes a table of what they record.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace tilewright::testing {

// 1: all of a campaign; 0: none.
inline double campaign_share() {
  const char* share = std::getenv("CAMPAIGN");
  return share == nullptr ? 0 : std::atof(share);
}

inline bool is_campaign() { return campaign_share() > 0; }

inline std::int64_t cases(std::int64_t always, std::int64_t campaign) {
  const double share = campaign_share() * static_cast<double>(campaign);
  return std::max(always, static_cast<std::int64_t>(share));
}

// One row of the table: what was done, to how many cases, and how many of them went wrong.
inline void record_fault(const std::string& fault, std::int64_t tried, std::int64_t wrong) {
  ::testing::Test::RecordProperty("fault", fault);
  ::testing::Test::RecordProperty("tried", std::to_string(tried));
  ::testing::Test::RecordProperty("wrong", std::to_string(wrong));
  EXPECT_GT(tried, 0);
  EXPECT_EQ(wrong, 0);
}

}  // namespace tilewright::testing
