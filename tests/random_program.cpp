// Random VIR programs, nested structure included. See vir_case.h.
#include <fmt/format.h>

#include <array>

#include "vir_case_writer.h"

namespace tilewright::testing {
namespace {

class ProgramWriter {
 public:
  ProgramWriter(Writer& writer, Random& random, int registers) : writer_(writer), random_(random) {
    for (int i = 0; i < registers; ++i) {
      for (Kind kind : {Kind::gpr, Kind::vec, Kind::mask}) {
        pool(kind).push_back(writer_.fresh(kind));
        writer_.load(pool(kind).back(), i % kGeneralValues);
      }
      if (i % 3 != 0) continue;
      // Addresses, too, are made of registers that compete with the others.
      bases_.push_back(writer_.fresh(Kind::gpr));
      writer_.copy_pointer(bases_.back(), kArea);
      indices_.push_back(writer_.fresh(Kind::gpr));
      Instruction& in = writer_.add(Op::gandi);
      in.dst = indices_.back();
      in.src[0] = pool(Kind::gpr).back();
      in.immediate = 3;
    }
    byte_mask_ = writer_.fresh(Kind::vec);
    Instruction& in = writer_.add(Op::vconst);
    in.dst = byte_mask_;
    in.immediate = 0xff;
  }

  void write(int instructions) {
    while (instructions > 0) instructions -= write_one(0);
    for (Kind kind : {Kind::gpr, Kind::vec, Kind::mask}) {
      for (Reg reg : pool(kind)) writer_.output(reg);
    }
    for (Reg index : indices_) writer_.output(index);
    // Pointers differ from run to run, their differences do not. The arguments' pointer has been
    // unused since the beginning, so that it is spilled where anything is.
    const Reg area = writer_.fresh(Kind::gpr);
    Instruction& in = writer_.add(Op::garg);
    in.dst = area;
    in.immediate = kArea;
    for (Reg base : bases_) {
      Instruction& difference = writer_.add(Op::gsub);
      difference.dst = base;
      difference.src = {area, base, {}};
      writer_.output(base);
    }
  }

 private:
  std::vector<Reg>& pool(Kind kind) { return pools_[static_cast<std::size_t>(kind)]; }
  Reg any(Kind kind) { return pool(kind)[random_.below(pool(kind).size())]; }

  // Returns how many instructions it wrote.
  int write_one(int depth) {
    const std::uint64_t choice = random_.below(20);
    if (choice == 0 && depth < 3) return write_loop(depth);
    if (choice == 1 && depth < 3) return write_if(depth);
    const Op op = kAllOps[random_.below(std::size(kAllOps))];
    if (!usable(op)) return 0;
    write_op(op);
    return 1;
  }

  // Exact for all bits, no address that depends on where memory is.
  bool usable(Op op) const {
    if (is_structure(op) || is_tile_op(op)) return false;
    switch (op) {
      case Op::glea:
      case Op::vdpbf16:
      case Op::vdpbytes:
      case Op::vfma_load:
        return false;
      case Op::vmax:
      case Op::vmin:
        return true;
      default:
        return !computes_floats(op) || jit::vir::signature(op).has_address ||
               jit::vir::signature(op).source[0] == 'W';
    }
  }

  int write_body(int depth) {
    int written = 0;
    for (std::uint64_t n = 1 + random_.below(6); n > 0; --n) written += write_one(depth + 1);
    return written;
  }

  int write_loop(int depth) {
    const Reg counter = writer_.fresh(Kind::gpr);
    Instruction& constant = writer_.add(Op::gconst);
    constant.dst = counter;
    constant.immediate = static_cast<std::int64_t>(random_.below(4)) - 1;
    writer_.add(Op::loop).src[0] = counter;
    const int written = write_body(depth);
    writer_.add(Op::endloop);
    return written + 3;
  }

  int write_if(int depth) {
    writer_.add(Op::if_).src[0] = any(Kind::gpr);
    int written = write_body(depth);
    if (random_.below(2) == 0) {
      writer_.add(Op::else_);
      written += write_body(depth);
    }
    writer_.add(Op::endif);
    return written + 2;
  }

  void write_op(Op op) {
    const Signature& signature = jit::vir::signature(op);
    Instruction in{.op = op, .element = Element::none, .dst = {}, .src = {}, .address = {}};
    for (std::size_t k = 0; k < static_cast<std::size_t>(signature.source_count); ++k) {
      in.src[k] = any(jit::vir::kind_of(signature.source[k]));
    }
    if (signature.source[0] == 'W') {
      for (Reg source : in.src) make_small(source);
    }
    if (signature.definition != 0) in.dst = any(kind_of_destination(signature));
    if (signature.has_immediate) {
      const std::vector<std::int64_t> choices = immediates(op, writer_.lanes());
      in.immediate = choices[random_.below(choices.size())];
    }
    if (signature.has_element)
      in.element = op == Op::gload || op == Op::gstore ? random_.pick(kGeneralElements)
                                                       : random_.pick(kVectorElements);
    if (signature.has_address) in.address = random_address();
    writer_.add(op) = in;
  }

  // Floats from 0 to 255: products and sums are exact and never NaN.
  void make_small(Reg reg) {
    Instruction& bits = writer_.add(Op::vand);
    bits.dst = reg;
    bits.src = {reg, byte_mask_, {}};
    Instruction& convert = writer_.add(Op::vcvt_f32);
    convert.dst = reg;
    convert.src[0] = reg;
  }

  // Anywhere in the first 64 bytes of the area.
  Address random_address() {
    Address address{
        bases_[random_.below(bases_.size())], {}, 1, static_cast<std::int32_t>(random_.below(32))};
    if (random_.below(2) == 0) return address;
    address.index = indices_[random_.below(indices_.size())];
    address.scale = 1 << random_.below(4);
    return address;
  }

  // Legal for every op that takes them; bits survive all of them.
  static constexpr Element kGeneralElements[] = {Element::i64, Element::i32, Element::u16,
                                                 Element::u8};
  static constexpr Element kVectorElements[] = {Element::f32, Element::i32};

  Writer& writer_;
  Random& random_;
  std::array<std::vector<Reg>, 3> pools_;
  std::vector<Reg> bases_, indices_;  // never changed
  Reg byte_mask_;
};

}  // namespace

VirCase random_program(std::uint64_t seed, int lanes, int registers, int instructions) {
  Random random(seed);
  Writer writer(fmt::format("random{}_lanes{}_registers{}", seed, lanes, registers), lanes);
  ProgramWriter(writer, random, registers).write(instructions);
  return std::move(writer).finish(random, 256, false);
}

}  // namespace tilewright::testing
