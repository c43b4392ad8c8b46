// The oneDNN library: dlopen, the function table, the CPU engine and its stream.
//
// Tested by onednn_test.
#include "ops/onednn_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <string>

namespace tilewright::ops::onednn {
namespace {

template <class Function>
bool find(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

}  // namespace

Result<Library> open_library(std::string_view path) {
  const std::string name = path.empty() ? "libdnnl.so.3" : std::string(path);
  void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return Error{fmt::format("oneDNN could not be opened: {}", dlerror())};
  Library library;
#define ONEDNN_FIND(function, parameters)                         \
  if (!find(handle, "dnnl_" #function, library.function)) {       \
    return Error{fmt::format("{} has no dnnl_" #function, name)}; \
  }
  ONEDNN_FUNCTIONS(ONEDNN_FIND)
#undef ONEDNN_FIND
  if (!find(handle, "dnnl_version", library.version)) {
    return Error{fmt::format("{} has no dnnl_version", name)};
  }
  if (const Version* version = library.version(); version->major != 3) {
    return Error{fmt::format("{} is oneDNN {}.{}, not 3.x", name, version->major, version->minor)};
  }
  if (library.engine_create(&library.engine, kCpu, 0) != 0 ||
      library.stream_create(&library.stream, library.engine, kDefaultStream) != 0) {
    return Error{fmt::format("{} has no CPU engine", name)};
  }
  return library;
}

Result<Library::Owned> Library::make_description(std::span<const std::int64_t> dims,
                                                 std::span<const std::int64_t> strides,
                                                 DataType type) const {
  Dims sizes{}, steps{};
  if (dims.size() > sizes.size()) return Error{fmt::format("oneDNN: {} dimensions", dims.size())};
  std::copy(dims.begin(), dims.end(), sizes.begin());
  std::copy(strides.begin(), strides.end(), steps.begin());
  Object made = nullptr;
  const int status = memory_desc_create_with_strides(&made, static_cast<int>(dims.size()),
                                                     sizes.data(), type, steps.data());
  if (status != 0) return Error{fmt::format("oneDNN: memory description, status {}", status)};
  return Owned(made, memory_desc_destroy);
}

}  // namespace tilewright::ops::onednn
