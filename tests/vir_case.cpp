// Cases for every op of op_list.def, and random programs. See vir_case.h.
#include "vir_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <cmath>
#include <cstring>
#include <random>

#include "jit/vir/signature.h"

namespace tilewright::testing {
namespace {

using jit::vir::Address;
using jit::vir::Element;
using jit::vir::Function;
using jit::vir::Instruction;
using jit::vir::Kind;
using jit::vir::Op;
using jit::vir::Reg;
using jit::vir::Signature;

constexpr Op kAllOps[] = {
#define VIR_OP(name, signature) Op::name,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

// The input: 8 general values, then vectors. The memory operand lies at kAreaOffset, so that bytes
// before it show whether the address is right; nothing lies behind it.
constexpr int kGeneralValues = 8;
constexpr int kVectorValues = 4;
constexpr int kVectorOffset = 8 * kGeneralValues;
constexpr int kAreaOffset = 64;
constexpr std::int64_t kIndexValue = 4;  // what the index register holds
constexpr std::size_t kIndexSlot = 7;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  std::uint64_t below(std::uint64_t limit) { return engine_() % limit; }
  template <class T, std::size_t n>
  T pick(const T (&values)[n]) {
    return values[below(n)];
  }

  // Floats and integers of every kind: special values, moderate ones, any bits.
  std::uint32_t lane() {
    static constexpr std::uint32_t kSpecial[] = {
        0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000,
        0x00000001, 0x807fffff, 0x7f7fffff, 0x4f000000, 0xcf000000, 0x477fe000, 0x477ff000,
        0x33000000, 0x33000001, 0x3f000000, 0x3fc00000, 0x40200000, 0xffffffff, 0x7fffffff};
    switch (below(4)) {
      case 0:
        return pick(kSpecial);
      case 1:
        return static_cast<std::uint32_t>(bits());
      default: {
        const double mantissa = static_cast<double>(below(1 << 24)) / (1 << 23) - 1;
        const int exponent = static_cast<int>(below(24)) - 8;
        return std::bit_cast<std::uint32_t>(static_cast<float>(std::ldexp(mantissa, exponent)));
      }
    }
  }
  std::int64_t general() {
    switch (below(3)) {
      case 0:
        return static_cast<std::int64_t>(bits());
      case 1:
        return static_cast<std::int64_t>(below(40)) - 10;
      default:
        return pick({std::int64_t{0}, std::int64_t{1}, std::int64_t{-1}, std::int64_t{1} << 32,
                     -(std::int64_t{1} << 32) + 5, LLONG_MAX, LLONG_MIN});
    }
  }
  std::int64_t pick(std::initializer_list<std::int64_t> values) {
    return values.begin()[below(values.size())];
  }

 private:
  std::mt19937_64 engine_;
};

template <class T>
void append(std::vector<std::byte>& bytes, T value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof value);
}

std::vector<std::byte> random_input(Random& random, int lanes) {
  std::vector<std::byte> input;
  for (std::size_t i = 0; i < kGeneralValues; ++i) {
    append(input, i == kIndexSlot ? kIndexValue : random.general());
  }
  for (int i = 0; i < kVectorValues * lanes; ++i) append(input, random.lane());
  return input;
}

std::vector<std::byte> random_area(Random& random, std::size_t size) {
  std::vector<std::byte> area;
  while (area.size() < size) append(area, random.lane());
  area.resize(size);
  return area;
}

// Appends raw instructions, so that any combination of registers can be made.
class Writer {
 public:
  Writer(std::string name, int lanes) {
    function_.name = std::move(name);
    function_.lanes = lanes;
    function_.arg_count = kVirCaseArgs;
    for (int slot = 0; slot < kVirCaseArgs; ++slot) {
      pointers_.push_back(fresh(Kind::gpr));
      Instruction& in = add(Op::garg);
      in.dst = pointers_.back();
      in.immediate = slot;
    }
  }

  Instruction& add(Op op, Element element = Element::none) {
    function_.code.push_back({.op = op, .element = element, .dst = {}, .src = {}, .address = {}});
    return function_.code.back();
  }
  Reg fresh(Kind kind) {
    int& count = kind == Kind::gpr   ? function_.gpr_count
                 : kind == Kind::vec ? function_.vec_count
                                     : function_.mask_count;
    return {kind, count++};
  }
  Address at(VirCaseArg slot, std::int32_t disp) const {
    return {pointers_[static_cast<std::size_t>(slot)], {}, 1, disp};
  }
  int lanes() const { return function_.lanes; }

