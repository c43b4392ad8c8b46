// See twelve_bits.h. Tested by twelve_bits_test.
#include "ops/gemm/twelve_bits.h"

#include <emmintrin.h>

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
constexpr std::int64_t kVectorBytes = 16;

std::int64_t step_count(std::int64_t k) { return (k + kStepLength - 1) / kStepLength; }

// Where block `block` of a half begins in a step of the 16-bit layout, in weights.
std::int64_t block_in_pairs(std::int64_t half, std::int64_t block) {
  const std::int64_t columns = block / 2 * 4, pair = 2 * half + block % 2;
  return (pair * kPanelColumns + columns) * 2;
}

using ByteTable = std::array<std::uint8_t, kTableBytes>;
using ByteCounts = std::array<int, 256>;

// How often each high byte is met in a stretch. All of it is counted: of a quarter, the last places
// of the table went to the wrong ones, and a fourth of the steps of normal weights stayed in 16
// bits.
ByteCounts count_high_bytes(std::span<const std::uint16_t> weights) {
  // Four weights per load, each with counters of its own: equal ones do not wait for each other.
  std::array<std::array<std::uint16_t, 256>, 4> counts{};
  for (std::size_t i = 0; i < weights.size(); i += 4) {
    std::uint64_t four = 0;
    std::memcpy(&four, &weights[i], sizeof four);
    ++counts[0][four >> 8 & 0xff];
    ++counts[1][four >> 24 & 0xff];
    ++counts[2][four >> 40 & 0xff];
    ++counts[3][four >> 56];
  }
  ByteCounts sums;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    sums[i] = counts[0][i] + counts[1][i] + counts[2][i] + counts[3][i];
  }
  return sums;
}

int count_of(const ByteTable& table, const ByteCounts& counts) {
  return std::accumulate(table.begin(), table.end(), 0,
                         [&](int sum, std::uint8_t byte) { return sum + counts[byte]; });
}

ByteTable commonest_bytes(const ByteCounts& counts) {
  std::array<std::uint8_t, 256> order;
  std::iota(order.begin(), order.end(), std::uint8_t{0});
  const auto end = std::partition(order.begin(), order.end(),
                                  [&](std::uint8_t byte) { return counts[byte] > 0; });
  std::sort(order.begin(), end, [&](std::uint8_t a, std::uint8_t b) {
    return std::pair(counts[b], a) < std::pair(counts[a], b);
  });
  ByteTable table;
  std::copy_n(order.begin(), table.size(), table.begin());
  std::ranges::sort(table);
  return table;
}

// A table whose bytes of positive weights follow one another, and then those of negative ones.
ByteTable byte_runs(int positive, int largest_positive, int largest_negative) {
  ByteTable table;
  for (int i = 0; i < kTableBytes; ++i) {
    const int byte = i < positive ? largest_positive - positive + 1 + i
                                  : largest_negative - (kTableBytes - 1 - i);
    table[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(byte);
  }
  return table;
}

// The table of a stretch: runs if they hold as many weights as the commonest bytes, because runs
// are packed in a third of the time (class Runs) and mostly fit the next stretch, too.
ByteTable choose_table(const ByteCounts& counts) {
  const ByteTable commonest = commonest_bytes(counts);
  constexpr int kSign = 0x80;
  const auto largest = [&](int end) {
    int byte = end - 1;
    while (byte > end - kSign && counts[static_cast<std::size_t>(byte)] == 0) --byte;
    return std::max(byte, end - kSign + kTableBytes);
  };
  const int positive = largest(kSign), negative = largest(2 * kSign);
  const int covered = count_of(commonest, counts);
  for (int count : {8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}) {
    const ByteTable runs = byte_runs(count, positive, negative);
    if (count_of(runs, counts) == covered) return runs;
  }
  return commonest;
}

// Sixteen weights, as the two vectors of bytes that they are.
struct Bytes {
  __m128i low, high;
};

Bytes load_bytes(const std::uint16_t* first, const std::uint16_t* second) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  const __m128i mask = _mm_set1_epi16(0xff);
  return {_mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask)),
          _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}

__m128i all_places(std::uint8_t byte) { return _mm_set1_epi8(static_cast<char>(byte)); }

// A table of any bytes, each in all 16 places: one comparison finds it among 16 high bytes. A
// scalar look-up in 256 bytes took two to three times as long.
class Table {
 public:
  explicit Table(const std::uint8_t* table) {
    for (std::size_t i = 0; i < kTableBytes; ++i) bytes_[i] = all_places(table[i]);
  }

