// See optimize.h. Tested by torchscript_test and tests/python/test_libtorch_example.py.
#include "frontends/torch/libtorch/optimize.h"

#include <ATen/Parallel.h>
#include <torch/custom_class.h>

#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "frontends/torch/libtorch/capture.h"
#include "frontends/torch/libtorch/graph_writer.h"
#include "graph/graph.h"
#include "jit/base/env.h"
#include "ops/engine.h"
#include "ops/threads.h"

namespace tilewright {
namespace {

using libtorch::Captured;
using Tensors = std::vector<at::Tensor>;

constexpr const char* kAttribute = "tilewright_compiled";

const Result<ops::Engine>& engine() {
  static const auto& shared = *new Result<ops::Engine>(ops::Engine::open(""));
  return shared;
}

ops::TensorView view_of(const at::Tensor& tensor) {
  return {tensor.data_ptr(), *graph::data_type(libtorch::dtype_name(tensor.scalar_type())),
          tensor.sizes().vec()};
}

at::ScalarType scalar_type(graph::DataType type) {
  for (at::ScalarType candidate :
       {at::kFloat, at::kBFloat16, at::kHalf, at::kLong, at::kInt, at::kBool}) {
    if (libtorch::dtype_name(candidate) == graph::name(type)) return candidate;
  }
  TORCH_CHECK(false, "tilewright: no tensor of type ", std::string(graph::name(type)));
}

at::Tensor tensor_of(const ops::TensorView& view) {
  return at::from_blob(view.data, view.shape, at::TensorOptions(scalar_type(view.dtype)));
}

// Shapes and types: what a program is for.
std::string signature(const Tensors& inputs) {
  std::string text;
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK(input.device().is_cpu() && input.layout() == at::kStrided,
                "tilewright: inputs must be dense tensors on the CPU");
    text += std::string(c10::toString(input.scalar_type())) + libtorch::list_text(input.sizes());
  }
  return text;
}

// One combination of shapes.
struct Compiled {
  std::string signature;
  Captured captured;  // constants and host nodes live as long as the program
  ops::Program program;

  Tensors run(const Tensors& inputs) {
    std::vector<ops::TensorView> in, out;
    Tensors alive, results;
    for (const at::Tensor& input : inputs) {
      alive.push_back(input.contiguous());
      in.push_back(view_of(alive.back()));
    }
    const auto shapes = program.output_shapes(in);
    TORCH_CHECK(shapes.ok(), "tilewright: ", shapes.error().message);
    for (std::size_t i = 0; i < shapes->size(); ++i) {
      const graph::Graph& graph = program.graph();
      results.push_back(at::empty((*shapes)[i], scalar_type(graph.type(graph.outputs[i]).dtype)));
      out.push_back(view_of(results.back()));
    }
    const ops::HostFunction host = [this](const ops::HostCall& call) { return run_host(call); };
    ops::RunArguments arguments;
    arguments.inputs = in;
    arguments.outputs = out;
    arguments.host = &host;
    arguments.phase = ops::Phase::prefill;
    arguments.threads = ops::thread_limits(at::get_num_threads()).threads();
    const Status status = program.run(arguments);
    TORCH_CHECK(status.ok(), "tilewright: ", status.error().message);
    return results;
  }

  Status run_host(const ops::HostCall& call) const {
    const auto node = captured.host.find(call.function);
    if (node == captured.host.end()) return Error{"no fallback for " + call.function};
    Tensors inputs;
    for (const ops::TensorView& input : call.inputs) inputs.push_back(tensor_of(input));
    try {
      tensor_of(call.outputs[0]).copy_(node->second.run(inputs));
    } catch (const std::exception& error) {
      return Error{call.function + ": " + error.what()};
    }
    return {};
  }
};

}  // namespace

// What the optimised module's forward calls: the frozen module and its programs.
class CompiledModule : public torch::CustomClassHolder {
 public:
  explicit CompiledModule(torch::jit::Module frozen)
      : frozen_(std::move(frozen)), graph_(frozen_.get_method("forward").graph()) {}

  Tensors run(const Tensors& inputs) {
    const c10::NoGradGuard no_gradients;
    std::lock_guard lock(mutex_);
    const std::string wanted = signature(inputs);
    for (auto entry = programs_.begin(); entry != programs_.end(); ++entry) {
      if (entry->signature != wanted) continue;
      programs_.splice(programs_.begin(), programs_, entry);
      ++report_.runs;
      return programs_.front().run(inputs);
    }
    ++report_.captures;
    return refused_.contains(wanted) ? run_frozen(inputs) : compile(wanted, inputs);
  }

  ModuleReport report() {
    std::lock_guard lock(mutex_);
    ModuleReport report = report_;
    report.programs = programs_.size();
    double own = own_flops_, all = own_flops_ + fallback_flops_;
    for (const Compiled& compiled : programs_) {
      const ops::PhaseCounters& counters = compiled.program.counters(ops::Phase::prefill);
      own += counters.own_flops;
      all += counters.own_flops + counters.fallback_flops;
      report.fallback_calls += counters.fallback_calls;
    }
    report.own_flops_share = all > 0 ? own / all : 0;
    if (!programs_.empty()) report.graph = graph::print(programs_.front().program.graph());
    return report;
  }

