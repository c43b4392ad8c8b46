// Tests of the VIR interpreter: each op against an independent statement of its meaning. Where the
// host's own instruction exists (SSE, F16C) it is the judge; elsewhere double arithmetic or values
// worked out by hand.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "jit/vir/builder.h"
#include "jit/vir/float_bits.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {
namespace {

using Lanes = std::vector<std::uint32_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::uint32_t bits(float value) { return std::bit_cast<std::uint32_t>(value); }
float value_of(std::uint32_t pattern) { return std::bit_cast<float>(pattern); }

std::int64_t slot(const void* pointer) { return std::bit_cast<std::int64_t>(pointer); }

void run(Builder&& b, std::initializer_list<std::int64_t> args) {
  const Function function = std::move(b).finish();
  const Status status = verify(function);
  ASSERT_TRUE(status.ok()) << status.error().message << "\n" << print(function);
  interpret(function, args.begin());
}

// The result of `body` over up to three vectors of `lanes` patterns.
using Body = std::function<Reg(Builder&, Reg, Reg, Reg)>;
Lanes compute(int lanes, const Body& body, Lanes a, Lanes b = {}, Lanes c = {}) {
  const auto width = static_cast<std::size_t>(lanes);
  a.resize(width), b.resize(width), c.resize(width);
  Lanes result(width, 0xdeadbeef);
  Builder builder("f", lanes, 4);
  Reg x = builder.load(Element::i32, builder.at(builder.arg(0)));
  Reg y = builder.load(Element::i32, builder.at(builder.arg(1)));
  Reg z = builder.load(Element::i32, builder.at(builder.arg(2)));
  Reg out = builder.arg(3);
  builder.store(Element::i32, builder.at(out), body(builder, x, y, z));
  run(std::move(builder), {slot(a.data()), slot(b.data()), slot(c.data()), slot(result.data())});
  return result;
}

std::vector<std::uint32_t> interesting_patterns() {
  std::vector<std::uint32_t> patterns;
  for (float v : {0.0f, 1.0f, 1.5f, 2.5f, 3.5f, 0.5f, 0x1p-149f, 0x1p-126f, 0x1.fffffep-127f,
                  8388607.5f, 16777216.0f, 2147483520.0f, 2147483648.0f, 3e9f, 1e38f,
                  std::numeric_limits<float>::max(), kInfinity, kNan}) {
    patterns.push_back(bits(v));
    patterns.push_back(bits(v) | 0x80000000u);
  }
  std::mt19937 random(7);
  for (int i = 0; i < 200; ++i) patterns.push_back(static_cast<std::uint32_t>(random()));
  return patterns;
}

void expect_float(std::uint32_t got, float expected, const std::string& what) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(value_of(got))) << what;
  } else {
    EXPECT_EQ(got, bits(expected)) << what << ": got " << value_of(got) << ", not " << expected;
  }
}

// Applies `body` to all pairs of interesting patterns and compares with `expected`.
void check_pairs(const std::string& name, const Body& body,
                 const std::function<float(float, float)>& expected) {
  const std::vector<std::uint32_t> patterns = interesting_patterns();
  for (int lanes : {8, 16}) {
    Lanes a, b;
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      for (std::size_t j = 0; j < patterns.size(); j += 1 + i % 7) {
        a.push_back(patterns[i]);
        b.push_back(patterns[j]);
        if (a.size() < static_cast<std::size_t>(lanes)) continue;
        const Lanes got = compute(lanes, body, a, b);
        for (std::size_t k = 0; k < a.size(); ++k) {
          const float x = value_of(a[k]), y = value_of(b[k]);
          expect_float(got[k], expected(x, y), fmt::format("{}({}, {})", name, x, y));
        }
        a.clear(), b.clear();
      }
    }
  }
}

// --- 16-bit floats

__attribute__((target("f16c,avx"))) float hardware_widen(std::uint16_t pattern) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(pattern)));
}
__attribute__((target("f16c,avx"))) std::uint16_t hardware_narrow(float value) {
  return static_cast<std::uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), 0), 0));
}

TEST(FloatBits, F16AgreesWithTheHardware) {
  if (!__builtin_cpu_supports("avx2")) GTEST_SKIP() << "no F16C";
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const auto pattern = static_cast<std::uint16_t>(h);
    ASSERT_EQ(bits(f16_to_float(pattern)), bits(hardware_widen(pattern))) << h;
  }
  // Around every f16 and every midpoint of two, one float step to either side; and a coarse sweep.
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const std::uint32_t base = bits(f16_to_float(static_cast<std::uint16_t>(h)));
    for (std::uint32_t offset : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x1fffu}) {
      const float v = value_of(base + offset);
      ASSERT_EQ(float_to_f16(v), hardware_narrow(v)) << std::hex << base + offset;
    }
  }
  for (std::uint64_t p = 0; p < std::uint64_t{1} << 32; p += 4099) {
    const float v = value_of(static_cast<std::uint32_t>(p));
    ASSERT_EQ(float_to_f16(v), hardware_narrow(v)) << std::hex << p;
  }
}

