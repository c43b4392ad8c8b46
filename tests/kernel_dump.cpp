// kernel_dump: linear kernels of the 16-bit instructions with their memory before and after a run
// by the interpreter, one JSON object per line, for a machine in Python that executes the bytes.
// kernel_dump multiply M N K: y = x @ w.T of fp32 by AMX in the interpreter, for tests of its
// error: reads x and w of fp32 from stdin, row-major, with w in the form that loses nothing, and
// writes y.
//
// Fields: name, rung, isa, code (hex), code_size, spills; memory: a list of regions with before
// and after (hex); args: a list of [region, number], where region -1 makes the number a plain
// value and another the address of that byte of the region. Linear kernels have shape [m, n, k]
// and operands x, w, y as the values of f32, row-major. Tested by
// tests/python/test_matrix_kernels.py, which reads it.
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "jit/emit.h"
#include "ops/gemm/exact.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/pack.h"
#include "ops/gemm/tile_kernel.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::Arithmetic;
using ops::LinearArgs;
using ops::LinearKernel;

std::string hex(std::span<const std::byte> bytes) {
  std::string text;
  for (std::byte byte : bytes) text += fmt::format("{:02x}", static_cast<unsigned>(byte));
  return text;
}

// Regions of memory that the slots of a kernel's arguments point into, or plain numbers.
class Call {
 public:
  explicit Call(int slots) : args_(static_cast<std::size_t>(slots), {-1, 0}) {}

  void number(int slot, std::int64_t value) { args_[static_cast<std::size_t>(slot)] = {-1, value}; }
  // Returns the region's index.
  int memory(int slot, std::size_t bytes) {
    regions_.emplace_back(bytes, std::byte{0xff});
    args_[static_cast<std::size_t>(slot)] = {static_cast<int>(regions_.size()) - 1, 0};
    return args_[static_cast<std::size_t>(slot)].region;
  }
  std::vector<std::byte>& region(int index) { return regions_[static_cast<std::size_t>(index)]; }

  void run(const jit::vir::Function& function) {
    std::vector<std::int64_t> values;
    for (const auto& [region, number] : args_) {
      values.push_back(region < 0 ? number
                                  : reinterpret_cast<std::int64_t>(this->region(region).data()));
    }
    interpret(function, values.data());
  }

  // Runs the kernel and describes it; `more` are further members of the object.
  template <class More>
  void dump(const jit::vir::Function& function, const char* rung, More&& more) {
    const Result<jit::CodeObject> code = jit::emit(function, *Target::for_rung(rung));
    if (!code.ok()) {
      fmt::print(stderr, "kernel_dump: {}\n", code.error().message);
      std::exit(2);
    }
    std::string memory, args;
    const std::vector<std::vector<std::byte>> before = regions_;
    for (const auto& [region, number] : args_) {
      args += fmt::format("{}[{}, {}]", args.empty() ? "" : ", ", region, number);
    }
    run(function);
    for (std::size_t i = 0; i < before.size(); ++i) {
      memory += fmt::format(R"({}{{"before": "{}", "after": "{}"}})", i == 0 ? "" : ", ",
                            hex(before[i]), hex(regions_[i]));
    }
    fmt::print(R"({{"name": "{}", "rung": "{}", "isa": "{}", "code": "{}", "code_size": {}, )"
               R"("spills": {}, "memory": [{}], "args": [{}]{}}})"
               "\n",
               code->name, rung, isa_mask_name(code->required_isa), hex(code->bytes),
               code->code_size, code->spills, memory, args, more());
  }

 private:
  struct Arg {
    int region;
    std::int64_t number;
  };
  std::vector<Arg> args_;
  std::vector<std::vector<std::byte>> regions_;
};

struct Problem {
  LinearKernel spec;
  std::int64_t m;
  std::vector<float> x, w;

  Problem(LinearKernel kernel, std::int64_t rows) : spec(std::move(kernel)), m(rows) {}