  void load_general(Reg reg, int slot) {
    Instruction& in = add(Op::gload, Element::i64);
    in.dst = reg;
    in.address = at(kInput, 8 * slot);
  }
  void load_vector(Reg reg, int slot) {
    Instruction& in = add(Op::vload, Element::f32);
    in.dst = reg;
    in.address = at(kInput, kVectorOffset + slot * 4 * lanes());
  }
  // The mask of the positive integers of an input vector.
  void load_mask(Reg reg, int slot) {
    const Reg values = fresh(Kind::vec), zero = fresh(Kind::vec);
    load_vector(values, slot);
    add(Op::vzero).dst = zero;
    Instruction& in = add(Op::micmp_gt);
    in.dst = reg;
    in.src = {values, zero, {}};
  }
  void load(Reg reg, int slot) {
    if (reg.kind == Kind::gpr) return load_general(reg, slot);
    if (reg.kind == Kind::vec) return load_vector(reg, slot % kVectorValues);
    load_mask(reg, slot % kVectorValues);
  }

  // Stores a register at the end of the output.
  void output(Reg reg) {
    if (reg.kind == Kind::gpr) {
      Instruction& in = add(Op::gstore, Element::i64);
      in.src[0] = reg;
      in.address = at(kOutput, static_cast<std::int32_t>(output_size_));
      output_size_ += 8;
      return;
    }
    Reg vector = reg;
    if (reg.kind == Kind::mask) {
      const Reg zero = fresh(Kind::vec), ones = fresh(Kind::vec);
      vector = fresh(Kind::vec);
      add(Op::vzero).dst = zero;
      Instruction& constant = add(Op::vconst);
      constant.dst = ones;
      constant.immediate = 0xffffffff;
      Instruction& select = add(Op::vselect);
      select.dst = vector;
      select.src = {reg, ones, zero};
    }
    Instruction& in = add(Op::vstore, Element::f32);
    in.src[0] = vector;
    in.address = at(kOutput, static_cast<std::int32_t>(output_size_));
    output_size_ += static_cast<std::size_t>(4 * lanes());
  }

  VirCase finish(Random& random, std::size_t area_size, bool float_result) && {
    VirCase result;
    result.name = function_.name;
    result.float_result = float_result;
    result.input = random_input(random, lanes());
    result.area = random_area(random, area_size);
    result.output_size = output_size_;
    result.function = std::move(function_);
    return result;
  }

