// See linear_task.h.
//
// Tested by program_test, task_test, in_place_test and shared_packing_test.
#include "ops/linear_task.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "jit/base/round_up.h"
#include "ops/gemm/arithmetic.h"
#include "ops/rope_kernel.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

std::int64_t padded_bytes(std::int64_t columns, graph::DataType type) {
  return (columns * graph::size_in_bytes(type) + 63) / 64 * 64;
}

// Of packed x.
std::int64_t stretch_bytes(const LinearKernel& spec) {
  return partial_sum_length() * size_in_bytes(input_type(spec));
}

// Pairs of k need both: a row of an odd k ends with a zero.
bool is_padded(const LinearKernel& spec) {
  return spec.arithmetic == Arithmetic::dot && spec.k % 2 != 0;
}

// Of a gathered row of x.
std::int64_t row_bytes(const LinearKernel& spec) {
  return padded_bytes(spec.k + (is_padded(spec) ? 1 : 0), input_type(spec));
}

std::int64_t stretch_count(const LinearKernel& spec) {
  return round_up(spec.k, partial_sum_length()) / partial_sum_length();
}

bool shares_packing(const LinearTask& task, std::int64_t rows) {
  return packs(task, rows) && rows >= task.many_blocks * task.many.rows;
}

// Of a thread that packs a panel before it multiplies by it.
std::int64_t panel_scratch(const LinearTask& task) {
  const LinearKernel& spec = task.spec;
  return task.weight->in_place ? packed_bytes(panel_columns(), spec.k, spec.weight) : 0;
}

// The panels of a weight as a thread's kernels find them.
class Panels {
 public:
  // scratch: of panel_scratch() bytes, 64-byte aligned.
  Panels(const LinearTask& task, char* scratch) : task_(task), scratch_(scratch) {}

  // How many of `count` panels a kernel may be called with.
  std::int64_t at_once(std::int64_t count) const { return task_.weight->in_place ? 1 : count; }

  // Brings the panels from this one on within reach: what kernels take as the weight's address.
  std::int64_t bring(std::int64_t panel) const {
    const PackedWeight& weight = *task_.weight;
    if (!weight.in_place) return argument(weight.data.get());
    const graph::DataType dtype = weight.form.dtype;
    pack_panel(weight.in_place->blocks, weight.k, dtype, dtype, weight.in_place->gated, panel,
               scratch_);
    return argument(scratch_) - panel * panel_scratch(task_);
  }

 private:
  const LinearTask& task_;
  char* scratch_;
};

// For rows by vectors. A thread's: partial sums, the weights of a stretch, x that it packs alone.
ScratchSizes vector_scratch(const LinearTask& task, std::int64_t rows) {
  const std::int64_t chunk = chunk_rows(task, rows);
  const std::int64_t x_bytes =
      packs(task, rows) ? chunk * stretch_count(task.spec) * stretch_bytes(task.spec) : 0;
  ScratchSizes sizes{.thread_bytes =
                         panel_scratch(task) + partial_sums_bytes(chunk) + unpacked_bytes()};
  (shares_packing(task, rows) ? sizes.packed_bytes : sizes.thread_bytes) += x_bytes;
  return sizes;
}

void put_zero(char* to) { std::memset(to, 0, sizeof(std::uint16_t)); }

// Where rows of x, y and the residual begin.
struct RowPlaces {
  const char* x;
  char* y;
  const char* residual = nullptr;
  std::int64_t x_stride, y_stride, residual_stride = 0;  // bytes

  RowPlaces(const LinearTask& task, const Frame& frame)
      : x(task.x.address(frame)),
        y(task.y.address(frame)),
        x_stride(frame.dim(task.x_stride) * task.x.element_bytes),
        y_stride(frame.dim(task.y_stride) * task.y.element_bytes) {
    if (!task.spec.epilogue.residual) return;
    residual = task.residual.address(frame);
    residual_stride = frame.dim(task.residual_stride) * task.residual.element_bytes;
  }

  RowPlaces from(std::int64_t row) const {
    RowPlaces places = *this;
    places.x += row * x_stride;
    places.y += row * y_stride;
    places.residual += row * residual_stride;
    return places;
  }
};

// Who computes: one of the threads of a team.
struct Member {
  int thread, threads;
  WorkRange share(std::int64_t count) const { return ops::share(count, thread, threads); }
};

