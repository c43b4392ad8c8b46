// KernelLibrary: see kernel_library.h. Tested by kernel_library_test.
#include "ops/kernel_library.h"

#include <fmt/format.h>

#include <chrono>

#include "jit/base/log.h"

namespace tilewright::ops {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string name_of(const std::string& specification) {
  return "tilewright_" + specification.substr(0, specification.find(' '));
}

Result<cache::Entry> emit_entry(const std::string& key, const std::string& name,
                                const jit::vir::Function& function, const Target& target) {
  Result<jit::CodeObject> code = jit::emit(function, target);
  if (!code) return Error{fmt::format("{}: {}", name, code.error().message)};
  return cache::Entry{key, name, code->required_isa, std::move(code->bytes),
                      cache::Recipe(jit::vir::print(function))};
}

}  // namespace

KernelLibrary::KernelLibrary(Target target, std::shared_ptr<cache::Store> store, bool check_cache)
    : target_(std::move(target)), store_(std::move(store)), check_cache_(check_cache) {}

const Kernel* KernelLibrary::request(const std::string& specification,
                                     std::function<jit::vir::Function()> build) {
  std::string key = fmt::format("{}\nisa {}\n", specification, isa_mask_name(target_.isa));
  std::lock_guard lock(mutex_);
  const std::thread::id requester = std::this_thread::get_id();
  if (auto found = kernels_.find(key); found != kernels_.end()) {
    for (Pending& item : pending_) {
      if (item.kernel == found->second.get()) item.requesters.push_back(requester);
    }
    return found->second.get();
  }
  auto kernel = std::make_unique<Kernel>();
  kernel->key = key;
  kernel->name = name_of(specification);
  Kernel* stable = kernel.get();
  kernels_.emplace(std::move(key), std::move(kernel));
  order_.push_back(stable);
  pending_.push_back({stable, std::move(build), {requester}});
  return stable;
}

Status KernelLibrary::flush() {
  std::vector<std::string> warnings;
  std::string problem;
  {
    const std::lock_guard lock(mutex_);
    flush_pending(warnings);
    if (const auto told = problems_.find(std::this_thread::get_id()); told != problems_.end()) {
      problem = std::move(told->second);
      problems_.erase(told);
    }
  }
  // A sink may take Python's lock, whose holder may be waiting for ours.
  for (const std::string& warning : warnings) log_warning(warning);
  return problem.empty() ? Status() : Status(Error{problem});
}

void KernelLibrary::flush_pending(std::vector<std::string>& warnings) {
  std::vector<Pending> pending = std::exchange(pending_, {});
  std::vector<cache::Entry> entries;
  std::vector<const Pending*> ready;
  for (const Pending& item : pending) {
    auto start = std::chrono::steady_clock::now();
    std::optional<cache::Entry> entry = store_->load(item.kernel->key, target_.isa);
    item.kernel->loaded = entry.has_value();
    if (entry) {
      counters_.loaded += 1;
      counters_.load_seconds += seconds_since(start);
    }
    if (!entry && admission_ && !admission_(*item.kernel)) continue;
    if (!entry || check_cache_) {
      start = std::chrono::steady_clock::now();
      Result<cache::Entry> fresh =
          emit_entry(item.kernel->key, item.kernel->name, item.build(), target_);
      if (!fresh) {
        abandon(item, fresh.error().message);
        continue;
      }
      if (entry && entry->code != fresh->code) {
        warnings.push_back(fmt::format(
            "cache check: {} differs from what this generator emits; using the fresh code",
            item.kernel->name));
        entry.reset();
        store_->remove(item.kernel->key);
        counters_.loaded -= 1;
        counters_.check_failures += 1;
      }
      if (!entry) {
        counters_.emitted += 1;
        counters_.emit_seconds += seconds_since(start);
        item.kernel->loaded = false;
        if (observer_) observer_(*fresh);
        store_->save(*fresh);
        entry = std::move(*fresh);
      }
    }
    item.kernel->required_isa = entry->required_isa;
    counters_.code_bytes += entry->code.size();
    entries.push_back(std::move(*entry));
    ready.push_back(&item);
  }
  std::vector<std::span<const std::byte>> codes;
  for (const cache::Entry& entry : entries) codes.emplace_back(entry.code);
  Result<std::vector<jit::KernelFunction>> functions = memory_.publish(codes);
  if (!functions) {
    for (const Pending* item : ready) abandon(*item, functions.error().message);
    return;
  }
  for (std::size_t i = 0; i < ready.size(); ++i) ready[i]->kernel->function = (*functions)[i];
}

// Asked for again, it is tried again; who holds the pointer keeps a kernel without a function, and
// learns of it from flush().
void KernelLibrary::abandon(const Pending& item, const std::string& problem) {
  for (std::thread::id requester : item.requesters) {
    std::string& told = problems_[requester];
    if (told.find(problem) == std::string::npos) told += (told.empty() ? "" : "; ") + problem;
  }
  auto found = kernels_.find(item.kernel->key);
  abandoned_.push_back(std::move(found->second));
  kernels_.erase(found);
  std::erase(order_, item.kernel);
}

KernelCounters KernelLibrary::counters() const {
  std::lock_guard lock(mutex_);
  return counters_;
}

std::vector<Kernel> KernelLibrary::kernels() const {
  std::lock_guard lock(mutex_);
  std::vector<Kernel> copies;
  for (const Kernel* kernel : order_) copies.push_back(*kernel);
  return copies;
}

}  // namespace tilewright::ops
