// The limits of the machine at hand, measured: read bandwidth by working set, threads and access
// pattern; multiply-add rates of each instruction set the CPU has; barrier and fork/join cost.
//
// Why: a share of a limit means something only if the limit was measured on the same cores a moment
// before. Data sheets do not know how many neighbours share the memory.
//
//   roof [--short | --full] [--json] [--threads N]   everything, printable or JSON
//   roof --serve [--threads N] [--footprint MB]      one line of JSON per line on stdin (the gate)
//
// Every instruction set beyond the floor sits behind a run-time check. Rates are the best of
// several samples, except with --serve, where the median of short ones tells how the machine feels
// now.
//
// Tested by tests/python/test_bench_roof.py.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// ---------------------------------------------------------------- what the CPU has

struct Isa {
  bool avx2, avx512, avx512_vnni, avx512_bf16, avx_vnni, amx;
};

bool amx_permitted() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = (d >> 24) & 1, bf16 = (d >> 22) & 1, int8 = (d >> 25) & 1;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return tile && bf16 && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool avx_vnni_bit() {
  unsigned a = 7, b = 0, c = 1, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (a >> 4) & 1;
}

Isa detect() {
  __builtin_cpu_init();
  Isa isa{};
  isa.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  isa.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  isa.avx512_vnni = isa.avx512 && __builtin_cpu_supports("avx512vnni");
  isa.avx512_bf16 = isa.avx512 && __builtin_cpu_supports("avx512bf16");
  isa.avx_vnni = isa.avx2 && avx_vnni_bit();
  isa.amx = isa.avx512 && amx_permitted();
  return isa;
}

// ---------------------------------------------------------------- a pinned team

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : threads_(threads) {}
  void wait() {
    const std::uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins)
      if (spins > 20000) sched_yield();  // a neighbour may hold the late thread's core
  }

 private:
  int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

using Work = std::function<double(int thread)>;  // returns the amount of work done

// Amount per second over all threads, of one go from a common start to the last thread's end.
double rate(int threads, const Work& work) {
  static const std::vector<int> cpus = allowed_cpus();
  SpinBarrier barrier(threads);
  std::vector<double> amount(threads);
  Clock::time_point start;
  double seconds = 0;
  const auto body = [&](int thread) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[thread % cpus.size()], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    barrier.wait();
    if (thread == 0) start = Clock::now();
    amount[thread] = work(thread);
    barrier.wait();
    if (thread == 0) seconds = seconds_since(start);
  };
  std::vector<std::thread> others;
  for (int thread = 0; thread < threads; ++thread) others.emplace_back(body, thread);
  for (std::thread& other : others) other.join();
  double total = 0;
  for (const double one : amount) total += one;
  return total / seconds;
}

double best_rate(int threads, int samples, const Work& work) {
  double best = 0;
  for (int sample = 0; sample < samples; ++sample) best = std::max(best, rate(threads, work));
  return best;
}

double median_rate(int threads, int samples, const Work& work) {
  std::vector<double> rates;
  for (int sample = 0; sample < samples; ++sample) rates.push_back(rate(threads, work));
  std::nth_element(rates.begin(), rates.begin() + samples / 2, rates.end());
  return rates[samples / 2];
}

// ---------------------------------------------------------------- reading

struct Pattern {
  const char* name;
  int streams;   // sequential streams per thread
  int prefetch;  // bytes ahead; 0 is the hardware's own
};

constexpr Pattern kPatterns[] = {
    {"plain", 1, 0},
    {"prefetch 1 KiB", 1, 1024},
    {"prefetch 2 KiB", 1, 2048},
    {"prefetch 4 KiB", 1, 4096},
    {"prefetch 8 KiB", 1, 8192},
    {"2 streams", 2, 0},
    {"4 streams", 4, 0},
    {"2 streams, prefetch 2 KiB", 2, 2048},
};

volatile double sink;

// One pass over `size` bytes in `streams` equal parts; every cache line is loaded whole.
__attribute__((target("avx2"))) double read_avx2(const char* data, std::size_t size,
                                                 const Pattern& pattern) {
  const std::size_t part = size / pattern.streams & ~std::size_t{255};
  __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
  for (std::size_t at = 0; at < part; at += 256) {
    for (int stream = 0; stream < pattern.streams; ++stream) {
      const char* p = data + stream * part + at;
      if (pattern.prefetch != 0)
        for (int line = 0; line < 256; line += 64)
          _mm_prefetch(p + pattern.prefetch + line, _MM_HINT_T0);
      const auto load = [&](int i) __attribute__((target("avx2"))) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(p + 32 * i));
      };
      a = _mm256_add_ps(_mm256_add_ps(a, load(0)), load(4));
      b = _mm256_add_ps(_mm256_add_ps(b, load(1)), load(5));
      c = _mm256_add_ps(_mm256_add_ps(c, load(2)), load(6));
      d = _mm256_add_ps(_mm256_add_ps(d, load(3)), load(7));
    }
  }
  sink = _mm256_cvtss_f32(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
  return static_cast<double>(part) * pattern.streams;
}

