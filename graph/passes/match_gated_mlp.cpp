// match_gated_mlp: act(x @ gate.T) * (x @ up.T) becomes gated_mlp_up (Shazeer, arXiv 2002.05202):
// both products share each block of x, and no intermediate is written to memory.
//
// Tested by passes_test, filetests/passes/match_gated_mlp.graph.
#include <string>
#include <utility>
#include <vector>

#include "graph/match.h"
#include "graph/passes.h"

namespace tilewright::graph {

namespace {

using match::any;
using match::constant;
using match::find;
using match::op;
using match::Pattern;
using match::when;

struct Form {
  std::string activation;
  Pattern pattern;
};

Pattern gelu(bool tanh_form, Pattern inner) {
  return when(
      [tanh_form](const Graph&, const Node& node) {
        return (node.attribute_or<std::string>("approximate", "none") == "tanh") == tanh_form;
      },
      op(Op::gelu, inner));
}

// A pattern with two operands refuses a linear that has a bias or a residual.
Pattern plain_linear(const char* weight) {
  return when(
      [](const Graph&, const Node& node) {
        return node.attribute_or<std::string>("activation", "").empty() &&
               !node.attribute_or("transposed", false);
      },
      op(Op::linear, any("x"), constant(weight)));
}

std::vector<Form> forms() {
  Pattern gate = plain_linear("gate"), up = plain_linear("up");
  return {
      {"silu", op(Op::mul, op(Op::silu, gate), up)},
      {"relu", op(Op::mul, op(Op::relu, gate), up)},
      {"gelu", op(Op::mul, gelu(false, gate), up)},
      {"gelu_tanh", op(Op::mul, gelu(true, gate), up)},
  };
}

}  // namespace

Graph match_gated_mlp(Graph graph, const Target&) {
  const std::vector<Form> all = forms();
  return rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
    if (node.op != Op::mul) return false;
    for (const Form& form : all) {
      auto found = find(form.pattern, rewriter, node.results[0]);
      if (!found || found->type("gate") != found->type("up")) continue;
      const std::vector<ValueId> values = {found->value("x"), found->value("gate"),
                                           found->value("up")};
      return rewriter.replace(node.results[0], Op::gated_mlp_up, rewriter.mapped(values),
                              {{"activation", form.activation}});
    }
    return false;
  });
}

}  // namespace tilewright::graph
