// The matmul kernel's loops: blocks of rows, strips of columns, k. See matmul_kernel.h.
//
// Tested by matmul_test.
#include "ops/gemm/matmul_kernel.h"

#include <fmt/format.h>

#include <bit>
#include <vector>

#include "jit/vir/builder.h"
#include "ops/columns.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Builder;
using jit::vir::Reg;

constexpr int kRowsPerPointer = 3;  // one address register and an index of one stride, times 1 or 2
constexpr int kSingleRowVectors = 4;  // a single row has no other chains to overlap
constexpr int kTransposedRows = 3;    // 3 rows x 4 columns: 12 accumulators for 7 loads
constexpr int kTransposedColumns = 4;

int log2_of(std::int64_t power) { return std::countr_zero(static_cast<std::uint64_t>(power)); }

class MatmulBuilder {
 public:
  explicit MatmulBuilder(const MatmulKernel& spec)
      : spec_(spec), b_("matmul", spec.lanes, MatmulArgs::count) {
    const bool masked =
        has_masked_moves(spec.input, spec.lanes) && has_masked_moves(spec.output, spec.lanes);
    tail_ = masked ? Block::Part::masked : Block::Part::single;
  }

  jit::vir::Function run() && {
    x_row_ = b_.arg(MatmulArgs::x);
    y_row_ = b_.arg(MatmulArgs::y);
    each_rows(MatmulArgs::block_count, static_cast<int>(block_rows(spec_)));
    each_rows(MatmulArgs::single_rows, 1);
    return std::move(b_).finish();
  }

 private:
  using Accumulators = std::vector<std::vector<Reg>>;  // [row][vector or column]

  int input_bytes() const { return graph::size_in_bytes(spec_.input); }

  void each_rows(MatmulArgs::Slot turns, int rows) {
    rows_ = rows;
    b_.loop(b_.arg(turns), [&] {
      spec_.transposed ? emit_columns_of_rows() : emit_strips();
      b_.add_to(x_row_, b_.mul(b_.arg(MatmulArgs::x_row_stride), rows));
      b_.add_to(y_row_, b_.mul(b_.arg(MatmulArgs::y_row_stride), rows));
    });
  }

  Accumulators zeros(int columns) {
    Accumulators list(static_cast<std::size_t>(rows_));
    for (auto& row : list) {
      for (int j = 0; j < columns; ++j) row.push_back(b_.zero());
    }
    return list;
  }

  // Pointers to rows 0, 3, 6, 9 of the block.
  void point_at_rows() {
    x_ = {b_.copy(x_row_)};
    x_stride_ = b_.arg(MatmulArgs::x_row_stride);
    while (static_cast<int>(x_.size()) * kRowsPerPointer < rows_) {
      x_.push_back(b_.add(x_.back(), b_.mul(x_stride_, kRowsPerPointer)));
    }
  }

  jit::vir::Address x_address(int row) {
    Reg pointer = x_[static_cast<std::size_t>(row / kRowsPerPointer)];
    const int strides = row % kRowsPerPointer;
    return strides == 0 ? b_.at(pointer) : b_.at(pointer, x_stride_, strides);
  }

  // --- w by rows: strips of columns, all of k for each

  void emit_strips() {
    const int vectors = rows_ == 1 ? kSingleRowVectors : 1;
    Reg columns = b_.arg(MatmulArgs::columns);
    column_ = b_.constant(0);
    b_.loop(b_.shift_right(columns, log2_of(vectors * b_.lanes())), [&] { emit_vectors(vectors); });
    if (vectors > 1) {
      Reg rest = b_.bit_and(b_.shift_right(columns, log2_of(b_.lanes())), vectors - 1);
      b_.loop(rest, [&] { emit_vectors(1); });
    }
    Reg remaining = b_.bit_and(columns, b_.lanes() - 1);
    b_.if_nonzero(remaining, [&] {
      if (tail_ == Block::Part::masked) {
        return emit_strip({{tail_, column_, 0, b_.tail_mask(remaining), 0}});
      }
      Reg mask = b_.tail_mask(b_.constant(1));
      b_.loop(remaining, [&] {
        emit_strip({{tail_, column_, 0, mask, 0}});
        b_.add_to(column_, 1);
      });
    });
  }

