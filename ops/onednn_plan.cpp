// One host call as oneDNN primitives.
//
// Tested by onednn_test.
#include "ops/onednn_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "ops/scalar_type.h"

namespace tilewright::ops::onednn {
namespace {

using Shape = std::vector<std::int64_t>;

std::int64_t product(std::span<const std::int64_t> sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{1}, std::multiplies<>());
}

Shape row_major(const Shape& dims) {
  Shape strides(dims.size(), 1);
  for (std::size_t i = dims.size(); i-- > 1;) strides[i - 1] = strides[i] * dims[i];
  return strides;
}

std::optional<DataType> type_of(graph::DataType type) {
  if (type == graph::DataType::f32) return kF32;
  if (type == graph::DataType::bf16) return kBf16;
  if (type == graph::DataType::f16) return kF16;
  return std::nullopt;
}

std::optional<Algorithm> activation_of(const std::string& name) {
  if (name == "silu") return kSwish;
  if (name == "gelu") return kGeluErf;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "relu") return kRelu;
  return std::nullopt;
}

}  // namespace

// Builds a plan; the first failure is kept and makes the rest do nothing.
class Planner {
 public:
  Planner(const Library& library, const Call& call)
      : library_(library),
        call_(call),
        attributes_(nlohmann::json::parse(call.attributes, nullptr, /*allow_exceptions=*/false)),
        plan_(new Plan(library)) {
    if (!attributes_.is_object()) attributes_ = nlohmann::json::object();
  }

  Result<std::unique_ptr<Plan>> plan() {
    if (const auto type = type_of(call_.dtype)) {
      type_ = *type;
    } else {
      fail(fmt::format("oneDNN has no {} of {}", call_.function, name(call_.dtype)));
    }
    if (call_.inputs.empty() || call_.inputs[0].empty()) fail("oneDNN: no dimensions");
    if (!error_) add_stages();
    if (error_) return Error{*error_};
    return std::move(plan_);
  }

 private:
  using Place = Plan::Place;
  static constexpr Place kOutput{Place::Kind::output, 0};
  static Place input(std::size_t index) { return {Place::Kind::input, index}; }

  // One operand of a primitive.
  struct Operand {
    int argument;
    Place place;
    Shape dims;
    Shape strides;
    DataType type;
  };

  void fail(std::string message) {
    if (!error_) error_ = std::move(message);
  }

  void add_stages() {
    if (call_.function == "linear") return linear();
    if (call_.function == "matmul") return matmul();
    if (call_.function == "softmax") return softmax();
    if (call_.function == "layer_norm") return layer_norm();
    if (call_.function == "rms_norm") return rms_norm();
    fail(fmt::format("oneDNN has no {}", call_.function));
  }

  const Shape& shape(std::size_t input) const { return call_.inputs[input]; }
  // The first input as rows of its last axis.
  Shape rows() const {
    const std::int64_t columns = shape(0).back();
    return {columns == 0 ? 0 : product(shape(0)) / columns, columns};
  }

  bool flag(const char* key) const { return attributes_.value(key, false); }

  Library::Owned describe(const Operand& operand) {
    auto made = library_.make_description(operand.dims, operand.strides, operand.type);
    if (made) return std::move(made).value();
    fail(made.error().message);
    return {nullptr, library_.memory_desc_destroy};
  }

  Operand dense(int argument, Place place, Shape dims, DataType type) const {
    Shape strides = row_major(dims);
    return {argument, place, std::move(dims), std::move(strides), type};
  }
  Operand dense(int argument, Place place, Shape dims) const {
    return dense(argument, place, std::move(dims), type_);
  }

  Place scratch(std::int64_t elements, float value = 0) {
    plan_->scratch_.emplace_back(static_cast<std::size_t>(elements), value);
    return {Place::Kind::scratch, plan_->scratch_.size() - 1};
  }

  // Makes the primitive of a created description, with its operands' memory objects.
  void add_stage(int status, Object created, const std::vector<Operand>& operands) {
    if (status != 0) {
      return fail(fmt::format("oneDNN has no {} of {} here (status {})", call_.function,
                              name(call_.dtype), status));
    }
    const Library::Owned description(created, library_.primitive_desc_destroy);
    Object primitive = nullptr;
    if (const int made = library_.primitive_create(&primitive, created); made != 0) {
      return fail(fmt::format("oneDNN: primitive, status {}", made));
    }
    Plan::Stage stage{Library::Owned(primitive, library_.primitive_destroy), {}};
    for (const Operand& operand : operands) {
      const Library::Owned memory_description = describe(operand);
      Object memory = nullptr;
      if (error_) return;
      if (library_.memory_create(&memory, memory_description.get(), library_.engine, nullptr) !=
          0) {
        return fail("oneDNN: memory object");
      }
      stage.arguments.push_back(
          {operand.argument, operand.place, Library::Owned(memory, library_.memory_destroy)});
    }
    plan_->stages_.push_back(std::move(stage));
  }

