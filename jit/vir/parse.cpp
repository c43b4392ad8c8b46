// Reads what print() writes. The parser knows names and operand order only; whether operands have
// the right kind, and everything else that makes a function valid, is verify()'s matter, so that a
// filetest can hold wrong functions.
//
// Tested by vir_test, filetests/vir.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <utility>

#include "jit/base/fork_static.h"
#include "jit/vir/signature.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {
namespace {

// A wrong number in a text must not make the interpreter or the allocator reserve gigabytes.
constexpr std::int64_t kMaxRegisterId = 1 << 20;

const std::map<std::string_view, Op>& ops_by_name() {
  static constinit ForkStatic<const std::map<std::string_view, Op>> table;
  return table.get([] {
    std::map<std::string_view, Op> result;
    for (Op op : {
#define VIR_OP(name, signature) Op::name,
#include "jit/vir/op_list.def"
#undef VIR_OP
         }) {
      result.emplace(op_name(op), op);
    }
    return result;
  });
}

std::optional<Element> element_by_name(std::string_view name) {
  for (Element element :
       {Element::f32, Element::bf16, Element::f16, Element::i64, Element::i32, Element::u16,
        Element::u8, Element::i8, Element::i64_low, Element::i64_high}) {
    if (element_name(element) == name) return element;
  }
  return std::nullopt;
}

// The rest of a line. Each method skips blanks, then takes what it names or takes nothing.
class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}

  bool at_end() {
    skip_blanks();
    return text_.empty();
  }

  std::string_view rest() {
    skip_blanks();
    return text_;
  }

  bool take(std::string_view token) {
    skip_blanks();
    if (!text_.starts_with(token)) return false;
    text_.remove_prefix(token.size());
    return true;
  }

  std::string_view take_until(std::string_view stops) {
    skip_blanks();
    const std::size_t length = std::min(text_.find_first_of(stops), text_.size());
    const std::string_view word = text_.substr(0, length);
    text_.remove_prefix(length);
    return word;
  }

  // Decimal with an optional minus, or hexadecimal with 0x.
  std::optional<std::int64_t> take_integer() {
    skip_blanks();
    if (text_.starts_with("0x")) {
      std::uint64_t value = 0;
      if (!take_digits(text_.substr(2), 2, 16, value)) return std::nullopt;
      return static_cast<std::int64_t>(value);
    }
    std::int64_t value = 0;
    if (!take_digits(text_, 0, 10, value)) return std::nullopt;
    return value;
  }

  std::optional<Reg> take_register() {
    skip_blanks();
    constexpr std::string_view kLetters = "gvmt";
    if (text_.size() < 3 || text_[0] != '%') return std::nullopt;
    const std::size_t kind = kLetters.find(text_[1]);
    std::int64_t id = 0;
    if (kind == std::string_view::npos || text_[2] == '-') return std::nullopt;
    if (!take_digits(text_.substr(2), 2, 10, id) || id > kMaxRegisterId) return std::nullopt;
    return Reg{static_cast<Kind>(kind), static_cast<std::int32_t>(id)};
  }

 private:
  void skip_blanks() {
    text_.remove_prefix(std::min(text_.find_first_not_of(" \t\r"), text_.size()));
  }

  template <class Integer>
  bool take_digits(std::string_view digits, std::size_t prefix, int base, Integer& value) {
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
    if (error != std::errc()) return false;
    text_.remove_prefix(prefix + static_cast<std::size_t>(end - digits.data()));
    return true;
  }

  std::string_view text_;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Result<Function> run() {
    if (!next_line()) return fail("expected 'vir <name> lanes=<n> args=<n> {'");
    if (Status status = parse_header(Cursor(line_)); !status.ok()) return status.error();
    while (next_line()) {
      if (closes_function()) {
        if (next_line()) return fail("text after the end of the function");
        return std::move(function_);
      }
      if (Status status = parse_line(Cursor(line_)); !status.ok()) return status.error();
    }
    return fail("the function has no closing '}'");
  }

 private:
  Error fail(std::string_view message) const { return {fmt::format("{}: {}", number_, message)}; }

  // Moves to the next line that is not blank, without its comment.
  bool next_line() {
    while (!text_.empty()) {
      const std::size_t length = std::min(text_.find('\n'), text_.size());
      line_ = text_.substr(0, length);
      text_.remove_prefix(std::min(length + 1, text_.size()));
      ++number_;
      line_ = line_.substr(0, line_.find(';'));
      if (!Cursor(line_).at_end()) return true;
    }
    return false;
  }

  bool closes_function() const {
    Cursor cursor(line_);
    return open_.empty() && cursor.take("}") && cursor.at_end();
  }

  Status parse_header(Cursor cursor) {
    if (!cursor.take("vir ")) return fail("expected 'vir <name> lanes=<n> args=<n> {'");
    function_.name = cursor.take_until(" \t{");
    if (function_.name.empty()) return fail("expected the function's name");
    std::optional<std::int64_t> lanes, args;
    if (cursor.take("lanes=")) lanes = cursor.take_integer();
    if (!lanes || (*lanes != 8 && *lanes != 16)) return fail("expected lanes=8 or lanes=16");
    if (cursor.take("args=")) args = cursor.take_integer();
    if (!args || *args < 0 || *args > kMaxRegisterId) return fail("expected args=<n>");
    if (!cursor.take("{") || !cursor.at_end()) return fail("expected '{' at the end of the line");
    function_.lanes = static_cast<int>(*lanes);
    function_.arg_count = static_cast<int>(*args);
    return {};
  }

  Status parse_line(Cursor cursor) {
    if (cursor.take("}")) return parse_brace(cursor);
    Instruction instruction;
    if (cursor.rest().starts_with('%')) {
      const std::optional<Reg> defined = cursor.take_register();
      if (!defined || !cursor.take("=")) return fail("expected '<register> = '");
      instruction.dst = *defined;
    }
    const std::string_view name = cursor.take_until(" \t.");
    const auto found = ops_by_name().find(name);
    if (found == ops_by_name().end() || is_closing(found->second)) {
      return fail(fmt::format("unknown op '{}'", name));
    }
    instruction.op = found->second;
    if (cursor.take(".")) {
      const std::string_view element = cursor.take_until(" \t");
      const std::optional<Element> known = element_by_name(element);
      if (!known) return fail(fmt::format("unknown element type '{}'", element));
      instruction.element = *known;
    }
    return parse_operands(cursor, instruction);
  }

  // The ops that are written as braces.
  static bool is_closing(Op op) { return op == Op::endloop || op == Op::else_ || op == Op::endif; }

  static Instruction plain(Op op) {
    Instruction instruction;
    instruction.op = op;
    return instruction;
  }

  Status parse_brace(Cursor cursor) {
    if (open_.empty()) return fail("'}' closes nothing");
    if (cursor.at_end()) {
      append(plain(open_.back() == Op::loop ? Op::endloop : Op::endif));
      open_.pop_back();
      return {};
    }
    if (!cursor.take("else") || !cursor.take("{") || !cursor.at_end()) {
      return fail("expected '}' or '} else {'");
    }
    if (open_.back() != Op::if_) return fail("'else' without 'if'");
    append(plain(Op::else_));
    open_.back() = Op::else_;
    return {};
  }

  Status parse_operands(Cursor cursor, Instruction& instruction) {
    const Op op = instruction.op;
    const Signature& form = signature(op);
    if (instruction.dst.valid() != (form.definition != 0)) {
      return fail(fmt::format(
          "{} {}", op_name(op),
          form.definition != 0 ? "needs '<register> = ' before it" : "defines no register"));
    }
    bool first = true;
    std::size_t next_source = 0;
    for (char letter : form.operands) {
      if (!first && !cursor.take(",")) return fail(missing(op, "','"));
      first = false;
      if (letter == 'A') {
        if (!take_address(cursor, instruction.address)) return fail(missing(op, "an address"));
      } else if (letter == 'I') {
        const std::optional<std::int64_t> value = cursor.take_integer();
        if (!value) return fail(missing(op, "an integer"));
        instruction.immediate = *value;
      } else {
        const std::optional<Reg> reg = cursor.take_register();
        if (!reg) return fail(missing(op, "a register"));
        instruction.src[next_source++] = *reg;
      }
    }
    if (op == Op::loop || op == Op::if_) {
      if (!cursor.take("{")) return fail(missing(op, "'{'"));
      open_.push_back(op);
    }
    if (!cursor.at_end()) {
      return fail(fmt::format("unexpected '{}' after {}", cursor.rest(), op_name(op)));
    }
    append(instruction);
    return {};
  }

  static std::string missing(Op op, std::string_view what) {
    return fmt::format("{}: expected {}", op_name(op), what);
  }

  // [base], [base + index], [base + index*scale + disp], [base - disp] ...
  static bool take_address(Cursor& cursor, Address& address) {
    if (!cursor.take("[")) return false;
    const std::optional<Reg> base = cursor.take_register();
    if (!base) return false;
    address.base = *base;
    if (cursor.take("]")) return true;
    bool negative = cursor.take("-");
    if (!negative && !cursor.take("+")) return false;
    if (const std::optional<Reg> index = negative ? std::nullopt : cursor.take_register()) {
      address.index = *index;
      if (cursor.take("*")) {
        const std::optional<std::int64_t> scale = cursor.take_integer();
        if (!scale || *scale < 1 || *scale > 8) return false;
        address.scale = static_cast<std::uint8_t>(*scale);
      }
      if (cursor.take("]")) return true;
      negative = cursor.take("-");
      if (!negative && !cursor.take("+")) return false;
    }
    const std::optional<std::int64_t> magnitude = cursor.take_integer();
    constexpr std::int64_t kLimit = std::int64_t{1} << 31;
    if (!magnitude || *magnitude < 0 || *magnitude > kLimit - (negative ? 0 : 1)) return false;
    address.disp = static_cast<std::int32_t>(negative ? -*magnitude : *magnitude);
    return cursor.take("]");
  }

  void append(Instruction instruction) {
    count(instruction.dst);
    for (Reg reg : instruction.src) count(reg);
    count(instruction.address.base);
    count(instruction.address.index);
    function_.code.push_back(instruction);
  }

  void count(Reg reg) {
    if (!reg.valid()) return;
    int& total = reg.kind == Kind::gpr    ? function_.gpr_count
                 : reg.kind == Kind::vec  ? function_.vec_count
                 : reg.kind == Kind::mask ? function_.mask_count
                                          : function_.tile_count;
    total = std::max(total, reg.id + 1);
  }

  std::string_view text_;
  std::string_view line_;
  int number_ = 0;
  Function function_;
  std::vector<Op> open_;  // the loops and ifs around the current line
};

}  // namespace

Result<Function> parse(std::string_view text) { return Parser(text).run(); }

}  // namespace tilewright::jit::vir