// Rows from `places` on, one thread's panels, by vectors. Between two barriers, if the turn has a
// number.
class LinearRun {
 public:
  LinearRun(const LinearTask& task, const Frame& frame, Member member, const Turn& turn,
            const RowPlaces& places, std::int64_t rows)
      : task_(task),
        frame_(frame),
        member_(member),
        turn_(turn),
        weight_(task, frame.scratch[static_cast<std::size_t>(member.thread)]),
        places_(places),
        rows_(rows) {
    char* sums = frame.scratch[static_cast<std::size_t>(member.thread)] + panel_scratch(task);
    char* unpacked = sums + partial_sums_bytes(chunk_rows(task, rows));
    packed_ = shares_packing(task, rows) ? frame.packed : unpacked + unpacked_bytes();
    arguments_[LinearArgs::partial_sums] = argument(sums);
    arguments_[LinearArgs::unpacked] = argument(unpacked);
    arguments_[LinearArgs::y_row_stride] = places.y_stride;
    arguments_[LinearArgs::residual_row_stride] = places.residual_stride;
    if (task.spec.epilogue.bias) arguments_[LinearArgs::bias] = argument(task.bias.address(frame));
  }

  void run() {
    const std::int64_t chunk = chunk_rows(task_, rows_);
    const bool pack = packs(task_, rows_);
    for (std::int64_t first = 0; first < rows_; first += chunk) {
      run_chunk(first, std::min(chunk, rows_ - first), pack);
    }
  }

 private:
  void run_chunk(std::int64_t first, std::int64_t rows, bool pack) {
    if (pack) pack_rows(first, rows);
    share_with_tails(panels(rows), member_.thread, member_.threads, turn_of_chunk(first, rows),
                     [&](WorkRange panels) { run_panels(panels, first, rows, pack); });
  }

  // Multiplying more than some 8 rows takes longer than reading the weights.
  Items panels(std::int64_t rows) const {
    const std::int64_t count = panel_count(task_.spec.n);
    return {count, task_.weight->bytes / count * std::max<std::int64_t>(rows / 8, 1)};
  }

  // Chunks are separated by barriers where their packing is shared.
  Turn turn_of_chunk(std::int64_t first, std::int64_t rows) const {
    if (rows == rows_) return turn_;
    return shares_packing(task_, rows_) ? turn_.part(first / chunk_rows(task_, rows_)) : Turn{};
  }

  void run_panels(WorkRange panels, std::int64_t first, std::int64_t rows, bool pack) {
    if (panels.begin == panels.end) return;
    // Rows that need several kernels take the panels one by one: each is still in cache for the
    // next kernel, where a second pass over all of them would read the weights from memory again.
    int kernels = 0;
    for_row_blocks(task_, rows, pack, [&](const auto&, std::int64_t, std::int64_t) { ++kernels; });
    const std::int64_t panels_at_once =
        weight_.at_once(kernels == 1 ? panels.end - panels.begin : 1);
    arguments_[LinearArgs::panel_count] = panels_at_once;
    for (std::int64_t panel = panels.begin; panel < panels.end; panel += panels_at_once) {
      arguments_[LinearArgs::panel_begin] = panel;
      arguments_[LinearArgs::weight] = weight_.bring(panel);
      for_row_blocks(
          task_, rows, pack,
          [&](const LinearTask::Variant& variant, std::int64_t begin, std::int64_t blocks) {
            if (pack) {
              point_to_packed(begin, variant.rows, rows);
            } else {
              point_to_rows(first + begin, variant.rows);
            }
            const RowPlaces places = places_.from(first + begin);
            arguments_[LinearArgs::y] = argument(places.y);
            arguments_[LinearArgs::residual] = argument(places.residual);
            arguments_[LinearArgs::block_count] = blocks;
            variant.kernel->function(arguments_);
          });
    }
  }

  void point_to_rows(std::int64_t first, int block) {
    arguments_[LinearArgs::x] = argument(places_.from(first).x);
    arguments_[LinearArgs::x_row_stride] = places_.x_stride;
    arguments_[LinearArgs::x_block_stride] = block * places_.x_stride;
    arguments_[LinearArgs::x_stretch_stride] = stretch_bytes(task_.spec);
  }

  void point_to_packed(std::int64_t begin, int block, std::int64_t rows) {
    arguments_[LinearArgs::x] = argument(packed_ + begin * stretch_bytes(task_.spec));
    arguments_[LinearArgs::x_row_stride] = stretch_bytes(task_.spec);
    arguments_[LinearArgs::x_block_stride] = block * stretch_bytes(task_.spec);
    arguments_[LinearArgs::x_stretch_stride] = rows * stretch_bytes(task_.spec);
  }

