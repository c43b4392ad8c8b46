// Tests of jit/math: each function, run by the VIR interpreter at 8 and 16 lanes and as machine
// code where the host can, against libm in double over dense samples of the whole range and special
// values.
#include "jit/math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "jit/vir/vir.h"
#include "kernel_run.h"

namespace tilewright::jit::math {
namespace {

using vir::Element;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using VectorFunction = std::function<Reg(Builder&, Reg)>;
using Exact = std::function<double(double)>;

// y[i] = f(x[i]) over whole vectors. Slots: x, y, vectors.
vir::Function make_kernel(const VectorFunction& f, int lanes) {
  Builder b("f", lanes, 3);
  Reg x = b.arg(0), y = b.arg(1), n = b.arg(2);
  b.loop(n, [&] {
    Reg v = b.load(Element::f32, b.at(x));
    b.store(Element::f32, b.at(y), f(b, v));
    b.add_to(x, b.vector_bytes());
    b.add_to(y, b.vector_bytes());
  });
  return std::move(b).finish();
}

std::vector<float> run(const VectorFunction& f, Machine machine, std::vector<float> x) {
  const std::size_t count = x.size();
  const auto width = static_cast<std::size_t>(machine.lanes);
  x.resize((count + width - 1) / width * width, 1.0f);
  std::vector<float> y(x.size(), kNan);
  const std::int64_t args[] = {std::bit_cast<std::int64_t>(x.data()),
                               std::bit_cast<std::int64_t>(y.data()),
                               static_cast<std::int64_t>(x.size() / width)};
  run_kernel(machine.engine, make_kernel(f, machine.lanes), args);
  y.resize(count);
  return y;
}

float run_one(const VectorFunction& f, Machine machine, float x) { return run(f, machine, {x})[0]; }

std::string describe(Machine machine) {
  return std::to_string(machine.lanes) + " lanes, " + std::string(name(machine.engine));
}

// The spacing of floats at |exact|; the smallest subnormal below the normal range.
double ulp_at(double exact) {
  const double magnitude = std::abs(exact);
  if (magnitude < std::numeric_limits<float>::min()) return 0x1p-149;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  return std::ldexp(1.0, std::max(exponent - 24, -149));
}

double ulp_error(float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : kInfinity;
  if (std::abs(exact) > std::numeric_limits<float>::max()) {
    // Up to half a step above the largest float may round to it.
    if (std::isinf(got) && std::signbit(got) == std::signbit(exact)) return 0;
    return std::isinf(exact) ? kInfinity : std::abs(got - exact) / 0x1p104;
  }
  if (std::isinf(got)) return std::abs(std::copysign(0x1p128, got) - exact) / 0x1p104;
  return std::isnan(got) ? kInfinity : std::abs(got - exact) / ulp_at(exact);
}

// Every `stride`-th float of both signs: equally many in each binade, subnormals included.
std::vector<float> all_binades(std::uint32_t stride) {
  std::vector<float> x;
  for (std::uint64_t bits = 0; bits < 0x7f800000u; bits += stride) {
    x.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
    x.push_back(-x.back());
  }
  return x;
}

std::vector<float> interval(float low, float high, int count) {
  std::vector<float> x;
  for (int i = 0; i <= count; ++i) {
    x.push_back(low + (high - low) * (static_cast<float>(i) / static_cast<float>(count)));
  }
  return x;
}

struct Case {
  const char* name;
  VectorFunction function;
  Exact exact;
  double max_ulp;
  double max_absolute;  // an error below this counts as none
  float low, high;      // sampled densely, beside all binades
  float domain_low = -std::numeric_limits<float>::max();
  float domain_high = std::numeric_limits<float>::max();
};

double exact_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double exact_gelu_tanh(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * u));
}
double exact_gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

