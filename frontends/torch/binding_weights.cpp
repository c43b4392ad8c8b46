// Weights for Python: the store of packed ones, what tells that a tensor is no longer what was
// packed, and pages that go.
//
// Tested by tests/python/test_packed.py, test_optimize.py.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "frontends/torch/bindings.h"
#include "frontends/torch/core_objects.h"
#include "ops/clean_pages.h"
#include "ops/engine.h"
#include "ops/weights.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

// Samples of some memory, to notice writes that leave no other trace. A sample is one word of every
// 1/16th of a range: reading all of a model would cost a tenth of a second for each prefill.
class Fingerprint {
 public:
  explicit Fingerprint(std::vector<std::pair<Address, std::int64_t>> ranges)
      : ranges_(std::move(ranges)) {}

  std::uint64_t value() const {
    constexpr std::int64_t samples = 16;
    std::uint64_t hash = 14695981039346656037ull;  // FNV-1a, by words
    for (const auto& [address, bytes] : ranges_) {
      const std::int64_t words = bytes / 8;
      for (std::int64_t i = 0; i < std::min(samples, words); ++i) {
        std::uint64_t word;
        const std::int64_t index = words <= samples ? i : i * (words - 1) / (samples - 1);
        std::memcpy(&word, reinterpret_cast<const char*>(address) + 8 * index, 8);
        hash = (hash ^ word) * 1099511628211ull;
      }
    }
    return hash;
  }

 private:
  std::vector<std::pair<Address, std::int64_t>> ranges_;
};

// Where tensors are and how often torch counted a write to each. They are held weakly; no torch
// header here, so Python's own attributes tell.
class TensorMarks {
 public:
  // data_ptr: torch.Tensor's method. Raises what it or _version raises.
  TensorMarks(const nb::list& tensors, nb::object data_ptr) : data_ptr_(std::move(data_ptr)) {
    for (const nb::handle tensor : tensors) {
      marks_.push_back({nb::weakref(tensor), place_of(tensor), version_of(tensor)});
    }
  }

  // Whether each is there still, at its place, and nobody wrote to it in a way that torch counts.
  bool are_same() const {
    try {
      for (const Mark& mark : marks_) {
        const nb::object tensor = mark.tensor();
        if (tensor.is_none() || place_of(tensor) != mark.place ||
            version_of(tensor) != mark.version) {
          return false;
        }
      }
    } catch (nb::python_error&) {
      return false;  // it became one that cannot be asked: of inference mode, say
    }
    return true;
  }

 private:
  struct Mark {
    nb::weakref tensor;
    std::uint64_t place, version;
  };

  std::uint64_t place_of(nb::handle tensor) const {
    return nb::cast<std::uint64_t>(data_ptr_(tensor));
  }
  std::uint64_t version_of(nb::handle tensor) const {
    return nb::cast<std::uint64_t>(nb::getattr(tensor, version_));
  }

  nb::object data_ptr_;
  nb::object version_ = nb::steal(PyUnicode_InternFromString("_version"));
  std::vector<Mark> marks_;
};

// sources: addresses and bytes.
void hash_ahead(ops::WeightStore& store, const ops::Engine& engine,
                const std::vector<std::pair<Address, std::size_t>>& sources) {
  std::vector<ops::SourceHashes::Block> blocks;
  for (const auto& [address, bytes] : sources) {
    blocks.emplace_back(static_cast<const std::byte*>(pointer(address)), bytes);
  }
  store.hash_ahead(std::move(blocks), *engine.kept_weights());
}

// Drops pages beside Python; the owners of the memory live until that is done.
class PageDropper {
 public:
  // memory: addresses, bytes, and whether it is freed next.
  void drop(const std::vector<std::tuple<Address, std::size_t, bool>>& memory, nb::object owners) {
    wait();
    std::vector<ops::UnneededMemory> unneeded;
    for (const auto& [address, bytes, is_free] : memory) {
      unneeded.push_back({{static_cast<const std::byte*>(pointer(address)), bytes}, is_free});
    }
    owners_ = std::move(owners);
    dropper_.drop(std::move(unneeded));
  }
  void wait() {
    {
      const nb::gil_scoped_release unlocked;
      dropper_.wait();
    }
    owners_.reset();
  }

 private:
  nb::object owners_;
  ops::PageDropper dropper_;  // goes first
};

}  // namespace

void bind_weights(nb::module_& module) {
  nb::class_<Fingerprint>(module, "Fingerprint", "A hash of samples of memory.")
      .def(nb::init<std::vector<std::pair<Address, std::int64_t>>>())
      .def("value", &Fingerprint::value);
  nb::class_<TensorMarks>(module, "TensorMarks", "Addresses and versions of tensors.")
      .def(nb::init<const nb::list&, nb::object>(), "tensors"_a, "data_ptr"_a)
      .def("are_same", &TensorMarks::are_same);
  nb::class_<ops::WeightStore>(module, "WeightStore", nb::is_weak_referenceable(),
                               "Packed weights that programs share.")
      .def(nb::init<>())
      .def(
          "__init__",
          [](ops::WeightStore* self, const std::string& fits, bool twelve_bits) {
            new (self) ops::WeightStore(ops::AssumedValues{data_type(fits), twelve_bits});
          },
          "fits"_a, "twelve_bits"_a)
      .def("forget", [](ops::WeightStore& self, Address source) { self.forget(pointer(source)); })
      .def("release",
           [](ops::WeightStore& self, Address source) {
             return reinterpret_cast<Address>(self.release(pointer(source)));
           })
      .def("unpack",
           [](const ops::WeightStore& self, Address token, Address to) {
             nb::gil_scoped_release unlocked;
             check(self.unpack(pointer(token), pointer(to)));
           })
      .def("reserve", &ops::WeightStore::reserve, "bytes"_a, "ask_ahead"_a)
      .def("hash_ahead", &hash_ahead)
      .def("settle", &ops::WeightStore::settle, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("bytes", &ops::WeightStore::bytes);
  nb::class_<PageDropper>(module, "PageDropper")
      .def(nb::init<>())
      .def("drop", &PageDropper::drop, "memory"_a, "owners"_a)
      .def("wait", &PageDropper::wait);
}

}  // namespace tilewright
