// Packing of linear weights: see pack.h for the layout.
//
// Every layout is one transposition of 32-bit units: a unit is an f32, or a pair of neighbouring k
// of a 16-bit type, and a panel is [units along k][32 columns] of them. So one routine serves all
// types. It reads one cache line (16 units) of each of the 32 rows at a time and writes a linear
// run of 2 KiB, because a scalar gather along columns would run at a tenth of copy speed.
//
// Tested by pack_test.
#include "ops/gemm/pack.h"

#include <emmintrin.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "jit/base/round_up.h"
#include "ops/gemm/exact.h"
#include "ops/gemm/twelve_bits.h"

namespace tilewright::ops {
namespace {

constexpr std::int64_t kPanelColumns = 32;
constexpr std::int64_t kUnitBytes = 4;
constexpr std::int64_t kLineUnits = 16;  // units of a 64-byte cache line

// Units along k of a panel, with padding.
std::int64_t panel_units(std::int64_t k, graph::DataType dtype) {
  return dtype == graph::DataType::f32 ? k : round_up(k, 32) / 2;
}

// The source row of each column of a panel; null where the panel is padding.
using PanelRows = std::array<const std::byte*, kPanelColumns>;

const std::byte* stacked_row(std::span<const WeightBlock> blocks, std::int64_t row) {
  for (const WeightBlock& block : blocks) {
    if (row < block.rows) {
      return static_cast<const std::byte*>(block.data) + row * block.row_stride;
    }
    row -= block.rows;
  }
  return nullptr;
}

PanelRows panel_rows(std::span<const WeightBlock> blocks, bool gated, std::int64_t panel) {
  PanelRows rows;
  for (std::int64_t column = 0; column < kPanelColumns; ++column) {
    const auto index = static_cast<std::size_t>(column);
    if (gated) {
      constexpr std::int64_t half = kPanelColumns / 2;
      const auto block = static_cast<std::size_t>(column / half);
      rows[index] = stacked_row(blocks.subspan(block, 1), panel * half + column % half);
    } else {
      rows[index] = stacked_row(blocks, panel * kPanelColumns + column);
    }
  }
  return rows;
}

// Rows [first, first + kPanelColumns) of a [k, rows] block, as rows; fewer at the block's end.
std::unique_ptr<std::byte[]> gathered_rows(const WeightBlock& block, std::int64_t first,
                                           std::int64_t k, std::int64_t element_bytes) {
  const std::int64_t rows = std::min(kPanelColumns, block.rows - first);
  const auto size = static_cast<std::size_t>(element_bytes);
  std::unique_ptr<std::byte[]> copy(new std::byte[static_cast<std::size_t>(rows * k) * size]);
  for (std::int64_t i = 0; i < k; ++i) {
    const auto* from = static_cast<const std::byte*>(block.data) + i * block.row_stride;
    for (std::int64_t row = 0; row < rows; ++row) {
      std::memcpy(copy.get() + (row * k + i) * element_bytes, from + (first + row) * element_bytes,
                  size);
    }
  }
  return copy;
}

__m128 load_units(const std::byte* from) {
  return _mm_castsi128_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// out[unit][column] = rows[column][unit] for `units` (a multiple of 4) units from `byte_offset`.
void transpose_units(const PanelRows& rows, std::int64_t byte_offset, std::int64_t units,
                     float* out) {
  for (std::int64_t column = 0; column < kPanelColumns; column += 4) {
    const std::byte* const* row = rows.data() + column;
    for (std::int64_t unit = 0; unit < units; unit += 4) {
      const std::int64_t offset = byte_offset + unit * kUnitBytes;
      __m128 a = load_units(row[0] + offset), b = load_units(row[1] + offset);
      __m128 c = load_units(row[2] + offset), d = load_units(row[3] + offset);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* to = out + unit * kPanelColumns + column;
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + kPanelColumns, b);
      _mm_storeu_ps(to + 2 * kPanelColumns, c);
      _mm_storeu_ps(to + 3 * kPanelColumns, d);
    }
  }
}

// The last units of a panel: fewer than a line, the last pair perhaps half, the rest padding.
void transpose_tail(const PanelRows& rows, std::int64_t byte_offset, std::int64_t bytes,
                    std::int64_t units, float* out) {
  std::array<std::byte, kPanelColumns * kLineUnits * kUnitBytes> lines{};
  PanelRows copies;
  for (std::size_t column = 0; column < copies.size(); ++column) {
    std::byte* line = lines.data() + column * kLineUnits * kUnitBytes;
    if (bytes > 0) std::memcpy(line, rows[column] + byte_offset, static_cast<std::size_t>(bytes));
    copies[column] = line;
  }
  std::array<float, kPanelColumns * kLineUnits> transposed;
  transpose_units(copies, 0, kLineUnits, transposed.data());
  std::memcpy(out, transposed.data(), static_cast<std::size_t>(units * kPanelColumns * kUnitBytes));
}

void transpose_panel(PanelRows rows, std::int64_t row_bytes, std::int64_t units, float* out) {
  // Columns of padding read zeros; they are rare, so a whole row of them costs nothing that
  // matters.
  const std::size_t padding_bytes = std::find(rows.begin(), rows.end(), nullptr) == rows.end()
                                        ? 0
                                        : static_cast<std::size_t>(row_bytes);
  const std::unique_ptr<std::byte[]> zeros(new std::byte[padding_bytes]());
  std::replace(rows.begin(), rows.end(), static_cast<const std::byte*>(nullptr),
               static_cast<const std::byte*>(zeros.get()));
  constexpr std::int64_t line_bytes = kLineUnits * kUnitBytes;
  std::int64_t offset = 0;
  for (; offset + line_bytes <= row_bytes; offset += line_bytes) {
    transpose_units(rows, offset, kLineUnits, out + offset / kUnitBytes * kPanelColumns);
  }
  const std::int64_t done = offset / kUnitBytes;
  if (done < units) {
    transpose_tail(rows, offset, row_bytes - offset, units - done, out + done * kPanelColumns);
  }
}

// Replaces rows of f32 by their narrowed copies in `to`.
void narrow_rows(PanelRows& rows, std::int64_t k, graph::DataType dtype, std::uint16_t* to) {
  for (const std::byte*& row : rows) {
    if (row == nullptr) continue;
    narrow(dtype, {reinterpret_cast<const std::uint32_t*>(row), static_cast<std::size_t>(k)}, to);
    row = reinterpret_cast<const std::byte*>(to);
    to += k;
  }
}

}  // namespace

std::int64_t packed_bytes(std::int64_t n, std::int64_t k, graph::DataType dtype) {
  return round_up(n, kPanelColumns) * panel_units(k, dtype) * kUnitBytes;
}

void pack_panel(std::span<const WeightBlock> blocks, std::int64_t k, graph::DataType source,
                graph::DataType dtype, bool gated, std::int64_t panel, void* packed) {
  // Transposed blocks that are several fill whole panels: stacked experts.
  assert(!blocks[0].transposed || blocks.size() == 1 || blocks[0].rows % kPanelColumns == 0);
  assert(!gated || (blocks.size() == 2 && blocks[0].rows == blocks[1].rows));
  // The rows of the panel in the packed type: 64 KiB at k = 1024, so they stay in cache.
  std::vector<std::uint16_t> narrowed;
  std::unique_ptr<std::byte[]> gathered;
  PanelRows rows;
  if (blocks[0].transposed) {
    const std::int64_t row = panel * kPanelColumns;
    const WeightBlock& whole = blocks[static_cast<std::size_t>(row / blocks[0].rows)];
    const std::int64_t first = row % blocks[0].rows;
    gathered = gathered_rows(whole, first, k, graph::size_in_bytes(source));
    const WeightBlock block{gathered.get(), std::min(kPanelColumns, whole.rows - first),
                            k * graph::size_in_bytes(source)};
    rows = panel_rows(std::span(&block, 1), false, 0);
  } else {
    rows = panel_rows(blocks, gated, panel);
  }
  if (source != dtype) {
    narrowed.resize(static_cast<std::size_t>(kPanelColumns * k));
    narrow_rows(rows, k, dtype, narrowed.data());
  }
  transpose_panel(rows, k * graph::size_in_bytes(dtype), panel_units(k, dtype),
                  static_cast<float*>(packed));
}

void pack_panels(std::span<const WeightBlock> blocks, std::int64_t k, graph::DataType source,
                 graph::DataType dtype, bool gated, std::int64_t panel_begin,
                 std::int64_t panel_end, void* packed) {
  const std::int64_t panel_bytes = packed_bytes(kPanelColumns, k, dtype);
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    pack_panel(blocks, k, source, dtype, gated, panel,
               static_cast<std::byte*>(packed) + panel * panel_bytes);
  }
}

