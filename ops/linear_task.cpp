// See linear_task.h.
//
// Tested by program_test and task_test.
#include "ops/linear_task.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "ops/rope_kernel.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

std::int64_t padded_bytes(std::int64_t columns, graph::DataType type) {
  return (columns * graph::size_in_bytes(type) + 63) / 64 * 64;
}

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Of packed x: f32.
std::int64_t stretch_bytes() { return partial_sum_length() * 4; }

// All rows, one thread's panels.
class LinearRun {
 public:
  LinearRun(const LinearTask& task, const Frame& frame, int thread, WorkRange panels)
      : task_(task),
        panels_(panels),
        x_(task.x.address(frame)),
        y_(task.y.address(frame)),
        x_stride_(frame.dim(task.x_stride) * task.x.element_bytes),
        y_stride_(frame.dim(task.y_stride) * task.y.element_bytes) {
    const std::int64_t rows = frame.dim(task.rows);
    char* scratch = frame.scratch[static_cast<std::size_t>(thread)];
    packed_ = scratch + chunk_rows(task, rows) * kPartialSumsBytesPerRow;
    arguments_[LinearArgs::partial_sums] = argument(scratch);
    arguments_[LinearArgs::weight] = argument(task.weight->data.get());
    arguments_[LinearArgs::unpacked] =
        argument(scratch + scratch_bytes(task, rows) - unpacked_bytes());
    arguments_[LinearArgs::y_row_stride] = y_stride_;
    if (task.spec.epilogue.bias) arguments_[LinearArgs::bias] = argument(task.bias.address(frame));
    if (task.spec.epilogue.residual) {
      residual_ = task.residual.address(frame);
      residual_stride_ = frame.dim(task.residual_stride) * task.residual.element_bytes;
      arguments_[LinearArgs::residual_row_stride] = residual_stride_;
    }
  }

  void run(std::int64_t rows) {
    const std::int64_t chunk = chunk_rows(task_, rows);
    const bool pack = packs(task_, rows);
    for (std::int64_t first = 0; first < rows; first += chunk) {
      run_chunk(first, std::min(chunk, rows - first), pack);
    }
  }

 private:
  void run_chunk(std::int64_t first, std::int64_t rows, bool pack) {
    if (pack) pack_rows(first, rows);
    // Rows that need several kernels take the panels one by one: each is still in cache for the
    // next kernel, where a second pass over all of them would read the weights from memory again.
    const bool one_kernel = rows % task_.variants[0].rows == 0 ||
                            std::any_of(task_.variants.begin(), task_.variants.end(),
                                        [&](const auto& variant) { return variant.rows == rows; });
    const std::int64_t panels_at_once = one_kernel ? panels_.end - panels_.begin : 1;
    arguments_[LinearArgs::panel_count] = panels_at_once;
    for (std::int64_t panel = panels_.begin; panel < panels_.end; panel += panels_at_once) {
      arguments_[LinearArgs::panel_begin] = panel;
      for_row_blocks(
          task_, rows,
          [&](const LinearTask::Variant& variant, std::int64_t begin, std::int64_t blocks) {
            if (pack) {
              point_to_packed(begin, variant.rows, rows);
            } else {
              point_to_rows(first + begin, variant.rows);
            }
            arguments_[LinearArgs::y] = argument(y_ + (first + begin) * y_stride_);
            arguments_[LinearArgs::residual] =
                argument(residual_ + (first + begin) * residual_stride_);
            arguments_[LinearArgs::block_count] = blocks;
            variant.kernel->function(arguments_);
          });
    }
  }

  void point_to_rows(std::int64_t first, int block) {
    arguments_[LinearArgs::x] = argument(x_ + first * x_stride_);
    arguments_[LinearArgs::x_row_stride] = x_stride_;
    arguments_[LinearArgs::x_block_stride] = block * x_stride_;
    arguments_[LinearArgs::x_stretch_stride] = stretch_bytes();
  }

  void point_to_packed(std::int64_t begin, int block, std::int64_t rows) {
    arguments_[LinearArgs::x] = argument(packed_ + begin * stretch_bytes());
    arguments_[LinearArgs::x_row_stride] = stretch_bytes();
    arguments_[LinearArgs::x_block_stride] = block * stretch_bytes();
    arguments_[LinearArgs::x_stretch_stride] = rows * stretch_bytes();
  }

  void pack_rows(std::int64_t first, std::int64_t rows) const {
    std::int64_t arguments[CopyArgs::count];
    arguments[CopyArgs::rows] = rows;
    arguments[CopyArgs::x_row_stride] = x_stride_;
    arguments[CopyArgs::y_row_stride] = stretch_bytes();
    char* to = packed_;
    for (std::int64_t k = 0; k < task_.spec.k; k += partial_sum_length()) {
      arguments[CopyArgs::columns] = std::min(partial_sum_length(), task_.spec.k - k);
      arguments[CopyArgs::x] = argument(x_ + first * x_stride_ + k * task_.x.element_bytes);
      arguments[CopyArgs::y] = argument(to);
      task_.copy->function(arguments);
      to += rows * stretch_bytes();
    }
  }

