// See read_bandwidth.h. Tested by threads_test.
#include "ops/read_bandwidth.h"

#include <emmintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "ops/threads.h"
#include "ops/weight_memory.h"

namespace tilewright::ops {
namespace {

constexpr std::int64_t kBytes = 256 << 20;  // beyond the caches of one socket's share
constexpr int kPasses = 5;
constexpr std::int64_t kLine = 64;

// Loads all lines of both halves in turns, as a linear kernel reads panels: one stream and no
// requests ahead gave 26 of 33 GB/s on Emerald Rapids. The result only keeps the loop from being
// dropped.
int read_all(const char* begin, const char* end) {
  constexpr std::int64_t ahead = 2048;
  const std::int64_t half = (end - begin) / 2 / kLine * kLine;
  __m128i all[4] = {};
  for (const char* at = begin; at < begin + half; at += kLine) {
    for (const char* line : {at, at + half}) {
      _mm_prefetch(line + ahead, _MM_HINT_T1);
      for (int i = 0; i < 4; ++i) {
        all[i] = _mm_or_si128(all[i], _mm_load_si128(reinterpret_cast<const __m128i*>(line) + i));
      }
    }
  }
  return _mm_movemask_epi8(
      _mm_or_si128(_mm_or_si128(all[0], all[1]), _mm_or_si128(all[2], all[3])));
}

}  // namespace

double read_bandwidth(int threads) {
  WeightMemory memory;
  const WeightBytes bytes = memory.allocate(kBytes);
  if (!bytes) return 0;
  std::atomic<int> sink = 0;
  const auto pass = [&](auto&& body) {
    run_team(threads, [&](int thread, int team) {
      const WorkRange lines = share(kBytes / kLine, thread, team);
      body(bytes.get() + lines.begin * kLine, bytes.get() + lines.end * kLine);
    });
  };
  // Written once: pages that nobody wrote would all be the one page of zeros.
  pass(
      [](char* begin, char* end) { std::memset(begin, 1, static_cast<std::size_t>(end - begin)); });
  double best = 0;
  for (int i = 0; i < kPasses; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pass([&](const char* begin, const char* end) { sink += read_all(begin, end); });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::max(best, kBytes / taken.count());
  }
  return best;
}

}  // namespace tilewright::ops
