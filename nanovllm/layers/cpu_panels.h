// What the inner loops of cpu_linear.cpp share: the layout of a packed weight, a product's sizes, and SwiGLU.
#pragma once

#include <cstdint>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_formats.h"
#include "cpu_activation.h"

namespace {
namespace linear {

template <class F>
constexpr int64_t PANEL = F::LINES * LINE;  // outputs

// Where a panel holds the weight that an output gives to an input: the lines that a tile of AMX takes lie together; elsewhere
// a tile is one step.
template <class F>
ALWAYS_INLINE int64_t place(int64_t input, int64_t output) {
  const int64_t tile = input / F::DEPTH * (PANEL<F> / LINE) + output / LINE, step = input % F::DEPTH / F::STEP;
  return ((tile * (F::DEPTH / F::STEP) + step) * LINE + output % LINE) * F::STEP + input % F::STEP;
}

template <class F>
int64_t count_panels(int64_t output_size) { return (output_size + PANEL<F> - 1) / PANEL<F>; }

struct Shape {
  int64_t num_rows, input_size, output_size, x_stride, out_stride;
  bool is_gated;  // the first half of the outputs are gates for the second: see silu_and_mul

  int64_t num_parts() const { return is_gated ? 2 : 1; }  // that make one value together
};

// Values of T from sums: of gates, and of what they let through.
template <class T>
ALWAYS_INLINE void activate_sums(const float* gates, const float* gated, int64_t count, T* out) {
  blocks::for_each_block(count, [&](int64_t first, int64_t size) INLINED {
    const auto value = [&](const float* sums) INLINED { return blocks::rounded<T>(blocks::read(sums + first, size)); };
    blocks::write(layers::activate<T>(value(gates), value(gated)), out + first, size);
  });
}

}  // namespace linear
}  // namespace
