// The table of environment variables and its readers.
//
// Tested by base_test.
#include "jit/base/env.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "jit/base/fork_static.h"
#include "jit/base/target.h"

namespace tilewright {
namespace {

std::optional<std::int64_t> parse_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

bool read_integer(std::string_view text, int low, int high, int& value) {
  const std::optional<std::int64_t> number = parse_integer(text);
  if (!number || *number < low || *number > high) return false;
  value = static_cast<int>(*number);
  return true;
}

bool read_flag(std::string_view text, bool& value) {
  if (text != "0" && text != "1") return false;
  value = text == "1";
  return true;
}

bool read_bytes(std::string_view text, std::uint64_t& bytes) {
  int shift = 0;
  if (!text.empty()) {
    switch (text.back()) {
      case 'K':
        shift = 10;
        break;
      case 'M':
        shift = 20;
        break;
      case 'G':
        shift = 30;
        break;
      default:
        break;
    }
  }
  if (shift != 0) text.remove_suffix(1);
  const std::optional<std::int64_t> number = parse_integer(text);
  if (!number || *number < 0 || *number > std::int64_t{1} << 32) return false;
  bytes = static_cast<std::uint64_t>(*number) << shift;
  return true;
}

template <class Value>
struct Choice {
  std::string_view name;
  Value value;
};

template <class Value>
bool read_choice(std::string_view text, std::initializer_list<Choice<Value>> choices,
                 Value& value) {
  for (const Choice<Value>& choice : choices) {
    if (text != choice.name) continue;
    value = choice.value;
    return true;
  }
  return false;
}

// An empty `known` accepts every name: the layer that knows the names checks them.
bool read_selection(std::string_view text, std::initializer_list<std::string_view> known,
                    Selection& selection) {
  Selection result;
  if (text == "1") {
    result.all = true;
  } else if (text != "0") {
    while (!text.empty()) {
      const std::size_t length = std::min(text.find(','), text.size());
      const std::string_view name = text.substr(0, length);
      text.remove_prefix(std::min(length + 1, text.size()));
      const bool accepted =
          known.size() == 0 || std::find(known.begin(), known.end(), name) != known.end();
      if (name.empty() || !accepted) return false;
      result.names.emplace_back(name);
    }
  }
  selection = std::move(result);
  return true;
}

bool read_text(std::string_view text, std::string& value) {
  value = text;
  return true;
}

std::vector<Variable> make_table() {
  using E = Environment;
  using Text = std::string_view;
  return {
      {"MAX_CPU_ISA", "all", Target::ladder_names(),
       "Highest instruction set that generated code may use.",
       [](Text v, E& e) { return Target::ladder(v).ok() && read_text(v, e.max_cpu_isa); }},
      {"CACHE", "rw", "rw, ro, off", "Cache on disk: read and write, read only, or neither.",
       [](Text v, E& e) {
         return read_choice<CacheMode>(
             v,
             {{"rw", CacheMode::read_write}, {"ro", CacheMode::read_only}, {"off", CacheMode::off}},
             e.cache);
       }},
      {"CACHE_DIR", "", "a directory", "Where the cache is; the user's cache directory if not set.",
       [](Text v, E& e) { return read_text(v, e.cache_dir); }},
      {"CACHE_MAX_SIZE", "8G", "bytes, with K, M or G", "Size above which old entries are removed.",
       [](Text v, E& e) { return read_bytes(v, e.cache_max_bytes); }},
      {"CACHE_CHECK", "0", "0, 1",
       "Make every cached kernel and plan again and compare; read mapped weights.",
       [](Text v, E& e) { return read_flag(v, e.cache_check); }},
      {"CACHE_WEIGHTS", "auto", "auto, on, off",
       "Packed weights on disk: those that are there are used (auto), all that are packed are also "
       "written (on), or none is used (off).",
       [](Text v, E& e) {
         return read_choice<CacheWeights>(v,
                                          {{"auto", CacheWeights::automatic},
                                           {"on", CacheWeights::on},
                                           {"off", CacheWeights::off}},
                                          e.cache_weights);
       }},
      {"CACHE_PACK", "", "FILE or FILE@sha256:DIGEST, several separated by commas",
       "Sealed packs, made by `tilewright prewarm --pack`, looked in before CACHE_DIR.",
       [](Text v, E& e) { return read_text(v, e.cache_pack); }},
      {"NUM_THREADS", "0", "0 to 4096",
       "Threads of a program; 0: as torch, at most the CPUs of the affinity mask and of the "
       "cgroup's quota.",
       [](Text v, E& e) { return read_integer(v, 0, 4096, e.num_threads); }},
      {"VERBOSE", "0", "0, 1, 2, profile",
       "Messages on stderr: warnings, information, debugging; or at exit, where the time went.",
       [](Text v, E& e) {
         e.profile = v == "profile";
         return e.profile || read_integer(v, 0, 2, e.verbose);
       }},
      {"DUMP", "0", "0, 1 or a comma-separated list of graph, passes, program, vir, code",
       "Write these forms of everything that is compiled to DUMP_DIR.",
       [](Text v, E& e) {
         return read_selection(v, {"graph", "passes", "program", "vir", "code"}, e.dump);
       }},
      {"DUMP_DIR", "tilewright_dump", "a directory", "Where DUMP writes.",
       [](Text v, E& e) { return read_text(v, e.dump_dir); }},
      {"JIT_PROFILE", "none", "none, perf, vtune, gdb", "Tell this tool the names of kernels.",
       [](Text v, E& e) {
         return read_choice<JitProfile>(v,
                                        {{"none", JitProfile::none},
                                         {"perf", JitProfile::perf},
                                         {"vtune", JitProfile::vtune},
                                         {"gdb", JitProfile::gdb}},
                                        e.jit_profile);
       }},
      {"STRICT", "0", "0, 1", "Raise an error where a fallback would be used.",
       [](Text v, E& e) { return read_flag(v, e.strict); }},
      {"DISABLE", "0", "0, 1 or a comma-separated list of ops",
       "Run these ops, or with 1 everything, by the fallback.",
       [](Text v, E& e) { return read_selection(v, {}, e.disable); }},
      {"FALLBACK", "aten", "aten, onednn", "Which library runs what our kernels do not.",
       [](Text v, E& e) {
         return read_choice<Fallback>(v, {{"aten", Fallback::aten}, {"onednn", Fallback::onednn}},
                                      e.fallback);
       }},
      {"PASS_LIMIT", "-1", "-1 (none) or a count", "Stop the pipeline after so many passes.",
       [](Text v, E& e) { return read_integer(v, -1, 1 << 20, e.pass_limit); }},
      {"WEIGHTS", "auto", "auto, compact, exact, plain",
       "Storage of weights, lossless: 16 bits where they hold the values, and 12 bits in large "
       "models "
       "(auto) or always (compact); 16 bits only (exact); as given (plain).",
       [](Text v, E& e) {
         return read_choice<WeightMode>(v,
                                        {{"auto", WeightMode::automatic},
                                         {"compact", WeightMode::compact},
                                         {"exact", WeightMode::exact},
                                         {"plain", WeightMode::plain}},
                                        e.weights);
       }},
      {"PACKING", "auto", "auto, first",
       "When a large model's weights are packed: before its second step, where the first has the "
       "same results without (auto), or before the first (first).",
       [](Text v, E& e) {
         return read_choice<Packing>(v, {{"auto", Packing::automatic}, {"first", Packing::first}},
                                     e.packing);
       }},
      {"RUN_DTYPE", "", "float32, bfloat16, float16",
       "Set by `tilewright run`: the type that models get which the program loads.",
       [](Text v, E& e) {
         const bool known = v.empty() || v == "float32" || v == "bfloat16" || v == "float16";
         return known && read_text(v, e.run_dtype);
       }},
      {"FP32", "auto", "auto, fma, amx",
       "fp32 products of many rows: by AMX always (amx), never (fma), or where the choice "
       "fp32_products says that it is faster (auto).",
       [](Text v, E& e) {
         return read_choice<Fp32Mode>(
             v, {{"auto", Fp32Mode::automatic}, {"fma", Fp32Mode::fma}, {"amx", Fp32Mode::amx}},
             e.fp32);
       }},
      {"KV_CACHE", "auto", "auto, int8",
       "Keys and values: in the model's type (auto), or in 8 bits with a scale per token and head "
       "(int8), which changes results a little. `llm.optimize(kv_cache_dtype=)` comes first.",
       [](Text v, E& e) {
         return read_choice<KvCacheMode>(
             v, {{"auto", KvCacheMode::automatic}, {"int8", KvCacheMode::int8}}, e.kv_cache);
       }},
      {"PROFILE", "", "off, or a file's absolute path",
       "This machine's profile, made by `tilewright tune`; the user's own if not set.",
       [](Text v, E& e) {
         return (v.empty() || v == "off" || v.starts_with('/')) && read_text(v, e.machine_profile);
       }},
  };
}

std::vector<std::string_view> process_entries() {
  std::vector<std::string_view> entries;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    entries.emplace_back(*entry);
  }
  return entries;
}

}  // namespace

