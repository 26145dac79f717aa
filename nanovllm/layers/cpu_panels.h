// What the inner loops of cpu_linear.cpp share: the layout of a packed weight, and a product's sizes.
#pragma once

#include <cstdint>

#include "../utils/cpu_formats.h"

namespace {
namespace linear {

constexpr int64_t AHEAD = 8192;  // bytes: a stream from memory stops at each page unless it is asked to go on
template <class F>
constexpr int64_t PANEL = F::LINES * LINE;  // outputs

template <class F>
int64_t count_panels(int64_t output_size) { return (output_size + PANEL<F> - 1) / PANEL<F>; }

struct Shape {
  int64_t num_rows, input_size, output_size, x_stride;
};

}  // namespace linear
}  // namespace
