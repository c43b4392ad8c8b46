// The reference interpreter: every op against values computed by hand or by a formula of <cmath>,
// rounding of each dtype, caches, and the errors that only run time can find.
//
// Tests graph/interpret.h, graph/tensor.h and the references in graph/reference_*.cpp.
#include "graph/interpret.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "graph/run_case.h"

namespace tilewright::graph {
namespace {

Tensor tensor(const std::string& text) {
  Result<Tensor> tensor = parse_tensor(text);
  EXPECT_TRUE(tensor.ok()) << text;
  return tensor.ok() ? *tensor : Tensor();
}

// One op on parameters %a, %b, ... whose types are those of the inputs.
struct Case {
  std::string node;
  std::vector<std::string> inputs;
  std::string expected;
  double tolerance = 1e-6;
};

Result<Graph> graph_of(const Case& test) {
  Graph graph;
  std::string parameters;
  for (std::size_t i = 0; i < test.inputs.size(); ++i) {
    Tensor input = tensor(test.inputs[i]);
    parameters += fmt::format("{}%{}: {}[{}]", i == 0 ? "" : ", ", static_cast<char>('a' + i),
                              name(input.dtype), fmt::join(input.shape, ", "));
  }
  Tensor output = tensor(test.expected);
  return parse(fmt::format("graph g({}) -> ({}[{}]) {{\n%y = {}\nreturn %y\n}}", parameters,
                           name(output.dtype), fmt::join(output.shape, ", "), test.node));
}

Result<std::vector<Tensor>> run(const Case& test) {
  Result<Graph> graph = graph_of(test);
  if (!graph) return graph.error();
  std::vector<Argument> arguments;
  for (const std::string& input : test.inputs) arguments.emplace_back(tensor(input));
  Constants constants{{"w", tensor("f32[2] {3, 4}")}};
  return interpret(*graph, arguments, constants);
}

// By hand. exp, sin ... are below, with formulas.
const std::vector<Case> cases{
    {R"(const "w" : f32[2])", {}, "f32[2] {3, 4}"},
    {R"(const "none" {value = 2.5} : f32[3])", {}, "f32[3] {2.5, 2.5, 2.5}"},
    {"scalar {value = 0.5}", {}, "f32[] {0.5}"},
    {"scalar {value = 7, dtype = i64}", {}, "i64[] {7}"},
    {"arange {start = [3], end = [6]}", {}, "i64[3] {3, 4, 5}"},
    {"reshape(%a) {shape = [3, 2]}",
     {"i8[2, 3] {1, 2, 3, 4, 5, 6}"},
     "i8[3, 2] {1, 2, 3, 4, 5, 6}"},
    {"permute(%a) {order = [1, 0]}",
     {"f32[2, 3] {1, 2, 3, 4, 5, 6}"},
     "f32[3, 2] {1, 4, 2, 5, 3, 6}"},
    {"permute(%a) {order = [2, 0, 1]}", {"f32[1, 2, 2] {1, 2, 3, 4}"}, "f32[2, 1, 2] {1, 3, 2, 4}"},
    {"expand(%a) {shape = [2, 2, 3]}",
     {"f32[2, 1] {1, 2}"},
     "f32[2, 2, 3] {1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2}"},
    {"slice(%a) {axis = 1, start = [1], end = [4], step = 2}",
     {"f32[2, 4] {0, 1, 2, 3, 4, 5, 6, 7}"},
     "f32[2, 2] {1, 3, 5, 7}"},
    {"slice(%a) {axis = 0, start = [1], end = [1]}", {"f32[2] {0, 1}"}, "f32[0] {}"},
    {"add(%a, %b)", {"f32[2, 1] {1, 2}", "f32[2] {10, 20}"}, "f32[2, 2] {11, 21, 12, 22}"},
    {"add(%a, %b)",
     {"i64[2] {9223372036854775807, 1}", "i64[1] {1}"},
     "i64[2] {-9223372036854775808, 2}"},
    {"sub(%a, %b)", {"f32[2] {1, 2}", "f32[] {10}"}, "f32[2] {-9, -8}"},
    {"mul(%a, %b)", {"i32[2] {3, -4}", "i32[2] {5, 6}"}, "i32[2] {15, -24}"},
    {"div(%a, %b)", {"i64[2] {3, -4}", "i64[2] {2, 8}"}, "f32[2] {1.5, -0.5}"},
    {"maximum(%a, %b)", {"f32[3] {1, nan, 5}", "f32[3] {2, 0, 4}"}, "f32[3] {2, nan, 5}"},
    {"maximum(%a, %b)", {"i64[1] {-3}", "i64[1] {2}"}, "i64[1] {2}"},
    {"minimum(%a, %b)", {"f32[3] {1, 0, 5}", "f32[3] {2, nan, 4}"}, "f32[3] {1, nan, 4}"},
    {"pow(%a) {exponent = 2}", {"f32[2] {3, -4}"}, "f32[2] {9, 16}"},
    {"pow(%a) {exponent = 3}", {"f32[2] {3, -4}"}, "f32[2] {27, -64}"},
    {"pow(%a) {exponent = 0.5}", {"f32[1] {9}"}, "f32[1] {3}"},
    {"pow(%a) {exponent = -0.5}", {"f32[1] {4}"}, "f32[1] {0.5}"},
    {"pow(%a) {exponent = -1}", {"f32[1] {8}"}, "f32[1] {0.125}"},
    {"neg(%a)", {"f32[2] {3, -4}"}, "f32[2] {-3, 4}"},
    {"neg(%a)", {"i64[2] {9007199254740993, -4}"}, "i64[2] {-9007199254740993, 4}"},
    {"abs(%a)", {"i8[2] {3, -4}"}, "i8[2] {3, 4}"},
    {"reciprocal(%a)", {"f32[2] {4, 0}"}, "f32[2] {0.25, inf}"},
    {"sqrt(%a)", {"f32[2] {16, -1}"}, "f32[2] {4, nan}"},
    {"rsqrt(%a)", {"f32[2] {16, 0}"}, "f32[2] {0.25, inf}"},
    {"relu(%a)", {"f32[3] {-1, 2, nan}"}, "f32[3] {0, 2, nan}"},
    {"convert(%a) {dtype = i8}", {"f32[4] {1.9, -1.9, 300, -300}"}, "i8[4] {1, -1, 127, -128}"},
    {"convert(%a) {dtype = bool}", {"f32[3] {0, 0.5, -1}"}, "bool[3] {0, 1, 1}"},
    {"convert(%a) {dtype = i8}", {"i64[2] {257, -1}"}, "i8[2] {1, -1}"},
    {"convert(%a) {dtype = f32}", {"bool[2] {0, 1}"}, "f32[2] {0, 1}"},
    {"where(%a, %b, %c)", {"bool[2] {1, 0}", "f32[2] {1, 2}", "f32[1] {9}"}, "f32[2] {1, 9}"},
    {"where(%a, %b, %c)",
     {"bool[2] {1, 0}", "i64[2] {9007199254740993, 2}", "i64[] {9}"},
     "i64[2] {9007199254740993, 9}"},
    {"eq(%a, %b)", {"f32[3] {1, 2, nan}", "f32[3] {1, 3, nan}"}, "bool[3] {1, 0, 0}"},
    {"eq(%a, %b)", {"i64[1] {9007199254740993}", "i64[1] {9007199254740992}"}, "bool[1] {0}"},
    {"ne(%a, %b)", {"f32[3] {1, 2, nan}", "f32[3] {1, 3, nan}"}, "bool[3] {0, 1, 1}"},
    {"lt(%a, %b)", {"f32[3] {1, 2, 3}", "f32[] {2}"}, "bool[3] {1, 0, 0}"},
    {"le(%a, %b)", {"f32[3] {1, 2, 3}", "f32[] {2}"}, "bool[3] {1, 1, 0}"},
    {"gt(%a, %b)", {"f32[3] {1, 2, 3}", "f32[] {2}"}, "bool[3] {0, 0, 1}"},
    {"ge(%a, %b)", {"i64[3] {1, 2, 3}", "i64[] {2}"}, "bool[3] {0, 1, 1}"},
    {"logical_and(%a, %b)",
     {"bool[4] {0, 0, 1, 1}", "bool[4] {0, 1, 0, 1}"},
     "bool[4] {0, 0, 0, 1}"},
    {"logical_or(%a, %b)",
     {"bool[4] {0, 0, 1, 1}", "bool[4] {0, 1, 0, 1}"},
     "bool[4] {0, 1, 1, 1}"},
    {"logical_not(%a)", {"f32[3] {0, 2, nan}"}, "bool[3] {1, 0, 0}"},
    {"sum(%a)", {"f32[2, 3] {1, 2, 3, 4, 5, 6}"}, "f32[2, 1] {6, 15}"},
    {"sum(%a)", {"bool[2, 3] {1, 0, 1, 0, 0, 0}"}, "i64[2, 1] {2, 0}"},
    {"sum(%a)", {"f32[2, 0] {}"}, "f32[2, 1] {0, 0}"},
    {"mean(%a)", {"f32[2, 2] {1, 2, 4, 6}"}, "f32[2, 1] {1.5, 5}"},
    {"amax(%a)", {"f32[2, 3] {-1, -5, -2, 4, nan, 6}"}, "f32[2, 1] {-1, nan}"},
    {"amax(%a)", {"i64[1, 3] {-1, 5, 2}"}, "i64[1, 1] {5}"},
    // exp(log 3) : exp(0) = 3 : 1; large inputs do not overflow
    {"softmax(%a)",
     {"f32[2, 2] {1.0986122887, 0, 1000, 1000}"},
     "f32[2, 2] {0.75, 0.25, 0.5, 0.5}"},
    {"softmax(%a)", {"f32[1, 3] {0, -inf, 0}"}, "f32[1, 3] {0.5, 0, 0.5}"},
    // mean of squares 12.5
    {"rms_norm(%a, %b) {eps = 0}",
     {"f32[1, 2] {3, 4}", "f32[2] {1, 10}"},
     "f32[1, 2] {0.8485281, 11.3137085}"},
    {"rms_norm(%a, %b) {eps = 3.5, plus_one = true}",
     {"f32[1, 2] {3, 4}", "f32[2] {0, 1}"},
     "f32[1, 2] {0.75, 2}"},
    {"rms_norm(%a) {eps = 3.5}", {"f32[1, 2] {3, 4}"}, "f32[1, 2] {0.75, 1}"},
    // mean 2, variance 1
    {"layer_norm(%a) {eps = 0}", {"f32[1, 2] {1, 3}"}, "f32[1, 2] {-1, 1}"},
    {"layer_norm(%a, %b, %c) {eps = 3}",
     {"f32[1, 2] {1, 3}", "f32[2] {2, 4}", "f32[2] {10, 20}"},
     "f32[1, 2] {9, 22}"},
    {"linear(%a, %b)", {"f32[2] {1, 2}", "f32[3, 2] {1, 0, 0, 1, 1, 1}"}, "f32[3] {1, 2, 3}"},
    {"linear(%a, %b, %c) {residual = true}",
     {"f32[1, 2] {1, 2}", "bf16[1, 2] {3, 4}", "f32[1, 1] {100}"},
     "f32[1, 1] {111}"},
    {"matmul(%a, %b)", {"f32[2, 2] {1, 2, 3, 4}", "f32[2, 1] {10, 1}"}, "f32[2, 1] {12, 34}"},
    {"matmul(%a, %b)",
     {"f32[2, 1, 2] {1, 2, 3, 4}", "f32[2, 2] {1, 0, 0, 1}"},
     "f32[2, 1, 2] {1, 2, 3, 4}"},
    {"matmul(%a, %b)",
     {"f32[1, 3, 1] {1, 2, 3}", "f32[2, 1, 1] {1, 10}"},
     "f32[2, 3, 1] {1, 2, 3, 10, 20, 30}"},
    {R"(gated_mlp_up(%a, %b, %c) {activation = "relu"})",
     {"f32[1, 2] {1, 2}", "f32[2, 2] {1, 1, -1, -1}", "f32[2, 2] {5, 0, 7, 0}"},
     "f32[1, 2] {15, 0}"},
    {"embedding(%a, %b)",
     {"f32[3, 2] {1, 2, 3, 4, 5, 6}", "i64[2, 1] {2, 0}"},
     "f32[2, 1, 2] {5, 6, 1, 2}"},
    {"cat(%a, %b) {axis = 1}",
     {"f32[2, 1] {1, 2}", "f32[2, 2] {3, 4, 5, 6}"},
     "f32[2, 3] {1, 3, 4, 2, 5, 6}"},
    {"cat(%a, %b, %a) {axis = 0}",
     {"i64[1] {9007199254740993}", "i64[2] {3, 4}"},
     "i64[4] {9007199254740993, 3, 4, 9007199254740993}"},
    {"contiguous(%a)", {"bf16[2] {1, 2}"}, "bf16[2] {1, 2}"},
    {"index_copy(%a, %b, %c) {axis = 1}",
     {"f32[1, 3] {1, 2, 3}", "i64[1] {2}", "f32[1, 1] {9}"},
     "f32[1, 3] {1, 2, 9}"},
    // (x0, x1) * cos + (-x1, x0) * sin
    {R"(rope(%a, %b, %c) {style = "half"})",
     {"f32[1, 1, 1, 4] {1, 2, 3, 4}", "f32[4] {1, 2, 3, 4}", "f32[1, 4] {10, 20, 30, 40}"},
     "f32[1, 1, 1, 4] {-29, -76, 39, 96}"},
    {"top_values(%a) {count = 2}", {"f32[2, 3] {1, 3, 2, 5, 5, 4}"}, "f32[2, 2] {3, 2, 5, 5}"},
    {"top_indices(%a) {count = 2}", {"f32[2, 3] {1, 3, 2, 5, 5, 4}"}, "i64[2, 2] {1, 2, 0, 1}"},
    {"top_indices(%a) {count = 3}", {"f32[3] {inf, nan, 2}"}, "i64[3] {1, 0, 2}"},
    {"top_values(%a) {count = 1}", {"i64[3] {1, 9, 2}"}, "i64[1] {9}"},
    {"gather(%a, %b)",
     {"f32[2, 3] {1, 3, 2, 5, 6, 4}", "i64[2, 2] {2, 2, 0, 1}"},
     "f32[2, 2] {2, 2, 5, 6}"},
    {"cumsum(%a)",
     {"i64[2, 3] {1, 0, 2, -5, 5, 9007199254740993}"},
     "i64[2, 3] {1, 1, 3, -5, 0, 9007199254740993}"},
    {"causal_mask {shape = [2, 3]}", {}, "f32[2, 3] {0, 0, -inf, 0, 0, 0}"},
    {"causal_mask {shape = [2, 3], window = 1}", {}, "f32[2, 3] {-inf, 0, -inf, -inf, -inf, 0}"},
    {"expert_linear(%a, %b, %c)",
     {"f32[2, 1] {1, 2}", "f32[2, 1, 1] {3, 5}", "i64[2, 2] {1, 0, 1, 1}"},
     "f32[4, 1] {5, 3, 10, 10}"},
    // scores 0 and log 3
    {"attention(%a, %b, %c) {causal = false, scale = 1}",
     {"f32[1, 1, 1, 1] {1}", "f32[1, 1, 2, 1] {0, 1.0986122887}",
      "f32[1, 1, 2, 3] {0, 4, 8, 4, 0, 8}"},
     "f32[1, 1, 1, 3] {3, 1, 8}"},
};

TEST(Interpret, gives_values_computed_by_hand) {
  for (const Case& test : cases) {
    SCOPED_TRACE(test.node);
    auto outputs = run(test);
    ASSERT_TRUE(outputs.ok()) << outputs.error().message;
    Status equal = compare(outputs->front(), tensor(test.expected), test.tolerance);
    EXPECT_TRUE(equal.ok()) << (equal.ok() ? "" : equal.error().message);
  }
}

struct Function {
  std::string node;
  double (*formula)(double);
};

double erf_gelu(double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double tanh_gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * std::pow(x, 3))));
}