const std::vector<Case>& cases() {
  static const std::vector<Case> table = {
      {"exp", exp, [](double x) { return std::exp(x); }, 1.0, 0, -104, 89},
      {"exp_to_one", exp_to_one, [](double x) { return std::exp(x); }, 1.0, 0x1p-126, -104, 0,
       -std::numeric_limits<float>::max(), 0},
      {"exp2", exp2, [](double x) { return std::exp2(x); }, 1.0, 0, -150, 128.1f},
      {"log", log, [](double x) { return std::log(x); }, 1.0, 0, 0, 4},
      {"log1p", log1p, [](double x) { return std::log1p(x); }, 2, 0, -1, 4},
      {"expm1", expm1, [](double x) { return std::expm1(x); }, 4, 0, -20, 89},
      {"expm1, small", expm1, [](double x) { return std::expm1(x); }, 4, 0, -2, 2},
      {"sigmoid", sigmoid, exact_sigmoid, 2, 0, -104, 20},
      {"silu", silu, [](double x) { return x * exact_sigmoid(x); }, 2, 0, -108, 20},
      {"tanh", tanh, [](double x) { return std::tanh(x); }, 2, 0, -10, 10},
      {"erf", erf, [](double x) { return std::erf(x); }, 4, 0, -5, 5},
      {"gelu", gelu, exact_gelu, 7, 0, -14.5f, 6},
      {"gelu, absolute", gelu, exact_gelu, 4, 0x1p-23, -14.5f, 14.5f},
      {"gelu_tanh", gelu_tanh, exact_gelu_tanh, 4, 0x1p-22, -12, 6},
      {"sin", sin, [](double x) { return std::sin(x); }, 2, 1e-20, -1000, 1000, -1e6f, 1e6f},
      {"cos", cos, [](double x) { return std::cos(x); }, 2, 1e-20, -1000, 1000, -1e6f, 1e6f},
      {"sin, rotary angles", sin, [](double x) { return std::sin(x); }, 2, 1e-20, -1e6f, 1e6f,
       -1e6f, 1e6f},
      {"cos, rotary angles", cos, [](double x) { return std::cos(x); }, 2, 1e-20, -1e6f, 1e6f,
       -1e6f, 1e6f},
      {"rsqrt", rsqrt, [](double x) { return 1 / std::sqrt(x); }, 1.5, 0, 0, 100},
      {"pow 2", [](Builder& b, Reg x) { return pow(b, x, 2); }, [](double x) { return x * x; }, 0.5,
       0, -10, 10},
      {"pow 3", [](Builder& b, Reg x) { return pow(b, x, 3); }, [](double x) { return x * x * x; },
       1.5, 0x1p-126, -10, 10},
      {"pow 0.5", [](Builder& b, Reg x) { return pow(b, x, 0.5); },
       [](double x) { return std::sqrt(x); }, 0.5, 0, 0, 10},
      {"pow -0.5", [](Builder& b, Reg x) { return pow(b, x, -0.5); },
       [](double x) { return 1 / std::sqrt(x); }, 1.5, 0, 0, 10},
      {"pow -1", [](Builder& b, Reg x) { return pow(b, x, -1); }, [](double x) { return 1 / x; },
       0.5, 0, -10, 10},
  };
  return table;
}

class MathAccuracy : public ::testing::TestWithParam<std::size_t> {};

