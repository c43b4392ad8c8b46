// twc as a user calls it: what it prints, where it points, and its exit codes.
//
// Tests frontends/cli/twc.cpp. Runs the program in a shell.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace tilewright {
namespace {

namespace fs = std::filesystem;

struct Outcome {
  int exit_code = -1;
  std::string output, errors;
};

class Twc : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::path(testing::TempDir()) / "twc_test_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(directory_ / name) << text;
    return (directory_ / name).string();
  }
  static std::string read(const fs::path& path) {
    std::ifstream stream(path);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  Outcome run(const std::string& arguments) {
    fs::path output = directory_ / "output", errors = directory_ / "errors";
    std::string command = fmt::format("'{}' {} >'{}' 2>'{}'", TILEWRIGHT_TWC, arguments,
                                      output.string(), errors.string());
    int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(output), read(errors)};
  }

  fs::path directory_;
};

const std::string graph_text =
    "; a comment\n"
    "graph g(%x: f32[n]) -> (f32[n]) {\n"
    "  %y = add(%x, %x)\n"
    "  return %y\n"
    "}\n";
const std::string printed_graph =
    "graph g(%x: f32[n]) -> (f32[n]) {\n"
    "  %y = add(%x, %x) : f32[n]\n"
    "  return %y\n"
    "}\n";

TEST_F(Twc, prints_the_canonical_form) {
  Outcome outcome = run("print " + write("a.graph", graph_text));
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.output, printed_graph);
  EXPECT_EQ(run("print < " + write("b.graph", graph_text)).output, printed_graph);
  EXPECT_EQ(run("print - < " + write("b.graph", graph_text)).output, printed_graph);
}

TEST_F(Twc, points_at_the_line_of_the_file) {
  std::string broken = write("a.graph", "; one\n\ngraph g(%x: f32[n]) -> () {\n return %y\n}\n");
  Outcome outcome = run("print " + broken);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.output, "");
  EXPECT_EQ(outcome.errors, broken + ":4: %y is not defined\n");

  std::string wrong = write("b.graph",
                            "graph g(%x: f32[n]) -> () {\n\n ; two\n %y = neg(%x) : f32[2]\n"
                            "return\n}\n");
  EXPECT_EQ(run("print " + wrong).exit_code, 0);
  outcome = run("verify " + wrong);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.errors, wrong + ":4: %y is f32[n], stated as f32[2]\n");

  std::string vir = write("c.vir", "nonsense\n");
  outcome = run("verify " + vir);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_TRUE(outcome.errors.starts_with(vir + ":1: ")) << outcome.errors;
}

TEST_F(Twc, says_nothing_about_a_right_graph) {
  Outcome outcome = run("verify " + write("a.graph", graph_text));
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.output + outcome.errors, "");
}

TEST_F(Twc, runs_passes_by_name) {
  std::string file = write("a.graph", graph_text);
  EXPECT_EQ(run("passes -p match_rope,match_rms_norm " + file).output, printed_graph);
  EXPECT_NE(run("passes " + file).output.find("region 0 {"), std::string::npos);
  Outcome outcome = run("passes -p no_such_pass " + file);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_NE(outcome.errors.find("no_such_pass"), std::string::npos);
}

TEST_F(Twc, runs_a_graph_and_compares) {
  std::string input = graph_text + "; input %x = f32[2] {1, 2}\n";
  Outcome outcome = run("run " + write("a.graph", input));
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.output, "; output f32[2] {2, 4}\n");
  EXPECT_EQ(run("run " + write("b.graph", input + "; output f32[2] {2, 4}\n")).exit_code, 0);
  std::string wrong = write("c.graph", input + "; output f32[2] {2, 5}\n");
  outcome = run("run " + wrong);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.errors, wrong + ": output 0: element 1: 4 instead of 5\n");
  outcome = run("run " + write("d.graph", graph_text));
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_NE(outcome.errors.find("no '; input %x = ...'"), std::string::npos) << outcome.errors;
}