  void emit_vectors(int vectors) {
    std::vector<Block> blocks;
    for (int i = 0; i < vectors; ++i) {
      blocks.push_back({Block::Part::vector, column_, i * b_.lanes(), {}, i});
    }
    emit_strip(blocks);
    b_.add_to(column_, vectors * b_.lanes());
  }

  void emit_strip(const std::vector<Block>& blocks) {
    const int width = static_cast<int>(blocks.size());
    const Accumulators totals = zeros(width);
    w_ = b_.arg(MatmulArgs::w);
    point_at_rows();
    Reg depth = b_.arg(MatmulArgs::depth);
    const std::int64_t chain = partial_sum_length();
    b_.loop(b_.shift_right(depth, log2_of(chain)),
            [&] { add_chain(totals, blocks, b_.constant(chain)); });
    add_chain(totals, blocks, b_.bit_and(depth, chain - 1));
    Reg y = b_.copy(y_row_);
    for (const std::vector<Reg>& row : totals) {
      for (std::size_t j = 0; j < blocks.size(); ++j) store(b_, spec_.output, y, blocks[j], row[j]);
      b_.add_to(y, b_.arg(MatmulArgs::y_row_stride));
    }
  }

  // The products of the next `count` of k.
  void add_chain(const Accumulators& totals, const std::vector<Block>& blocks, Reg count) {
    const Accumulators sums = zeros(static_cast<int>(blocks.size()));
    b_.loop(count, [&] {
      std::vector<Reg> w;
      for (const Block& block : blocks) w.push_back(load(b_, spec_.input, w_, block));
      for (std::size_t row = 0; row < sums.size(); ++row) {
        Reg x = b_.broadcast(load_element(spec_.input), x_address(static_cast<int>(row)));
        for (std::size_t j = 0; j < w.size(); ++j) b_.fma(sums[row][j], x, w[j]);
      }
      b_.add_to(w_, b_.arg(MatmulArgs::w_row_stride));
      for (Reg pointer : x_) b_.add_to(pointer, input_bytes());
    });
    Reg one = b_.splat(1.0f);
    for (std::size_t row = 0; row < sums.size(); ++row) {
      for (std::size_t j = 0; j < blocks.size(); ++j) b_.fma(totals[row][j], one, sums[row][j]);
    }
  }

  // The first of `count` rows, and the others.
  std::vector<Reg> pointers(Reg first, Reg stride, int count) {
    std::vector<Reg> list{first};
    while (static_cast<int>(list.size()) < count) list.push_back(b_.add(list.back(), stride));
    return list;
  }

  // --- w by columns: dot products, several at a time

  void emit_columns_of_rows() {
    Reg columns = b_.arg(MatmulArgs::columns);
    w_column_ = b_.arg(MatmulArgs::w);
    y_column_ = b_.copy(y_row_);
    b_.loop(b_.shift_right(columns, log2_of(kTransposedColumns)),
            [&] { emit_dots(kTransposedColumns); });
    b_.loop(b_.bit_and(columns, kTransposedColumns - 1), [&] { emit_dots(1); });
  }

