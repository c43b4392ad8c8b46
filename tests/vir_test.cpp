// Tests of VIR: the text form, the verifier, the Builder. The files of filetests/vir hold functions
// that must print as they are written, and wrong ones with "; error: <message>" on the offending
// line; BLESS=1 rewrites them.
//
// The interpreter has its own file: vir_interpret_test.
#include "jit/vir/vir.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <set>
#include <sstream>

#include "jit/vir/builder.h"
#include "jit/vir/signature.h"

namespace tilewright::jit::vir {
namespace {

constexpr Op kAllOps[] = {
#define VIR_OP(name, signature) Op::name,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

// --- filetests

constexpr std::string_view kErrorMark = "  ; error: ";

// The text of one function as it should be written in its file: its canonical form, or the source
// with the error on its line.
std::string expected_text(const std::string& source) {
  std::vector<std::string> lines = lines_of(source);
  for (std::string& line : lines) line = line.substr(0, line.find(kErrorMark));
  Result<Function> function = parse(joined(lines));
  Status status;
  if (!function.ok()) {
    status = function.error();
  } else if (status = verify(*function); status.ok()) {
    return print(*function);
  }
  // Functions in files have no blank lines or comments inside, so both errors count source lines.
  const std::string& message = status.error().message;
  const std::size_t colon = message.find(": ");
  const std::size_t number = std::stoul(message.substr(0, colon));
  lines.at(number - 1) += std::string(kErrorMark) + message.substr(colon + 2);
  return joined(lines);
}

// Rewrites every function of a file; what stands between functions (comments, blank lines) stays.
std::string expected_file(const std::string& source, std::set<Op>& seen) {
  std::string result, function;
  const auto flush = [&] {
    if (function.empty()) return;
    const std::string text = expected_text(function);
    if (const Result<Function> parsed = parse(text); parsed.ok()) {
      for (const Instruction& instruction : parsed->code) seen.insert(instruction.op);
    }
    result += text;
    function.clear();
  };
  for (const std::string& line : lines_of(source)) {
    const bool outside = line.empty() || line.starts_with(";");
    if (outside || line.starts_with("vir ")) flush();
    (outside ? result : function) += line + "\n";
  }
  flush();
  return result;
}

TEST(VirFiletests, PrintAsWrittenOrFailAsWritten) {
  const std::filesystem::path directory =
      std::filesystem::path(TILEWRIGHT_SOURCE_DIR) / "tests/filetests/vir";
  std::set<Op> seen;
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".vir") continue;
    ++files;
    std::stringstream content;
    content << std::ifstream(entry.path()).rdbuf();
    const std::string expected = expected_file(content.str(), seen);
    if (std::getenv("BLESS") != nullptr) {
      std::ofstream(entry.path()) << expected;
    } else {
      EXPECT_EQ(content.str(), expected) << entry.path() << " (BLESS=1 rewrites it)";
    }
  }
  EXPECT_GE(files, 4);
  for (Op op : kAllOps) EXPECT_TRUE(seen.contains(op)) << op_name(op) << " is in no filetest";
}

// --- the text form

// A function whose instructions have every shape that the table allows, with arbitrary operands:
// the text form must carry what the verifier would refuse.
class RandomFunction {
 public:
  explicit RandomFunction(unsigned seed) : random_(seed) {}

  Function make() {
    function_.name = "random";
    function_.lanes = one_of({8, 16});
    function_.arg_count = one_of({0, 1, 9});
    for (int i = 0; i < 60; ++i) append(kAllOps[random_() % std::size(kAllOps)]);
    while (!open_.empty()) close();
    return function_;
  }

 private:
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[random_() % values.size()];
  }

  Reg reg() {
    const Reg result{one_of({Kind::gpr, Kind::vec, Kind::mask}),
                     static_cast<std::int32_t>(random_() % 12)};
    int& count = result.kind == Kind::gpr   ? function_.gpr_count
                 : result.kind == Kind::vec ? function_.vec_count
                                            : function_.mask_count;
    count = std::max(count, result.id + 1);
    return result;
  }

  void close() {
    Instruction instruction;
    instruction.op = open_.back() == Op::loop ? Op::endloop : Op::endif;
    open_.pop_back();
    function_.code.push_back(instruction);
  }

