// The linear kernel's loops: panels, stretches of k, blocks of rows, k. The epilogue is in
// epilogue.cpp.
//
// A stretch is one partial sum's length of k: a panel's piece of it (16 KB in fp32) and a block's x
// stay in L1 while all blocks of rows pass by, whose sums wait in memory meanwhile. All of k per
// block would fetch the panel from L2 for each block. The caller keeps the blocks of a call so few
// that their x stays in cache.
//
// A panel of 32 columns is cut into parts, each with as many accumulators as the registers hold:
// with AVX2 up to 3 rows x 32 columns or 6 rows x 16, with AVX-512 12 x 32. The halves of a panel
// are different cache lines, so cutting it reads no byte twice.
//
// Weights in 12 bits: few rows unpack them in registers, at the speed of memory; for more rows each
// stretch is unpacked once, to 8 KB that stay in L1, and then multiplied as if it had been stored
// in 16 bits. With AVX-512 the first of several blocks of up to 8 rows does that beside its
// products: 1.11 times as fast for 9 rows, 1.05 for 16, 1.02 for 32 (perf/results/linear-zen4.md).
// For many blocks weights of 16 bits, too, are unpacked once, to 16 KB of fp32: with AVX-512 what
// widens them in registers competes with the multiplications for two ports.
//
// Tested by linear_test.
#include "ops/gemm/vector_kernel.h"

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "jit/vir/builder.h"
#include "ops/gemm/epilogue.h"
#include "ops/gemm/pack.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/gemm/twelve_bits_reader.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr auto kPanelColumns = static_cast<int>(panel_columns());
constexpr int kStepBytes = kPanelColumns * 4;  // of a panel, for one k (f32) or two (16-bit types)
constexpr int kLineBytes = 64;
constexpr int kHalfLength = twelve_bits::kStepLength / 2;

// Rows that one address register reaches with an index of one stride, scaled by 1 or 2.
constexpr int kRowsPerPointer = 3;

// Up to so many rows a vector of weights is loaded once per step and meets all rows' x in
// registers; with more rows the x come one at a time.
constexpr int kFewRows = 3;

// Up to so many rows unpack weights of 12 bits in registers, beside the products. Larger blocks
// need those for their sums, and several blocks are better off with what was unpacked once: two of
// 8 rows run at 0.75 of that.
int most_rows_in_registers(int lanes) { return lanes == 16 ? 8 : 4; }
constexpr int kMostRowsInRegistersOfSeveral = 4;

// Of many blocks, those of so many rows together ask for a stretch of weights.
constexpr int kRowsPerStretch = 128;

constexpr std::int64_t kPartialSumLength = partial_sum_length();

class VectorBuilder {
 public:
  explicit VectorBuilder(const LinearKernel& spec)
      : spec_(spec), b_(function_name(spec), spec.lanes, LinearArgs::count) {
    begin_blocks(spec.rows);
    in_registers_ = !spec.many_blocks && spec.rows <= kMostRowsInRegistersOfSeveral;
  }

  jit::vir::Function run() && {
    panels_left_ = b_.arg(LinearArgs::panel_count);
    if (spec_.streams > 1) {
      const Reg pairs = half();
      // Several blocks would find one panel in cache, but not two.
      b_.if_nonzero(b_.add(b_.arg(LinearArgs::block_count), -1),
                    [&] { b_.assign(pairs, b_.constant(0)); });
      b_.loop(pairs, [&] {
        emit_panels(kMostStreams);
        b_.add_to(panels_left_, -1);
      });
      const Reg done = b_.sub(b_.arg(LinearArgs::panel_count), panels_left_);
      b_.assign(panels_left_, b_.sub(panels_left_, done));
    }
    const auto panels = [&] { b_.loop(panels_left_, [&] { emit_panels(1); }); };
    if (in_registers_ || !has_registers_for_one_block()) {
      panels();
    } else {
      b_.if_nonzero(b_.add(b_.arg(LinearArgs::block_count), -1), panels, [&] {
        in_registers_ = one_block_ = true;
        panels();
      });
    }
    return std::move(b_).finish();
  }

