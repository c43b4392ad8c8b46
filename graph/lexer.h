// Lexer: reads the tokens of the IR's text on demand, for the parsers of dims, types and graphs.
//
// On demand, because a token's meaning depends on where it stands: the `x` of `cache<f32, 3 x 64>`
// is an identifier elsewhere. Blanks and comments (`;` or `#` to the end of the line) separate
// tokens. Every function either consumes a whole token or nothing, and nothing reads past the end.
//
// Tested by graph_test, filetests/parse.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tilewright::graph {

// An unsigned number: an integer up to 2^63 (the sign is the parser's), or a floating point one.
struct Number {
  bool is_integer = true;
  bool in_range = true;
  std::uint64_t integer = 0;
  double floating = 0;  // also set for an integer
};

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  // The line (from 1) of the next token.
  int line();
  // The line of the token that was consumed last.
  int last_line() const { return last_line_; }
  bool at_end();
  // What comes next, for error messages.
  std::string next();

  // Consumes these characters if they come next.
  bool accept(std::string_view punctuation);
  // Consumes this identifier if it comes next, whole.
  bool accept_word(std::string_view word);
  std::optional<std::string_view> identifier();  // [A-Za-z_][A-Za-z0-9_]*
  std::optional<std::string_view> dotted();      // [A-Za-z0-9_.]+, names of values and graphs
  std::optional<Number> number();
  // A quoted string with its escapes resolved. If it is broken, nothing is consumed.
  std::optional<std::string> string();

 private:
  void skip_blanks();
  void consume(std::size_t length);
  std::string_view rest() const { return text_.substr(position_); }

  std::string_view text_;
  std::size_t position_ = 0;
  int line_ = 1;
  int last_line_ = 1;
};

// The quoted form that Lexer::string reads.
std::string quote(std::string_view text);

// A double as text that is read back exactly and is never taken for an integer.
std::string print_double(double value);

}  // namespace tilewright::graph
