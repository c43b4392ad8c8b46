// The oneDNN fallback against scalar code in double. Needs the library (the PyPI package
// onednn-cpu-gomp); where CMake found none, the tests that run it are skipped and say so.
#include "ops/onednn_fallback.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>
#include <vector>

#include "ops/onednn_library.h"
#include "ops/scalar_type.h"

#ifdef TILEWRIGHT_ONEDNN_HEADERS
#include <oneapi/dnnl/dnnl.h>

namespace tilewright::ops::onednn {

constexpr bool same(int ours, int theirs) { return ours == theirs; }

static_assert(same(kF16, dnnl_f16) && same(kBf16, dnnl_bf16) && same(kF32, dnnl_f32));
static_assert(same(kRelu, dnnl_eltwise_relu) && same(kEltwiseLinear, dnnl_eltwise_linear));
static_assert(same(kGeluTanh, dnnl_eltwise_gelu_tanh) && same(kGeluErf, dnnl_eltwise_gelu_erf));
static_assert(same(kSwish, dnnl_eltwise_swish) && same(kBinaryAdd, dnnl_binary_add));
static_assert(same(kReductionPowerSum, dnnl_reduction_norm_lp_power_p_sum));
static_assert(same(kSoftmaxAccurate, dnnl_softmax_accurate));
static_assert(same(kUseGlobalStats, dnnl_use_global_stats) && same(kUseScale, dnnl_use_scale));
static_assert(same(kUseShift, dnnl_use_shift) && same(kForwardInference, dnnl_forward_inference));
static_assert(same(kSource, DNNL_ARG_SRC) && same(kDestination, DNNL_ARG_DST));
static_assert(same(kWeights, DNNL_ARG_WEIGHTS) && same(kBias, DNNL_ARG_BIAS));
static_assert(same(kMean, DNNL_ARG_MEAN) && same(kVariance, DNNL_ARG_VARIANCE));
static_assert(same(kScale, DNNL_ARG_SCALE) && same(kShift, DNNL_ARG_SHIFT));
static_assert(same(post_op_source(1), DNNL_ARG_ATTR_MULTIPLE_POST_OP(1) | DNNL_ARG_SRC_1));
static_assert(same(kCpu, dnnl_cpu) && same(kDefaultStream, dnnl_stream_default_flags));
static_assert(sizeof(ExecutionArgument) == sizeof(dnnl_exec_arg_t));
static_assert(std::tuple_size_v<Dims> == DNNL_MAX_NDIMS);

}  // namespace tilewright::ops::onednn
#endif

namespace tilewright::ops {
namespace {

using graph::DataType;
using Shape = std::vector<std::int64_t>;

constexpr const char* kLibrary = TILEWRIGHT_ONEDNN_LIBRARY;  // "": not found

class Tensor {
 public:
  Tensor(DataType dtype, Shape shape) : dtype_(dtype), shape_(std::move(shape)) {
    bytes_.resize(static_cast<std::size_t>(count() * size_in_bytes(dtype)));
  }
  static Tensor random(DataType dtype, Shape shape, std::mt19937& random) {
    Tensor tensor(dtype, std::move(shape));
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      write_scalar(dtype, tensor.bytes_.data() + tensor.offset(i), normal(random));
    }
    return tensor;
  }

  std::int64_t count() const { return element_count({nullptr, dtype_, shape_}); }
  double operator[](std::int64_t i) const { return read_scalar(dtype_, bytes_.data() + offset(i)); }
  TensorView view() const { return {bytes_.data(), dtype_, shape_}; }

 private:
  std::size_t offset(std::int64_t i) const {
    return static_cast<std::size_t>(i * size_in_bytes(dtype_));
  }