TEST(FloatBits, F16KnownValues) {
  EXPECT_EQ(f16_to_float(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_float(0x83ff), -0x1.ff8p-15f);
  EXPECT_EQ(f16_to_float(0x7bff), 65504.0f);
  EXPECT_EQ(float_to_f16(65519.99f), 0x7bff);
  EXPECT_EQ(float_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_f16(0x1p-25f), 0x0000);  // a tie: to even
  EXPECT_EQ(float_to_f16(0x1.000002p-25f), 0x0001);
  EXPECT_EQ(float_to_f16(0x3p-25f), 0x0002);
  EXPECT_EQ(float_to_f16(-0x1.ffcp-15f), 0x8400);  // rounds up into the normal range
  EXPECT_EQ(float_to_f16(-0.0f), 0x8000);
}

TEST(Builder, RoundsToBf16) {
  const Body body = [](Builder& b, Reg x, Reg, Reg) { return b.round_to_bf16_bits(x); };
  for (std::uint64_t p = 0; p < std::uint64_t{1} << 32; p += 8 * 65519) {
    Lanes a;
    for (std::uint64_t k = 0; k < 8; ++k) a.push_back(static_cast<std::uint32_t>(p + k * 0x7fff));
    const Lanes got = compute(8, body, a);
    for (std::size_t k = 0; k < a.size(); ++k) {
      const float v = value_of(a[k]);
      const float rounded = bf16_to_float(static_cast<std::uint16_t>(got[k]));
      ASSERT_EQ(got[k] >> 16, 0u);
      if (std::isnan(v)) {
        ASSERT_TRUE(std::isnan(rounded)) << std::hex << a[k];
        continue;
      }
      // The nearer of the two neighbours by distance in double; the even one on a tie. The
      // neighbour above the largest finite value is counted as 2^128.
      const std::uint32_t low = a[k] & 0xffff0000u, high = low + 0x10000u;
      const auto wide = [](std::uint32_t q) {
        const bool infinite = (q & 0x7fffffffu) == 0x7f800000u;
        return infinite ? std::copysign(0x1p128, value_of(q)) : double{value_of(q)};
      };
      if (std::isinf(v)) {
        ASSERT_EQ(got[k] << 16, a[k]);
        continue;
      }
      const double below = std::abs(double{v} - wide(low)), above = std::abs(wide(high) - v);
      const bool up = above < below || (above == below && (low >> 16 & 1) != 0);
      ASSERT_EQ(got[k] << 16, up ? high : low) << std::hex << a[k];
    }
  }
}

// --- vector float ops

TEST(Interpret, FloatArithmetic) {
  check_pairs(
      "vadd", [](Builder& b, Reg x, Reg y, Reg) { return b.vadd(x, y); },
      [](float x, float y) { return static_cast<float>(double{x} + double{y}); });
  check_pairs(
      "vsub", [](Builder& b, Reg x, Reg y, Reg) { return b.vsub(x, y); },
      [](float x, float y) { return static_cast<float>(double{x} - double{y}); });
  check_pairs(
      "vmul", [](Builder& b, Reg x, Reg y, Reg) { return b.vmul(x, y); },
      [](float x, float y) { return static_cast<float>(double{x} * double{y}); });
  check_pairs(
      "vdiv", [](Builder& b, Reg x, Reg y, Reg) { return b.vdiv(x, y); },
      [](float x, float y) { return static_cast<float>(double{x} / double{y}); });
  check_pairs(
      "vsqrt", [](Builder& b, Reg x, Reg, Reg) { return b.vsqrt(x); },
      [](float x, float) { return static_cast<float>(std::sqrt(double{x})); });
}

TEST(Interpret, MaxMinRoundAndConversionAgreeWithTheHardware) {
  check_pairs(
      "vmax", [](Builder& b, Reg x, Reg y, Reg) { return b.vmax(x, y); },
      [](float x, float y) { return _mm_cvtss_f32(_mm_max_ss(_mm_set_ss(x), _mm_set_ss(y))); });
  check_pairs(
      "vmin", [](Builder& b, Reg x, Reg y, Reg) { return b.vmin(x, y); },
      [](float x, float y) { return _mm_cvtss_f32(_mm_min_ss(_mm_set_ss(x), _mm_set_ss(y))); });
  check_pairs(
      "vround", [](Builder& b, Reg x, Reg, Reg) { return b.vround(x); },
      [](float x, float) {
        return _mm_cvtss_f32(_mm_round_ps(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT));
      });
  check_pairs(
      "vcvt_i32", [](Builder& b, Reg x, Reg, Reg) { return b.to_f32(b.to_i32(x)); },
      [](float x, float) {
        return _mm_cvtss_f32(_mm_cvtepi32_ps(_mm_cvtps_epi32(_mm_set_ss(x))));
      });
}

TEST(Interpret, MaxReturnsTheSecondOperandOnNanAndZeros) {
  const Body max = [](Builder& b, Reg x, Reg y, Reg) { return b.vmax(x, y); };
  const Body min = [](Builder& b, Reg x, Reg y, Reg) { return b.vmin(x, y); };
  for (const Body& body : {max, min}) {
    const Lanes got = compute(8, body, {bits(kNan), bits(1), bits(0.0f), bits(-0.0f)},
                              {bits(1), bits(kNan), bits(-0.0f), bits(0.0f)});
    EXPECT_EQ(got[0], bits(1));
    EXPECT_EQ(got[1], bits(kNan));
    EXPECT_EQ(got[2], bits(-0.0f));
    EXPECT_EQ(got[3], bits(0.0f));
  }
}

TEST(Interpret, FusedOpsRoundOnce) {
  // (1 + 2^-12)^2 - 1 - 2^-11 = 2^-24 exactly; with a rounded product it would be 0.
  const float a = 1 + 0x1p-12f, w = -1 - 0x1p-11f;
  const auto fused = [](void (Builder::*op)(Reg, Reg, Reg)) {
    return Body([op](Builder& b, Reg acc, Reg x, Reg y) {
      (b.*op)(acc, x, y);
      return acc;
    });
  };
  EXPECT_EQ(compute(8, fused(&Builder::fma), {bits(w)}, {bits(a)}, {bits(a)})[0], bits(0x1p-24f));
  EXPECT_EQ(compute(8, fused(&Builder::fnma), {bits(-w)}, {bits(a)}, {bits(a)})[0],
            bits(-0x1p-24f));
  EXPECT_EQ(compute(8, fused(&Builder::fms), {bits(-w)}, {bits(a)}, {bits(a)})[0], bits(0x1p-24f));
  const Body from_memory = [](Builder& b, Reg acc, Reg x, Reg) {
    b.fma_load(acc, x, b.at(b.arg(2)));
    return acc;
  };
  EXPECT_EQ(compute(16, from_memory, {bits(w)}, {bits(a)}, {bits(a)})[0], bits(0x1p-24f));
}

TEST(Interpret, ScalefFollowsTheManual) {
  const Body body = [](Builder& b, Reg x, Reg y, Reg) { return b.scalef(x, y); };
  struct Row {
    float a, b, expected;
  };
  const std::vector<Row> rows = {
      {1.5f, 3, 12},
      {1.5f, 3.99f, 12},  // the exponent is floored
      {1.5f, -0.5f, 0.75f},
      {1, 128, kInfinity},
      {-1, 1e30f, -kInfinity},
      {-1, -1e30f, -0.0f},
      {1, -149, 0x1p-149f},
      {1, -150, 0},                      // a tie: to even
      {1.5f, -150, 0x1p-149f},           // rounded once
      {0x1.000002p0f, -127, 0x1p-127f},  // a tie: to even
      {0x1p-149f, 276, 0x1p127f},
      {0, 1e30f, 0},
      {kInfinity, -5, kInfinity},
      {kNan, 1, kNan},
      {1, kNan, kNan},
      {2, kInfinity, kInfinity},
      {-2, -kInfinity, -0.0f},
      {0, kInfinity, kNan},
      {kInfinity, -kInfinity, kNan},
  };
  for (const Row& row : rows) {
    expect_float(compute(16, body, {bits(row.a)}, {bits(row.b)})[0], row.expected,
                 fmt::format("scalef({}, {})", row.a, row.b));
  }
}

std::uint32_t pair(float high, float low) { return (bits(high) & 0xffff0000u) | bits(low) >> 16; }

TEST(Interpret, DotBytesMultipliesUnsignedBySigned) {
  const Body body = [](Builder& b, Reg acc, Reg x, Reg y) {
    b.dot_bytes(acc, x, y);
    return acc;
  };
  const auto dot = [&](std::uint32_t acc, std::uint32_t x, std::uint32_t y) {
    return compute(16, body, {acc}, {x}, {y})[0];
  };
  EXPECT_EQ(dot(5, 0x04030201, 0x40302010), 5u + 0x10 + 2 * 0x20 + 3 * 0x30 + 4 * 0x40);
  EXPECT_EQ(dot(0, 0xff, 0xff), static_cast<std::uint32_t>(-255));
  EXPECT_EQ(dot(0, 0xffffffff, 0x80808080), static_cast<std::uint32_t>(-4 * 255 * 128));
  EXPECT_EQ(dot(0x7fffffff, 0x01, 0x01), 0x80000000u);  // wraps
}

TEST(Interpret, DotBf16TakesTheOddElementFirstAndFlushesDenormals) {
  const Body body = [](Builder& b, Reg acc, Reg x, Reg y) {
    b.dot_bf16(acc, x, y);
    return acc;
  };
  const auto dot = [&](float acc, std::uint32_t x, std::uint32_t y) {
    return value_of(compute(16, body, {bits(acc)}, {x}, {y})[0]);
  };
  EXPECT_EQ(dot(1, pair(2, 3), pair(5, 7)), 32.0f);
  // High first: 2^24 - 2^24 = 0, then + 2^-10. Low first would lose the 2^-10.
  EXPECT_EQ(dot(0x1p24f, pair(-0x1p12f, 0x1p-5f), pair(0x1p12f, 0x1p-5f)), 0x1p-10f);
  // Two fused steps: the products are not added to each other before the accumulator.
  EXPECT_EQ(dot(0x1p24f, pair(1, 1), pair(1, 1)), 0x1p24f);
  // Denormal inputs, products and accumulators count as zero (measured on the hardware).
  EXPECT_EQ(dot(0, pair(0x1p-130f, 0), pair(0x1p126f, 0)), 0.0f);
  EXPECT_EQ(dot(0, pair(0x1p-70f, 0), pair(0x1p-70f, 0)), 0.0f);
  EXPECT_EQ(dot(0x1p-140f, 0, 0), 0.0f);
  EXPECT_EQ(dot(0x1p-127f, pair(0x1p-63f, 0), pair(0x1p-63f, 0)), 0x1p-126f);
  EXPECT_EQ(bits(dot(-0x1p-140f, pair(-0.0f, -0.0f), pair(1, 1))), bits(-0.0f));
  EXPECT_TRUE(std::isnan(dot(0, pair(kInfinity, 0), pair(0, 0))));
}

// --- integers, bits, masks

TEST(Interpret, IntegerAndBitOps) {
  struct Row {
    const char* name;
    Body body;
    std::function<std::uint32_t(std::uint32_t, std::uint32_t)> expected;
  };
  using U = std::uint32_t;
  const auto sign_fill = [](U x, int n) {
    return x >> n | ((x & 0x80000000u) != 0 && n > 0 ? ~U{0} << (32 - n) : 0);
  };
  const std::vector<Row> rows = {
      {"vand", [](Builder& b, Reg x, Reg y, Reg) { return b.vand(x, y); },
       [](U x, U y) { return x & y; }},
      {"vor", [](Builder& b, Reg x, Reg y, Reg) { return b.vor(x, y); },
       [](U x, U y) { return x | y; }},
      {"vxor", [](Builder& b, Reg x, Reg y, Reg) { return b.vxor(x, y); },
       [](U x, U y) { return x ^ y; }},
      {"vandn", [](Builder& b, Reg x, Reg y, Reg) { return b.vandn(x, y); },
       [](U x, U y) { return ~x & y; }},
      {"viadd", [](Builder& b, Reg x, Reg y, Reg) { return b.iadd(x, y); },
       [](U x, U y) { return static_cast<U>(std::uint64_t{x} + y); }},
      {"visub", [](Builder& b, Reg x, Reg y, Reg) { return b.isub(x, y); },
       [](U x, U y) { return x + ~y + 1; }},
      {"vimul", [](Builder& b, Reg x, Reg y, Reg) { return b.imul(x, y); },
       [](U x, U y) { return static_cast<U>(std::uint64_t{x} * y); }},
      {"vshli", [](Builder& b, Reg x, Reg, Reg) { return b.vshift_left(x, 23); },
       [](U x, U) { return static_cast<U>(std::uint64_t{x} * 0x800000); }},
      {"vshri", [](Builder& b, Reg x, Reg, Reg) { return b.vshift_right(x, 31); },
       [](U x, U) { return x / 0x80000000u; }},
      {"vsari", [](Builder& b, Reg x, Reg, Reg) { return b.vshift_right_signed(x, 5); },
       [&](U x, U) { return sign_fill(x, 5); }},
      {"vsari 0", [](Builder& b, Reg x, Reg, Reg) { return b.vshift_right_signed(x, 0); },
       [](U x, U) { return x; }},
  };
  const Lanes patterns = interesting_patterns();
  for (const Row& row : rows) {
    for (int lanes : {8, 16}) {
      for (std::size_t at = 0; at + 32 < patterns.size(); at += 5) {
        const auto first = patterns.begin() + static_cast<std::ptrdiff_t>(at);
        const Lanes a(first, first + lanes), b(first + 16, first + 16 + lanes);
        const Lanes got = compute(lanes, row.body, a, b);
        for (std::size_t k = 0; k < a.size(); ++k) {
          ASSERT_EQ(got[k], row.expected(a[k], b[k])) << row.name << " lane " << k;
        }
      }
    }
  }
}

TEST(Interpret, ComparesAndSelect) {
  using Compare = Reg (Builder::*)(Reg, Reg);
  const auto selected = [](Compare compare) {
    return Body([compare](Builder& b, Reg x, Reg y, Reg) {
      Reg mask = (b.*compare)(x, y);
      Reg yes = b.splat_bits(1);
      return b.select(mask, yes, b.zero());
    });
  };
  const Lanes x = {bits(1), bits(2), bits(1), bits(kNan), bits(kNan), bits(0.0f), bits(-1), 3};
  const Lanes y = {bits(2), bits(1), bits(1), bits(1), bits(kNan), bits(-0.0f), bits(-2), 3};
  EXPECT_EQ(compute(8, selected(&Builder::less), x, y), (Lanes{1, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(compute(8, selected(&Builder::less_equal), x, y), (Lanes{1, 0, 1, 0, 0, 1, 0, 1}));
  EXPECT_EQ(compute(8, selected(&Builder::equal), x, y), (Lanes{0, 0, 1, 0, 0, 1, 0, 1}));
  EXPECT_EQ(compute(8, selected(&Builder::not_equal), x, y), (Lanes{1, 1, 0, 1, 1, 0, 1, 0}));
  EXPECT_EQ(compute(8, selected(&Builder::iequal), x, y), (Lanes{0, 0, 1, 0, 1, 0, 0, 1}));
  // As i32: -1.0f is 0xbf800000 and -2.0f is 0xc0000000, both negative, the latter larger.
  EXPECT_EQ(compute(8, selected(&Builder::igreater), x, y), (Lanes{0, 1, 0, 1, 0, 1, 0, 0}));

  const auto combined = [](Compare combine) {
    return Body([combine](Builder& b, Reg x, Reg y, Reg) {
      Reg zero = b.zero();
      Reg left = b.iequal(x, zero);
      Reg right = b.iequal(y, zero);
      Reg mask = (b.*combine)(left, right);
      return b.select(mask, b.splat_bits(1), zero);
    });
  };
  EXPECT_EQ(compute(8, combined(&Builder::mask_and), {0, 0, 1, 1}, {0, 1, 0, 1})[0], 1u);
  EXPECT_EQ(compute(8, combined(&Builder::mask_or), {0, 0, 1, 1}, {0, 1, 0, 1}),
            (Lanes{1, 1, 1, 0, 1, 1, 1, 1}));
  EXPECT_EQ(compute(8, combined(&Builder::mask_andn), {0, 0, 1, 1}, {0, 1, 0, 1}),
            (Lanes{0, 0, 1, 0, 0, 0, 0, 0}));
}

// Each run of 16 bytes by itself; SSE's instruction is the judge.
TEST(Interpret, ByteOps) {
  const Lanes patterns = interesting_patterns();
  for (int lanes : {8, 16}) {
    const auto width = static_cast<std::size_t>(lanes);
    const Lanes a(patterns.end() - 40, patterns.end() - 40 + lanes);
    const Lanes b(patterns.end() - 20, patterns.end() - 20 + lanes);
    const auto check = [&](const Body& body, auto&& instruction) {
      const Lanes got = compute(lanes, body, a, b);
      for (std::size_t k = 0; k < width; k += 4) {
        Lanes expected(4);
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&a[k]));
        const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&b[k]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(expected.data()), instruction(x, y));
        EXPECT_EQ(Lanes(&got[k], &got[k] + 4), expected) << lanes << " lanes, from " << k;
      }
    };
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.lookup_bytes(x, y); }, [
    ](__m128i x, __m128i y) __attribute__((target("ssse3"))) { return _mm_shuffle_epi8(x, y); });
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.interleave_low(x, y); },
          [](__m128i x, __m128i y) { return _mm_unpacklo_epi8(x, y); });
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.interleave_high(x, y); },
          [](__m128i x, __m128i y) { return _mm_unpackhi_epi8(x, y); });
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.interleave_halves_low(x, y); },
          [](__m128i x, __m128i y) { return _mm_unpacklo_epi16(x, y); });
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.interleave_halves_high(x, y); },
          [](__m128i x, __m128i y) { return _mm_unpackhi_epi16(x, y); });
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.even_lanes(x, y); },
          [](__m128i x, __m128i y) {
            return _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(x), _mm_castsi128_ps(y), 0x88));
          });
    check([](Builder& builder, Reg x, Reg y, Reg) { return builder.odd_lanes(x, y); },
          [](__m128i x, __m128i y) {
            return _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(x), _mm_castsi128_ps(y), 0xDD));
          });
    check(
        [](Builder& builder, Reg, Reg, Reg) {
          return builder.broadcast_16_bytes(builder.at(builder.arg(0), 16));
        },
        [&](__m128i, __m128i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(&a[4])); });
  }
}

