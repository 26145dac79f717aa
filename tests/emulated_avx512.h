// The AVX-512 instructions of cpu_formats.h in plain C++, so that what they do for bf16 runs and is tested on any CPU.
// Include it before everything else: torch's headers first, then the intrinsics' names are taken over.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace emulated {

struct alignas(64) Words {
  uint32_t words[16];
};
struct alignas(32) Halves {
  uint16_t halves[16];
};

inline float as_float(uint32_t word) { return std::bit_cast<float>(word); }
inline float low(uint32_t pair) { return as_float(pair << 16); }
inline float high(uint32_t pair) { return as_float(pair & 0xffff0000u); }

inline Words load(const void* source) {
  Words result;
  std::memcpy(&result, source, sizeof result);
  return result;
}
inline void store(void* target, const Words& a) { std::memcpy(target, &a, sizeof a); }
inline Words spread(int value) {
  Words result;
  for (uint32_t& word : result.words) word = static_cast<uint32_t>(value);
  return result;
}
// VDPBF16PS: the odd products are added first; every product and sum is rounded, none is fused (see
// -ffp-contract=off). That the instruction takes subnormal numbers for 0 is left out.
inline Words dot(const Words& sums, const Words& a, const Words& b) {
  Words result;
  for (int i = 0; i < 16; ++i) {
    const float odd = as_float(sums.words[i]) + high(a.words[i]) * high(b.words[i]);
    result.words[i] = std::bit_cast<uint32_t>(odd + low(a.words[i]) * low(b.words[i]));
  }
  return result;
}
// VCVTNEPS2BF16: to the nearest, ties to even.
inline Halves round(const Words& a) {
  Halves result;
  for (int i = 0; i < 16; ++i) {
    const uint32_t word = a.words[i];
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = is_nan ? word | 0x00400000u : word + 0x7fffu + (word >> 16 & 1u);
    result.halves[i] = static_cast<uint16_t>(rounded >> 16);
  }
  return result;
}

inline Words round(const Words& high, const Words& low) {
  const Halves halves[2] = {round(low), round(high)};
  return load(halves);
}

}  // namespace emulated

#define __m512 emulated::Words
#define __m512i emulated::Words
#define __m512bh emulated::Words
#define _mm512_loadu_si512 emulated::load
#define _mm512_loadu_ps emulated::load
#define _mm512_storeu_ps emulated::store
#define _mm512_setzero_ps() emulated::spread(0)
#define _mm512_set1_epi32 emulated::spread
#define _mm512_dpbf16_ps emulated::dot
#define _mm512_cvtneps_pbh emulated::round
#define _mm512_cvtne2ps_pbh emulated::round
#define _mm512_storeu_si512 emulated::store
#define _mm512_stream_si512(target, values) emulated::store(target, values)
#define _mm_sfence()
#define NANOVLLM_BF16_DOT
