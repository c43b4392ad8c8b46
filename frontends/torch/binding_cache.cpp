// Directories and packs for Python. See binding_cache.h. Tested by
// tests/python/test_cache_commands.py.
#include "frontends/torch/binding_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <optional>
#include <system_error>

#include "cache/pack.h"
#include "cache/store.h"
#include "frontends/torch/bindings.h"
#include "frontends/torch/core_error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

constexpr IsaMask kAnyCpu = ~IsaMask{0};

nb::bytes python_bytes(const std::vector<std::byte>& bytes) {
  return nb::bytes(bytes.data(), bytes.size());
}

// A directory, or anything else: a pack.
bool is_directory(const std::string& place) {
  std::error_code unreadable;
  return std::filesystem::is_directory(place, unreadable);
}

cache::Store directory_store(const std::string& directory, std::string_view generator,
                             cache::Mode mode = cache::Mode::read_only) {
  cache::Store store = cache::Store::open(directory, mode, 0, generator);
  if (!store.problem().empty()) throw CoreError(store.problem());
  return store;
}

nb::dict row_of(const std::string& id, const std::string& generator, const std::string& key,
                const std::string& name, IsaMask required_isa, std::size_t code_bytes) {
  nb::dict row;
  row["id"] = id;
  row["name"] = name;
  row["key"] = key;
  row["isa"] = isa_mask_name(required_isa);
  row["code_bytes"] = code_bytes;
  row["generator"] = generator;
  row["current"] = generator == cache::generator_hash();
  return row;
}

// Every entry of a directory or a pack, verified; `problem` says why one would not be used.
nb::list cache_entries(const std::string& place) {
  nb::list result;
  if (!is_directory(place)) {
    const cache::Pack pack = value_or_throw(cache::open_pack(place));
    for (std::size_t i = 0; i < pack.size(); ++i) {
      const cache::Entry entry = pack.entry(i);
      nb::dict row = row_of(pack.key(i), pack.generator(), entry.key_text, entry.name,
                            entry.required_isa, entry.code.size());
      row["kind"] = cache::is_plan(entry.key_text) ? "plan" : "kernel";
      row["file"] = place;
      row["bytes"] = entry.key_text.size() + entry.name.size() + entry.recipe.packed().size() +
                     entry.code.size();
      row["problem"] = "";
      result.append(row);
    }
    return result;
  }
  for (const cache::Listing& entry : directory_store(place, cache::generator_hash()).list()) {
    nb::dict row = row_of(std::filesystem::path(entry.file).stem().string(), entry.generator,
                          entry.key_text, entry.name, entry.required_isa, entry.code_bytes);
    row["kind"] = entry.plan ? "plan" : "kernel";
    row["file"] = entry.file;
    row["bytes"] = entry.bytes;
    row["modified"] = entry.modified;
    row["problem"] = entry.problem;
    result.append(row);
  }
  return result;
}

// Code and recipe of one row of cache_entries.
nb::dict cache_entry(const std::string& place, const std::string& generator,
                     const std::string& key) {
  std::optional<cache::Entry> entry = is_directory(place)
                                          ? directory_store(place, generator).load(key, kAnyCpu)
                                          : value_or_throw(cache::open_pack(place)).find(key);
  if (!entry) throw CoreError("this entry is gone");
  nb::dict result;
  result["code"] = python_bytes(entry->code);
  result["recipe"] = value_or_throw(entry->recipe.text());
  return result;
}

// A directory or a pack, of this build.
struct Place {
  explicit Place(const std::string& name) {
    if (is_directory(name)) {
      directory.emplace(directory_store(name, cache::generator_hash()));
    } else {
      pack.emplace(value_or_throw(cache::open_pack(name)));
    }
  }

