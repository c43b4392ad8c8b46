// See greedy_search.h.
//
// Tested by greedy_search_test.
#include "ops/greedy_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/largest_kernel.h"
#include "ops/program_state.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

bool is_token_matrix(const TensorParameter& input) {
  return input.dtype == DataType::i64 && input.shape.size() == 2;
}

// The first of the largest of `count` values from `row` on, a NaN being the largest.
std::int64_t first_largest(DataType type, const char* row, std::int64_t count) {
  std::int64_t found = 0;
  double most = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = read_scalar(type, row + i * size_in_bytes(type));
    if (std::isnan(value)) return i;
    if (value > most) {
      most = value;
      found = i;
    }
  }
  return found;
}

}  // namespace

Result<GreedySearch> GreedySearch::make(Program& program) {
  const Program::State& state = program.state();
  const bool takes_tokens = state.inputs.size() == 2 && is_token_matrix(state.inputs[0]) &&
                            is_token_matrix(state.inputs[1]);
  if (!takes_tokens || state.outputs.size() != 1 || state.outputs[0].shape.size() != 3) {
    return Error{"the program does not take tokens and positions to logits"};
  }
  const TensorOutput& logits = state.outputs[0];
  const bool floats = logits.dtype == DataType::f32 || logits.dtype == DataType::bf16 ||
                      logits.dtype == DataType::f16;
  if (!floats || !logits.shape[2].is_constant() || logits.shape[2].constant() == 0) {
    return Error{"the program's logits are of an unknown form"};
  }
  const bool all = logits.shape[1] == state.inputs[0].shape[1];
  const LargestKernel spec{state.kernels->target().lanes(), logits.dtype};
  const Kernel* kernel = state.kernels->request(print(spec), [spec] { return build(spec); });
  if (Status made = state.kernels->flush(); !made) return made.error();
  return GreedySearch(program, kernel, logits.dtype, logits.shape[2].constant(), all);
}

std::int64_t GreedySearch::largest(const char* row) {
  const std::int64_t blocks = vocabulary_ / kLargestBlock;
  blocks_.resize(static_cast<std::size_t>(blocks));
  std::int64_t arguments[LargestArgs::count] = {};
  arguments[LargestArgs::x] = argument(row);
  arguments[LargestArgs::blocks] = blocks;
  arguments[LargestArgs::largest] = argument(blocks_.data());
  kernel_->function(arguments);

  const std::int64_t bytes = size_in_bytes(logits_);
  const auto most = std::ranges::max_element(blocks_);
  const std::int64_t tail = blocks * kLargestBlock;
  // Infinity may stand for a NaN, which comes first wherever it is.
  if (blocks == 0 || *most == std::numeric_limits<float>::infinity()) {
    return first_largest(logits_, row, vocabulary_);
  }
  const std::int64_t block = (most - blocks_.begin()) * kLargestBlock;
  const std::int64_t here = block + first_largest(logits_, row + block * bytes, kLargestBlock);
  if (tail == vocabulary_) return here;
  const std::int64_t there = tail + first_largest(logits_, row + tail * bytes, vocabulary_ - tail);
  const double last = read_scalar(logits_, row + there * bytes);
  return std::isnan(last) || last > static_cast<double>(*most) ? there : here;
}

// What is no token of the vocabulary never comes.
void GreedySearch::forbid(std::span<const std::int64_t> tokens, char* row) const {
  for (std::int64_t token : tokens) {
    if (token < 0 || token >= vocabulary_) continue;
    write_scalar(logits_, row + token * size_in_bytes(logits_),
                 -std::numeric_limits<double>::infinity());
  }
}

