// Runs tests/filetests/code: VIR or a graph in, disassembly expected.
//
//   ; test code RUNG      the target; a function or a graph follows
// *.vir
//   ; emits               then one comment line for each line of disassemble(), after the required
//                         ISA and the number of spills
// *.graph, by `twc disasm`
//   ; choices JSON        of speed (ops/choices.h), anywhere before the first loop; may be missing
//   ; loop of KERNEL      of the kernel whose specification begins so: its innermost loop with the
//                         most instructions, where its time goes. Whole kernels have hundreds
//   ; loop of KERNEL, most INSTRUCTION    the one with the most of these
//
// BLESS=1 rewrites the expectations in place: read the diff before you commit it.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "jit/emit.h"
#include "jit/inspect.h"

namespace tilewright::jit {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kHeader = "; test code ";
constexpr std::string_view kEmits = "; emits";

const fs::path kFolder = fs::path(TILEWRIGHT_SOURCE_DIR) / "tests/filetests/code";

std::string read(const fs::path& path) {
  std::ifstream stream(path);
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::string as_comments(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const std::size_t newline = text.find('\n');
    const std::string_view line = text.substr(0, newline);
    result += fmt::format(";{}{}\n", line.ends_with(':') ? " " : "   ", line);
    text.remove_prefix(newline + 1);
  }
  return result;
}

// The file as it should be: the source, then what emission says now.
Result<std::string> regenerate(std::string_view text) {
  if (!text.starts_with(kHeader)) {
    return Error{fmt::format("the first line must be `{}RUNG`", kHeader)};
  }
  const std::string_view rung = text.substr(kHeader.size(), text.find('\n') - kHeader.size());
  const std::string_view source = text.substr(0, text.find(kEmits));
  const Result<Target> target = Target::for_rung(rung);
  if (!target.ok()) return target.error();
  const Result<vir::Function> function = vir::parse(source);
  if (!function.ok()) return function.error();
  const Result<CodeObject> code = emit(*function, *target);
  if (!code.ok()) return code.error();
  const Result<std::string> listing = disassemble(std::span(code->bytes).first(code->code_size));
  if (!listing.ok()) return listing.error();
  return fmt::format("{}{} {}, {} spills, {} in inner loops\n{}", source, kEmits,
                     isa_mask_name(code->required_isa), code->spills, code->inner_loop_spills,
                     as_comments(*listing));
}

std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> lines;
  while (!text.empty()) {
    const std::size_t newline = std::min(text.find('\n'), text.size());
    lines.emplace_back(text.substr(0, newline));
    text.remove_prefix(std::min(newline + 1, text.size()));
  }
  return lines;
}

// From a label to the jump back to it, with no such loop inside: the one with the most of an
// instruction, of any if it is empty. Empty: none.
std::vector<std::string> inner_loop(std::span<const std::string> listing,
                                    std::string_view instruction) {
  std::map<std::string, std::size_t> labels;
  std::span<const std::string> found;
  const auto size = [&](std::span<const std::string> loop) {
    return std::ranges::count_if(
        loop, [&](const std::string& line) { return line.starts_with(instruction); });
  };
  std::size_t innermost = 0;  // loops that begin before it hold one that has ended
  for (std::size_t i = 0; i < listing.size(); ++i) {
    const std::string& line = listing[i];
    if (line.ends_with(':')) labels[line.substr(0, line.size() - 1)] = i;
    if (!line.starts_with('j')) continue;
    const auto label = labels.find(line.substr(line.find(' ') + 1));
    if (label == labels.end() || label->second < innermost) continue;  // ahead, or around another
    innermost = i;
    const auto loop = listing.subspan(label->second, i + 1 - label->second);
    if (size(loop) > size(found)) found = loop;
  }
  return {found.begin(), found.end()};
}

std::string output_of(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[4096];
  while (const std::size_t count = fread(buffer, 1, sizeof buffer, pipe)) {
    output.append(buffer, count);
  }
  return pclose(pipe) == 0 ? output : "";
}

// A line that begins so, without its beginning.
std::string after(std::span<const std::string> lines, std::string_view beginning) {
  for (const std::string& line : lines) {
    if (line.starts_with(beginning)) return line.substr(beginning.size());
  }
  return "";
}

// The same for a graph's kernels.
Result<std::string> regenerate_loops(const fs::path& path, std::string_view text) {
  constexpr std::string_view kLoop = "; loop of ", kMost = ", most ";
  const std::vector<std::string> lines = lines_of(text);
  const std::string choices = after(lines, "; choices ");
  const std::vector<std::string> printed = lines_of(output_of(
      fmt::format("'{}' disasm '{}' --isa {} --choices '{}'", TILEWRIGHT_TWC, path.string(),
                  after(lines, kHeader), choices.empty() ? "{}" : choices)));
  if (printed.empty()) return Error{"twc disasm failed"};
  std::string result;
  bool expected = false;
  for (const std::string& line : lines) {
    expected = expected || line.starts_with(kLoop);
    if (!expected) result += line + "\n";
    if (!line.starts_with(kLoop)) continue;
    const std::size_t comma = std::min(line.find(kMost), line.size());
    const std::string kernel = line.substr(kLoop.size(), comma - kLoop.size());
    const std::string instruction = line.substr(std::min(comma + kMost.size(), line.size()));
    const auto title = std::ranges::find_if(
        printed, [&](const std::string& other) { return other.starts_with("; " + kernel); });
    if (title == printed.end()) return Error{fmt::format("no kernel begins with {}", kernel)};
    const auto end = std::find(title, printed.end(), "");  // an empty line follows each
    result += line + "\n";
    for (const std::string& code : inner_loop({title, end}, instruction)) {
      result += as_comments(code + "\n");
    }
  }
  if (!expected) return Error{"no loop is asked for"};
  return result;
}

std::vector<std::string> files() {
  std::vector<std::string> result;
  for (const auto& entry : fs::directory_iterator(kFolder)) {
    result.push_back(entry.path().filename());
  }
  std::sort(result.begin(), result.end());
  return result;
}

class Code : public ::testing::TestWithParam<std::string> {};

TEST_P(Code, IsAsExpected) {
  const fs::path path = kFolder / GetParam();
  const std::string text = read(path);
  const Result<std::string> wanted =
      path.extension() == ".graph" ? regenerate_loops(path, text) : regenerate(text);
  ASSERT_TRUE(wanted.ok()) << wanted.error().message;
  if (text == *wanted) return;
  if (std::getenv("BLESS") != nullptr) {
    std::ofstream(path) << *wanted;
    return;
  }
  EXPECT_EQ(text, *wanted) << "BLESS=1 rewrites the expectations in place.";
}

INSTANTIATE_TEST_SUITE_P(Files, Code, ::testing::ValuesIn(files()), [](const auto& info) {
  std::string name = info.param;
  std::ranges::replace(name, '.', '_');
  return name;
});

}  // namespace
}  // namespace tilewright::jit
