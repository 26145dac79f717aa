// Blocks of values in registers: as many as two registers of float32 hold, which are one register of 16 bits each.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

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
Block widen(const at::vec::Vectorized<T>& values) {
  const auto [low, high] = at::vec::convert_to_float<T>(values);
  return {low, high};
}

// What the dtype makes of the values.
template <class T>
Block rounded(const Block& block) {
  if constexpr (std::is_same_v<T, float>) return block;
  else return widen<T>(at::vec::convert_from_float<T>(block.low, block.high));
}

template <class T>
Block read(const T* source) {
  if constexpr (std::is_same_v<T, float>) return {Vec::loadu(source), Vec::loadu(source + Vec::size())};
  else return widen(at::vec::Vectorized<T>::loadu(source));
}

template <class T>
void write(const Block& block, T* target) {
  if constexpr (std::is_same_v<T, float>) {
    block.low.store(target);
    block.high.store(target + Vec::size());
  } else {
    at::vec::convert_from_float<T>(block.low, block.high).store(target);
  }
}

// The first `count` values; behind them come zeros.
template <class T>
Block read(const T* source, int64_t count) {
  if (count == BLOCK) return read(source);
  std::array<T, BLOCK> values{};
  std::copy(source, source + count, values.begin());
  return read(values.data());
}

template <class T>
void write(const Block& block, T* target, int64_t count) {
  if (count == BLOCK) return write(block, target);
  std::array<T, BLOCK> values;
  write(block, values.data());
  std::copy(values.begin(), values.begin() + count, target);
}

// body(first, count) for the blocks of a row; the last one may be smaller.
template <class Body>
void for_each_block(int64_t size, const Body& body) {
  int64_t first = 0;
  for (; first + BLOCK <= size; first += BLOCK) body(first, BLOCK);
  if (first < size) body(first, size - first);
}

}  // namespace blocks
}  // namespace
