// Definitions: on the way through a function's code, since where each register has been defined on
// every path to the point that the walk has reached.
//
// What a loop's body or one arm of an if defines may not have happened, so it does not count
// afterwards; what both arms define counts. The verifier asks whether a register is defined at all;
// liveness, whether since the beginning of the loops around: a value that is not comes from before
// the loop or from the turn before, so it lives in all of the loop.
//
// Instead of copies of the state, a list of changes, undone where their scope ends: the whole walk
// is linear in the code. Tested by vir_test, linear_scan_test.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace tilewright::jit::vir {

class Definitions {
 public:
  static constexpr int kNever = -1;

  explicit Definitions(std::size_t registers) : depth_(registers, kNever) {}

  // How many loops are open.
  int loops() const { return loops_; }
  // How many loops were around the point since which the register has been defined on every path;
  // kNever: none. Less than loops(): what is read here may come from outside of the next loop.
  int depth(std::size_t index) const { return depth_[index]; }
  bool defined(std::size_t index) const { return depth_[index] != kNever; }

  void define(std::size_t index) {
    if (depth_[index] == loops_) return;
    changes_.push_back({index, depth_[index]});
    depth_[index] = loops_;
  }

  // The structure ops; REQUIRES: they are nested as they must be.
  void begin_loop() {
    scopes_.push_back({changes_.size()});
    ++loops_;
  }
  void end_loop() {
    --loops_;
    forget(scopes_.back().first_arm);
    scopes_.pop_back();
  }
  void begin_if() { scopes_.push_back({changes_.size()}); }
  void begin_else() {
    Scope& scope = scopes_.back();
    undo(scope.first_arm);
    scope.second_arm = changes_.size();
  }
  void end_if() {
    const Scope scope = scopes_.back();
    scopes_.pop_back();
    if (scope.second_arm == kNone) return forget(scope.first_arm);
    // Of the first arm's changes those stay that the second arm made, too.
    const auto first = changes_.begin() + static_cast<std::ptrdiff_t>(scope.first_arm);
    const auto second = changes_.begin() + static_cast<std::ptrdiff_t>(scope.second_arm);
    const auto kept = std::remove_if(
        first, second, [&](const Change& change) { return depth_[change.index] != loops_; });
    undo(scope.second_arm);
    for (auto change = first; change != kept; ++change) depth_[change->index] = loops_;
    changes_.erase(kept, changes_.end());
  }

 private:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  struct Change {
    std::size_t index;
    int before;
  };
  // Where in `changes_` those of a loop's body or of an if's arms begin.
  struct Scope {
    std::size_t first_arm, second_arm = kNone;
  };

  void undo(std::size_t first) {
    for (std::size_t i = first; i < changes_.size(); ++i) {
      depth_[changes_[i].index] = changes_[i].before;
    }
  }
  void forget(std::size_t first) {
    undo(first);
    changes_.resize(first);
  }

  std::vector<int> depth_;
  std::vector<Change> changes_;  // of the scopes that are open, each register once in each
  std::vector<Scope> scopes_;
  int loops_ = 0;
};

}  // namespace tilewright::jit::vir
