// Dims, types, the growth of a graph, type inference, and the parser on broken texts.
//
// Tests graph/type.h, graph/graph.h, graph/lexer.h; ops that refuse operands are in
// filetests/verify, spellings in filetests/parse.
#include "graph/graph.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "graph/lexer.h"

namespace tilewright::graph {
namespace {

Dim dim(std::string_view text) {
  Result<Dim> result = Dim::parse(text);
  EXPECT_TRUE(result.ok()) << text;
  return result.ok() ? *result : Dim();
}

Type type(std::string_view text) {
  Result<Type> result = parse_type(text);
  EXPECT_TRUE(result.ok()) << text;
  return result.ok() ? *result : Type();
}

TEST(Dim, prints_in_one_form) {
  const std::pair<const char*, const char*> forms[] = {
      {"2*b*s + past - 1", "2*b*s + past - 1"},
      {"-1 + past + s*b*2", "2*b*s + past - 1"},
      {"s + s", "2*s"},
      {"s - s", "0"},
      {"-s", "-s"},
      {"1 - s", "-s + 1"},
      {"(a + b)*(a - b)", "a*a - b*b"},
      {"--3", "3"},
      {"3*-s", "-3*s"},
      {"_u0 * 7", "7*_u0"},
      {"4611686018427387904", "4611686018427387904"},
  };
  for (auto [text, printed] : forms) {
    EXPECT_EQ(dim(text).print(), printed);
    EXPECT_EQ(dim(dim(text).print()), dim(text));
  }
}

TEST(Dim, refuses_broken_text) {
  for (const char* text :
       {"", "+", "2*", "a b", "(a", "a)", "1.5", "1e3", "%a", "a//b", "99999999999999999999",
        "4611686018427387904*2", "4611686018427387904 + 4611686018427387904",
        "a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a"}) {
    EXPECT_FALSE(Dim::parse(text).ok()) << text;
  }
}

TEST(Dim, evaluates) {
  SymbolValues values{{"b", 2}, {"s", 5}, {"past", 7}};
  EXPECT_EQ(*dim("2*b*s + past - 1").evaluate(values), 26);
  Result<std::int64_t> missing = dim("b + t").evaluate(values);
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().message, "symbol 't' has no value");
  values["b"] = std::int64_t{1} << 62;
  EXPECT_FALSE(dim("2*b").evaluate(values).ok());
  EXPECT_FALSE(dim("b + b").evaluate(values).ok());
}

TEST(Dim, divides_exactly) {
  auto quotient = [](const char* a, const char* b) {
    auto result = dim(a).divide_exactly(dim(b));
    return result ? result->print() : "none";
  };
  EXPECT_EQ(quotient("576", "64"), "9");
  EXPECT_EQ(quotient("577", "64"), "none");
  EXPECT_EQ(quotient("0", "s"), "0");
  EXPECT_EQ(quotient("64*b*s", "64"), "b*s");
  EXPECT_EQ(quotient("64*b*s", "8*s"), "8*b");
  EXPECT_EQ(quotient("64*b*s", "t"), "none");
  EXPECT_EQ(quotient("6*s + 3", "3"), "2*s + 1");
  EXPECT_EQ(quotient("6*s + 3", "2"), "none");
  EXPECT_EQ(quotient("past + s", "past + s"), "1");
  EXPECT_EQ(quotient("b*past + b*s", "past + s"), "b");
  EXPECT_EQ(quotient("a*a - b*b", "a - b"), "a + b");
  EXPECT_EQ(quotient("a*a + b*b", "a - b"), "none");
  EXPECT_EQ(quotient("s", "0"), "none");
  EXPECT_EQ(quotient("-4*s", "-2"), "2*s");
}

TEST(Dim, substitutes) {
  EXPECT_EQ(dim("b*s + past").substitute({{"s", 1}, {"past", dim("n - 1")}}).print(), "b + n - 1");
  EXPECT_EQ(dim("s*s").substitute({{"s", dim("s + 1")}}).print(), "s*s + 2*s + 1");
}

TEST(Dim, knows_its_symbols) {
  EXPECT_EQ(dim("b*s + past - s").symbols(), (std::vector<std::string>{"b", "past", "s"}));
  EXPECT_TRUE(dim("s - s + 3").is_constant());
  EXPECT_EQ(dim("s - s + 3").constant(), 3);
  EXPECT_FALSE(dim("s").is_constant());
  EXPECT_EQ(Dim().constant(), 0);
}

TEST(Type, text_is_read_back) {
  for (const char* text :
       {"f32[b, s, 576]", "i64[]", "bf16[past + s]", "cache<f32, 3 x 64>", "cache<bf16, x x x>",
        "bf16[960, 576] encoding=exact_bf16 layout=tile16", "bool[1]", "u8[0]"}) {
    EXPECT_EQ(print(type(text)), text);
  }
  for (const char* text :
       {"", "f32", "f32[", "f32[,]", "f32[1,]", "cache", "cache<f32, 3>", "cache<f32, 3 x>",
        "cache<3 x 64>", "float[2]", "f32[2] encoding", "f32[2] layout=", "f32[2] rest"}) {
    EXPECT_FALSE(parse_type(text).ok()) << text;
  }
}

TEST(Lexer, doubles_are_read_back_and_are_not_integers) {
  for (double value : {0.0, 1.0, -1.0, 1e-5, 0.1, 1e16, 1e300, 5e-324, 123456789012345680.0,
                       std::numeric_limits<double>::max()}) {
    std::string text = print_double(std::abs(value));
    Lexer lexer(text);
    auto number = lexer.number();
    ASSERT_TRUE(number.has_value()) << text;
    EXPECT_TRUE(lexer.at_end()) << text;
    EXPECT_FALSE(number->is_integer) << text;
    EXPECT_EQ(number->floating, std::abs(value)) << text;
  }
}

TEST(Lexer, strings_are_read_back) {
  std::string all;
  for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
  std::string quoted = quote(all);
  Lexer lexer(quoted);
  EXPECT_EQ(lexer.string(), all);
  for (const char* broken : {"\"", "\"a", "\"\\", "\"\\q\"", "\"\\x1\"", "\"\\x", "\"a\nb\""}) {
    Lexer broken_lexer(broken);
    EXPECT_FALSE(broken_lexer.string().has_value()) << broken;
  }
}

TEST(Graph, the_table_is_complete) {
  for (std::size_t i = 0; i < op_count; ++i) {
    auto id = static_cast<Op>(i);
    EXPECT_EQ(op(name(id)), id);
    for (const AttributeRule& rule : attribute_rules(id)) EXPECT_FALSE(rule.key.empty());
  }
  EXPECT_FALSE(op("no_such_op").has_value());
  auto rules = attribute_rules(Op::rms_norm);
  ASSERT_EQ(rules.size(), 2u);
  EXPECT_EQ(rules[0].key, "eps");
  EXPECT_EQ(rules[0].kind, AttributeKind::floating);
  EXPECT_FALSE(rules[0].optional);
  EXPECT_EQ(rules[1].kind, AttributeKind::boolean);
  EXPECT_TRUE(rules[1].optional);
}

TEST(Graph, grows_with_unique_names_and_inferred_types) {
  Graph graph;
  ValueId x = graph.add_parameter("x", type("f32[b, 8]"));
  ValueId w = graph.add_constant("layer.0/weight", type("f32[8]"));
  ValueId n = *graph.append(Op::rms_norm, {x, w}, {{"eps", 1e-5}}, "x");
  ValueId m = *graph.append(Op::add, {n, x}, {}, "a/b:c");
  ValueId k = *graph.append(Op::neg, {m}, {});
  auto parts = *graph.append_external({k}, {{"function", std::string("split")}},
                                      {type("f32[b, 4]"), type("i64[]")}, {"left"});
  graph.outputs = {k, parts[0]};
  EXPECT_EQ(graph.value(n).name, "x_2");
  EXPECT_EQ(graph.value(m).name, "a_b_c");
  EXPECT_EQ(print(graph.type(k)), "f32[b, 8]");
  EXPECT_EQ(graph.users(x), (std::vector<NodeId>{NodeId(1), NodeId(2)}));
  EXPECT_TRUE(graph.users(parts[0]).empty());
  EXPECT_TRUE(graph.is_output(k));
  EXPECT_FALSE(graph.is_output(x));
  EXPECT_EQ(graph.producer(x), nullptr);
  EXPECT_EQ(graph.producer(m)->op, Op::add);
  Status status = verify(graph);
  EXPECT_TRUE(status.ok()) << status.error().message;
  Result<Graph> again = parse(print(graph));
  ASSERT_TRUE(again.ok()) << again.error().message;
  EXPECT_EQ(print(*again), print(graph));
}

TEST(Graph, append_says_why_operands_do_not_fit) {
  Graph graph;
  ValueId x = graph.add_parameter("x", type("f32[b, 8]"));
  Result<ValueId> result = graph.append(Op::add, {x}, {});
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().message, "add takes 2 operands, found 1");
  EXPECT_FALSE(graph.append(Op::external, {x}, {{"function", std::string("f")}}).ok());
  EXPECT_FALSE(graph.append_external({x}, {}, {}).ok());
  EXPECT_TRUE(graph.nodes.empty());
  EXPECT_EQ(graph.values.size(), 1u);
}