 private:
  Function function_;
  std::vector<Reg> pointers_;
  std::size_t output_size_ = 0;
};

// --- one case for each form of an op

// Which element types, immediates and address forms to try.
struct Form {
  Element element = Element::none;
  std::int64_t immediate = 0;
  bool indexed = false;
  bool aliased = false;  // the destination is also the last source
};

std::size_t element_bytes(Element element) {
  switch (element) {
    case Element::none:
    case Element::f32:
    case Element::i32:
      return 4;
    case Element::i64:
      return 8;
    case Element::u8:
      return 1;
    default:
      return 2;
  }
}

// Bytes behind the address of a form: the area ends there.
std::size_t touched_bytes(Op op, const Form& form, int lanes) {
  switch (op) {
    case Op::gload:
    case Op::gstore:
    case Op::vload1:
    case Op::vbroadcast:
    case Op::vstore1:
      return element_bytes(form.element);
    case Op::glea:
    case Op::prefetch:
      return 0;
    default:
      return element_bytes(form.element) * static_cast<std::size_t>(lanes);
  }
}

std::vector<std::int64_t> immediates(Op op, int lanes) {
  switch (op) {
    case Op::garg:
      return {};
    case Op::gconst:
      return {0, 1, -1, 0x7fffffff, 0x80000000, -0x80000000ll, 0x123456789abcdef0};
    case Op::gaddi:
    case Op::gmuli:
    case Op::gandi:
      return {0, 1, -1, 127, 128, -129, 0x7fffffff, -0x80000000ll};
    case Op::gshli:
    case Op::gshri:
      return {0, 1, 31, 32, 63};
    case Op::vconst:
      return {0, 0x3f800000, 0x80000000, 0xffffffff};
    case Op::vshli:
    case Op::vshri:
    case Op::vsari:
      return {0, 1, 16, 31};
    case Op::vswap:
      return lanes == 16 ? std::vector<std::int64_t>{1, 2, 4, 8}
                         : std::vector<std::int64_t>{1, 2, 4};
    case Op::prefetch:
      return {0, 1, 2, 3};
    default:
      return {0};
  }
}

// The results of these are floats that the machine may give with another NaN.
bool computes_floats(Op op) {
  switch (op) {
    case Op::vadd:
    case Op::vsub:
    case Op::vmul:
    case Op::vdiv:
    case Op::vsqrt:
    case Op::vround:
    case Op::vmax:
    case Op::vmin:
    case Op::vfma:
    case Op::vfnma:
    case Op::vfms:
    case Op::vfma_load:
    case Op::vscalef:
    case Op::vdpbf16:
    case Op::vload:
    case Op::vload1:
    case Op::vloadm:
    case Op::vbroadcast:
      return true;
    default:
      return false;
  }
}

Kind kind_of_destination(const Signature& signature) {
  return jit::vir::kind_of(signature.definition);
}

std::string form_name(Op op, const Form& form) {
  std::string name(jit::vir::op_name(op));
  if (form.element != Element::none) name += fmt::format(".{}", element_name(form.element));
  name += fmt::format("_{}", form.immediate);
  if (form.indexed) name += "_indexed";
  if (form.aliased) name += "_aliased";
  return name;
}

VirCase op_case(Op op, const Form& form, int lanes, Random& random) {
  const Signature& signature = jit::vir::signature(op);
  Writer writer(form_name(op, form), lanes);
  Instruction in{.op = op, .element = form.element, .dst = {}, .src = {}, .address = {}};
  in.immediate = form.immediate;
  for (std::size_t k = 0; k < static_cast<std::size_t>(signature.source_count); ++k) {
    in.src[k] = writer.fresh(jit::vir::kind_of(signature.source[k]));
    writer.load(in.src[k], static_cast<int>(k));
  }
  if (signature.has_address) {
    in.address = writer.at(kArea, kAreaOffset);
    if (form.indexed) {
      in.address.index = writer.fresh(Kind::gpr);
      in.address.scale = 1 << random.below(4);
      in.address.disp -= static_cast<std::int32_t>(kIndexValue * in.address.scale);
      writer.load_general(in.address.index, kIndexSlot);
    }
  }
  Reg result = signature.definition != 0 ? writer.fresh(kind_of_destination(signature)) : Reg{};
  if (form.aliased) result = in.src[static_cast<std::size_t>(signature.source_count) - 1];
  in.dst = signature.definition != 0 ? result : Reg{};
  writer.add(op) = in;
  if (signature.definition == 0 && signature.source[0] == 'W') result = in.src[0];
  if (op == Op::glea) {  // relative to the area: an address differs from run to run
    Instruction& relative = writer.add(Op::gsub);
    relative.dst = result;
    relative.src = {result, in.address.base, {}};
  }
  // The sources come out as well: an op must not change what it only reads.
  for (Reg source : in.src) {
    if (source.valid() && source != result) writer.output(source);
  }
  if (result.valid()) writer.output(result);
  const std::size_t area = kAreaOffset + touched_bytes(op, form, lanes);
  return std::move(writer).finish(random, area, computes_floats(op));
}

bool is_structure(Op op) {
  switch (op) {
    case Op::loop:
    case Op::endloop:
    case Op::if_:
    case Op::else_:
    case Op::endif:
    case Op::garg:
      return true;
    default:
      return false;
  }
}

void add_op_cases(Op op, int lanes, Random& random, std::vector<VirCase>& cases) {
  const Signature& signature = jit::vir::signature(op);
  std::vector<Element> elements = {Element::none};
  if (signature.has_element) {
    elements = {Element::f32, Element::bf16, Element::f16, Element::i64,
                Element::i32, Element::u16,  Element::u8};
  }
  const bool can_alias =
      signature.definition != 0 && signature.source_count > 0 &&
      jit::vir::kind_of(signature.source[static_cast<std::size_t>(signature.source_count) - 1]) ==
          kind_of_destination(signature);
  for (Element element : elements) {
    for (std::int64_t immediate : immediates(op, lanes)) {
      for (bool indexed : {false, true}) {
        for (bool aliased : {false, true}) {
          if ((indexed && !signature.has_address) || (aliased && !can_alias)) continue;
          VirCase made = op_case(op, {element, immediate, indexed, aliased}, lanes, random);
          if (verify(made.function).ok()) cases.push_back(std::move(made));  // else not legal
        }
      }
    }
  }
}

// Masked loads and stores of the first `count` lanes, at the end of the area.
VirCase tail_case(Op op, Element element, int count, int lanes, Random& random) {
  Writer writer(fmt::format("{}.{}_tail{}", op_name(op), element_name(element), count), lanes);
  const Reg n = writer.fresh(Kind::gpr), mask = writer.fresh(Kind::mask);
  Instruction& constant = writer.add(Op::gconst);
  constant.dst = n;
  constant.immediate = count;
  Instruction& tail = writer.add(Op::mtail);
  tail.dst = mask;
  tail.src[0] = n;
  const Reg value = writer.fresh(Kind::vec);
  Instruction in{.op = op, .element = element, .dst = {}, .src = {}, .address = {}};
  in.address = writer.at(kArea, kAreaOffset);
  if (op == Op::vloadm) {
    in.dst = value;
    in.src[0] = mask;
  } else {
    writer.load_vector(value, 0);
    in.src = {value, mask, {}};
  }
  writer.add(op) = in;
  writer.output(value);
  const std::size_t size =
      element_bytes(element) * static_cast<std::size_t>(std::clamp(count, 0, lanes));
  return std::move(writer).finish(random, kAreaOffset + size, op == Op::vloadm);
}

// --- random programs

class ProgramWriter {
 public:
  ProgramWriter(Writer& writer, Random& random, int registers) : writer_(writer), random_(random) {
    for (int i = 0; i < registers; ++i) {
      for (Kind kind : {Kind::gpr, Kind::vec, Kind::mask}) {
        pool(kind).push_back(writer_.fresh(kind));
        writer_.load(pool(kind).back(), i % kGeneralValues);
      }
    }
  }

