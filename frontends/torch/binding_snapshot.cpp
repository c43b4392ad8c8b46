// Snapshot for Python: which of many dicts, lists and sets hold other objects than they did. A
// model has some thousand of them, and every call asks: by identity, and by version where dicts
// have one.
//
// Not thread-safe: the interpreter lock and the Python side's own are enough. Tested by
// tests/python/test_module_state.py.
#include "frontends/torch/bindings.h"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

// PEP 509: a dict gets a number that no dict ever had whenever it changes. Public to extensions for
// one version of Python until 3.11; later it is deprecated, and shared with watchers.
#if !defined(Py_LIMITED_API) && PY_VERSION_HEX < 0x030C0000
std::uint64_t version_of(PyObject* object) {
  return PyDict_Check(object) ? reinterpret_cast<PyDictObject*>(object)->ma_version_tag : 0;
}
#else
std::uint64_t version_of(PyObject*) { return 0; }
#endif

// Of names only, because comparing anything else may run code of anybody's.
bool are_equal_sets_of_names(PyObject* now, PyObject* then) {
  if (PySet_Size(now) != PySet_Size(then)) return false;
  if (PySet_Size(now) == 0) return true;
  for (const nb::handle item : nb::borrow<nb::iterable>(now)) {
    if (!PyUnicode_CheckExact(item.ptr()) || PySet_Contains(then, item.ptr()) != 1) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

bool hold_the_same(PyObject* now, PyObject* then) {
  if (PyDict_Check(now)) {
    if (PyDict_Size(now) != PyDict_Size(then)) return false;
    Py_ssize_t now_at = 0, then_at = 0;
    PyObject *now_key, *then_key, *now_value, *then_value;
    while (PyDict_Next(now, &now_at, &now_key, &now_value)) {
      if (!PyDict_Next(then, &then_at, &then_key, &then_value) || now_key != then_key ||
          now_value != then_value) {
        return false;
      }
    }
    return true;
  }
  if (PyAnySet_Check(now)) return are_equal_sets_of_names(now, then);
  if (!PyList_Check(now)) return false;
  const Py_ssize_t size = PyList_Size(now);
  if (size != PyList_Size(then)) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (PyList_GetItem(now, i) != PyList_GetItem(then, i)) return false;
  }
  return true;
}

class Snapshot {
 public:
  // then: a copy of each of `now`, which the caller may replace.
  Snapshot(nb::list now, nb::list then) : now_(std::move(now)), then_(std::move(then)) {
    for (nb::handle object : now_) watched_.push_back({object.ptr(), 0});
  }

  // Where an object may differ from its copy: it does not hold the very same objects in order, or
  // is a set of other names.
  std::vector<std::size_t> moved() {
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < watched_.size(); ++i) {
      auto& [object, version] = watched_[i];
      const std::uint64_t current = version_of(object);
      if (current != 0 && current == version) continue;
      if (hold_the_same(object, PyList_GetItem(then_.ptr(), static_cast<Py_ssize_t>(i)))) {
        version = current;
      } else {
        found.push_back(i);
      }
    }
    return found;
  }

  // A model's dicts hold its decoder, which holds this: the collector must see through it.
  static int traverse(PyObject* self, visitproc visit, void* arg) {  // Py_VISIT wants these names
    Py_VISIT(Py_TYPE(self));
    if (nb::inst_ready(self)) {
      const Snapshot* snapshot = nb::inst_ptr<Snapshot>(self);
      Py_VISIT(snapshot->now_.ptr());
      Py_VISIT(snapshot->then_.ptr());
    }
    return 0;
  }
  static int clear(PyObject* self) {
    Snapshot* snapshot = nb::inst_ptr<Snapshot>(self);
    snapshot->watched_.clear();
    snapshot->now_.reset();
    snapshot->then_.reset();
    return 0;
  }

 private:
  struct Watched {
    PyObject* object;       // of `now_`
    std::uint64_t version;  // at which it held what its copy holds; 0: unknown
  };
  nb::list now_, then_;
  std::vector<Watched> watched_;
};

PyType_Slot collector_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(&Snapshot::traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(&Snapshot::clear)},
    {0, nullptr},
};

}  // namespace

void bind_snapshot(nb::module_& module) {
  nb::class_<Snapshot>(module, "Snapshot", nb::type_slots(collector_slots),
                       "Dicts, lists and sets beside copies of them.")
      .def(nb::init<nb::list, nb::list>(), "now"_a, "then"_a)
      .def("moved", &Snapshot::moved);
}

}  // namespace tilewright