TEST(Interpret, UnzipsRuns) {
  for (int lanes : {8, 16}) {
    Lanes a(static_cast<std::size_t>(lanes)), b(a.size());
    std::iota(a.begin(), a.end(), 0);
    std::iota(b.begin(), b.end(), 100);
    const auto even = [](Builder& builder, Reg x, Reg y, Reg) { return builder.even_runs(x, y); };
    const auto odd = [](Builder& builder, Reg x, Reg y, Reg) { return builder.odd_runs(x, y); };
    const Lanes evens = compute(lanes, even, a, b), odds = compute(lanes, odd, a, b);
    if (lanes == 8) {
      EXPECT_EQ(evens, (Lanes{0, 1, 2, 3, 100, 101, 102, 103}));
      EXPECT_EQ(odds, (Lanes{4, 5, 6, 7, 104, 105, 106, 107}));
    } else {
      EXPECT_EQ(evens, (Lanes{0, 1, 2, 3, 8, 9, 10, 11, 100, 101, 102, 103, 108, 109, 110, 111}));
      EXPECT_EQ(odds, (Lanes{4, 5, 6, 7, 12, 13, 14, 15, 104, 105, 106, 107, 112, 113, 114, 115}));
    }
  }
}

TEST(Interpret, SplatsIotaAndSwap) {
  for (int lanes : {8, 16}) {
    const Lanes iota = compute(lanes, [](Builder& b, Reg, Reg, Reg) { return b.iota(); }, {});
    for (std::size_t k = 0; k < iota.size(); ++k) EXPECT_EQ(iota[k], k);
    for (int distance = 1; distance < lanes; distance *= 2) {
      const Body body = [&](Builder& b, Reg, Reg, Reg) {
        Reg v = b.iota();
        return b.swap(v, distance);
      };
      const Lanes swapped = compute(lanes, body, {});
      for (std::size_t k = 0; k < swapped.size(); ++k) {
        EXPECT_EQ(swapped[k], k ^ static_cast<std::size_t>(distance));
      }
    }
    const Lanes splat = compute(
        lanes, [](Builder& b, Reg, Reg, Reg) { return b.splat(b.constant(0x123456789ab)); }, {});
    EXPECT_EQ(splat, Lanes(splat.size(), 0x456789abu));
  }
  // (float) of 64-bit integers, rounded once to nearest even.
  const std::vector<std::pair<std::int64_t, float>> conversions = {
      {0, 0.0f},
      {-7, -7.0f},
      {16777217, 16777216.0f},
      {16777219, 16777220.0f},
      {std::numeric_limits<std::int64_t>::max(), 0x1p63f},
      {(std::int64_t{1} << 53) + (std::int64_t{1} << 29) + 1, 0x1.000002p53f},
  };
  for (const auto& [integer, expected] : conversions) {
    const Body body = [value = integer](Builder& b, Reg, Reg, Reg) {
      return b.splat_converted(b.constant(value));
    };
    EXPECT_EQ(compute(8, body, {})[7], bits(expected)) << integer;
  }
}