const std::vector<Function> functions{
    {"exp(%a)", [](double x) { return std::exp(x); }},
    {"expm1(%a)", [](double x) { return std::expm1(x); }},
    {"log(%a)", [](double x) { return std::log(x); }},
    {"log1p(%a)", [](double x) { return std::log1p(x); }},
    {"sin(%a)", [](double x) { return std::sin(x); }},
    {"cos(%a)", [](double x) { return std::cos(x); }},
    {"tanh(%a)", [](double x) { return std::tanh(x); }},
    {"erf(%a)", [](double x) { return std::erf(x); }},
    {"sigmoid(%a)", [](double x) { return 0.5 + 0.5 * std::tanh(x / 2); }},
    {"silu(%a)", [](double x) { return x * (0.5 + 0.5 * std::tanh(x / 2)); }},
    {"gelu(%a)", erf_gelu},
    {R"(gelu(%a) {approximate = "tanh"})", tanh_gelu},
};

TEST(Interpret, follows_the_formulas) {
  for (const Function& function : functions) {
    SCOPED_TRACE(function.node);
    Case test{function.node, {"f32[64] random(3)"}, "f32[64] fill(0)"};
    auto outputs = run(test);
    ASSERT_TRUE(outputs.ok()) << outputs.error().message;
    Tensor input = tensor(test.inputs[0]);
    for (std::int64_t i = 0; i < 64; ++i) {
      double expected = function.formula(input.get(i));
      const double got = outputs->front().get(i);
      if (std::isnan(expected)) {  // of a negative number's logarithm
        EXPECT_TRUE(std::isnan(got)) << i;
      } else {
        EXPECT_NEAR(got, expected, 1e-7 * (1 + std::abs(expected))) << i;
      }
    }
  }
}