  void append(Op op) {
    Instruction instruction;
    instruction.op = op;
    if (op == Op::endloop || op == Op::endif) {
      if (!open_.empty()) close();
      return;
    }
    if (op == Op::else_) {
      if (open_.empty() || open_.back() != Op::if_) return;
      open_.back() = Op::else_;
    }
    if (op == Op::loop || op == Op::if_) open_.push_back(op);
    const Signature& form = signature(op);
    if (form.definition != 0) instruction.dst = reg();
    for (int i = 0; i < form.source_count; ++i)
      instruction.src[static_cast<std::size_t>(i)] = reg();
    if (form.has_immediate) {
      instruction.immediate = one_of({std::int64_t{0}, std::int64_t{-1}, std::int64_t{7},
                                      std::numeric_limits<std::int64_t>::min(),
                                      std::numeric_limits<std::int64_t>::max()});
      if (op == Op::vconst) instruction.immediate = static_cast<std::uint32_t>(random_());
    }
    if (form.has_element) {
      instruction.element =
          one_of({Element::f32, Element::bf16, Element::f16, Element::i64, Element::i32,
                  Element::u16, Element::u8, Element::i8, Element::i64_low, Element::i64_high});
    }
    if (form.has_address) {
      instruction.address.base = reg();
      if (random_() % 2 == 0) {
        instruction.address.index = reg();
        instruction.address.scale = one_of({1, 2, 4, 8});
      }
      instruction.address.disp = one_of({0, 1, -1, 64, std::numeric_limits<std::int32_t>::min(),
                                         std::numeric_limits<std::int32_t>::max()});
    }
    function_.code.push_back(instruction);
  }

  std::mt19937 random_;
  Function function_;
  std::vector<Op> open_;
};

void expect_same(const Function& a, const Function& b) {
  EXPECT_EQ(a.name, b.name);
  EXPECT_EQ(a.lanes, b.lanes);
  EXPECT_EQ(a.arg_count, b.arg_count);
  EXPECT_EQ(a.gpr_count, b.gpr_count);
  EXPECT_EQ(a.vec_count, b.vec_count);
  EXPECT_EQ(a.mask_count, b.mask_count);
  ASSERT_EQ(a.code.size(), b.code.size());
  for (std::size_t i = 0; i < a.code.size(); ++i) {
    const Instruction &x = a.code[i], &y = b.code[i];
    EXPECT_TRUE(x.op == y.op && x.element == y.element && x.dst == y.dst && x.src == y.src &&
                x.address.base == y.address.base && x.address.index == y.address.index &&
                x.address.scale == y.address.scale && x.address.disp == y.address.disp &&
                x.immediate == y.immediate)
        << print_instruction(x) << " became " << print_instruction(y);
  }
}

TEST(VirText, ParseIsTheInverseOfPrint) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    const Function function = RandomFunction(seed).make();
    const std::string text = print(function);
    const Result<Function> parsed = parse(text);
    ASSERT_TRUE(parsed.ok()) << parsed.error().message << "\n" << text;
    expect_same(function, *parsed);
    EXPECT_EQ(print(*parsed), text);
  }
}

TEST(VirText, DamagedTextNeverCrashes) {
  std::mt19937 random(1);
  constexpr std::string_view kPieces = "%gvm0123456789-+*[]{};,. =x\n\tabc";
  for (unsigned seed = 0; seed < 2000; ++seed) {
    std::string text = print(RandomFunction(seed % 50).make());
    for (int i = 0; i < 3; ++i) {
      const std::size_t at = random() % text.size();
      if (random() % 2 == 0)
        text.erase(at, 1 + random() % 4);
      else
        text.insert(at, 1, kPieces[random() % kPieces.size()]);
      if (text.empty()) text = " ";
    }
    const Result<Function> parsed = parse(text);
    if (!parsed.ok()) continue;
    static_cast<void>(verify(*parsed));
    const std::string printed = print(*parsed);
    EXPECT_EQ(print(parse(printed).value()), printed);
  }
}

TEST(VirText, BlanksAndCommentsAreFree) {
  const Result<Function> parsed = parse(
      "; a comment\n\n  vir f lanes=8 args=1 { ; here too\r\n"
      "%g0=garg 0x0\n\n\t%v0  =  vload.f32   [ %g0+%g0 * 4-8 ] ; ok\n}\n; the end\n");
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  EXPECT_EQ(print(*parsed),
            "vir f lanes=8 args=1 {\n  %g0 = garg 0\n  %v0 = vload.f32 [%g0 + %g0*4 - 8]\n}\n");
}

TEST(VirText, ErrorsNameTheLineOfTheText) {
  const Result<Function> parsed =
      parse("\n; comment\nvir f lanes=8 args=0 {\n\n  %v0 = wrong\n}\n");
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.error().message, "5: unknown op 'wrong'");
  EXPECT_FALSE(parse("").ok());
  EXPECT_FALSE(parse("\n\n").ok());
}

