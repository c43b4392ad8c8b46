// The environment variables, read once and typed.
//
// One table holds every variable's name, default, values, one line of documentation and the
// function that reads it, so `tilewright env`, the README's list and the program cannot disagree.
// A default is read by the same function as a user's value. A bad value never stops a program: it
// becomes a message in `problems` and the default holds.
//
// Thread-safe after the first call. Nothing is read in a set-uid program (secure_getenv). Tested by
// base_test.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tilewright {

enum class CacheMode : std::uint8_t { read_write, read_only, off };
enum class CacheWeights : std::uint8_t { automatic, on, off };
enum class JitProfile : std::uint8_t { none, perf, vtune, gdb };
enum class Fallback : std::uint8_t { aten, onednn };
enum class WeightMode : std::uint8_t { automatic, compact, exact, plain };
enum class Packing : std::uint8_t { automatic, first };
enum class Fp32Mode : std::uint8_t { automatic, fma, amx };
enum class KvCacheMode : std::uint8_t { automatic, int8 };

// "0": nothing, "1": everything, else a comma-separated list of names.
struct Selection {
  bool all = false;
  std::vector<std::string> names;

  bool contains(std::string_view name) const;
  bool empty() const { return !all && names.empty(); }
};

struct Environment {
  std::string max_cpu_isa;  // a rung that Target::ladder accepts
  CacheMode cache = CacheMode::read_write;
  std::string cache_dir;  // empty: the user's cache directory
  std::uint64_t cache_max_bytes = 0;
  bool cache_check = false;
  CacheWeights cache_weights = CacheWeights::automatic;
  std::string cache_pack;  // names, as cache/pack.h splits them; empty: none
  int num_threads = 0;     // 0: see ops/threads.h
  int verbose = 0;
  bool profile = false;  // VERBOSE=profile
  Selection dump;
  std::string dump_dir;
  JitProfile jit_profile = JitProfile::none;
  bool strict = false;
  Selection disable;
  Fallback fallback = Fallback::aten;
  int pass_limit = -1;  // -1: none
  WeightMode weights = WeightMode::automatic;
  Packing packing = Packing::automatic;
  Fp32Mode fp32 = Fp32Mode::automatic;
  KvCacheMode kv_cache = KvCacheMode::automatic;
  std::string machine_profile;  // empty: the user's own; "off": none; else an absolute path
  std::string run_dtype;        // empty: a model's own

  std::vector<std::string> problems;  // one line for each bad value
};

struct Variable {
  std::string_view name;           // without the prefix
  std::string_view default_value;  // empty: not set
  std::string values;              // what is accepted, for people
  std::string_view documentation;
  // Stores the value; false when it is not acceptable.
  bool (*read)(std::string_view value, Environment& environment);
};

inline constexpr std::string_view kVariablePrefix = "TILEWRIGHT_";

std::span<const Variable> variables();

// Returns a variable's value or nullptr, as getenv.
using VariableGetter = std::function<const char*(const char* full_name)>;
Environment parse_environment(const VariableGetter& getter);
// One message for each "NAME=value" that has our prefix but is no variable of ours: a typing error.
std::vector<std::string> unknown_variables(std::span<const std::string_view> entries);

// This process's environment as it was at the first call.
const Environment& environment();

}  // namespace tilewright
