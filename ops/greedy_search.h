// GreedySearch: steps of decode whose tokens are the largest logits, one after another, without
// their caller between them.
//
// Why: what Python and torch do between two steps cost 0.9 of 13.6 ms per token at 135 M
// parameters, most of it waiting for memory that the weights swept out of the caches.
//
// With a PromptLookup a step also has tokens that are guessed; those that turn out to be wrong are
// taken back from the caches. The tokens are those of steps of one token, because a step has no
// more than Program::alike_tokens() says.
//
// Not thread-safe, as its program. Tested by greedy_search_test and
// tests/python/test_generation.py.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "jit/base/result.h"
#include "ops/kernel_library.h"
#include "ops/program.h"
#include "ops/prompt_lookup.h"

namespace tilewright::ops {

struct GreedyArguments {
  std::span<const std::int64_t> tokens = {};     // [sequences] of the first step
  std::span<const std::int64_t> positions = {};  // [sequences] of these tokens
  std::span<KvCache* const> caches = {};
  std::span<const std::int64_t> end_tokens = {};  // a sequence is finished behind one of these
  std::span<const bool> finished = {};            // [sequences]: from the beginning
  std::int64_t pad = 0;                           // the tokens of finished sequences
  std::int64_t least_tokens = 0;  // of a sequence: as many come before an end token may
  // After either of them no other step begins; there is always one.
  std::int64_t most_tokens = 1;  // of a sequence
  std::chrono::nanoseconds budget{0};
  const HostFunction* host = nullptr;
  int threads = 1;
  PromptLookup* lookup = nullptr;  // whose text ends with the token of the only sequence
};

class GreedySearch {
 public:
  // Error: the program is no step of decode: (tokens, positions: i64[b, s]) -> logits[b, s,
  // vocabulary] as f32, bf16 or f16. REQUIRES: the program outlives it
  static Result<GreedySearch> make(Program& program);

  // The tokens that follow, [tokens][sequences]. Ends behind the one that finishes the last
  // sequence. Ties go to the first; a NaN counts as the largest, as in torch.argmax. Error: what
  // the first step says; a later one that fails only ends the search. With a lookup also: several
  // sequences, or a program that gives logits of the last token only.
  Result<std::vector<std::int64_t>> run(const GreedyArguments& arguments);

 private:
  GreedySearch(Program& program, const Kernel* kernel, graph::DataType logits,
               std::int64_t vocabulary, bool all_logits)
      : program_(&program),
        kernel_(kernel),
        logits_(logits),
        vocabulary_(vocabulary),
        all_logits_(all_logits) {}
  std::int64_t largest(const char* row);
  void forbid(std::span<const std::int64_t> tokens, char* row) const;
  Status step(const GreedyArguments& arguments, std::span<const std::int64_t> tokens,
              std::span<const std::int64_t> positions, std::int64_t sequences);

  Program* program_;
  const Kernel* kernel_;
  graph::DataType logits_;
  std::int64_t vocabulary_;
  bool all_logits_;           // of all tokens, not of the last
  std::vector<char> memory_;  // of a step's logits
  std::vector<float> blocks_;
};

}  // namespace tilewright::ops