__attribute__((target("avx512f"))) double read_avx512(const char* data, std::size_t size,
                                                      const Pattern& pattern) {
  const std::size_t part = size / pattern.streams & ~std::size_t{255};
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  for (std::size_t at = 0; at < part; at += 256) {
    for (int stream = 0; stream < pattern.streams; ++stream) {
      const char* p = data + stream * part + at;
      if (pattern.prefetch != 0)
        for (int line = 0; line < 256; line += 64)
          _mm_prefetch(p + pattern.prefetch + line, _MM_HINT_T0);
      a = _mm512_add_ps(a, _mm512_loadu_ps(p));
      b = _mm512_add_ps(b, _mm512_loadu_ps(p + 64));
      c = _mm512_add_ps(c, _mm512_loadu_ps(p + 128));
      d = _mm512_add_ps(d, _mm512_loadu_ps(p + 192));
    }
  }
  sink = _mm512_cvtss_f32(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
  return static_cast<double>(part) * pattern.streams;
}

// Memory that is there (touched), on 2 MiB pages where the system gives them.
class Buffer {
 public:
  explicit Buffer(std::size_t size) : size_(size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      std::fprintf(stderr, "roof: no memory for a buffer of %zu MiB\n", size / kMiB);
      std::exit(1);
    }
    madvise(memory, size, MADV_HUGEPAGE);
    data_ = static_cast<char*>(memory);
    std::memset(data_, 1, size);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(data_, size_); }
  const char* data() const { return data_; }

 private:
  char* data_;
  std::size_t size_;
};

// Each thread reads its own contiguous share of `footprint` until it has read `amount` bytes.
Work read_work(const Isa& isa, const Buffer& buffer, std::size_t footprint, int threads,
               const Pattern& pattern, std::size_t amount) {
  const std::size_t share = footprint / threads & ~std::size_t{4095};
  return [=, &buffer](int thread) {
    const char* data = buffer.data() + thread * share;
    double done = 0;
    while (done < static_cast<double>(amount))
      done += isa.avx512 ? read_avx512(data, share, pattern) : read_avx2(data, share, pattern);
    return done;
  };
}

// ---------------------------------------------------------------- arithmetic

__attribute__((target("avx2,fma"))) double fma_avx2(long steps) {
  __m256 sums[10];
  for (__m256& sum : sums) sum = _mm256_set1_ps(0.5F);
  __m256 x = _mm256_set1_ps(0.999F), y = _mm256_set1_ps(0.1F);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) sums[i] = _mm256_fmadd_ps(sums[i], x, y);
    __asm__ volatile("" : "+x"(x), "+x"(y));
  }
  for (const __m256& sum : sums) sink = sink + _mm256_cvtss_f32(sum);
  return static_cast<double>(steps) * 10 * 16;
}

__attribute__((target("avx512f"))) double fma_avx512(long steps) {
  __m512 sums[12];
  for (__m512& sum : sums) sum = _mm512_set1_ps(0.5F);
  __m512 x = _mm512_set1_ps(0.999F), y = _mm512_set1_ps(0.1F);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = _mm512_fmadd_ps(sums[i], x, y);
    __asm__ volatile("" : "+v"(x), "+v"(y));
  }
  for (const __m512& sum : sums) sink = sink + _mm512_cvtss_f32(sum);
  return static_cast<double>(steps) * 12 * 32;
}

__attribute__((target("avx512f,avx512bf16"))) double dot_bf16(long steps) {
  __m512 sums[12];
  for (__m512& sum : sums) sum = _mm512_set1_ps(0.5F);
  __m512i bits = _mm512_set1_epi16(0x3f00);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i)
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)bits, (__m512bh)bits);
    __asm__ volatile("" : "+v"(bits));
  }
  for (const __m512& sum : sums) sink = sink + _mm512_cvtss_f32(sum);
  return static_cast<double>(steps) * 12 * 64;
}

