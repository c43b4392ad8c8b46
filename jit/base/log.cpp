// The log's one sink and one level.
//
// Tested by base_test.
#include "jit/base/log.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>

#include "jit/base/env.h"
#include "jit/base/fork_mutex.h"
#include "jit/base/fork_static.h"

namespace tilewright {
namespace {

void write_to_stderr(LogLevel, std::string_view message) {
  // One call for the whole line: lines of several threads or processes do not mix.
  const std::string line = "tilewright: " + std::string(message) + "\n";
  std::fputs(line.c_str(), stderr);
}

struct Log {
  ForkMutex mutex;
  std::shared_ptr<const LogSink> sink = std::make_shared<const LogSink>(write_to_stderr);
  std::atomic<int> level{environment().verbose};
};

// Never destroyed: a thread may log while the process exits.
Log& log() {
  static constinit ForkStatic<Log> instance;
  return instance.get();
}

void send(LogLevel level, std::string_view message) {
  if (!log_enabled(level)) return;
  std::shared_ptr<const LogSink> sink;
  {
    const std::lock_guard lock(log().mutex);
    sink = log().sink;
  }
  (*sink)(level, message);
}

}  // namespace

void set_log_sink(LogSink sink) {
  if (!sink) sink = write_to_stderr;
  auto shared = std::make_shared<const LogSink>(std::move(sink));
  const std::lock_guard lock(log().mutex);
  log().sink.swap(shared);  // the old sink dies after the lock is released
}

void set_log_level(LogLevel level) { log().level = static_cast<int>(level); }

bool log_enabled(LogLevel level) { return static_cast<int>(level) <= log().level; }

void log_warning(std::string_view message) { send(LogLevel::warning, message); }
void log_info(std::string_view message) { send(LogLevel::info, message); }
void log_debug(std::string_view message) { send(LogLevel::debug, message); }

void log_environment_problems() {
  static constinit std::atomic<bool> done{false};
  if (done.exchange(true)) return;
  for (const std::string& problem : environment().problems) log_warning(problem);
}

}  // namespace tilewright
