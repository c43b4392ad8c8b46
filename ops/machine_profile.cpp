// Profiles as JSON, and the reading of the file. See machine_profile.h. Tested by choices_test and
// tests/python/test_tune.py.
#include "ops/machine_profile.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cache/key.h"
#include "cache/trusted_file.h"

namespace tilewright::ops {
namespace {

using nlohmann::json;

constexpr int kFormat = 1;
constexpr std::size_t kMostBytes = 1 << 20;

std::string text_of(const json& object, const char* name) {
  const auto found = object.find(name);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

Result<std::string> read_text(const std::string& path, bool* absent) {
  const std::size_t slash = path.rfind('/');
  const auto directory =
      cache::open_trusted_directory(AT_FDCWD, slash == 0 ? "/" : path.substr(0, slash), absent);
  if (!directory) return directory.error();
  const auto file =
      cache::read_trusted_file(directory->get(), path.substr(slash + 1), kMostBytes, absent);
  if (!file) return file.error();
  return std::string(reinterpret_cast<const char*>(file->bytes.data()), file->bytes.size());
}

}  // namespace

std::string default_profile_path() {
  const std::string directory = cache::user_directory("XDG_CONFIG_HOME", "/.config");
  return directory.empty() ? "" : directory + "/profile.json";
}

Result<std::string> print_profile(const CpuModel& cpu, std::string_view choices,
                                  std::string_view measured) {
  if (Result<Choices> valid = changed({}, choices); !valid) return valid.error();
  const json details = json::parse(measured, nullptr, false);
  if (!details.is_object()) return Error{"what was measured is no JSON object"};
  const json profile = {{"tilewright", kFormat},
                        {"cpu", print(cpu)},
                        {"generator", cache::generator_hash()},
                        {"choices", json::parse(choices)},
                        {"measured", details}};
  return profile.dump(2) + "\n";
}

Result<Choices> read_profile(const CpuModel& cpu, const Choices& shipped, std::string_view text) {
  const json profile = json::parse(text, nullptr, false);
  if (!profile.is_object()) return Error{"it is no JSON object"};
  if (const json format = profile.value("tilewright", json()); format != kFormat) {
    return Error{fmt::format("it is of format {}, not {}", format.dump(), kFormat)};
  }
  if (const std::string made = text_of(profile, "cpu"); made != print(cpu)) {
    return Error{fmt::format("it is of another CPU: {}, not {}", made, print(cpu))};
  }
  if (text_of(profile, "generator") != cache::generator_hash()) {
    return Error{"it was made by another build: run `tilewright tune` again"};
  }
  return changed(shipped, profile.value("choices", json()).dump());
}

Decision decide(const Target& host, const std::string& setting) {
  Decision decision = choices_for(host.cpu, host.isa);
  if (setting == "off" || cache::has_foreign_privileges()) return decision;
  const std::string path = setting.empty() ? default_profile_path() : setting;
  if (path.empty()) return decision;
  bool absent = false;
  const Result<std::string> text = read_text(path, &absent);
  if (!text && absent && setting.empty()) return decision;
  Result<Choices> choices =
      text ? read_profile(host.cpu, decision.choices, *text) : Result<Choices>(text.error());
  if (!choices) {
    decision.problem = fmt::format("profile {} is not used: {}", path, choices.error().message);
    return decision;
  }
  return {std::move(choices.value()), fmt::format("profile {}", path), ""};
}

}  // namespace tilewright::ops
