// Emission of general-register ops and of structure. Nothing here depends on the vector width.
//
// Tested by emit_test, filetests/code.
#include "jit/emission.h"

namespace tilewright::jit::emission {
namespace {

// d = a op b, for a commutative two-operand instruction.
template <class Apply>
void commutative(Site& s, Apply&& apply) {
  const Gpr d = s.gd();
  if (d == s.g(1)) return apply(d, s.g(0));
  if (d != s.g(0)) s.as.mov(d, s.g(0));
  apply(d, s.g(1));
}

void move(Site& s) {
  if (s.gd() != s.g(0)) s.as.mov(s.gd(), s.g(0));
}

}  // namespace

void gconst(Site& s) {
  if (s.immediate() == 0) return s.as.xor_(s.gd(), s.gd());
  s.as.mov(s.gd(), s.immediate());
}

void garg(Site& s) {
  s.as.mov(s.gd(), Memory{s.args, {}, 1, static_cast<std::int32_t>(8 * s.immediate())});
}

void gmov(Site& s) { move(s); }

void gadd(Site& s) {
  if (s.gd() != s.g(0) && s.gd() != s.g(1)) {
    return s.as.lea(s.gd(), Memory{s.g(0), s.g(1), 1, 0});
  }
  commutative(s, [&](Gpr d, Gpr a) { s.as.add(d, a); });
}

void gaddi(Site& s) {
  const auto value = static_cast<std::int32_t>(s.immediate());
  if (s.gd() == s.g(0)) return s.as.add(s.gd(), value);
  s.as.lea(s.gd(), Memory{s.g(0), {}, 1, value});
}

void gsub(Site& s) {
  if (s.gd() == s.g(1) && s.gd() != s.g(0)) {
    s.as.neg(s.gd());
    return s.as.add(s.gd(), s.g(0));
  }
  move(s);
  s.as.sub(s.gd(), s.g(1));
}

void gmul(Site& s) {
  commutative(s, [&](Gpr d, Gpr a) { s.as.imul(d, a); });
}

void gmuli(Site& s) { s.as.imul(s.gd(), s.g(0), static_cast<std::int32_t>(s.immediate())); }

void gshli(Site& s) {
  move(s);
  s.as.shl(s.gd(), s.small_immediate());
}

void gshri(Site& s) {
  move(s);
  s.as.sar(s.gd(), s.small_immediate());
}

void gandi(Site& s) {
  move(s);
  s.as.and_(s.gd(), static_cast<std::int32_t>(s.immediate()));
}

void gmin(Site& s) {
  commutative(s, [&](Gpr d, Gpr a) {
    s.as.cmp(d, a);
    s.as.cmovg(d, a);
  });
}

void gmax(Site& s) {
  commutative(s, [&](Gpr d, Gpr a) {
    s.as.cmp(a, d);
    s.as.cmovg(d, a);
  });
}

void glea(Site& s) { s.as.lea(s.gd(), s.memory); }

void gload(Site& s) {
  switch (s.element()) {
    case vir::Element::i64:
      return s.as.mov(s.gd(), s.memory);
    case vir::Element::i32:
      return s.as.movsxd(s.gd(), s.memory);
    case vir::Element::u16:
      return s.as.movzx16(s.gd(), s.memory);
    default:
      return s.as.movzx8(s.gd(), s.memory);
  }
}

void gstore(Site& s) {
  switch (s.element()) {
    case vir::Element::i64:
      return s.as.mov(s.memory, s.g(0));
    case vir::Element::i32:
      return s.as.mov32(s.memory, s.g(0));
    case vir::Element::u16:
      return s.as.mov16(s.memory, s.g(0));
    default:
      return s.as.mov8(s.memory, s.g(0));
  }
}

void loop(Site& s) {
  s.as.test(s.g(0), s.g(0));
  s.as.jle(s.end);
  s.as.bind(s.begin);
}

// `dec` sets the flags that `jg` reads; it works on a spilled counter in memory, too.
void endloop(Site& s) {
  if (s.counter.spilled()) {
    s.as.dec(Memory{rsp, {}, 1, s.counter.slot});
  } else {
    s.as.dec(Gpr{s.counter.reg});
  }
  s.as.jg(s.begin);
  s.as.bind(s.end);
}

void if_(Site& s) {
  s.as.test(s.g(0), s.g(0));
  s.as.jz(s.has_else ? s.middle : s.end);
}

void else_(Site& s) {
  s.as.jmp(s.end);
  s.as.bind(s.middle);
}

void endif(Site& s) { s.as.bind(s.end); }

void prefetch(Site& s) { s.as.prefetch(s.memory, s.small_immediate()); }

}  // namespace tilewright::jit::emission
