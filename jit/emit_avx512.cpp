// Emission of what AVX-512 does in its own way: masks live in k-registers, and narrow elements have
// truncating and masked stores.
//
// Tested by emit_test where the host has AVX-512, tests/python/test_avx512_machine.py anywhere,
// filetests/code.
#include "jit/emission.h"

namespace tilewright::jit::emission::avx512 {
namespace {

enum Predicate { kLess = 0x11, kLessEqual = 0x12, kEqual = 0x00, kNotEqual = 0x04 };

}  // namespace

void vsplat(Site& s) { s.as.vpbroadcastd(s.vd(), s.g(0)); }

void vcvt_f16(Site& s) {
  s.as.vpmovdw(s.vd().half(), s.v(0));
  s.as.vcvtph2ps(s.vd(), s.vd().half());
}

void vloadm(Site& s) {
  switch (s.element()) {
    case vir::Element::bf16:
      s.as.vpmovzxwd(s.vd(), s.k(0), s.memory);
      return s.as.vpslld(s.vd(), s.vd(), 16);
    case vir::Element::f16:
      return s.as.vcvtph2ps(s.vd(), s.k(0), s.memory);
    case vir::Element::u8:
      return s.as.vpmovzxbd(s.vd(), s.k(0), s.memory);
    case vir::Element::i8:
      s.as.vpmovsxbd(s.vd(), s.k(0), s.memory);
      return s.as.vcvtdq2ps(s.vd(), s.vd());
    default:
      return s.as.vmovups(s.vd(), s.k(0), s.memory);
  }
}

void vstore(Site& s) {
  switch (s.element()) {
    case vir::Element::f16:
      return s.as.vcvtps2ph(s.memory, s.v(0));
    case vir::Element::u16:
      return s.as.vpmovdw(s.memory, s.v(0));
    case vir::Element::u8:
      return s.as.vpmovdb(s.memory, s.v(0));
    default:
      return s.as.vmovups(s.memory, s.v(0));
  }
}

void vstorem(Site& s) {
  switch (s.element()) {
    case vir::Element::f16:
      return s.as.vcvtps2ph(s.memory, s.k(1), s.v(0));
    case vir::Element::u16:
      return s.as.vpmovdw(s.memory, s.k(1), s.v(0));
    case vir::Element::u8:
      return s.as.vpmovdb(s.memory, s.k(1), s.v(0));
    default:
      return s.as.vmovups(s.memory, s.k(1), s.v(0));
  }
}

// 8: to integers (scale 0), nearest even, without the inexact exception.
void vround(Site& s) { s.as.vrndscaleps(s.vd(), s.v(0), 8); }

void vswap(Site& s) {
  switch (s.immediate()) {
    case 1:
      return s.as.vpermilps(s.vd(), s.v(0), 0xB1);
    case 2:
      return s.as.vpermilps(s.vd(), s.v(0), 0x4E);
    case 4:  // neighbouring 128-bit parts
      return s.as.vshuff32x4(s.vd(), s.v(0), s.v(0), 0xB1);
    default:
      return s.as.vshuff32x4(s.vd(), s.v(0), s.v(0), 0x4E);
  }
}

void vunzip_runs(Site& s) {
  s.as.vshuff32x4(s.vd(), s.v(0), s.v(1), s.immediate() == 0 ? 0x88 : 0xDD);
}

void vbroadcast16(Site& s) { s.as.vbroadcasti32x4(s.vd(), s.memory); }

// All 16 bits, with those from the count on zeroed.
void mtail(Site& s) {
  clamp_to_scratch(s);
  s.as.bzhi32(kScratch, s.as.constant_u32(0xFFFF), kScratch);
  s.as.kmovw(s.kd(), kScratch);
}

void mcmp_lt(Site& s) { s.as.vcmpps(s.kd(), s.v(0), s.v(1), kLess); }
void mcmp_le(Site& s) { s.as.vcmpps(s.kd(), s.v(0), s.v(1), kLessEqual); }
void mcmp_eq(Site& s) { s.as.vcmpps(s.kd(), s.v(0), s.v(1), kEqual); }
void mcmp_ne(Site& s) { s.as.vcmpps(s.kd(), s.v(0), s.v(1), kNotEqual); }
void micmp_eq(Site& s) { s.as.vpcmpeqd(s.kd(), s.v(0), s.v(1)); }
void micmp_gt(Site& s) { s.as.vpcmpgtd(s.kd(), s.v(0), s.v(1)); }
void mand(Site& s) { s.as.kandw(s.kd(), s.k(0), s.k(1)); }
void mor(Site& s) { s.as.korw(s.kd(), s.k(0), s.k(1)); }
void mandn(Site& s) { s.as.kandnw(s.kd(), s.k(0), s.k(1)); }
void vselect(Site& s) { s.as.vblendmps(s.vd(), s.k(0), s.v(2), s.v(1)); }

}  // namespace tilewright::jit::emission::avx512