TEST(Interpret, LowF16Widens) {
  const Body body = [](Builder& b, Reg x, Reg, Reg) { return b.low_f16_to_f32(x); };
  const Lanes got = compute(8, body, {0x3c00, 0xffff3c00, 0x1234c000, 0x00017c00});
  EXPECT_EQ(got[0], bits(1));
  EXPECT_EQ(got[1], bits(1));
  EXPECT_EQ(got[2], bits(-2));
  EXPECT_EQ(got[3], bits(kInfinity));
}

TEST(Builder, ReductionsFillEveryLane) {
  for (int lanes : {8, 16}) {
    Lanes a;
    float largest = -kInfinity;
    int sum = 0;
    for (int k = 0; k < lanes; ++k) {
      const int v = (k * 37) % 23 - 11;
      a.push_back(bits(static_cast<float>(v)));
      sum += v;
      largest = std::max(largest, static_cast<float>(v));
    }
    EXPECT_EQ(compute(
                  lanes, [](Builder& b, Reg x, Reg, Reg) { return b.reduce_add(x); }, a),
              Lanes(a.size(), bits(static_cast<float>(sum))));
    EXPECT_EQ(compute(
                  lanes, [](Builder& b, Reg x, Reg, Reg) { return b.reduce_max(x); }, a),
              Lanes(a.size(), bits(largest)));
  }
}

