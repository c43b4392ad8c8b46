// One host call as oneDNN primitives: linear, matmul, softmax, layer_norm, rms_norm.
//
// A plan is made once for a function, its attributes and the shapes of its operands, and executed
// with their addresses. rms_norm, which oneDNN 3.2 does not have, is a sum of squares and a
// layer_norm with given statistics (mean 0, variance = mean of squares).
//
// Tested by onednn_test.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/type.h"
#include "jit/base/result.h"
#include "ops/onednn_library.h"
#include "ops/tensor_view.h"

namespace tilewright::ops::onednn {

// What a plan depends on; the operands' addresses are not looked at.
struct Call {
  std::string_view function;
  std::string_view attributes;  // JSON
  graph::DataType dtype = graph::DataType::f32;
  std::vector<std::vector<std::int64_t>> inputs;  // shapes
};

class Plan {
 public:
  // Error: why oneDNN cannot do it.
  static Result<std::unique_ptr<Plan>> make(const Library& library, const Call& call);

  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  Status execute(std::span<const TensorView> inputs, const TensorView& output);

 private:
  friend class Planner;
  explicit Plan(const Library& library) : library_(library) {}

  // Where a primitive's argument lives: one of the inputs, the output, or memory of the plan.
  struct Place {
    enum class Kind : std::uint8_t { input, output, scratch };
    Kind kind = Kind::input;
    std::size_t index = 0;
  };
  struct Bound {
    int argument;
    Place place;
    Library::Owned memory;
  };
  struct Stage {
    Library::Owned primitive;
    std::vector<Bound> arguments;
  };
  // An input that oneDNN wants as f32 and perhaps plus one: converted before the stages.
  struct Conversion {
    std::size_t input = 0, scratch = 0;
    double added = 0;
  };

  void* address(Place place, std::span<const TensorView> inputs, const TensorView& output);

  const Library& library_;
  std::vector<Conversion> conversions_;
  std::vector<std::vector<float>> scratch_;
  std::vector<Stage> stages_;
};

}  // namespace tilewright::ops::onednn
