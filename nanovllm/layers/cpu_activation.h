// SwiGLU's activation on values that are in registers.
#pragma once

#include <cmath>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_math.h"

namespace {
namespace layers {

// x / (1 + e^-x), by an exponential that cannot overflow.
ALWAYS_INLINE float silu(float x) {
  const float e = exp_nonpositive(-std::fabs(x));
  return (x < 0.0f ? x * e : x) / (1.0f + e);
}

// silu(gate) * up, where silu(gate) becomes a value of T. So are gate and up.
template <class T>
ALWAYS_INLINE blocks::Block activate(const blocks::Block& gate, const blocks::Block& up) {
  alignas(64) float values[blocks::BLOCK];
  blocks::write(gate, values);
  for (float& value : values) value = silu(value);
  return blocks::rounded<T>(blocks::read(values)) * up;
}

}  // namespace layers
}  // namespace
