// AmxEmulator: see amx_emulator.h. Shares no code with what emits these instructions.
#include "tests/amx_emulator.h"

#include <signal.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstring>
#include <optional>

namespace tilewright {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;
constexpr std::size_t kConfigurationBytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;  // as configured
  alignas(64) std::array<std::array<std::byte, kRowBytes>, kRows> data{};
};

struct Tiles {
  bool configured = false;
  std::array<std::byte, kConfigurationBytes> configuration{};
  std::array<Tile, kTiles> tiles{};
};

thread_local Tiles state;
std::atomic<std::uint64_t> count{0};
struct sigaction before;

// What VEX, ModRM and SIB say.
struct Instruction {
  int length = 0;
  int opcode = 0;
  int prefix = 0;  // 0: none, 1: 66, 2: F3, 3: F2
  int reg = 0, rm = 0, vvvv = 0;
  bool memory = false, sib = false;
  std::uintptr_t address = 0;  // without the index
  std::int64_t index = 0;      // times its scale; 0 without one
};

std::uintptr_t general_register(const ucontext_t& context, int number) {
  constexpr std::array order{REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<std::uintptr_t>(
      context.uc_mcontext.gregs[order[static_cast<std::size_t>(number)]]);
}

// Nothing: not a three-byte VEX of map 0F38, W0, 128 bits.
std::optional<Instruction> decode(const ucontext_t& context) {
  const auto begin = static_cast<std::uintptr_t>(context.uc_mcontext.gregs[REG_RIP]);
  const auto* code = reinterpret_cast<const std::uint8_t*>(begin);
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return {};
  const int r = (code[1] & 0x80) == 0 ? 8 : 0, x = (code[1] & 0x40) == 0 ? 8 : 0;
  const int b = (code[1] & 0x20) == 0 ? 8 : 0;
  Instruction result;
  result.prefix = code[2] & 3;
  result.vvvv = ~(code[2] >> 3) & 15;
  result.opcode = code[3];
  const int mode = code[4] >> 6;
  result.reg = (code[4] >> 3 & 7) + r;
  result.rm = (code[4] & 7) + b;
  result.memory = mode != 3;
  const std::uint8_t* next = code + 5;
  if (result.memory) {
    int base = result.rm;
    if ((code[4] & 7) == 4) {
      result.sib = true;
      const int scale = *next >> 6, index = (*next >> 3 & 7) + x;
      base = (*next & 7) + b;
      if (index != 4) {
        result.index = static_cast<std::int64_t>(general_register(context, index)) * (1 << scale);
      }
      ++next;
    }
    const bool behind = mode == 0 && (base & 7) == 5;  // constants lie behind the code
    if (behind && result.sib) return {};               // an address without a base: not emitted
    std::int32_t displacement = 0;
    if (mode == 1) {
      displacement = static_cast<std::int8_t>(*next++);
    } else if (mode == 2 || behind) {
      std::memcpy(&displacement, next, sizeof displacement);
      next += sizeof displacement;
    }
    const std::uintptr_t from =
        behind ? reinterpret_cast<std::uintptr_t>(next) : general_register(context, base);
    result.address = from + static_cast<std::uintptr_t>(std::int64_t{displacement});
  }
  result.length = static_cast<int>(next - code);
  return result;
}

bool configure(const std::byte* memory) {
  std::array<std::uint8_t, kConfigurationBytes> given;
  std::memcpy(given.data(), memory, given.size());
  if (given[0] == 0) {
    state = {};
    return true;
  }
  if (given[0] != 1 || given[1] != 0) return false;  // palette 1, from its first row on
  Tiles made;
  made.configured = true;
  std::memcpy(made.configuration.data(), memory, kConfigurationBytes);
  for (std::size_t i = 2; i < kConfigurationBytes; ++i) {
    const bool is_width = i >= 16 && i < 16 + 2 * kTiles, is_height = i >= 48 && i < 48 + kTiles;
    if (!is_width && !is_height && given[i] != 0) return false;
  }
  for (std::size_t i = 0; i < kTiles; ++i) {
    Tile& tile = made.tiles[i];
    tile.row_bytes = given[16 + 2 * i] | given[17 + 2 * i] << 8;
    tile.rows = given[48 + i];
    if (tile.row_bytes > kRowBytes || tile.rows > kRows) return false;
    if ((tile.row_bytes == 0) != (tile.rows == 0)) return false;
  }
  state = made;
  return true;
}

Tile* tile_at(int number) {
  if (!state.configured || number >= kTiles) return nullptr;
  Tile& tile = state.tiles[static_cast<std::size_t>(number)];
  return tile.rows > 0 ? &tile : nullptr;
}

float from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// y += a * b, pairs of bf16: sums of the even and of the odd ones, then both together.
__attribute__((target("avx2,fma"))) bool multiply(Tile* y, const Tile* a, const Tile* b) {
  if (y == nullptr || a == nullptr || b == nullptr || y == a || y == b || a == b) return false;
  if (y->row_bytes % 4 != 0 || a->row_bytes % 4 != 0) return false;
  if (y->rows != a->rows || y->row_bytes != b->row_bytes || a->row_bytes / 4 != b->rows)
    return false;
  constexpr std::size_t kColumns = kRowBytes / 4;
  std::array<std::array<float, 2 * kColumns>, kRows> factors;
  for (std::size_t k = 0; k < kRows; ++k) {
    std::array<std::uint16_t, 2 * kColumns> bits;
    std::memcpy(bits.data(), b->data[k].data(), kRowBytes);
    for (std::size_t i = 0; i < bits.size(); ++i) factors[k][i] = from_bf16(bits[i]);
  }
  for (std::size_t row = 0; row < static_cast<std::size_t>(y->rows); ++row) {
    std::array<std::uint16_t, 2 * kColumns> bits;
    std::memcpy(bits.data(), a->data[row].data(), kRowBytes);
    std::array<float, 2 * kColumns> sums{};
    for (std::size_t k = 0; k < static_cast<std::size_t>(b->rows); ++k) {
      const std::array<float, 2> pair{from_bf16(bits[2 * k]), from_bf16(bits[2 * k + 1])};
      for (std::size_t i = 0; i < sums.size(); ++i) {
        sums[i] = __builtin_fmaf(pair[i % 2], factors[k][i], sums[i]);
      }
    }
    std::array<float, kColumns> values;
    std::memcpy(values.data(), y->data[row].data(), kRowBytes);
    for (std::size_t i = 0; i < static_cast<std::size_t>(y->row_bytes / 4); ++i) {
      values[i] += sums[2 * i] + sums[2 * i + 1];
    }
    std::memcpy(y->data[row].data(), values.data(), kRowBytes);
  }
  return true;
}

bool load(Tile* tile, const Instruction& from) {
  if (tile == nullptr || !from.sib) return false;
  tile->data = {};
  for (int row = 0; row < tile->rows; ++row) {
    std::memcpy(tile->data[static_cast<std::size_t>(row)].data(),
                reinterpret_cast<const std::byte*>(from.address +
                                                   static_cast<std::uintptr_t>(row * from.index)),
                static_cast<std::size_t>(tile->row_bytes));
  }
  return true;
}

bool store(const Tile* tile, const Instruction& to) {
  if (tile == nullptr || !to.sib) return false;
  for (int row = 0; row < tile->rows; ++row) {
    std::memcpy(
        reinterpret_cast<std::byte*>(to.address + static_cast<std::uintptr_t>(row * to.index)),
        tile->data[static_cast<std::size_t>(row)].data(),
        static_cast<std::size_t>(tile->row_bytes));
  }
  return true;
}

bool set_zero(Tile* tile) {
  if (tile == nullptr) return false;
  tile->data = {};
  return true;
}

// ldtilecfg, sttilecfg, tilezero, tilerelease.
bool change_tiles(const Instruction& instruction) {
  if (instruction.memory) {
    if (instruction.reg != 0) return false;
    auto* memory = reinterpret_cast<std::byte*>(instruction.address +
                                                static_cast<std::uintptr_t>(instruction.index));
    if (instruction.prefix == 0) return configure(memory);
    if (instruction.prefix != 1) return false;
    std::memcpy(memory, state.configuration.data(), kConfigurationBytes);
    return true;
  }
  if (instruction.prefix == 3 && instruction.rm == 0) return set_zero(tile_at(instruction.reg));
  if (instruction.prefix != 0 || instruction.reg != 0 || instruction.rm != 0) return false;
  state = {};
  return true;
}

bool execute(const Instruction& instruction) {
  switch (instruction.opcode) {
    case 0x49:
      return instruction.vvvv == 0 && change_tiles(instruction);
    case 0x4b: {
      if (!instruction.memory || instruction.vvvv != 0 || instruction.prefix == 0) return false;
      Tile* tile = tile_at(instruction.reg);
      return instruction.prefix == 2 ? store(tile, instruction) : load(tile, instruction);
    }
    case 0x5c:
      return !instruction.memory && instruction.prefix == 2 &&
             multiply(tile_at(instruction.reg), tile_at(instruction.rm), tile_at(instruction.vvvv));
    default:
      return false;
  }
}

void handle(int, siginfo_t*, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  _mm_setcsr(0x9fc0);  // subnormals are zero, nothing is raised; what it was comes back afterwards
  const std::optional<Instruction> instruction = decode(context);
  if (!instruction || !execute(*instruction)) {
    sigaction(SIGILL, &before, nullptr);  // it happens again, and is nobody's
    return;
  }
  context.uc_mcontext.gregs[REG_RIP] += instruction->length;
  count.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

AmxEmulator::AmxEmulator() {
  struct sigaction action {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, &before);
}

AmxEmulator::~AmxEmulator() { sigaction(SIGILL, &before, nullptr); }

std::uint64_t AmxEmulator::instructions() { return count.load(std::memory_order_relaxed); }

bool AmxEmulator::has_tiles() { return state.configured; }

}  // namespace tilewright