  std::optional<cache::Entry> find(const std::string& key) {
    return directory ? directory->load(key, kAnyCpu) : pack->find(key);
  }
  // Those that are good and of this build.
  std::vector<std::string> keys() const {
    std::vector<std::string> keys;
    if (pack && pack->generator() == cache::generator_hash()) {
      for (std::size_t i = 0; i < pack->size(); ++i) keys.push_back(pack->entry(i).key_text);
    }
    if (directory) {
      for (const cache::Listing& entry : directory->list()) {
        if (entry.problem.empty() && entry.current) keys.push_back(entry.key_text);
      }
    }
    return keys;
  }

  std::optional<cache::Store> directory;
  std::optional<cache::Pack> pack;
};

// The bytes of a pack with the entries of this build that the places have: those with these key
// texts, or all. CoreError: one is nowhere.
nb::bytes encode_pack(const std::vector<std::string>& places,
                      const std::optional<std::vector<std::string>>& keys) {
  std::vector<Place> opened;
  for (const std::string& place : places) opened.emplace_back(place);
  std::vector<std::string> wanted = keys.value_or(std::vector<std::string>());
  for (const Place& place : opened) {
    if (!keys) std::ranges::copy(place.keys(), std::back_inserter(wanted));
  }
  std::vector<cache::Entry> entries;
  for (const std::string& key : wanted) {
    std::optional<cache::Entry> entry;
    for (Place& place : opened) {
      if (!entry) entry = place.find(key);
    }
    if (!entry) throw CoreError(fmt::format("not in the cache: {}", key.substr(0, key.find('\n'))));
    entries.push_back(std::move(*entry));
  }
  return python_bytes(value_or_throw(cache::encode_pack(entries, cache::generator_hash())));
}

// Pack to directory. Returns how many entries it has and how many of them were written now.
nb::dict import_pack(const std::string& name, const std::string& directory) {
  const cache::Pack pack = value_or_throw(cache::open_pack(name));
  cache::Store store = directory_store(directory, pack.generator(), cache::Mode::read_write);
  for (std::size_t i = 0; i < pack.size(); ++i) {
    const cache::Entry entry = pack.entry(i);
    if (!store.load(entry.key_text, kAnyCpu)) store.save(entry);
  }
  nb::dict result;
  result["entries"] = pack.size();
  result["written"] = store.counters().writes;
  result["failed"] = store.counters().write_failures;
  result["current"] = pack.generator() == cache::generator_hash();
  return result;
}

// Removes the oldest entries of a directory beyond a size, and what killed writers left.
std::uint64_t prune(const std::string& directory, std::uint64_t max_bytes) {
  return directory_store(directory, cache::generator_hash(), cache::Mode::read_write)
      .prune(max_bytes);
}

}  // namespace

nb::dict cache_state(const ops::Engine& engine) {
  const cache::Counters counted = engine.store().counters();
  nb::dict result;
  result["directory"] = engine.store().directory();
  result["problem"] = engine.store().problem();
  result["writable"] = engine.store().mode() == cache::Mode::read_write;
  nb::list packs;
  for (const ops::ConfiguredPack& item : ops::configured_packs()) {
    nb::dict row;
    row["name"] = item.name;
    row["kernels"] = item.pack == nullptr ? 0 : item.pack->size() - item.pack->plans();
    row["plans"] = item.pack == nullptr ? 0 : item.pack->plans();
    row["problem"] = item.problem;
    packs.append(row);
  }
  result["packs"] = packs;
  result["hits"] = counted.hits;
  result["pack_hits"] = counted.pack_hits;
  result["misses"] = counted.misses;
  result["writes"] = counted.writes;
  result["write_failures"] = counted.write_failures;
  result["rejects"] = counted.rejects;
  result["write_problems"] = counted.write_problems;
  return result;
}

void bind_cache_files(nb::module_& module) {
  module.def("cache_entries", &cache_entries, "place"_a);
  module.def("cache_entry", &cache_entry, "place"_a, "generator"_a, "key"_a);
  module.def("encode_pack", &encode_pack, "places"_a, "keys"_a = nb::none());
  module.def("import_pack", &import_pack, "pack"_a, "directory"_a);
  module.def("prune", &prune, "directory"_a, "max_bytes"_a);
}

}  // namespace tilewright
