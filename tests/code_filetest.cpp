// Runs tests/filetests/code/*.vir: VIR in, disassembly expected.
//
//   ; test code RUNG      the target; the function follows
//   ; emits               then one comment line for each line of disassemble(), after the required
//                         ISA and the number of spills
//
// BLESS=1 rewrites the expectations in place: read the diff before you commit it.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
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

std::vector<std::string> files() {
  std::vector<std::string> result;
  for (const auto& entry : fs::directory_iterator(kFolder)) {
    if (entry.path().extension() == ".vir") result.push_back(entry.path().stem());
  }
  std::sort(result.begin(), result.end());
  return result;
}

class Code : public ::testing::TestWithParam<std::string> {};

TEST_P(Code, IsAsExpected) {
  const fs::path path = kFolder / (GetParam() + ".vir");
  const std::string text = read(path);
  const Result<std::string> wanted = regenerate(text);
  ASSERT_TRUE(wanted.ok()) << wanted.error().message;
  if (text == *wanted) return;
  if (std::getenv("BLESS") != nullptr) {
    std::ofstream(path) << *wanted;
    return;
  }
  EXPECT_EQ(text, *wanted) << "BLESS=1 rewrites the expectations in place.";
}

INSTANTIATE_TEST_SUITE_P(Files, Code, ::testing::ValuesIn(files()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace tilewright::jit