__attribute__((target("avx512f,avx512vnni"))) double dot_int8_avx512(long steps) {
  __m512i sums[12];
  for (__m512i& sum : sums) sum = _mm512_set1_epi32(1);
  __m512i x = _mm512_set1_epi8(1);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
    __asm__ volatile("" : "+v"(x));
  }
  for (const __m512i& sum : sums) sink = sink + ((__v16si)sum)[0];
  return static_cast<double>(steps) * 12 * 128;
}

__attribute__((target("avx2,avxvnni"))) double dot_int8_avx_vnni(long steps) {
  __m256i sums[10];
  for (__m256i& sum : sums) sum = _mm256_set1_epi32(1);
  __m256i x = _mm256_set1_epi8(1);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) sums[i] = _mm256_dpbusd_avx_epi32(sums[i], x, x);
    __asm__ volatile("" : "+x"(x));
  }
  for (const __m256i& sum : sums) sink = sink + _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
  return static_cast<double>(steps) * 10 * 64;
}

// Without VNNI: bytes to words to double words, three instructions for 64 operations.
__attribute__((target("avx2"))) double dot_int8_avx2(long steps) {
  __m256i sums[8];
  for (__m256i& sum : sums) sum = _mm256_set1_epi32(1);
  __m256i x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m256i words = _mm256_maddubs_epi16(x, x);
      __asm__ volatile("" : "+x"(words));  // or the compiler computes it once
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(words, ones));
    }
  }
  for (const __m256i& sum : sums) sink = sink + _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
  return static_cast<double>(steps) * 8 * 64;
}

// ---------------------------------------------------------------- tiles

#define TILE_TARGET __attribute__((target("amx-tile,amx-bf16,amx-int8")))

