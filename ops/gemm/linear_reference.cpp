// The scalar reference of the linear kernel: reads the same packed weight and argument slots,
// computes in double, one output after another.
//
// Tested by linear_test (against unpacked weights).
#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/pack.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

double activate(const std::string& activation, double x) {
  if (activation == "silu") return x / (1 + std::exp(-x));
  if (activation == "gelu") return x * 0.5 * std::erfc(-x * std::numbers::sqrt2 / 2);
  if (activation == "gelu_tanh") {
    const double inner = 2 * std::numbers::inv_sqrtpi * std::numbers::sqrt2 / 2;
    return 0.5 * x * (1 + std::tanh(inner * (x + 0.044715 * x * x * x)));
  }
  if (activation == "relu") return x < 0 ? 0 : x;
  return x;
}

class Reference {
 public:
  Reference(const LinearKernel& spec, const std::int64_t* args) : spec_(spec), args_(args) {}

  void run() const {
    const std::int64_t columns = spec_.epilogue.gated ? spec_.n / 2 : spec_.n;
    const std::int64_t width = spec_.epilogue.gated ? panel_columns() / 2 : panel_columns();
    const std::int64_t begin = args_[LinearArgs::panel_begin];
    const std::int64_t rows = args_[LinearArgs::block_count] * spec_.rows + spec_.rest;
    for (std::int64_t p = begin; p < begin + args_[LinearArgs::panel_count]; ++p) {
      for (std::int64_t c = 0; c < width && p * width + c < columns; ++c) {
        for (std::int64_t row = 0; row < rows; ++row) {
          const std::int64_t column = p * width + c;
          double value = projected(row, p, c, column);
          value = activate(spec_.epilogue.activation, value);
          if (spec_.epilogue.gated) {
            value *= projected(row, p, c + width, column + spec_.n / 2);
          }
          if (spec_.epilogue.residual) {
            value += element(LinearArgs::residual, row * args_[LinearArgs::residual_row_stride],
                             column, spec_.output);
          }
          char* y = pointer(LinearArgs::y) + row * args_[LinearArgs::y_row_stride];
          write_scalar(spec_.output, y + column * size_in_bytes(spec_.output), value);
        }
      }
    }
  }

 private:
  char* pointer(int slot) const { return reinterpret_cast<char*>(args_[slot]); }

  double element(int slot, std::int64_t offset, std::int64_t index, graph::DataType type) const {
    return read_scalar(type, pointer(slot) + offset + index * size_in_bytes(type));
  }

  // The k weights of a column.
  std::vector<double> weights(std::int64_t panel, std::int64_t column) const {
    std::vector<double> values(static_cast<std::size_t>(spec_.k));
    if (spec_.twelve_bits) {
      std::vector<std::uint16_t> bits(values.size());
      twelve_bits::unpack_column(reinterpret_cast<const std::byte*>(pointer(LinearArgs::weight)),
                                 panel, column, spec_.k, bits.data());
      std::transform(bits.begin(), bits.end(), values.begin(), [](const std::uint16_t& value) {
        return read_scalar(graph::DataType::bf16, &value);
      });
      return values;
    }
    for (std::size_t k = 0; k < values.size(); ++k) {
      values[k] = weight(panel, column, static_cast<std::int64_t>(k));
    }
    return values;
  }

  double weight(std::int64_t panel, std::int64_t column, std::int64_t k) const {
    const std::int64_t panel_bytes = packed_bytes(panel_columns(), spec_.k, spec_.weight);
    const std::int64_t index = spec_.weight == graph::DataType::f32
                                   ? k * panel_columns() + column
                                   : (k / 2 * panel_columns() + column) * 2 + k % 2;
    return element(LinearArgs::weight, panel * panel_bytes, index, spec_.weight);
  }

  // The product of a row of x and one column of a panel, with its bias.
  double projected(std::int64_t row, std::int64_t panel, std::int64_t panel_column,
                   std::int64_t stacked_column) const {
    const std::int64_t begin = row / spec_.rows * args_[LinearArgs::x_block_stride];
    const std::vector<double> w = weights(panel, panel_column);
    double sum = 0;
    for (std::int64_t k = 0; k < spec_.k; ++k) {
      const std::int64_t stretch = k / partial_sum_length();
      const std::int64_t offset = x_offset(row % spec_.rows, k % partial_sum_length());
      sum += element(LinearArgs::x, begin + stretch * args_[LinearArgs::x_stretch_stride] + offset,
                     0, input_type(spec_)) *
             w[static_cast<std::size_t>(k)];
    }
    if (spec_.epilogue.bias) sum += element(LinearArgs::bias, 0, stacked_column, spec_.output);
    return sum;
  }

  // From a block's stretch on.
  std::int64_t x_offset(std::int64_t row, std::int64_t k) const {
    const std::int64_t byte = k * size_in_bytes(input_type(spec_));
    if (!spec_.many_blocks) return row * args_[LinearArgs::x_row_stride] + byte;
    const std::int64_t piece = piece_bytes(spec_.lanes);
    return (byte / piece * spec_.rows + row) * piece + byte % piece;
  }

  const LinearKernel& spec_;
  const std::int64_t* args_;
};

}  // namespace

void reference(const LinearKernel& spec, const std::int64_t* args) { Reference(spec, args).run(); }

}  // namespace tilewright::ops
