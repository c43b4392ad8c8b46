// RegionCheck: compares what each region of a running program wrote with what its nodes mean, by
// the graph's reference interpreter, on the very inputs that the region was given. Errors so do not
// add up from region to region: the first region beyond its bound is the one that is wrong.
//
// The bound is for the largest error of a region's outputs: the roundings on the way to one element
// (an accumulation over k counts k of them) times the largest magnitude on the way. It is made for
// wrong kernels, not for the last bit. The interpreter is slow: seconds for each token and 100
// million weights. Regions of other nodes than ours (external ones), and attention over a padded
// cache, which the interpreter does not know, are named and not compared.
//
// Not thread-safe; observes one run. Tested by tests/python/test_compare.py.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "graph/interpret.h"
#include "ops/program.h"

namespace tilewright::ops {

struct RegionResult {
  std::string name;    // the ops: "rms_norm", "linear+add"
  std::string kernel;  // the kernels that ran
  std::string reason;  // why it was not compared; empty: it was
  double error = 0;    // the largest of an output element; infinite for a NaN or another integer
  double bound = 0;
  std::string
      text;  // beyond its bound: a run case (graph/run_case.h); its outputs are the program's
  bool differs() const { return reason.empty() && !(error <= bound); }
};

class RegionCheck {
 public:
  // `constants` as given to compile(), with memory that is there; both must outlive the check.
  RegionCheck(const Program& program, const std::map<std::string, TensorView>& constants);

  // A StepObserver (program.h).
  void observe(std::size_t step, const Frame& frame);

  const std::vector<RegionResult>& results() const { return results_; }

 private:
  struct Region {
    std::size_t first_node, end_node, first_step, end_step;
  };
  struct Case {
    graph::Graph graph;
    std::map<graph::ValueId, graph::ValueId> mapped;  // the program's value -> the case's
    std::vector<graph::ValueId> outputs;              // of the program
    std::vector<graph::Argument> arguments;           // by parameter of the case
    graph::Constants constants;
  };

  void find_regions();
  bool readable(graph::ValueId value) const;
  std::vector<graph::ValueId> results_of(const Region& region) const;
  Result<Case> begin(const Region& region, const Frame& frame) const;
  Status add_operand(Case& run, graph::ValueId value, const Frame& frame) const;
  Result<graph::Tensor> read(graph::ValueId value, const Frame& frame) const;
  void finish(const Case& run, RegionResult& result, const Frame& frame) const;

  const Program& program_;
  const std::map<std::string, TensorView>& constants_;
  std::vector<Region> regions_;
  std::optional<Case> open_;
  std::vector<RegionResult> results_;
};

}  // namespace tilewright::ops
