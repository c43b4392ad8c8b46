// Target: the ladder of instruction sets, and the probe of this machine.
//
// A CPUID bit alone says what the silicon can do. What may be used also needs the operating system
// to save the registers (XCR0) and, for AMX, to grant permission once per process.
//
// Tested by base_test.
#include "jit/base/target.h"

#include <cpuid.h>
#include <fmt/format.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cctype>
#include <cstring>

#include "jit/base/cpu_features.h"
#include "jit/base/fork_static.h"
#include "jit/base/processors.h"

namespace tilewright {
namespace {

struct Rung {
  std::string_view name;
  Isa step;
};

// In ladder order: each rung allows everything before it.
constexpr Rung kRungs[] = {
    {"avx2", Isa::avx2},
    {"avx_vnni", Isa::avx_vnni},
    {"avx512", Isa::avx512},
    {"avx512_vnni", Isa::avx512_vnni},
    {"avx512_bf16", Isa::avx512_bf16},
    {"avx512_fp16", Isa::avx512_fp16},
    {"amx_bf16", Isa::amx_bf16},
    {"amx_int8", Isa::amx_int8},
    {"amx_fp16", Isa::amx_fp16},
};

// oneDNN's spellings, so that an ONEDNN_MAX_CPU_ISA can be copied.
constexpr Rung kOneDnnRungs[] = {
    {"avx2_vnni", Isa::avx_vnni},
    {"avx512_core", Isa::avx512},
    {"avx512_core_vnni", Isa::avx512_vnni},
    {"avx512_core_bf16", Isa::avx512_bf16},
    {"avx512_core_fp16", Isa::avx512_fp16},
    {"avx512_core_amx", Isa::amx_int8},
    {"avx512_core_amx_fp16", Isa::amx_fp16},
    {"all", Isa::amx_fp16},
    {"default", Isa::amx_fp16},
};

// A step and all lower bits: the enum's order is the ladder's order.
constexpr IsaMask up_to(Isa step) { return bit(step) | (bit(step) - 1); }

constexpr bool has_bit(std::uint32_t word, int position) { return (word >> position & 1) != 0; }

// The fields of one CPUID leaf; zero when the CPU does not have the leaf.
struct Leaf {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Leaf r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// REQUIRES: OSXSAVE
std::uint64_t read_xcr0() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

constexpr int kOsxsave = 27;
constexpr int kAmxTile = 24;

CpuFeatureWords probe_features() {
  CpuFeatureWords words;
  words.leaf1_ecx = cpuid(1).ecx;
  const Leaf leaf7 = cpuid(7);
  words.leaf7_ebx = leaf7.ebx;
  words.leaf7_ecx = leaf7.ecx;
  words.leaf7_edx = leaf7.edx;
  if (leaf7.eax >= 1) words.leaf7_1_eax = cpuid(7, 1).eax;
  if (has_bit(words.leaf1_ecx, kOsxsave)) words.xcr0 = read_xcr0();
  if (has_bit(words.leaf7_edx, kAmxTile)) {
    // Fails on kernels before 5.16 and where a small alternate signal stack is installed.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    words.amx_permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }
  return words;
}

std::string vendor_name() {
  const Leaf r = cpuid(0);
  const std::array<std::uint32_t, 3> words = {r.ebx, r.edx, r.ecx};
  std::string name(sizeof words, '\0');
  std::memcpy(name.data(), words.data(), sizeof words);
  return name.c_str();
}

std::string brand_name() {
  std::string name;
  for (std::uint32_t leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
    const Leaf r = cpuid(leaf);
    const std::array<std::uint32_t, 4> words = {r.eax, r.ebx, r.ecx, r.edx};
    name.append(reinterpret_cast<const char*>(words.data()), sizeof words);
  }
  name = name.c_str();
  name.erase(name.find_last_not_of(' ') + 1);
  name.erase(0, name.find_first_not_of(' '));
  return name;
}

void read_signature(CpuModel& cpu) {
  const std::uint32_t eax = cpuid(1).eax;
  const int base_family = static_cast<int>(eax >> 8 & 0xf);
  const int base_model = static_cast<int>(eax >> 4 & 0xf);
  cpu.stepping = static_cast<int>(eax & 0xf);
  cpu.family = base_family;
  cpu.model = base_model;
  if (base_family == 15) cpu.family += static_cast<int>(eax >> 20 & 0xff);
  if (base_family == 6 || base_family == 15) {
    cpu.model += static_cast<int>(eax >> 16 & 0xf) << 4;
  }
}

void read_caches(Target& target) {
  // Intel's leaf 4 and AMD's 0x8000001d have one layout; each is empty on the other's CPUs.
  for (const std::uint32_t leaf : {4u, 0x8000001du}) {
    for (std::uint32_t subleaf = 0; subleaf < 16; ++subleaf) {
      const Leaf r = cpuid(leaf, subleaf);
      const std::uint32_t type = r.eax & 0x1f, level = r.eax >> 5 & 7;
      if (type == 0) break;
      const std::int64_t bytes = static_cast<std::int64_t>((r.ebx >> 22) + 1) *
                                 ((r.ebx >> 12 & 0x3ff) + 1) * ((r.ebx & 0xfff) + 1) *
                                 (std::int64_t{r.ecx} + 1);
      constexpr std::uint32_t kInstructions = 2;
      if (type == kInstructions) continue;
      if (level == 1) target.l1d_bytes = bytes;
      if (level == 2) target.l2_bytes = bytes;
    }
  }
}

Target probe_host() {
  Target target;
  target.isa = isa_from(probe_features());
  target.cpu.vendor = vendor_name();
  target.model_name = brand_name();
  read_signature(target.cpu);
  read_caches(target);
  target.cores = ProcessorSet::allowed().count();
  return target;
}

}  // namespace

IsaMask isa_from(const CpuFeatureWords& w) {
  constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;
  const auto saved = [&](std::uint64_t state) { return (w.xcr0 & state) == state; };

  const bool fma = has_bit(w.leaf1_ecx, 12), avx = has_bit(w.leaf1_ecx, 28);
  const bool f16c = has_bit(w.leaf1_ecx, 29), osxsave = has_bit(w.leaf1_ecx, kOsxsave);
  const bool bmi1 = has_bit(w.leaf7_ebx, 3), bmi2 = has_bit(w.leaf7_ebx, 8);
  const bool avx2 = has_bit(w.leaf7_ebx, 5);
  if (!(osxsave && avx && fma && f16c && bmi1 && bmi2 && avx2 && saved(kAvxState))) return 0;

  IsaMask isa = bit(Isa::avx2);
  if (has_bit(w.leaf7_1_eax, 4)) isa |= bit(Isa::avx_vnni);

  const bool foundation = has_bit(w.leaf7_ebx, 16), dq = has_bit(w.leaf7_ebx, 17);
  const bool bw = has_bit(w.leaf7_ebx, 30), vl = has_bit(w.leaf7_ebx, 31);
  if (!(foundation && dq && bw && vl && saved(kAvx512State))) return isa;
  isa |= bit(Isa::avx512);
  if (has_bit(w.leaf7_ecx, 11)) isa |= bit(Isa::avx512_vnni);
  if (has_bit(w.leaf7_1_eax, 5)) isa |= bit(Isa::avx512_bf16);
  if (has_bit(w.leaf7_edx, 23)) isa |= bit(Isa::avx512_fp16);

  if (!(has_bit(w.leaf7_edx, kAmxTile) && w.amx_permitted && saved(kTileState))) return isa;
  if (has_bit(w.leaf7_edx, 22)) isa |= bit(Isa::amx_bf16);
  if (has_bit(w.leaf7_edx, 25)) isa |= bit(Isa::amx_int8);
  if (has_bit(w.leaf7_1_eax, 21)) isa |= bit(Isa::amx_fp16);
  return isa;
}

std::string isa_mask_name(IsaMask mask) {
  std::string name;
  for (const Rung& rung : kRungs) {
    if ((mask & bit(rung.step)) != 0)
      name += fmt::format("{}{}", name.empty() ? "" : "+", rung.name);
  }
  return name.empty() ? "none" : name;
}

std::string print(const CpuModel& cpu) {
  return fmt::format("{} {}/{}/{}", cpu.vendor, cpu.family, cpu.model, cpu.stepping);
}

std::string Target::ladder_names() {
  std::string names;
  for (const Rung& rung : kRungs)
    names += fmt::format("{}{}", names.empty() ? "" : ", ", rung.name);
  for (const Rung& rung : kOneDnnRungs) names += fmt::format(", {}", rung.name);
  return names;
}

const Target& Target::host() {
  static constinit ForkStatic<const Target> target;
  return target.get(probe_host);
}

Result<IsaMask> Target::ladder(std::string_view text) {
  std::string name(text);
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  for (const Rung& rung : kRungs) {
    if (name == rung.name) return up_to(rung.step);
  }
  for (const Rung& rung : kOneDnnRungs) {
    if (name == rung.name) return up_to(rung.step);
  }
  return Error{fmt::format("unknown ISA '{}'; valid are {}", text, ladder_names())};
}

Result<Target> Target::capped(std::string_view rung) const {
  const Result<IsaMask> mask = ladder(rung);
  if (!mask) return mask.error();
  Target target = *this;
  target.isa &= *mask;
  return target;
}

Target Target::for_code() const {
  Target target = *this;
  if (has(Isa::avx512)) target.isa &= ~bit(Isa::avx_vnni);
  return target;
}

Result<Target> Target::for_rung(std::string_view rung) {
  const Result<IsaMask> mask = ladder(rung);
  if (!mask) return mask.error();
  Target target;
  target.isa = *mask;
  target.cpu.vendor = "generic";
  target.model_name = fmt::format("any CPU with {}", isa_mask_name(*mask));
  return target;
}

}  // namespace tilewright