// --- memory

// A page followed by one that may not be touched.
class GuardedPage {
 public:
  GuardedPage() : size_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* p = mmap(nullptr, 2 * size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(p, MAP_FAILED);
    base_ = static_cast<std::byte*>(p);
    EXPECT_EQ(mprotect(base_ + size_, size_, PROT_NONE), 0);
  }
  ~GuardedPage() { munmap(base_, 2 * size_); }
  GuardedPage(const GuardedPage&) = delete;
  GuardedPage& operator=(const GuardedPage&) = delete;

  // The last `count` bytes before the guard.
  std::byte* last(std::size_t count) { return base_ + size_ - count; }

 private:
  std::size_t size_;
  std::byte* base_;
};

TEST(Interpret, MaskedAccessTouchesActiveLanesOnly) {
  GuardedPage source, destination;
  for (int lanes : {8, 16}) {
    for (std::size_t count = 0; count <= static_cast<std::size_t>(lanes); ++count) {
      std::vector<float> input(count), output(count);
      for (std::size_t k = 0; k < count; ++k) input[k] = static_cast<float>(k) + 1;
      std::byte* from = source.last(4 * count);
      std::byte* to = destination.last(4 * count);
      std::memcpy(from, input.data(), 4 * count);
      Builder b("f", lanes, 4);
      Reg n = b.arg(2);
      Reg mask = b.tail_mask(n);
      Reg v = b.load_masked(Element::f32, b.at(b.arg(0)), mask);
      Reg to_address = b.arg(1);
      b.store_masked(Element::f32, b.at(to_address), v, mask);
      b.store(Element::f32, b.at(b.arg(3)), v);
      std::vector<float> all(static_cast<std::size_t>(lanes), kNan);
      run(std::move(b), {slot(from), slot(to), static_cast<std::int64_t>(count), slot(all.data())});
      std::memcpy(output.data(), to, 4 * count);
      EXPECT_EQ(input, output);
      for (std::size_t k = count; k < all.size(); ++k) EXPECT_EQ(bits(all[k]), 0u);
    }
  }
}