TEST(Interpret, every_op_has_a_case) {
  std::set<Op> covered{Op::external, Op::kv_append, Op::cache_keys, Op::cache_values};  // below
  for (const Case& test : cases) {
    Result<Graph> graph = graph_of(test);
    ASSERT_TRUE(graph.ok()) << test.node << ": " << graph.error().message;
    covered.insert(graph->nodes[0].op);
  }
  for (const Function& function : functions) {
    covered.insert(*op(function.node.substr(0, function.node.find('('))));
  }
  for (std::size_t i = 0; i < op_count; ++i) {
    EXPECT_TRUE(covered.contains(static_cast<Op>(i))) << name(static_cast<Op>(i));
  }
}

TEST(Interpret, errors_that_only_run_time_finds) {
  struct Wrong {
    Case test;
    std::string message;
  };
  const std::vector<Wrong> wrong{
      {{"embedding(%a, %b)", {"f32[3, 1] {1, 2, 3}", "i64[1] {3}"}, "f32[1, 1] {0}"},
       "index 3 of 3"},
      {{"embedding(%a, %b)", {"f32[3, 1] {1, 2, 3}", "i64[1] {-1}"}, "f32[1, 1] {0}"},
       "index -1 of 3"},
      {{"index_copy(%a, %b, %c) {axis = 0}",
        {"f32[2] {0, 0}", "i64[1] {2}", "f32[1] {9}"},
        "f32[2] {0, 0}"},
       "index 2 of 2"},
      {{"amax(%a)", {"f32[2, 0] {}"}, "f32[2, 1] {0, 0}"}, "amax of no elements"},
      {{R"(const "missing" : f32[1])", {}, "f32[1] {0}"}, "\"missing\" is not given"},
      {{R"(const "w" : f32[3])", {}, "f32[3] fill(0)"}, "another shape"},
      {{R"(const "w" : f64[2])", {}, "f64[2] fill(0)"}, "another dtype"},
      {{R"(external(%a) {function = "f"} : f32[1])", {"f32[1] {0}"}, "f32[1] {0}"},
       "f has no reference"},
  };
  for (const Wrong& wrong_case : wrong) {
    SCOPED_TRACE(wrong_case.test.node);
    auto outputs = run(wrong_case.test);
    ASSERT_FALSE(outputs.ok());
    EXPECT_NE(outputs.error().message.find(wrong_case.message), std::string::npos)
        << outputs.error().message;
  }
}