  // All ones where a high byte is in the table.
  __m128i contains(__m128i high) const {
    __m128i found = _mm_setzero_si128();
    for (const __m128i& byte : bytes_) found = _mm_or_si128(found, _mm_cmpeq_epi8(high, byte));
    return found;
  }

  // Of high bytes in the table.
  __m128i places(__m128i high) const {
    __m128i places = _mm_setzero_si128();
    for (std::uint8_t i = 0; i < kTableBytes; ++i) {
      const __m128i here = _mm_cmpeq_epi8(high, bytes_[i]);
      places = _mm_or_si128(places, _mm_and_si128(here, all_places(i)));
    }
    return places;
  }

 private:
  __m128i bytes_[kTableBytes];  // std::array would lose the type's alignment attribute
};

// A table as byte_runs() makes it: a place is a difference.
class Runs {
 public:
  static bool fits(const std::uint8_t* table) {
    const int positive = count_positive(table);
    return positive > 0 && positive < kTableBytes && table[positive - 1] - table[0] < positive &&
           table[kTableBytes - 1] - table[positive] < kTableBytes - positive;
  }

  explicit Runs(const std::uint8_t* table) {
    const int positive = count_positive(table);
    first_ = all_places(table[0]);
    last_ = all_places(static_cast<std::uint8_t>(positive - 1));
    // What a negative weight has instead, as differences: choosing is one `and` and one `xor`.
    first_change_ = _mm_xor_si128(first_, all_places(table[positive]));
    last_change_ =
        _mm_xor_si128(last_, all_places(static_cast<std::uint8_t>(kTableBytes - positive - 1)));
    negative_place_ = all_places(static_cast<std::uint8_t>(positive));
  }

  __m128i contains(__m128i high) const {
    const __m128i negative = is_negative(high), distance = from_first(high, negative);
    const __m128i last = _mm_xor_si128(last_, _mm_and_si128(negative, last_change_));
    return _mm_cmpeq_epi8(_mm_min_epu8(distance, last), distance);
  }

  __m128i places(__m128i high) const {
    const __m128i negative = is_negative(high);
    return _mm_add_epi8(from_first(high, negative), _mm_and_si128(negative, negative_place_));
  }

 private:
  static int count_positive(const std::uint8_t* table) {
    return static_cast<int>(
        std::count_if(table, table + kTableBytes, [](std::uint8_t byte) { return byte < 0x80; }));
  }
  static __m128i is_negative(__m128i high) { return _mm_cmpgt_epi8(_mm_setzero_si128(), high); }
  __m128i from_first(__m128i high, __m128i negative) const {
    return _mm_sub_epi8(high, _mm_xor_si128(first_, _mm_and_si128(negative, first_change_)));
  }

  __m128i first_, first_change_, last_, last_change_, negative_place_;
};

