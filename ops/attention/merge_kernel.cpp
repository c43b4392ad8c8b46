// See merge_kernel.h. The parts are few, so a part's factor is computed again for each group of
// vectors instead of being kept.
//
// Tested by attention_test.
#include "ops/attention/merge_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "jit/math.h"
#include "jit/vir/builder.h"
#include "ops/attention/head_vectors.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class MergeBuilder {
 public:
  explicit MergeBuilder(const AttentionKernel& spec)
      : spec_(spec),
        b_("attention_merge", spec.lanes, MergeArgs::count),
        part_(spec),
        head_(spec.head_dim, spec.lanes) {}

  jit::vir::Function run() && {
    head_.make_mask(b_);
    Reg parts = b_.arg(MergeArgs::parts), out = b_.arg(MergeArgs::output), sinks;
    if (spec_.sinks) sinks = b_.arg(MergeArgs::sinks);
    b_.loop(b_.constant(spec_.group), [&] {
      merge_head(parts, out, sinks);
      b_.add_to(parts, part_.bytes);
      b_.add_to(out, b_.arg(MergeArgs::output_head_stride));
      if (spec_.sinks) b_.add_to(sinks, 4);
    });
    return std::move(b_).finish();
  }

 private:
  // body(address of a part's head), for each part in order.
  template <class Body>
  void for_parts(Reg first, Body&& body) {
    Reg part = b_.copy(first);
    b_.loop(b_.arg(MergeArgs::part_count), [&] {
      body(part);
      b_.add_to(part, b_.arg(MergeArgs::part_stride));
    });
  }

  void merge_head(Reg parts, Reg out, Reg sink) {
    Reg most = b_.splat(-kInfinity);
    if (spec_.sinks) most = b_.broadcast(Element::f32, b_.at(sink));
    for_parts(parts, [&](Reg part) {
      Reg other = b_.broadcast(Element::f32, b_.at(part, part_.most));
      b_.assign(most, b_.vmax(most, other));
    });
    // All masked: subtract 0, and every exp is 0.
    most = b_.select(b_.equal(most, b_.splat(-kInfinity)), b_.zero(), most);
    Reg sum = b_.zero();
    if (spec_.sinks) {
      Reg score = b_.broadcast(Element::f32, b_.at(sink));
      sum = jit::math::exp(b_, b_.vsub(score, most));
    }
    const int width = spec_.lanes == 16 ? 8 : 4;  // beside what exp needs
    Reg divisor;
    for (int first = 0; first < head_.count(); first += width) {
      const int count = std::min(width, head_.count() - first);
      std::vector<Reg> totals;
      for (int v = 0; v < count; ++v) totals.push_back(b_.zero());
      for_parts(parts, [&](Reg part) {
        Reg largest = b_.broadcast(Element::f32, b_.at(part, part_.most));
        Reg factor = jit::math::exp(b_, b_.vsub(largest, most));
        if (first == 0) b_.fma(sum, factor, b_.broadcast(Element::f32, b_.at(part, part_.sum)));
        for (int v = 0; v < count; ++v) {
          b_.fma_load(totals[static_cast<std::size_t>(v)], factor,
                      b_.at(part, (first + v) * b_.vector_bytes()));
        }
      });
      // A sum of zero (no key, or all masked) must give zeros: 0 / infinity.
      if (first == 0) divisor = b_.select(b_.equal(sum, b_.zero()), b_.splat(kInfinity), sum);
      for (int v = 0; v < count; ++v) {
        store(b_, spec_.input, out, head_.columns(first + v),
              b_.vdiv(totals[static_cast<std::size_t>(v)], divisor));
      }
    }
  }

  const AttentionKernel& spec_;
  Builder b_;
  PartLayout part_;
  HeadVectors head_;
};

}  // namespace

std::string print_merge(const AttentionKernel& spec) {
  return fmt::format("attention_merge lanes={} group={} head_dim={} output={}{}", spec.lanes,
                     spec.group, spec.head_dim, graph::name(spec.input),
                     spec.sinks ? " sinks" : "");
}

jit::vir::Function build_merge(const AttentionKernel& spec) { return MergeBuilder(spec).run(); }

}  // namespace tilewright::ops