TEST(Interpret, MaskedStoreKeepsOtherLanes) {
  std::array<std::uint16_t, 16> memory;
  memory.fill(7);
  Builder b("f", 16, 1);
  Reg mask = b.igreater(b.splat_bits(3), b.iota());
  b.store_masked(Element::u16, b.at(b.arg(0)), b.splat_bits(0x10009), mask);
  run(std::move(b), {slot(memory.data())});
  for (std::size_t k = 0; k < 16; ++k) EXPECT_EQ(memory[k], k < 3 ? 9 : 7);
}

TEST(Interpret, TailMaskTakesAnyCount) {
  for (std::int64_t count : {std::numeric_limits<std::int64_t>::min(), std::int64_t{-1},
                             std::int64_t{0}, std::int64_t{5}, std::int64_t{16},
                             std::int64_t{1} << 40, std::numeric_limits<std::int64_t>::max()}) {
    const Body body = [&](Builder& b, Reg, Reg, Reg) {
      Reg mask = b.tail_mask(b.constant(count));
      Reg one = b.splat_bits(1);
      return b.select(mask, one, b.zero());
    };
    const Lanes got = compute(16, body, {});
    for (std::size_t k = 0; k < 16; ++k) {
      EXPECT_EQ(got[k], static_cast<std::int64_t>(k) < count ? 1u : 0u) << count;
    }
  }
}