TEST_P(MathAccuracy, StaysWithinItsBound) {
  const Case& c = cases()[GetParam()];
  std::vector<float> x = interval(c.low, c.high, 200'000);
  for (float v : all_binades(20'011)) {
    if (v >= c.domain_low && v <= c.domain_high) x.push_back(v);
  }
  for (Machine machine : machines()) {
    const std::vector<float> y = run(c.function, machine, x);
    double worst = 0;
    std::size_t where = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = c.exact(static_cast<double>(x[i]));
      if (std::abs(static_cast<double>(y[i]) - exact) <= c.max_absolute) continue;
      const double error = ulp_error(y[i], exact);
      if (error > worst) worst = error, where = i;
    }
    RecordProperty("max_ulp_" + std::to_string(machine.lanes), std::to_string(worst));
    EXPECT_LE(worst, c.max_ulp) << c.name << " with " << describe(machine) << ": f(" << x[where]
                                << ") = " << y[where] << ", exact "
                                << c.exact(static_cast<double>(x[where]));
  }
}

INSTANTIATE_TEST_SUITE_P(Functions, MathAccuracy, ::testing::Range<std::size_t>(0, cases().size()));

struct Special {
  const char* name;
  VectorFunction function;
  float x, expected;  // compared with their signs; NaN equals NaN
};

TEST(MathSpecials, LimitsZerosAndNan) {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kTiny = 0x1p-149f;
  const std::vector<Special> specials = {
      {"exp", exp, 0, 1},
      {"exp", exp, -0.0f, 1},
      {"exp", exp, kTiny, 1},
      {"exp", exp, kInfinity, kInfinity},
      {"exp", exp, kMax, kInfinity},
      {"exp", exp, 88.73f, kInfinity},
      {"exp", exp, -kInfinity, 0},
      {"exp", exp, -kMax, 0},
      {"exp", exp, -104, 0},
      {"exp", exp, -103.9f, kTiny},
      {"exp_to_one", exp_to_one, 0, 1},
      {"exp_to_one", exp_to_one, -0.0f, 1},
      {"exp_to_one", exp_to_one, -kInfinity, 0},
      {"exp_to_one", exp_to_one, -kMax, 0},
      {"exp_to_one", exp_to_one, kNan, kNan},
      {"exp2", exp2, 10, 1024},
      {"exp2", exp2, 127, 0x1p127f},
      {"exp2", exp2, 128, kInfinity},
      {"exp2", exp2, -126, 0x1p-126f},
      {"exp2", exp2, -149, kTiny},
      {"exp2", exp2, -151, 0},
      {"exp2", exp2, kInfinity, kInfinity},
      {"exp2", exp2, -kInfinity, 0},
      {"log", log, 1, 0},
      {"log", log, 0, -kInfinity},
      {"log", log, -0.0f, -kInfinity},
      {"log", log, -1, kNan},
      {"log", log, -kInfinity, kNan},
      {"log", log, kInfinity, kInfinity},
      {"log1p", log1p, 0, 0},
      {"log1p", log1p, -0.0f, -0.0f},
      {"log1p", log1p, kTiny, kTiny},
      {"log1p", log1p, -1, -kInfinity},
      {"log1p", log1p, -2, kNan},
      {"log1p", log1p, kInfinity, kInfinity},
      {"expm1", expm1, 0, 0},
      {"expm1", expm1, -0.0f, -0.0f},
      {"expm1", expm1, kTiny, kTiny},
      {"expm1", expm1, -kInfinity, -1},
      {"expm1", expm1, 89, kInfinity},
      {"tanh", tanh, 0, 0},
      {"tanh", tanh, -0.0f, -0.0f},
      {"tanh", tanh, kTiny, kTiny},
      {"tanh", tanh, kInfinity, 1},
      {"tanh", tanh, -kMax, -1},
      {"erf", erf, 0, 0},
      {"erf", erf, -0.0f, -0.0f},
      {"erf", erf, kInfinity, 1},
      {"erf", erf, -kInfinity, -1},
      {"erf", erf, kMax, 1},
      {"sigmoid", sigmoid, 0, 0.5f},
      {"sigmoid", sigmoid, kInfinity, 1},
      {"sigmoid", sigmoid, kMax, 1},
      {"sigmoid", sigmoid, -kInfinity, 0},
      {"silu", silu, 0, 0},
      {"silu", silu, -0.0f, -0.0f},
      {"silu", silu, kInfinity, kInfinity},
      {"silu", silu, kMax, kMax},
      {"silu", silu, 0x1p-149f, 0},
      {"silu", silu, -kInfinity, -0.0f},
      {"gelu", gelu, 0, 0},
      {"gelu", gelu, -0.0f, -0.0f},
      {"gelu", gelu, kInfinity, kInfinity},
      {"gelu", gelu, kMax, kMax},
      {"gelu", gelu, -kInfinity, 0},
      {"gelu", gelu, -kMax, 0},
      {"gelu_tanh", gelu_tanh, 0, 0},
      {"gelu_tanh", gelu_tanh, -0.0f, -0.0f},
      {"gelu_tanh", gelu_tanh, kInfinity, kInfinity},
      {"gelu_tanh", gelu_tanh, kMax, kMax},
      {"gelu_tanh", gelu_tanh, -kInfinity, -0.0f},
      {"sin", sin, 0, 0},
      {"sin", sin, -0.0f, -0.0f},
      {"sin", sin, kTiny, kTiny},
      {"sin", sin, kInfinity, kNan},
      {"cos", cos, 0, 1},
      {"cos", cos, -kInfinity, kNan},
      {"rsqrt", rsqrt, 0, kInfinity},
      {"rsqrt", rsqrt, 4, 0.5f},
      {"rsqrt", rsqrt, kInfinity, 0},
      {"rsqrt", rsqrt, -1, kNan},
  };
  for (const Special& special : specials) {
    for (Machine machine : machines()) {
      const float got = run_one(special.function, machine, special.x);
      if (std::isnan(special.expected)) {
        EXPECT_TRUE(std::isnan(got)) << special.name << "(" << special.x << ") = " << got;
        continue;
      }
      EXPECT_TRUE(got == special.expected && std::signbit(got) == std::signbit(special.expected))
          << special.name << "(" << special.x << ") = " << got << ", expected " << special.expected
          << ", " << describe(machine);
    }
  }
}

TEST(MathSpecials, NanPropagatesWithAnyPayload) {
  for (const Case& c : cases()) {
    for (std::uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0x7f800001u, 0xffffffffu}) {
      for (Machine machine : machines()) {
        EXPECT_TRUE(std::isnan(run_one(c.function, machine, std::bit_cast<float>(bits))))
            << c.name << " of NaN " << bits << " with " << describe(machine);
      }
    }
  }
}

