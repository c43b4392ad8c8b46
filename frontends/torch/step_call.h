// StepCall: one run of a program, in C terms, between the core (binding_program.cpp) and torch's
// operators (operators.cpp). The two are separate libraries, because the core knows no torch and
// the operators are built against torch's stable ABI; the core's address of the function reaches
// the operators through Python (operators.py).
//
// Tested by tests/python/test_operators.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tilewright {

struct StepTensor {
  void* data;  // row-major
  const std::int64_t* sizes;
  std::int64_t rank;
};

struct StepCall {
  std::int64_t program;  // Program.handle
  const StepTensor* inputs;
  std::int64_t input_count;
  const std::int64_t* caches;  // KvCache.handle
  std::int64_t cache_count;
  std::int64_t threads;
  bool decode;
  // Makes output `index` and gives its memory; null ends the call. `dtype`: as in graph text, so
  // that the two libraries need not agree on numbers.
  void* (*allocate)(void* context, std::int64_t index, const char* dtype, const std::int64_t* sizes,
                    std::int64_t rank);
  void* context;
};

// False: it failed, and `error` says why. Needs no interpreter lock; host calls take it.
using StepFunction = bool (*)(const StepCall* call, char* error, std::size_t error_bytes);

}  // namespace tilewright
