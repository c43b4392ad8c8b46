// ReadyStep for Python: the next step of one token per sequence on caches that are ready for it.
// What is the same in each such step (shapes, types, the caches) is looked at once, so that the
// call of a model is little else than the program's run.
//
// Thread-safe: a program runs one step at a time. Tested by tests/python/test_repeated_calls.py.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "frontends/torch/bindings.h"
#include "frontends/torch/core_objects.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

// Holds neither the program nor the caches: who drops them gets their memory back.
class ReadyStep {
 public:
  // By handles. Nothing where the program is not one of tokens and positions [batch, 1] with one
  // output.
  static std::optional<ReadyStep> make(std::int64_t program, std::vector<std::int64_t> caches,
                                       std::int64_t batch) {
    const std::shared_ptr<Program> held = Program::handles.find(program);
    if (!held) return std::nullopt;
    const std::vector<graph::DataType> types = input_types(*held);
    const std::vector<graph::ValueId>& outputs = held->graph().outputs;
    if (types != std::vector(2, graph::DataType::i64) || outputs.size() != 1) return std::nullopt;
    ReadyStep step;
    for (const graph::DataType type : types) step.inputs_.push_back({nullptr, type, {batch, 1}});
    auto shapes = held->output_shapes(step.inputs_);
    if (!shapes) return std::nullopt;
    const graph::DataType type = held->graph().type(outputs[0]).dtype;
    step.outputs_.push_back({nullptr, type, std::move(shapes->front())});
    step.positions_.resize(static_cast<std::size_t>(batch));
    step.program_ = program;
    step.caches_ = std::move(caches);
    return step;
  }

  std::pair<std::string, Shape> output() const {
    return {std::string(graph::name(outputs_[0].dtype)), outputs_[0].shape};
  }

  // tokens: of [batch, 1], row-major, all at this position. output: memory for it. CoreError, and
  // the caches are as they were, where the program refuses.
  void run(Address tokens, std::int64_t position, Address output, int threads) {
    const nb::gil_scoped_release unlocked;
    const std::shared_ptr<Program> program = Program::handles.find(program_);
    if (!program) throw CoreError("this program is gone");
    const HeldCaches held = value_or_throw(hold(caches_));
    const std::lock_guard lock(program->running);
    std::ranges::fill(positions_, position);
    inputs_[0].data = pointer(tokens);
    inputs_[1].data = positions_.data();
    outputs_[0].data = pointer(output);
    ops::RunArguments arguments;
    arguments.inputs = inputs_;
    arguments.caches = held.caches;
    arguments.outputs = outputs_;
    arguments.threads = threads;
    check(run_locked(*program, arguments));
  }

 private:
  std::int64_t program_ = 0;
  std::vector<std::int64_t> caches_;
  // Guarded by the program's `running`:
  std::vector<ops::TensorView> inputs_, outputs_;
  std::vector<std::int64_t> positions_;
};

}  // namespace

void bind_ready_step(nb::module_& module) {
  nb::class_<ReadyStep>(module, "ReadyStep", "A step of one token on caches that are ready.")
      .def_static("make", &ReadyStep::make, "program"_a, "caches"_a, "batch"_a)
      .def_prop_ro("output", &ReadyStep::output)
      .def("run", &ReadyStep::run, "tokens"_a, "position"_a, "output"_a, "threads"_a);
}

}  // namespace tilewright
