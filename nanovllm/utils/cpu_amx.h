// AMX: an instruction multiplies a tile of rows, 16 by 32 bfloat16 values, with 16 lines of Bf16DotFormat's layout, and adds
// to a tile of 16 by 16 sums in float32. Each sum is a function of its own row and column, whatever else the tiles hold.
//
// Eight tiles hold a square of sums, two strips of rows by two lines (0 to 3), the strips' rows (4, 5) and the lines (6, 7):
// four products for four loads. The second strip ends with the last row: it may begin within the first one, whose sums are
// then computed twice, alike, so that all strips of some rows have one height.
#pragma once

#include <cstdint>

#include "cpu_math.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define NANOVLLM_AMX  // the tests define it together with an emulation of the instructions
#endif

namespace {
namespace amx {

constexpr int64_t STRIP = 16;  // rows of a tile
constexpr int64_t STEP = 32;   // values of a row that a tile takes at once

#ifndef NANOVLLM_AMX
constexpr bool is_available() { return false; }
#else

#ifdef __AMX_BF16__
// Tiles are large: Linux gives a process room for them when it asks.
bool is_available() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool is_granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return is_granted;
}
#endif

// A thread's tiles, to be used while this lives.
class Tiles {
 public:
  Tiles() = default;
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  // Strips have `rows` rows from now on, 1 to 16.
  void set_rows(int64_t rows) {
    if (rows == shapes_.rows[0]) return;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_line = tile >= 6;
      shapes_.rows[tile] = static_cast<uint8_t>(is_line ? STEP / 2 : rows);
      shapes_.bytes[tile] = 64;
    }
    _tile_loadconfig(&shapes_);
  }

 private:
  struct alignas(64) {  // the processor's format
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes_;
};

// Strides are in bytes.
template <int STRIPS>
ALWAYS_INLINE void clear() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (STRIPS == 2) _tile_zero(2);
  if constexpr (STRIPS == 2) _tile_zero(3);
}

// The same for every row.
template <int STRIPS>
ALWAYS_INLINE void fill(const float* row) {
  _tile_loadd(0, row, 0);
  _tile_loadd(1, row + STRIP, 0);
  if constexpr (STRIPS == 2) _tile_loadd(2, row, 0);
  if constexpr (STRIPS == 2) _tile_loadd(3, row + STRIP, 0);
}

// sums += rows of each strip times lines. lines[l]: [step / 2, 16 columns, 2]. between(0), (1) to NUM_BETWEEN<STRIPS> - 1: what
// is to be done meanwhile, such as fetching what comes next: a few lines at a time keep the memory busiest.
template <int STRIPS>
constexpr int64_t NUM_BETWEEN = STRIPS == 2 ? 8 : 6;

// Of `count` things to be done evenly, how many come before a time.
template <int STRIPS>
ALWAYS_INLINE int64_t count_before(int64_t count, int64_t time) { return count * time / NUM_BETWEEN<STRIPS>; }

template <int STRIPS, class T, class Between>
ALWAYS_INLINE void multiply_add(
    const T* const (&strips)[2], int64_t row_stride, const T* const (&lines)[2], int64_t line_stride, const Between& between) {
  between(0);
  _tile_loadd(6, lines[0], line_stride);
  between(1);
  _tile_loadd(7, lines[1], line_stride);
  between(2);
  _tile_loadd(4, strips[0], row_stride);
  between(3);
  if constexpr (STRIPS == 2) _tile_loadd(5, strips[1], row_stride);
  if constexpr (STRIPS == 2) between(4);
  _tile_dpbf16ps(0, 4, 6);
  between(STRIPS == 2 ? 5 : 4);
  _tile_dpbf16ps(1, 4, 7);
  between(STRIPS == 2 ? 6 : 5);
  if constexpr (STRIPS == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (STRIPS == 2) between(7);
  if constexpr (STRIPS == 2) _tile_dpbf16ps(3, 5, 7);
}

// strips[s]: where the first sum of a strip goes; the sums of the second line lie behind those of the first.
template <int STRIPS>
ALWAYS_INLINE void store(float* const (&strips)[2], int64_t row_stride) {
  _tile_stored(0, strips[0], row_stride);
  _tile_stored(1, strips[0] + STRIP, row_stride);
  if constexpr (STRIPS == 2) _tile_stored(2, strips[1], row_stride);
  if constexpr (STRIPS == 2) _tile_stored(3, strips[1] + STRIP, row_stride);
}

#endif

}  // namespace amx
}  // namespace