TEST_F(Twc, emits_vir_for_any_isa) {
  fs::path folder = fs::path(TILEWRIGHT_SOURCE_DIR) / "tests" / "filetests" / "code";
  std::string avx2 = (folder / "axpy_avx2.vir").string();
  std::string avx512 = (folder / "axpy_avx512.vir").string();
  Outcome printed = run("vir " + avx2);
  EXPECT_EQ(printed.exit_code, 0);
  EXPECT_EQ(run("vir " + write("again.vir", printed.output)).output, printed.output);
  EXPECT_NE(run("code --isa avx512 " + avx512).output.find("requires avx2+avx512,"),
            std::string::npos);
  Outcome outcome = run("disasm --isa avx512 " + avx512);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_NE(outcome.output.find("zmm"), std::string::npos);
  outcome = run("code --isa avx2 " + avx512);  // 16 lanes do not fit
  EXPECT_EQ(outcome.exit_code, 1);
}

TEST_F(Twc, shows_the_kernels_of_a_graph) {
  const std::string layer =
      (fs::path(TILEWRIGHT_SOURCE_DIR) / "tests" / "filetests" / "run" / "llama_layer.graph")
          .string();
  for (std::string_view isa : {"avx2", "avx512"}) {
    SCOPED_TRACE(isa);
    const Outcome outcome = run(fmt::format("disasm {} --isa {}", layer, isa));
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    for (std::string_view kernel : {"; linear", "; attention", "; rope", "; row", "rows=1 n=16"}) {
      EXPECT_NE(outcome.output.find(kernel), std::string::npos) << kernel;
    }
    EXPECT_EQ(outcome.output.find("zmm") != std::string::npos, isa == "avx512");
  }
  // One kernel's VIR is a file that the same command takes.
  const Outcome vir = run("vir --isa avx2 " + write("a.graph", graph_text));
  EXPECT_EQ(vir.exit_code, 0) << vir.errors;
  const Outcome again = run("vir " + write("a.vir", vir.output));
  EXPECT_EQ(again.exit_code, 0) << again.errors;
  EXPECT_NE(vir.output.find(again.output), std::string::npos);
  EXPECT_EQ(run("code --isa avx2 " + write("a.graph", graph_text)).exit_code, 0);
}

TEST_F(Twc, hashes_what_matters) {
  std::string spaced = write("a.graph", graph_text), plain = write("b.graph", printed_graph);
  std::string other = write("c.graph", graph_text + "; input %x = f32[1] {1}\n");
  auto hash = [&](const std::string& file) { return run("hash " + file).output.substr(0, 64); };
  EXPECT_EQ(hash(spaced), hash(plain));
  EXPECT_EQ(hash(spaced), hash(other));
  EXPECT_EQ(hash(spaced).find_first_not_of("0123456789abcdef"), std::string::npos);
  std::string changed = printed_graph;
  changed.replace(changed.find("add"), 3, "sub");
  EXPECT_NE(hash(spaced), hash(write("d.graph", changed)));
}

TEST_F(Twc, refuses_wrong_usage) {
  std::string file = write("a.graph", graph_text);
  for (const std::string& arguments :
       {std::string(), std::string("nonsense"), "print --isa " + file, "print -x " + file,
        "print --isa nonsense " + file, "print " + file + " " + file}) {
    Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments;
    EXPECT_NE(outcome.errors, "") << arguments;
    EXPECT_EQ(outcome.output, "") << arguments;
  }
  EXPECT_EQ(run("--help").exit_code, 0);
  Outcome outcome = run("print " + (directory_ / "missing").string());
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_NE(outcome.errors.find("cannot be read"), std::string::npos);
  EXPECT_EQ(run("print " + directory_.string()).exit_code, 1);
  EXPECT_EQ(run("print " + write("empty", "")).exit_code, 1);
}

}  // namespace
}  // namespace tilewright