Result<std::vector<Tensor>> run_text(const std::string& text, std::vector<Argument>& arguments) {
  Result<Graph> graph = parse(text);
  if (!graph) return graph.error();
  return interpret(*graph, arguments);
}

TEST(Interpret, symbols_come_from_the_arguments_and_must_agree) {
  const std::string text = "graph g(%x: f32[s, 2*s], %y: f32[t]) -> (f32[s, 2*s]) {\n return %x\n}";
  std::vector<Argument> right{tensor("f32[2, 4] fill(1)"), tensor("f32[5] fill(1)")};
  EXPECT_TRUE(run_text(text, right).ok());
  std::vector<Argument> wrong{tensor("f32[2, 5] fill(1)"), tensor("f32[5] fill(1)")};
  auto outputs = run_text(text, wrong);
  ASSERT_FALSE(outputs.ok());
  EXPECT_EQ(outputs.error().message, "%x: the argument is not f32[s, 2*s]");
  std::vector<Argument> few{tensor("f32[2, 4] fill(1)")};
  EXPECT_FALSE(run_text(text, few).ok());
}

TEST(Interpret, different_symbols_are_compared) {
  const std::string text =
      "graph g(%x: f32[s, 1], %y: f32[t, 1]) -> (f32[s, 2]) {\n"
      " %z = cat(%x, %y) {axis = 1}\n return %z\n}";
  std::vector<Argument> equal{tensor("f32[2, 1] fill(1)"), tensor("f32[2, 1] fill(2)")};
  auto outputs = run_text(text, equal);
  ASSERT_TRUE(outputs.ok());
  EXPECT_EQ(outputs->front().values(), (std::vector<double>{1, 2, 1, 2}));
  std::vector<Argument> different{tensor("f32[2, 1] fill(1)"), tensor("f32[3, 1] fill(2)")};
  EXPECT_FALSE(run_text(text, different).ok());
}