// What the text cannot express.
TEST(Verify, graphs_that_no_text_makes) {
  auto good = [] {
    Graph graph;
    ValueId x = graph.add_parameter("x", type("f32[2]"));
    graph.outputs = {*graph.append(Op::neg, {x}, {}, "y")};
    return graph;
  };
  auto expect = [](const Graph& graph, std::string_view message) {
    Status status = verify(graph);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().message, message);
    EXPECT_FALSE(print(graph).empty());
  };
  EXPECT_TRUE(verify(good()).ok());
  Graph graph = good();
  graph.nodes[0].operands = {ValueId(7)};
  expect(graph, "line 2: an operand is not a value of the graph");
  graph = good();
  graph.outputs = {ValueId::none};
  expect(graph, "line 3: an output is not a value of the graph");
  graph = good();
  graph.parameters.push_back(ValueId(-5));
  expect(graph, "line 1: a parameter is not a value of the graph");
  graph = good();
  graph.value(ValueId(1)).name = "x";
  expect(graph, "line 1: %x is defined twice");
  graph = good();
  graph.value(ValueId(1)).name = "a b";
  expect(graph, "line 1: 'a b' is not a name");
  graph = good();
  graph.name = "";
  expect(graph, "line 1: '' is not a name");
  graph = good();
  graph.value(ValueId(1)).producer = NodeId::none;
  expect(graph, "line 2: %y names another producer");
  graph = good();
  graph.nodes[0].operands = {ValueId(1)};
  expect(graph, "line 2: %y is used before it is defined");
  graph = good();
  graph.nodes.push_back(graph.nodes[0]);
  expect(graph, "line 3: %y is defined twice");
  graph = good();
  graph.parameters.clear();
  expect(graph, "line 2: %x is used before it is defined");
}