  const LinearTask& task_;
  WorkRange panels_;
  const char* x_;
  char* y_;
  const char* residual_ = nullptr;
  std::int64_t x_stride_, y_stride_, residual_stride_ = 0;
  char* packed_;  // x of a chunk
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
    y_ = x_ + task.variants[0].rows * padded_bytes(task.spec.k, graph::DataType::f32);
    char* sums = y_ + task.variants[0].rows * padded_bytes(task.spec.n, task.spec.output);
    arguments_[LinearArgs::partial_sums] = argument(sums);
    arguments_[LinearArgs::weight] = argument(task.weight->data.get());
    arguments_[LinearArgs::unpacked] =
        argument(sums) + kPartialSumsBytesPerRow * task.variants[0].rows;
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
        task_, count,
        [&](const LinearTask::Variant& variant, std::int64_t first, std::int64_t blocks) {
          for (std::int64_t block = 0; block < blocks; ++block) {
            multiply(variant, rows_ + first + block * variant.rows);
          }
        });
  }

 private:
  void multiply(const LinearTask::Variant& variant, const std::int64_t* rows) {
    const std::int64_t x_pitch = padded_bytes(task_.spec.k, graph::DataType::f32);
    const std::int64_t x_stride = frame_.dim(task_.x_stride) * task_.x.element_bytes;
    std::int64_t copy[CopyArgs::count];
    copy[CopyArgs::rows] = 1;
    copy[CopyArgs::columns] = task_.spec.k;
    copy[CopyArgs::x_row_stride] = copy[CopyArgs::y_row_stride] = 0;
    for (int i = 0; i < variant.rows; ++i) {
      copy[CopyArgs::x] = argument(task_.x.address(frame_) + rows[i] / choice_.choices * x_stride);
      copy[CopyArgs::y] = argument(x_ + i * x_pitch);
      task_.copy->function(copy);
    }
    const std::int64_t pitch = padded_bytes(task_.spec.n, task_.spec.output);
    arguments_[LinearArgs::x] = argument(x_);
    arguments_[LinearArgs::x_row_stride] = x_pitch;
    arguments_[LinearArgs::x_block_stride] = variant.rows * x_pitch;
    arguments_[LinearArgs::x_stretch_stride] = stretch_bytes();
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

void run_experts(const LinearTask& task, const Frame& frame, int thread, WorkRange panels) {
  const ExpertChoice& choice = *task.experts;
  const auto* indices = reinterpret_cast<const std::int64_t*>(choice.indices.address(frame));
  for (std::int64_t row = 0; row < frame.dim(task.rows); ++row) {
    if (indices[row] < 0 || indices[row] >= choice.experts) {
      frame.problem->store("expert_linear: an index is out of range");
      return;
    }
  }
  ExpertRun run(task, frame, thread, panels);
  for (std::int64_t expert = 0; expert < choice.experts; ++expert) run.run(expert);
}

}  // namespace

void run(const LinearTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange panels = share(panel_count(task.spec.n), thread, threads);
  if (panels.begin == panels.end) return;
  if (task.experts) return run_experts(task, frame, thread, panels);
  LinearRun(task, frame, thread, panels).run(frame.dim(task.rows));
}

std::int64_t chunk_rows(const LinearTask& task, std::int64_t rows) {
  const std::int64_t chunks = (rows + task.most_rows - 1) / task.most_rows;
  if (chunks == 0) return task.many.rows;
  return round_up((rows + chunks - 1) / chunks, task.many.rows);
}

// A copy costs about as much as half a panel, and must be paid back by the others.
bool packs(const LinearTask& task, std::int64_t rows) {
  if (task.x_type != graph::DataType::f32) return true;
  return rows >= task.many_blocks * task.many.rows && panel_count(task.spec.n) >= task.pack_panels;
}

std::int64_t scratch_bytes(const LinearTask& task, std::int64_t rows) {
  if (!task.experts) {
    const std::int64_t stretches =
        round_up(task.spec.k, partial_sum_length()) / partial_sum_length();
    return chunk_rows(task, rows) *
               (kPartialSumsBytesPerRow + (packs(task, rows) ? stretches * stretch_bytes() : 0)) +
           unpacked_bytes();
  }
  return (rows * 8 + 63) / 64 * 64 +
         task.variants[0].rows *
             (padded_bytes(task.spec.k, graph::DataType::f32) +
              padded_bytes(task.spec.n, task.spec.output) + kPartialSumsBytesPerRow) +
         unpacked_bytes();
}

}  // namespace tilewright::ops
