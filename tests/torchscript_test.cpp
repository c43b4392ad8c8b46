// tilewright::optimize() on TorchScript modules: a decoder written in TorchScript, saved, loaded
// and run in our code; small modules for one op each; and what is refused.
#include <gtest/gtest.h>
#include <torch/script.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "frontends/torch/libtorch/graph_writer.h"
#include "frontends/torch/libtorch/nodes.h"
#include "frontends/torch/libtorch/optimize.h"

namespace tilewright {
namespace {

using torch::jit::Module;

constexpr std::int64_t kWidth = 64, kVocabulary = 96;

constexpr const char* kDecoder = R"(
def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean([-1], True) + 1e-05))

def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin

def heads(self, x: Tensor, weight: Tensor, count: int) -> Tensor:
    y = torch.linear(x, weight)
    return y.view([x.size(0), x.size(1), count, 16]).transpose(1, 2)

def forward(self, tokens: Tensor) -> Tensor:
    b, s = tokens.size(0), tokens.size(1)
    angle = torch.arange(s).unsqueeze(-1).float() * self.frequencies
    angle = torch.cat([angle, angle], -1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = torch.embedding(self.embedding, tokens)
    for i in range(2):
        n = self.rms_norm(x, self.norm)
        q = self.rotated(self.heads(n, self.q, 4), cos, sin)
        k = self.rotated(self.heads(n, self.k, 2), cos, sin)
        v = self.heads(n, self.v, 2)
        k = k[:, :, None].expand([b, 2, 2, s, 16]).reshape([b, 4, s, 16])
        v = v[:, :, None].expand([b, 2, 2, s, 16]).reshape([b, 4, s, 16])
        a = torch.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + torch.linear(a.transpose(1, 2).reshape([b, s, 64]), self.o)
        n = self.rms_norm(x, self.norm)
        x = x + torch.linear(torch.silu(torch.linear(n, self.gate)) * torch.linear(n, self.up),
                             self.down)
    return torch.linear(self.rms_norm(x, self.norm), self.head)
)";

at::Tensor random_weight(at::IntArrayRef shape) { return at::randn(shape) * 0.1; }

Module decoder() {
  at::manual_seed(7);
  Module module("Decoder");
  const auto weight = [&](const char* name, at::IntArrayRef shape) {
    module.register_parameter(name, random_weight(shape), false);
  };
  weight("embedding", {kVocabulary, kWidth});
  weight("q", {kWidth, kWidth});
  weight("k", {kWidth / 2, kWidth});
  weight("v", {kWidth / 2, kWidth});
  weight("o", {kWidth, kWidth});
  weight("gate", {2 * kWidth, kWidth});
  weight("up", {2 * kWidth, kWidth});
  weight("down", {kWidth, 2 * kWidth});
  weight("norm", {kWidth});
  weight("head", {kVocabulary, kWidth});
  module.register_buffer("frequencies", at::pow(10000.0, -at::arange(0, 16, 2) / 16.0));
  module.define(kDecoder);
  module.eval();
  return module;
}

Module of_source(const std::string& source) {
  Module module("Small");
  module.register_parameter("weight", random_weight({8, 8}), false);
  module.define(source);
  module.eval();
  return module;
}

at::Tensor tokens(std::int64_t batch, std::int64_t count) {
  return at::randint(kVocabulary, {batch, count}, at::kLong);
}

ModuleReport report_of(const Module& module) {
  Result<ModuleReport> report = explain(module);
  EXPECT_TRUE(report.ok());
  return report.ok() ? report.value() : ModuleReport{};
}

// Optimises, and checks two forwards: the capture's and the program's.
ModuleReport expect_same(Module module, const std::vector<at::Tensor>& inputs) {
  const c10::InferenceMode inference;
  const std::vector<c10::IValue> given(inputs.begin(), inputs.end());
  const at::Tensor expected = module.forward(given).toTensor();
  const Status status = optimize(module);
  EXPECT_TRUE(status.ok()) << status.error().message;
  for (int i = 0; i < 2; ++i) {
    const at::Tensor got = module.forward(given).toTensor();
    EXPECT_EQ(got.sizes(), expected.sizes());
    EXPECT_TRUE(at::allclose(got, expected, 1e-4, 1e-5)) << got << expected;
  }
  return report_of(module);
}

TEST(TorchScript, LoadedDecoderRunsInOurCode) {
  const auto file = std::filesystem::temp_directory_path() / "tilewright_torchscript_test.pt";
  decoder().save(file.string());
  const Module loaded = torch::jit::load(file.string());
  std::filesystem::remove(file);
  const ModuleReport report = expect_same(loaded, {tokens(2, 9)});
  EXPECT_EQ(report.runs, 1u);
  EXPECT_EQ(report.captures, 1u);
  EXPECT_EQ(report.fallback_calls, 0u);
  EXPECT_GE(report.own_flops_share, 0.95);
  EXPECT_EQ(report.reason, "");
  for (const char* op : {"rms_norm", "rope", "attention", "gated_mlp_up"}) {
    EXPECT_NE(report.graph.find(std::string(" = ") + op + "("), std::string::npos) << report.graph;
  }
}

TEST(TorchScript, EachCombinationOfShapesIsAProgram) {
  Module reference = decoder(), module = decoder();
  ASSERT_TRUE(optimize(module).ok());
  const c10::InferenceMode inference;
  for (std::int64_t count : {1, 5, 9, 5, 1}) {
    const at::Tensor given = tokens(1, count);
    EXPECT_TRUE(at::allclose(module.forward({given}).toTensor(),
                             reference.forward({given}).toTensor(), 1e-4, 1e-5));
  }
  const ModuleReport report = report_of(module);
  EXPECT_EQ(report.programs, 3u);
  EXPECT_EQ(report.runs, 2u);
}