std::string inferred(Op op, std::vector<std::string_view> operands, Attributes attributes = {}) {
  std::vector<Type> types;
  for (std::string_view operand : operands) types.push_back(type(operand));
  Result<std::vector<Type>> result = infer(op, types, attributes);
  return result ? print(result->front()) : "error: " + result.error().message;
}

TEST(Infer, promotes_as_torch_does) {
  const char* const rows[][3] = {
      {"f32[2]", "f32[2]", "f32[2]"},   {"bf16[2]", "f32[2]", "f32[2]"},
      {"bf16[2]", "f16[2]", "f32[2]"},  {"bf16[2]", "f32[]", "bf16[2]"},
      {"f16[2]", "f64[]", "f16[2]"},    {"i64[2]", "f32[]", "f32[2]"},
      {"i64[2]", "bf16[2]", "bf16[2]"}, {"i32[2]", "i64[]", "i32[2]"},
      {"i32[2]", "i64[1]", "i64[2]"},   {"u8[2]", "i8[2]", "i16[2]"},
      {"bool[2]", "i8[2]", "i8[2]"},    {"bool[2]", "i64[]", "i64[2]"},
      {"i64[2]", "bool[2]", "i64[2]"},  {"f32[]", "bf16[]", "f32[]"},
      {"bf16[1]", "f32[]", "bf16[1]"},  {"f64[2]", "f32[2]", "f64[2]"},
  };
  for (auto [a, b, result] : rows) {
    EXPECT_EQ(inferred(Op::add, {a, b}), result) << a << " + " << b;
    EXPECT_EQ(inferred(Op::add, {b, a}), result) << b << " + " << a;
  }
  EXPECT_EQ(inferred(Op::div, {"i64[2]", "i64[2]"}), "f32[2]");
  EXPECT_EQ(inferred(Op::exp, {"i64[2]"}), "f32[2]");
  EXPECT_EQ(inferred(Op::exp, {"bf16[2]"}), "bf16[2]");
  EXPECT_EQ(inferred(Op::lt, {"i64[2]", "f32[2]"}), "bool[2]");
  EXPECT_EQ(inferred(Op::where, {"bool[b, 1]", "bf16[3]", "f32[]"}), "bf16[b, 3]");
  EXPECT_EQ(inferred(Op::sum, {"bool[b, 3]"}), "i64[b, 1]");
  EXPECT_EQ(inferred(Op::mean, {"bf16[b, 3]"}), "bf16[b, 1]");
}