  // x [M, K] times w [N, K] transposed, + bias, activation, + residual: all but x and w optional.
  void linear() {
    if (flag("transposed")) fail("oneDNN: linear with a transposed weight");
    const Shape x = rows();
    const std::int64_t m = x[0], k = x[1], n = shape(1)[0];
    std::vector<Operand> operands{
        dense(kSource, input(0), {m, k}),
        {kWeights, input(1), {k, n}, {1, k}, type_},
        dense(kDestination, kOutput, {m, n}),
    };
    std::size_t next = 2;
    if (flag("bias")) operands.push_back(dense(kBias, input(next++), {1, n}));
    const std::string activation = attributes_.value("activation", std::string());
    const auto algorithm = activation_of(activation);
    if (!activation.empty() && !algorithm) fail("oneDNN has no activation " + activation);
    Object post_ops = nullptr;
    library_.post_ops_create(&post_ops);
    const Library::Owned owned_post_ops(post_ops, library_.post_ops_destroy);
    // alpha is swish's factor and the slope of relu's negative side.
    const float alpha = algorithm == kSwish ? 1 : 0;
    if (algorithm) library_.post_ops_append_eltwise(post_ops, *algorithm, alpha, 0);
    if (flag("residual")) {
      operands.push_back(dense(post_op_source(algorithm ? 1 : 0), input(next++), {m, n}));
      library_.post_ops_append_binary(post_ops, kBinaryAdd, describe(operands.back()).get());
    }
    if (next != call_.inputs.size()) fail("oneDNN: linear with operands that it does not know");
    if (!error_) add_matmul(operands, post_ops);
  }

  // Source, weights, destination and perhaps a bias stand first in operands.
  void add_matmul(const std::vector<Operand>& operands, Object post_ops) {
    Object attributes = nullptr;
    library_.primitive_attr_create(&attributes);
    const Library::Owned owned_attributes(attributes, library_.primitive_attr_destroy);
    if (post_ops != nullptr) library_.primitive_attr_set_post_ops(attributes, post_ops);
    const Library::Owned source = describe(operands[0]), weights = describe(operands[1]),
                         destination = describe(operands[2]);
    Library::Owned bias(nullptr, library_.memory_desc_destroy);
    if (operands.size() > 3 && operands[3].argument == kBias) bias = describe(operands[3]);
    if (error_) return;
    Object created = nullptr;
    const int status = library_.matmul_primitive_desc_create(
        &created, library_.engine, source.get(), weights.get(), bias.get(), destination.get(),
        attributes);
    add_stage(status, created, operands);
  }

  void matmul() {
    if (call_.inputs.size() != 2) return fail("oneDNN: matmul of other than two operands");
    Shape a = shape(0), b = shape(1);
    if (b.empty()) return fail("oneDNN: no dimensions");
    if (a.size() == 1) a.insert(a.begin(), 1);
    if (b.size() == 1) b.push_back(1);
    const std::size_t rank = std::max(a.size(), b.size());
    a.insert(a.begin(), rank - a.size(), 1);
    b.insert(b.begin(), rank - b.size(), 1);
    Shape y(rank);
    for (std::size_t i = 0; i + 2 < rank; ++i) y[i] = a[i] == 1 ? b[i] : a[i];
    y[rank - 2] = a[rank - 2];
    y[rank - 1] = b[rank - 1];
    add_matmul({dense(kSource, input(0), a), dense(kWeights, input(1), b),
                dense(kDestination, kOutput, y)},
               nullptr);
  }

  void softmax() {
    const std::vector<Operand> operands{dense(kSource, input(0), rows()),
                                        dense(kDestination, kOutput, rows())};
    const Library::Owned source = describe(operands[0]), destination = describe(operands[1]);
    if (error_) return;
    Object created = nullptr;
    const int status = library_.softmax_forward_primitive_desc_create(
        &created, library_.engine, kForwardInference, kSoftmaxAccurate, source.get(),
        destination.get(), 1, nullptr);
    add_stage(status, created, operands);
  }

  // An input of `columns` elements as oneDNN wants scales and shifts: f32.
  Operand as_f32(int argument, std::size_t index, double added) {
    const std::int64_t columns = shape(0).back();
    if (type_ == kF32 && added == 0) return dense(argument, input(index), {columns}, kF32);
    const Place place = scratch(columns);
    plan_->conversions_.push_back({index, place.index, added});
    return dense(argument, place, {columns}, kF32);
  }