 private:
  // Whether a stretch is written to scratch before blocks of rows meet it: as fp32, or in 16 bits.
  bool widens() const { return spec_.many_blocks && spec_.weight != DataType::f32 && !dots(); }
  bool unpacks() const { return widens() || (spec_.twelve_bits && !in_registers_); }
  // Whether the first of several blocks does that, beside its products.
  bool first_block_unpacks() const {
    return unpacks() && spec_.twelve_bits && !spec_.many_blocks &&
           spec_.rows > kMostRowsInRegistersOfSeveral &&
           spec_.rows <= most_rows_in_registers(spec_.lanes);
  }
  bool keeps() const { return kept_.valid(); }  // that block is at hand
  bool has_registers_for_one_block() const {
    return spec_.twelve_bits && spec_.rows <= most_rows_in_registers(spec_.lanes) &&
           spec_.rest == 0 && !spec_.many_blocks;
  }
  // As the products read them.
  bool is_f32() const { return spec_.weight == DataType::f32 || widens(); }
  bool dots() const { return spec_.arithmetic == Arithmetic::dot; }
  int input_bytes() const { return size_in_bytes(input_type(spec_)); }
  int panel_vectors() const { return kPanelColumns / spec_.lanes; }
  std::int64_t panel_bytes() const { return packed_bytes(kPanelColumns, spec_.k, spec_.weight); }
  int pointer_count() const {
    return spec_.many_blocks ? 1 : (rows_ + kRowsPerPointer - 1) / kRowsPerPointer;
  }

  // What follows is for blocks of so many rows.
  void begin_blocks(int rows) {
    rows_ = rows;
    const int most = is_f32() ? 12 : 8;
    vectors_ = panel_vectors();
    while (vectors_ * rows_ > most && vectors_ > 2) vectors_ /= 2;
  }

  // The panel's vectors that a part computes. Gated: the gates' in the first half of the list, the
  // ups of the same columns in the second.
  std::vector<int> part_vectors(int part) const {
    std::vector<int> list;
    const int runs = spec_.epilogue.gated ? 2 : 1;
    const int run = vectors_ / runs;
    for (int i = 0; i < vectors_; ++i) {
      list.push_back(i / run * (panel_vectors() / runs) + part * run + i % run);
    }
    return list;
  }

  int part_count() const { return panel_vectors() / vectors_; }

  // The next panel, or one of each half side by side: a turn of the loop over k takes some steps of
  // each. The hardware reads ahead for every stream that it sees, so a thread with two gets more of
  // memory than one that asks as far ahead as it likes: 1.06 to 1.16 times (perf/results/
  // linear-avx2.md). Streams through halves end once, and not with every panel.
  //
  // The sums stay in memory between stretches, where there are no registers for them, and before
  // the epilogue, which then has all registers to itself: an activation beside 12 accumulators
  // would spill, and a spill anywhere costs the inner loop three of its registers.
  void emit_panels(int streams) {
    // A single stretch's sums need no memory before the epilogue. With many blocks the last one
    // asks for rows and finishes them, and is written beside the others.
    const bool all_alike = !spec_.many_blocks && spec_.k > kPartialSumLength;
    const std::int64_t stretches = (all_alike ? spec_.k : spec_.k - 1) / kPartialSumLength;
    const std::int64_t rest = spec_.k - stretches * kPartialSumLength;
    weights_.assign(static_cast<std::size_t>(streams), {});
    readers_.clear();
    if (spec_.twelve_bits) {
      for (int i = 0; i < streams; ++i) {
        const Reg index = i == 0 ? panel() : b_.add(panel(), half());
        readers_.emplace_back(b_).begin_panel(b_.arg(LinearArgs::weight), index, spec_.k);
      }
    } else {
      const Reg weight = b_.add(b_.arg(LinearArgs::weight), b_.mul(panel(), panel_bytes()));
      if (widens()) stored_ = weight;
      for (std::size_t i = 0; i < weights_.size(); ++i) {
        weights_[i] = i == 0 ? weight : b_.add(weight, b_.mul(half(), panel_bytes()));
      }
    }
    if (stretches > 0) {
      clear_sums();
      const Reg left = b_.constant(stretches);
      b_.loop(left, [&] {
        emit_stretch({kPartialSumLength, true}, b_.sub(b_.constant(stretches), left));
        if (!spec_.twelve_bits && !unpacks()) advance_weights(stretch_bytes());
      });
    }
    if (rest > 0) emit_stretch({rest, stretches > 0, true}, b_.constant(stretches));
    if (spec_.many_blocks) return;
    const Reg index = panel(), sums = b_.arg(LinearArgs::partial_sums);
    const auto finish = [&] { PanelRows(b_, spec_, index).finish(row_count(), sums); };
    if (streams == 1) return finish();
    b_.loop(b_.constant(streams), [&] {
      finish();
      b_.assign(index, b_.add(index, half()));
    });
  }