// Logits of [sequences][tokens of one] into memory_.
Status GreedySearch::step(const GreedyArguments& arguments, std::span<const std::int64_t> tokens,
                          std::span<const std::int64_t> positions, std::int64_t sequences) {
  const auto count = static_cast<std::int64_t>(tokens.size()), rows = count / sequences;
  // Only ever larger: a vector that shrinks and grows with the guesses is filled anew each time.
  const auto bytes = static_cast<std::size_t>(count * vocabulary_ * size_in_bytes(logits_));
  if (memory_.size() < bytes) memory_.resize(bytes);
  // The program only reads its inputs.
  const auto input = [&](std::span<const std::int64_t> values) {
    return TensorView{const_cast<std::int64_t*>(values.data()), DataType::i64, {sequences, rows}};
  };
  const std::vector<TensorView> inputs{input(tokens), input(positions)};
  const std::vector<TensorView> outputs{{memory_.data(), logits_, {sequences, rows, vocabulary_}}};
  RunArguments run;
  run.inputs = inputs;
  run.caches = arguments.caches;
  run.outputs = outputs;
  run.host = arguments.host;
  run.threads = arguments.threads;
  run.phase = Phase::decode;
  return program_->run(run);
}

Result<std::vector<std::int64_t>> GreedySearch::run(const GreedyArguments& arguments) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto sequences = static_cast<std::int64_t>(arguments.tokens.size());
  if (arguments.positions.size() != arguments.tokens.size() ||
      arguments.finished.size() != arguments.tokens.size()) {
    return Error{"tokens, positions and finished differ in length"};
  }
  PromptLookup* lookup = arguments.lookup;
  if (lookup != nullptr && (sequences != 1 || !all_logits_)) {
    return Error{"guesses are for one sequence, and a program of all tokens' logits"};
  }
  const std::int64_t most_guesses = program_->alike_tokens() - 1;
  std::vector<std::int64_t> tokens(arguments.tokens.begin(), arguments.tokens.end());
  std::vector<std::int64_t> positions(arguments.positions.begin(), arguments.positions.end());
  std::vector<bool> finished(arguments.finished.begin(), arguments.finished.end());
  const std::int64_t row_bytes = vocabulary_ * size_in_bytes(logits_);

  std::vector<std::int64_t> found;
  const auto most = std::max<std::int64_t>(arguments.most_tokens, 1);
  for (std::int64_t taken = 0; taken < most;) {
    if (taken > 0 && Clock::now() - begin >= arguments.budget) break;
    std::vector<std::int64_t> guesses;
    if (lookup != nullptr) guesses = lookup->guess(std::min(most_guesses, most - taken - 1));
    const auto guessed = static_cast<std::int64_t>(guesses.size());
    std::vector<std::int64_t> given = tokens, places = positions;
    for (std::int64_t guess : guesses) {
      given.push_back(guess);
      places.push_back(places.back() + 1);
    }
    if (Status done = step(arguments, given, places, sequences); !done) {
      if (taken == 0) return done.error();
      break;  // the caches are as they were, and the caller's next step will say why
    }
    std::int64_t right = 0;
    for (bool goes_on = true; goes_on;) {
      for (std::int64_t i = 0; i < sequences; ++i) {
        const auto at = static_cast<std::size_t>(i);
        char* row = memory_.data() + (i + right) * row_bytes;  // guesses are of one sequence
        if (taken + right < arguments.least_tokens) forbid(arguments.end_tokens, row);
        tokens[at] = finished[at] ? arguments.pad : largest(row);
        positions[at] += 1;
        found.push_back(tokens[at]);
      }
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (std::ranges::count(arguments.end_tokens, tokens[i]) != 0) finished[i] = true;
      }
      if (lookup != nullptr) lookup->append(tokens[0]);
      goes_on = right < guessed && tokens[0] == guesses[static_cast<std::size_t>(right)] &&
                std::ranges::count(finished, false) != 0;
      if (goes_on) ++right;
    }
    taken += 1 + right;
    if (right < guessed) {
      for (KvCache* cache : arguments.caches) cache->truncate(cache->length() - guessed + right);
    }
    if (lookup != nullptr) lookup->learn(guessed, right);
    if (std::ranges::count(finished, false) == 0) break;
  }
  return found;
}

}  // namespace tilewright::ops
