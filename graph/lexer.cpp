// Tokens of the IR's text: reading them, and writing the two that need care (strings, doubles).
//
// Tested by graph_test, filetests/parse.
#include "graph/lexer.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

namespace tilewright::graph {
namespace {

// The C locale's classes, without the locale.
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_word(char c) { return is_letter(c) || is_digit(c); }
bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

template <class Predicate>
std::size_t span_of(std::string_view text, Predicate predicate, std::size_t from = 0) {
  std::size_t end = from;
  while (end < text.size() && predicate(text[end])) ++end;
  return end;
}

std::optional<unsigned> hex_digit(char c) {
  if (is_digit(c)) return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return std::nullopt;
}

// The length of the number that text begins with, and whether it has a fraction or an exponent.
std::size_t number_length(std::string_view text, bool& is_integer) {
  std::size_t end = span_of(text, is_digit);
  is_integer = true;
  if (end == 0) return 0;
  if (end + 1 < text.size() && text[end] == '.' && is_digit(text[end + 1])) {
    is_integer = false;
    end = span_of(text, is_digit, end + 1);
  }
  if (end < text.size() && (text[end] == 'e' || text[end] == 'E')) {
    std::size_t digits = end + 1;
    if (digits < text.size() && (text[digits] == '+' || text[digits] == '-')) ++digits;
    std::size_t after = span_of(text, is_digit, digits);
    if (after > digits) {
      is_integer = false;
      end = after;
    }
  }
  return end;
}

}  // namespace

void Lexer::skip_blanks() {
  while (position_ < text_.size()) {
    char c = text_[position_];
    if (c == ';' || c == '#') {
      position_ = std::min(text_.find('\n', position_), text_.size());
    } else if (is_blank(c)) {
      line_ += c == '\n';
      ++position_;
    } else {
      return;
    }
  }
}

void Lexer::consume(std::size_t length) {
  position_ += length;
  last_line_ = line_;
}

int Lexer::line() {
  skip_blanks();
  return line_;
}

bool Lexer::at_end() {
  skip_blanks();
  return position_ == text_.size();
}

std::string Lexer::next() {
  if (at_end()) return "the end of the text";
  std::size_t length = std::max<std::size_t>(1, span_of(rest(), is_word));
  return quote(rest().substr(0, std::min<std::size_t>(length, 40)));
}

bool Lexer::accept(std::string_view punctuation) {
  skip_blanks();
  if (!rest().starts_with(punctuation)) return false;
  consume(punctuation.size());
  return true;
}

bool Lexer::accept_word(std::string_view word) {
  skip_blanks();
  if (rest().substr(0, span_of(rest(), is_word)) != word) return false;
  consume(word.size());
  return true;
}

std::optional<std::string_view> Lexer::identifier() {
  skip_blanks();
  if (position_ == text_.size() || !is_letter(text_[position_])) return std::nullopt;
  std::string_view word = rest().substr(0, span_of(rest(), is_word));
  consume(word.size());
  return word;
}

std::optional<std::string_view> Lexer::dotted() {
  skip_blanks();
  auto in_name = [](char c) { return is_word(c) || c == '.'; };
  std::string_view word = rest().substr(0, span_of(rest(), in_name));
  if (word.empty()) return std::nullopt;
  consume(word.size());
  return word;
}

std::optional<Number> Lexer::number() {
  skip_blanks();
  Number number;
  std::size_t length = number_length(rest(), number.is_integer);
  if (length == 0) return std::nullopt;
  const char* begin = text_.data() + position_;
  const char* end = begin + length;
  auto result = std::from_chars(begin, end, number.floating);
  number.in_range = result.ec == std::errc();
  if (number.is_integer) {
    constexpr std::uint64_t limit = std::uint64_t{1} << 63;
    auto integer = std::from_chars(begin, end, number.integer);
    number.in_range = integer.ec == std::errc() && number.integer <= limit;
  }
  consume(length);
  return number;
}

std::optional<std::string> Lexer::string() {
  skip_blanks();
  std::string_view text = rest();
  if (!text.starts_with('"')) return std::nullopt;
  std::string result;
  for (std::size_t i = 1; i < text.size(); ++i) {
    char c = text[i];
    if (c == '"') {
      consume(i + 1);
      return result;
    }
    if (c == '\n') return std::nullopt;
    if (c != '\\') {
      result += c;
      continue;
    }
    if (++i == text.size()) return std::nullopt;
    switch (text[i]) {
      case 'n':
        result += '\n';
        break;
      case 't':
        result += '\t';
        break;
      case '"':
        result += '"';
        break;
      case '\\':
        result += '\\';
        break;
      case 'x': {
        if (i + 2 >= text.size()) return std::nullopt;
        auto high = hex_digit(text[i + 1]), low = hex_digit(text[i + 2]);
        if (!high || !low) return std::nullopt;
        result += static_cast<char>(*high * 16 + *low);
        i += 2;
        break;
      }
      default:
        return std::nullopt;
    }
  }
  return std::nullopt;
}

std::string quote(std::string_view text) {
  std::string result = "\"";
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (c == '\n') {
      result += "\\n";
    } else if (c == '\t') {
      result += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      result += fmt::format("\\x{:02x}", byte);
    } else {
      result += c;
    }
  }
  return result + '"';
}

std::string print_double(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

}  // namespace tilewright::graph