  void write(int instructions) {
    while (instructions > 0) instructions -= write_one(0);
    for (Kind kind : {Kind::gpr, Kind::vec, Kind::mask}) {
      for (Reg reg : pool(kind)) writer_.output(reg);
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
    if (is_structure(op)) return false;
    switch (op) {
      case Op::glea:
      case Op::vdpbf16:
      case Op::vfma_load:
        return false;
      case Op::vmax:
      case Op::vmin:
        return true;
      default:
        return !computes_floats(op) || jit::vir::signature(op).has_address;
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

  // Anywhere in the first 64 bytes of the area, by an index made for it and never changed.
  Address random_address() {
    Address address = writer_.at(kArea, static_cast<std::int32_t>(random_.below(32)));
    if (random_.below(2) == 0) return address;
    const Reg index = writer_.fresh(Kind::gpr);
    Instruction& in = writer_.add(Op::gandi);
    in.dst = index;
    in.src[0] = any(Kind::gpr);
    in.immediate = 3;
    address.index = index;
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
};

}  // namespace

std::vector<VirCase> op_cases(int lanes, int rounds) {
  std::vector<VirCase> cases;
  for (int round = 0; round < rounds; ++round) {
    Random random(static_cast<std::uint64_t>(round) + 1);
    for (Op op : kAllOps) {
      if (!is_structure(op)) add_op_cases(op, lanes, random, cases);
    }
  }
  Random random(0);
  for (Op op : {Op::vloadm, Op::vstorem}) {
    for (Element element : {Element::f32, Element::bf16, Element::f16, Element::u16, Element::u8}) {
      for (int count = -1; count <= lanes + 1; ++count) {
        VirCase made = tail_case(op, element, count, lanes, random);
        if (verify(made.function).ok()) cases.push_back(std::move(made));
      }
    }
  }
  return cases;
}

VirCase random_program(std::uint64_t seed, int lanes, int registers, int instructions) {
  Random random(seed);
  Writer writer(fmt::format("random{}_lanes{}_registers{}", seed, lanes, registers), lanes);
  ProgramWriter(writer, random, registers).write(instructions);
  return std::move(writer).finish(random, 256, false);
}

VirCaseResult interpret_case(const VirCase& vir_case) {
  VirCaseResult result{vir_case.area, std::vector<std::byte>(vir_case.output_size)};
  const std::int64_t args[kVirCaseArgs] = {reinterpret_cast<std::int64_t>(vir_case.input.data()),
                                           reinterpret_cast<std::int64_t>(result.area.data()),
                                           reinterpret_cast<std::int64_t>(result.output.data())};
  interpret(vir_case.function, args);
  return result;
}

std::string difference(const VirCase& vir_case, const VirCaseResult& expected,
                       const VirCaseResult& actual) {
  if (expected.area != actual.area) return "the area differs";
  if (expected.output == actual.output) return "";
  std::string text;
  for (std::size_t i = 0; i + 4 <= expected.output.size(); i += 4) {
    std::uint32_t want = 0, got = 0;
    std::memcpy(&want, expected.output.data() + i, 4);
    std::memcpy(&got, actual.output.data() + i, 4);
    const bool both_nan = std::isnan(std::bit_cast<float>(want)) &&
                          std::isnan(std::bit_cast<float>(got)) && vir_case.float_result;
    if (want != got && !both_nan) {
      text += fmt::format("output[{}]: expected {:#010x}, got {:#010x}\n", i, want, got);
    }
  }
  return text;
}

}  // namespace tilewright::testing
