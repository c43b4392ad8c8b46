// Runs a linear task: which rows and panels of the weight meet when.
//
// Threads share the panels, so each weight is read by one core. Many rows are cut into chunks whose
// x stays in cache while the panels pass by. A chunk's x is packed first: copied, in the kernel's
// type, into the order in which the kernel reads it: all rows' first stretch, all rows' second ...,
// and within a stretch, if the blocks are many, a piece of each row of a block after the other
// (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", section 4). In
// place, rows whose stride is a multiple of a page share few sets of L1, and 16-bit values are
// widened for every panel anew: they are packed even if they are few. Threads share the packing of
// many rows, too, and meet before and after; a few are cheaper to copy than to wait for. Of a
// weight in place a thread packs a panel into its scratch before it multiplies by it. The bits
// of y do not depend on any of this, but on whether the rows are so many that tiles multiply them
// (gemm/arithmetic.h).
//
// Tested by program_test, task_test, in_place_test and shared_packing_test.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/gemm/tile_kernel.h"
#include "ops/scratch.h"
#include "ops/task.h"

namespace tilewright::ops {

// One thread's share.
void run(const LinearTask& task, const Frame& frame, int thread, int threads);

// Rows of a chunk when `rows` are cut evenly, and whether the x of chunks is packed.
std::int64_t chunk_rows(const LinearTask& task, std::int64_t rows);
bool packs(const LinearTask& task, std::int64_t rows);

// Of a chunk whose x is packed: how many of the first rows lie in pieces, which `many` computes.
inline std::int64_t rows_in_pieces(const LinearTask& task, std::int64_t rows) {
  const std::int64_t blocks = rows / task.many.rows;
  return blocks >= task.many_blocks && !task.experts ? blocks * task.many.rows : 0;
}

// The variant whose blocks are as many as the largest one needs, and alike: 16 rows are twice 8,
// where at most 12 fit a block. Or null.
template <class Task>
auto* even_variant(Task& task, std::int64_t rows) {
  const std::int64_t most = task.variants.front().rows, blocks = (rows + most - 1) / most;
  const auto found = std::ranges::find_if(
      task.variants, [&](const auto& variant) { return variant.rows * blocks == rows; });
  return found == task.variants.end() ? nullptr : &*found;
}

// The kernel of `rows` rows that do not lie in pieces: one for all of them, because a second one
// would read the weights again, from L2. Not of experts, who get any number of rows: null if there
// is no such kernel.
template <class Task>
auto* whole_variant(Task& task, std::int64_t rows) {
  if (auto* even = even_variant(task, rows)) return even;
  const auto largest = std::ranges::find_if(
      task.variants, [&](const auto& variant) { return variant.rows <= rows; });
  const std::int64_t block = largest->rows;
  if (rows % block == 0) return &*largest;
  const auto found = std::ranges::find_if(task.with_rest, [&](const auto& variant) {
    return variant.rows == block && variant.rest == rows % block;
  });
  return found == task.with_rest.end() ? nullptr : &*found;
}

// Calls part(variant, first row, blocks of variant.rows rows) for parts that cover `rows` rows of
// a chunk, whose x is packed or not.
template <class Task, class Part>
void for_row_blocks(Task& task, std::int64_t rows, bool packed, Part&& part) {
  std::int64_t first = packed ? rows_in_pieces(task, rows) : 0;
  if (first > 0) part(task.many, std::int64_t{0}, first / task.many.rows);
  if (first == rows) return;
  if (auto* whole = whole_variant(task, rows - first)) {
    return part(*whole, first, (rows - first) / whole->rows);
  }
  for (auto& variant : task.variants) {
    const std::int64_t blocks = (rows - first) / variant.rows;
    if (blocks > 0) part(variant, first, blocks);
    first += blocks * variant.rows;
  }
}

// Whether that many rows are multiplied by tiles.
bool uses_tiles(const LinearTask& task, std::int64_t rows);
// As chunk_rows, of tiles.
std::int64_t tile_chunk_rows(const LinearTask& task, std::int64_t rows);

// Calls part(index of the variant, first row, rows) for pieces that cover `rows` rows of a chunk;
// the last piece need not fill its last block.
template <class Part>
void for_tile_blocks(std::int64_t rows, Part&& part) {
  constexpr std::int64_t block = 2 * kTileRows;
  const std::int64_t rest = rows % block, few = rest > kTileRows ? 0 : rest;
  if (rows > few) part(std::size_t{0}, std::int64_t{0}, rows - few);
  if (few > 0) part(std::size_t{1}, rows - few, few);
}

// Calls visit(variant) for each kernel with vectors that `rows` rows may need.
template <class Task, class Visit>
void for_needed_vectors(Task& task, std::int64_t rows, Visit&& visit) {
  if (task.experts) {  // an expert may get any number of the rows
    for (auto& variant : task.variants) {
      if (variant.rows <= rows) visit(variant);
    }
    return;
  }
  const std::int64_t chunk = chunk_rows(task, rows);
  const bool packed = packs(task, rows);
  for (std::int64_t part : {std::min(chunk, rows), rows % chunk}) {
    for_row_blocks(task, part, packed,
                   [&](auto& variant, std::int64_t, std::int64_t) { visit(variant); });
  }
}

// Calls visit(variant) for each kernel that a run with `rows` rows may call: of fp32 by tiles also
// those for what is not in their range.
template <class Task, class Visit>
void for_needed_variants(Task& task, std::int64_t rows, Visit&& visit) {
  if (!uses_tiles(task, rows)) return for_needed_vectors(task, rows, visit);
  const std::int64_t chunk = tile_chunk_rows(task, rows);
  for (std::int64_t part : {std::min(chunk, rows), rows % chunk}) {
    for_tile_blocks(part, [&](std::size_t index, std::int64_t, std::int64_t) {
      visit(task.tiles->variants[index]);
    });
    if (task.tiles->arithmetic != Arithmetic::split_tiles) continue;
    if (part > 0) for_needed_vectors(task, part, visit);
  }
}

// Calls visit(variant) for each kernel that any run may call.
template <class Visit>
void for_all_variants(LinearTask& task, Visit&& visit) {
  for (LinearTask::Variant& variant : task.variants) visit(variant);
  for (LinearTask::Variant& variant : task.with_rest) visit(variant);
  if (!task.experts) visit(task.many);
  if (!task.tiles) return;
  for (LinearTask::Variant& variant : task.tiles->variants) visit(variant);
}

// Partial sums and packed x, or the gathered rows of one expert.
ScratchSizes scratch_of(const LinearTask& task, const Frame& frame);

}  // namespace tilewright::ops