bool Selection::contains(std::string_view name) const {
  return all || std::find(names.begin(), names.end(), name) != names.end();
}

std::span<const Variable> variables() {
  static constinit ForkStatic<const std::vector<Variable>> table;
  return table.get(make_table);
}

Environment parse_environment(const VariableGetter& getter) {
  Environment result;
  for (const Variable& variable : variables()) {
    variable.read(variable.default_value, result);
    const std::string full_name = fmt::format("{}{}", kVariablePrefix, variable.name);
    const char* value = getter(full_name.c_str());
    if (value == nullptr || *value == '\0' || variable.read(value, result)) continue;
    result.problems.push_back(fmt::format("{}={} is not valid (values: {}); using {}", full_name,
                                          value, variable.values, variable.default_value));
  }
  return result;
}

std::vector<std::string> unknown_variables(std::span<const std::string_view> entries) {
  std::vector<std::string> messages;
  for (std::string_view entry : entries) {
    if (!entry.starts_with(kVariablePrefix)) continue;
    const std::string_view full_name = entry.substr(0, entry.find('='));
    const std::string_view name = full_name.substr(kVariablePrefix.size());
    const auto known = [&](const Variable& variable) { return variable.name == name; };
    if (std::any_of(variables().begin(), variables().end(), known)) continue;
    messages.push_back(fmt::format("{} is not a variable of Tilewright; ignored", full_name));
  }
  return messages;
}

const Environment& environment() {
  static constinit ForkStatic<const Environment> result;
  return result.get([] {
    Environment e = parse_environment([](const char* name) { return secure_getenv(name); });
    for (std::string& message : unknown_variables(process_entries())) {
      e.problems.push_back(std::move(message));
    }
    return e;
  });
}

}  // namespace tilewright
