// The inner loops of cpu_linear.cpp by vector instructions.
//
// A tile of the product, ROWS rows by PANEL outputs, is held in registers while the inputs go by. Each tile widens the weights
// anew: a multiply-add waits for its unit, widening fills the time.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_formats.h"
#include "../utils/cpu_memory.h"
#include "cpu_panels.h"

namespace {
namespace linear {

constexpr int64_t MAX_ROWS = 192;  // whose activations stay in the second-level cache while panels go by
// Steps at a time, at most: of so many, a panel's weights stay in the first-level cache for all tiles, beside the activations of
// a tile.
template <class F>
const int64_t MAX_CHUNK = memory::first_level_cache() / 2 / (PANEL<F> * F::STEP * sizeof(typename F::Scalar));
constexpr int64_t AHEAD = 4096;  // bytes: how far before its use a weight is fetched for a single tile

// body(index) for each index, written out. With loops in its place, GCC also stores every sum at every step where an array
// of sums is larger than the 256 bytes up to which it sees that nobody reads what was stored: from 5 rows of AVX-512 on.
template <int64_t COUNT, class Body>
ALWAYS_INLINE void for_each(const Body& body) {
  const auto each = [&]<int64_t... INDEX>(std::integer_sequence<int64_t, INDEX...>) INLINED { (body(INDEX), ...); };
  each(std::make_integer_sequence<int64_t, COUNT>());
}

// What a tile brings into the second-level cache meanwhile, some bytes a step: the first has enough to hold.
struct Ahead {
  const char* next;
  int64_t stride;  // 128 at most

  ALWAYS_INLINE void fetch() {
    __builtin_prefetch(next, 0, 2);
    if (stride > 64) __builtin_prefetch(next + 64, 0, 2);
    next += stride;
  }
};

// Where each row of a tile is. Every third has a pointer: instructions add the distance to it, or twice the distance. With a
// pointer each there would not be enough registers.
template <class Value, int64_t ROWS>
class Rows {
 public:
  ALWAYS_INLINE Rows(const Value* first, int64_t stride) : stride_(stride) {
    for_each<NUM_THIRDS>([&](int64_t third) INLINED { thirds_[third] = first + 3 * third * stride; });
  }
  ALWAYS_INLINE const Value* operator[](int64_t row) const { return thirds_[row / 3] + row % 3 * stride_; }
  ALWAYS_INLINE void go_on(int64_t num_values) {
    for_each<NUM_THIRDS>([&](int64_t third) INLINED { thirds_[third] += num_values; });
    asm("" : "+r"(stride_));  // a number like any other: GCC would keep a pointer to each row after all
  }

 private:
  static constexpr int64_t NUM_THIRDS = (ROWS + 2) / 3;
  const Value* thirds_[NUM_THIRDS];
  int64_t stride_;
};

struct Sums {  // of rows by PANEL: where they are so far, and where they go
  const float* from;
  int64_t from_stride;
  float* to;
  int64_t to_stride;

