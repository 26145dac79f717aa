// How the inner loops of products and of attention multiply; what is special to an instruction set is in here.
//
// A line is 16 * STEP values that lie together: STEP of them for each of 16 sums. A step multiplies a line with STEP values
// of a row, its operand, and adds to the row's 16 sums. ROWS rows of sums by LINES lines fit the registers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_amx.h"
#include "cpu_dtypes.h"
#include "cpu_math.h"

#if defined(__AVX512BF16__) && !defined(NANOVLLM_BF16_DOT)
#define NANOVLLM_BF16_DOT  // the tests define it together with an emulation of the instructions
#endif

namespace {

constexpr int64_t LINE = 16;  // sums

struct FloatLine {
  using Vec = at::vec::Vectorized<float>;
  static constexpr int VECS = LINE / Vec::size();
  Vec vecs[VECS];
};

// Any dtype by vectors of float32: 16-bit values are converted when they are loaded.
template <typename scalar_t>
struct FloatFormat {
  using Vec = FloatLine::Vec;
  using Scalar = scalar_t;  // of a line
  using Value = float;      // of a row
  static constexpr int64_t STEP = 1;
  static constexpr int64_t DEPTH = STEP;  // values of a row that are multiplied at once
  static constexpr int VECS = FloatLine::VECS;
  static constexpr bool BY_AMX = false;
  static constexpr bool WIDE = Vec::size() >= 16;
  static constexpr int ROWS = WIDE ? 12 : 6;  // with 32 registers of AVX-512, or 16 of AVX2
  static constexpr int LINES = WIDE ? 2 : 1;
  using Line = FloatLine;
  using Sums = FloatLine;

  static ALWAYS_INLINE Line load(const Scalar* source) {
    Line line;
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i) {
      if constexpr (std::is_same_v<Scalar, float>) {
        line.vecs[i] = Vec::loadu(source + i * Vec::size());
      } else {
        at::vec::load_to_float<Scalar>(source + i * Vec::size(), line.vecs[i]);
      }
    }
    return line;
  }
  static ALWAYS_INLINE Sums zero() {
    Sums sums;
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i) sums.vecs[i] = Vec(0.0f);
    return sums;
  }
  static ALWAYS_INLINE Sums load_sums(const float* source) { return FloatFormat<float>::load(source); }
  static ALWAYS_INLINE Vec broadcast(const Value* values) { return Vec(*values); }
  static ALWAYS_INLINE void multiply_add(Sums& sums, const Vec& operand, const Line& line) {
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i) sums.vecs[i] = at::vec::fmadd(operand, line.vecs[i], sums.vecs[i]);
  }
  static ALWAYS_INLINE void store(float* target, const Sums& sums) {
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i) sums.vecs[i].store(target + i * Vec::size());
  }
  // 16 values of a row.
  template <typename T>
  static ALWAYS_INLINE void pack(const T* source, Value* values) {
    for (int64_t i = 0; i < LINE; ++i) values[i] = static_cast<float>(source[i]);
  }
};

#ifdef NANOVLLM_BF16_DOT
// bfloat16 by the AVX-512 instruction that multiplies pairs of bf16 values and adds both products to a float32.
struct Bf16DotFormat {
  using Scalar = at::BFloat16;
  using Value = at::BFloat16;
  static constexpr int64_t STEP = 2;
  static constexpr int64_t DEPTH = STEP;
  static constexpr bool BY_AMX = false;
  static constexpr int ROWS = 12;
  static constexpr int LINES = 2;
  using Line = __m512i;
  using Sums = __m512;

  static ALWAYS_INLINE Line load(const Scalar* source) { return _mm512_loadu_si512(source); }
  static ALWAYS_INLINE Sums zero() { return _mm512_setzero_ps(); }
  static ALWAYS_INLINE Sums load_sums(const float* source) { return _mm512_loadu_ps(source); }
  static ALWAYS_INLINE Line broadcast(const Value* values) {
    int pair;
    std::memcpy(&pair, values, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static ALWAYS_INLINE void multiply_add(Sums& sums, const Line& operand, const Line& line) {
    sums = _mm512_dpbf16_ps(sums, (__m512bh)operand, (__m512bh)line);
  }
  static ALWAYS_INLINE void store(float* target, const Sums& sums) { _mm512_storeu_ps(target, sums); }
  static ALWAYS_INLINE void store(Value* target, const Line& values) { _mm512_storeu_si512(target, values); }
  // The target is a line of the cache.
  static ALWAYS_INLINE void store_past_cache(Value* target, const Line& values) {
    _mm512_stream_si512(reinterpret_cast<Line*>(target), values);
  }
  // Sums of two lines as bfloat16, to the nearest, ties to even.
  static ALWAYS_INLINE Line round(const float* sums) {
    return (Line)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + LINE), _mm512_loadu_ps(sums));
  }
  static ALWAYS_INLINE void pack(const float* source, Value* values) {
    const auto packed = _mm512_cvtneps_pbh(_mm512_loadu_ps(source));  // rounded to nearest even
    std::memcpy(values, &packed, LINE * sizeof(Value));
  }
  static ALWAYS_INLINE void pack(const Scalar* source, Value* values) {
    std::memcpy(values, source, LINE * sizeof(Value));
  }
};
#endif

#if defined(NANOVLLM_BF16_DOT) && defined(NANOVLLM_AMX)
// The same lines, multiplied by AMX, DEPTH / STEP of them at once: see cpu_amx.h.
struct AmxFormat : Bf16DotFormat {
  static constexpr bool BY_AMX = true;
  static constexpr int64_t DEPTH = amx::STEP;
  static constexpr int ROWS = 2 * amx::STRIP;
};
#endif

// body<F>() with the format for lines of the dtype of x, which are multiplied with rows of `row_size` values; `in_pairs`: in
// bfloat16, where there is an instruction for it.
template <class Body>
void with_format(const at::Tensor& x, bool in_pairs, int64_t row_size, const char* purpose, const Body& body) {
#ifdef NANOVLLM_BF16_DOT
  if (in_pairs && x.scalar_type() == at::kBFloat16) {
#ifdef NANOVLLM_AMX
    if (row_size % amx::STEP == 0 && amx::is_available()) return body.template operator()<AmxFormat>();
#endif
    return body.template operator()<Bf16DotFormat>();
  }
#endif
  with_dtype(x, purpose, [&]<class T>() { body.template operator()<FloatFormat<T>>(); });
}

}  // namespace
