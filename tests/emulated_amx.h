// The AMX instructions of cpu_amx.h in plain C++, to be included behind emulated_avx512.h.
#pragma once

#include <cmath>

namespace emulated {

struct Shapes {  // what _tile_loadconfig is given
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
struct Tiles {
  Shapes shapes;
  alignas(64) uint32_t words[8][16][16];
};
inline thread_local Tiles tiles;

inline void configure(const void* shapes) {
  std::memcpy(&tiles.shapes, shapes, sizeof(Shapes));
  std::memset(tiles.words, 0, sizeof tiles.words);
}
inline void load(int tile, const void* source, int64_t stride) {
  std::memset(tiles.words[tile], 0, sizeof tiles.words[tile]);
  for (int row = 0; row < tiles.shapes.rows[tile]; ++row) {
    std::memcpy(tiles.words[tile][row], static_cast<const char*>(source) + row * stride, tiles.shapes.bytes[tile]);
  }
}
inline void store(int tile, void* target, int64_t stride) {
  for (int row = 0; row < tiles.shapes.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(target) + row * stride, tiles.words[tile][row], tiles.shapes.bytes[tile]);
  }
}
// TDPBF16PS: even and odd products are summed apart, by fused multiply-adds, and then added to what was there.
inline void multiply_add(int sums, int rows, int lines) {
  for (int row = 0; row < tiles.shapes.rows[rows]; ++row) {
    float even[16] = {}, odd[16] = {};
    for (int step = 0; step < tiles.shapes.bytes[rows] / 4; ++step) {
      const uint32_t pair = tiles.words[rows][row][step];
      for (int column = 0; column < 16; ++column) {
        const uint32_t other = tiles.words[lines][step][column];
        even[column] = std::fma(low(pair), low(other), even[column]);
        odd[column] = std::fma(high(pair), high(other), odd[column]);
      }
    }
    for (int column = 0; column < 16; ++column) {
      uint32_t& sum = tiles.words[sums][row][column];
      sum = std::bit_cast<uint32_t>(as_float(sum) + (even[column] + odd[column]));
    }
  }
}

}  // namespace emulated

#define _tile_loadconfig emulated::configure
#define _tile_release() emulated::tiles.shapes = {}
#define _tile_zero(tile) std::memset(emulated::tiles.words[tile], 0, sizeof emulated::tiles.words[tile])
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_add
#define NANOVLLM_AMX

namespace {
namespace amx {
constexpr bool is_available() { return true; }
}  // namespace amx
}  // namespace
