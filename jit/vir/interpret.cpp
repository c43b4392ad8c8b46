// Executes VIR on real memory, one lane after another. It is the meaning of op_list.def: emitted
// code is compared with it, and code for an ISA that this machine lacks has no other judge.
//
// The dispatch is one switch without a default, so a new row of the table does not compile until it
// has an arm here (-Wswitch). Host arithmetic is IEEE single with round to nearest even; the build
// switches contraction off, and fused operations call std::fma.
//
// Tested by vir_interpret_test.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "jit/vir/float_bits.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {
namespace {

using Bits = std::uint32_t;
using Vector = std::array<Bits, 16>;
using Mask = std::uint32_t;  // bit i is lane i
using Tile = std::array<Vector, 16>;
using TileConfiguration = std::array<std::uint8_t, 64>;

float as_float(Bits bits) { return std::bit_cast<float>(bits); }
Bits as_bits(float value) { return std::bit_cast<Bits>(value); }
std::int32_t as_int(Bits bits) { return static_cast<std::int32_t>(bits); }

int element_bytes(Element element) {
  switch (element) {
    case Element::none:
      return 0;
    case Element::u8:
    case Element::i8:
      return 1;
    case Element::u16:
    case Element::f16:
    case Element::bf16:
      return 2;
    case Element::f32:
    case Element::i32:
      return 4;
    case Element::i64:
    case Element::i64_low:
    case Element::i64_high:
      return 8;
  }
  return 0;
}

template <class T>
T read(const std::byte* address) {
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class T>
void write(std::byte* address, T value) {
  std::memcpy(address, &value, sizeof value);
}

std::int64_t read_general(Element element, const std::byte* address) {
  switch (element) {
    case Element::i64:
      return read<std::int64_t>(address);
    case Element::i32:
      return read<std::int32_t>(address);
    case Element::u16:
      return read<std::uint16_t>(address);
    default:
      return read<std::uint8_t>(address);
  }
}

void write_general(Element element, std::byte* address, std::int64_t value) {
  switch (element) {
    case Element::i64:
      return write(address, value);
    case Element::i32:
      return write(address, static_cast<std::uint32_t>(value));
    case Element::u16:
      return write(address, static_cast<std::uint16_t>(value));
    default:
      return write(address, static_cast<std::uint8_t>(value));
  }
}

Bits read_lane(Element element, const std::byte* address) {
  switch (element) {
    case Element::bf16:
      return static_cast<Bits>(read<std::uint16_t>(address)) << 16;
    case Element::f16:
      return as_bits(f16_to_float(read<std::uint16_t>(address)));
    case Element::u8:
      return read<std::uint8_t>(address);
    case Element::i8:
      return as_bits(static_cast<float>(read<std::int8_t>(address)));
    case Element::i64_high:
      return read<Bits>(address + sizeof(Bits));
    default:
      return read<Bits>(address);
  }
}

void write_lane(Element element, std::byte* address, Bits value) {
  switch (element) {
    case Element::f16:
      return write(address, float_to_f16(as_float(value)));
    case Element::u16:
      return write(address, static_cast<std::uint16_t>(value));
    case Element::u8:
      return write(address, static_cast<std::uint8_t>(value));
    default:
      return write(address, value);
  }
}

// cvtps2dq
Bits to_int(float value) {
  const float rounded = std::nearbyint(value);
  if (!(rounded >= -0x1p31f && rounded < 0x1p31f)) return 0x80000000u;  // NaN too
  return static_cast<Bits>(static_cast<std::int32_t>(rounded));
}

// cvtdq2ps
Bits to_float_bits(Bits value) { return as_bits(static_cast<float>(as_int(value))); }

// vcvtph2ps of the low half
Bits widen_low_f16(Bits value) { return as_bits(f16_to_float(static_cast<std::uint16_t>(value))); }

float add_product(float w, float a, float b) { return std::fma(a, b, w); }
float subtract_product(float w, float a, float b) { return std::fma(-a, b, w); }
float product_minus(float w, float a, float b) { return std::fma(a, b, -w); }

// vscalefps: a * 2^floor(b), rounded once.
float scale(float a, float b) {
  if (std::isnan(b)) return std::isnan(a) ? a : b;
  if (std::isinf(b)) {
    if (std::isnan(a)) return b > 0 ? b : 0.0f;  // the instruction's own rule for a quiet NaN
    const bool undefined = b > 0 ? a == 0 : std::isinf(a);
    if (undefined) return -std::numeric_limits<float>::quiet_NaN();
    return std::copysign(b > 0 ? std::numeric_limits<float>::infinity() : 0.0f, a);
  }
  // Beyond 2^+-400 every nonzero float has left its range, and in double nothing is rounded before.
  const float exponent = std::clamp(std::floor(b), -400.0f, 400.0f);
  return static_cast<float>(std::ldexp(static_cast<double>(a), static_cast<int>(exponent)));
}

float flush_denormal(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

// vdpbf16ps: two fused steps, the odd element (the high half) first; denormals count as zero going
// in and coming out, whatever MXCSR says.
Bits dot_bf16(Bits accumulator, Bits a, Bits b) {
  const auto high = [](Bits pair) { return flush_denormal(as_float(pair & 0xffff0000u)); };
  const auto low = [](Bits pair) { return flush_denormal(as_float(pair << 16)); };
  float sum = flush_denormal(as_float(accumulator));
  sum = flush_denormal(std::fma(high(a), high(b), sum));
  sum = flush_denormal(std::fma(low(a), low(b), sum));
  return as_bits(sum);
}

Bits dot_bytes(Bits accumulator, Bits a, Bits b) {
  for (int shift = 0; shift < 32; shift += 8) {
    const auto x = static_cast<std::uint8_t>(a >> shift);
    const auto y = static_cast<std::int8_t>(b >> shift);
    accumulator += static_cast<Bits>(x * y);
  }
  return accumulator;
}

// tdpbf16ps: see op_list.def.
void add_tile_product(Tile& y, const Tile& a, const Tile& b) {
  const auto high = [](Bits pair) { return flush_denormal(as_float(pair & 0xffff0000u)); };
  const auto low = [](Bits pair) { return flush_denormal(as_float(pair << 16)); };
  for (std::size_t m = 0; m < y.size(); ++m) {
    for (std::size_t n = 0; n < y[m].size(); ++n) {
      float even = 0, odd = 0;
      for (std::size_t k = 0; k < b.size(); ++k) {
        even = flush_denormal(std::fma(low(a[m][k]), low(b[k][n]), even));
        odd = flush_denormal(std::fma(high(a[m][k]), high(b[k][n]), odd));
      }
      const float sum = flush_denormal(even + odd);
      y[m][n] = as_bits(flush_denormal(flush_denormal(as_float(y[m][n])) + sum));
    }
  }
}

// Palette 1; the bytes of a row at 16 and the rows at 48, for each of 8 tiles.
TileConfiguration full_tiles() {
  TileConfiguration configuration{};
  configuration[0] = 1;
  for (std::size_t tile = 0; tile < 8; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  return configuration;
}

// The 16-byte runs of a vector, as in memory.
constexpr std::size_t kRunBytes = 16;
using Run = std::array<std::uint8_t, kRunBytes>;

Run look_up(const Run& table, const Run& index) {
  Run result{};
  for (std::size_t i = 0; i < kRunBytes; ++i) {
    if (index[i] < 0x80) result[i] = table[index[i] % kRunBytes];
  }
  return result;
}

// Units of so many bytes, from a byte on.
template <std::size_t kUnit, std::size_t kFirst>
Run interleave(const Run& a, const Run& b) {
  Run result;
  for (std::size_t i = 0; i < kRunBytes; ++i) {
    const std::size_t unit = i / kUnit;
    result[i] = (unit % 2 == 0 ? a : b)[kFirst + unit / 2 * kUnit + i % kUnit];
  }
  return result;
}

// For each loop, if, else: the index of its endloop, else or endif, endif; for each endloop: of its
// loop.
std::vector<std::size_t> find_partners(const std::vector<Instruction>& code) {
  std::vector<std::size_t> partner(code.size(), 0), open;
  for (std::size_t i = 0; i < code.size(); ++i) {
    const Op op = code[i].op;
    if (op == Op::endloop || op == Op::endif || op == Op::else_) {
      partner[open.back()] = i;
      partner[i] = open.back();
      open.pop_back();
    }
    if (op == Op::loop || op == Op::if_ || op == Op::else_) open.push_back(i);
  }
  return partner;
}

class Machine {
 public:
  Machine(const Function& function, const std::int64_t* args)
      : function_(function),
        args_(args),
        lanes_(static_cast<std::size_t>(function.lanes)),
        partner_(find_partners(function.code)),
        g_(static_cast<std::size_t>(function.gpr_count)),
        v_(static_cast<std::size_t>(function.vec_count)),
        m_(static_cast<std::size_t>(function.mask_count)),
        t_(static_cast<std::size_t>(function.tile_count)) {}

  void run() {
    for (std::size_t i = 0; i < function_.code.size();) i = step(i);
  }

 private:
  std::int64_t& g(Reg reg) { return g_[static_cast<std::size_t>(reg.id)]; }
  Vector& v(Reg reg) { return v_[static_cast<std::size_t>(reg.id)]; }
  Mask& m(Reg reg) { return m_[static_cast<std::size_t>(reg.id)]; }
  Tile& t(Reg reg) { return t_[static_cast<std::size_t>(reg.id)]; }

  // 64-bit arithmetic wraps.
  std::uint64_t u(Reg reg) { return static_cast<std::uint64_t>(g(reg)); }
  static std::int64_t wrap(std::uint64_t value) { return static_cast<std::int64_t>(value); }

  std::int64_t address_value(const Address& address) {
    std::uint64_t sum = u(address.base) + static_cast<std::uint64_t>(std::int64_t{address.disp});
    if (address.index.valid()) sum += u(address.index) * static_cast<std::uint64_t>(address.scale);
    return wrap(sum);
  }
  std::byte* memory(const Address& address) {
    return std::bit_cast<std::byte*>(address_value(address));
  }

  template <class Lane>
  void set_lanes(Reg destination, Lane&& lane) {
    Vector result{};
    for (std::size_t i = 0; i < lanes_; ++i) result[i] = lane(i);
    v(destination) = result;
  }
  template <class Compute>
  void floats(const Instruction& i, Compute&& compute) {
    const Vector a = v(i.src[0]), b = v(i.src[1]);
    set_lanes(i.dst,
              [&](std::size_t k) { return as_bits(compute(as_float(a[k]), as_float(b[k]))); });
  }
  template <class Compute>
  void float_unary(const Instruction& i, Compute&& compute) {
    const Vector a = v(i.src[0]);
    set_lanes(i.dst, [&](std::size_t k) { return as_bits(compute(as_float(a[k]))); });
  }
  template <class Compute>
  void ints(const Instruction& i, Compute&& compute) {
    const Vector a = v(i.src[0]), b = v(i.src[1]);
    set_lanes(i.dst, [&](std::size_t k) { return static_cast<Bits>(compute(a[k], b[k])); });
  }
  template <class Compute>
  void int_unary(const Instruction& i, Compute&& compute) {
    const Vector a = v(i.src[0]);
    set_lanes(i.dst, [&](std::size_t k) { return compute(a[k]); });
  }
  template <class Compute>
  void shift(const Instruction& i, Compute&& compute) {
    const Vector a = v(i.src[0]);
    const int bits = static_cast<int>(i.immediate);
    set_lanes(i.dst, [&](std::size_t k) { return static_cast<Bits>(compute(a[k], bits)); });
  }
  template <class Compute>
  void accumulate(const Instruction& i, Compute&& compute) {
    const Vector w = v(i.src[0]), a = v(i.src[1]), b = v(i.src[2]);
    set_lanes(i.src[0], [&](std::size_t k) {
      return as_bits(compute(as_float(w[k]), as_float(a[k]), as_float(b[k])));
    });
  }
  template <class Compare>
  void compare(const Instruction& i, Compare&& holds) {
    const Vector a = v(i.src[0]), b = v(i.src[1]);
    Mask result = 0;
    for (std::size_t k = 0; k < lanes_; ++k) {
      if (holds(a[k], b[k])) result |= Mask{1} << k;
    }
    m(i.dst) = result;
  }
  template <class Compare>
  void compare_floats(const Instruction& i, Compare&& holds) {
    compare(i, [&](Bits a, Bits b) { return holds(as_float(a), as_float(b)); });
  }

  Mask all_lanes() const { return (Mask{1} << lanes_) - 1; }
  Mask tail(std::int64_t count) const {
    return (Mask{1} << std::clamp<std::int64_t>(count, 0, function_.lanes)) - 1;
  }

  // Lanes outside the mask become 0, and their memory is not touched.
  void load(const Instruction& i, Mask mask) {
    const std::byte* base = memory(i.address);
    const auto size = static_cast<std::size_t>(element_bytes(i.element));
    set_lanes(i.dst, [&](std::size_t k) {
      return (mask >> k & 1) != 0 ? read_lane(i.element, base + k * size) : 0;
    });
  }
  void broadcast(const Instruction& i) {
    const Bits value = read_lane(i.element, memory(i.address));
    set_lanes(i.dst, [&](std::size_t) { return value; });
  }
  void broadcast_run(const Instruction& i) {
    const std::byte* base = memory(i.address);
    set_lanes(i.dst, [&](std::size_t k) { return read<Bits>(base + 4 * k % kRunBytes); });
  }
  void bytes(const Instruction& i, Run (*compute)(const Run&, const Run&)) {
    using Runs = std::array<Run, sizeof(Vector) / kRunBytes>;
    const auto a = std::bit_cast<Runs>(v(i.src[0])), b = std::bit_cast<Runs>(v(i.src[1]));
    Runs result;
    for (std::size_t run = 0; run < result.size(); ++run) result[run] = compute(a[run], b[run]);
    const auto lanes = std::bit_cast<Vector>(result);
    set_lanes(i.dst, [&](std::size_t k) { return lanes[k]; });
  }
  // Units of lanes, halved within each group of lanes.
  void unzip(const Instruction& i, std::size_t unit, std::size_t group) {
    const Vector a = v(i.src[0]), b = v(i.src[1]);
    const std::size_t half = group / unit / 2, odd = static_cast<std::size_t>(i.immediate);
    set_lanes(i.dst, [&](std::size_t k) {
      const std::size_t place = k % group / unit;
      const std::size_t from = k / group * group + (place % half * 2 + odd) * unit + k % unit;
      return place < half ? a[from] : b[from];
    });
  }
  void store(const Instruction& i, Mask mask) {
    std::byte* base = memory(i.address);
    const auto size = static_cast<std::size_t>(element_bytes(i.element));
    for (std::size_t k = 0; k < lanes_; ++k) {
      if ((mask >> k & 1) != 0) write_lane(i.element, base + k * size, v(i.src[0])[k]);
    }
  }
  void fma_load(const Instruction& i) {
    const std::byte* base = memory(i.address);
    const Vector w = v(i.src[0]), a = v(i.src[1]);
    set_lanes(i.src[0], [&](std::size_t k) {
      return as_bits(std::fma(as_float(a[k]), read<float>(base + 4 * k), as_float(w[k])));
    });
  }
  template <class Compute>
  void dot(const Instruction& i, Compute&& compute) {
    const Vector w = v(i.src[0]), a = v(i.src[1]), b = v(i.src[2]);
    set_lanes(i.src[0], [&](std::size_t k) { return compute(w[k], a[k], b[k]); });
  }
  void select(const Instruction& i) {
    const Mask mask = m(i.src[0]);
    const Vector a = v(i.src[1]), b = v(i.src[2]);
    set_lanes(i.dst, [&](std::size_t k) { return (mask >> k & 1) != 0 ? a[k] : b[k]; });
  }
  void load_tile(const Instruction& i) {
    for (std::size_t row = 0; row < 16; ++row) {
      t(i.dst)[row] = read<Vector>(tile_row(i, row));
    }
  }
  void store_tile(const Instruction& i) {
    for (std::size_t row = 0; row < 16; ++row) write(tile_row(i, row), t(i.src[1])[row]);
  }
  std::byte* tile_row(const Instruction& i, std::size_t row) {
    return memory(i.address) + g(i.src[0]) * static_cast<std::int64_t>(row);
  }
  void splat(const Instruction& i, Bits value) {
    set_lanes(i.dst, [&](std::size_t) { return value; });
  }

  // Executes code[at] and returns the index of the next instruction.
  std::size_t step(std::size_t at);

  const Function& function_;
  const std::int64_t* args_;
  std::size_t lanes_;
  std::vector<std::size_t> partner_;
  std::vector<std::int64_t> g_;
  std::vector<Vector> v_;
  std::vector<Mask> m_;
  std::vector<Tile> t_;
  TileConfiguration tiles_{};  // nothing is configured
};

std::size_t Machine::step(std::size_t at) {
  const Instruction& i = function_.code[at];
  const auto& [s0, s1, s2] = i.src;
  switch (i.op) {
    // clang-format off
    case Op::gconst: g(i.dst) = i.immediate; break;
    case Op::garg: g(i.dst) = args_[i.immediate]; break;
    case Op::gmov: g(i.dst) = g(s0); break;
    case Op::gadd: g(i.dst) = wrap(u(s0) + u(s1)); break;
    case Op::gaddi: g(i.dst) = wrap(u(s0) + static_cast<std::uint64_t>(i.immediate)); break;
    case Op::gsub: g(i.dst) = wrap(u(s0) - u(s1)); break;
    case Op::gmul: g(i.dst) = wrap(u(s0) * u(s1)); break;
    case Op::gmuli: g(i.dst) = wrap(u(s0) * static_cast<std::uint64_t>(i.immediate)); break;
    case Op::gshli: g(i.dst) = wrap(u(s0) << i.immediate); break;
    case Op::gshri: g(i.dst) = g(s0) >> i.immediate; break;
    case Op::gandi: g(i.dst) = g(s0) & i.immediate; break;
    case Op::gmin: g(i.dst) = std::min(g(s0), g(s1)); break;
    case Op::gmax: g(i.dst) = std::max(g(s0), g(s1)); break;
    case Op::glea: g(i.dst) = address_value(i.address); break;
    case Op::gload: g(i.dst) = read_general(i.element, memory(i.address)); break;
    case Op::gstore: write_general(i.element, memory(i.address), g(s0)); break;

    case Op::loop: return g(s0) > 0 ? at + 1 : partner_[at] + 1;
    case Op::endloop: {
      std::int64_t& counter = g(function_.code[partner_[at]].src[0]);
      counter = wrap(static_cast<std::uint64_t>(counter) - 1);
      return partner_[at];
    }
    case Op::if_: return g(s0) != 0 ? at + 1 : partner_[at] + 1;
    case Op::else_: return partner_[at] + 1;  // reached from the first arm only
    case Op::endif: break;

    case Op::vzero: splat(i, 0); break;
    case Op::vconst: splat(i, static_cast<Bits>(i.immediate)); break;
    case Op::vsplat: splat(i, static_cast<Bits>(g(s0))); break;
    case Op::vsplat_cvt: splat(i, as_bits(static_cast<float>(g(s0)))); break;
    case Op::vmov: v(i.dst) = v(s0); break;
    case Op::viota: set_lanes(i.dst, [](std::size_t k) { return static_cast<Bits>(k); }); break;
    case Op::vload: load(i, all_lanes()); break;
    case Op::vloadm: load(i, m(s0)); break;
    case Op::vload1: load(i, 1); break;
    case Op::vbroadcast: broadcast(i); break;
    case Op::vstore: store(i, all_lanes()); break;
    case Op::vstorem: store(i, m(s1)); break;
    case Op::vstore1: store(i, 1); break;

    case Op::vadd: floats(i, [](float a, float b) { return a + b; }); break;
    case Op::vsub: floats(i, [](float a, float b) { return a - b; }); break;
    case Op::vmul: floats(i, [](float a, float b) { return a * b; }); break;
    case Op::vdiv: floats(i, [](float a, float b) { return a / b; }); break;
    case Op::vmax: floats(i, [](float a, float b) { return a > b ? a : b; }); break;
    case Op::vmin: floats(i, [](float a, float b) { return a < b ? a : b; }); break;
    case Op::vsqrt: float_unary(i, [](float a) { return std::sqrt(a); }); break;
    case Op::vround: float_unary(i, [](float a) { return std::nearbyint(a); }); break;
    case Op::vfma: accumulate(i, add_product); break;
    case Op::vfnma: accumulate(i, subtract_product); break;
    case Op::vfms: accumulate(i, product_minus); break;
    case Op::vfma_load: fma_load(i); break;
    case Op::vscalef: floats(i, scale); break;
    case Op::vcvt_i32: int_unary(i, [](Bits a) { return to_int(as_float(a)); }); break;
    case Op::vcvt_f32: int_unary(i, to_float_bits); break;
    case Op::vcvt_f16: int_unary(i, widen_low_f16); break;
    case Op::vdpbf16: dot(i, dot_bf16); break;
    case Op::vdpbytes: dot(i, dot_bytes); break;

    case Op::vand: ints(i, [](Bits a, Bits b) { return a & b; }); break;
    case Op::vor: ints(i, [](Bits a, Bits b) { return a | b; }); break;
    case Op::vxor: ints(i, [](Bits a, Bits b) { return a ^ b; }); break;
    case Op::vandn: ints(i, [](Bits a, Bits b) { return ~a & b; }); break;
    case Op::viadd: ints(i, [](Bits a, Bits b) { return a + b; }); break;
    case Op::visub: ints(i, [](Bits a, Bits b) { return a - b; }); break;
    case Op::vimul: ints(i, [](Bits a, Bits b) { return a * b; }); break;
    case Op::vshli: shift(i, [](Bits a, int n) { return a << n; }); break;
    case Op::vshri: shift(i, [](Bits a, int n) { return a >> n; }); break;
    case Op::vsari: shift(i, [](Bits a, int n) { return as_int(a) >> n; }); break;
    case Op::vswap: {
      const Vector a = v(s0);
      set_lanes(i.dst, [&](std::size_t k) { return a[k ^ static_cast<std::size_t>(i.immediate)]; });
      break;
    }

    case Op::vunzip_lanes: unzip(i, 1, 4); break;
    case Op::vunzip_runs: unzip(i, 4, lanes_); break;

    case Op::vbroadcast16: broadcast_run(i); break;
    case Op::vlookup_bytes: bytes(i, look_up); break;
    case Op::vinterleave_low: bytes(i, interleave<1, 0>); break;
    case Op::vinterleave_high: bytes(i, interleave<1, 8>); break;
    case Op::vinterleave_halves_low: bytes(i, interleave<2, 0>); break;
    case Op::vinterleave_halves_high: bytes(i, interleave<2, 8>); break;

    case Op::mtail: m(i.dst) = tail(g(s0)); break;
    case Op::mcmp_lt: compare_floats(i, [](float a, float b) { return a < b; }); break;
    case Op::mcmp_le: compare_floats(i, [](float a, float b) { return a <= b; }); break;
    case Op::mcmp_eq: compare_floats(i, [](float a, float b) { return a == b; }); break;
    case Op::mcmp_ne: compare_floats(i, [](float a, float b) { return a != b; }); break;
    case Op::micmp_eq: compare(i, [](Bits a, Bits b) { return a == b; }); break;
    case Op::micmp_gt: compare(i, [](Bits a, Bits b) { return as_int(a) > as_int(b); }); break;
    case Op::mand: m(i.dst) = m(s0) & m(s1); break;
    case Op::mor: m(i.dst) = m(s0) | m(s1); break;
    case Op::mandn: m(i.dst) = ~m(s0) & m(s1); break;
    case Op::vselect: select(i); break;

    case Op::tsave: write(memory(i.address), tiles_); break;
    case Op::tconfig: tiles_ = full_tiles(); break;
    case Op::trestore: tiles_ = read<TileConfiguration>(memory(i.address)); break;
    case Op::tzero: t(i.dst) = {}; break;
    case Op::tload: load_tile(i); break;
    case Op::tstore: store_tile(i); break;
    case Op::tdpbf16: add_tile_product(t(s0), t(s1), t(s2)); break;

    case Op::prefetch: break;
      // clang-format on
  }
  return at + 1;
}

}  // namespace

void interpret(const Function& function, const std::int64_t* args) {
  Machine(function, args).run();
}

}  // namespace tilewright::jit::vir
