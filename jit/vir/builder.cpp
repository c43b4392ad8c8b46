// Builder: each method appends one instruction of op_list.def. The composites at the end (butterfly
// reductions, bf16 rounding) are written with the same methods, so the allocator sees every step.
//
// Tested by vir_test.
#include "jit/vir/builder.h"

#include <algorithm>
#include <cassert>
#include <limits>

#include "jit/vir/numbering.h"
#include "jit/vir/signature.h"

namespace tilewright::jit::vir {
namespace {

// Most kernels have fewer.
constexpr std::size_t kUsualInstructions = 1024;

bool fits_32_bits(std::int64_t value) {
  return value >= std::numeric_limits<std::int32_t>::min() &&
         value <= std::numeric_limits<std::int32_t>::max();
}

// Whether `move` copies to another register what `before` has just defined.
bool moves_result(const Instruction& before, const Instruction& move) {
  return (move.op == Op::gmov || move.op == Op::vmov) && before.dst == move.src[0] &&
         move.dst != move.src[0];
}

// `assign(x, add(x, y))` appends a sum in a register of its own and a move to x. Where nothing else
// reads that register, the sum goes to x and there is no move.
void define_in_place(Function& f) {
  std::vector<Instruction>& code = f.code;
  if (std::adjacent_find(code.begin(), code.end(), moves_result) == code.end()) return;
  const Numbering numbering(f);
  std::vector<int> uses(numbering.count());
  for (const Instruction& in : code) {
    each_source(in, [&](Reg reg) { ++uses[numbering.index(reg)]; });
  }
  std::size_t kept = 1;
  for (std::size_t i = 1; i < code.size(); ++i) {
    Instruction& before = code[kept - 1];
    if (moves_result(before, code[i]) && uses[numbering.index(before.dst)] == 1) {
      before.dst = code[i].dst;
    } else {
      code[kept++] = code[i];
    }
  }
  code.resize(kept);
}

}  // namespace

Builder::Builder(std::string name, int lanes, int arg_count) {
  assert(lanes == 8 || lanes == 16);
  function_.name = std::move(name);
  function_.lanes = lanes;
  function_.arg_count = arg_count;
  function_.code.reserve(kUsualInstructions);
}

Function Builder::finish() && {
  define_in_place(function_);
  return std::move(function_);
}

Reg Builder::fresh(Kind kind) {
  switch (kind) {
    case Kind::gpr:
      return {kind, function_.gpr_count++};
    case Kind::vec:
      return {kind, function_.vec_count++};
    case Kind::mask:
      return {kind, function_.mask_count++};
    case Kind::tile:
      return {kind, function_.tile_count++};
  }
  return {};
}

Instruction& Builder::append(Op op) {
  Instruction& instruction = function_.code.emplace_back();
  instruction.op = op;
  return instruction;
}

Reg Builder::unary(Op op, Kind kind, Reg a) {
  Instruction& i = append(op);
  i.src[0] = a;
  return i.dst = fresh(kind);
}

Reg Builder::binary(Op op, Kind kind, Reg a, Reg b) {
  Instruction& i = append(op);
  i.src[0] = a;
  i.src[1] = b;
  return i.dst = fresh(kind);
}

Reg Builder::with_immediate(Op op, Kind kind, Reg a, std::int64_t immediate) {
  Instruction& i = append(op);
  i.src[0] = a;
  i.immediate = immediate;
  return i.dst = fresh(kind);
}

Reg Builder::with_address(Op op, Kind kind, Element element, Address address) {
  Instruction& i = append(op);
  i.element = element;
  i.address = address;
  return i.dst = fresh(kind);
}

void Builder::to_memory(Op op, Element element, Address address, Reg value) {
  Instruction& i = append(op);
  i.element = element;
  i.address = address;
  i.src[0] = value;
}

void Builder::accumulate(Op op, Reg accumulator, Reg a, Reg b) {
  Instruction& i = append(op);
  i.src = {accumulator, a, b};
}

// --- addresses

Address Builder::at(Reg base, std::int64_t disp) const {
  assert(fits_32_bits(disp));
  return {base, {}, 1, static_cast<std::int32_t>(disp)};
}

Address Builder::at(Reg base, Reg index, int scale, std::int64_t disp) const {
  assert(fits_32_bits(disp));
  return {base, index, static_cast<std::uint8_t>(scale), static_cast<std::int32_t>(disp)};
}

// --- general registers

Reg Builder::constant(std::int64_t value) {
  return with_immediate(Op::gconst, Kind::gpr, {}, value);
}

Reg Builder::arg(int slot) { return with_immediate(Op::garg, Kind::gpr, {}, slot); }

Reg Builder::copy(Reg source) {
  assert(source.kind == Kind::gpr || source.kind == Kind::vec);
  return unary(source.kind == Kind::gpr ? Op::gmov : Op::vmov, source.kind, source);
}

void Builder::assign(Reg destination, Reg source) {
  assert(destination.kind == source.kind);
  assert(source.kind == Kind::gpr || source.kind == Kind::vec);
  Instruction& i = append(source.kind == Kind::gpr ? Op::gmov : Op::vmov);
  i.dst = destination;
  i.src[0] = source;
}

Reg Builder::add(Reg a, Reg b) { return binary(Op::gadd, Kind::gpr, a, b); }

Reg Builder::add(Reg a, std::int64_t b) {
  if (!fits_32_bits(b)) return add(a, constant(b));
  return with_immediate(Op::gaddi, Kind::gpr, a, b);
}

void Builder::add_to(Reg a, Reg b) {
  Instruction& i = append(Op::gadd);
  i.dst = a;
  i.src = {a, b, {}};
}

void Builder::add_to(Reg a, std::int64_t b) {
  if (!fits_32_bits(b)) return add_to(a, constant(b));
  Instruction& i = append(Op::gaddi);
  i.dst = a;
  i.src[0] = a;
  i.immediate = b;
}

Reg Builder::sub(Reg a, Reg b) { return binary(Op::gsub, Kind::gpr, a, b); }
Reg Builder::mul(Reg a, Reg b) { return binary(Op::gmul, Kind::gpr, a, b); }

Reg Builder::mul(Reg a, std::int64_t b) {
  if (!fits_32_bits(b)) return mul(a, constant(b));
  return with_immediate(Op::gmuli, Kind::gpr, a, b);
}

Reg Builder::shift_left(Reg a, int bits) { return with_immediate(Op::gshli, Kind::gpr, a, bits); }
Reg Builder::shift_right(Reg a, int bits) { return with_immediate(Op::gshri, Kind::gpr, a, bits); }

Reg Builder::bit_and(Reg a, std::int64_t mask) {
  assert(fits_32_bits(mask));
  return with_immediate(Op::gandi, Kind::gpr, a, mask);
}

Reg Builder::min(Reg a, Reg b) { return binary(Op::gmin, Kind::gpr, a, b); }
Reg Builder::max(Reg a, Reg b) { return binary(Op::gmax, Kind::gpr, a, b); }

Reg Builder::lea(Address address) {
  return with_address(Op::glea, Kind::gpr, Element::none, address);
}

Reg Builder::load_gpr(Element element, Address address) {
  return with_address(Op::gload, Kind::gpr, element, address);
}

void Builder::store_gpr(Element element, Address address, Reg value) {
  to_memory(Op::gstore, element, address, value);
}

// --- structure

void Builder::begin_loop(Reg counter) { append(Op::loop).src[0] = counter; }
void Builder::end_loop() { append(Op::endloop); }
void Builder::begin_if(Reg condition) { append(Op::if_).src[0] = condition; }
void Builder::begin_else() { append(Op::else_); }
void Builder::end_if() { append(Op::endif); }

// --- vector moves

Reg Builder::zero() { return append(Op::vzero).dst = fresh(Kind::vec); }

Reg Builder::splat_bits(std::uint32_t bits) {
  return with_immediate(Op::vconst, Kind::vec, {}, bits);
}

Reg Builder::splat(Reg gpr) { return unary(Op::vsplat, Kind::vec, gpr); }
Reg Builder::splat_converted(Reg gpr) { return unary(Op::vsplat_cvt, Kind::vec, gpr); }
Reg Builder::iota() { return append(Op::viota).dst = fresh(Kind::vec); }

Reg Builder::load(Element element, Address address) {
  return with_address(Op::vload, Kind::vec, element, address);
}

Reg Builder::load_masked(Element element, Address address, Reg mask) {
  Instruction& i = append(Op::vloadm);
  i.element = element;
  i.address = address;
  i.src[0] = mask;
  return i.dst = fresh(Kind::vec);
}

Reg Builder::load_one(Element element, Address address) {
  return with_address(Op::vload1, Kind::vec, element, address);
}

Reg Builder::broadcast(Element element, Address address) {
  return with_address(Op::vbroadcast, Kind::vec, element, address);
}

Reg Builder::broadcast_16_bytes(Address address) {
  return with_address(Op::vbroadcast16, Kind::vec, Element::none, address);
}

void Builder::store(Element element, Address address, Reg value) {
  to_memory(Op::vstore, element, address, value);
}

void Builder::store_masked(Element element, Address address, Reg value, Reg mask) {
  to_memory(Op::vstorem, element, address, value);
  function_.code.back().src[1] = mask;
}

void Builder::store_one(Element element, Address address, Reg value) {
  to_memory(Op::vstore1, element, address, value);
}

// --- vector arithmetic

Reg Builder::vadd(Reg a, Reg b) { return binary(Op::vadd, Kind::vec, a, b); }
Reg Builder::vsub(Reg a, Reg b) { return binary(Op::vsub, Kind::vec, a, b); }
Reg Builder::vmul(Reg a, Reg b) { return binary(Op::vmul, Kind::vec, a, b); }
Reg Builder::vdiv(Reg a, Reg b) { return binary(Op::vdiv, Kind::vec, a, b); }
Reg Builder::vmax(Reg a, Reg b) { return binary(Op::vmax, Kind::vec, a, b); }
Reg Builder::vmin(Reg a, Reg b) { return binary(Op::vmin, Kind::vec, a, b); }
Reg Builder::vsqrt(Reg a) { return unary(Op::vsqrt, Kind::vec, a); }
Reg Builder::vround(Reg a) { return unary(Op::vround, Kind::vec, a); }
void Builder::fma(Reg accumulator, Reg a, Reg b) { accumulate(Op::vfma, accumulator, a, b); }
void Builder::fnma(Reg accumulator, Reg a, Reg b) { accumulate(Op::vfnma, accumulator, a, b); }
void Builder::fms(Reg accumulator, Reg a, Reg b) { accumulate(Op::vfms, accumulator, a, b); }

void Builder::fma_load(Reg accumulator, Reg a, Address f32_vector) {
  accumulate(Op::vfma_load, accumulator, a, {});
  function_.code.back().address = f32_vector;
}

Reg Builder::scalef(Reg a, Reg b) { return binary(Op::vscalef, Kind::vec, a, b); }
Reg Builder::to_i32(Reg a) { return unary(Op::vcvt_i32, Kind::vec, a); }
Reg Builder::to_f32(Reg a) { return unary(Op::vcvt_f32, Kind::vec, a); }
Reg Builder::low_f16_to_f32(Reg a) { return unary(Op::vcvt_f16, Kind::vec, a); }
void Builder::dot_bf16(Reg accumulator, Reg a, Reg b) {
  accumulate(Op::vdpbf16, accumulator, a, b);
}
void Builder::dot_bytes(Reg accumulator, Reg a_unsigned, Reg b_signed) {
  accumulate(Op::vdpbytes, accumulator, a_unsigned, b_signed);
}

Reg Builder::vand(Reg a, Reg b) { return binary(Op::vand, Kind::vec, a, b); }
Reg Builder::vor(Reg a, Reg b) { return binary(Op::vor, Kind::vec, a, b); }
Reg Builder::vxor(Reg a, Reg b) { return binary(Op::vxor, Kind::vec, a, b); }
Reg Builder::vandn(Reg a, Reg b) { return binary(Op::vandn, Kind::vec, a, b); }
Reg Builder::iadd(Reg a, Reg b) { return binary(Op::viadd, Kind::vec, a, b); }
Reg Builder::isub(Reg a, Reg b) { return binary(Op::visub, Kind::vec, a, b); }
Reg Builder::imul(Reg a, Reg b) { return binary(Op::vimul, Kind::vec, a, b); }
Reg Builder::vshift_left(Reg a, int bits) { return with_immediate(Op::vshli, Kind::vec, a, bits); }
Reg Builder::vshift_right(Reg a, int bits) { return with_immediate(Op::vshri, Kind::vec, a, bits); }

Reg Builder::vshift_right_signed(Reg a, int bits) {
  return with_immediate(Op::vsari, Kind::vec, a, bits);
}

Reg Builder::swap(Reg a, int distance) { return with_immediate(Op::vswap, Kind::vec, a, distance); }

Reg Builder::unzip(Op op, Reg a, Reg b, int odd) {
  Instruction& i = append(op);
  i.src[0] = a;
  i.src[1] = b;
  i.immediate = odd;
  return i.dst = fresh(Kind::vec);
}
Reg Builder::even_lanes(Reg a, Reg b) { return unzip(Op::vunzip_lanes, a, b, 0); }
Reg Builder::odd_lanes(Reg a, Reg b) { return unzip(Op::vunzip_lanes, a, b, 1); }
Reg Builder::even_runs(Reg a, Reg b) { return unzip(Op::vunzip_runs, a, b, 0); }
Reg Builder::odd_runs(Reg a, Reg b) { return unzip(Op::vunzip_runs, a, b, 1); }

// --- bytes

Reg Builder::lookup_bytes(Reg table, Reg index) {
  return binary(Op::vlookup_bytes, Kind::vec, table, index);
}
Reg Builder::interleave_low(Reg a, Reg b) { return binary(Op::vinterleave_low, Kind::vec, a, b); }
Reg Builder::interleave_high(Reg a, Reg b) { return binary(Op::vinterleave_high, Kind::vec, a, b); }
Reg Builder::interleave_halves_low(Reg a, Reg b) {
  return binary(Op::vinterleave_halves_low, Kind::vec, a, b);
}
Reg Builder::interleave_halves_high(Reg a, Reg b) {
  return binary(Op::vinterleave_halves_high, Kind::vec, a, b);
}

// --- masks

Reg Builder::tail_mask(Reg count) { return unary(Op::mtail, Kind::mask, count); }
Reg Builder::less(Reg a, Reg b) { return binary(Op::mcmp_lt, Kind::mask, a, b); }
Reg Builder::less_equal(Reg a, Reg b) { return binary(Op::mcmp_le, Kind::mask, a, b); }
Reg Builder::equal(Reg a, Reg b) { return binary(Op::mcmp_eq, Kind::mask, a, b); }
Reg Builder::not_equal(Reg a, Reg b) { return binary(Op::mcmp_ne, Kind::mask, a, b); }
Reg Builder::iequal(Reg a, Reg b) { return binary(Op::micmp_eq, Kind::mask, a, b); }
Reg Builder::igreater(Reg a, Reg b) { return binary(Op::micmp_gt, Kind::mask, a, b); }
Reg Builder::mask_and(Reg a, Reg b) { return binary(Op::mand, Kind::mask, a, b); }
Reg Builder::mask_or(Reg a, Reg b) { return binary(Op::mor, Kind::mask, a, b); }
Reg Builder::mask_andn(Reg a, Reg b) { return binary(Op::mandn, Kind::mask, a, b); }

Reg Builder::select(Reg mask, Reg a, Reg b) {
  Instruction& i = append(Op::vselect);
  i.src = {mask, a, b};
  return i.dst = fresh(Kind::vec);
}

// --- tiles

void Builder::save_tiles(Address to) { append(Op::tsave).address = to; }
void Builder::configure_tiles() { append(Op::tconfig); }
void Builder::restore_tiles(Address from) { append(Op::trestore).address = from; }
Reg Builder::tile_zero() { return append(Op::tzero).dst = fresh(Kind::tile); }

Reg Builder::tile_load(Address address, Reg row_stride) {
  Instruction& i = append(Op::tload);
  i.address = address;
  i.src[0] = row_stride;
  return i.dst = fresh(Kind::tile);
}

void Builder::tile_load_into(Reg tile, Address address, Reg row_stride) {
  Instruction& i = append(Op::tload);
  i.address = address;
  i.src[0] = row_stride;
  i.dst = tile;
}

void Builder::tile_store(Address address, Reg row_stride, Reg tile) {
  Instruction& i = append(Op::tstore);
  i.address = address;
  i.src = {row_stride, tile, {}};
}

void Builder::tile_dot_bf16(Reg accumulator, Reg a, Reg b) {
  accumulate(Op::tdpbf16, accumulator, a, b);
}

void Builder::prefetch(Address address, int level) {
  Instruction& i = append(Op::prefetch);
  i.address = address;
  i.immediate = level;
}

// --- composites

Reg Builder::reduce_add(Reg a) {
  for (int distance = lanes() / 2; distance > 0; distance /= 2) a = vadd(a, swap(a, distance));
  return a;
}

Reg Builder::reduce_max(Reg a) {
  for (int distance = lanes() / 2; distance > 0; distance /= 2) a = vmax(a, swap(a, distance));
  return a;
}

Reg Builder::round_to_bf16_bits(Reg f32) {
  // The addition that rounds would carry a NaN's payload into the sign (0x7fffffff -> -0), so NaN
  // takes its own path: truncated, with the quiet bit set.
  Reg high = vshift_right(f32, 16);
  Reg lowest_kept_bit = vand(high, splat_bits(1));
  Reg rounded = iadd(iadd(f32, splat_bits(0x7fff)), lowest_kept_bit);
  rounded = vshift_right(rounded, 16);
  Reg quiet_nan = vor(high, splat_bits(0x40));
  return select(not_equal(f32, f32), quiet_nan, rounded);
}

}  // namespace tilewright::jit::vir