TEST(Interpret, VectorElementTypes) {
  for (int lanes : {8, 16}) {
    const auto width = static_cast<std::size_t>(lanes);
    std::vector<std::uint16_t> halves(width, 0x4248);  // f16 3.140625, bf16 50
    std::vector<std::uint8_t> octets(width, 0xfe);
    std::vector<std::uint32_t> out(7 * width, 0);
    Builder b("f", lanes, 3);
    Reg h = b.arg(0), o = b.arg(1), to = b.arg(2);
    const int step = b.vector_bytes();
    b.store(Element::f32, b.at(to), b.load(Element::f16, b.at(h)));
    b.store(Element::f32, b.at(to, step), b.load(Element::bf16, b.at(h)));
    b.store(Element::i32, b.at(to, 2 * step), b.load(Element::u8, b.at(o)));
    b.store(Element::f32, b.at(to, 3 * step), b.load_one(Element::bf16, b.at(h)));
    b.store(Element::f32, b.at(to, 4 * step), b.broadcast(Element::f16, b.at(h, 2)));
    b.store(Element::f32, b.at(to, 6 * step), b.load(Element::i8, b.at(o)));
    Reg v = b.splat(3.1416f);
    b.store(Element::f16, b.at(to, 5 * step), v);
    b.store(Element::u8, b.at(to, 5 * step + 2 * lanes), b.splat_bits(0x1234));
    b.store_one(Element::u16, b.at(to, 5 * step + 3 * lanes), b.splat_bits(0x56789));
    run(std::move(b), {slot(halves.data()), slot(octets.data()), slot(out.data())});
    for (std::size_t k = 0; k < width; ++k) {
      EXPECT_EQ(out[k], bits(3.140625f));
      EXPECT_EQ(out[width + k], bits(50.0f));
      EXPECT_EQ(out[2 * width + k], 0xfeu);
      EXPECT_EQ(out[3 * width + k], k == 0 ? bits(50.0f) : 0u);
      EXPECT_EQ(out[4 * width + k], bits(3.140625f));
      EXPECT_EQ(out[6 * width + k], bits(-2.0f));
    }
    const auto* narrow = reinterpret_cast<const std::uint8_t*>(&out[5 * width]);
    for (std::size_t k = 0; k < width; ++k) {
      EXPECT_EQ(narrow[2 * k] | narrow[2 * k + 1] << 8, 0x4248);
      EXPECT_EQ(narrow[2 * width + k], 0x34);
      const int expected = k == 0 ? 0x89 : k == 1 ? 0x67 : 0;
      EXPECT_EQ(narrow[3 * width + k], expected);
    }
  }
}