TEST(Infer, broadcasts) {
  EXPECT_EQ(inferred(Op::mul, {"f32[b, 1, s]", "f32[h, 1]"}), "f32[b, h, s]");
  EXPECT_EQ(inferred(Op::mul, {"f32[past + s]", "f32[s + past]"}), "f32[past + s]");
  EXPECT_EQ(inferred(Op::mul, {"f32[0]", "f32[1]"}), "f32[0]");
  EXPECT_EQ(inferred(Op::mul, {"f32[2]", "f32[3]"}),
            "error: shapes [2] and [3] do not broadcast: 2 and 3");
}

TEST(Infer, symbolic_shapes) {
  Shape heads{dim("b"), dim("s"), 9, 64};
  EXPECT_EQ(inferred(Op::reshape, {"f32[b, s, 576]"}, {{"shape", heads}}), "f32[b, s, 9, 64]");
  EXPECT_EQ(inferred(Op::reshape, {"f32[b, past + s]"}, {{"shape", Shape{dim("b*past + b*s")}}}),
            "f32[b*past + b*s]");
  Attributes slice{
      {"axis", std::int64_t{1}}, {"start", Shape{dim("past")}}, {"end", Shape{dim("past + s")}}};
  EXPECT_EQ(inferred(Op::slice, {"f32[b, n, 2]"}, slice), "f32[b, s, 2]");
  slice["start"] = Shape{0};
  slice["end"] = Shape{dim("4*s")};
  slice["step"] = std::int64_t{2};
  EXPECT_EQ(inferred(Op::slice, {"f32[b, n, 2]"}, slice), "f32[b, 2*s, 2]");
  slice["end"] = Shape{5};
  EXPECT_EQ(inferred(Op::slice, {"f32[b, 5, 2]"}, slice), "f32[b, 3, 2]");
  EXPECT_EQ(inferred(Op::cat, {"f32[b, past, 2]", "bf16[b, s, 2]"}, {{"axis", std::int64_t{1}}}),
            "f32[b, past + s, 2]");
  EXPECT_EQ(
      inferred(Op::arange, {}, {{"start", Shape{dim("past")}}, {"end", Shape{dim("past + s")}}}),
      "i64[s]");
  EXPECT_EQ(inferred(Op::embedding, {"bf16[V, 576]", "i64[b, s]"}), "bf16[b, s, 576]");
  EXPECT_EQ(inferred(Op::matmul, {"f32[b, 1, s, 64]", "f32[h, 64, t]"}), "f32[b, h, s, t]");
}

TEST(Infer, composites_keep_the_dtype_of_operand_0) {
  EXPECT_EQ(inferred(Op::linear, {"bf16[b, s, 8]", "f32[16, 8]"}), "bf16[b, s, 16]");
  EXPECT_EQ(inferred(Op::linear, {"f32[8]", "bf16[16, 8]"}), "f32[16]");
  EXPECT_EQ(inferred(Op::rms_norm, {"bf16[b, 8]", "f32[8]"}, {{"eps", 1e-5}}), "bf16[b, 8]");
  Attributes attention{{"scale", 0.125}, {"causal", true}};
  EXPECT_EQ(inferred(Op::attention, {"bf16[b, 9, s, 64]", "cache<f16, 3 x 64>"}, attention),
            "bf16[b, 9, s, 64]");
  EXPECT_EQ(inferred(Op::attention, {"f32[b, 9, s, 64]", "f32[b, 3, t, 64]", "f32[b, 3, t, 32]"},
                     attention),
            "f32[b, 9, s, 32]");
  EXPECT_EQ(inferred(Op::kv_append, {"cache<f16, 3 x 64>", "f32[b, 3, s, 64]", "f32[b, 3, s, 64]"}),
            "cache<f16, 3 x 64>");
}