TEST(TorchScript, AnOpWithoutAWordStaysWithLibTorch) {
  const ModuleReport report =
      expect_same(of_source("def forward(self, x: Tensor) -> Tensor:\n"
                            "    return torch.linear(torch.cumsum(x, 1), self.weight)\n"),
                  {at::randn({3, 8})});
  EXPECT_EQ(report.fallback_calls, 1u);
  EXPECT_GT(report.own_flops_share, 0.5);
}

TEST(TorchScript, SmallModules) {
  const at::Tensor x = at::randn({3, 8});
  for (const char* expression :
       {"x.t() + 1", "x[1:, ::2] * 2.5", "x.select(1, 3) - x.sum([1])",
        "torch.where(x > 0.5, x, -x)", "x.masked_fill(x < 0, -1.0)",
        "torch.softmax(torch.matmul(x, self.weight), -1)", "2.0 - x / 3.0",
        "torch.cat(torch.chunk(x, 2, 1), 0)", "torch.gelu(x) + torch.tanh(x)",
        "torch.layer_norm(x, [8], self.weight[0], self.weight[1], 1e-06)",
        "x.mean([-1]) if x.size(0) > 2 else x.sum([-1])"}) {
    SCOPED_TRACE(expression);
    const std::string body = std::string("    return ") + expression + "\n";
    const ModuleReport report =
        expect_same(of_source("def forward(self, x: Tensor) -> Tensor:\n" + body), {x});
    EXPECT_EQ(report.reason, "");
    EXPECT_EQ(report.runs, 1u);
  }
}

TEST(TorchScript, ATupleStaysATuple) {
  Module module =
      of_source("def forward(self, x: Tensor, y: Tensor):\n    return (x + y, x * y)\n");
  ASSERT_TRUE(optimize(module).ok());
  const at::Tensor x = at::randn({2, 2}), y = at::randn({2, 2});
  for (int i = 0; i < 2; ++i) {
    const auto result = module.forward({x, y}).toTuple();
    EXPECT_TRUE(at::allclose(result->elements()[0].toTensor(), x + y));
    EXPECT_TRUE(at::allclose(result->elements()[1].toTensor(), x * y));
  }
}

// view(dtype) has the name and the shape of a reshape. TorchScript's parser does not take it; a
// trace has it.
TEST(TorchScript, AViewAsAnotherTypeIsNoReshape) {
  const at::Tensor x = at::randn({3, 8}), bits = x.view(at::kInt), row = x.view({24});
  libtorch::GraphWriter writer;
  writer.add_input(x);
  EXPECT_FALSE(libtorch::write_node(writer, "aten::view", {x, at::kInt}, bits));
  EXPECT_FALSE(writer.knows(bits));
  EXPECT_TRUE(libtorch::write_node(writer, "aten::view", {x, std::vector<std::int64_t>{24}}, row));
  EXPECT_TRUE(writer.knows(row));
}

TEST(TorchScript, ARefusedCallRefusesItsOwnShapesOnly) {
  Module module =
      of_source("def forward(self, x: Tensor, y: Tensor) -> Tensor:\n    return x + y\n");
  ASSERT_TRUE(optimize(module).ok());
  const at::Tensor x = at::randn({2, 3}), y = at::randn({2, 3}), wide = x.to(at::kDouble);
  EXPECT_TRUE(at::allclose(module.forward({wide, wide}).toTensor(), wide + wide));
  EXPECT_NE(report_of(module).reason, "");
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(at::allclose(module.forward({x, x}).toTensor(), x + x));
    EXPECT_TRUE(at::allclose(module.forward({x, y}).toTensor(), x + y));
  }
  EXPECT_EQ(report_of(module).runs, 3u);
}

// They run through LibTorch, and the reason is told.
TEST(TorchScript, WhatCannotBeCapturedStaysRight) {
  const struct {
    const char *expression, *reason;
  } cases[] = {
      {"x * 2 if bool(x.sum() > 0) else x", "reads values"},
      {"x.clone().add_(1)", "writes"},
      {"x + 0 * torch.rand_like(x)", "random"},
      {"torch.topk(x, 2)[0]", "several results"},
      {"x", "is an input"},
  };
  for (const auto& [expression, reason] : cases) {
    SCOPED_TRACE(expression);
    const std::string body = std::string("    return ") + expression + "\n";
    const ModuleReport report = expect_same(
        of_source("def forward(self, x: Tensor) -> Tensor:\n" + body), {at::randn({3, 8})});
    EXPECT_NE(report.reason.find(reason), std::string::npos) << report.reason;
    EXPECT_EQ(report.runs, 0u);
  }
}

TEST(TorchScript, RefusalsLeaveTheModuleAsItWas) {
  Module number = of_source("def forward(self, x: Tensor, n: int) -> Tensor:\n    return x * n\n");
  Status status = optimize(number);
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find("forward's n is a int"), std::string::npos);
  EXPECT_EQ(number.forward({at::ones({1}), 3}).toTensor().item().toDouble(), 3.0);

  Module training = of_source("def forward(self, x: Tensor) -> Tensor:\n    return x + 1\n");
  training.register_attribute("training", c10::BoolType::get(), true);
  status = optimize(training);
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find("eval()"), std::string::npos);
  EXPECT_FALSE(explain(training).ok());
}

}  // namespace
}  // namespace tilewright