// --- general registers and structure

std::vector<std::int64_t> compute_general(const std::function<std::vector<Reg>(Builder&)>& body,
                                          std::initializer_list<std::int64_t> inputs = {}) {
  Builder b("f", 8, static_cast<int>(inputs.size()) + 1);
  const std::vector<Reg> results = body(b);
  Reg out = b.arg(static_cast<int>(inputs.size()));
  for (std::size_t i = 0; i < results.size(); ++i) {
    b.store_gpr(Element::i64, b.at(out, static_cast<std::int64_t>(8 * i)), results[i]);
  }
  std::vector<std::int64_t> values(results.size());
  std::vector<std::int64_t> args(inputs);
  args.push_back(slot(values.data()));
  const Function function = std::move(b).finish();
  EXPECT_TRUE(verify(function).ok()) << verify(function).error().message;
  interpret(function, args.data());
  return values;
}

TEST(Interpret, GeneralArithmetic) {
  constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  const auto values = compute_general(
      [](Builder& b) {
        Reg x = b.arg(0), y = b.arg(1), top = b.constant(kMax);
        std::vector<Reg> r = {b.add(x, y), b.sub(x, y), b.mul(x, y), b.add(x, -5), b.mul(x, -3)};
        r.insert(r.end(), {b.shift_left(y, 62), b.shift_right(x, 1), b.bit_and(x, 0xff)});
        r.insert(r.end(), {b.min(x, y), b.max(x, y), b.add(top, 1), b.lea(b.at(y, x, 4, -8))});
        return r;
      },
      {-7, 3});
  EXPECT_EQ(values, (std::vector<std::int64_t>{-4, -10, -21, -12, 21, -(std::int64_t{1} << 62), -4,
                                               0xf9, -7, 3, kMin, 3 - 28 - 8}));
}

TEST(Interpret, GeneralMemoryExtendsAndTruncates) {
  std::array<std::uint8_t, 16> memory;
  memory.fill(0xfe);
  const auto values = compute_general(
      [](Builder& b) {
        Reg p = b.arg(0);
        Reg large = b.constant(0x1122334455667788);
        std::vector<Reg> r = {b.load_gpr(Element::i64, b.at(p)), b.load_gpr(Element::i32, b.at(p)),
                              b.load_gpr(Element::u16, b.at(p)), b.load_gpr(Element::u8, b.at(p))};
        b.store_gpr(Element::u8, b.at(p), large);
        b.store_gpr(Element::u16, b.at(p, 2), large);
        b.store_gpr(Element::i32, b.at(p, 4), large);
        b.store_gpr(Element::i64, b.at(p, 8), large);
        return r;
      },
      {slot(memory.data())});
  EXPECT_EQ(values, (std::vector<std::int64_t>{-0x101010101010102, -0x1010102, 0xfefe, 0xfe}));
  EXPECT_EQ(memory, (std::array<std::uint8_t, 16>{0x88, 0xfe, 0x88, 0x77, 0x88, 0x77, 0x66, 0x55,
                                                  0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11}));
}

TEST(Interpret, LoopsCountAndLeaveTheirCounter) {
  for (std::int64_t n : {std::int64_t{-3}, std::int64_t{0}, std::int64_t{1}, std::int64_t{5}}) {
    const auto values = compute_general(
        [](Builder& b) {
          Reg outer = b.arg(0), count = b.constant(0), inner_total = b.constant(0);
          b.loop(outer, [&] {
            b.add_to(count, 1);
            Reg inner = b.copy(outer);
            b.loop(inner, [&] { b.add_to(inner_total, 1); });
          });
          return std::vector<Reg>{outer, count, inner_total};
        },
        {n});
    const std::int64_t times = std::max<std::int64_t>(n, 0);
    EXPECT_EQ(values, (std::vector<std::int64_t>{std::min<std::int64_t>(n, 0), times,
                                                 times * (times + 1) / 2}));
  }
}

TEST(Interpret, IfTakesOneArm) {
  for (std::int64_t condition : {std::int64_t{0}, std::int64_t{1}, std::int64_t{1} << 40}) {
    const auto values = compute_general(
        [](Builder& b) {
          Reg c = b.arg(0), with_else = b.constant(0), alone = b.constant(0), after = b.constant(0);
          b.if_nonzero(
              c, [&] { b.add_to(with_else, 1); }, [&] { b.add_to(with_else, 100); });
          b.if_nonzero(c, [&] {
            b.if_nonzero(
                alone, [&] { b.add_to(alone, 50); }, [&] { b.add_to(alone, 2); });
          });
          b.add_to(after, 1);
          return std::vector<Reg>{with_else, alone, after};
        },
        {condition});
    const bool taken = condition != 0;
    EXPECT_EQ(values, (std::vector<std::int64_t>{taken ? 1 : 100, taken ? 2 : 0, 1}));
  }
}

}  // namespace
}  // namespace tilewright::jit::vir
