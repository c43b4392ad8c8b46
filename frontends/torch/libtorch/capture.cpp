// See capture.h. Tested by torchscript_test.
#include "frontends/torch/libtorch/capture.h"

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/operator.h>

#include <utility>

#include "frontends/torch/libtorch/graph_writer.h"
#include "frontends/torch/libtorch/nodes.h"

namespace tilewright::libtorch {
namespace {

using c10::IValue;
using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Stack;
using torch::jit::Value;

class Interpreter {
 public:
  explicit Interpreter(Captured& captured) : captured_(captured) {}

  void run(const torch::jit::Graph& graph, const std::vector<at::Tensor>& inputs) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor input = at::alias(inputs[i]);  // one tensor may be given twice
      writer_.add_input(input);
      values_[graph.inputs().at(i + 1)] = input;
    }
    run_block(*graph.block());
    for (const Value* output : graph.outputs()) collect(value(output));
    captured_.text = writer_.finish(captured_.results);
    captured_.constants = writer_.constants();
  }

 private:
  const IValue& value(const Value* of) const {
    const auto found = values_.find(of);
    if (found == values_.end()) throw Refused("the module itself is used as a value");
    return found->second;
  }

  void collect(const IValue& result) {
    if (result.isTensor()) {
      captured_.results.push_back(result.toTensor());
    } else if (result.isTuple()) {
      for (const IValue& part : result.toTupleRef().elements()) collect(part);
    } else {
      throw Refused("a result is a " + result.tagKind());
    }
  }

  void run_block(const Block& block) {
    for (const Node* node : block.nodes()) run_node(*node);
  }

  void run_node(const Node& node) {
    switch (node.kind()) {
      case c10::prim::Constant:
        return constant(node);
      case c10::prim::If:
        return branch(node);
      case c10::prim::Loop:
        return loop(node);
      default:
        break;
    }
    std::vector<IValue> arguments;
    for (const Value* input : node.inputs()) arguments.push_back(value(input));
    Stack stack = arguments;
    if (!run_structure(node, stack)) run_op(node, stack, arguments);
    if (stack.size() != node.outputs().size()) throw Refused(name(node) + " has varying results");
    for (std::size_t i = 0; i < stack.size(); ++i) values_[node.outputs()[i]] = stack[i];
  }

  static std::string name(const Node& node) { return node.kind().toQualString(); }

  void constant(const Node& node) {
    const std::optional<IValue> held = torch::jit::toIValue(node.output());
    if (!held) throw Refused("a constant of type " + node.output()->type()->str());
    if (held->isTensor() && node.output()->hasDebugName()) {
      const std::string wanted = node.output()->debugName();
      writer_.name_constant(held->toTensor(),
                            wanted.starts_with("self.") ? wanted.substr(5) : wanted);
    }
    values_[node.output()] = *held;
  }

  void branch(const Node& node) {
    const Block* taken = node.blocks()[value(node.input()).toBool() ? 0 : 1];
    run_block(*taken);
    for (std::size_t i = 0; i < node.outputs().size(); ++i) {
      values_[node.outputs()[i]] = value(taken->outputs()[i]);
    }
  }

  // Inputs: most turns, whether to begin, what is carried. The block: (turn, carried...) to
  // (whether to go on, carried...).
  void loop(const Node& node) {
    const Block& body = *node.blocks()[0];
    const std::int64_t turns = value(node.inputs()[0]).toInt();
    bool go_on = value(node.inputs()[1]).toBool();
    std::vector<IValue> carried;
    for (std::size_t i = 2; i < node.inputs().size(); ++i)
      carried.push_back(value(node.inputs()[i]));
    for (std::int64_t turn = 0; go_on && turn < turns; ++turn) {
      values_[body.inputs()[0]] = turn;
      for (std::size_t i = 0; i < carried.size(); ++i) values_[body.inputs()[i + 1]] = carried[i];
      run_block(body);
      go_on = value(body.outputs()[0]).toBool();
      for (std::size_t i = 0; i < carried.size(); ++i) carried[i] = value(body.outputs()[i + 1]);
    }
    for (std::size_t i = 0; i < carried.size(); ++i) values_[node.outputs()[i]] = carried[i];
  }

