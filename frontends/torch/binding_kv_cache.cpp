// Keys and values for Python: a layer's own blocks, and views of pages that somebody else owns.
//
// As thread-safe as ops::KvCache. Tested by tests/python/test_generate.py, test_generate_batch.py.
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "frontends/torch/bindings.h"
#include "frontends/torch/core_objects.h"
#include "ops/kv_cache.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

// The keys and values of a model's layers, in pages of memory that somebody else owns.
class PagedCaches {
 public:
  // layers: addresses of the first token of keys and values.
  PagedCaches(const std::vector<std::pair<Address, Address>>& layers, std::int64_t page_tokens,
              std::int64_t memory_tokens, std::int64_t kv_heads, std::int64_t head_dim,
              const std::string& dtype)
      : page_tokens_(page_tokens), memory_tokens_(memory_tokens) {
    for (const auto& [keys, values] : layers) {
      const ops::KvCache::Pages pages{static_cast<char*>(pointer(keys)),
                                      static_cast<char*>(pointer(values)), page_tokens};
      layers_.push_back(Cache::make(pages, kv_heads, head_dim, data_type(dtype)));
    }
  }

  // sequences: rows, tokens before, and where the pages begin, in tokens.
  using Sequence = std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>>;
  void begin_step(const std::vector<Sequence>& sequences) {
    std::vector<ops::RaggedRows::Sequence> given;
    for (const auto& [rows, length, pages] : sequences) given.push_back({0, rows, length, pages});
    const auto rows =
        value_or_throw(ops::RaggedRows::make(std::move(given), page_tokens_, memory_tokens_));
    for (const auto& layer : layers_) layer->begin_step(rows);
  }

  const std::vector<std::shared_ptr<Cache>>& layers() const { return layers_; }

 private:
  std::int64_t page_tokens_, memory_tokens_;
  std::vector<std::shared_ptr<Cache>> layers_;
};

}  // namespace

void bind_kv_cache(nb::module_& module) {
  nb::class_<Cache>(module, "KvCache", "Keys and values of one layer, in blocks.")
      .def(nb::new_([](std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim,
                       const std::string& dtype) {
        return Cache::make(batch, kv_heads, head_dim, data_type(dtype));
      }))
      .def_ro("handle", &Cache::handle)
      .def_prop_ro("batch", [](const Cache& self) { return self.batch(); })
      .def_prop_ro("kv_heads", [](const Cache& self) { return self.kv_heads(); })
      .def_prop_ro("head_dim", [](const Cache& self) { return self.head_dim(); })
      .def_prop_ro("length", [](const Cache& self) { return self.length(); })
      .def_prop_ro("bytes", [](const Cache& self) { return self.bytes(); })
      .def("set_first_keys",
           [](Cache& self, const std::vector<std::int64_t>& keys) {
             check(self.set_first_keys(keys));
           })
      .def("truncate", [](Cache& self, std::int64_t length) { self.truncate(length); })
      .def_prop_ro("dtype", [](const Cache& self) { return std::string(name(self.dtype())); })
      .def("read",
           [](const Cache& self, const std::string& dtype, Address keys, Address values) {
             self.read(self.length(), data_type(dtype), pointer(keys), pointer(values));
           })
      .def("append",
           [](Cache& self, std::int64_t tokens, const std::string& dtype, Address keys,
              Address values) {
             check(self.append(tokens, data_type(dtype), pointer(keys), pointer(values)));
           })
      .def("write",
           [](Cache& self, std::int64_t tokens, const std::string& dtype, Address keys,
              Address values) {
             check(self.write(tokens, data_type(dtype), pointer(keys), pointer(values)));
           })
      .def("reorder", [](Cache& self, const std::vector<std::int64_t>& indices) {
        check(self.reorder(indices));
      });
  nb::class_<PagedCaches>(module, "PagedCaches", "Of a model's layers, in pages of another's.")
      .def(nb::init<const std::vector<std::pair<Address, Address>>&, std::int64_t, std::int64_t,
                    std::int64_t, std::int64_t, const std::string&>(),
           "layers"_a, "page_tokens"_a, "memory_tokens"_a, "kv_heads"_a, "head_dim"_a, "dtype"_a)
      .def_prop_ro("layers", &PagedCaches::layers)
      .def("begin_step", &PagedCaches::begin_step);
}

}  // namespace tilewright
