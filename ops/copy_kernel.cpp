// The copy and embedding kernels: rows of elements moved, converted between floating types or,
// for equal types of any size, as bytes.
//
// Tested by rope_kernel_test.
#include <fmt/format.h>

#include "jit/vir/builder.h"
#include "ops/columns.h"
#include "ops/rope_kernel.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr int kUnroll = 4;

// Copies rows of one length.
class RowCopy {
 public:
  RowCopy(Builder& builder, const CopyKernel& spec, Reg columns)
      : b_(builder), spec_(spec), columns_(columns) {
    if (spec.input != spec.output) return;
    const int bytes = size_in_bytes(spec.input);
    words_ = bytes >= 4 ? b_.mul(columns, bytes / 4) : b_.shift_right(columns, bytes == 2 ? 1 : 2);
  }

  void emit(Reg x, Reg y) { spec_.input == spec_.output ? move(x, y) : convert(x, y); }

 private:
  void convert(Reg x, Reg y) {
    const bool masked =
        has_masked_moves(spec_.input, spec_.lanes) && has_masked_moves(spec_.output, spec_.lanes);
    for_columns(b_, {.count = columns_}, kUnroll,
                masked ? Block::Part::masked : Block::Part::single, [&](const Block& block) {
                  store(b_, spec_.output, y, block, load(b_, spec_.input, x, block));
                });
  }

  // Equal types: 32-bit words, whatever they hold, then what is left of a word.
  void move(Reg x, Reg y) {
    for_columns(b_, {.count = words_}, kUnroll, Block::Part::masked, [&](const Block& block) {
      store(b_, DataType::i32, y, block, load(b_, DataType::i32, x, block));
    });
    const int bytes = size_in_bytes(spec_.input);
    if (bytes >= 4) return;
    Reg offset = b_.shift_left(words_, 2);
    if (bytes == 2) return move_if(1, Element::u16, x, y, offset);
    move_if(2, Element::u16, x, y, offset);
    b_.add_to(offset, b_.bit_and(columns_, 2));
    move_if(1, Element::u8, x, y, offset);
  }

  void move_if(int columns_bit, Element element, Reg x, Reg y, Reg offset) {
    b_.if_nonzero(b_.bit_and(columns_, columns_bit), [&] {
      b_.store_gpr(element, b_.at(y, offset, 1), b_.load_gpr(element, b_.at(x, offset, 1)));
    });
  }

  Builder& b_;
  const CopyKernel& spec_;
  Reg columns_, words_;
};

std::string types(const CopyKernel& spec) {
  return fmt::format("lanes={} input={} output={}\n", spec.lanes, name(spec.input),
                     name(spec.output));
}

}  // namespace

std::string print(const CopyKernel& spec) { return "copy " + types(spec); }
std::string print_pieces(const CopyKernel& spec) { return "pieces " + types(spec); }
std::string print_embedding(const CopyKernel& spec) { return "embedding " + types(spec); }

jit::vir::Function build(const CopyKernel& spec) {
  Builder b("copy", spec.lanes, CopyArgs::count);
  RowCopy copy(b, spec, b.arg(CopyArgs::columns));
  Reg x = b.arg(CopyArgs::x);
  Reg y = b.arg(CopyArgs::y);
  Reg rows = b.arg(CopyArgs::rows);
  b.loop(rows, [&] {
    copy.emit(x, y);
    b.add_to(x, b.arg(CopyArgs::x_row_stride));
    b.add_to(y, b.arg(CopyArgs::y_row_stride));
  });
  return std::move(b).finish();
}

jit::vir::Function build_pieces(const CopyKernel& spec) {
  Builder b("pieces", spec.lanes, PieceArgs::count);
  const bool converts = spec.input != spec.output;
  const DataType from = converts ? spec.input : DataType::i32;
  const DataType to = converts ? spec.output : DataType::i32;
  Reg x_row = b.arg(PieceArgs::x), y_row = b.arg(PieceArgs::y);
  Reg y_stride = b.mul(b.arg(PieceArgs::rows), b.vector_bytes());
  Reg rows = b.arg(PieceArgs::rows);
  b.loop(rows, [&] {
    Reg x = b.add(x_row, 0), y = b.add(y_row, 0);
    Reg pieces = b.arg(PieceArgs::pieces);
    b.loop(pieces, [&] {
      store(b, to, y, {}, load(b, from, x, {}));
      b.add_to(x, spec.lanes * size_in_bytes(from));
      b.add_to(y, y_stride);
    });
    b.add_to(x_row, b.arg(PieceArgs::x_row_stride));
    b.add_to(y_row, b.vector_bytes());
  });
  return std::move(b).finish();
}

jit::vir::Function build_embedding(const CopyKernel& spec) {
  Builder b("embedding", spec.lanes, EmbeddingArgs::count);
  RowCopy copy(b, spec, b.arg(EmbeddingArgs::columns));
  Reg table = b.arg(EmbeddingArgs::table);
  Reg indices = b.arg(EmbeddingArgs::indices);
  Reg y = b.arg(EmbeddingArgs::y);
  Reg rows = b.arg(EmbeddingArgs::rows);
  b.loop(rows, [&] {
    Reg index = b.load_gpr(Element::i64, b.at(indices));
    copy.emit(b.add(table, b.mul(index, b.arg(EmbeddingArgs::table_row_stride))), y);
    b.add_to(indices, 8);
    b.add_to(y, b.arg(EmbeddingArgs::y_row_stride));
  });
  return std::move(b).finish();
}

}  // namespace tilewright::ops