  void pack_rows(std::int64_t first, std::int64_t rows) const {
    if (!shares_packing(task_, rows_)) return pack_share(first, rows, {0, 1});
    frame_.meet(member_.threads);  // nobody reads the chunk before this any more
    pack_share(first, rows, member_);
    frame_.meet(member_.threads);
  }

  // Stretches of blocks, then of the rows after them: block by block, because a few rows that are
  // read from end to end come faster than parts of all of them do.
  void pack_share(std::int64_t first, std::int64_t rows, Member member) const {
    const std::int64_t in_pieces = rows_in_pieces(task_, rows), block = task_.many.rows;
    const std::int64_t stretches = stretch_count(task_.spec), bytes = stretch_bytes(task_.spec);
    const std::int64_t blocks = in_pieces / block + (rows > in_pieces ? 1 : 0);
    const WorkRange parts = member.share(blocks * stretches);
    for (std::int64_t part = parts.begin; part < parts.end; ++part) {
      const std::int64_t row = part / stretches * block, stretch = part % stretches;
      const std::int64_t k = stretch * partial_sum_length();
      const std::int64_t columns = std::min(partial_sum_length(), task_.spec.k - k);
      const char* x = places_.from(first + row).x + k * task_.x.element_bytes;
      char* to = packed_ + (stretch * rows + row) * bytes;
      if (row < in_pieces) {
        pack_pieces(x, columns, to);
      } else {
        copy(x, rows - row, columns, to, bytes);
      }
    }
  }

  // A block of rows. What does not fill a piece is copied as rows as long as one.
  void pack_pieces(const char* x, std::int64_t columns, char* to) const {
    const int block = task_.many.rows, piece = piece_bytes(task_.spec.lanes);
    const std::int64_t length = piece / size_in_bytes(input_type(task_.spec));
    const std::int64_t pieces = columns / length, rest = columns % length;
    if (pieces > 0) {
      std::int64_t arguments[PieceArgs::count];
      arguments[PieceArgs::rows] = block;
      arguments[PieceArgs::pieces] = pieces;
      arguments[PieceArgs::x] = argument(x);
      arguments[PieceArgs::x_row_stride] = places_.x_stride;
      arguments[PieceArgs::y] = argument(to);
      task_.pieces->function(arguments);
    }
    if (rest == 0) return;
    copy(x + pieces * length * task_.x.element_bytes, block, rest, to + pieces * block * piece,
         piece);
  }

  // Of an odd k the end of a row, in pairs, is a zero.
  void copy(const char* x, std::int64_t rows, std::int64_t columns, char* to,
            std::int64_t stride) const {
    if (rows == 0) return;
    std::int64_t arguments[CopyArgs::count];
    arguments[CopyArgs::rows] = rows;
    arguments[CopyArgs::columns] = columns;
    arguments[CopyArgs::x] = argument(x);
    arguments[CopyArgs::x_row_stride] = places_.x_stride;
    arguments[CopyArgs::y] = argument(to);
    arguments[CopyArgs::y_row_stride] = stride;
    task_.copy->function(arguments);
    if (!is_padded(task_.spec) || columns % 2 == 0) return;
    for (std::int64_t row = 0; row < rows; ++row) {
      put_zero(to + row * stride + columns * size_in_bytes(DataType::bf16));
    }
  }

  const LinearTask& task_;
  const Frame& frame_;
  Member member_;
  Turn turn_;
  Panels weight_;
  RowPlaces places_;
  std::int64_t rows_;
  char* packed_;  // x of a chunk
  std::int64_t arguments_[LinearArgs::count] = {};
};

TilePack pack_of(const LinearTask& task, int rows) {
  return {task.tiles->arithmetic, rows, task.spec.k};
}

// Where the pieces of scratch begin for chunks of so many rows by tiles: all multiples of 64. x and
// its magnitudes are shared by all threads.
struct TileScratch {
  std::int64_t sums, unpacked, panel, thread_bytes, magnitudes, x, packed_bytes;