TEST(Interpret, attention_compares_lengths) {
  const std::string text =
      "graph g(%q: f32[1, 1, 1, 1], %k: f32[1, 1, t, 1], %v: f32[1, 1, u, 1]) -> "
      "(f32[1, 1, 1, 1]) {\n"
      " %y = attention(%q, %k, %v) {causal = false, scale = 1}\n return %y\n}";
  Tensor q = tensor("f32[1, 1, 1, 1] {0}");
  std::vector<Argument> equal{q, tensor("f32[1, 1, 2, 1] {1, 2}"),
                              tensor("f32[1, 1, 2, 1] {1, 3}")};
  auto outputs = run_text(text, equal);
  ASSERT_TRUE(outputs.ok());
  EXPECT_EQ(outputs->front().get(0), 2);
  std::vector<Argument> different{q, tensor("f32[1, 1, 2, 1] {1, 2}"),
                                  tensor("f32[1, 1, 1, 1] {1}")};
  EXPECT_FALSE(run_text(text, different).ok());
}

TEST(Interpret, writes_reach_the_argument) {
  const std::string text =
      "graph g(%t: f32[3], %i: i64[1], %r: f32[1]) -> () {\n"
      " %u = index_copy(%t, %i, %r) {axis = 0}\n"
      " %v = index_copy(%u, %i, %r) {axis = 0}\n return\n}";
  std::vector<Argument> arguments{tensor("f32[3] {1, 2, 3}"), tensor("i64[1] {1}"),
                                  tensor("f32[1] {9}")};
  ASSERT_TRUE(run_text(text, arguments).ok());
  EXPECT_EQ(std::get<Tensor>(arguments[0]).values(), (std::vector<double>{1, 9, 3}));
}

