// The rules that make a VIR function valid. Emission and the interpreter rely on them and check
// nothing themselves.
//
// "Defined" is a property of paths: what a loop's body or one arm of an if defines may not have
// happened, so it does not count afterwards; what both arms define counts.
//
// Tested by vir_test, filetests/vir.
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

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

using Elements = std::vector<Element>;

// The element types that an op may carry; empty: none.
const Elements& legal_elements(Op op, int lanes) {
  using enum Element;
  static const Elements kNone = {}, kGpr = {i64, i32, u16, u8}, kLoad = {f32, i32, bf16, f16, u8},
                        kFullLoad = {f32, i32, bf16, f16, u8, i8, i64_low, i64_high},
                        kMaskedLoad = {f32, i32, bf16, f16, u8, i8},
                        kStore = {f32, i32, f16, u16, u8}, kMasked8 = {f32, i32};
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
      return lanes == 8 ? kMasked8 : kMaskedLoad;
    case Op::vstorem:
      return lanes == 8 ? kMasked8 : kStore;
    default:
      return kNone;
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

// Which registers are defined at a point.
struct Defined {
  std::array<std::vector<bool>, 4> of_kind;

  explicit Defined(const Function& f)
      : of_kind{std::vector<bool>(static_cast<std::size_t>(f.gpr_count)),
                std::vector<bool>(static_cast<std::size_t>(f.vec_count)),
                std::vector<bool>(static_cast<std::size_t>(f.mask_count)),
                std::vector<bool>(static_cast<std::size_t>(f.tile_count))} {}

  std::vector<bool>& kind(Kind kind) { return of_kind[static_cast<std::size_t>(kind)]; }
  bool in_range(Reg reg) {
    return reg.valid() && static_cast<std::size_t>(reg.id) < kind(reg.kind).size();
  }
  std::vector<bool>::reference at(Reg reg) {
    return kind(reg.kind)[static_cast<std::size_t>(reg.id)];
  }

  void intersect(const Defined& other) {
    for (std::size_t k = 0; k < of_kind.size(); ++k) {
      for (std::size_t i = 0; i < of_kind[k].size(); ++i) {
        if (!other.of_kind[k][i]) of_kind[k][i] = false;
      }
    }
  }
};

class Verifier {
 public:
  explicit Verifier(const Function& function) : function_(function), defined_(function) {}

  Status run() {
    if (Status status = check_header(); !status.ok()) return status;
    for (const Instruction& instruction : function_.code) {
      ++line_;
      if (Status status = check(instruction); !status.ok()) return status;
    }
    if (!open_.empty()) {
      return Error{fmt::format("{}: {} is never closed", open_.back().line,
                               open_.back().op == Op::loop ? "loop" : "if")};
    }
    if (has_tiles_) return fail("the thread's tiles are never restored");
    return {};
  }

 private:
  // A loop, or the current arm of an if.
  struct Open {
    Op op;
    int line;
    Defined before;      // the state at the loop or if
    Defined after_then;  // if op is else_: the state at the end of the first arm
  };

  template <class... Args>
  Error fail(fmt::format_string<Args...> format, Args&&... args) const {
    return {fmt::format("{}: {}", line_, fmt::format(format, std::forward<Args>(args)...))};
  }

  Status check_header() const {
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
    return {};
  }

  Status check(const Instruction& instruction) {
    const Op op = instruction.op;
    const Signature& form = signature(op);
    for (int i = 0; i < form.source_count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      Status status = check_use(op, kind_of(form.source[index]), instruction.src[index]);
      if (!status.ok()) return status;
    }
    if (form.has_address) {
      if (Status status = check_address(op, instruction.address); !status.ok()) return status;
    }
    if (form.has_immediate) {
      if (Status status = check_immediate(instruction); !status.ok()) return status;
    }
    if (Status status = check_element(instruction); !status.ok()) return status;
    if (Status status = check_lanes(op); !status.ok()) return status;
    if (Status status = check_tiles(instruction); !status.ok()) return status;
    if (form.definition != 0) {
      if (Status status = check_kind(op, kind_of(form.definition), instruction.dst); !status.ok()) {
        return status;
      }
      defined_.at(instruction.dst) = true;
    }
    return check_structure(op);
  }

  Status check_kind(Op op, Kind kind, Reg reg) {
    if (reg.valid() && reg.kind != kind) {
      return fail("{} takes {} here, not {}", op_name(op), kind_name(kind), reg_name(reg));
    }
    if (!defined_.in_range(reg)) {
      return fail("{}: register {} is out of range", op_name(op), reg_name(reg));
    }
    return {};
  }

  Status check_use(Op op, Kind kind, Reg reg) {
    if (Status status = check_kind(op, kind, reg); !status.ok()) return status;
    if (!defined_.at(reg)) return fail("{} is not defined on every path to here", reg_name(reg));
    return {};
  }

  Status check_address(Op op, const Address& address) {
    if (Status status = check_use(op, Kind::gpr, address.base); !status.ok()) return status;
    if (!address.index.valid()) {
      if (address.scale != 1) return fail("{}: a scale without an index", op_name(op));
      return {};
    }
    if (Status status = check_use(op, Kind::gpr, address.index); !status.ok()) return status;
    const int scale = address.scale;
    if (scale != 1 && scale != 2 && scale != 4 && scale != 8) {
      return fail("{}: scale {} is not 1, 2, 4 or 8", op_name(op), scale);
    }
    return {};
  }

  Status check_immediate(const Instruction& instruction) const {
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
    return {};
  }

  Status check_element(const Instruction& instruction) const {
    const Op op = instruction.op;
    const Element element = instruction.element;
    if (!signature(op).has_element) {
      if (element == Element::none) return {};
      return fail("{} carries no element type", op_name(op));
    }
    const Elements& legal = legal_elements(op, function_.lanes);
    if (std::find(legal.begin(), legal.end(), element) != legal.end()) return {};
    std::string names;
    for (Element e : legal)
      names += fmt::format("{}{}", names.empty() ? "" : ", ", element_name(e));
    return fail("{} with {} lanes takes element type {}, not {}", op_name(op), function_.lanes,
                names, element_name(element));
  }

  Status check_lanes(Op op) const {
    if ((op == Op::vscalef || op == Op::vdpbf16 || is_tile_op(op)) && function_.lanes != 16) {
      return fail("{} exists with 16 lanes only", op_name(op));
    }
    return {};
  }

  // The thread's tiles are saved, configured, used, restored: in this order on every path.
  Status check_tiles(const Instruction& instruction) {
    const Op op = instruction.op;
    if (!is_tile_op(op)) return {};
    if (op == Op::tsave || op == Op::tconfig || op == Op::trestore) {
      if (!open_.empty()) return fail("{} inside a loop or if", op_name(op));
      if (op == Op::tconfig && !saved_tiles_) return fail("tconfig without tsave before it");
      if (op == Op::trestore && !has_tiles_) return fail("trestore without tconfig before it");
      if (op == Op::tsave && has_tiles_) return fail("tsave after tconfig");
      if (op == Op::tsave) saved_tiles_ = true;
      has_tiles_ = op == Op::tconfig;
      return {};
    }
    if (!has_tiles_) return fail("{} without tconfig before it", op_name(op));
    const auto& [y, a, b] = instruction.src;
    if (op == Op::tdpbf16 && (y == a || y == b || a == b)) {
      return fail("tdpbf16 takes three different tiles");
    }
    if (instruction.address.index.valid()) {
      return fail("{}: the row stride takes the place of an index", op_name(op));
    }
    return {};
  }

  Status check_structure(Op op) {
    switch (op) {
      case Op::loop:
      case Op::if_:
        open_.push_back({op, line_, defined_, defined_});
        return {};
      case Op::else_:
        if (open_.empty() || open_.back().op != Op::if_) return fail("else without if");
        open_.back().op = Op::else_;
        open_.back().after_then = std::exchange(defined_, open_.back().before);
        return {};
      case Op::endloop:
        if (open_.empty() || open_.back().op != Op::loop) return fail("endloop without loop");
        break;
      case Op::endif:
        if (open_.empty() || open_.back().op == Op::loop) return fail("endif without if");
        break;
      default:
        return {};
    }
    Open closed = std::move(open_.back());
    open_.pop_back();
    if (closed.op == Op::else_) {
      defined_.intersect(closed.after_then);
    } else {
      defined_ = std::move(closed.before);
    }
    return {};
  }

  const Function& function_;
  int line_ = 1;  // of print(): the header is line 1
  Defined defined_;
  bool saved_tiles_ = false, has_tiles_ = false;
  std::vector<Open> open_;
};

}  // namespace

Status verify(const Function& function) { return Verifier(function).run(); }

}  // namespace tilewright::jit::vir