  DataType dtype_;
  Shape shape_;
  mutable std::vector<std::byte> bytes_;  // a view may be written through
};

// Runs the call; the output has that shape.
Tensor run(std::string_view function, std::string attributes, const std::vector<Tensor>& inputs,
           Shape shape) {
  std::vector<TensorView> views;
  for (const Tensor& input : inputs) views.push_back(input.view());
  const Tensor output(views[0].dtype, std::move(shape));
  const std::vector<TensorView> outputs{output.view()};
  const Status status = run_onednn({std::string(function), std::move(attributes), views, outputs});
  EXPECT_TRUE(status.ok()) << status.error().message;
  return output;
}

double rounding(DataType type) { return type == DataType::f32 ? 1e-6 : 0x1p-7; }

class OneDnn : public testing::TestWithParam<DataType> {
 protected:
  void SetUp() override {
    if (*kLibrary == '\0') GTEST_SKIP() << "CMake found no libdnnl";
    const Status status = load_onednn(kLibrary);
    ASSERT_TRUE(status.ok()) << status.error().message;
    if (!onednn_supports("linear", "{}", GetParam())) {
      GTEST_SKIP() << "oneDNN has no " << name(GetParam()) << " on this CPU";
    }
  }
  Tensor random(Shape shape) { return Tensor::random(GetParam(), std::move(shape), random_); }
  double tolerance(double magnitude) const { return rounding(GetParam()) * (magnitude + 1); }