void unpack_row(const void* packed, std::int64_t row, std::int64_t k, PackedForm form,
                graph::DataType source, void* to) {
  const std::int64_t panel = row / kPanelColumns, column = row % kPanelColumns;
  // Not of 12 bits, where panels have no common size.
  const auto unit = [&](std::int64_t i) {
    return static_cast<const std::uint32_t*>(
        packed)[(panel * panel_units(k, form.dtype) + i) * kPanelColumns + column];
  };
  auto* words = static_cast<std::uint32_t*>(to);
  if (form.dtype == graph::DataType::f32) {
    for (std::int64_t i = 0; i < k; ++i) words[i] = unit(i);
    return;
  }
  std::vector<std::uint16_t> widened;
  auto* halves = static_cast<std::uint16_t*>(to);
  if (source != form.dtype) {
    widened.resize(static_cast<std::size_t>(k));
    halves = widened.data();
  }
  if (form.twelve_bits) {
    twelve_bits::unpack_column(static_cast<const std::byte*>(packed), panel, column, k, halves);
  } else {
    for (std::int64_t i = 0; i < k; ++i) {
      const std::uint32_t pair = unit(i / 2);
      halves[i] = static_cast<std::uint16_t>(i % 2 == 0 ? pair : pair >> 16);
    }
  }
  std::transform(widened.begin(), widened.end(), words,
                 [&](std::uint16_t bits) { return widen(form.dtype, bits); });
}

void unpack_block(const void* packed, std::span<const WeightBlock> blocks, std::size_t index,
                  std::int64_t k, PackedForm form, graph::DataType source, bool gated, void* to) {
  std::int64_t before = 0;
  for (std::size_t i = 0; i < index; ++i) before += blocks[i].rows;
  for (std::int64_t row = 0; row < blocks[index].rows; ++row) {
    constexpr std::int64_t half = kPanelColumns / 2;
    const std::int64_t place =
        gated ? row / half * kPanelColumns + row % half + half * static_cast<std::int64_t>(index)
              : before + row;
    auto* row_to = static_cast<std::byte*>(to) + row * k * graph::size_in_bytes(source);
    unpack_row(packed, place, k, form, source, row_to);
  }
}

}  // namespace tilewright::ops
