// Blocks of values in registers: as many as two registers of float32 hold, which are one register of 16 bits each.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "cpu_math.h"

namespace {
namespace blocks {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t BLOCK = 2 * Vec::size();

struct Block {
  Vec low, high;

  Block operator+(const Block& other) const { return {low + other.low, high + other.high}; }
  Block operator-(const Block& other) const { return {low - other.low, high - other.high}; }
  Block operator*(const Block& other) const { return {low * other.low, high * other.high}; }
};

template <class T>
ALWAYS_INLINE Block widen(const at::vec::Vectorized<T>& values) {
  const auto [low, high] = at::vec::convert_to_float<T>(values);
  return {low, high};
}

#ifdef __AVX512BF16__
// By instructions for it, which take subnormal numbers for 0.
ALWAYS_INLINE Vec nearest_bfloat16(const Vec& values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values)), 16));
}
ALWAYS_INLINE at::vec::Vectorized<at::BFloat16> to_bfloat16(const Block& block) {
  return (__m512i)_mm512_cvtne2ps_pbh(block.high, block.low);
}
#else
ALWAYS_INLINE at::vec::Vectorized<at::BFloat16> to_bfloat16(const Block& block) {
  return at::vec::convert_from_float<at::BFloat16>(block.low, block.high);
}
// The nearest bfloat16, as float32; of two the even one. Bits behind it carry into it where they are more than half.
ALWAYS_INLINE Vec nearest_bfloat16(const Vec& values) {
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits bits = at::vec::cast<int32_t>(values), is_odd = (bits >> Bits(16)) & Bits(1);
  const Bits nearest = (bits + Bits(0x7fff) + is_odd) & Bits(static_cast<int32_t>(0xffff0000));
  return Vec::blendv(at::vec::cast<float>(nearest), values, values.isnan());
}
#endif

// What the dtype makes of the values.
template <class T>
ALWAYS_INLINE Block rounded(const Block& block) {
  if constexpr (std::is_same_v<T, float>) return block;
  else if constexpr (std::is_same_v<T, at::BFloat16>) return {nearest_bfloat16(block.low), nearest_bfloat16(block.high)};
  else return widen<T>(at::vec::convert_from_float<T>(block.low, block.high));
}

template <class T>
ALWAYS_INLINE Block read(const T* source) {
  if constexpr (std::is_same_v<T, float>) return {Vec::loadu(source), Vec::loadu(source + Vec::size())};
  else return widen(at::vec::Vectorized<T>::loadu(source));
}

template <class T>
ALWAYS_INLINE void write(const Block& block, T* target) {
  if constexpr (std::is_same_v<T, float>) {
    block.low.store(target);
    block.high.store(target + Vec::size());
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    to_bfloat16(block).store(target);
  } else {
    at::vec::convert_from_float<T>(block.low, block.high).store(target);
  }
}

// The first `count` values; behind them come zeros.
template <class T>
ALWAYS_INLINE Block read(const T* source, int64_t count) {
  if (count == BLOCK) return read(source);
  std::array<T, BLOCK> values{};
  std::copy(source, source + count, values.begin());
  return read(values.data());
}

template <class T>
ALWAYS_INLINE void write(const Block& block, T* target, int64_t count) {
  if (count == BLOCK) return write(block, target);
  std::array<T, BLOCK> values;
  write(block, values.data());
  std::copy(values.begin(), values.begin() + count, target);
}

// body(first, count) for the blocks of a row; the last one may be smaller.
template <class Body>
ALWAYS_INLINE void for_each_block(int64_t size, const Body& body) {
  int64_t first = 0;
  for (; first + BLOCK <= size; first += BLOCK) body(first, BLOCK);
  if (first < size) body(first, size - first);
}

}  // namespace blocks
}  // namespace
