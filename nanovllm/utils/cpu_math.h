// The exponentials that the CPU kernels share, in plain C++ that compilers turn into vector instructions.
#pragma once

#include <bit>
#include <cstdint>

#define INLINED __attribute__((always_inline))  // behind the parameters of a lambda
#define ALWAYS_INLINE inline INLINED

namespace {

constexpr float LOG2_E = 1.44269504f;

ALWAYS_INLINE float fused_multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// first * x^n + ... + last, by Horner's method.
template <class... Coefficients>
ALWAYS_INLINE float polynomial(float x, float first, Coefficients... others) {
  ((first = fused_multiply_add(first, x, others)), ...);
  return first;
}

constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits

// y * 2^n for the integer n that is in the low bits.
ALWAYS_INLINE float times_power_of_2(float y, float shifted) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(y) + (std::bit_cast<uint32_t>(shifted) << 23));
}

// e^x for x up to about 0, to 2 units in the last place; exactly 0 below -87 and for minus infinity; NaN stays NaN.
// 2^n * e^r with n = round(x / ln 2), r in [-ln 2 / 2, ln 2 / 2] and e^r by its Taylor polynomial, whose next term is
// below 2^-27. The compiler vectorises this.
ALWAYS_INLINE float exp_nonpositive(float x) {
  const float shifted = fused_multiply_add(x, LOG2_E, ROUNDING);
  const float n = shifted - ROUNDING;
  const float r = fused_multiply_add(n, -1.42860677e-6f, fused_multiply_add(n, -0.693145752f, x));
  const float y = polynomial(r, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
  return x < -87.0f ? 0.0f : times_power_of_2(y, shifted);
}

// 2^x for x up to about 0, alike, to 3 units in the last place: e^(x ln 2) has more steps. The polynomial is 1 at 0, and of the
// other coefficients those with the smallest largest relative error in [-1/2, 1/2], 9.1e-8.
ALWAYS_INLINE float exp2_nonpositive(float x) {
  const float shifted = x + ROUNDING;
  const float r = x - (shifted - ROUNDING);
  const float y = polynomial(r, 0.00132647269f, 0.00967151266f, 0.0555073374f, 0.240222421f, 0.693146978f, 1.0f);
  return x < -126.0f ? 0.0f : times_power_of_2(y, shifted);
}

}  // namespace