  TileScratch(const LinearTask& task, std::int64_t rows) {
    const std::int64_t padded = round_up(rows, 2 * kTileRows);
    LinearKernel kernel = task.spec;
    kernel.arithmetic = task.tiles->arithmetic;
    kernel.rows = 2 * kTileRows;
    sums = kTileStateBytes;
    unpacked = sums + padded * kPartialSumsBytesPerRow;
    panel = unpacked + tile_scratch_bytes(kernel);
    thread_bytes = panel + panel_scratch(task);
    magnitudes = 0;
    x = kernel.arithmetic == Arithmetic::split_tiles ? padded * kMagnitudeBytes : 0;
    packed_bytes = x + padded / kTileRows * block_bytes(pack_of(task, kTileRows));
  }
};

// All rows, one thread's panels, by tiles.
class TileRun {
 public:
  TileRun(const LinearTask& task, const Frame& frame, Member member)
      : task_(task),
        frame_(frame),
        member_(member),
        panels_(member.share(panel_count(task.spec.n))),
        places_(task, frame),
        chunk_(tile_chunk_rows(task, frame.dim(task.rows))),
        offsets_(task, chunk_),
        weight_(task, frame.scratch[static_cast<std::size_t>(member.thread)] + offsets_.panel) {
    char* scratch = frame.scratch[static_cast<std::size_t>(member.thread)];
    arguments_[LinearArgs::tile_state] = argument(scratch);
    arguments_[LinearArgs::partial_sums] = argument(scratch + offsets_.sums);
    arguments_[LinearArgs::unpacked] = argument(scratch + offsets_.unpacked);
    arguments_[LinearArgs::y_row_stride] = places_.y_stride;
    arguments_[LinearArgs::residual_row_stride] = places_.residual_stride;
    if (task.spec.epilogue.bias) arguments_[LinearArgs::bias] = argument(task.bias.address(frame));
  }

  void run() {
    const std::int64_t rows = frame_.dim(task_.rows);
    for (std::int64_t first = 0; first < rows; first += chunk_) {
      run_chunk(places_.from(first), std::min(chunk_, rows - first));
    }
  }

 private:
  // A block's x, of packed x.
  char* packed(std::int64_t row) const {
    const std::int64_t row_bytes = block_bytes(pack_of(task_, kTileRows)) / kTileRows;
    return frame_.packed + offsets_.x + row * row_bytes;
  }

  void run_chunk(const RowPlaces& places, std::int64_t rows) {
    frame_.meet(member_.threads);  // nobody reads the chunk before this any more
    pack(places, rows);
    frame_.meet(member_.threads);
    if (!is_in_range(rows)) return LinearRun(task_, frame_, member_, {}, places, rows).run();
    if (panels_.begin == panels_.end) return;
    int parts = 0;
    for_tile_blocks(rows, [&](std::size_t, std::int64_t, std::int64_t) { ++parts; });
    // As by vectors: a second kernel finds each panel in cache.
    const std::int64_t panels_at_once =
        weight_.at_once(parts == 1 ? panels_.end - panels_.begin : 1);
    arguments_[LinearArgs::panel_count] = panels_at_once;
    for (std::int64_t panel = panels_.begin; panel < panels_.end; panel += panels_at_once) {
      arguments_[LinearArgs::panel_begin] = panel;
      arguments_[LinearArgs::weight] = weight_.bring(panel);
      for_tile_blocks(rows, [&](std::size_t index, std::int64_t first, std::int64_t count) {
        const LinearTask::Variant& variant = task_.tiles->variants[index];
        const RowPlaces begin = places.from(first);
        arguments_[LinearArgs::x] = argument(packed(first));
        arguments_[LinearArgs::y] = argument(begin.y);
        arguments_[LinearArgs::residual] = argument(begin.residual);
        arguments_[LinearArgs::row_count] = count;
        arguments_[LinearArgs::block_count] = round_up(count, variant.rows) / variant.rows;
        variant.kernel->function(arguments_);
      });
    }
  }

  // This thread's share of the blocks.
  void pack(const RowPlaces& places, std::int64_t rows) const {
    for_tile_blocks(rows, [&](std::size_t index, std::int64_t first, std::int64_t count) {
      const std::int64_t block = task_.tiles->variants[index].rows;
      const WorkRange blocks = member_.share(round_up(count, block) / block);
      std::int64_t arguments[TilePackArgs::count];
      arguments[TilePackArgs::x_row_stride] = places.x_stride;
      for (std::int64_t i = blocks.begin; i < blocks.end; ++i) {
        const std::int64_t row = first + i * block;
        arguments[TilePackArgs::x] = argument(places.from(row).x);
        arguments[TilePackArgs::row_count] = std::min(block, first + count - row);
        arguments[TilePackArgs::y] = argument(packed(row));
        arguments[TilePackArgs::magnitudes] =
            argument(frame_.packed + offsets_.magnitudes + row * kMagnitudeBytes);
        task_.tiles->packs[index]->function(arguments);
      }
    });
  }