// Attention over what a cache holds, under a causal mask, is attention over the cache.
TEST(Interpret, a_cache_can_be_read) {
  const std::string text =
      "graph g(%q: f32[2, 4, s, 2], %k: f32[2, 2, s, 2], %v: f32[2, 2, s, 2], %l: f32[t], "
      "%kv: cache<f32, 2 x 2>) -> (f32[2, 4, s, 2], f32[2, 4, s, 2]) {\n"
      " %kv1 = kv_append(%kv, %k, %v)\n"
      " %y = attention(%q, %kv1) {causal = true, scale = 0.7}\n"
      " %keys = cache_keys(%kv1) {shape = [2, 2, t, 2]}\n"
      " %values = cache_values(%kv1) {shape = [2, 2, t, 2]}\n"
      " %mask = causal_mask {shape = [2, 1, s, t]}\n"
      " %z = attention(%q, %keys, %values, %mask) {causal = false, scale = 0.7}\n"
      " return %y, %z\n}";
  std::vector<Argument> arguments{tensor("f32[2, 4, 3, 2] random(1)"),
                                  tensor("f32[2, 2, 3, 2] random(2)"),
                                  tensor("f32[2, 2, 3, 2] random(3)"), tensor("f32[3] random(4)"),
                                  Cache{DataType::f32, 0, 2, 2, 0, {}, {}}};
  auto outputs = run_text(text, arguments);
  ASSERT_TRUE(outputs.ok()) << outputs.error().message;
  Status equal = compare((*outputs)[1], (*outputs)[0], 1e-6);
  EXPECT_TRUE(equal.ok()) << (equal.ok() ? "" : equal.error().message);
}