TEST(VirText, NamesAreThoseOfTheTable) {
  EXPECT_EQ(op_name(Op::if_), "if");
  EXPECT_EQ(op_name(Op::else_), "else");
  EXPECT_EQ(op_name(Op::vsplat_cvt), "vsplat_cvt");
  EXPECT_EQ(op_signature(Op::vloadm), "V=AMT");
  EXPECT_EQ(signature(Op::vloadm).definition, 'V');
  EXPECT_EQ(signature(Op::vloadm).operands, "AM");
  EXPECT_TRUE(signature(Op::vloadm).has_element);
  EXPECT_EQ(signature(Op::vfma).source_count, 3);
  EXPECT_EQ(signature(Op::vfma).definition, 0);
}

// --- the verifier, for functions that no text can hold

Function with_code(std::vector<Instruction> code) {
  Function function;
  function.name = "f";
  function.gpr_count = 2;
  function.code = std::move(code);
  return function;
}

std::string error_of(const Function& function) {
  const Status status = verify(function);
  return status.ok() ? "" : status.error().message;
}

TEST(VirVerify, Structure) {
  const auto simple = [](Op op) {
    Instruction i;
    i.op = op;
    return i;
  };
  Instruction one = simple(Op::gconst);
  one.dst = {Kind::gpr, 0};
  Instruction loop = simple(Op::loop), when = simple(Op::if_);
  loop.src[0] = when.src[0] = one.dst;
  const Instruction endloop = simple(Op::endloop), otherwise = simple(Op::else_),
                    endif = simple(Op::endif);
  EXPECT_EQ(error_of(with_code({one, loop, when, otherwise, endif, endloop})), "");
  EXPECT_EQ(error_of(with_code({endloop})), "2: endloop without loop");
  EXPECT_EQ(error_of(with_code({one, when, endloop})), "4: endloop without loop");
  EXPECT_EQ(error_of(with_code({one, loop, endif})), "4: endif without if");
  EXPECT_EQ(error_of(with_code({one, loop, otherwise})), "4: else without if");
  EXPECT_EQ(error_of(with_code({one, when, otherwise, otherwise})), "5: else without if");
  EXPECT_EQ(error_of(with_code({one, when, loop, endloop})), "3: if is never closed");
  EXPECT_EQ(error_of(with_code({one, loop})), "3: loop is never closed");
}

TEST(VirVerify, RegistersAndHeader) {
  Instruction copy;
  copy.op = Op::gmov;
  copy.dst = {Kind::gpr, 1};
  EXPECT_EQ(error_of(with_code({copy})), "2: gmov: register %g-1 is out of range");
  copy.src[0] = {Kind::gpr, 2};
  EXPECT_EQ(error_of(with_code({copy})), "2: gmov: register %g2 is out of range");
  Instruction constant;
  constant.op = Op::gconst;
  EXPECT_EQ(error_of(with_code({constant})), "2: gconst: register %g-1 is out of range");

  Function function = with_code({});
  function.lanes = 4;
  EXPECT_EQ(error_of(function), "1: lanes=4 is neither 8 nor 16");
  function = with_code({});
  function.name = "two words";
  EXPECT_NE(error_of(function), "");
  function.name = "";
  EXPECT_NE(error_of(function), "");
}

// --- the Builder

TEST(VirBuilder, WritesWhatItSays) {
  Builder b("axpy", 8, 3);
  Reg x = b.arg(0), y = b.arg(1), n = b.arg(2);
  Reg factor = b.splat(2.0f);
  b.loop(n, [&] {
    Reg sum = b.load(Element::f32, b.at(y));
    b.fma_load(sum, factor, b.at(x, n, 4, -32));
    b.store(Element::f32, b.at(y), sum);
    b.add_to(y, b.vector_bytes());
  });
  b.if_nonzero(
      n, [&] { b.assign(x, y); }, [&] { b.add_to(x, y); });
  const Function function = std::move(b).finish();
  EXPECT_EQ(error_of(function), "");
  EXPECT_EQ(print(function),
            "vir axpy lanes=8 args=3 {\n"
            "  %g0 = garg 0\n"
            "  %g1 = garg 1\n"
            "  %g2 = garg 2\n"
            "  %v0 = vconst 0x40000000  ; 2\n"
            "  loop %g2 {\n"
            "    %v1 = vload.f32 [%g1]\n"
            "    vfma_load %v1, %v0, [%g0 + %g2*4 - 32]\n"
            "    vstore.f32 [%g1], %v1\n"
            "    %g1 = gaddi %g1, 32\n"
            "  }\n"
            "  if %g2 {\n"
            "    %g0 = gmov %g1\n"
            "  } else {\n"
            "    %g0 = gadd %g0, %g1\n"
            "  }\n"
            "}\n");
}

TEST(VirBuilder, ImmediatesBeyond32BitsBecomeConstants) {
  Builder b("large", 8, 1);
  constexpr std::int64_t kLarge = std::int64_t{1} << 40;
  Reg x = b.arg(0);
  b.add(x, kLarge);
  b.mul(x, -kLarge);
  b.add_to(x, kLarge);
  EXPECT_EQ(error_of(std::move(b).finish()), "");
}