TILE_TARGET void configure_tiles() {
  // volatile: gcc drops stores to a configuration that only _tile_loadconfig reads.
  alignas(64) volatile unsigned char configuration[64] = {};
  configuration[0] = 1;
  for (int tile = 0; tile < 8; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  _tile_loadconfig(const_cast<unsigned char*>(configuration));
}

constexpr double kTileBf16 = 2.0 * 16 * 16 * 32;
constexpr double kTileInt8 = 2.0 * 16 * 16 * 64;

TILE_TARGET double tiles_bf16(long steps) {
  configure_tiles();
  for (long step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(steps) * 4 * kTileBf16;
}

TILE_TARGET double tiles_int8(long steps) {
  configure_tiles();
  for (long step = 0; step < steps; ++step) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(steps) * 4 * kTileInt8;
}

// A 2x2 step with all four operands loaded from a working set of `size` bytes.
TILE_TARGET double tiles_bf16_fed(const char* data, std::size_t size, long steps) {
  configure_tiles();
  std::size_t at = 0;
  for (long step = 0; step < steps; ++step) {
    const char* p = data + at;
    at = at + 8192 > size ? 0 : at + 4096;
    _tile_loadd(4, p, 64);
    _tile_loadd(6, p + 2048, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, p + 1024, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, p + 3072, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(steps) * 4 * kTileBf16;
}

// ---------------------------------------------------------------- the probes

struct Settings {
  int threads = 0;  // 0: every allowed CPU
  bool full = false, json = false, serve = false;
  std::size_t footprint = 512 * kMiB;
};

// Runs `steps` of a kernel for about the time wanted: finds the count first.
Work for_about(double seconds, const std::function<double(long)>& kernel) {
  long steps = 1000;
  for (;;) {
    const Clock::time_point start = Clock::now();
    kernel(steps);
    const double took = seconds_since(start);
    if (took > seconds / 8) {
      steps = std::max(1L, static_cast<long>(static_cast<double>(steps) * seconds / took));
      break;
    }
    steps *= 4;
  }
  return [steps, kernel](int) { return kernel(steps); };
}

std::vector<int> team_sizes(int threads) {
  return threads == 1 ? std::vector<int>{1} : std::vector<int>{1, threads};
}

Json probe_reads(const Settings& settings, const Isa& isa) {
  const Buffer buffer(std::max(settings.footprint, 512 * kMiB) + kMiB);
  std::vector<std::size_t> footprints = {32 * kKiB, 512 * kKiB, 16 * kMiB, 512 * kMiB};
  if (settings.full)
    footprints = {32 * kKiB, 128 * kKiB, 512 * kKiB, 2 * kMiB,   8 * kMiB,
                  32 * kMiB, 64 * kMiB,  128 * kMiB, 256 * kMiB, 512 * kMiB};
  Json rows = Json::array();
  for (const std::size_t footprint : footprints)
    for (const int threads : team_sizes(settings.threads))
      for (const Pattern& pattern : kPatterns) {
        const bool large = footprint >= 8 * kMiB;
        if (!large && (pattern.prefetch != 0 || pattern.streams != 1)) continue;
        if (!settings.full && threads == 1 && pattern.prefetch == 0 && pattern.streams != 1)
          continue;
        const std::size_t share = footprint / threads;
        const std::size_t amount = std::max(share, (large ? 192 : 256) * kMiB);
        const Work work = read_work(isa, buffer, footprint, threads, pattern, amount);
        const double best = best_rate(threads, settings.full ? 5 : 2, work);
        rows.push_back({{"bytes", footprint},
                        {"threads", threads},
                        {"pattern", pattern.name},
                        {"gb_per_second", best / 1e9}});
      }
  return rows;
}

Json probe_arithmetic(const Settings& settings, const Isa& isa) {
  struct Kernel {
    const char* name;
    const char* unit;
    bool present;
    std::function<double(long)> run;
  };
  static char operands[kMiB];
  const auto fed = [](std::size_t size) {
    return [size](long steps) { return tiles_bf16_fed(operands, size, steps); };
  };
  const Kernel kernels[] = {
      {"fp32 fma avx2", "fp32", isa.avx2, fma_avx2},
      {"fp32 fma avx512", "fp32", isa.avx512, fma_avx512},
      {"bf16 vdpbf16ps", "bf16", isa.avx512_bf16, dot_bf16},
      {"int8 vpmaddubsw avx2", "int8", isa.avx2, dot_int8_avx2},
      {"int8 vpdpbusd avx_vnni", "int8", isa.avx_vnni, dot_int8_avx_vnni},
      {"int8 vpdpbusd avx512", "int8", isa.avx512_vnni, dot_int8_avx512},
      {"bf16 amx", "bf16", isa.amx, tiles_bf16},
      {"bf16 amx, operands in 32 KiB", "bf16 fed", isa.amx, fed(32 * kKiB)},
      {"bf16 amx, operands in 1 MiB", "bf16 fed", isa.amx, fed(kMiB)},
      {"int8 amx", "int8", isa.amx, tiles_int8},
  };
  Json rows = Json::array();
  for (const Kernel& kernel : kernels) {
    if (!kernel.present) continue;
    const Work work = for_about(settings.full ? 0.1 : 0.03, kernel.run);
    for (const int threads : team_sizes(settings.threads))
      rows.push_back({{"name", kernel.name},
                      {"type", kernel.unit},
                      {"threads", threads},
                      {"gflops", best_rate(threads, settings.full ? 7 : 3, work) / 1e9}});
  }
  return rows;
}

double barrier_nanoseconds(int threads) {
  constexpr int kRounds = 20000;
  SpinBarrier barrier(threads);
  const double rounds = best_rate(threads, 3, [&](int thread) {
    for (int round = 0; round < kRounds; ++round) barrier.wait();
    return thread == 0 ? double{kRounds} : 0.0;
  });
  return 1e9 / rounds;
}

double fork_join_nanoseconds(int threads) {
  constexpr int kRegions = 2000;
  double best = 1e9;
  for (int sample = 0; sample < 3; ++sample) {
    const Clock::time_point start = Clock::now();
    for (int region = 0; region < kRegions; ++region) {
#pragma omp parallel num_threads(threads)
      { __asm__ volatile("" ::: "memory"); }
    }
    best = std::min(best, seconds_since(start) / kRegions);
  }
  return best * 1e9;
}

std::string cpu_name() {
  unsigned words[12];
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned a = 0x80000002 + leaf, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    words[4 * leaf] = a, words[4 * leaf + 1] = b, words[4 * leaf + 2] = c, words[4 * leaf + 3] = d;
  }
  std::string name(reinterpret_cast<const char*>(words), sizeof words);
  name.resize(std::strlen(name.c_str()));
  return name;
}

Json isa_names(const Isa& isa) {
  Json names = Json::array();
  const std::pair<bool, const char*> all[] = {{isa.avx2, "avx2"},
                                              {isa.avx_vnni, "avx_vnni"},
                                              {isa.avx512, "avx512"},
                                              {isa.avx512_vnni, "avx512_vnni"},
                                              {isa.avx512_bf16, "avx512_bf16"},
                                              {isa.amx, "amx"}};
  for (const auto& [present, name] : all)
    if (present) names.push_back(name);
  return names;
}

Json probe_everything(const Settings& settings, const Isa& isa) {
  const Clock::time_point start = Clock::now();
  Json result;
  result["cpu"] = cpu_name();
  result["isa"] = isa_names(isa);
  result["threads"] = settings.threads;
  result["read"] = probe_reads(settings, isa);
  result["arithmetic"] = probe_arithmetic(settings, isa);
  result["barrier_ns"] = barrier_nanoseconds(settings.threads);
  result["fork_join_ns"] = fork_join_nanoseconds(settings.threads);
  result["seconds"] = seconds_since(start);
  return result;
}

void print(const Json& result) {
  std::printf("%s, %d threads, %.1f s\n", result["cpu"].get<std::string>().c_str(),
              result["threads"].get<int>(), result["seconds"].get<double>());
  std::printf("\nread, GB/s (best pattern)\n");
  const Json& rows = result["read"];
  for (std::size_t i = 0; i < rows.size();) {
    std::size_t best = i, end = i;
    for (; end < rows.size() && rows[end]["bytes"] == rows[i]["bytes"] &&
           rows[end]["threads"] == rows[i]["threads"];
         ++end)
      if (rows[end]["gb_per_second"] > rows[best]["gb_per_second"]) best = end;
    std::printf("  %8zu KiB  %d threads  %8.1f  (%s)\n", rows[i]["bytes"].get<std::size_t>() / kKiB,
                rows[i]["threads"].get<int>(), rows[best]["gb_per_second"].get<double>(),
                rows[best]["pattern"].get<std::string>().c_str());
    i = end;
  }
  std::printf("\narithmetic, GFLOPS or GOPS\n");
  for (const Json& row : result["arithmetic"])
    std::printf("  %-28s %d threads  %8.1f\n", row["name"].get<std::string>().c_str(),
                row["threads"].get<int>(), row["gflops"].get<double>());
  std::printf("\nbarrier %.0f ns, fork and join %.0f ns\n", result["barrier_ns"].get<double>(),
              result["fork_join_ns"].get<double>());
}

// The gate: one short answer per line of input, with the memory kept.
void serve(const Settings& settings, const Isa& isa) {
  const Buffer buffer(settings.footprint + kMiB);
  const std::size_t amount = settings.footprint / settings.threads / 4;
  Pattern pattern = kPatterns[0];  // the best one; which it is differs by CPU
  double fastest = 0;
  for (const Pattern& other : kPatterns) {
    const double found =
        best_rate(settings.threads, 2,
                  read_work(isa, buffer, settings.footprint, settings.threads, other, amount));
    if (found > fastest) fastest = found, pattern = other;
  }
  const Work reading = [&](int thread) {
    // A quarter of the thread's share, another one each time, so that no cache holds it.
    static std::atomic<unsigned> turn{0};
    const unsigned quarter = turn.fetch_add(1) / settings.threads % 4;
    const char* data =
        buffer.data() + (thread * 4 + quarter) * (settings.footprint / settings.threads / 4);
    return isa.avx512 ? read_avx512(data, amount, pattern) : read_avx2(data, amount, pattern);
  };
  const Work arithmetic = for_about(0.01, isa.avx512 ? fma_avx512 : fma_avx2);
  for (std::string line; std::getline(std::cin, line);) {
    Json answer;
    answer["read_gb_per_second"] = median_rate(settings.threads, 25, reading) / 1e9;
    answer["fma_gflops"] = median_rate(settings.threads, 11, arithmetic) / 1e9;
    std::cout << answer.dump() << std::endl;
  }
}

int usage() {
  std::fprintf(stderr,
               "roof [--short | --full] [--json] [--serve] [--threads N] [--footprint MB]\n");
  return 2;
}

}  // namespace

int main(int count, char** arguments) {
  Settings settings;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--full")
      settings.full = true;
    else if (argument == "--short")
      settings.full = false;
    else if (argument == "--json")
      settings.json = true;
    else if (argument == "--serve")
      settings.serve = true;
    else if (argument == "--threads" && i + 1 < count)
      settings.threads = std::atoi(arguments[++i]);
    else if (argument == "--footprint" && i + 1 < count)
      settings.footprint = std::strtoull(arguments[++i], nullptr, 10) * kMiB;
    else
      return usage();
  }
  const Isa isa = detect();
  if (!isa.avx2) {
    std::fprintf(stderr, "roof: this CPU has no AVX2\n");
    return 1;
  }
  if (settings.threads <= 0) settings.threads = static_cast<int>(allowed_cpus().size());
  if (settings.footprint < 64 * kMiB) return usage();
  if (settings.serve) {
    serve(settings, isa);
    return 0;
  }
  const Json result = probe_everything(settings, isa);
  if (settings.json)
    std::printf("%s\n", result.dump(2).c_str());
  else
    print(result);
  return 0;
}