// Attention over a cache that was filled in two steps is attention over all tokens at once.
TEST(Interpret, a_cache_is_its_tokens) {
  const std::string step =
      "graph g(%q: f32[2, 4, s, 2], %k: f32[2, 2, s, 2], %v: f32[2, 2, s, 2], "
      "%kv: cache<f32, 2 x 2>) -> (f32[2, 4, s, 2]) {\n"
      " %kv1 = kv_append(%kv, %k, %v)\n"
      " %y = attention(%q, %kv1) {causal = true, scale = 0.7}\n return %y\n}";
  const std::string whole =
      "graph g(%q: f32[2, 4, s, 2], %k: f32[2, 2, s, 2], %v: f32[2, 2, s, 2]) -> "
      "(f32[2, 4, s, 2]) {\n"
      " %y = attention(%q, %k, %v) {causal = true, scale = 0.7}\n return %y\n}";
  std::vector<Argument> all{tensor("f32[2, 4, 3, 2] random(1)"),
                            tensor("f32[2, 2, 3, 2] random(2)"),
                            tensor("f32[2, 2, 3, 2] random(3)")};
  auto expected = run_text(whole, all);
  ASSERT_TRUE(expected.ok()) << expected.error().message;
  auto tokens = [&](std::size_t i, std::int64_t begin, std::int64_t end) {
    const Tensor& from = std::get<Tensor>(all[i]);
    std::int64_t heads = from.shape[1];
    Tensor part = *Tensor::make(DataType::f32, {2, heads, end - begin, 2});
    std::int64_t next = 0;
    for (std::int64_t row = 0; row < 2 * heads; ++row) {
      for (std::int64_t j = begin * 2; j < end * 2; ++j) part.copy(next++, from, row * 6 + j);
    }
    return part;
  };
  Cache cache{DataType::f32, 0, 2, 2, 0, {}, {}};
  for (auto [begin, end] : {std::pair(0, 2), std::pair(2, 3)}) {
    std::vector<Argument> arguments{tokens(0, begin, end), tokens(1, begin, end),
                                    tokens(2, begin, end), cache};
    auto outputs = run_text(step, arguments);
    ASSERT_TRUE(outputs.ok()) << outputs.error().message;
    cache = std::get<Cache>(arguments[3]);
    std::int64_t next = 0, length = end - begin;
    for (std::int64_t row = 0; row < 8; ++row) {
      for (std::int64_t j = 0; j < length * 2; ++j) {
        EXPECT_EQ(outputs->front().get(next++), expected->front().get(row * 6 + begin * 2 + j));
      }
    }
  }
  EXPECT_EQ(cache.tokens, 3);
  Result<Cache> again = Cache::from_contents(cache.contents(), cache.dtype);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->keys, cache.keys);
  EXPECT_EQ(again->values, cache.values);
}

