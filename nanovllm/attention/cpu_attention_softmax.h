// Softmax over a part of a context, and the merging of parts. See cpu_paged_attention.cpp.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../utils/cpu_formats.h"
#include "../utils/cpu_math.h"
#include "cpu_attention_products.h"

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// A row's softmax over some part of its context, not yet divided by the sum.
struct Reduced {
  float maximum = MINUS_INFINITY;
  float sum = 0.0f;
};

// 16 running values, folded to one at the end: the order of operations does not depend on how many there were.
struct Lanes {
  static constexpr int VECS = TILE / Vec::size();
  Vec vecs[VECS];

  explicit Lanes(float value) {
    for (Vec& vec : vecs) vec = Vec(value);
  }
  template <class Op>
  ALWAYS_INLINE void take(const float* values, const Op& op) {
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i) vecs[i] = op(vecs[i], Vec::loadu(values + i * Vec::size()));
  }
  template <class Op>
  ALWAYS_INLINE float fold(const Op& op) const {
    Vec all = vecs[0];
#pragma GCC unroll 4
    for (int i = 1; i < VECS; ++i) all = op(all, vecs[i]);
    return at::vec::vec_reduce_all<float>(op, all);
  }
};

// Turn the scores of one row into probabilities as the values of `weigh`. The first num_valid columns count, the others up
// to a full tile become 0 whatever they hold.
template <class F>
NO_INLINE Reduced softmax(float* scores, int64_t num_valid, int64_t num_columns, float scale, typename F::Value* p) {
  num_valid = std::clamp<int64_t>(num_valid, 0, num_columns);
  std::fill(scores + num_valid, scores + num_columns, MINUS_INFINITY);
  if (num_valid == 0) {
    std::fill(p, p + num_columns, typename F::Value(0.0f));
    return {};
  }
  const auto larger = [](Vec most, Vec score) { return at::vec::clamp_min(score, most); };
  Lanes maxima(MINUS_INFINITY);
  for (int64_t first = 0; first < num_columns; first += TILE) maxima.take(scores + first, larger);
  const float maximum = scale * maxima.fold(larger);
  const auto add = [](Vec a, Vec b) { return a + b; };
  Lanes sums(0.0f);
  for (int64_t first = 0; first < num_columns; first += TILE) {
    alignas(64) float values[TILE];
    for (int64_t i = 0; i < TILE; ++i) {
      values[i] = exp2_nonpositive(fused_multiply_add(scores[first + i], scale, -maximum));
    }
    sums.take(values, add);
    F::pack(values, p + first);
  }
  return {maximum, sums.fold(add)};
}

// Add a partition's result to what was reduced before it.
void merge(Reduced& total, float* total_out, const Reduced& part, const float* part_out, int64_t head_dim) {
  if (part.sum == 0.0f) return;  // no column of the partition is visible to the row
  if (total.sum == 0.0f) {
    total = part;
    std::copy(part_out, part_out + head_dim, total_out);
    return;
  }
  const float maximum = std::max(total.maximum, part.maximum);
  const float before = exp2_nonpositive(total.maximum - maximum);
  const float now = exp2_nonpositive(part.maximum - maximum);
  for (int64_t d = 0; d < head_dim; ++d) {
    total_out[d] = fused_multiply_add(part_out[d], now, total_out[d] * before);
  }
  total = {maximum, fused_multiply_add(part.sum, now, total.sum * before)};
}

}  // namespace
