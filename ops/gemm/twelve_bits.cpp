// See twelve_bits.h. Tested by twelve_bits_test.
#include "ops/gemm/twelve_bits.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

namespace tilewright::ops::twelve_bits {
namespace {

constexpr std::int64_t kPanelColumns = 32;
constexpr std::int64_t kStepWeights = kStepLength * kPanelColumns;
// Weights that lie side by side in both layouts: 4 columns of a pair of k.
constexpr std::int64_t kBlockWeights = 8;
constexpr std::int64_t kBlocksPerHalf = kHalfBytes / kBlockWeights;
constexpr std::uint8_t kOutside = 0xff;

// The index of each high byte, or kOutside.
using Indices = std::array<std::uint8_t, 256>;

std::int64_t step_count(std::int64_t k) { return (k + kStepLength - 1) / kStepLength; }

std::uint8_t high_byte(std::uint16_t bits) { return static_cast<std::uint8_t>(bits >> 8); }

// Where block `block` of a half begins in a step of the 16-bit layout, in weights.
std::int64_t block_in_pairs(std::int64_t half, std::int64_t block) {
  const std::int64_t columns = block / 2 * 4, pair = 2 * half + block % 2;
  return (pair * kPanelColumns + columns) * 2;
}

// The commonest high bytes of a stretch.
std::array<std::uint8_t, kTableBytes> choose_table(std::span<const std::uint16_t> weights) {
  // Four counters, so that equal neighbours do not wait for each other.
  std::array<std::array<std::uint16_t, 256>, 4> counts{};
  for (std::size_t i = 0; i < weights.size(); ++i) ++counts[i % 4][high_byte(weights[i])];
  const auto count = [&](std::uint8_t byte) {
    return counts[0][byte] + counts[1][byte] + counts[2][byte] + counts[3][byte];
  };
  std::array<std::uint8_t, 256> order;
  std::iota(order.begin(), order.end(), std::uint8_t{0});
  const auto end = std::partition(order.begin(), order.end(), count);
  std::sort(order.begin(), end, [&](std::uint8_t a, std::uint8_t b) {
    return std::pair(count(b), a) < std::pair(count(a), b);
  });
  std::array<std::uint8_t, kTableBytes> table;
  std::copy_n(order.begin(), table.size(), table.begin());
  return table;
}

Indices indices_of(const std::byte* record) {
  Indices indices;
  indices.fill(kOutside);
  for (std::uint8_t i = 0; i < kTableBytes; ++i) {
    indices[std::to_integer<std::size_t>(record[i])] = i;
  }
  return indices;
}

const std::byte* record_of(const std::byte* entry, std::int64_t stretch) {
  return entry + kRecordsOffset + stretch * kRecordBytes;
}

bool is_plain(const std::byte* record, std::int64_t step) {
  std::uint16_t flags = 0;
  std::memcpy(&flags, record + kFlagsOffset, sizeof flags);
  return (flags >> step % kStretchSteps & 1) != 0;
}

std::int64_t steps_offset(const std::byte* entry) {
  std::int64_t offset = 0;
  std::memcpy(&offset, entry, sizeof offset);
  return offset;
}

void pack_step(const std::uint16_t* pairs, const Indices& indices, std::byte* step) {
  std::array<std::array<std::uint8_t, kHalfBytes>, 2> places;
  for (std::int64_t half = 0; half < 2; ++half) {
    for (std::int64_t block = 0; block < kBlocksPerHalf; ++block) {
      const std::uint16_t* from = pairs + block_in_pairs(half, block);
      std::byte* low = step + half * kHalfBytes + block * kBlockWeights;
      std::uint8_t* place = places[static_cast<std::size_t>(half)].data() + block * kBlockWeights;
      for (std::int64_t i = 0; i < kBlockWeights; ++i) {
        low[i] = static_cast<std::byte>(from[i] & 0xff);
        place[i] = indices[high_byte(from[i])];
      }
    }
  }
  for (std::size_t i = 0; i < kHalfBytes; ++i) {
    step[kIndicesOffset + i] = static_cast<std::byte>(places[0][i] | places[1][i] << 4);
  }
}

}  // namespace

std::int64_t entry_bytes(std::int64_t k) {
  const std::int64_t stretches = (step_count(k) + kStretchSteps - 1) / kStretchSteps;
  return (kRecordsOffset + stretches * kRecordBytes + 7) / 8 * 8;
}

Packer::Packer(std::int64_t panels, std::int64_t k)
    : panels_(panels),
      k_(k),
      entry_bytes_(twelve_bits::entry_bytes(k)),
      entries_(static_cast<std::size_t>((panels * entry_bytes_ + 63) / 64 * 64)) {}

void Packer::inspect(std::int64_t panel, const std::uint16_t* pairs) {
  std::byte* record = entry(panel) + kRecordsOffset;
  for (std::int64_t first = 0; first < step_count(k_); first += kStretchSteps) {
    const std::int64_t steps = std::min(kStretchSteps, step_count(k_) - first);
    const std::span weights(pairs + first * kStepWeights,
                            static_cast<std::size_t>(steps * kStepWeights));
    const auto table = choose_table(weights);
    std::memcpy(record, table.data(), table.size());
    const Indices indices = indices_of(record);
    std::uint16_t flags = 0;
    for (std::int64_t step = 0; step < steps; ++step) {
      // An index has 4 bits; no early exit, so that the loop has no branch.
      std::uint8_t all = 0;
      for (std::int64_t i = 0; i < kStepWeights; ++i) {
        all |= indices[high_byte(weights[static_cast<std::size_t>(step * kStepWeights + i)])];
      }
      if (all == kOutside) flags |= static_cast<std::uint16_t>(1u << step);
    }
    std::memcpy(record + kFlagsOffset, &flags, sizeof flags);
    record += kRecordBytes;
  }
}

std::int64_t Packer::place() {
  auto offset = static_cast<std::int64_t>(entries_.size());
  for (std::int64_t panel = 0; panel < panels_; ++panel) {
    std::memcpy(entry(panel), &offset, sizeof offset);
    for (std::int64_t step = 0; step < step_count(k_); ++step) {
      const std::byte* record = record_of(entry(panel), step / kStretchSteps);
      offset += is_plain(record, step) ? kPlainStepBytes : kStepBytes;
    }
  }
  return offset;
}

void Packer::pack(std::int64_t panel, const std::uint16_t* pairs, std::byte* packed) const {
  const std::byte* from = entry(panel);
  std::memcpy(packed + panel * entry_bytes_, from, static_cast<std::size_t>(entry_bytes_));
  std::byte* to = packed + steps_offset(from);
  Indices indices;
  for (std::int64_t step = 0; step < step_count(k_); ++step) {
    const std::byte* record = record_of(from, step / kStretchSteps);
    if (step % kStretchSteps == 0) indices = indices_of(record);
    const std::uint16_t* weights = pairs + step * kStepWeights;
    if (is_plain(record, step)) {
      std::memcpy(to, weights, kPlainStepBytes);
      to += kPlainStepBytes;
    } else {
      pack_step(weights, indices, to);
      to += kStepBytes;
    }
  }
}

void unpack_column(const std::byte* packed, std::int64_t panel, std::int64_t column, std::int64_t k,
                   std::uint16_t* to) {
  const std::byte* entry = packed + panel * entry_bytes(k);
  const std::byte* step = packed + steps_offset(entry);
  for (std::int64_t i = 0; i < k; i += kStepLength) {
    const std::byte* record = record_of(entry, i / kStepLength / kStretchSteps);
    const bool plain = is_plain(record, i / kStepLength);
    for (std::int64_t j = 0; j < std::min(kStepLength, k - i); ++j) {
      if (plain) {
        std::memcpy(to + i + j, step + (j / 2 * kPanelColumns + column) * 4 + j % 2 * 2, 2);
        continue;
      }
      const std::int64_t byte = column / 4 * 16 + j % 4 / 2 * 8 + column % 4 * 2 + j % 2;
      const auto low = std::to_integer<std::uint16_t>(step[j / 4 * kHalfBytes + byte]);
      const auto both = std::to_integer<unsigned>(step[kIndicesOffset + byte]);
      const auto high =
          std::to_integer<std::uint16_t>(record[j < kStepLength / 2 ? both & 15 : both >> 4]);
      to[i + j] = static_cast<std::uint16_t>(high << 8 | low);
    }
    step += plain ? kPlainStepBytes : kStepBytes;
  }
}

}  // namespace tilewright::ops::twelve_bits
