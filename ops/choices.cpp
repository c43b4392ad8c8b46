// The tables of choices.def, and choices as JSON. See choices.h. Tested by choices_test.
#include "ops/choices.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>

#include "ops/gemm/linear_kernel.h"

namespace tilewright::ops {
namespace {

using nlohmann::json;

struct CpuRow {
  std::string_view name, vendor;
  int family, first_model, last_model;
  unsigned steppings;
  std::string_view choices;

  bool fits(const CpuModel& cpu) const {
    return cpu.vendor == vendor && cpu.family == family && cpu.model >= first_model &&
           cpu.model <= last_model && cpu.stepping >= 0 && cpu.stepping < 16 &&
           (steppings >> cpu.stepping & 1) != 0;
  }
};

constexpr CpuRow kCpus[] = {
#define CPU(...) {__VA_ARGS__},
#include "ops/choices.def"
};

// Each stores a value and says whether it is acceptable.
bool read_number(const json& value, std::int64_t low, std::int64_t high, std::int64_t& to) {
  if (!value.is_number_integer()) return false;
  to = value.get<std::int64_t>();
  return to >= low && to <= high;
}

bool read_blocks(const json& value, int lanes, std::vector<int>& to) {
  if (!value.is_array() || value.empty()) return false;
  to.clear();
  for (const json& rows : value) {
    if (!rows.is_number_integer()) return false;
    const auto count = rows.get<std::int64_t>();
    if (count < 1 || count > (to.empty() ? max_rows(lanes) : to.back() - 1)) return false;
    to.push_back(static_cast<int>(count));
  }
  return to.back() == 1;
}

bool read_rung(const json& value, std::string& to) {
  if (!value.is_string()) return false;
  to = value.get<std::string>();
  return Target::ladder(to).ok();
}

// A rung that was asked for by its name stands for all CPUs that have it: the rule's, and each
// row's.
Decision choices_for_a_rung(IsaMask isa) {
  Decision decision{Choices(), fmt::format("all rows, for {}", isa_mask_name(isa)), ""};
  for (const CpuRow& row : kCpus) decision.others.push_back(*changed({}, row.choices));
  return decision;
}

}  // namespace

Decision choices_for(const CpuModel& cpu, IsaMask isa) {
  if (cpu.vendor == "generic") return choices_for_a_rung(isa);
  Decision decision{Choices(), fmt::format("rule for unknown CPUs with {}", isa_mask_name(isa)),
                    ""};
  const auto* row = std::ranges::find_if(kCpus, [&](const CpuRow& each) { return each.fits(cpu); });
  if (row == std::end(kCpus)) return decision;
  Result<Choices> choices = changed(std::move(decision.choices), row->choices);
  return {std::move(choices.value()), fmt::format("row {}", row->name), ""};
}

Result<Choices> changed(Choices choices, std::string_view text) {
  const json object = json::parse(text, nullptr, false);
  if (!object.is_object()) return Error{"choices are no JSON object"};
  for (const auto& [name, value] : object.items()) {
    bool known = false, good = false;
#define NUMBER(choice, initial, low, high, documentation) \
  if (name == #choice) {                                  \
    known = true;                                         \
    good = read_number(value, low, high, choices.choice); \
  }
#define BLOCKS(choice, lanes, documentation, ...)     \
  if (name == #choice) {                              \
    known = true;                                     \
    good = read_blocks(value, lanes, choices.choice); \
  }
#define RUNG(choice, initial, documentation) \
  if (name == #choice) {                     \
    known = true;                            \
    good = read_rung(value, choices.choice); \
  }
#include "ops/choices.def"
    if (!known) return Error{fmt::format("there is no choice '{}'", name)};
    if (!good) return Error{fmt::format("{} cannot be {}", name, value.dump())};
  }
  return choices;
}

std::vector<ChoiceRow> rows(const Choices& choices) {
  return {
#define NUMBER(name, initial, low, high, documentation) \
  {#name, json(choices.name).dump(), documentation},
#define BLOCKS(name, lanes, documentation, ...) {#name, json(choices.name).dump(), documentation},
#define RUNG(name, initial, documentation) {#name, json(choices.name).dump(), documentation},
#include "ops/choices.def"
  };
}

}  // namespace tilewright::ops