  void draw(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::int64_t count, DataType type) {
      std::vector<float> values;
      for (std::int64_t i = 0; i < count; ++i) {
        float rounded = normal(random);
        char bytes[4];
        ops::write_scalar(type, bytes, rounded);
        values.push_back(static_cast<float>(ops::read_scalar(type, bytes)));
      }
      return values;
    };
    x = fill(m * spec.k, input_type(spec));
    w = fill(spec.n * spec.k, spec.weight);
  }

  std::vector<std::byte> rows_of_x() const {
    const std::int64_t size = size_in_bytes(input_type(spec));
    std::vector<std::byte> bytes(x.size() * static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < x.size(); ++i) {
      ops::write_scalar(input_type(spec), bytes.data() + i * static_cast<std::size_t>(size), x[i]);
    }
    return bytes;
  }

  std::vector<std::byte> packed_weight() const {
    const std::int64_t size = size_in_bytes(spec.weight);
    std::vector<std::byte> values(w.size() * static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < w.size(); ++i) {
      ops::write_scalar(spec.weight, values.data() + i * static_cast<std::size_t>(size), w[i]);
    }
    const ops::WeightBlock block{values.data(), spec.n, spec.k * size};
    std::vector<std::byte> pairs(
        static_cast<std::size_t>(ops::packed_bytes(spec.n, spec.k, spec.weight)));
    const std::int64_t panels = ops::panel_count(spec.n);
    ops::pack_panels({&block, 1}, spec.k, spec.weight, spec.weight, false, 0, panels, pairs.data());
    if (!spec.twelve_bits) return pairs;
    ops::twelve_bits::Packer packer(panels, spec.k);
    const auto* from = reinterpret_cast<const std::uint16_t*>(pairs.data());
    const std::int64_t panel_values = static_cast<std::int64_t>(pairs.size()) / 2 / panels;
    for (std::int64_t i = 0; i < panels; ++i) packer.inspect(i, from + i * panel_values);
    std::vector<std::byte> packed(static_cast<std::size_t>(packer.place()));
    for (std::int64_t i = 0; i < panels; ++i) {
      packer.pack(i, from + i * panel_values, packed.data());
    }
    return packed;
  }

  // Packs x by the kernel for that. visit(call, function, more) runs it.
  template <class Visit>
  std::vector<std::byte> tiles_of_x(Visit&& visit) const {
    const ops::TilePack pack{spec.arithmetic, spec.rows, spec.k};
    Call call(ops::TilePackArgs::count);
    const int from = call.memory(ops::TilePackArgs::x, 0);
    call.region(from) = rows_of_x();
    call.number(ops::TilePackArgs::x_row_stride, spec.k * size_in_bytes(input_type(spec)));
    call.number(ops::TilePackArgs::row_count, m);
    const int to = call.memory(ops::TilePackArgs::y, static_cast<std::size_t>(block_bytes(pack)));
    call.memory(ops::TilePackArgs::magnitudes, static_cast<std::size_t>(m * ops::kMagnitudeBytes));
    visit(call, build(pack), [] { return std::string(); });
    return call.region(to);
  }

  // y. Each kernel is run by visit(call, function, more), where `more` describes what it left.
  template <class Visit>
  std::vector<std::byte> multiply(Visit&& visit) const {
    const bool tiled = is_tiled(spec.arithmetic);
    Call call(LinearArgs::count);
    const int from = call.memory(LinearArgs::x, 0);
    call.region(from) = tiled ? tiles_of_x(visit) : rows_of_x();
    call.number(LinearArgs::x_row_stride, spec.k * 2);
    call.number(LinearArgs::x_block_stride, spec.rows * spec.k * 2);
    call.number(LinearArgs::x_stretch_stride, ops::partial_sum_length() * 2);
    call.region(call.memory(LinearArgs::weight, 0)) = packed_weight();
    const int y = call.memory(LinearArgs::y, static_cast<std::size_t>(m * spec.n * 4));
    call.number(LinearArgs::y_row_stride, spec.n * 4);
    call.number(LinearArgs::panel_count, ops::panel_count(spec.n));
    call.number(LinearArgs::block_count, 1);
    const std::int64_t sums = ops::partial_sums_bytes(spec.rows);
    call.memory(LinearArgs::partial_sums, static_cast<std::size_t>(sums));
    const std::int64_t unpacked = tiled ? tile_scratch_bytes(spec) : ops::unpacked_bytes();
    call.memory(LinearArgs::unpacked, static_cast<std::size_t>(unpacked));
    call.number(LinearArgs::row_count, m);
    call.memory(LinearArgs::tile_state, ops::kTileStateBytes);
    visit(call, build(spec), [&] {
      return fmt::format(R"(, "shape": [{}, {}, {}], "x": "{}", "w": "{}", "y": "{}")", m, spec.n,
                         spec.k, hex(std::as_bytes(std::span(x))), hex(std::as_bytes(std::span(w))),
                         hex(call.region(y)));
    });
    return call.region(y);
  }
};