 private:
  // A forward of LibTorch that becomes a program for these shapes.
  Tensors compile(const std::string& wanted, const Tensors& inputs) {
    Result<Captured> captured = libtorch::capture(*graph_, inputs);
    if (!captured) return refuse(wanted, captured.error().message, inputs);
    std::map<std::string, ops::TensorView> constants;
    for (const auto& [name, tensor] : captured->constants) constants[name] = view_of(tensor);
    Result<ops::Program> program = engine()->compile(captured->text, constants, weights_);
    if (!program) return refuse(wanted, program.error().message, inputs);
    if (programs_.size() == kMostPrograms) drop_oldest();
    Tensors results = std::move(captured->results);  // the caller's, not to be kept
    programs_.push_front({wanted, std::move(captured.value()), std::move(program.value())});
    return results;
  }

  void drop_oldest() {
    const ops::PhaseCounters& counters = programs_.back().program.counters(ops::Phase::prefill);
    own_flops_ += counters.own_flops;
    fallback_flops_ += counters.fallback_flops;
    report_.fallback_calls += counters.fallback_calls;
    programs_.pop_back();
  }

  Tensors refuse(const std::string& wanted, const std::string& reason, const Tensors& inputs) {
    TORCH_CHECK(!environment().strict, "tilewright: ", reason);
    report_.reason = reason;
    if (refused_.size() == kMostPrograms) refused_.clear();
    refused_.insert(wanted);
    return run_frozen(inputs);
  }

  Tensors run_frozen(const Tensors& inputs) {
    const c10::IValue result = frozen_.forward({inputs.begin(), inputs.end()});
    if (result.isTensor()) return {result.toTensor()};
    Tensors results;
    for (const c10::IValue& part : result.toTupleRef().elements()) {
      results.push_back(part.toTensor());
    }
    return results;
  }

  std::mutex mutex_;
  torch::jit::Module frozen_;
  std::shared_ptr<torch::jit::Graph> graph_;
  std::shared_ptr<ops::WeightStore> weights_ = std::make_shared<ops::WeightStore>();
  std::list<Compiled> programs_;   // the newest first
  std::set<std::string> refused_;  // signatures that run through LibTorch
  ModuleReport report_;            // what is not counted by a program that lives
  double own_flops_ = 0, fallback_flops_ = 0;
};

namespace {

const auto registered = torch::class_<CompiledModule>("tilewright", "CompiledModule")
                            .def("run", [](const c10::intrusive_ptr<CompiledModule>& self,
                                           const Tensors& inputs) { return self->run(inputs); });

// How many tensors forward returns in a tuple; 0: one tensor. Error: something else.
Result<std::size_t> result_count(const c10::FunctionSchema& schema) {
  const c10::TypePtr& type = schema.returns().at(0).type();
  if (type->isSubtypeOf(*c10::TensorType::get())) return std::size_t{0};
  const auto tuple = type->cast<c10::TupleType>();
  const Error refusal{"forward returns " + type->str() + ", not tensors"};
  if (!tuple || tuple->elements().empty() || tuple->name()) return refusal;
  for (const c10::TypePtr& element : tuple->elements()) {
    if (!element->isSubtypeOf(*c10::TensorType::get())) return refusal;
  }
  return tuple->elements().size();
}

// The TorchScript of the new forward, with the old one's parameter names.
Result<std::string> forward_source(const c10::FunctionSchema& schema) {
  std::string parameters, inputs, results;
  for (std::size_t i = 1; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    if (!argument.type()->isSubtypeOf(*c10::TensorType::get())) {
      return Error{"forward's " + argument.name() + " is a " + argument.type()->str() +
                   ", not a tensor"};
    }
    parameters += ", " + argument.name() + ": Tensor";
    inputs += argument.name() + ", ";
  }
  const Result<std::size_t> count = result_count(schema);
  if (!count) return count.error();
  for (std::size_t i = 0; i < *count; ++i) results += "results[" + std::to_string(i) + "], ";
  return "def forward(self" + parameters + "):\n    results = self." + kAttribute + ".run([" +
         inputs + "])\n    return " + (*count == 0 ? "results[0]" : "(" + results + ")") + "\n";
}

}  // namespace

Status optimize(torch::jit::Module& model) {
  if (environment().disable.all) return Error{"TILEWRIGHT_DISABLE=1"};
  if (!engine()) return engine().error();
  if (!engine()->problem().empty()) return Error{engine()->problem()};
  if (model.hasattr(kAttribute)) return {};
  const auto forward = model.find_method("forward");
  if (!forward) return Error{"the module has no method forward"};
  if (model.hasattr("training") && model.is_training())
    return Error{"the module is in training mode; call eval() first"};
  const Result<std::string> source = forward_source(forward->function().getSchema());
  if (!source) return source.error();
  try {
    auto compiled = c10::make_intrusive<CompiledModule>(torch::jit::freeze(model));
    torch::jit::Module made("__torch__.tilewright.Module");
    const c10::IValue held(std::move(compiled));
    made.register_attribute(kAttribute, held.type(), held);
    made.register_attribute("training", c10::BoolType::get(), false);
    made.define(*source);
    model = made;
  } catch (const std::exception& error) {
    return Error{error.what()};
  }
  return {};
}

Result<ModuleReport> explain(const torch::jit::Module& model) {
  if (!model.hasattr(kAttribute)) return Error{"the module was not optimised"};
  return model.attr(kAttribute).toCustomClass<CompiledModule>()->report();
}

}  // namespace tilewright
