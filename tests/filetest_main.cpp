// Runs tests/filetests/{parse,verify,passes,run}: one GoogleTest case per file, whose first line
// says what to do.
//
//   ; test parse          the graph is printed as it is written; or as the text after a line
//                         `; prints`; or parsing fails, see below
//   ; test verify         the graph verifies; or verifying fails, see below
//   ; test passes=a,b     the graph, after these passes, is the text after the line `; after a,b`
//   ; test run            the interpreter gives the outputs of the directives in graph/run_case.h
//
// A line that must be refused has `; error: text` at its end, and the message must contain the
// text.
//
// BLESS=1 rewrites the expectations in place: read the diff before you commit it.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "graph/node_lines.h"
#include "graph/pipeline.h"
#include "graph/run_case.h"
#include "jit/base/target.h"

namespace tilewright::graph {
namespace {

namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

constexpr std::string_view error_mark = "; error: ";

Lines split(const std::string& text) {
  Lines lines;
  for (std::size_t begin = 0; begin < text.size();) {
    std::size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

std::string join(const Lines& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

// Without whole lines of comments and blank lines: what print() could have written.
Lines without_comments(const Lines& lines) {
  Lines kept;
  for (const std::string& line : lines) {
    if (!line.empty() && line[0] != ';' && line[0] != '#') kept.push_back(line);
  }
  return kept;
}

// A diff of whole texts by their longest common subsequence; the texts are small.
std::string diff(const Lines& expected, const Lines& actual) {
  std::size_t n = expected.size(), m = actual.size();
  std::vector<std::vector<int>> common(n + 1, std::vector<int>(m + 1));
  for (std::size_t i = n; i-- > 0;) {
    for (std::size_t j = m; j-- > 0;) {
      common[i][j] = expected[i] == actual[j] ? common[i + 1][j + 1] + 1
                                              : std::max(common[i + 1][j], common[i][j + 1]);
    }
  }
  std::string text;
  for (std::size_t i = 0, j = 0; i < n || j < m;) {
    if (i < n && j < m && expected[i] == actual[j]) {
      text += "  " + expected[i++] + "\n";
      ++j;
    } else if (j == m || (i < n && common[i + 1][j] >= common[i][j + 1])) {
      text += "- " + expected[i++] + "\n";
    } else {
      text += "+ " + actual[j++] + "\n";
    }
  }
  return text;
}

struct File {
  fs::path path;
  Lines lines;

  std::string text() const { return join(lines); }
  // The value of a line "; key..." or "; key=..." in the header line.
  std::string kind() const {
    std::string_view first = lines.empty() ? std::string_view() : std::string_view(lines[0]);
    return first.starts_with("; test ") ? std::string(first.substr(7)) : "";
  }
  // The index of the first line that begins so.
  std::size_t find(std::string_view prefix) const {
    auto found = std::find_if(lines.begin(), lines.end(),
                              [&](const std::string& line) { return line.starts_with(prefix); });
    return static_cast<std::size_t>(found - lines.begin());
  }
  Lines range(std::size_t begin, std::size_t end) const {
    return Lines(lines.begin() + static_cast<std::ptrdiff_t>(begin),
                 lines.begin() + static_cast<std::ptrdiff_t>(std::max(begin, end)));
  }
};

File read(const fs::path& path) {
  std::ifstream stream(path);
  return {path, split({std::istreambuf_iterator<char>(stream), {}})};
}

// Compares with what the file should be; or makes it so.
void expect_file(const File& file, const Lines& wanted) {
  if (file.lines == wanted) return;
  if (std::getenv("BLESS") != nullptr) {
    std::ofstream(file.path) << join(wanted);
    return;
  }
  ADD_FAILURE() << file.path.string() << " (-: expected, +: actual)\n"
                << diff(file.lines, wanted) << "BLESS=1 rewrites the expectations in place.";
}

std::string strip_error(const std::string& line) {
  std::size_t mark = line.find(error_mark);
  if (mark == std::string::npos) return line;
  return line.substr(0, line.find_last_not_of(' ', mark - 1) + 1);
}

// `error` begins with "line N: ". An expectation that is a part of the message stays as it is.
void expect_error(const File& file, const std::optional<Error>& error) {
  Lines wanted = file.lines;
  for (std::string& line : wanted) line = strip_error(line);
  if (error) {
    std::size_t colon = error->message.find(": ");
    ASSERT_TRUE(error->message.starts_with("line ") && colon != std::string::npos)
        << error->message;
    std::size_t at = std::stoul(error->message.substr(5)) - 1;
    ASSERT_LT(at, wanted.size()) << error->message;
    std::string message = error->message.substr(colon + 2);
    const std::string& present = file.lines[at];
    std::size_t mark = present.find(error_mark);
    std::string part =
        mark == std::string::npos ? message : present.substr(mark + error_mark.size());
    if (message.find(part) == std::string::npos) part = message;
    wanted[at] += "  " + std::string(error_mark) + part;
  }
  expect_file(file, wanted);
}

void test_parse(const File& file) {
  std::size_t prints = file.find("; prints");
  Lines source = file.range(0, prints);
  Result<Graph> graph = parse(join(source));
  if (!graph) return expect_error(file, graph.error());
  ASSERT_EQ(file.text().find(error_mark), std::string::npos) << "parsed without an error";
  Lines printed = split(print(*graph));
  Result<Graph> again = parse(join(printed));
  ASSERT_TRUE(again.ok()) << again.error().message;
  EXPECT_EQ(print(*again), join(printed));
  if (prints == file.lines.size() && without_comments(source) == printed) return;
  Lines wanted = source;
  wanted.push_back("; prints");
  wanted.insert(wanted.end(), printed.begin(), printed.end());
  expect_file(file, wanted);
}

void test_verify(const File& file) {
  Result<ParsedText> parsed = parse_with_lines(file.text());
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  Status status = verify(parsed->graph, parsed->lines);
  expect_error(file, status.ok() ? std::nullopt : std::optional(status.error()));
}

void test_passes(const File& file) {
  std::string list = file.kind().substr(7);
  std::vector<std::string> names;
  for (std::size_t begin = 0; begin <= list.size();) {
    std::size_t end = std::min(list.find(',', begin), list.size());
    names.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  Lines source = file.range(0, file.find("; after "));
  Result<Graph> graph = parse(join(source));
  ASSERT_TRUE(graph.ok()) << graph.error().message;
  Status before = verify(*graph);
  ASSERT_TRUE(before.ok()) << before.error().message;
  Result<Target> target = Target::for_rung("avx2");
  ASSERT_TRUE(target.ok()) << target.error().message;
  Result<Graph> result = run_passes(std::move(*graph), names, *target);
  ASSERT_TRUE(result.ok()) << result.error().message;
  Lines printed = split(print(*result));
  Status after = verify(*result);
  EXPECT_TRUE(after.ok()) << after.error().message << "\n" << join(printed);
  Lines wanted = source;
  wanted.push_back("; after " + list);
  wanted.insert(wanted.end(), printed.begin(), printed.end());
  expect_file(file, wanted);
}

void test_run(const File& file) {
  Result<Graph> graph = parse(file.text());
  ASSERT_TRUE(graph.ok()) << graph.error().message;
  Result<RunCase> run = parse_run_case(*graph, file.text());
  ASSERT_TRUE(run.ok()) << run.error().message;
  auto outputs = interpret(*graph, run->arguments, run->constants, run->symbols);
  ASSERT_TRUE(outputs.ok()) << outputs.error().message;
  bool equal = outputs->size() == run->outputs.size();
  for (std::size_t i = 0; equal && i < outputs->size(); ++i) {
    equal = compare((*outputs)[i], run->outputs[i], run->tolerance).ok();
  }
  if (equal) return;
  Lines wanted;
  for (const std::string& line : file.lines) {
    if (!line.starts_with("; output ")) wanted.push_back(line);
  }
  for (const Tensor& output : *outputs) wanted.push_back("; output " + print(output));
  expect_file(file, wanted);
}

class FileTest : public testing::TestWithParam<std::string> {};

const fs::path root = fs::path(TILEWRIGHT_SOURCE_DIR) / "tests" / "filetests";

TEST_P(FileTest, runs) {
  File file = read(root / GetParam());
  std::string kind = file.kind();
  if (kind == "parse") return test_parse(file);
  if (kind == "verify") return test_verify(file);
  if (kind.starts_with("passes=")) return test_passes(file);
  if (kind == "run") return test_run(file);
  FAIL() << GetParam() << " does not begin with '; test parse|verify|passes=...|run'";
}

std::vector<std::string> graph_files() {
  std::vector<std::string> files;
  for (const char* folder : {"parse", "verify", "passes", "run"}) {
    if (!fs::is_directory(root / folder)) continue;
    for (const fs::directory_entry& entry : fs::directory_iterator(root / folder)) {
      if (entry.path().extension() == ".graph") {
        files.push_back(std::string(folder) + "/" + entry.path().filename().string());
      }
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string case_name(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param.substr(0, info.param.rfind('.'));
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Files, FileTest, testing::ValuesIn(graph_files()), case_name);

}  // namespace
}  // namespace tilewright::graph
