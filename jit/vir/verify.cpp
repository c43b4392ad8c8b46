// The rules that make a VIR function valid. Emission and the interpreter rely on them and check
// nothing themselves.
//
// "Defined" is a property of paths: what a loop's body or one arm of an if defines may not have
// happened, so it does not count afterwards; what both arms define counts.
//
// Tested by vir_test, filetests/vir.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "jit/vir/definitions.h"
#include "jit/vir/numbering.h"
#include "jit/vir/signature.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {
namespace {

constexpr std::string_view kind_name(Kind kind) {
  switch (kind) {
    case Kind::gpr:
      return "a general register";
    case Kind::vec:
      return "a vector register";
    case Kind::mask:
      return "a mask register";
    case Kind::tile:
      return "a tile";
  }
  return "?";
}

using Elements = std::span<const Element>;

// The element types that an op may carry; empty: none.
Elements legal_elements(Op op, int lanes) {
  using enum Element;
  static constexpr Element kGpr[] = {i64, i32, u16, u8}, kLoad[] = {f32, i32, bf16, f16, u8},
                           kFullLoad[] = {f32, i32, bf16, f16, u8, i8, i64_low, i64_high},
                           kMaskedLoad[] = {f32, i32, bf16, f16, u8, i8},
                           kStore[] = {f32, i32, f16, u16, u8}, kMasked8[] = {f32, i32};
  switch (op) {
    case Op::gload:
    case Op::gstore:
      return kGpr;
    case Op::vload:
      return kFullLoad;
    case Op::vload1:
    case Op::vbroadcast:
      return kLoad;
    case Op::vstore:
    case Op::vstore1:
      return kStore;
    case Op::vloadm:  // vmaskmovps knows 32-bit elements only
      return lanes == 8 ? Elements(kMasked8) : kMaskedLoad;
    case Op::vstorem:
      return lanes == 8 ? Elements(kMasked8) : kStore;
    default:
      return {};
  }
}

struct Range {
  std::int64_t low, high;
};

Range legal_immediates(Op op, const Function& function) {
  using Wide = std::numeric_limits<std::int64_t>;
  using Narrow = std::numeric_limits<std::int32_t>;
  switch (op) {
    case Op::garg:
      return {0, function.arg_count - 1};
    case Op::gaddi:
    case Op::gmuli:
    case Op::gandi:
      return {Narrow::min(), Narrow::max()};
    case Op::gshli:
    case Op::gshri:
      return {0, 63};
    case Op::vconst:
      return {0, std::numeric_limits<std::uint32_t>::max()};
    case Op::vshli:
    case Op::vshri:
    case Op::vsari:
      return {0, 31};
    case Op::vswap:
      return {1, function.lanes - 1};
    case Op::vunzip_lanes:
    case Op::vunzip_runs:
      return {0, 1};
    case Op::prefetch:
      return {0, 3};
    default:
      return {Wide::min(), Wide::max()};
  }
}

bool is_tile_op(Op op) {
  switch (op) {
    case Op::tsave:
    case Op::tconfig:
    case Op::trestore:
    case Op::tzero:
    case Op::tload:
    case Op::tstore:
    case Op::tdpbf16:
      return true;
    default:
      return false;
  }
}

class Verifier {
 public:
  explicit Verifier(const Function& function)
      : function_(function),
        counts_{function.gpr_count, function.vec_count, function.mask_count, function.tile_count},
        numbering_(function),
        definitions_(numbering_.count()) {}

  Status run() {
    if (!check_all()) return error_;
    return {};
  }

 private:
  // A loop, or the current arm of an if.
  struct Open {
    Op op;
    int line;
  };

  // What is wrong is kept here, and every check says only whether nothing is: a Status for each
  // would be what most of the time is spent on.
  template <class... Args>
  bool fail(fmt::format_string<Args...> format, Args&&... args) {
    error_ = {fmt::format("{}: {}", line_, fmt::format(format, std::forward<Args>(args)...))};
    return false;
  }

  bool check_all() {
    if (!check_header()) return false;
    for (const Instruction& instruction : function_.code) {
      ++line_;
      if (!check(instruction)) return false;
    }
    if (!open_.empty()) {
      line_ = open_.back().line;
      return fail("{} is never closed", open_.back().op == Op::loop ? "loop" : "if");
    }
    if (has_tiles_) return fail("the thread's tiles are never restored");
    return true;
  }

  bool check_header() {
    const std::string& name = function_.name;
    const bool printable = std::all_of(name.begin(), name.end(), [](unsigned char c) {
      return c > ' ' && c < 0x7f && c != '{' && c != '}' && c != ';';
    });
    if (name.empty() || !printable) {
      return fail("the name '{}' is not one word of printable characters", name);
    }
    if (function_.lanes != 8 && function_.lanes != 16) {
      return fail("lanes={} is neither 8 nor 16", function_.lanes);
    }
    if (function_.arg_count < 0) return fail("args={} is negative", function_.arg_count);
    return true;
  }

  bool check(const Instruction& instruction) {
    const Op op = instruction.op;
    const Signature& form = signature(op);
    for (int i = 0; i < form.source_count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      if (!check_use(op, kind_of(form.source[index]), instruction.src[index])) return false;
    }
    if (form.has_address && !check_address(op, instruction.address)) return false;
    if (form.has_immediate && !check_immediate(instruction)) return false;
    if (!check_element(instruction)) return false;
    if (!check_lanes(op)) return false;
    if (!check_tiles(instruction)) return false;
    if (form.definition != 0) {
      if (!check_kind(op, kind_of(form.definition), instruction.dst)) return false;
      definitions_.define(numbering_.index(instruction.dst));
    }
    return check_structure(op);
  }

