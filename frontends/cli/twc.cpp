// twc: the compiler's stages on text, one subcommand each.
//
//   twc print model.graph                     canonical form
//   twc verify model.graph                    errors as file:line
//   twc passes model.graph -p match_rope      after these passes; without -p the whole pipeline
//   twc run case.graph                        the reference interpreter on the file's directives
//   twc disasm kernel.vir --isa avx512        machine code of VIR, for this or another CPU
//   twc disasm model.graph                    of each kernel that the graph becomes, with the
//   choices
//                                             of speed for unknown CPUs, or with --choices others
//
// A file name of - (or none) is standard input. Results go to standard output, errors to standard
// error. Exit codes: 0 done, 1 the input is wrong or a result differs, 2 wrong usage.
//
// Tested by twc_test.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "cache/sha256.h"
#include "graph/node_lines.h"
#include "graph/pipeline.h"
#include "graph/run_case.h"
#include "jit/base/target.h"
#include "jit/emit.h"
#include "jit/inspect.h"
#include "jit/vir/vir.h"
#include "ops/choices.h"
#include "ops/compile.h"
#include "ops/kernel_library.h"

namespace tilewright {
namespace {

enum ExitCode { done = 0, wrong_input = 1, wrong_usage = 2 };

struct Options {
  std::string file = "-";
  std::optional<std::vector<std::string>> passes;
  Target target = Target::host();
  ops::Choices choices;  // of a graph's kernels
};

struct Input {
  std::string name;  // for messages
  std::string text;
};

struct Command {
  std::string_view name;
  std::string_view help;
  ExitCode (*run)(const Input& input, const Options& options);
};

ExitCode fail(std::string_view message) {
  std::fflush(stdout);
  fmt::print(stderr, "{}\n", message);
  return wrong_input;
}

// "line N: why" of the graph's parser, or "N: why" of VIR's, becomes "file:N: why".
ExitCode fail_in(const Input& input, std::string_view message) {
  constexpr std::string_view prefix = "line ";
  std::string_view located = message;
  if (located.starts_with(prefix)) located.remove_prefix(prefix.size());
  std::size_t digits = std::min(located.find_first_not_of("0123456789"), located.size());
  bool has_line = digits > 0 && located.substr(digits).starts_with(": ");
  return fail(has_line ? fmt::format("{}:{}", input.name, located)
                       : fmt::format("{}: {}", input.name, message));
}

// Comments and blanks before the first word decide between the two languages.
bool is_graph(const Input& input) {
  graph::Lexer lexer(input.text);
  return lexer.accept_word("graph");
}

// --- graph text

Result<graph::Graph> verified_graph(const Input& input) {
  Result<graph::ParsedText> parsed = graph::parse_with_lines(input.text);
  if (!parsed) return parsed.error();
  if (Status status = verify(parsed->graph, parsed->lines); !status) return status.error();
  return std::move(parsed->graph);
}

ExitCode print_text(const Input& input, const Options&) {
  if (is_graph(input)) {
    Result<graph::Graph> graph = graph::parse(input.text);
    if (!graph) return fail_in(input, graph.error().message);
    fmt::print("{}", graph::print(*graph));
    return done;
  }
  Result<jit::vir::Function> function = jit::vir::parse(input.text);
  if (!function) return fail_in(input, function.error().message);
  fmt::print("{}", jit::vir::print(*function));
  return done;
}

ExitCode verify_text(const Input& input, const Options&) {
  if (is_graph(input)) {
    Result<graph::Graph> graph = verified_graph(input);
    return graph ? done : fail_in(input, graph.error().message);
  }
  Result<jit::vir::Function> function = jit::vir::parse(input.text);
  if (!function) return fail_in(input, function.error().message);
  Status status = jit::vir::verify(*function);
  return status ? done : fail_in(input, status.error().message);
}

ExitCode run_passes(const Input& input, const Options& options) {
  Result<graph::Graph> graph = verified_graph(input);
  if (!graph) return fail_in(input, graph.error().message);
  std::vector<std::string> names = options.passes ? *options.passes : graph::pass_names();
  Result<graph::Graph> result = graph::run_passes(std::move(*graph), names, options.target);
  if (!result) return fail_in(input, result.error().message);
  fmt::print("{}", graph::print(*result));
  return done;
}

ExitCode run_graph(const Input& input, const Options&) {
  Result<graph::Graph> graph = verified_graph(input);
  if (!graph) return fail_in(input, graph.error().message);
  Result<graph::RunCase> run = graph::parse_run_case(*graph, input.text);
  if (!run) return fail_in(input, run.error().message);
  auto outputs = graph::interpret(*graph, run->arguments, run->constants, run->symbols);
  if (!outputs) return fail_in(input, outputs.error().message);
  for (const graph::Tensor& output : *outputs) fmt::print("; output {}\n", graph::print(output));
  if (run->outputs.empty()) return done;
  if (run->outputs.size() != outputs->size()) {
    return fail_in(input,
                   fmt::format("{} outputs, {} expected", outputs->size(), run->outputs.size()));
  }
  for (std::size_t i = 0; i < outputs->size(); ++i) {
    Status equal = graph::compare((*outputs)[i], run->outputs[i], run->tolerance);
    if (!equal) return fail_in(input, fmt::format("output {}: {}", i, equal.error().message));
  }
  return done;
}

// The kernels that a graph becomes, for any number of rows, as VIR text; named by what they do.
Result<std::vector<Input>> graph_kernels(const Input& input, const Target& target,
                                         const ops::Choices& choices) {
  Result<graph::Graph> graph = verified_graph(input);
  if (!graph) return graph.error();
  // Kernels do not depend on weights, so zeros will do.
  std::map<std::string, ops::TensorView> constants;
  std::vector<std::vector<char>> zeros;
  for (const graph::Node& node : graph->nodes) {
    if (node.op != graph::Op::constant) continue;
    const graph::Type& type = graph->type(node.results[0]);
    ops::TensorView view{nullptr, type.dtype, {}};
    for (const graph::Dim& size : type.shape) view.shape.push_back(size.constant());
    const auto bytes = ops::element_count(view) * graph::size_in_bytes(type.dtype);
    view.data = zeros.emplace_back(static_cast<std::size_t>(bytes)).data();
    constants[node.attribute<std::string>("source")] = view;
  }
  Result<graph::Graph> optimized = graph::optimize(std::move(*graph), target);
  if (!optimized) return optimized.error();
  auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
  auto library = std::make_shared<ops::KernelLibrary>(target, store);
  std::vector<Input> kernels;
  library->observe([&](const cache::Entry& entry) {
    kernels.push_back({entry.key_text.substr(0, entry.key_text.rfind("\nisa ")),
                       entry.recipe.text().value()});  // packed just now
  });
  ops::CompileOptions options;
  options.choices = choices;
  // fp32 that needs 32 bits, in range of all kernels; bf16 that fits 12.
  const ops::AssumedValues values{graph::DataType::f32, true};
  Result<ops::Program> program = ops::compile(*optimized, constants, target, options, library,
                                              std::make_shared<ops::WeightStore>(values));
  if (!program) return program.error();
  if (Status prepared = program->prepare(); !prepared) return prepared.error();
  return kernels;
}

using VirCommand = ExitCode (*)(const Input& input, const Options& options);

// A command on VIR text, for each kernel of a graph.
ExitCode for_each_kernel(const Input& input, const Options& options, VirCommand command) {
  Result<std::vector<Input>> kernels = graph_kernels(input, options.target, options.choices);
  if (!kernels) return fail_in(input, kernels.error().message);
  for (const Input& kernel : *kernels) {
    std::string title = kernel.name;
    for (std::size_t at = 0; (at = title.find('\n', at)) != std::string::npos; at += 3) {
      title.replace(at, 1, "\n; ");
    }
    fmt::print("; {}\n", title);
    if (const ExitCode code = command(kernel, options); code != done) return code;
    fmt::print("\n");
  }
  return done;
}

// --- VIR text

Result<jit::vir::Function> vir_function(const Input& input) {
  Result<jit::vir::Function> function = jit::vir::parse(input.text);
  if (!function) return function;
  if (Status status = jit::vir::verify(*function); !status) return status.error();
  return function;
}

// Verified, emitted, and what to do with the code.
ExitCode with_code(const Input& input, const Options& options,
                   const std::function<ExitCode(const jit::CodeObject&)>& use) {
  Result<jit::vir::Function> function = vir_function(input);
  if (!function) return fail_in(input, function.error().message);
  Result<jit::CodeObject> code = jit::emit(*function, options.target);
  if (!code) return fail_in(input, code.error().message);
  return use(*code);
}

ExitCode print_vir(const Input& input, const Options& options) {
  if (is_graph(input)) return for_each_kernel(input, options, print_vir);
  Result<jit::vir::Function> function = vir_function(input);
  if (!function) return fail_in(input, function.error().message);
  fmt::print("{}", jit::vir::print(*function));
  return done;
}

void print_facts(const jit::CodeObject& code) {
  fmt::print("; {}: {} bytes of code, {} of constants, requires {}, {} spills ({} in loops)\n",
             code.name, code.code_size, code.bytes.size() - code.code_size,
             isa_mask_name(code.required_isa), code.spills, code.inner_loop_spills);
}

ExitCode print_code(const Input& input, const Options& options) {
  if (is_graph(input)) return for_each_kernel(input, options, print_code);
  return with_code(input, options, [](const jit::CodeObject& code) {
    print_facts(code);
    for (std::size_t i = 0; i < code.bytes.size(); ++i) {
      bool last_of_line = i % 16 == 15 || i + 1 == code.bytes.size();
      fmt::print("{:02x}{}", static_cast<unsigned>(code.bytes[i]), last_of_line ? "\n" : " ");
    }
    return done;
  });
}

ExitCode print_disassembly(const Input& input, const Options& options) {
  if (is_graph(input)) return for_each_kernel(input, options, print_disassembly);
  return with_code(input, options, [&](const jit::CodeObject& code) {
    auto instructions = std::span(code.bytes).first(code.code_size);
    Result<std::string> text = jit::disassemble(instructions);
    if (!text) return fail_in(input, text.error().message);
    print_facts(code);
    fmt::print("{}", *text);
    return done;
  });
}

// Equal hashes prove that a change changed nothing: of a graph's canonical text, of VIR's code.
ExitCode print_hash(const Input& input, const Options& options) {
  if (is_graph(input)) {
    Result<graph::Graph> graph = verified_graph(input);
    if (!graph) return fail_in(input, graph.error().message);
    std::string text = graph::print(*graph);
    fmt::print("{}  {}\n", cache::hex(cache::sha256(text)), input.name);
    return done;
  }
  return with_code(input, options, [&](const jit::CodeObject& code) {
    fmt::print("{}  {}\n", cache::hex(cache::sha256(code.bytes)), input.name);
    return done;
  });
}

constexpr Command commands[] = {
    {"print", "the text in canonical form", print_text},
    {"verify", "check the text; silent if it is right", verify_text},
    {"passes", "graph: the text after the pipeline, or after the passes of -p", run_passes},
    {"run", "graph: results by the reference interpreter, compared with the file's", run_graph},
    {"vir", "the VIR, verified; of a graph: of each of its kernels", print_vir},
    {"code", "machine code in hexadecimal", print_code},
    {"disasm", "machine code as instructions", print_disassembly},
    {"hash", "SHA-256 of a graph's canonical text, or of VIR's machine code", print_hash},
};

std::string usage() {
  std::string text = "usage: twc COMMAND [FILE] [-p PASS,...] [--isa RUNG] [--choices JSON]\n\n";
  for (const Command& command : commands) {
    text += fmt::format("  {:8} {}\n", command.name, command.help);
  }
  text += fmt::format("\n  -p       of {}\n", fmt::join(graph::pass_names(), ", "));
  text +=
      fmt::format("  --isa    one of {}; the default is this machine\n", Target::ladder_names());
  text += "  --choices  of speed, as '{\"prefetch\": 512}'\n";
  return text;
}

std::vector<std::string> split_at_commas(std::string_view list) {
  std::vector<std::string> names;
  while (!list.empty()) {
    std::size_t end = std::min(list.find(','), list.size());
    if (end > 0) names.emplace_back(list.substr(0, end));
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return names;
}

// The arguments behind the command. Error: the usage is wrong, and how.
Result<Options> parse_options(std::span<const std::string_view> arguments) {
  Options options;
  bool file_given = false;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    std::string_view argument = arguments[i];
    if (argument == "-p" || argument == "--isa" || argument == "--choices") {
      if (++i == arguments.size()) return Error{fmt::format("{} needs a value", argument)};
      if (argument == "-p") {
        options.passes = split_at_commas(arguments[i]);
        continue;
      }
      if (argument == "--choices") {
        Result<ops::Choices> choices = ops::changed({}, arguments[i]);
        if (!choices) return choices.error();
        options.choices = *choices;
        continue;
      }
      Result<Target> target = Target::for_rung(arguments[i]);
      if (!target) return target.error();
      options.target = *target;
    } else if (argument.starts_with('-') && argument != "-") {
      return Error{fmt::format("unknown option {}", argument)};
    } else if (file_given) {
      return Error{fmt::format("one file at a time, found {} too", argument)};
    } else {
      options.file = argument;
      file_given = true;
    }
  }
  return options;
}

Result<Input> read_input(const std::string& file) {
  if (file == "-") {
    return Input{"<stdin>", {std::istreambuf_iterator<char>(std::cin), {}}};
  }
  std::ifstream stream(file, std::ios::binary);
  std::ostringstream text;
  // Inserting nothing fails the output, and an empty file is not an error.
  bool empty = stream.peek() == std::ifstream::traits_type::eof() && !stream.bad();
  if (!stream.is_open() || (!empty && !(text << stream.rdbuf()))) {
    return Error{fmt::format("{}: cannot be read", file)};
  }
  return Input{file, text.str()};
}

int run(std::span<const std::string_view> arguments) {
  if (arguments.empty()) {
    fmt::print(stderr, "{}", usage());
    return wrong_usage;
  }
  if (arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
    fmt::print("{}", usage());
    return done;
  }
  for (const Command& command : commands) {
    if (command.name != arguments[0]) continue;
    Result<Options> options = parse_options(arguments.subspan(1));
    if (!options) {
      fmt::print(stderr, "twc {}: {}\n", command.name, options.error().message);
      return wrong_usage;
    }
    Result<Input> input = read_input(options->file);
    return input ? command.run(*input, *options) : fail(input.error().message);
  }
  fmt::print(stderr, "twc: unknown command {}\n{}", arguments[0], usage());
  return wrong_usage;
}

}  // namespace
}  // namespace tilewright

int main(int argc, char** argv) {
  std::vector<std::string_view> arguments(argv + 1, argv + argc);
  return tilewright::run(arguments);
}
