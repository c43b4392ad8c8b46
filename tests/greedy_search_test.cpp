// Greedy search against a loop over single steps that looks at every logit: a program whose logits
// are a row of a table, so that each token says which follows.
#include "ops/greedy_search.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "graph/graph.h"
#include "graph/pipeline.h"
#include "ops/compile.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using Tokens = std::vector<std::int64_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Table {
 public:
  Table(DataType dtype, std::int64_t vocabulary) : dtype_(dtype), vocabulary_(vocabulary) {
    memory_.resize(static_cast<std::size_t>(vocabulary * vocabulary * size_in_bytes(dtype)));
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < vocabulary * vocabulary; ++i) set(0, i, normal(random));
  }

  void set(std::int64_t row, std::int64_t column, float value) {
    write_scalar(dtype_, at(row, column), value);
  }

  // As torch.argmax: the first NaN, else the first of the largest.
  std::int64_t largest(std::int64_t row) {
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < vocabulary_; ++i) {
      const double value = read_scalar(dtype_, at(row, i));
      if (std::isnan(value)) return i;
      if (value > read_scalar(dtype_, at(row, found))) found = i;
    }
    return found;
  }

  Program program() {
    const std::string text = fmt::format(
        "graph table(%ids: i64[b, s], %positions: i64[b, s]) -> ({0}[b, s, {1}]) {{\n"
        "  %table = const \"table\" : {0}[{1}, {1}]\n"
        "  %logits = embedding(%table, %ids) : {0}[b, s, {1}]\n"
        "  return %logits\n}}\n",
        graph::name(dtype_), vocabulary_);
    auto parsed = graph::parse(text);
    if (!parsed) ADD_FAILURE() << parsed.error().message << "\n" << text;
    auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
    auto kernels = std::make_shared<KernelLibrary>(Target::host(), store);
    auto result =
        compile(*parsed, {{"table", {memory_.data(), dtype_, {vocabulary_, vocabulary_}}}},
                Target::host(), {}, kernels, std::make_shared<WeightStore>());
    if (!result) ADD_FAILURE() << result.error().message;
    return std::move(*result);
  }

 private:
  char* at(std::int64_t row, std::int64_t column) {
    return memory_.data() + (row * vocabulary_ + column) * size_in_bytes(dtype_);
  }

  DataType dtype_;
  std::int64_t vocabulary_;
  std::vector<char> memory_;
};

// A search of one sequence.
Tokens search(Program& program, std::int64_t token, std::int64_t steps) {
  auto search = GreedySearch::make(program);
  if (!search) ADD_FAILURE() << search.error().message;
  const Tokens tokens{token}, positions{0};
  const bool finished[] = {false};
  auto found = search->run({.tokens = tokens,
                            .positions = positions,
                            .finished = finished,
                            .most_tokens = steps,
                            .budget = std::chrono::hours(1)});
  if (!found) ADD_FAILURE() << found.error().message;
  return *found;
}

class Greedy : public ::testing::TestWithParam<DataType> {};

TEST_P(Greedy, TakesTheFirstOfTheLargest) {
  // Less than a block, whole blocks, and a tail.
  for (const std::int64_t vocabulary : {5, 1000, 1024, 2048, 2500}) {
    Table table(GetParam(), vocabulary);
    const std::int64_t last = vocabulary - 1, middle = vocabulary / 2;
    table.set(0, last, 100);
    table.set(1, 0, 100);
    table.set(1, last, 100);  // a tie
    table.set(2, middle, 100);
    table.set(2, middle + 1, 100);
    table.set(3, middle, kInfinity);
    table.set(3, last, kNaN);
    table.set(4, middle, kNaN);
    table.set(4, last, kNaN);
    for (std::int64_t i = 0; vocabulary > 5 && i < vocabulary; ++i) table.set(6, i, -kInfinity);
    Program program = table.program();
    for (std::int64_t token = 0; token < vocabulary; token = 2 * token + 1) {
      EXPECT_EQ(search(program, token, 1), Tokens{table.largest(token)}) << vocabulary;
    }
    for (std::int64_t token : {0, 1, 2, 3, 4, 6}) {
      if (token >= vocabulary) continue;
      EXPECT_EQ(search(program, token, 1), Tokens{table.largest(token)}) << vocabulary;
    }
  }
}

TEST_P(Greedy, GoesOnWithWhatItFound) {
  Table table(GetParam(), 1500);
  Program program = table.program();
  Tokens wanted;
  for (std::int64_t token = 3; wanted.size() < 20; wanted.push_back(token)) {
    token = table.largest(token);
  }
  EXPECT_EQ(search(program, 3, 20), wanted);
}

INSTANTIATE_TEST_SUITE_P(Types, Greedy,
                         ::testing::Values(DataType::f32, DataType::bf16, DataType::f16),
                         [](const auto& test) { return std::string(graph::name(test.param)); });

