// The scalar references of the attention kernel and of the one that merges its parts: the same
// argument slots, in double, one key and one part after another.
//
// Tested by attention_test.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/attention/attention_kernel.h"
#include "ops/attention/key_blocks.h"
#include "ops/attention/merge_kernel.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

class Reference {
 public:
  Reference(const AttentionKernel& spec, const std::int64_t* args) : spec_(spec), args_(args) {}

  void run() const {
    for (int head = 0; head < spec_.group; ++head) attend(head);
  }

 private:
  std::int64_t arg(AttentionArgs::Slot slot) const { return args_[slot]; }

  double float_argument(AttentionArgs::Slot slot) const {
    return std::bit_cast<float>(static_cast<std::int32_t>(arg(slot)));
  }
  double head_number(AttentionArgs::Slot slot, int head) const {
    return reinterpret_cast<const float*>(arg(slot))[head];
  }

  // Element `index` of the token of a key, in k or v.
  double cached(AttentionArgs::Slot blocks, AttentionArgs::Slot stride, std::int64_t key,
                int index) const {
    const auto* table = reinterpret_cast<const char* const*>(arg(blocks));
    const std::int64_t per_block = arg(AttentionArgs::block_tokens);
    const char* block = table[key / per_block];
    const char* token = block + key % per_block * arg(stride);
    const double number = read_scalar(spec_.cache, token + index * size_in_bytes(spec_.cache));
    if (spec_.cache != graph::DataType::i8) return number;
    const char* scales = block - per_block * kScaleBytes;
    return number * read_scalar(graph::DataType::f32, scales + key % per_block * kScaleBytes);
  }

  double score(int head, std::int64_t key) const {
    const char* q = reinterpret_cast<const char*>(arg(AttentionArgs::q)) +
                    head * arg(AttentionArgs::q_head_stride);
    double sum = 0;
    for (int d = 0; d < spec_.head_dim; ++d) {
      sum += read_scalar(spec_.input, q + d * size_in_bytes(spec_.input)) *
             cached(AttentionArgs::k_blocks, AttentionArgs::k_token_stride, key, d);
    }
    sum *= float_argument(AttentionArgs::scale);
    if (spec_.softcap) {
      const double cap = float_argument(AttentionArgs::softcap);
      sum = cap * std::tanh(sum / cap);
    }
    if (spec_.slopes) {
      sum += head_number(AttentionArgs::slopes, head) *
             static_cast<double>(key - arg(AttentionArgs::origin));
    }
    const std::int64_t mask = arg(AttentionArgs::mask);
    if (spec_.mask == MaskKind::additive) sum += reinterpret_cast<const float*>(mask)[key];
    if (spec_.mask == MaskKind::boolean && reinterpret_cast<const std::uint8_t*>(mask)[key] == 0) {
      sum = -std::numeric_limits<double>::infinity();
    }
    return sum;
  }

  void attend(int head) const {
    const std::int64_t first = arg(AttentionArgs::first_key);
    std::vector<double> weights;
    double most = -std::numeric_limits<double>::infinity();
    for (std::int64_t i = 0; i < arg(AttentionArgs::key_count); ++i) {
      weights.push_back(score(head, first + i));
      most = std::max(most, weights.back());
    }
    double sum = 0;
    for (double& weight : weights) {
      weight = std::isinf(most) && most < 0 ? 0 : std::exp(weight - most);
      sum += weight;
    }
    const PartLayout layout(spec_);
    char* part = reinterpret_cast<char*>(arg(AttentionArgs::part)) + head * layout.bytes;
    for (int d = 0; d < spec_.head_dim; ++d) {
      double value = 0;
      for (std::size_t i = 0; i < weights.size(); ++i) {
        value += weights[i] * cached(AttentionArgs::v_blocks, AttentionArgs::v_token_stride,
                                     first + static_cast<std::int64_t>(i), d);
      }
      write_scalar(graph::DataType::f32, part + 4 * d, value);
    }
    write_scalar(graph::DataType::f32, part + layout.most, most);
    write_scalar(graph::DataType::f32, part + layout.sum, sum);
  }

  const AttentionKernel& spec_;
  const std::int64_t* args_;
};

}  // namespace

void reference(const AttentionKernel& spec, const std::int64_t* args) {
  Reference(spec, args).run();
}

void reference_merge(const AttentionKernel& spec, const std::int64_t* args) {
  const PartLayout layout(spec);
  const std::int64_t count = args[MergeArgs::part_count];
  for (int head = 0; head < spec.group; ++head) {
    const auto number = [&](std::int64_t part, std::int64_t offset) {
      const std::int64_t at = args[MergeArgs::parts] + part * args[MergeArgs::part_stride];
      return static_cast<double>(
          *reinterpret_cast<const float*>(at + head * layout.bytes + offset));
    };
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    if (spec.sinks) most = reinterpret_cast<const float*>(args[MergeArgs::sinks])[head];
    const double sink = most;
    for (std::int64_t part = 0; part < count; ++part) {
      most = std::max(most, number(part, layout.most));
    }
    if (most == -std::numeric_limits<double>::infinity()) most = 0;
    if (spec.sinks) sum = std::exp(sink - most);
    std::vector<double> values(static_cast<std::size_t>(spec.head_dim));
    for (std::int64_t part = 0; part < count; ++part) {
      const double factor = std::exp(number(part, layout.most) - most);
      sum += factor * number(part, layout.sum);
      for (int d = 0; d < spec.head_dim; ++d) {
        values[static_cast<std::size_t>(d)] += factor * number(part, 4 * d);
      }
    }
    char* output = reinterpret_cast<char*>(args[MergeArgs::output]) +
                   head * args[MergeArgs::output_head_stride];
    for (int d = 0; d < spec.head_dim; ++d) {
      const double value = values[static_cast<std::size_t>(d)];
      write_scalar(spec.input, output + d * size_in_bytes(spec.input), sum == 0 ? 0 : value / sum);
    }
  }
}

}  // namespace tilewright::ops
