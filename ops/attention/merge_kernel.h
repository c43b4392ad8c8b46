// The kernel that makes a token's attention of its parts (attention_kernel.h): weights are brought
// to the largest score of all parts, sums and outputs are added in the order of the parts, and the
// output is divided by the sum.
//
// A sink takes part here: a score per head that has no value.
//
// Tested by attention_test.
#pragma once

#include <cstdint>
#include <string>

#include "jit/vir/vir.h"
#include "ops/attention/attention_kernel.h"

namespace tilewright::ops {

// Argument slots; strides in bytes.
//   parts: the first part; the others follow at part_stride
//   output: of the group's first head; the others follow at output_head_stride
//   sinks: pointer to one f32 per head of the group
// Without parts, or if no key of any may be attended to, the output is zeros (ATen's safe softmax).
struct MergeArgs {
  enum Slot { parts, part_stride, part_count, output, output_head_stride, sinks, count };
};

// Of the spec, only lanes, group, head_dim, input and sinks are looked at.
std::string print_merge(const AttentionKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build_merge(const AttentionKernel& spec);
// The scalar reference, in double.
void reference_merge(const AttentionKernel& spec, const std::int64_t* args);

}  // namespace tilewright::ops