// 0 -> 1 -> 2 -> 3 -> 0.
Table ring() {
  Table table(DataType::f32, 4);
  for (std::int64_t row = 0; row < 4; ++row) table.set(row, (row + 1) % 4, 10);
  return table;
}

TEST(GreedySearch, FinishedSequencesAreFilledUp) {
  Table table = ring();
  Program program = table.program();
  auto search = GreedySearch::make(program);
  ASSERT_TRUE(search.ok());
  const Tokens tokens{0, 1, 3}, positions{5, 5, 5}, ends{3};
  const bool finished[] = {false, false, true};
  GreedyArguments arguments{.tokens = tokens,
                            .positions = positions,
                            .end_tokens = ends,
                            .finished = finished,
                            .pad = 2,
                            .most_tokens = 100,
                            .budget = std::chrono::hours(1)};
  // By steps: the second ends with its second token, then the first.
  EXPECT_EQ(*search->run(arguments), (Tokens{1, 2, 2, 2, 3, 2, 3, 2, 2}));
  arguments.most_tokens = 2;
  EXPECT_EQ(*search->run(arguments), (Tokens{1, 2, 2, 2, 3, 2}));
  arguments.budget = {};
  EXPECT_EQ(*search->run(arguments), (Tokens{1, 2, 2})) << "one step at least, and no more";
}

TEST(GreedySearch, AnEndTokenComesAfterTheLeastTokens) {
  Table table = ring();
  table.set(2, 0, 5);  // the second best
  Program program = table.program();
  auto search = GreedySearch::make(program);
  ASSERT_TRUE(search.ok());
  const Tokens tokens{0}, positions{5}, ends{3, -1, 4};
  const bool finished[] = {false};
  GreedyArguments arguments{.tokens = tokens,
                            .positions = positions,
                            .end_tokens = ends,
                            .finished = finished,
                            .most_tokens = 100,
                            .budget = std::chrono::hours(1)};
  for (const auto& [least, found] : {std::pair<int, Tokens>{2, {1, 2, 3}},
                                     {3, {1, 2, 0, 1, 2, 3}},
                                     {5, {1, 2, 0, 1, 2, 3}},
                                     {6, {1, 2, 0, 1, 2, 0, 1, 2, 3}}}) {
    arguments.least_tokens = least;
    EXPECT_EQ(*search->run(arguments), found) << least;
  }
}

TEST(GreedySearch, GuessesChangeNoToken) {
  // A long way that comes back to itself, so that some guesses are right and some are not.
  Table table(DataType::f32, 40);
  for (std::int64_t row = 0; row < 40; ++row) table.set(row, (row * 7 + 3) % 31, 10);
  Program program = table.program();
  auto search = GreedySearch::make(program);
  ASSERT_TRUE(search.ok());
  const bool finished[] = {false};
  const auto run = [&](Tokens text, std::int64_t most, Tokens ends, PromptLookup* lookup) {
    if (lookup != nullptr) lookup->set_text(text);
    return *search->run({.tokens = std::span(text).last(1),
                         .positions = Tokens{0},
                         .end_tokens = ends,
                         .finished = finished,
                         .most_tokens = most,
                         .budget = std::chrono::hours(1),
                         .lookup = lookup});
  };
  for (const std::int64_t guesses : {1, 3, 10}) {
    PromptLookup lookup(guesses, 2);
    for (const std::int64_t most : {1, 2, 5, 80}) {
      // The second token is followed by another than the program's.
      const Tokens text{5, 7, 9, 5};
      EXPECT_EQ(run(text, most, {}, &lookup), run(text, most, {}, nullptr)) << guesses;
      EXPECT_EQ(run(text, most, {28}, &lookup), run(text, most, {28}, nullptr)) << guesses;
    }
  }
  const auto runs = [&] { return program.counters(Phase::decode).runs; };
  PromptLookup lookup(10, 2);
  const std::uint64_t before = runs();
  EXPECT_EQ(run({5}, 80, {}, &lookup).size(), 80u);
  EXPECT_LT(runs() - before, 45u) << "the second time round several tokens are found at once";
}

TEST(GreedySearch, SaysWhyNot) {
  const auto parsed =
      graph::parse("graph one(%ids: i64[b, s]) -> (i64[b, s]) {\n  return %ids\n}\n");
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
  auto kernels = std::make_shared<KernelLibrary>(Target::host(), store);
  auto program = compile(*parsed, {}, Target::host(), {}, kernels, std::make_shared<WeightStore>());
  ASSERT_TRUE(program.ok()) << program.error().message;
  EXPECT_EQ(GreedySearch::make(*program).error().message,
            "the program does not take tokens and positions to logits");

  Table table = ring();
  Program good = table.program();
  auto search = GreedySearch::make(good);
  const Tokens beyond{4}, positions{0};
  const bool finished[] = {false};
  EXPECT_FALSE(search->run({.tokens = beyond, .positions = positions, .finished = finished}).ok());
  EXPECT_FALSE(search->run({.tokens = beyond, .positions = positions}).ok());
}

}  // namespace
}  // namespace tilewright::ops