  bool is_in_range(std::int64_t rows) const {
    if (task_.tiles->arithmetic != Arithmetic::split_tiles) return true;
    const auto* magnitudes =
        reinterpret_cast<const std::uint32_t*>(frame_.packed + offsets_.magnitudes);
    const auto count = static_cast<std::size_t>(rows * kMagnitudeBytes / 4);
    return in_range({magnitudes, count}, task_.tiles->largest_weight, task_.spec.k);
  }

  const LinearTask& task_;
  const Frame& frame_;
  Member member_;
  WorkRange panels_;
  RowPlaces places_;
  std::int64_t chunk_;
  TileScratch offsets_;
  Panels weight_;
  std::int64_t arguments_[LinearArgs::count] = {};
};

// Rows that are multiplied by the same expert, one thread's panels of their results. A block of
// rows is gathered, because a kernel wants rows at one stride, and its results are scattered.
class ExpertRun {
 public:
  ExpertRun(const LinearTask& task, const Frame& frame, int thread, WorkRange panels)
      : task_(task), frame_(frame), choice_(*task.experts), panels_(panels) {
    rows_ = reinterpret_cast<std::int64_t*>(frame.scratch[static_cast<std::size_t>(thread)]);
    const std::int64_t rows = frame.dim(task.rows);
    x_ = reinterpret_cast<char*>(rows_) + (rows * 8 + 63) / 64 * 64;
    y_ = x_ + task.variants[0].rows * row_bytes(task.spec);
    char* sums = y_ + task.variants[0].rows * padded_bytes(task.spec.n, task.spec.output);
    arguments_[LinearArgs::partial_sums] = argument(sums);
    arguments_[LinearArgs::weight] = argument(task.weight->data.get());
    arguments_[LinearArgs::unpacked] = argument(sums) + partial_sums_bytes(task.variants[0].rows);
    arguments_[LinearArgs::panel_count] = panels.end - panels.begin;
    arguments_[LinearArgs::block_count] = 1;
  }

  // The rows of this expert, in order.
  void run(std::int64_t expert) {
    const auto* indices = reinterpret_cast<const std::int64_t*>(choice_.indices.address(frame_));
    const std::int64_t rows = frame_.dim(task_.rows);
    std::int64_t count = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      if (indices[row] == expert) rows_[count++] = row;
    }
    first_panel_ = expert * panel_count(task_.spec.n);
    arguments_[LinearArgs::panel_begin] = first_panel_ + panels_.begin;
    if (task_.spec.epilogue.bias) {
      arguments_[LinearArgs::bias] = argument(task_.bias.address(frame_));
    }
    for_row_blocks(
        task_, count, false,
        [&](const LinearTask::Variant& variant, std::int64_t first, std::int64_t blocks) {
          for (std::int64_t block = 0; block < blocks; ++block) {
            multiply(variant, rows_ + first + block * variant.rows);
          }
        });
  }

 private:
  void multiply(const LinearTask::Variant& variant, const std::int64_t* rows) {
    const std::int64_t x_pitch = row_bytes(task_.spec);
    const std::int64_t x_stride = frame_.dim(task_.x_stride) * task_.x.element_bytes;
    std::int64_t copy[CopyArgs::count];
    copy[CopyArgs::rows] = 1;
    copy[CopyArgs::columns] = task_.spec.k;
    copy[CopyArgs::x_row_stride] = copy[CopyArgs::y_row_stride] = 0;
    for (int i = 0; i < variant.rows; ++i) {
      copy[CopyArgs::x] = argument(task_.x.address(frame_) + rows[i] / choice_.choices * x_stride);
      copy[CopyArgs::y] = argument(x_ + i * x_pitch);
      task_.copy->function(copy);
      if (is_padded(task_.spec)) put_zero(x_ + i * x_pitch + task_.spec.k * 2);
    }
    const std::int64_t pitch = padded_bytes(task_.spec.n, task_.spec.output);
    arguments_[LinearArgs::x] = argument(x_);
    arguments_[LinearArgs::x_row_stride] = x_pitch;
    arguments_[LinearArgs::x_block_stride] = variant.rows * x_pitch;
    arguments_[LinearArgs::x_stretch_stride] = stretch_bytes(task_.spec);
    // The kernel puts a panel where it lies in the stack of all experts.
    arguments_[LinearArgs::y] =
        argument(y_) - first_panel_ * panel_columns() * task_.y.element_bytes;
    arguments_[LinearArgs::y_row_stride] = pitch;
    variant.kernel->function(arguments_);
    const std::int64_t begin = panels_.begin * panel_columns() * task_.y.element_bytes;
    const std::int64_t end = panels_.end * panel_columns() * task_.y.element_bytes;
    const std::int64_t y_stride = frame_.dim(task_.y_stride) * task_.y.element_bytes;
    for (int i = 0; i < variant.rows; ++i) {
      std::memcpy(task_.y.address(frame_) + rows[i] * y_stride + begin, y_ + i * pitch + begin,
                  static_cast<std::size_t>(end - begin));
    }
  }

  const LinearTask& task_;
  const Frame& frame_;
  const ExpertChoice& choice_;
  WorkRange panels_;
  std::int64_t* rows_;
  char *x_, *y_;
  std::int64_t first_panel_ = 0;
  std::int64_t arguments_[LinearArgs::count] = {};
};