  // The panel's number.
  Reg panel() {
    const Reg end = b_.add(b_.arg(LinearArgs::panel_begin), b_.arg(LinearArgs::panel_count));
    return b_.sub(end, panels_left_);
  }

  // Panels of each of two streams. Computed again each time: nothing long-lived has a register to
  // spare.
  Reg half() { return b_.shift_right(b_.arg(LinearArgs::panel_count), 1); }

  // Of a call.
  Reg row_count() {
    const Reg rows = b_.mul(b_.arg(LinearArgs::block_count), spec_.rows);
    return spec_.rest > 0 ? b_.add(rows, spec_.rest) : rows;
  }

  struct Stretch {
    std::int64_t count;  // of k
    bool add;            // to the sums
    bool last = false;
  };

  // The panel's stretch `index`, for all blocks of rows: sums = products, or sums += products. x is
  // found anew: AVX-512's twelve rows leave no register for where it is.
  void emit_stretch(const Stretch& stretch, Reg index) {
    x_ = {b_.add(b_.arg(LinearArgs::x), b_.mul(index, b_.arg(LinearArgs::x_stretch_stride)))};
    const bool one_block = one_block_ || weights_.size() > 1;
    const bool once = one_block || first_block_unpacks();
    for (TwelveBitsReader& reader : readers_) reader.begin_stretch(once);
    if (unpacks() && !first_block_unpacks()) emit_unpack(stretch.count);
    if (!one_block) sums_ = b_.arg(LinearArgs::partial_sums);
    if (spec_.many_blocks) ahead_ = b_.copy(next_stretch());
    std::optional<PanelRows> output;  // of many blocks: each is finished beside the next's products
    if (spec_.many_blocks && stretch.last) output.emplace(b_, spec_, panel());
    const auto emit_block = [&] {
      if (output) output->ask(b_.constant(rows_));
      for (int part = 0; part < part_count(); ++part) {
        emit_products(part, stretch.count);
        if (one_block) sums_ = b_.arg(LinearArgs::partial_sums);
        const Reg one = stretch.add ? b_.splat(1.0f) : Reg{};
        each_sum(part, [&](std::size_t row, std::size_t j, Address sum) {
          if (stretch.add) b_.fma_load(accumulators_[row][j], one, sum);
          b_.store(Element::f32, sum, accumulators_[row][j]);
        });
      }
      if (one_block) return;
      b_.add_to(x_[0], b_.arg(LinearArgs::x_block_stride));
      if (output) return output->finish(b_.constant(rows_), sums_);
      b_.add_to(sums_, rows_ * kPartialSumsBytesPerRow);
    };
    if (one_block) {
      emit_block();
    } else if (first_block_unpacks()) {
      kept_ = b_.copy(b_.arg(LinearArgs::unpacked));
      emit_block();
      kept_ = {};
      readers_[0].end_stretch();
      weights_[0] = b_.arg(LinearArgs::unpacked);
      b_.loop(b_.add(b_.arg(LinearArgs::block_count), -1), emit_block);
    } else {
      b_.loop(b_.arg(LinearArgs::block_count), emit_block);
    }
    if (spec_.rest > 0) {
      begin_blocks(spec_.rest);
      emit_block();
      begin_blocks(spec_.rows);
    }
    if (unpacks()) return;
    for (TwelveBitsReader& reader : readers_) reader.end_stretch();
  }

