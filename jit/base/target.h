// Target: the machine that code is generated for, as a value.
//
// Everything that chooses or emits code takes a Target; nothing asks the CPU behind its back. So
// `avx2` on an AVX-512 host, or AVX-512 code for a CPU that is not this one, is just another value,
// and the cache key is honest.
//
// Tested by base_test.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "jit/base/result.h"

namespace tilewright {

// One bit per instruction-set step. A mask of them is what a kernel requires and what a host
// offers. avx2 stands for AVX2 + FMA + F16C + BMI1/2 (the floor: every x86 server CPU since 2013);
// avx512 for F + BW + DQ + VL.
enum class Isa : std::uint32_t {
  avx2 = 1u << 0,
  avx_vnni = 1u << 1,
  avx512 = 1u << 2,
  avx512_vnni = 1u << 3,
  avx512_bf16 = 1u << 4,
  avx512_fp16 = 1u << 5,
  amx_bf16 = 1u << 6,
  amx_int8 = 1u << 7,
  amx_fp16 = 1u << 8,
};

using IsaMask = std::uint32_t;
constexpr IsaMask bit(Isa isa) { return static_cast<IsaMask>(isa); }

// "avx2+avx512+avx512_vnni"; "none" for 0.
std::string isa_mask_name(IsaMask mask);

// Which CPU it is, as CPUID says: what recorded measurements are found by. Family and model with
// their extensions.
struct CpuModel {
  std::string vendor;  // "GenuineIntel", "AuthenticAMD"
  int family = 0, model = 0, stepping = 0;
  friend bool operator==(const CpuModel&, const CpuModel&) = default;
};

// "AuthenticAMD 25/1/1"
std::string print(const CpuModel& cpu);

struct Target {
  IsaMask isa = 0;  // what generated code may use
  CpuModel cpu;
  std::string model_name;             // the CPUID brand string
  std::int64_t l1d_bytes = 32 << 10;  // per core
  std::int64_t l2_bytes = 512 << 10;  // per core
  int cores = 1;                      // logical CPUs this process may run on

  bool has(Isa step) const { return (isa & bit(step)) != 0; }
  // fp32 lanes of the widest vector that code for this target uses: 16 (AVX-512) or 8 (AVX2).
  int lanes() const { return has(Isa::avx512) ? 16 : 8; }

  // This machine: CPUID, and what the operating system enabled (XCR0; AMX permission). Probed once.
  static const Target& host();
  // The mask that a rung of the ladder allows, e.g. "avx512_bf16" -> avx2|avx_vnni|avx512|...;
  // oneDNN's spellings
  // ("avx512_core_amx") are accepted. Error names the valid values.
  static Result<IsaMask> ladder(std::string_view rung);
  // The valid names, comma-separated, lowest first: for messages and `tilewright env`.
  static std::string ladder_names();
  // host() capped by a rung; the rung may also be above the host's only for cross-target emission
  // (see for_rung).
  Result<Target> capped(std::string_view rung) const;
  // The same without AVX-VNNI if it has AVX-512, whose code has no use for it: CPUs of one rung
  // differ in it (AVX-512 without AVX-VNNI is common), and a kernel made for the rung serves all.
  Target for_code() const;
  // A target that has exactly the rung's mask, host or not: for emission that will not be executed
  // (prewarm, tests).
  static Result<Target> for_rung(std::string_view rung);
};

}  // namespace tilewright
