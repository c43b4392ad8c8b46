// How many cases a test of faults tries: few in every run of the tests, many in a campaign; and
// what it tells the campaign of them.
//
// Used by the *_fault_test and *_mutation_test; tests/campaign/cache.py sets CAMPAIGN and makes a
// table of what they record.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <string>

namespace tilewright::testing {

inline bool is_campaign() { return std::getenv("CAMPAIGN") != nullptr; }

inline std::int64_t cases(std::int64_t always, std::int64_t campaign) {
  return is_campaign() ? campaign : always;
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