  // The next `count` of k, with the weight's address at them.
  void emit_unpack(std::int64_t count) {
    const Reg to = b_.copy(b_.arg(LinearArgs::unpacked));
    weights_[0] = b_.arg(LinearArgs::unpacked);
    if (!widens()) return readers_[0].unpack_stretch(count, to, 0);
    if (spec_.weight == DataType::bf16) odd_mask_ = b_.splat_bits(0xffff0000u);
    if (spec_.twelve_bits) {
      return readers_[0].unpack_stretch(
          count, to, 2 * twelve_bits::kPlainStepBytes, 0,
          [&](int pair, int vector, Reg loaded) { store_widened(to, pair, vector, loaded); });
    }
    b_.loop(b_.constant((count + 1) / 2), [&] {
      for (int vector = 0; vector < panel_vectors(); ++vector) {
        store_widened(to, 0, vector,
                      b_.load(Element::i32, b_.at(stored_, vector * b_.vector_bytes())));
      }
      b_.add_to(stored_, kStepBytes);
      b_.add_to(to, 2 * kStepBytes);
    });
  }

  // A vector of pairs of k, the pair `pair` behind `to`, as fp32.
  void store_widened(Reg to, int pair, int vector, Reg loaded) {
    for (int odd = 0; odd < 2; ++odd) {
      b_.store(Element::f32, b_.at(to, (2 * pair + odd) * kStepBytes + vector * b_.vector_bytes()),
               widened(loaded, odd != 0));
    }
  }

  // --- the sums so far: a row's vectors of the panel in order, rows one below the other (several
  // panels' of one row likewise)

  int sum_rows() const { return rows_ * static_cast<int>(weights_.size()); }

  void clear_sums() {
    Reg zero = b_.zero();
    sums_ = b_.arg(LinearArgs::partial_sums);
    const auto streams = static_cast<std::int64_t>(weights_.size());
    b_.loop(streams > 1 ? b_.mul(row_count(), streams) : row_count(), [&] {
      for (int i = 0; i < panel_vectors(); ++i) b_.store(Element::f32, sum_address(0, i), zero);
      b_.add_to(sums_, kPartialSumsBytesPerRow);
    });
  }

  Address sum_address(int row, int vector) const {
    return b_.at(sums_, row * kPartialSumsBytesPerRow + vector * b_.vector_bytes());
  }

  template <class Visit>
  void each_sum(int part, const Visit& visit) {
    const std::vector<int> vectors = part_vectors(part);
    for (int row = 0; row < sum_rows(); ++row) {
      for (std::size_t j = 0; j < vectors.size(); ++j) {
        visit(static_cast<std::size_t>(row), j, sum_address(row, vectors[j]));
      }
    }
  }

  // Moves the pointers by `count` of k, a multiple of a step and, with x in pieces, of a piece.
  void advance_k(std::int64_t count) {
    advance_weights(count / step_length() * kStepBytes);
    advance_x(count);
  }

  void advance_weights(std::int64_t bytes) {
    for (Reg weight : weights_) b_.add_to(weight, bytes);
  }

  void advance_x(std::int64_t count) {
    const int rows = spec_.many_blocks ? rows_ : 1;
    for (Reg pointer : x_) b_.add_to(pointer, count * input_bytes() * rows);
  }

  // As stored, if not in 12 bits.
  std::int64_t stretch_bytes() const {
    return kPartialSumLength / (spec_.weight == DataType::f32 ? 1 : 2) * kStepBytes;
  }

  // A step is one line run of the panel: one k, or a pair.
  int step_length() const { return is_f32() ? 1 : 2; }

  // Steps of a turn of the inner loop. x in pieces moves from piece to piece.
  int unroll() const {
    if (spec_.many_blocks) return piece_bytes(spec_.lanes) / input_bytes() / step_length();
    return is_f32() || rows_ <= kFewRows ? 4 : 2;
  }

  // --- the sum over k

  void begin_products() {
    x_.resize(1);  // the others follow from the first, which moves from block to block
    x_stride_ = b_.arg(LinearArgs::x_row_stride);
    while (static_cast<int>(x_.size()) < pointer_count()) {
      x_.push_back(b_.add(x_.back(), b_.mul(x_stride_, kRowsPerPointer)));
    }
    if (spec_.weight == DataType::bf16 && !is_f32() && !dots()) {
      odd_mask_ = b_.splat_bits(0xffff0000u);
    }
    accumulators_.assign(static_cast<std::size_t>(sum_rows()), {});
    for (auto& row : accumulators_) {
      for (int j = 0; j < vectors_; ++j) row.push_back(b_.zero());
    }
  }

