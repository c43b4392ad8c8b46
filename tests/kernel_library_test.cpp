// KernelLibrary: one kernel per key, emitted once, found in the cache by a second library, checked
// when asked for.
#include "ops/kernel_library.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "jit/vir/builder.h"

namespace tilewright::ops {
namespace {

using jit::vir::Builder;
using jit::vir::Element;

// args: x, y; y = x + constant.
jit::vir::Function add_constant(float constant) {
  Builder b("add_constant", 8, 2);
  auto x = b.arg(0), y = b.arg(1);
  b.store(Element::f32, b.at(y), b.vadd(b.load(Element::f32, b.at(x)), b.splat(constant)));
  return std::move(b).finish();
}

float run(const Kernel& kernel, float value) {
  float x[8] = {value}, y[8] = {};
  const std::int64_t args[] = {reinterpret_cast<std::int64_t>(x),
                               reinterpret_cast<std::int64_t>(y)};
  kernel.function(args);
  return y[0];
}

class Libraries : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::temp_directory_path() /
                 ("tilewright_kernel_library_" + std::to_string(::getpid()));
    std::filesystem::remove_all(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::unique_ptr<KernelLibrary> library(bool check = false) {
    auto store = std::make_shared<cache::Store>(
        cache::Store::open(directory_.string(), cache::Mode::read_write, 0));
    return std::make_unique<KernelLibrary>(Target::host(), store, check);
  }

  std::filesystem::path directory_;
};

TEST_F(Libraries, EmitOnceThenLoad) {
  auto first = library();
  const Kernel* one = first->request("add 1", [] { return add_constant(1); });
  const Kernel* two = first->request("add 2", [] { return add_constant(2); });
  EXPECT_EQ(first->request("add 1", [] { return add_constant(1); }), one);
  EXPECT_EQ(one->function, nullptr);
  ASSERT_TRUE(first->flush().ok());
  EXPECT_EQ(run(*one, 5), 6);
  EXPECT_EQ(run(*two, 5), 7);
  EXPECT_EQ(first->counters().emitted, 2u);
  EXPECT_EQ(first->counters().loaded, 0u);

  auto second = library();
  const Kernel* again = second->request("add 1", []() -> jit::vir::Function {
    ADD_FAILURE() << "built although the cache has it";
    return add_constant(1);
  });
  ASSERT_TRUE(second->flush().ok());
  EXPECT_EQ(second->counters().emitted, 0u);
  EXPECT_EQ(second->counters().loaded, 1u);
  EXPECT_TRUE(again->loaded);
  EXPECT_EQ(run(*again, 5), 6);
}

TEST_F(Libraries, CheckFindsCodeThatTheGeneratorWouldNotEmit) {
  auto first = library();
  first->request("add", [] { return add_constant(1); });
  ASSERT_TRUE(first->flush().ok());
  // The same key now stands for other code, as if the generator had changed without its hash.
  auto checked = library(true);
  const Kernel* kernel = checked->request("add", [] { return add_constant(3); });
  ASSERT_TRUE(checked->flush().ok());
  EXPECT_EQ(run(*kernel, 5), 8);
  EXPECT_EQ(checked->counters().emitted, 1u);
}

TEST_F(Libraries, AKernelThatCannotBeEmittedIsAnErrorAndTheOthersAreThere) {
  auto first = library();
  const Kernel* good = first->request("good", [] { return add_constant(1); });
  const Kernel* bad = first->request("bad", [] {
    jit::vir::Function function = add_constant(1);
    function.code.pop_back();
    function.code.back().src[0].id = 77;  // a register that was never written
    return function;
  });
  const Status status = first->flush();
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(run(*good, 1), 2);
  EXPECT_EQ(bad->function, nullptr);
}

}  // namespace
}  // namespace tilewright::ops