  // Lists and tuples, which have no operator: replaces the stack by the results.
  static bool run_structure(const Node& node, Stack& stack) {
    switch (node.kind()) {
      case c10::prim::ListConstruct: {
        c10::impl::GenericList list(
            node.output()->type()->expectRef<c10::ListType>().getElementType());
        for (const IValue& item : stack) list.push_back(item);
        stack = {IValue(std::move(list))};
        return true;
      }
      case c10::prim::TupleConstruct:
        stack = {c10::ivalue::Tuple::create(std::move(stack))};
        return true;
      case c10::prim::ListUnpack:
        stack = Stack(stack.at(0).toListRef().vec());
        return true;
      case c10::prim::TupleUnpack:
        stack = Stack(stack.at(0).toTupleRef().elements().vec());
        return true;
      default:
        return false;
    }
  }

  void run_op(const Node& node, Stack& stack, const std::vector<IValue>& arguments) {
    const c10::FunctionSchema* schema = node.maybeSchema();
    if (schema == nullptr || node.maybeOperator() == nullptr) throw Refused("it has " + name(node));
    if (schema->is_mutable()) throw Refused(name(node) + " writes to a tensor");
    node.getOperation()(stack);
    if (!depends_on_inputs(arguments)) return refuse_random(node);
    if (is_metadata(name(node))) return;
    if (stack.size() == 1 && stack[0].isTensor()) return write_tensor(node, arguments, stack[0]);
    std::vector<at::Tensor> parts;
    for (const IValue& result : stack) {
      if (result.isTensor()) {
        parts.push_back(result.toTensor());
      } else if (result.isTensorList()) {
        for (const at::Tensor& part : result.toTensorVector()) parts.push_back(part);
      } else {
        throw Refused(name(node) + " reads values out of a tensor");
      }
    }
    if (!write_parts(writer_, name(node), arguments, parts)) {
      throw Refused(name(node) + " has several results");
    }
  }

  void write_tensor(const Node& node, const std::vector<IValue>& arguments, const IValue& result) {
    const at::Tensor tensor = result.toTensor();
    if (writer_.knows(tensor)) return;  // `to` and `contiguous` that had nothing to do
    if (!write_node(writer_, name(node), arguments, tensor)) {
      write_external(node, arguments, tensor);
    }
  }

  // Ops with a word in the IR say themselves when they are not: they may have a dropout of 0.
  static void refuse_random(const Node& node) {
    if (node.isNondeterministic()) throw Refused(name(node) + " is random");
  }

  void write_external(const Node& node, const std::vector<IValue>& arguments,
                      const at::Tensor& result) {
    refuse_random(node);
    HostNode host{&node, arguments, {}};
    std::vector<std::string> operands;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      if (!depends_on_inputs({arguments[i]})) continue;
      if (!arguments[i].isTensor()) throw Refused(name(node) + " takes a list of tensors");
      operands.push_back(writer_.operand(arguments[i].toTensor()));
      host.given.push_back(i);
      host.arguments[i] = IValue();
    }
    const std::string function =
        name(node).substr(name(node).rfind(':') + 1) + "." + std::to_string(captured_.host.size());
    writer_.bind(result, writer_.append("external", operands, "function = \"" + function + "\"",
                                        result.sizes(), result.scalar_type()));
    captured_.host.emplace(function, std::move(host));
  }

  bool depends_on_inputs(const std::vector<IValue>& arguments) const {
    for (const IValue& argument : arguments) {
      if (argument.isTensor() && writer_.knows(argument.toTensor())) return true;
      if (argument.isList()) {
        for (const IValue& item : argument.toListRef()) {
          if (depends_on_inputs({item})) return true;
        }
      }
      if (argument.isTuple() && depends_on_inputs(argument.toTupleRef().elements().vec())) {
        return true;
      }
    }
    return false;
  }

  Captured& captured_;
  GraphWriter writer_;
  std::unordered_map<const Value*, IValue> values_;
};

}  // namespace

at::Tensor HostNode::run(const std::vector<at::Tensor>& inputs) const {
  Stack stack = arguments;
  for (std::size_t i = 0; i < given.size(); ++i) stack[given[i]] = inputs[i];
  node->getOperation()(stack);
  return stack.at(0).toTensor();
}

Result<Captured> capture(const torch::jit::Graph& graph, const std::vector<at::Tensor>& inputs) {
  Captured captured;
  try {
    Interpreter(captured).run(graph, inputs);
  } catch (const Refused& refused) {
    return Error{refused.what()};
  }
  return captured;
}

}  // namespace tilewright::libtorch
