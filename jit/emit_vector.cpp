// Emission of vector ops that AVX2 and AVX-512 encode alike; the operands' width selects VEX or
// EVEX. Ops that differ are only dispatched here.
//
// Tested by emit_test, filetests/code.
#include <array>
#include <numeric>

#include "jit/emission.h"

namespace tilewright::jit::emission {
namespace {

constexpr int kBf16Shift = 16;  // a bf16 is the high half of a float

// One 16 or 8-bit element, zero-extended, to lane 0; the other lanes are 0.
void load_narrow(Site& s) {
  if (s.element() == vir::Element::u8) {
    s.as.movzx8(kScratch, s.memory);
  } else {
    s.as.movzx16(kScratch, s.memory);
  }
  if (s.element() == vir::Element::bf16) s.as.shl32(kScratch, kBf16Shift);
  s.as.vmovd(s.vd().low(), kScratch);
}

// A half of each i64: two vectors of them, whose wanted halves a shuffle joins within each 128 bits
// (two of the first vector, two of the second); then those pairs are put in order.
void load_halves(Site& s) {
  const bool low = s.element() == vir::Element::i64_low;
  Memory second = s.memory;
  second.disp += 4 * s.lanes;
  s.as.vmovups(s.vd(), s.memory);
  s.as.vmovups(s.temp(), second);
  s.as.vshufps(s.vd(), s.vd(), s.temp(), low ? 0x88 : 0xDD);
  std::array<std::uint32_t, 16> order;
  const auto lanes = static_cast<std::uint32_t>(s.lanes);
  for (std::uint32_t i = 0; i < lanes; ++i) {
    const std::uint32_t part = i % (lanes / 2) / 2, from_second = i / (lanes / 2);
    order[i] = 4 * part + 2 * from_second + i % 2;
  }
  s.as.vmovups(s.temp(), s.as.table(std::as_bytes(std::span(order).first(lanes))));
  s.as.vpermps(s.vd(), s.temp(), s.vd());
}

}  // namespace

int temporary_count(const vir::Instruction& instruction, int lanes) {
  using vir::Element;
  using vir::Op;
  const Element element = instruction.element;
  // AVX2 has no truncating stores: the low parts are gathered in a temporary first.
  const bool truncates = element == Element::u16 || element == Element::u8;
  if (instruction.op == Op::vstore && lanes == 8 && truncates) return 1;
  if (element == Element::i64_low || element == Element::i64_high) return 1;
  // One half is converted to a register: the instruction's memory form would store 8 bytes.
  if (instruction.op == Op::vstore1 && element == Element::f16) return 1;
  return 0;
}

Memory lane_numbers(Assembler& as) {
  std::array<std::uint32_t, 16> numbers;
  std::iota(numbers.begin(), numbers.end(), 0u);
  return as.table(std::as_bytes(std::span(numbers)));
}

// The upper bound by `cmov` from the source, the lower one from a zero in the pool, so that no
// second scratch register is needed.
void clamp_to_scratch(Site& s) {
  s.as.mov(kScratch, s.lanes);
  s.as.cmp(kScratch, s.g(0));
  s.as.cmovg(kScratch, s.g(0));
  s.as.test(kScratch, kScratch);
  s.as.cmovs(kScratch, s.as.constant_u64(0));
}

// A 128-bit instruction clears the whole register; from zmm16 on that is EVEX (AVX-512VL).
void vzero(Site& s) { s.as.vxorps(s.vd().low(), s.vd().low(), s.vd().low()); }

void vconst(Site& s) {
  const auto bits = static_cast<std::uint32_t>(s.immediate());
  if (bits == 0) return vzero(s);
  s.as.vbroadcastss(s.vd(), s.as.constant_u32(bits));
}

// vcvtsi2ss keeps the upper part of its destination: clearing it first ends the dependency.
void vsplat_cvt(Site& s) {
  const Vec low = s.vd().low();
  s.as.vxorps(low, low, low);
  s.as.vcvtsi2ss(low, low, s.g(0));
  s.as.vbroadcastss(s.vd(), low);
}

void vmov(Site& s) {
  if (s.vd() != s.v(0)) s.as.vmovups(s.vd(), s.v(0));
}

void viota(Site& s) { s.as.vmovups(s.vd(), lane_numbers(s.as)); }

void vload(Site& s) {
  switch (s.element()) {
    case vir::Element::bf16:
      s.as.vpmovzxwd(s.vd(), s.memory);
      return s.as.vpslld(s.vd(), s.vd(), kBf16Shift);
    case vir::Element::f16:
      return s.as.vcvtph2ps(s.vd(), s.memory);
    case vir::Element::u8:
      return s.as.vpmovzxbd(s.vd(), s.memory);
    case vir::Element::i8:
      s.as.vpmovsxbd(s.vd(), s.memory);
      return s.as.vcvtdq2ps(s.vd(), s.vd());
    case vir::Element::i64_low:
    case vir::Element::i64_high:
      return load_halves(s);
    default:
      return s.as.vmovups(s.vd(), s.memory);
  }
}

void vload1(Site& s) {
  switch (s.element()) {
    case vir::Element::bf16:
    case vir::Element::u8:
      return load_narrow(s);
    case vir::Element::f16:
      load_narrow(s);
      return s.as.vcvtph2ps(s.vd().low(), s.vd().low());
    default:
      return s.as.vmovss(s.vd().low(), s.memory);
  }
}

void vbroadcast(Site& s) {
  switch (s.element()) {
    case vir::Element::bf16:  // both halves of each lane, then the low one is shifted out
      s.as.vpbroadcastw(s.vd(), s.memory);
      return s.as.vpslld(s.vd(), s.vd(), kBf16Shift);
    case vir::Element::f16:
      s.as.vpbroadcastw(s.vd().half(), s.memory);
      return s.as.vcvtph2ps(s.vd(), s.vd().half());
    case vir::Element::u8:
      load_narrow(s);
      return s.as.vpbroadcastd(s.vd(), s.vd().low());
    default:
      return s.as.vbroadcastss(s.vd(), s.memory);
  }
}

void vstore1(Site& s) {
  const Vec low = s.v(0).low();
  switch (s.element()) {
    case vir::Element::f16:
      s.as.vcvtps2ph(s.temp().low(), low, 0);
      return s.as.vpextrw(s.memory, s.temp().low());
    case vir::Element::u16:
      return s.as.vpextrw(s.memory, low);
    case vir::Element::u8:
      return s.as.vpextrb(s.memory, low);
    default:
      return s.as.vmovss(s.memory, low);
  }
}

#define TILEWRIGHT_BINARY(op, mnemonic) \
  void op(Site& s) { s.as.mnemonic(s.vd(), s.v(0), s.v(1)); }
TILEWRIGHT_BINARY(vadd, vaddps)
TILEWRIGHT_BINARY(vsub, vsubps)
TILEWRIGHT_BINARY(vmul, vmulps)
TILEWRIGHT_BINARY(vdiv, vdivps)
TILEWRIGHT_BINARY(vmax, vmaxps)
TILEWRIGHT_BINARY(vmin, vminps)
TILEWRIGHT_BINARY(vscalef, vscalefps)
TILEWRIGHT_BINARY(vand, vandps)
TILEWRIGHT_BINARY(vor, vorps)
TILEWRIGHT_BINARY(vxor, vxorps)
TILEWRIGHT_BINARY(vandn, vandnps)
TILEWRIGHT_BINARY(viadd, vpaddd)
TILEWRIGHT_BINARY(visub, vpsubd)
TILEWRIGHT_BINARY(vimul, vpmulld)
TILEWRIGHT_BINARY(vlookup_bytes, vpshufb)
TILEWRIGHT_BINARY(vinterleave_low, vpunpcklbw)
TILEWRIGHT_BINARY(vinterleave_high, vpunpckhbw)
TILEWRIGHT_BINARY(vinterleave_halves_low, vpunpcklwd)
TILEWRIGHT_BINARY(vinterleave_halves_high, vpunpckhwd)
#undef TILEWRIGHT_BINARY

void vunzip_lanes(Site& s) {
  s.as.vshufps(s.vd(), s.v(0), s.v(1), s.immediate() == 0 ? 0x88 : 0xDD);
}

#define TILEWRIGHT_UNARY(op, mnemonic) \
  void op(Site& s) { s.as.mnemonic(s.vd(), s.v(0)); }
TILEWRIGHT_UNARY(vsqrt, vsqrtps)
TILEWRIGHT_UNARY(vcvt_i32, vcvtps2dq)
TILEWRIGHT_UNARY(vcvt_f32, vcvtdq2ps)
#undef TILEWRIGHT_UNARY

#define TILEWRIGHT_SHIFT(op, mnemonic) \
  void op(Site& s) { s.as.mnemonic(s.vd(), s.v(0), s.small_immediate()); }
TILEWRIGHT_SHIFT(vshli, vpslld)
TILEWRIGHT_SHIFT(vshri, vpsrld)
TILEWRIGHT_SHIFT(vsari, vpsrad)
#undef TILEWRIGHT_SHIFT

#define TILEWRIGHT_ACCUMULATE(op, mnemonic) \
  void op(Site& s) { s.as.mnemonic(s.v(0), s.v(1), s.v(2)); }
TILEWRIGHT_ACCUMULATE(vfma, vfmadd231ps)
TILEWRIGHT_ACCUMULATE(vfnma, vfnmadd231ps)
TILEWRIGHT_ACCUMULATE(vfms, vfmsub231ps)
TILEWRIGHT_ACCUMULATE(vdpbf16, vdpbf16ps)
TILEWRIGHT_ACCUMULATE(vdpbytes, vpdpbusd)
#undef TILEWRIGHT_ACCUMULATE

void vfma_load(Site& s) { s.as.vfmadd231ps(s.v(0), s.v(1), s.memory); }

#define TILEWRIGHT_DISPATCH(op) \
  void op(Site& s) { s.wide() ? avx512::op(s) : avx2::op(s); }
TILEWRIGHT_PER_WIDTH(TILEWRIGHT_DISPATCH)
#undef TILEWRIGHT_DISPATCH

}  // namespace tilewright::jit::emission