  // The accumulators: the sums over the next `count` of k. The pointers stay.
  void emit_products(int part, std::int64_t count) {
    begin_products();
    if (spec_.twelve_bits && (keeps() || !unpacks())) return emit_twelve_bits_products(part, count);
    const std::int64_t steps = count / step_length();
    const std::int64_t turns = steps / unroll();
    if (turns > 0) {
      b_.loop(b_.constant(turns), [&] {
        if (asks(part)) ask_for_lines();
        each_stream([&] {
          for (int u = 0; u < unroll(); ++u) emit_step(part, u, step_length());
        });
        advance_k(unroll() * step_length());
      });
      if (asks(part) && asks_for_one_block()) readers_[0].ask_again(turns * lines_of_turn());
    }
    const int rest = static_cast<int>(steps % unroll());
    each_stream([&] {
      for (int u = 0; u < rest; ++u) emit_step(part, u, step_length());
      // The last k of an odd number: its pair is padding in the weight but not there in x.
      if (count % step_length() != 0) emit_step(part, rest, 1);
    });
    if (turns > 0) advance_k(-turns * unroll() * step_length());
  }

  template <class Body>
  void each_stream(const Body& body) {
    for (stream_ = 0; stream_ < weights_.size(); ++stream_) body();
    stream_ = 0;
  }

  // The sum of a row of x and the part's vector j, of the stream at hand.
  Reg accumulator(int row, std::size_t j) const {
    return accumulators_[stream_ * static_cast<std::size_t>(rows_) + static_cast<std::size_t>(row)]
                        [j];
  }

  // A vector of weights at a time: its pairs, x and all accumulators just fit AVX2's registers.
  void emit_twelve_bits_products(int part, std::int64_t count) {
    const std::vector<int> columns = part_vectors(part);
    TwelveBitsReader::each_step(readers_, count, [&](std::size_t reader, bool plain, int length) {
      stream_ = reader;
      if (asks(part)) {
        ask_ahead(
            [&](std::int64_t distance, int level) { readers_[stream_].prefetch(distance, level); });
      }
      for (int k = 0; k < length; k += kHalfLength) {
        emit_twelve_bits_half(columns, plain, k, std::min(k + kHalfLength, length));
      }
      if (stream_ + 1 == readers_.size()) advance_x(length);
      if (keeps()) b_.add_to(kept_, twelve_bits::kPlainStepBytes);
    });
    stream_ = 0;
    advance_x(-count);
  }

  // The products of k in [k, end), a half of a step. AVX-512 has registers for all vectors' pairs,
  // so that they share the x: with 8 rows, which load one per product otherwise, 1.2 times as fast
  // (4 rows wait for memory, and were no faster).
  void emit_twelve_bits_half(const std::vector<int>& columns, bool plain, int k, int end) {
    std::vector<Reg> x;  // of a single row, for all vectors
    for (int i = k; i < end && rows_ == 1 && !dots(); ++i) x.push_back(broadcast(0, i));
    const std::size_t together = one_block_ || keeps() ? columns.size() : 1;
    for (std::size_t first = 0; first < columns.size(); first += together) {
      std::vector<std::array<Reg, 2>> pairs;
      for (std::size_t j = first; j < first + together; ++j) {
        pairs.push_back(readers_[stream_].pairs(plain, k / kHalfLength, columns[j]));
        if (keeps()) keep(pairs.back(), k / 2, columns[j]);
      }
      for (int i = k; i < end; i += dots() ? 2 : 1) {
        const auto at = static_cast<std::size_t>(i - k);
        std::vector<Reg> w;
        for (const std::array<Reg, 2>& pair : pairs) {
          w.push_back(dots() ? pair[at / 2] : widened(pair[at / 2], at % 2 != 0));
        }
        for (int row = 0; row < rows_; ++row) {
          const Reg factor = x.empty() ? broadcast(row, i) : x[at];
          for (std::size_t j = 0; j < w.size(); ++j) {
            multiply_add(accumulator(row, first + j), w[j], factor);
          }
        }
      }
    }
  }

  // Two pairs of a step, the first of them `pair`, for the blocks that follow.
  void keep(const std::array<Reg, 2>& pairs, int pair, int vector) {
    for (int i = 0; i < 2; ++i) {
      b_.store(Element::i32, b_.at(kept_, (pair + i) * kStepBytes + vector * b_.vector_bytes()),
               pairs[static_cast<std::size_t>(i)]);
    }
  }

