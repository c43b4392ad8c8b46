// Exact storage: see exact.h. Tested by exact_test.
#include "ops/gemm/exact.h"

#include <algorithm>
#include <atomic>
#include <bit>

#include "ops/scalar_type.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

constexpr std::uint32_t kSign = 0x8000'0000u;
constexpr std::uint32_t kMantissa = 0x007f'ffffu;
constexpr int kBias = 127;       // of fp32's exponent
constexpr int kLeastHalf = -14;  // exponent of the least normal fp16
constexpr int kMostHalf = 15;

int exponent(std::uint32_t bits) { return static_cast<int>(bits >> 23 & 0xff) - kBias; }

// Mantissa bits of fp32 that an fp16 of this exponent does not have.
int lost_bits(int exponent) { return 13 + std::max(0, kLeastHalf - exponent); }

bool fits_half(std::uint32_t bits) {
  if ((bits & ~kSign) == 0 || (bits & ~kSign) == 0x7f80'0000u) return true;
  const int e = exponent(bits);
  if (e > kMostHalf || e < kLeastHalf - 10) return false;
  const std::uint32_t lost = (1u << lost_bits(e)) - 1;
  return (bits & kMantissa & lost) == 0;
}

std::uint16_t to_half(std::uint32_t bits) {
  const auto sign = static_cast<std::uint16_t>((bits & kSign) >> 16);
  if ((bits & ~kSign) == 0) return sign;
  if ((bits & ~kSign) == 0x7f80'0000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  const int e = exponent(bits);
  if (e >= kLeastHalf) {
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(e + 15) << 10 |
                                      (bits & kMantissa) >> 13);
  }
  return static_cast<std::uint16_t>(sign | ((bits & kMantissa) | 1u << 23) >> lost_bits(e));
}

}  // namespace

bool fits(DataType type, std::span<const std::uint32_t> bits) {
  if (type == DataType::bf16) {
    std::uint32_t low = 0;  // no early exit: the loop becomes vector code
    for (std::uint32_t value : bits) low |= value;
    return (low & 0xffffu) == 0;
  }
  return std::all_of(bits.begin(), bits.end(), fits_half);
}

DataType exact_type(std::span<const WeightBlock> blocks, std::int64_t k) {
  for (DataType type : {DataType::bf16, DataType::f16}) {
    std::atomic<bool> all = true;
    run_team(default_threads(), [&](int thread, int threads) {
      for (const WeightBlock& block : blocks) {
        const std::int64_t runs = block.transposed ? k : block.rows;
        const std::int64_t length = block.transposed ? block.rows : k;
        const WorkRange rows = share(runs, thread, threads);
        for (std::int64_t row = rows.begin; row < rows.end && all; ++row) {
          const void* data = static_cast<const char*>(block.data) + row * block.row_stride;
          const std::span bits(static_cast<const std::uint32_t*>(data),
                               static_cast<std::size_t>(length));
          if (!fits(type, bits)) all = false;
        }
      }
    });
    if (all) return type;
  }
  return DataType::f32;
}

void narrow(DataType type, std::span<const std::uint32_t> from, std::uint16_t* to) {
  if (type == DataType::bf16) {
    std::transform(from.begin(), from.end(), to,
                   [](std::uint32_t bits) { return static_cast<std::uint16_t>(bits >> 16); });
  } else {
    std::transform(from.begin(), from.end(), to, to_half);
  }
}

std::uint32_t widen(DataType type, std::uint16_t bits) {
  if (type == DataType::bf16) return std::uint32_t{bits} << 16;
  return std::bit_cast<std::uint32_t>(static_cast<float>(read_scalar(type, &bits)));
}

}  // namespace tilewright::ops
