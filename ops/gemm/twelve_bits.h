// bf16 weights in 12 bits each, without loss: what decode reads per token shrinks by a quarter.
//
// The high byte of a bf16 is its sign and the upper seven bits of its exponent, and weights that
// lie together have few exponents: 16 high bytes cover all but 1 in 10,000 of normally distributed
// ones. So a stretch of 128 k of a panel's 32 columns keeps the low bytes as they are and, for each
// high byte, 4 bits: its place in the stretch's own table of 16. Eight k are a step; a step with
// any other high byte stays in 16 bits, so every pattern of every weight survives (zeros,
// subnormals, infinities, NaN).
//
//   entries  one per panel, entry_bytes(k) long, then zeros up to a multiple of 64
//     0   i64     where the panel's steps begin, in bytes from the beginning of the packed weight
//     8   records, one per stretch of k, 18 bytes long:
//         0   u8[16]  the table: 0 to 15 -> high byte
//         16  u16     bit i is set if step i of the stretch is in 16 bits
//   steps    panel by panel, in order of k, without gaps
//     in 12 bits, 384 bytes:  [2 halves of 4 k][32 / 4 columns][2 pairs of k][4 columns][2 k] low
//                             bytes, then the same for the indices: those of the first half in the
//                             low, of the second in the high 4 bits of [32 / 4][2][4][2] bytes
//     in 16 bits, 512 bytes:  [4 pairs of k][32 columns][2 k], as in pack.h
//
// 16 bytes of low bytes are 4 columns x 4 k, so interleaving them with their high bytes gives two
// vectors of the 16-bit layout, whatever the number of lanes. Everything is relative to the
// beginning of the packed weight, which may lie at any multiple of 64.
//
// Tested by twelve_bits_test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tilewright::ops::twelve_bits {

inline constexpr std::int64_t kStepLength = 8;  // of k
inline constexpr std::int64_t kStretchSteps = 16;
inline constexpr int kStepBytes = 384, kPlainStepBytes = 512;
inline constexpr int kIndicesOffset = 256;  // in a step, behind two halves of low bytes
inline constexpr int kHalfBytes = 128;      // of low bytes
inline constexpr int kTableBytes = 16;
inline constexpr int kRecordsOffset = 8;                    // in an entry
inline constexpr int kFlagsOffset = 16, kRecordBytes = 18;  // of a record

std::int64_t entry_bytes(std::int64_t k);

// Packs in two passes over the panels, because a panel's place depends on the sizes of those before
// it. `pairs` is a panel in the 16-bit layout of pack.h.
class Packer {
 public:
  Packer(std::int64_t panels, std::int64_t k);
  // First, for each panel: its tables and flags. From several threads for different panels.
  void inspect(std::int64_t panel, const std::uint16_t* pairs);
  // Then, once: places all panels; returns the bytes of the packed weight.
  std::int64_t place();
  // Then, for each panel. From several threads for different panels.
  void pack(std::int64_t panel, const std::uint16_t* pairs, std::byte* packed) const;

 private:
  std::byte* entry(std::int64_t panel) { return entries_.data() + panel * entry_bytes_; }
  const std::byte* entry(std::int64_t panel) const {
    return entries_.data() + panel * entry_bytes_;
  }

  std::int64_t panels_, k_, entry_bytes_;
  std::vector<std::byte> entries_;
};

// Whether all that a reader follows is as place() makes it, and inside of `packed`.
bool is_whole(std::span<const std::byte> packed, std::int64_t panels, std::int64_t k);

// The k patterns of one column of a panel.
void unpack_column(const std::byte* packed, std::int64_t panel, std::int64_t column, std::int64_t k,
                   std::uint16_t* to);

}  // namespace tilewright::ops::twelve_bits