  void multiply_add(Reg sum, Reg w, Reg x) {
    if (dots()) {
      b_.dot_bf16(sum, w, x);
    } else {
      b_.fma(sum, x, w);
    }
  }

  // Step `step` from the pointers: `count` values of k.
  void emit_step(int part, int step, int count) {
    const std::vector<int> columns = part_vectors(part);
    prefetch_step(part, step);
    const int first_k = is_f32() ? step : 2 * step;
    if (dots()) return emit_dots(columns, step);
    if (rows_ > kFewRows) {
      for (int i = 0; i < count; ++i) emit_many_rows(columns, step, first_k + i, i != 0);
      return;
    }
    std::vector<std::vector<Reg>> x(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      for (int row = 0; row < rows_; ++row) {
        x[static_cast<std::size_t>(i)].push_back(broadcast(row, first_k + i));
      }
    }
    for (std::size_t j = 0; j < columns.size(); ++j) emit_few_rows(x, columns[j], j, step);
  }

  // A pair of k for all rows and the part's columns.
  void emit_dots(const std::vector<int>& columns, int step) {
    std::vector<Reg> w;
    for (int vector : columns) w.push_back(load_weight(vector, step));
    for (int row = 0; row < rows_; ++row) {
      const Reg x = broadcast(row, 2 * step);
      for (std::size_t j = 0; j < w.size(); ++j) {
        b_.dot_bf16(accumulator(row, j), w[j], x);
      }
    }
  }

  // Who reads weights from end to end asks for them as far ahead as spec_.prefetch says. Who reads
  // a stretch at once and then multiplies for long, asks for the next one meanwhile, a few lines in
  // each turn: a core has so many requests at once, and memory nothing to do during the products.
  // - Unpacking for a block of 5 to 12 rows, which had asked as it read: 1.2 to 1.4 times as fast.
  // - Many blocks, which find the stretch in L1 after the first. Each asks for some of the next,
  //   and more blocks than one stretch needs for those behind it. Asking at the beginning of a
  //   block, and for fewer lines, was 0.92 as fast with 128 rows and 0.99 with 512.
  void ask_for_lines() {
    if (asks_for_one_block()) return readers_[0].ask_for_next(lines_of_turn(), spec_.prefetch);
    if (!spec_.many_blocks) return;
    for (std::int64_t line = 0; line < lines_of_turn(); ++line) {
      b_.prefetch(b_.at(ahead_, line * kLineBytes), 1);
    }
    b_.add_to(ahead_, lines_of_turn() * kLineBytes);
  }

  bool asks_for_one_block() const {
    return unpacks() && !first_block_unpacks() && !spec_.many_blocks && spec_.prefetch > 0;
  }

  std::int64_t lines_of_turn() const {
    const std::int64_t twelve = twelve_bits::kStretchSteps * twelve_bits::kStepBytes;
    const std::int64_t lines = (spec_.twelve_bits ? twelve : stretch_bytes()) / kLineBytes;
    const std::int64_t turns = kPartialSumLength / (unroll() * step_length());
    const std::int64_t blocks = spec_.many_blocks ? kRowsPerStretch / rows_ : 1;
    return (lines + turns * blocks - 1) / (turns * blocks);
  }

  // Where the stretch behind the one at hand, which is unpacked if it has to be, is stored.
  Reg next_stretch() {
    if (spec_.twelve_bits) return readers_[0].next_stretch();
    return widens() ? stored_ : b_.add(weights_[0], stretch_bytes());
  }

  // ask(bytes ahead, level of cache above L1) for what comes from memory, and for what L2 has. How
  // far ahead of the loads is a choice of speed (ops/choices.def).
  template <class Ask>
  void ask_ahead(const Ask& ask) const {
    if (spec_.prefetch == 0) return;
    const bool twice = spec_.prefetch_near > 0;
    ask(spec_.prefetch, twice ? 1 : 0);
    if (twice) ask(spec_.prefetch_near, 0);
  }

  // The first part asks for the whole line run: two parts with every other line each would both
  // miss the stream that the hardware looks for. The last, smaller block finds all asked for.
  bool asks(int part) const { return part == 0 && rows_ == spec_.rows; }