  void add_normalization(std::vector<Operand> operands, unsigned flags) {
    const Library::Owned source = describe(operands[0]);
    const bool given = (flags & kUseGlobalStats) != 0;
    const Library::Owned statistics =
        describe(given ? operands[2] : dense(kMean, kOutput, {rows()[0]}, kF32));
    if (error_) return;
    const auto eps = static_cast<float>(attributes_.value("eps", 0.0));
    Object created = nullptr;
    const int status = library_.layer_normalization_forward_primitive_desc_create(
        &created, library_.engine, kForwardInference, source.get(), source.get(), statistics.get(),
        eps, flags, nullptr);
    add_stage(status, created, operands);
  }

  void layer_norm() {
    std::vector<Operand> operands{dense(kSource, input(0), rows()),
                                  dense(kDestination, kOutput, rows())};
    unsigned flags = 0;
    if (call_.inputs.size() > 1) {
      operands.push_back(as_f32(kScale, 1, 0));
      flags |= kUseScale;
    }
    if (call_.inputs.size() > 2) {
      operands.push_back(as_f32(kShift, 2, 0));
      flags |= kUseShift;
    }
    add_normalization(std::move(operands), flags);
  }

  void rms_norm() {
    const std::int64_t count = rows()[0];
    const Place mean = scratch(count), variance = scratch(count);
    mean_of_squares(variance);
    std::vector<Operand> operands{
        dense(kSource, input(0), rows()), dense(kDestination, kOutput, rows()),
        dense(kMean, mean, {count}, kF32), dense(kVariance, variance, {count}, kF32)};
    unsigned flags = kUseGlobalStats;
    if (call_.inputs.size() > 1) {
      operands.push_back(as_f32(kScale, 1, flag("plus_one") ? 1 : 0));
      flags |= kUseScale;
    }
    if (!error_) add_normalization(std::move(operands), flags);
  }

  void mean_of_squares(Place result) {
    const Shape x = rows();
    const std::vector<Operand> operands{dense(kSource, input(0), x),
                                        dense(kDestination, result, {x[0], 1}, kF32)};
    Object post_ops = nullptr, attributes = nullptr, created = nullptr;
    library_.post_ops_create(&post_ops);
    const Library::Owned owned_post_ops(post_ops, library_.post_ops_destroy);
    library_.post_ops_append_eltwise(post_ops, kEltwiseLinear, 1 / static_cast<float>(x[1]), 0);
    library_.primitive_attr_create(&attributes);
    const Library::Owned owned_attributes(attributes, library_.primitive_attr_destroy);
    library_.primitive_attr_set_post_ops(attributes, post_ops);
    const Library::Owned source = describe(operands[0]), destination = describe(operands[1]);
    if (error_) return;
    const int status =
        library_.reduction_primitive_desc_create(&created, library_.engine, kReductionPowerSum,
                                                 source.get(), destination.get(), 2, 0, attributes);
    add_stage(status, created, operands);
  }

  const Library& library_;
  const Call& call_;
  nlohmann::json attributes_;
  std::unique_ptr<Plan> plan_;
  DataType type_ = kF32;
  std::optional<std::string> error_;
};

Result<std::unique_ptr<Plan>> Plan::make(const Library& library, const Call& call) {
  return Planner(library, call).plan();
}

void* Plan::address(Place place, std::span<const TensorView> inputs, const TensorView& output) {
  switch (place.kind) {
    case Place::Kind::input:
      return inputs[place.index].data;
    case Place::Kind::output:
      return output.data;
    case Place::Kind::scratch:
      return scratch_[place.index].data();
  }
  return nullptr;
}

Status Plan::execute(std::span<const TensorView> inputs, const TensorView& output) {
  for (const Conversion& conversion : conversions_) {
    const TensorView& from = inputs[conversion.input];
    std::vector<float>& to = scratch_[conversion.scratch];
    const auto* data = static_cast<const std::byte*>(from.data);
    const auto size = static_cast<std::size_t>(size_in_bytes(from.dtype));
    for (std::size_t i = 0; i < to.size(); ++i) {
      to[i] = static_cast<float>(read_scalar(from.dtype, data + i * size) + conversion.added);
    }
  }
  for (const Stage& stage : stages_) {
    std::vector<ExecutionArgument> arguments;
    for (const Bound& bound : stage.arguments) {
      library_.memory_set_data_handle(bound.memory.get(), address(bound.place, inputs, output));
      arguments.push_back({bound.argument, bound.memory.get()});
    }
    const int status =
        library_.primitive_execute(stage.primitive.get(), library_.stream,
                                   static_cast<int>(arguments.size()), arguments.data());
    if (status != 0) return Error{fmt::format("oneDNN: execution, status {}", status)};
  }
  if (library_.stream_wait(library_.stream) != 0) return Error{"oneDNN: the stream failed"};
  return {};
}

}  // namespace tilewright::ops::onednn