std::vector<std::string> valid_texts() {
  std::vector<std::string> texts;
  for (const char* folder : {"parse", "run"}) {
    std::filesystem::path path =
        std::filesystem::path(TILEWRIGHT_SOURCE_DIR) / "tests" / "filetests" / folder;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      std::ifstream stream(entry.path());
      texts.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    }
  }
  return texts;
}

// Whatever is parsed can be printed, read back and verified; nothing crashes.
void expect_no_crash(const std::string& text) {
  Result<Graph> graph = parse(text);
  if (!graph) {
    ASSERT_TRUE(graph.error().message.starts_with("line ")) << graph.error().message;
    return;
  }
  std::string printed = print(*graph);
  Result<Graph> again = parse(printed);
  ASSERT_TRUE(again.ok()) << again.error().message << "\n" << printed << "\nfrom\n" << text;
  ASSERT_EQ(print(*again), printed);
  (void)verify(*graph).ok();
}

TEST(Parse, survives_every_prefix) {
  std::vector<std::string> texts = valid_texts();
  ASSERT_GE(texts.size(), 10u);
  for (const std::string& text : texts) {
    for (std::size_t length = 0; length <= text.size(); ++length) {
      expect_no_crash(text.substr(0, length));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Parse, survives_mutations) {
  std::mt19937 random(1);
  auto below = [&](std::size_t n) { return random() % n; };
  const std::string_view pieces[] = {"%",
                                     "(",
                                     ")",
                                     "{",
                                     "}",
                                     "[",
                                     "]",
                                     "<",
                                     ">",
                                     "=",
                                     ":",
                                     ",",
                                     "-",
                                     "*",
                                     "\"",
                                     ";",
                                     "#",
                                     "\n",
                                     "\\",
                                     ".",
                                     "0",
                                     "1e9",
                                     "9223372036854775808",
                                     "region",
                                     "return",
                                     "graph",
                                     "const",
                                     "neg",
                                     "cat",
                                     "f32[s]",
                                     "cache<f32, 1 x 1>",
                                     "inf",
                                     "true",
                                     std::string_view("\0\xff\x80", 3)};
  std::vector<std::string> texts = valid_texts();
  for (int round = 0; round < 20000; ++round) {
    std::string text = texts[below(texts.size())];
    for (std::size_t change = 0; change <= below(3); ++change) {
      std::size_t at = below(text.size() + 1);
      switch (below(4)) {
        case 0:
          text.insert(at, pieces[below(std::size(pieces))]);
          break;
        case 1:
          text.erase(at, below(8));
          break;
        case 2:
          text.insert(at, text.substr(below(text.size() + 1), below(40)));
          break;
        default:
          if (at < text.size()) text[at] = static_cast<char>(random());
      }
      if (text.empty()) break;
    }
    expect_no_crash(text);
    if (HasFatalFailure()) return;
  }
}

TEST(Parse, survives_depth_and_size) {
  std::string deep(100000, '(');
  expect_no_crash("graph g(%x: f32[" + deep + "1]) -> () { return }");
  expect_no_crash("graph g(%x: f32[" + std::string(100000, '-') + "1]) -> () { return }");
  std::string product = "a";
  for (int i = 0; i < 20000; ++i) product += "*a";
  expect_no_crash("graph g(%x: f32[" + product + "]) -> () { return }");
  std::string chain = "graph g(%x: f32[2]) -> () {\n";
  for (int i = 0; i < 20000; ++i) chain += fmt::format("%{} = neg(%x)\n", i);
  Result<Graph> graph = parse(chain + "return\n}");
  ASSERT_TRUE(graph.ok());
  EXPECT_EQ(graph->nodes.size(), 20000u);
}

}  // namespace
}  // namespace tilewright::graph