  std::mt19937 random_{1};
};

double activated(const std::string& activation, double x) {
  if (activation == "silu") return x / (1 + std::exp(-x));
  if (activation == "relu") return std::max(x, 0.0);
  if (activation == "gelu") return x * 0.5 * std::erfc(-x / std::numbers::sqrt2);
  if (activation == "gelu_tanh") {
    const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
    return 0.5 * x * (1 + std::tanh(inner));
  }
  return x;
}

TEST_P(OneDnn, LinearWithEveryEpilogue) {
  constexpr std::int64_t kM = 6, kK = 33, kN = 17;
  for (const std::string activation : {"", "silu", "relu", "gelu", "gelu_tanh"}) {
    for (int extras = 0; extras < 4; ++extras) {
      const bool bias = (extras & 1) != 0, residual = (extras & 2) != 0;
      std::vector<Tensor> inputs;
      inputs.push_back(random({2, 3, kK}));
      inputs.push_back(random({kN, kK}));
      if (bias) inputs.push_back(random({kN}));
      if (residual) inputs.push_back(random({2, 3, kN}));
      std::string attributes = "{";
      attributes += bias ? "\"bias\":true," : "";
      attributes += residual ? "\"residual\":true," : "";
      attributes += "\"activation\":\"" + activation + "\"}";
      ASSERT_TRUE(onednn_supports("linear", attributes, GetParam())) << attributes;
      const Tensor y = run("linear", attributes, inputs, {2, 3, kN});
      for (std::int64_t i = 0; i < kM * kN; ++i) {
        double sum = bias ? inputs[2][i % kN] : 0, magnitude = 0;
        for (std::int64_t k = 0; k < kK; ++k) {
          const double term = inputs[0][i / kN * kK + k] * inputs[1][i % kN * kK + k];
          sum += term;
          magnitude += std::abs(term);
        }
        const double expected = activated(activation, sum) + (residual ? inputs.back()[i] : 0);
        ASSERT_NEAR(y[i], expected, tolerance(magnitude)) << attributes << " element " << i;
      }
    }
  }
}

TEST_P(OneDnn, MatmulBroadcastsBatches) {
  const std::vector<Tensor> inputs{random({2, 3, 4, 5}), random({3, 5, 6})};
  const Tensor y = run("matmul", "{}", inputs, {2, 3, 4, 6});
  for (std::int64_t i = 0; i < y.count(); ++i) {
    const std::int64_t n = i % 6, m = i / 6 % 4, head = i / 24 % 3, batch = i / 72;
    double sum = 0;
    for (std::int64_t k = 0; k < 5; ++k) {
      sum += inputs[0][((batch * 3 + head) * 4 + m) * 5 + k] * inputs[1][(head * 5 + k) * 6 + n];
    }
    ASSERT_NEAR(y[i], sum, tolerance(std::abs(sum) + 4)) << i;
  }
  const std::vector<Tensor> vectors{random({7}), random({7})};
  double dot = 0;
  for (std::int64_t k = 0; k < 7; ++k) dot += vectors[0][k] * vectors[1][k];
  EXPECT_NEAR(run("matmul", "{}", vectors, {})[0], dot, tolerance(8));
}

TEST_P(OneDnn, Softmax) {
  const std::vector<Tensor> inputs{random({2, 5, 37})};
  const Tensor y = run("softmax", "{}", inputs, {2, 5, 37});
  for (std::int64_t row = 0; row < 10; ++row) {
    double total = 0;
    for (std::int64_t i = 0; i < 37; ++i) total += std::exp(inputs[0][row * 37 + i]);
    for (std::int64_t i = 0; i < 37; ++i) {
      const double expected = std::exp(inputs[0][row * 37 + i]) / total;
      ASSERT_NEAR(y[row * 37 + i], expected, rounding(GetParam()) * expected * 4);
    }
  }
}

TEST_P(OneDnn, Norms) {
  constexpr std::int64_t kRows = 6, kColumns = 37;
  const double eps = 0.25;  // large enough to be seen
  for (const std::string function : {"layer_norm", "rms_norm"}) {
    const bool layer = function == "layer_norm";
    for (std::size_t operands = 1; operands <= (layer ? 3 : 2); ++operands) {
      for (bool plus_one : {false, true}) {
        if (layer && plus_one) continue;
        std::vector<Tensor> inputs{random({2, 3, kColumns})};
        while (inputs.size() < operands) inputs.push_back(random({kColumns}));
        const std::string attributes =
            plus_one ? "{\"eps\":0.25,\"plus_one\":true}" : "{\"eps\":0.25}";
        ASSERT_TRUE(onednn_supports(function, attributes, GetParam()));
        const Tensor y = run(function, attributes, inputs, {2, 3, kColumns});
        for (std::int64_t row = 0; row < kRows; ++row) {
          double mean = 0, square = 0;
          const auto x = [&](std::int64_t i) { return inputs[0][row * kColumns + i]; };
          for (std::int64_t i = 0; layer && i < kColumns; ++i) mean += x(i) / kColumns;
          for (std::int64_t i = 0; i < kColumns; ++i) square += std::pow(x(i) - mean, 2) / kColumns;
          for (std::int64_t i = 0; i < kColumns; ++i) {
            double expected = (x(i) - mean) / std::sqrt(square + eps);
            if (operands > 1) expected *= inputs[1][i] + (plus_one ? 1 : 0);
            if (operands > 2) expected += inputs[2][i];
            ASSERT_NEAR(y[row * kColumns + i], expected, tolerance(4 * std::abs(expected)))
                << function << attributes << operands << " row " << row << " column " << i;
          }
        }
      }
    }
  }
}

TEST_P(OneDnn, SaysWhatItCannotDo) {
  EXPECT_FALSE(onednn_supports("attention", "{}", GetParam()));
  EXPECT_FALSE(onednn_supports("linear", "{\"activation\":\"sine\"}", GetParam()));
  EXPECT_FALSE(onednn_supports("linear", "{}", DataType::i64));
  const std::vector<Tensor> inputs{random({2, 3})};
  const Tensor output(GetParam(), {2, 3});
  const Status status = run_onednn({"attention", "{}", std::vector<TensorView>{inputs[0].view()},
                                    std::vector<TensorView>{output.view()}});
  EXPECT_EQ(status.error().message, "oneDNN has no attention");
}

// No rows: nothing to do, and nothing is asked of the library.
TEST_P(OneDnn, EmptyOperands) { run("linear", "{}", {random({0, 8}), random({4, 8})}, {0, 4}); }

INSTANTIATE_TEST_SUITE_P(Types, OneDnn,
                         testing::Values(DataType::f32, DataType::bf16, DataType::f16),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST(OneDnnLibrary, AMissingLibraryIsAnErrorWithItsName) {
  const auto library = onednn::open_library("/nonexistent/libdnnl.so.3");
  ASSERT_FALSE(library.ok());
  EXPECT_NE(library.error().message.find("oneDNN could not be opened: /nonexistent/libdnnl.so.3"),
            std::string::npos)
      << library.error().message;
}

TEST(OneDnnLibrary, AnotherLibraryIsRefused) {
  const auto library = onednn::open_library("libm.so.6");
  ASSERT_FALSE(library.ok());
  EXPECT_EQ(library.error().message, "libm.so.6 has no dnnl_engine_create");
}

}  // namespace
}  // namespace tilewright::ops