  void prefetch_step(int part, int step) {
    if (!asks(part) || unpacks() || spec_.many_blocks) return;
    ask_ahead([&](std::int64_t distance, int level) {
      for (int line = 0; line < kStepBytes; line += kLineBytes) {
        b_.prefetch(b_.at(weights_[stream_], step * kStepBytes + distance + line), level);
      }
    });
  }

  // The part's vector j, which is the panel's `vector`, times all rows' x[k][row].
  void emit_few_rows(const std::vector<std::vector<Reg>>& x, int vector, std::size_t j, int step) {
    if (rows_ == 1 && is_f32()) {
      return b_.fma_load(accumulator(0, j), x[0][0], weight_address(vector, step));
    }
    Reg loaded = load_weight(vector, step);
    for (std::size_t k = 0; k < x.size(); ++k) {
      Reg w = is_f32() ? loaded : widened(loaded, k != 0);
      for (std::size_t row = 0; row < x[k].size(); ++row) {
        b_.fma(accumulator(static_cast<int>(row), j), x[k][row], w);
      }
    }
  }

  // One x at a time, the part's weights in registers.
  void emit_many_rows(const std::vector<int>& columns, int step, int k, bool odd) {
    std::vector<Reg> w;
    for (int vector : columns) {
      const Reg loaded = load_weight(vector, step);
      w.push_back(is_f32() ? loaded : widened(loaded, odd));
    }
    for (int row = 0; row < rows_; ++row) {
      Reg x = broadcast(row, k);
      for (std::size_t j = 0; j < w.size(); ++j) {
        b_.fma(accumulator(row, j), x, w[j]);
      }
    }
  }

  Address weight_address(int vector, int step) const {
    return b_.at(weights_[stream_], step * kStepBytes + vector * b_.vector_bytes());
  }

  Reg load_weight(int vector, int step) {
    return b_.load(is_f32() ? Element::f32 : Element::i32, weight_address(vector, step));
  }

  // What load_weight gave as f32. A lane of a 16-bit type is a pair of one column: the even k in
  // its low half, the odd one in its high half.
  Reg widened(Reg loaded, bool odd) {
    if (spec_.weight == DataType::f16) {
      return b_.low_f16_to_f32(odd ? b_.vshift_right(loaded, 16) : loaded);
    }
    return odd ? b_.vand(loaded, odd_mask_) : b_.vshift_left(loaded, 16);
  }

  // x of one k, or of a pair.
  Reg broadcast(int row, int k) {
    return b_.broadcast(dots() ? Element::i32 : Element::f32, x_address(row, k * input_bytes()));
  }

  Address x_address(int row, std::int64_t offset) const {
    if (spec_.many_blocks) return b_.at(x_[0], row * piece_bytes(spec_.lanes) + offset);
    Reg pointer = x_[static_cast<std::size_t>(row / kRowsPerPointer)];
    const int strides = row % kRowsPerPointer;
    return strides == 0 ? b_.at(pointer, offset) : b_.at(pointer, x_stride_, strides, offset);
  }

  const LinearKernel& spec_;
  Builder b_;
  bool in_registers_;         // where weights in 12 bits are unpacked
  bool one_block_ = false;    // the call's only one: no registers to find the next
  int rows_;                  // of the block at hand
  int vectors_;               // accumulators of its rows in one part, each
  Reg panels_left_;           // the next one included; with two streams of the first half
  std::vector<Reg> weights_;  // the stretch of each panel at hand, mostly one, then moved along k
  std::vector<TwelveBitsReader> readers_;  // likewise, of weights in 12 bits
  std::size_t stream_ = 0;                 // which of them
  Reg sums_;                               // of the block or the row
  Reg stored_;                             // the next stretch, if it is widened
  Reg kept_;                               // where to keep what is unpacked beside the products
  Reg ahead_;                              // weights of the next stretch that are not asked for yet
  std::vector<Reg> x_;                     // rows 0, 3, 6, 9 of the block, moved along k
  Reg x_stride_, odd_mask_;
  std::vector<std::vector<Reg>> accumulators_;  // [row, or panel][vector of the part]
};

}  // namespace

int most_rows_in_streams(int lanes) { return lanes == 16 ? 4 : 1; }

jit::vir::Function build_vectors(const LinearKernel& spec) { return VectorBuilder(spec).run(); }

}  // namespace tilewright::ops