// Every method once; the verifier checks operand kinds, and the table that no op was forgotten.
// What only an assignment reads goes where it is assigned; what is read again has its own register.
TEST(VirBuilder, DefinesInPlace) {
  Builder b("assignments", 8, 1);
  const Reg p = b.arg(0), x = b.load(Element::f32, b.at(p));
  b.assign(x, b.vadd(x, x));
  const Reg product = b.vmul(x, x);
  b.assign(x, product);
  b.store(Element::f32, b.at(p), b.vsub(x, product));
  EXPECT_EQ(print(std::move(b).finish()),
            "vir assignments lanes=8 args=1 {\n"
            "  %g0 = garg 0\n"
            "  %v0 = vload.f32 [%g0]\n"
            "  %v0 = vadd %v0, %v0\n"
            "  %v2 = vmul %v0, %v0\n"
            "  %v0 = vmov %v2\n"
            "  %v3 = vsub %v0, %v2\n"
            "  vstore.f32 [%g0], %v3\n"
            "}\n");
}

TEST(VirBuilder, ReachesEveryOp) {
  Builder b("everything", 16, 2);
  Reg p = b.arg(0), n = b.constant(5);
  Reg g = b.copy(p);
  g = b.min(b.max(b.sub(b.add(g, n), p), n), p);
  g = b.mul(b.mul(g, n), 3);
  g = b.bit_and(b.shift_right(b.shift_left(g, 1), 2), 7);
  g = b.lea(b.at(p, n, 4, 8));
  g = b.add(g, 1);
  b.assign(g, n);
  b.store_gpr(Element::i32, b.at(p), b.load_gpr(Element::u8, b.at(p)));
  b.loop(n, [] {});
  b.if_nonzero(g, [] {});
  b.if_nonzero(
      g, [] {}, [] {});
  const Address at = b.at(p);
  Reg v = b.zero(), w = b.splat(1.5f), i = b.iota();
  v = b.vadd(b.vsub(b.vmul(v, w), i), w);
  v = b.vdiv(b.vmax(b.vmin(v, w), w), i);
  v = b.vround(b.vsqrt(v));
  b.fma(v, w, i);
  b.fnma(v, w, i);
  b.fms(v, w, i);
  b.fma_load(v, w, at);
  b.dot_bf16(v, w, i);
  b.dot_bytes(v, w, i);
  v = b.low_f16_to_f32(b.to_f32(b.to_i32(b.scalef(v, w))));
  v = b.vandn(b.vxor(b.vor(b.vand(v, w), w), w), w);
  v = b.imul(b.isub(b.iadd(v, w), w), w);
  v = b.vshift_right_signed(b.vshift_right(b.vshift_left(v, 1), 2), 3);
  v = b.swap(b.copy(w), 8);
  v = b.odd_lanes(b.even_lanes(v, w), w);
  v = b.odd_runs(b.even_runs(v, w), w);
  v = b.lookup_bytes(b.broadcast_16_bytes(b.at(p)), v);
  v = b.interleave_high(b.interleave_low(v, w), w);
  v = b.interleave_halves_high(b.interleave_halves_low(v, w), w);
  v = b.vadd(b.splat(g), v);
  v = b.vadd(b.splat_converted(g), v);
  Reg tail = b.tail_mask(n);
  Reg m = b.mask_and(b.less(v, w), tail);
  m = b.mask_or(m, b.less_equal(v, w));
  m = b.mask_andn(m, b.equal(v, w));
  m = b.mask_and(m, b.not_equal(v, w));
  m = b.mask_and(m, b.iequal(v, w));
  m = b.mask_and(m, b.igreater(v, w));
  v = b.select(m, v, w);
  b.store(Element::f16, at, b.load(Element::bf16, at));
  b.store_masked(Element::u16, at, b.load_masked(Element::f16, at, m), m);
  b.store_one(Element::f32, at, b.load_one(Element::u8, at));
  b.store(Element::i32, at, b.broadcast(Element::f32, at));
  b.prefetch(at, 2);
  b.save_tiles(at);
  b.configure_tiles();
  const Reg tile = b.tile_zero();
  b.tile_dot_bf16(tile, b.tile_load(at, g), b.tile_load(at, g));
  b.tile_store(at, g, tile);
  b.restore_tiles(at);
  const Function function = std::move(b).finish();
  EXPECT_EQ(error_of(function), "");
  std::set<Op> seen;
  for (const Instruction& instruction : function.code) seen.insert(instruction.op);
  for (Op op : kAllOps) EXPECT_TRUE(seen.contains(op)) << op_name(op);
}

}  // namespace
}  // namespace tilewright::jit::vir