// Calls visit with the table that begins at `record`, sorted, as the kind that it is.
template <class Visit>
void with_table(const std::byte* record, Visit&& visit) {
  std::array<std::uint8_t, kTableBytes> table;
  std::memcpy(table.data(), record, table.size());
  if (Runs::fits(table.data())) {
    visit(Runs(table.data()));
  } else {
    visit(Table(table.data()));
  }
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

// Of one panel.
std::int64_t steps_bytes(const std::byte* entry, std::int64_t k) {
  std::int64_t bytes = 0;
  for (std::int64_t step = 0; step < step_count(k); ++step) {
    bytes += is_plain(record_of(entry, step / kStretchSteps), step) ? kPlainStepBytes : kStepBytes;
  }
  return bytes;
}

template <class AnyTable>
bool fits(const std::uint16_t* step, const AnyTable& table) {
  __m128i all = _mm_set1_epi8(-1);
  for (std::int64_t i = 0; i < kStepWeights; i += kVectorBytes) {
    all = _mm_and_si128(all, table.contains(load_bytes(step + i, step + i + 8).high));
  }
  return _mm_movemask_epi8(all) == 0xffff;
}

// The flags of a record: which steps of a stretch have a high byte that its table has not.
std::uint16_t find_plain(std::span<const std::uint16_t> weights, const std::byte* record) {
  std::uint16_t flags = 0;
  with_table(record, [&](const auto& table) {
    for (std::size_t step = 0; step < weights.size() / kStepWeights; ++step) {
      const bool plain = !fits(&weights[step * kStepWeights], table);
      flags |= static_cast<std::uint16_t>(plain << step);
    }
  });
  return flags;
}

template <class AnyTable>
void pack_step(const std::uint16_t* pairs, const AnyTable& table, std::byte* step) {
  for (std::int64_t i = 0; i < kHalfBytes; i += kVectorBytes) {
    const std::int64_t block = i / kBlockWeights;
    __m128i places[2];
    for (std::int64_t half = 0; half < 2; ++half) {
      const Bytes bytes =
          load_bytes(pairs + block_in_pairs(half, block), pairs + block_in_pairs(half, block + 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(step + half * kHalfBytes + i), bytes.low);
      places[half] = table.places(bytes.high);
    }
    // A place has 4 bits: none reaches the neighbouring byte.
    _mm_storeu_si128(reinterpret_cast<__m128i*>(step + kIndicesOffset + i),
                     _mm_or_si128(places[0], _mm_slli_epi16(places[1], 4)));
  }
}

std::int64_t entries_bytes(std::int64_t panels, std::int64_t k) {
  return (panels * entry_bytes(k) + 63) / 64 * 64;
}

}  // namespace

std::int64_t entry_bytes(std::int64_t k) {
  const std::int64_t stretches = (step_count(k) + kStretchSteps - 1) / kStretchSteps;
  return (kRecordsOffset + stretches * kRecordBytes + 7) / 8 * 8;
}

bool is_whole(std::span<const std::byte> packed, std::int64_t panels, std::int64_t k) {
  const auto size = static_cast<std::int64_t>(packed.size());
  std::int64_t offset = entries_bytes(panels, k);
  if (offset > size) return false;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::byte* entry = packed.data() + panel * entry_bytes(k);
    if (steps_offset(entry) != offset) return false;
    offset += steps_bytes(entry, k);
  }
  return offset == size;
}

Packer::Packer(std::int64_t panels, std::int64_t k)
    : panels_(panels),
      k_(k),
      entry_bytes_(twelve_bits::entry_bytes(k)),
      entries_(static_cast<std::size_t>(entries_bytes(panels, k))) {}

void Packer::inspect(std::int64_t panel, const std::uint16_t* pairs) {
  std::byte* record = entry(panel) + kRecordsOffset;
  for (std::int64_t first = 0; first < step_count(k_); first += kStretchSteps) {
    const std::int64_t steps = std::min(kStretchSteps, step_count(k_) - first);
    const std::span weights(pairs + first * kStepWeights,
                            static_cast<std::size_t>(steps * kStepWeights));
    // The table of the stretch before is as good as any if all steps fit it, and counting takes
    // most of the time.
    std::uint16_t flags = 1;
    if (first > 0) {
      std::memcpy(record, record - kRecordBytes, kTableBytes);
      flags = find_plain(weights, record);
    }
    if (flags != 0) {
      const auto table = choose_table(count_high_bytes(weights));
      std::memcpy(record, table.data(), table.size());
      flags = find_plain(weights, record);
    }
    std::memcpy(record + kFlagsOffset, &flags, sizeof flags);
    record += kRecordBytes;
  }
}

std::int64_t Packer::place() {
  auto offset = static_cast<std::int64_t>(entries_.size());
  for (std::int64_t panel = 0; panel < panels_; ++panel) {
    std::memcpy(entry(panel), &offset, sizeof offset);
    offset += steps_bytes(entry(panel), k_);
  }
  return offset;
}

void Packer::pack(std::int64_t panel, const std::uint16_t* pairs, std::byte* packed) const {
  const std::byte* from = entry(panel);
  std::memcpy(packed + panel * entry_bytes_, from, static_cast<std::size_t>(entry_bytes_));
  std::byte* to = packed + steps_offset(from);
  for (std::int64_t first = 0; first < step_count(k_); first += kStretchSteps) {
    const std::byte* record = record_of(from, first / kStretchSteps);
    with_table(record, [&](const auto& table) {
      for (std::int64_t step = first; step < std::min(first + kStretchSteps, step_count(k_));
           ++step) {
        const std::uint16_t* weights = pairs + step * kStepWeights;
        if (is_plain(record, step)) {
          std::memcpy(to, weights, kPlainStepBytes);
          to += kPlainStepBytes;
        } else {
          pack_step(weights, table, to);
          to += kStepBytes;
        }
      }
    });
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
