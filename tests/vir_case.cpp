// Cases for every op of op_list.def. See vir_case.h.
#include "vir_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "vir_case_writer.h"

namespace tilewright::testing {
namespace {

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

}  // namespace

VirCase Writer::finish(Random& random, std::size_t area_size, bool float_result) && {
  VirCase result;
  result.name = function_.name;
  result.float_result = float_result;
  result.input = random_input(random, lanes());
  result.area = random_area(random, area_size);
  result.output_size = output_size_;
  result.function = std::move(function_);
  return result;
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
    case Op::vunzip_lanes:
    case Op::vunzip_runs:
      return {0, 1};
    case Op::prefetch:
      return {0, 1, 2, 3};
    default:
      return {0};
  }
}

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

bool is_tile_op(Op op) {
  const Signature& signature = jit::vir::signature(op);
  return op == Op::tsave || op == Op::tconfig || op == Op::trestore ||
         signature.definition == 'X' ||
         signature.operands.find_first_of("XY") != std::string_view::npos;
}

namespace {

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
    case Element::i64_low:
    case Element::i64_high:
      return 8;
    case Element::u8:
    case Element::i8:
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
    case Op::vbroadcast16:
      return 16;
    case Op::glea:
    case Op::prefetch:
      return 0;
    default:
      return element_bytes(form.element) * static_cast<std::size_t>(lanes);
  }
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

void add_op_cases(Op op, int lanes, Random& random, std::vector<VirCase>& cases) {
  const Signature& signature = jit::vir::signature(op);
  std::vector<Element> elements = {Element::none};
  if (signature.has_element) {
    elements = {Element::f32, Element::bf16, Element::f16, Element::i64,     Element::i32,
                Element::u16, Element::u8,   Element::i8,  Element::i64_low, Element::i64_high};
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

// The thread's tiles are saved in the area's first bytes; behind them lie what three tiles are
// loaded from, whose rows are further apart than their bytes. The last is the result.
VirCase tile_case(Op op, Random& random) {
  Writer writer(std::string(op_name(op)), 16);
  const std::int32_t row_bytes = 64, stride_bytes = 72;
  const Reg stride = writer.fresh(Kind::gpr), output_stride = writer.fresh(Kind::gpr);
  for (const auto& [reg, bytes] : {std::pair{stride, stride_bytes}, {output_stride, row_bytes}}) {
    Instruction& constant = writer.add(Op::gconst);
    constant.dst = reg;
    constant.immediate = bytes;
  }
  writer.add(Op::tsave).address = writer.at(kArea, 0);
  writer.add(Op::tconfig);
  std::array<Reg, 3> tiles;
  std::int32_t from = kAreaOffset;
  for (Reg& tile : tiles) {
    tile = writer.fresh(Kind::tile);
    Instruction& load = writer.add(Op::tload);
    load.dst = tile;
    load.address = writer.at(kArea, from);
    load.src[0] = stride;
    from += 15 * stride_bytes + row_bytes;
  }
  if (op == Op::tzero) writer.add(op).dst = tiles[2];
  if (op == Op::tdpbf16) writer.add(op).src = {tiles[2], tiles[0], tiles[1]};
  Instruction& store = writer.add(Op::tstore);
  store.address = writer.at(kOutput, writer.output_bytes(16 * 64));
  store.src = {output_stride, tiles[2], {}};
  writer.add(Op::trestore).address = writer.at(kArea, 0);
  return std::move(writer).finish(random, static_cast<std::size_t>(from), op == Op::tdpbf16);
}

}  // namespace

std::vector<VirCase> op_cases(int lanes, int rounds) {
  std::vector<VirCase> cases;
  for (int round = 0; round < rounds; ++round) {
    Random random(static_cast<std::uint64_t>(round) + 1);
    for (Op op : kAllOps) {
      if (is_tile_op(op)) {
        if (lanes == 16) cases.push_back(tile_case(op, random));
      } else if (!is_structure(op)) {
        add_op_cases(op, lanes, random, cases);
      }
    }
  }
  Random random(0);
  for (Op op : {Op::vloadm, Op::vstorem}) {
    for (Element element :
         {Element::f32, Element::bf16, Element::f16, Element::u16, Element::u8, Element::i8}) {
      for (int count = -1; count <= lanes + 1; ++count) {
        VirCase made = tail_case(op, element, count, lanes, random);
        if (verify(made.function).ok()) cases.push_back(std::move(made));
      }
    }
  }
  return cases;
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
