// The scalar reference of the attention kernel: the same argument slots, in double, one key after
// another.
//
// Tested by attention_test.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/attention/attention_kernel.h"
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
    const char* token = table[key / per_block] + key % per_block * arg(stride);
    return read_scalar(spec_.cache, token + index * size_in_bytes(spec_.cache));
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
             static_cast<double>(key - arg(AttentionArgs::first_key));
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
    if (spec_.sinks) most = head_number(AttentionArgs::sinks, head);
    for (std::int64_t i = 0; i < arg(AttentionArgs::key_count); ++i) {
      weights.push_back(score(head, first + i));
      most = std::max(most, weights.back());
    }
    double sum = 0;
    if (spec_.sinks && !std::isinf(most)) {
      sum = std::exp(head_number(AttentionArgs::sinks, head) - most);
    }
    for (double& weight : weights) {
      weight = std::isinf(most) && most < 0 ? 0 : std::exp(weight - most);
      sum += weight;
    }
    char* output = reinterpret_cast<char*>(arg(AttentionArgs::output)) +
                   head * arg(AttentionArgs::output_head_stride);
    for (int d = 0; d < spec_.head_dim; ++d) {
      double value = 0;
      for (std::size_t i = 0; i < weights.size(); ++i) {
        value += weights[i] * cached(AttentionArgs::v_blocks, AttentionArgs::v_token_stride,
                                     first + static_cast<std::int64_t>(i), d);
      }
      if (sum != 0) value /= sum;
      write_scalar(spec_.input, output + d * size_in_bytes(spec_.input), value);
    }
  }

  const AttentionKernel& spec_;
  const std::int64_t* args_;
};

}  // namespace

void reference(const AttentionKernel& spec, const std::int64_t* args) {
  Reference(spec, args).run();
}

}  // namespace tilewright::ops
