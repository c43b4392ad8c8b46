// Specialisation is real: K, N, rows, the epilogue, element types and the ISA each change a
// kernel's code bytes, while emission of the same specification gives the same bytes.
#include <gtest/gtest.h>

#include "jit/emit.h"
#include "ops/attention/attention_kernel.h"
#include "ops/gemm/linear_kernel.h"

namespace tilewright::ops {
namespace {

std::vector<std::byte> code(const LinearKernel& spec, const char* rung = "avx2") {
  auto emitted = jit::emit(build(spec), *Target::for_rung(rung));
  EXPECT_TRUE(emitted.ok()) << (emitted.ok() ? "" : emitted.error().message);
  return emitted.ok() ? emitted->bytes : std::vector<std::byte>();
}

LinearKernel base() {
  LinearKernel spec;
  spec.n = 576;
  spec.k = 576;
  return spec;
}

TEST(Specialisation, SameSpecificationSameBytes) { EXPECT_EQ(code(base()), code(base())); }

TEST(Specialisation, EveryPartOfALinearKernelShowsInItsBytesAndItsKey) {
  std::vector<std::pair<const char*, LinearKernel>> variants;
  auto vary = [&](const char* what, auto change) {
    LinearKernel spec = base();
    change(spec);
    variants.emplace_back(what, spec);
  };
  vary("k", [](LinearKernel& spec) { spec.k = 1536; });
  vary("n with a tail", [](LinearKernel& spec) { spec.n = 577; });
  vary("rows", [](LinearKernel& spec) { spec.rows = 6; });
  vary("weight type", [](LinearKernel& spec) { spec.weight = graph::DataType::bf16; });
  vary("output type", [](LinearKernel& spec) { spec.output = graph::DataType::bf16; });
  vary("bias", [](LinearKernel& spec) { spec.epilogue.bias = true; });
  vary("residual", [](LinearKernel& spec) { spec.epilogue.residual = true; });
  vary("prefetch", [](LinearKernel& spec) { spec.prefetch = 256; });
  vary("prefetch in two steps", [](LinearKernel& spec) { spec.prefetch_near = 256; });
  vary("streams", [](LinearKernel& spec) { spec.streams = 2; });
  vary("many blocks", [](LinearKernel& spec) { spec.many_blocks = true; });
  vary("activation", [](LinearKernel& spec) { spec.epilogue.activation = "silu"; });
  vary("gated", [](LinearKernel& spec) {
    spec.epilogue.activation = "silu";
    spec.epilogue.gated = true;
  });
  for (const auto& [what, spec] : variants) {
    EXPECT_NE(code(spec), code(base())) << what;
    EXPECT_NE(print(spec), print(base())) << what;
  }
}

TEST(Specialisation, TheIsaChangesTheBytes) {
  LinearKernel wide = base();
  wide.lanes = 16;
  EXPECT_NE(code(wide, "avx512"), code(base(), "avx2"));
  EXPECT_NE(print(wide), print(base()));
  EXPECT_FALSE(jit::emit(build(wide), *Target::for_rung("avx2")).ok());
}

TEST(Specialisation, HeadDimAndGroupShowInAnAttentionKernel) {
  AttentionKernel spec, other;
  other.group = 3;
  const Target target = *Target::for_rung("avx2");
  EXPECT_NE(jit::emit(build(spec), target)->bytes, jit::emit(build(other), target)->bytes);
  other = spec;
  other.head_dim = 128;
  EXPECT_NE(jit::emit(build(spec), target)->bytes, jit::emit(build(other), target)->bytes);
}

}  // namespace
}  // namespace tilewright::ops