void run_experts(const LinearTask& task, const Frame& frame, Member member) {
  const WorkRange panels = member.share(panel_count(task.spec.n));
  if (panels.begin == panels.end) return;
  const ExpertChoice& choice = *task.experts;
  const auto* indices = reinterpret_cast<const std::int64_t*>(choice.indices.address(frame));
  for (std::int64_t row = 0; row < frame.dim(task.rows); ++row) {
    if (indices[row] < 0 || indices[row] >= choice.experts) {
      frame.problem->store("expert_linear: an index is out of range");
      return;
    }
  }
  ExpertRun run(task, frame, member.thread, panels);
  for (std::int64_t expert = 0; expert < choice.experts; ++expert) run.run(expert);
}

}  // namespace

void run(const LinearTask& task, const Frame& frame, int thread, int threads) {
  const Member member{thread, threads};
  if (task.experts) return run_experts(task, frame, member);
  const std::int64_t rows = frame.dim(task.rows);
  if (uses_tiles(task, rows)) return TileRun(task, frame, member).run();
  LinearRun(task, frame, member, frame.turn, RowPlaces(task, frame), rows).run();
}

bool uses_tiles(const LinearTask& task, std::int64_t rows) {
  return task.tiles && rows > most_rows_without_tiles;
}

std::int64_t chunk_rows(const LinearTask& task, std::int64_t rows) {
  const std::int64_t chunks = (rows + task.most_rows - 1) / task.most_rows;
  if (chunks == 0) return task.many.rows;
  return round_up((rows + chunks - 1) / chunks, task.many.rows);
}

std::int64_t tile_chunk_rows(const LinearTask& task, std::int64_t rows) {
  const std::int64_t chunks = (rows + task.tiles->most_rows - 1) / task.tiles->most_rows;
  return round_up((rows + chunks - 1) / chunks, 2 * kTileRows);
}

// A copy costs about as much as half a panel, and must be paid back by the others.
bool packs(const LinearTask& task, std::int64_t rows) {
  if (task.x_type != input_type(task.spec) || is_padded(task.spec)) return true;
  return rows >= task.many_blocks * task.many.rows && panel_count(task.spec.n) >= task.pack_panels;
}

ScratchSizes scratch_of(const LinearTask& task, const Frame& frame) {
  const std::int64_t rows = frame.dim(task.rows);
  if (task.experts) {
    return {.thread_bytes = (rows * 8 + 63) / 64 * 64 +
                            task.variants[0].rows * (row_bytes(task.spec) +
                                                     padded_bytes(task.spec.n, task.spec.output)) +
                            partial_sums_bytes(task.variants[0].rows) + unpacked_bytes()};
  }
  if (!uses_tiles(task, rows)) return vector_scratch(task, rows);
  const std::int64_t chunk = tile_chunk_rows(task, rows);
  const TileScratch tiles(task, chunk);
  ScratchSizes sizes{.thread_bytes = tiles.thread_bytes, .packed_bytes = tiles.packed_bytes};
  sizes.include(vector_scratch(task, std::min(chunk, rows)));
  sizes.include(vector_scratch(task, rows % chunk));
  return sizes;
}

}  // namespace tilewright::ops