// sigmoid and silu must not go flat where e^-x overflows, nor exp lose its subnormals.
TEST(MathSpecials, UnderflowIsGradual) {
  for (Machine machine : machines()) {
    EXPECT_GT(run_one(sigmoid, machine, -100.0f), 0.0f);
    EXPECT_LT(run_one(silu, machine, -89.0f), -std::numeric_limits<float>::min());
    EXPECT_GT(run_one(exp, machine, -103.0f), 0.0f);
    EXPECT_LT(run_one(gelu, machine, -13.5f), 0.0f);
  }
}

TEST(MathSpecials, SineAndCosineStayBoundedBeyondTheirRange) {
  std::vector<float> x;
  for (float v : all_binades(9'973)) {
    if (std::abs(v) > 1e6f) x.push_back(v);
  }
  for (Machine machine : machines()) {
    for (const VectorFunction& f : {VectorFunction(sin), VectorFunction(cos)}) {
      for (float y : run(f, machine, x)) ASSERT_TRUE(y >= -1.0f && y <= 1.0f) << y;
    }
  }
}

TEST(Math, TheArgumentIsNotChanged) {
  for (const Case& c : cases()) {
    const VectorFunction argument_afterwards = [&](Builder& b, Reg x) {
      c.function(b, x);
      return x;
    };
    for (Machine machine : machines()) {
      EXPECT_EQ(run_one(argument_afterwards, machine, -0.75f), -0.75f) << c.name;
    }
  }
}

TEST(Math, EmissionIsDeterministic) {
  for (const Case& c : cases()) {
    EXPECT_EQ(vir::print(make_kernel(c.function, 8)), vir::print(make_kernel(c.function, 8)));
  }
}

TEST(Math, PowKnowsItsExponents) {
  for (double exponent : {2.0, 3.0, 0.5, -0.5, -1.0}) EXPECT_TRUE(pow_supported(exponent));
  for (double exponent : {0.0, 1.0, 4.0, 1.5, -2.0, double{kNan}}) {
    EXPECT_FALSE(pow_supported(exponent));
  }
}

}  // namespace
}  // namespace tilewright::jit::math
