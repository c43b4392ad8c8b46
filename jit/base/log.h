// A leveled log. Messages go to stderr with the prefix "tilewright: ", or to a sink that a front
// end installs (Python's logging).
//
// TILEWRIGHT_VERBOSE sets the level: warnings only, information, debugging. A message is formatted
// by its caller; ask log_enabled() first where that costs something.
//
// Thread-safe. The sink is called without a lock held, because a Python sink takes the interpreter
// lock. Tested by base_test.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

namespace tilewright {

enum class LogLevel : std::uint8_t { warning, info, debug };

using LogSink = std::function<void(LogLevel, std::string_view message)>;

// Replaces the sink; an empty function restores stderr.
void set_log_sink(LogSink sink);
// Replaces the level that TILEWRIGHT_VERBOSE gave.
void set_log_level(LogLevel level);
bool log_enabled(LogLevel level);

void log_warning(std::string_view message);
void log_info(std::string_view message);
void log_debug(std::string_view message);

// Warns once per process of each bad environment variable. A front end calls it when it starts.
void log_environment_problems();

}  // namespace tilewright
