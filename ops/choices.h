// Choices: what decides how fast our kernels run on a CPU, and never what they compute, as a value.
//
// Where they come from, in this order: a machine profile (machine_profile.h) that `tilewright tune`
// wrote after measuring; the recorded row of choices.def for this CPU's vendor, family, model and
// stepping; a fixed rule. Nothing is measured at start, so two starts give the same kernels, keys
// and bits. `tilewright env` prints them, explain() names their source.
//
// Tested by choices_test.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "jit/base/result.h"
#include "jit/base/target.h"

namespace tilewright::ops {

struct Choices {
#define NUMBER(name, value, low, high, documentation) std::int64_t name = value;
#define BLOCKS(name, lanes, documentation, ...) std::vector<int> name = {__VA_ARGS__};
#define RUNG(name, value, documentation) std::string name = value;
#include "ops/choices.def"
  friend bool operator==(const Choices&, const Choices&) = default;

  const std::vector<int>& row_blocks(int lanes) const {
    return lanes == 16 ? row_blocks_avx512 : row_blocks_avx2;
  }
};

struct Decision {
  Choices choices;
  std::string source;   // "row zen3-server", "rule for unknown CPUs", "profile /path"
  std::string problem;  // why a profile that was there is not used; "" if all is well
  // Of a rung: with `choices` all that CPUs with it may ask kernels for.
  std::vector<Choices> others = {};
};

// The row that fits, or the rule.
Decision choices_for(const CpuModel& cpu, IsaMask isa);

// `choices` but for those that a JSON object names, as {"prefetch": 512}. Error: no such choice, or
// a value out of range, and which.
Result<Choices> changed(Choices choices, std::string_view json);

struct ChoiceRow {
  std::string_view name;
  std::string value;  // JSON
  std::string_view documentation;
};
// In the table's order.
std::vector<ChoiceRow> rows(const Choices& choices);

}  // namespace tilewright::ops
