// Emission of what AVX2 does in its own way: masks are vectors of all-ones lanes, and stores of
// narrow elements are gathered with a byte shuffle.
//
// Tested by emit_test, filetests/code.
#include <array>

#include "jit/emission.h"

namespace tilewright::jit::emission::avx2 {
namespace {

// vcmpps: ordered and quiet; not-equal is unordered, so that it is true on NaN.
enum Predicate { kLess = 0x11, kLessEqual = 0x12, kEqual = 0x00, kNotEqual = 0x04 };

// vpshufb control: the low `bytes` bytes of each 32-bit element of a 128-bit half, side by side.
Memory gather_low_bytes(Assembler& as, int bytes) {
  std::array<std::uint8_t, 32> control;
  control.fill(0x80);  // writes 0
  for (int half = 0; half < 2; ++half) {
    for (int element = 0; element < 4; ++element) {
      for (int byte = 0; byte < bytes; ++byte) {
        control[static_cast<std::size_t>(16 * half + bytes * element + byte)] =
            static_cast<std::uint8_t>(4 * element + byte);
      }
    }
  }
  return as.table(std::as_bytes(std::span(control)));
}

void store_u16(Site& s) {
  s.as.vpshufb(s.temp(), s.v(0), gather_low_bytes(s.as, 2));
  s.as.vpermq(s.temp(), s.temp(), 0x08);  // quadwords 0 and 2 to the low half
  s.as.vmovups(s.memory, s.temp().low());
}

void store_u8(Site& s) {
  s.as.vpshufb(s.temp(), s.v(0), gather_low_bytes(s.as, 1));
  s.as.vmovd(s.memory, s.temp().low());
  s.as.vextracti128(s.temp().low(), s.temp());
  Memory upper = s.memory;
  upper.disp += 4;
  s.as.vmovd(upper, s.temp().low());
}

}  // namespace

void vsplat(Site& s) {
  s.as.vmovd(s.vd().low(), s.g(0));
  s.as.vpbroadcastd(s.vd(), s.vd().low());
}

void vcvt_f16(Site& s) {
  s.as.vpshufb(s.vd(), s.v(0), gather_low_bytes(s.as, 2));
  s.as.vpermq(s.vd(), s.vd(), 0x08);  // quadwords 0 and 2 to the low half
  s.as.vcvtph2ps(s.vd(), s.vd().low());
}

void vloadm(Site& s) { s.as.vmaskmovps(s.vd(), s.v(0), s.memory); }
void vstorem(Site& s) { s.as.vmaskmovps(s.memory, s.v(1), s.v(0)); }

void vstore(Site& s) {
  switch (s.element()) {
    case vir::Element::f16:
      return s.as.vcvtps2ph(s.memory, s.v(0));
    case vir::Element::u16:
      return store_u16(s);
    case vir::Element::u8:
      return store_u8(s);
    default:
      return s.as.vmovups(s.memory, s.v(0));
  }
}

// 8: nearest even, without the inexact exception.
void vround(Site& s) { s.as.vroundps(s.vd(), s.v(0), 8); }

void vswap(Site& s) {
  switch (s.immediate()) {
    case 1:
      return s.as.vpermilps(s.vd(), s.v(0), 0xB1);
    case 2:
      return s.as.vpermilps(s.vd(), s.v(0), 0x4E);
    default:
      return s.as.vperm2f128(s.vd(), s.v(0), s.v(0), 0x01);
  }
}

void vunzip_runs(Site& s) {
  s.as.vperm2f128(s.vd(), s.v(0), s.v(1), s.immediate() == 0 ? 0x20 : 0x31);
}

void vbroadcast16(Site& s) { s.as.vbroadcasti128(s.vd(), s.memory); }

// Lane i is set when count > i, in 32 bits: the count is clamped first.
void mtail(Site& s) {
  clamp_to_scratch(s);
  s.as.vmovd(s.vd().low(), kScratch);
  s.as.vpbroadcastd(s.vd(), s.vd().low());
  s.as.vpcmpgtd(s.vd(), s.vd(), lane_numbers(s.as));
}

void mcmp_lt(Site& s) { s.as.vcmpps(s.vd(), s.v(0), s.v(1), kLess); }
void mcmp_le(Site& s) { s.as.vcmpps(s.vd(), s.v(0), s.v(1), kLessEqual); }
void mcmp_eq(Site& s) { s.as.vcmpps(s.vd(), s.v(0), s.v(1), kEqual); }
void mcmp_ne(Site& s) { s.as.vcmpps(s.vd(), s.v(0), s.v(1), kNotEqual); }
void micmp_eq(Site& s) { s.as.vpcmpeqd(s.vd(), s.v(0), s.v(1)); }
void micmp_gt(Site& s) { s.as.vpcmpgtd(s.vd(), s.v(0), s.v(1)); }
void mand(Site& s) { s.as.vandps(s.vd(), s.v(0), s.v(1)); }
void mor(Site& s) { s.as.vorps(s.vd(), s.v(0), s.v(1)); }
void mandn(Site& s) { s.as.vandnps(s.vd(), s.v(0), s.v(1)); }
void vselect(Site& s) { s.as.vblendvps(s.vd(), s.v(2), s.v(1), s.v(0)); }

}  // namespace tilewright::jit::emission::avx2