void dump_kernels() {
  struct Case {
    Arithmetic arithmetic;
    int rows;
    std::int64_t m, n, k;
    DataType weight;
    bool twelve_bits;
    const char* rung;
  };
  const DataType bf16 = DataType::bf16;
  const Case cases[] = {
      {Arithmetic::dot, 12, 12, 45, 70, bf16, false, "avx512_bf16"},
      {Arithmetic::dot, 1, 1, 64, 130, bf16, false, "avx512_bf16"},
      {Arithmetic::dot, 2, 2, 32, 144, bf16, true, "avx512_bf16"},
      {Arithmetic::tiles, 16, 13, 45, 70, bf16, false, "amx_bf16"},
      {Arithmetic::tiles, 32, 30, 32, 40, bf16, true, "amx_bf16"},
      {Arithmetic::split_tiles, 16, 11, 32, 540, bf16, false, "amx_bf16"},
      {Arithmetic::split_tiles, 16, 11, 32, 75, DataType::f32, false, "amx_bf16"},
      {Arithmetic::split_tiles, 16, 12, 32, 40, DataType::f16, false, "amx_bf16"}};
  for (const Case& each : cases) {
    LinearKernel spec;
    spec.arithmetic = each.arithmetic;
    spec.lanes = 16;
    spec.rows = each.rows;
    spec.n = each.n;
    spec.k = each.k;
    spec.weight = each.weight;
    spec.twelve_bits = each.twelve_bits;
    Problem problem(spec, each.m);
    problem.draw(17);
    problem.multiply([&](Call& call, const auto& function, const auto& more) {
      call.dump(function, each.rung, more);
    });
  }
}

std::vector<float> read_values(std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  if (std::fread(values.data(), sizeof(float), values.size(), stdin) == values.size()) {
    return values;
  }
  fmt::print(stderr, "kernel_dump: stdin has too few values\n");
  std::exit(2);
}

void multiply(std::int64_t m, std::int64_t n, std::int64_t k) {
  LinearKernel spec;
  spec.arithmetic = Arithmetic::split_tiles;
  spec.lanes = 16;
  spec.rows = ops::kTileRows;
  spec.n = n;
  spec.k = k;
  Problem problem(spec, m);
  problem.x = read_values(m * k);
  problem.w = read_values(n * k);
  const ops::WeightBlock block{problem.w.data(), n, k * 4};
  problem.spec.weight = ops::exact_type({&block, 1}, k);
  const std::vector<std::byte> y =
      problem.multiply([](Call& call, const auto& function, const auto&) { call.run(function); });
  std::fwrite(y.data(), 1, y.size(), stdout);
}

}  // namespace
}  // namespace tilewright

int main(int argc, char** argv) {
  if (argc == 1) {
    tilewright::dump_kernels();
  } else if (argc == 5 && argv[1] == std::string_view("multiply")) {
    tilewright::multiply(std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4]));
  } else {
    fmt::print(stderr, "kernel_dump [multiply M N K]\n");
    return 2;
  }
}