  void emit_dots(int columns) {
    const Accumulators sums = zeros(columns);
    const std::vector<Reg> x_rows = pointers(x_row_, b_.arg(MatmulArgs::x_row_stride), rows_);
    const std::vector<Reg> w_rows = pointers(w_column_, b_.arg(MatmulArgs::w_row_stride), columns);
    for_columns(b_, {.count = b_.arg(MatmulArgs::depth)}, 1, tail_, [&](const Block& block) {
      std::vector<Reg> x;
      for (Reg row : x_rows) x.push_back(load(b_, spec_.input, row, block));
      for (std::size_t column = 0; column < w_rows.size(); ++column) {
        Reg w = load(b_, spec_.input, w_rows[column], block);
        for (std::size_t row = 0; row < x.size(); ++row) b_.fma(sums[row][column], x[row], w);
      }
    });
    Reg mask = b_.tail_mask(b_.constant(1));
    Reg y = b_.copy(y_column_);
    for (const std::vector<Reg>& row : sums) {
      for (int column = 0; column < columns; ++column) {
        store(b_, spec_.output, y, {Block::Part::single, {}, column, mask, 0},
              b_.reduce_add(row[static_cast<std::size_t>(column)]));
      }
      b_.add_to(y, b_.arg(MatmulArgs::y_row_stride));
    }
    b_.add_to(w_column_, b_.mul(b_.arg(MatmulArgs::w_row_stride), columns));
    b_.add_to(y_column_, columns * graph::size_in_bytes(spec_.output));
  }

  const MatmulKernel& spec_;
  Builder b_;
  Block::Part tail_;
  int rows_ = 1;        // of the block being computed
  Reg x_row_, y_row_;   // the block's first row
  std::vector<Reg> x_;  // by rows: rows 0, 3, 6, 9 of the block, moved along k
  Reg x_stride_;
  Reg w_, column_;           // by rows: w at k; elements to the strip
  Reg w_column_, y_column_;  // transposed: the first of the columns
};

bool one_of(DataType type) {
  return type == DataType::f32 || type == DataType::bf16 || type == DataType::f16;
}

}  // namespace

std::int64_t block_rows(const MatmulKernel& spec) {
  return spec.transposed ? kTransposedRows : max_rows(spec.lanes);
}

std::string print(const MatmulKernel& spec) {
  return fmt::format("matmul lanes={} input={} output={}{}", spec.lanes, graph::name(spec.input),
                     graph::name(spec.output), spec.transposed ? " transposed" : "");
}

Status supported(const MatmulKernel& spec) {
  if (spec.lanes != 8 && spec.lanes != 16) return Error{fmt::format("{} lanes", spec.lanes)};
  for (DataType type : {spec.input, spec.output}) {
    if (!one_of(type)) return Error{fmt::format("matmul in {}", graph::name(type))};
  }
  return {};
}

jit::vir::Function build(const MatmulKernel& spec) { return MatmulBuilder(spec).run(); }

void reference(const MatmulKernel& spec, const std::int64_t* args) {
  const std::int64_t rows =
      args[MatmulArgs::block_count] * block_rows(spec) + args[MatmulArgs::single_rows];
  const std::int64_t bytes = graph::size_in_bytes(spec.input);
  const auto* x = reinterpret_cast<const char*>(args[MatmulArgs::x]);
  const auto* w = reinterpret_cast<const char*>(args[MatmulArgs::w]);
  auto* y = reinterpret_cast<char*>(args[MatmulArgs::y]);
  const std::int64_t k_bytes = spec.transposed ? bytes : args[MatmulArgs::w_row_stride];
  const std::int64_t column_bytes = spec.transposed ? args[MatmulArgs::w_row_stride] : bytes;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < args[MatmulArgs::columns]; ++column) {
      double sum = 0;
      for (std::int64_t k = 0; k < args[MatmulArgs::depth]; ++k) {
        sum += read_scalar(spec.input, x + row * args[MatmulArgs::x_row_stride] + k * bytes) *
               read_scalar(spec.input, w + k * k_bytes + column * column_bytes);
      }
      write_scalar(
          spec.output,
          y + row * args[MatmulArgs::y_row_stride] + column * graph::size_in_bytes(spec.output),
          sum);
    }
  }
}

}  // namespace tilewright::ops