  Sums behind(int64_t row) const { return {from + row * from_stride, from_stride, to + row * to_stride, to_stride}; }
};

// sums[ROWS][PANEL] + x[ROWS][..] times a panel's weights for the inputs of `steps` steps.
template <class F, int64_t ROWS>
void multiply_tile(
    const typename F::Value* x, int64_t x_stride, const typename F::Scalar* weight, int64_t steps, const Sums& sums,
    Ahead ahead) {
  typename F::Sums tile[ROWS][F::LINES];
  for_each<ROWS>([&](int64_t row) INLINED {
    const float* source = sums.from + row * sums.from_stride;
    for_each<F::LINES>([&](int64_t line) INLINED { tile[row][line] = F::load_sums(source + line * LINE); });
  });
  Rows<typename F::Value, ROWS> rows(x, x_stride);
  for (int64_t step = 0; step < steps; ++step, rows.go_on(F::STEP), weight += PANEL<F> * F::STEP) {
    ahead.fetch();
    typename F::Line lines[F::LINES];
    for_each<F::LINES>([&](int64_t line) INLINED { lines[line] = F::load(weight + line * LINE * F::STEP); });
    for_each<ROWS>([&](int64_t row) INLINED {
      const auto operand = F::broadcast(rows[row]);
      for_each<F::LINES>([&](int64_t line) INLINED { F::multiply_add(tile[row][line], operand, lines[line]); });
    });
  }
  for_each<ROWS>([&](int64_t row) INLINED {
    float* target = sums.to + row * sums.to_stride;
    for_each<F::LINES>([&](int64_t line) INLINED { F::store(target + line * LINE, tile[row][line]); });
  });
}

template <class F>
using Tile = void (*)(const typename F::Value*, int64_t, const typename F::Scalar*, int64_t, const Sums&, Ahead);

template <class F, int64_t... ROWS>
constexpr std::array<Tile<F>, sizeof...(ROWS)> all_tiles(std::integer_sequence<int64_t, ROWS...>) {
  return {multiply_tile<F, ROWS + 1>...};
}

template <class F>
constexpr auto TILES = all_tiles<F>(std::make_integer_sequence<int64_t, F::ROWS>());

// Rows in tiles of about equal size. Together they fetch what lies behind these weights, which comes next, evenly.
template <class F>
void multiply_rows(
    const typename F::Value* x, int64_t x_stride, int64_t num_rows, const typename F::Scalar* weight, int64_t steps,
    const Sums& sums) {
  constexpr int64_t STEP_BYTES = PANEL<F> * F::STEP * sizeof(typename F::Scalar);
  const int64_t num_tiles = (num_rows + F::ROWS - 1) / F::ROWS, size = steps * STEP_BYTES;
  const char* ahead = reinterpret_cast<const char*>(weight) + (num_tiles == 1 ? AHEAD : size);
  for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
    const int64_t rows = (num_rows - row) / (num_tiles - tile);
    const Ahead part{ahead + size * tile / num_tiles, STEP_BYTES / num_tiles};
    TILES<F>[rows - 1](x + row * x_stride, x_stride, weight, steps, sums.behind(row), part);
    row += rows;
  }
}

// The sums of one panel of the product of at most MAX_ROWS rows. Those of some of the inputs are kept apart: the rows that
// they go to may be at a distance at which they compete for a few places of the caches.
template <class F, class T>
void sum_panel(
    const typename F::Value* x, const typename F::Scalar* weight, const T* bias, const Shape& shape, int64_t panel,
    float* kept, float* to, int64_t to_stride) {
  alignas(64) float start[PANEL<F>] = {};  // of every row
  const int64_t first = panel * PANEL<F>;
  if (bias != nullptr) std::copy_n(bias + first, std::min(PANEL<F>, shape.output_size - first), start);
  weight += first * shape.input_size;
  Sums sums{start, 0, kept, PANEL<F>};
  const int64_t num_steps = shape.input_size / F::STEP, num_chunks = (num_steps + MAX_CHUNK<F> - 1) / MAX_CHUNK<F>;
  for (int64_t chunk = 0, step = 0; chunk < num_chunks; ++chunk) {
    const int64_t end = num_steps * (chunk + 1) / num_chunks, k = step * F::STEP;
    if (end == num_steps) sums = {sums.from, sums.from_stride, to, to_stride};
    multiply_rows<F>(x + k, shape.x_stride, shape.num_rows, weight + k * PANEL<F>, end - step, sums);
    sums = {kept, PANEL<F>, kept, PANEL<F>};
    step = end;
  }
}

// One panel of the product of at most MAX_ROWS rows.
template <class F, class T>
void multiply_panel(
    const typename F::Value* x, const typename F::Scalar* weight, const T* bias, const Shape& shape, int64_t panel, T* out) {
  alignas(64) float kept[2][MAX_ROWS * PANEL<F>];
  const int64_t part_size = shape.output_size / shape.num_parts(), first = panel * PANEL<F>;
  const int64_t width = std::min(PANEL<F>, part_size - first);
  if constexpr (std::is_same_v<T, float>) {
    if (!shape.is_gated && width == PANEL<F>) {
      return sum_panel<F>(x, weight, bias, shape, panel, kept[0], out + first, shape.out_stride);
    }
  }
  for (int64_t part = 0; part < shape.num_parts(); ++part) {
    sum_panel<F>(x, weight, bias, shape, panel + part * part_size / PANEL<F>, kept[part], kept[part], PANEL<F>);
  }
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    const float *one = kept[0] + row * PANEL<F>, *other = kept[1] + row * PANEL<F>;
    T* target = out + row * shape.out_stride + first;
    if (shape.is_gated) activate_sums(one, other, width, target);
    else blocks::for_each_block(width, [&](int64_t begin, int64_t count) INLINED {
      blocks::write(blocks::read(one + begin, count), target + begin, count);
    });
  }
}

// One thread's work: panel by panel, see multiply_panel.
template <class F, class T>
struct Panels {
  static int64_t max_rows(int64_t) { return MAX_ROWS; }
  Panels(int64_t, int64_t, int64_t) {}
  void multiply(
      const typename F::Value* x, const typename F::Scalar* weight, const T* bias, const Shape& shape, int64_t panel, T* out) {
    multiply_panel<F>(x, weight, bias, shape, panel, out);
  }
};

}  // namespace linear
}  // namespace
