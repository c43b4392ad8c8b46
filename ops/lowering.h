// Lowering: the working state of compile(): values get layouts, regions get steps with tasks.
//
// Private to compile.cpp and lower_*.cpp, one file per family of ops. Methods that lower a node
// return an Error when the node has no kernel here; compile() then makes a host call of it, with
// that error as the visible reason.
//
// Tested by program_test.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "ops/compile.h"
#include "ops/layout.h"
#include "ops/program_state.h"

namespace tilewright::ops {

class Lowering {
 public:
  Lowering(const graph::Graph& graph, const std::map<std::string, TensorView>& constants,
           const Target& target, const CompileOptions& options,
           std::shared_ptr<KernelLibrary> kernels, std::shared_ptr<WeightStore> weights,
           const PackedCallback& packed);

  Result<Program> run();

 private:
  // --- compile.cpp: the walk over regions
  Status bind_constants() const;
  void bind_parameters();
  void find_forwarded_values();
  Status lower_region(std::span<const graph::NodeId> nodes);
  Status lower_node(const graph::Node& node);
  Status lower_view(const graph::Node& node);
  Status finish_outputs();
  // Empty: our kernels may run it. Otherwise why not.
  std::string disabled_reason(const graph::Node& node) const;

  // --- lower_rows.cpp
  Status lower_rows(std::span<const graph::NodeId> nodes);
  // --- lower_linear.cpp
  Status lower_linear(const graph::Node& node);
  Status lower_gated_mlp(const graph::Node& node);
  void add_kernels(LinearTask& task);
  void add_tiles(LinearTask& task, Arithmetic arithmetic);
  Status lower_expert_linear(const graph::Node& node);
  // Whether all weights may be read in place: packed ones would give the same bits.
  bool can_read_in_place() const;
  Status lower_contraction(const graph::Node& node, Epilogue epilogue,
                           const std::vector<graph::ValueId>& weights, graph::ValueId bias,
                           graph::ValueId residual);
  // --- lower_matmul.cpp
  Status lower_matmul(const graph::Node& node);
  // --- lower_attention.cpp
  Status lower_rope(const graph::Node& node);
  Status lower_append(const graph::Node& node);
  Status lower_attention(const graph::Node& node);
  // --- lower_data.cpp
  Status lower_embedding(const graph::Node& node);
  Status lower_packed_embedding(const graph::Node& node);
  // Whether the table is also the weight of a later linear layer, in whose packed values rows must
  // be looked up. Of an earlier one the memory may be gone by now.
  bool is_tied(const graph::Node& embedding) const;
  // Gives the weight to the embeddings that wait for this table.
  void serve_lookups(const void* table, const std::shared_ptr<const PackedWeight>& weight);
  Status lower_cat(const graph::Node& node);
  Status lower_contiguous(const graph::Node& node);
  Status lower_arange(const graph::Node& node);
  Status lower_integers(const graph::Node& node);
  Status lower_gather(const graph::Node& node);
  Status lower_cumsum(const graph::Node& node);
  Status lower_largest(const graph::Node& node);
  // --- lower_host.cpp
  Status lower_host(const graph::Node& node, const std::string& reason);
  Status host_call(const graph::Node& node, std::span<const Layout> outputs,
                   std::span<const graph::Type> types, const std::string& reason);

  // --- values and memory
  const graph::Type& type(graph::ValueId value) const { return graph_.type(value); }
  Layout layout(graph::ValueId value);
  void set_layout(graph::ValueId value, Layout layout);
  // Where a node must write its result.
  Layout destination(graph::ValueId value);
  Layout row_major_arena(const graph::Shape& shape, graph::DataType dtype);
  int add_buffer(Buffer buffer);
  int constant_buffer(const void* data, graph::DataType dtype);
  Result<Layout> constant_layout(const graph::Node& node);
  std::vector<std::string> constant_sources(graph::ValueId value) const;  // empty: not a constant
  void count_readers();
  bool is_reshaped_constant(const graph::Node& node) const;
  // `source` if its last axis has stride 1, else a copy of it (a step of its own).
  Layout unit_columns(const Layout& source, graph::DataType dtype);
  Layout contiguous(const Layout& source, graph::DataType dtype);
  // As one loop of rows over all axes but the last, whose stride is 1; copied if that cannot be.
  struct Matrix {
    Operand operand;
    graph::Dim rows, stride;
    int buffer;
  };
  std::optional<Matrix> matrix(const Layout& source, graph::DataType dtype);

  Operand operand(const Layout& layout, graph::DataType dtype);
  DimIndex dim(const graph::Dim& value) { return state_->dims.intern(value); }
  HeadStrides head_strides(const Layout& layout);
  // Over the first `axes` axes, which the layouts share.
  std::vector<TaskLoop> task_loops(std::span<const Layout> layouts, std::size_t axes);
  void copy(const Layout& from, graph::DataType from_type, const Layout& to,
            graph::DataType to_type);

  // --- steps
  // A buffer, or a cache as cache_token(i).
  static int cache_token(int cache) { return -2 - cache; }
  void add_task(Task task, const std::vector<int>& reads, const std::vector<int>& writes,
                const graph::Dim& work, const std::string& kernel);
  void begin_region(std::string name);

  const graph::Graph& graph_;
  const std::map<std::string, TensorView>& constants_;
  const Target& target_;
  const CompileOptions& options_;
  WeightForms weight_forms_;
  bool in_place_ = false;  // weights that are not packed yet stay where they are
  std::shared_ptr<KernelLibrary> kernels_;
  std::shared_ptr<WeightStore> weights_;
  std::unique_ptr<Program::State> state_;

  std::vector<std::optional<Layout>> layouts_;   // by ValueId
  std::map<graph::ValueId, int> cache_indices_;  // cache values: which cache parameter
  std::map<const void*, int> constant_buffers_;
  std::set<std::string> packed_, read_in_place_;  // sources of constants
  std::map<const void*, int> readers_;            // nodes that read the memory of a source
  // Tasks of embeddings in packed weights, until a linear layer has packed their table. Packed with
  // the embedding already, it would be in memory twice while all other weights are packed.
  struct Lookup {
    const void* table;
    std::size_t step, task;
  };
  std::vector<Lookup> lookups_;
  struct Forward {
    graph::NodeId consumer;  // a cat or a kv_append
    int operand;
  };
  std::map<graph::ValueId, Forward> forwarded_;  // written straight into its only consumer
  std::vector<bool> output_taken_;               // outputs written by their producers
  const PackedCallback& packed_callback_;

  std::string region_name_;
  bool new_step_ = true;
  std::set<int> step_writes_;
  graph::Dim step_work_;
};

// Floating-point operations of a node, as explain() counts them.
graph::Dim work_of(const graph::Graph& graph, const graph::Node& node);

}  // namespace tilewright::ops
