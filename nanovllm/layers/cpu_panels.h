// What the inner loops of cpu_linear.cpp share: the layout of a packed weight, and a product's sizes.
#pragma once

#include <cstdint>

#include "../utils/cpu_formats.h"

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
  int64_t num_rows, input_size, output_size, x_stride;
};

}  // namespace linear
}  // namespace