TEST(Tensor, rounds_to_nearest_even) {
  // 1 + 2^-8 is between two bf16 values, 1 and 1 + 2^-7; the second tie goes up.
  EXPECT_EQ(round_to(DataType::bf16, 1 + 0x1p-8), 1);
  EXPECT_EQ(round_to(DataType::bf16, 1 + 0x1.8p-7), 1 + 0x1p-6);
  // Just above the tie: rounding to f32 first would lose this.
  EXPECT_EQ(round_to(DataType::bf16, 1 + 0x1p-8 + 0x1p-40), 1 + 0x1p-7);
  EXPECT_EQ(round_to(DataType::f16, 65519), 65504);
  EXPECT_EQ(round_to(DataType::f16, 65520), std::numeric_limits<double>::infinity());
  EXPECT_EQ(round_to(DataType::f16, 0x1p-25), 0);
  EXPECT_EQ(round_to(DataType::f16, 0x1.8p-25), 0x1p-24);
  EXPECT_EQ(round_to(DataType::f32, 1 + 0x1p-24), 1);
  EXPECT_EQ(round_to(DataType::f32, -1e300), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(round_to(DataType::f64, 0.1), 0.1);
}

TEST(Tensor, every_half_value_is_kept) {
  for (DataType dtype : {DataType::f16, DataType::bf16}) {
    Tensor one = *Tensor::make(dtype, {1}), copy = one;
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
      one.bytes = {std::byte(bits & 0xff), std::byte(bits >> 8)};
      double value = one.get(0);
      copy.set(0, value);
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(copy.get(0)));
      } else {
        ASSERT_EQ(copy.bytes, one.bytes) << bits;
      }
    }
  }
}

TEST(Tensor, text_is_read_back) {
  for (const char* text :
       {"f32[2, 2] {1, -0.1, inf, nan}", "bf16[1] {0.33398438}", "i64[2] {-3, 4}", "bool[0] {}",
        "f64[] {0.1}", "f16[3] {65504, 6e-08, -0}"}) {
    EXPECT_EQ(print(tensor(print(tensor(text)))), print(tensor(text)));
  }
  EXPECT_EQ(print(tensor("f32[2, 2] {1, -0.1, inf, nan}")), "f32[2, 2] {1, -0.1, inf, nan}");
  for (const char* text : {"f32[2] {1}", "f32[2] {1, 2, 3}", "f32[s] {1}", "f32[-1] {}",
                           "f32[1000000000, 1000000000] fill(1)", "cache<f32, 1 x 1> {1}", "f32[2]",
                           "f32[1] {x}", "f32[1] fill(1", "f32[] {1} 2"}) {
    EXPECT_FALSE(parse_tensor(text).ok()) << text;
  }
}

}  // namespace
}  // namespace tilewright::graph
