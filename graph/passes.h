// The passes: pure functions from a graph to a graph, one file each in passes/, in the order of
// pipeline.cpp.
//
// Every rewrite checks types and shapes exactly and leaves alone what it does not recognise:
// correctness never depends on coverage. Structure is matched, never a model's name.
//
// Thread-safe. Tested by passes_test, filetests/passes.
#pragma once

#include "graph/graph.h"
#include "jit/base/target.h"

namespace tilewright::graph {

// Removes what does nothing, joins chains of views, computes equal values once, and gives linear
// layers one form.
Graph canonicalize(Graph graph, const Target& target);
// Joins concatenated constants into one, looking through elementwise ops (the rotary table's
// cat(f, f)).
Graph fold_constants(Graph graph, const Target& target);
// pow, mean, rsqrt, mul -> rms_norm.
Graph match_rms_norm(Graph graph, const Target& target);
// x * cos + rotate_half(x) * sin -> rope.
Graph match_rope(Graph graph, const Target& target);
// matmul, softmax, matmul -> attention; repeated keys and values -> native grouped heads.
Graph match_attention(Graph graph, const Target& target);
// The same with batch and heads merged, and a bias slope * position -> attention with slopes.
Graph match_alibi(Graph graph, const Target& target);
// attention over what a cache holds, under a causal mask -> attention over the cache.
Graph match_cached_attention(Graph graph, const Target& target);
// act(x @ gate.T) * (x @ up.T) -> gated_mlp_up.
Graph match_gated_mlp(Graph graph, const Target& target);
// Several linears of one input -> one linear of stacked weights, and slices.
Graph merge_projections(Graph graph, const Target& target);
// An activation or an addition after a linear becomes its epilogue.
Graph fuse_residual(Graph graph, const Target& target);
// Orders the nodes and numbers the regions: what becomes one program step.
Graph form_regions(Graph graph, const Target& target);

}  // namespace tilewright::graph