  bool has(Kind kind, Reg reg) const {
    return reg.valid() && reg.kind == kind && reg.id < counts_[static_cast<std::size_t>(kind)];
  }

  bool check_kind(Op op, Kind kind, Reg reg) { return has(kind, reg) || refuse(op, kind, reg); }

  bool check_use(Op op, Kind kind, Reg reg) {
    return (has(kind, reg) && definitions_.defined(numbering_.index(reg))) || refuse(op, kind, reg);
  }

  // Apart from the checks that nearly every instruction passes: making messages takes much stack.
  [[gnu::noinline]] bool refuse(Op op, Kind kind, Reg reg) {
    if (reg.valid() && reg.kind != kind) {
      return fail("{} takes {} here, not {}", op_name(op), kind_name(kind), reg_name(reg));
    }
    if (!has(kind, reg)) {
      return fail("{}: register {} is out of range", op_name(op), reg_name(reg));
    }
    return fail("{} is not defined on every path to here", reg_name(reg));
  }

  bool check_address(Op op, const Address& address) {
    if (!check_use(op, Kind::gpr, address.base)) return false;
    if (!address.index.valid()) {
      if (address.scale != 1) return fail("{}: a scale without an index", op_name(op));
      return true;
    }
    if (!check_use(op, Kind::gpr, address.index)) return false;
    const int scale = address.scale;
    if (scale != 1 && scale != 2 && scale != 4 && scale != 8) {
      return fail("{}: scale {} is not 1, 2, 4 or 8", op_name(op), scale);
    }
    return true;
  }

  bool check_immediate(const Instruction& instruction) {
    const Op op = instruction.op;
    const std::int64_t value = instruction.immediate;
    const Range range = legal_immediates(op, function_);
    if (value < range.low || value > range.high) {
      return fail("{}: immediate {} is outside [{}, {}]", op_name(op), value, range.low,
                  range.high);
    }
    if (op == Op::vswap && (value & (value - 1)) != 0) {
      return fail("vswap: distance {} is not a power of two", value);
    }
    return true;
  }

  bool check_element(const Instruction& instruction) {
    const Op op = instruction.op;
    const Element element = instruction.element;
    if (!signature(op).has_element) {
      if (element == Element::none) return true;
      return fail("{} carries no element type", op_name(op));
    }
    const Elements legal = legal_elements(op, function_.lanes);
    if (std::find(legal.begin(), legal.end(), element) != legal.end()) return true;
    std::string names;
    for (Element e : legal)
      names += fmt::format("{}{}", names.empty() ? "" : ", ", element_name(e));
    return fail("{} with {} lanes takes element type {}, not {}", op_name(op), function_.lanes,
                names, element_name(element));
  }

  bool check_lanes(Op op) {
    if ((op == Op::vscalef || op == Op::vdpbf16 || op == Op::vdpbytes || is_tile_op(op)) &&
        function_.lanes != 16) {
      return fail("{} exists with 16 lanes only", op_name(op));
    }
    return true;
  }

  // The thread's tiles are saved, configured, used, restored: in this order on every path.
  bool check_tiles(const Instruction& instruction) {
    const Op op = instruction.op;
    if (!is_tile_op(op)) return true;
    if (op == Op::tsave || op == Op::tconfig || op == Op::trestore) {
      if (!open_.empty()) return fail("{} inside a loop or if", op_name(op));
      if (op == Op::tconfig && !saved_tiles_) return fail("tconfig without tsave before it");
      if (op == Op::trestore && !has_tiles_) return fail("trestore without tconfig before it");
      if (op == Op::tsave && has_tiles_) return fail("tsave after tconfig");
      if (op == Op::tsave) saved_tiles_ = true;
      has_tiles_ = op == Op::tconfig;
      return true;
    }
    if (!has_tiles_) return fail("{} without tconfig before it", op_name(op));
    const auto& [y, a, b] = instruction.src;
    if (op == Op::tdpbf16 && (y == a || y == b || a == b)) {
      return fail("tdpbf16 takes three different tiles");
    }
    if (instruction.address.index.valid()) {
      return fail("{}: the row stride takes the place of an index", op_name(op));
    }
    return true;
  }

  bool check_structure(Op op) {
    switch (op) {
      case Op::loop:
        open_.push_back({op, line_});
        definitions_.begin_loop();
        return true;
      case Op::if_:
        open_.push_back({op, line_});
        definitions_.begin_if();
        return true;
      case Op::else_:
        if (open_.empty() || open_.back().op != Op::if_) return fail("else without if");
        open_.back().op = Op::else_;
        definitions_.begin_else();
        return true;
      case Op::endloop:
        if (open_.empty() || open_.back().op != Op::loop) return fail("endloop without loop");
        open_.pop_back();
        definitions_.end_loop();
        return true;
      case Op::endif:
        if (open_.empty() || open_.back().op == Op::loop) return fail("endif without if");
        open_.pop_back();
        definitions_.end_if();
        return true;
      default:
        return true;
    }
  }

  const Function& function_;
  std::array<int, 4> counts_;  // of registers, by kind
  Numbering numbering_;
  Definitions definitions_;
  int line_ = 1;  // of print(): the header is line 1
  Error error_;
  bool saved_tiles_ = false, has_tiles_ = false;
  std::vector<Open> open_;
};

}  // namespace

Status verify(const Function& function) { return Verifier(function).run(); }

}  // namespace tilewright::jit::vir
