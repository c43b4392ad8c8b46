// The oneDNN library, opened at run time: the functions and constants of its C interface that the
// fallback calls.
//
// They are declared here because the interface of oneDNN 3.x is stable (soname libdnnl.so.3) and a
// wheel must not depend on whose headers happened to be there when it was built. onednn_test
// compares the constants with the real headers where it finds them.
//
// Tested by onednn_test.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "jit/base/result.h"

namespace tilewright::ops::onednn {

// Every object of the interface is an opaque pointer.
using Object = void*;
using Dims = std::array<std::int64_t, 12>;

struct ExecutionArgument {
  int argument;
  Object memory;
};

struct Version {
  int major, minor, patch;
};

enum DataType : int { kF16 = 1, kBf16 = 2, kF32 = 3 };
enum Algorithm : int {
  kRelu = 0x20,
  kEltwiseLinear = 0x26,
  kGeluTanh = 0x2b,
  kSwish = 0x2c,
  kGeluErf = 0x31,
  kBinaryAdd = 0x1fff0,
  kReductionPowerSum = 0x2fffa,
  kSoftmaxAccurate = 0x30000,
};
enum NormalizationFlags : unsigned { kUseGlobalStats = 1, kUseScale = 2, kUseShift = 4 };
enum Argument : int {
  kSource = 1,
  kDestination = 17,
  kWeights = 33,
  kBias = 41,
  kMean = 49,
  kVariance = 50,
  kScale = 51,
  kShift = 52,
};
constexpr int kForwardInference = 96;
constexpr int kCpu = 1;
constexpr unsigned kDefaultStream = 1;
// The second operand of the post-op of that index.
constexpr int post_op_source(int index) { return 32768 * (index + 1) | 2; }

// name, parameters: dnnl_<name> returns a status, 0 for success.
#define ONEDNN_FUNCTIONS(X)                                                                        \
  X(engine_create, (Object*, int, std::size_t))                                                    \
  X(stream_create, (Object*, Object, unsigned))                                                    \
  X(stream_wait, (Object))                                                                         \
  X(memory_desc_create_with_strides,                                                               \
    (Object*, int, const std::int64_t*, int, const std::int64_t*))                                 \
  X(memory_desc_destroy, (Object))                                                                 \
  X(memory_create, (Object*, Object, Object, void*))                                               \
  X(memory_destroy, (Object))                                                                      \
  X(memory_set_data_handle, (Object, void*))                                                       \
  X(post_ops_create, (Object*))                                                                    \
  X(post_ops_destroy, (Object))                                                                    \
  X(post_ops_append_eltwise, (Object, int, float, float))                                          \
  X(post_ops_append_binary, (Object, int, Object))                                                 \
  X(primitive_attr_create, (Object*))                                                              \
  X(primitive_attr_destroy, (Object))                                                              \
  X(primitive_attr_set_post_ops, (Object, Object))                                                 \
  X(matmul_primitive_desc_create, (Object*, Object, Object, Object, Object, Object, Object))       \
  X(softmax_forward_primitive_desc_create,                                                         \
    (Object*, Object, int, int, Object, Object, int, Object))                                      \
  X(layer_normalization_forward_primitive_desc_create,                                             \
    (Object*, Object, int, Object, Object, Object, float, unsigned, Object))                       \
  X(reduction_primitive_desc_create, (Object*, Object, int, Object, Object, float, float, Object)) \
  X(primitive_desc_destroy, (Object))                                                              \
  X(primitive_create, (Object*, Object))                                                           \
  X(primitive_destroy, (Object))                                                                   \
  X(primitive_execute, (Object, Object, int, const ExecutionArgument*))

struct Library {
#define ONEDNN_MEMBER(name, parameters) int(*name) parameters = nullptr;
  ONEDNN_FUNCTIONS(ONEDNN_MEMBER)
#undef ONEDNN_MEMBER
  const Version* (*version)() = nullptr;
  Object engine = nullptr;  // the CPU
  Object stream = nullptr;

  // Objects that destroy themselves.
  using Owned = std::unique_ptr<void, int (*)(Object)>;
  // The error names what was asked for.
  Result<Owned> make_description(std::span<const std::int64_t> dims,
                                 std::span<const std::int64_t> strides, DataType type) const;
};

// Opens `path` if it is not empty, else what the loader finds as libdnnl.so.3. It stays open.
Result<Library> open_library(std::string_view path);

}  // namespace tilewright::ops::onednn
