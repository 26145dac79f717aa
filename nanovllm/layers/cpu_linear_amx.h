// The inner loops of cpu_linear.cpp by AMX, for weights whose tiles lie one behind the other.
//
// AMX multiplies so fast that everything else decides: two strips of rows go through a panel's weights at a time; what comes
// out is rounded and written a few rows at a step, while the next strips are multiplied; and while all rows go through one
// panel, the next one is fetched from memory, evenly. A product that is too large for the second-level cache is written past
// it: a line that is written as a whole need not be read first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../utils/cpu_amx.h"
#include "../utils/cpu_formats.h"
#include "cpu_activation.h"
#include "cpu_panels.h"

#ifdef NANOVLLM_AMX

namespace {
namespace linear {

// Rows that go through a panel before the next: so many that reading it from memory takes no longer than that, and so few that
// they stay in the second-level cache.
constexpr int64_t AMX_ROWS = 512, AMX_BYTES = 5 << 18;
constexpr int64_t LARGE_PRODUCT = 1 << 21;  // bytes
constexpr int64_t AMX_AHEAD = 1 << 12;      // bytes: how far before its use a weight is fetched for a single block of rows

// One thread's products, panel by panel.
class AmxPanels {
 public:
  using F = AmxFormat;
  using Value = F::Value;
  static constexpr int64_t LINE_STRIDE = LINE * F::STEP * sizeof(Value), TILE_SIZE = LINE * amx::STEP;

  static int64_t max_rows(int64_t input_size) {
    const int64_t rows = std::clamp<int64_t>(AMX_BYTES / (input_size * sizeof(Value)), F::ROWS, AMX_ROWS);
    return rows / F::ROWS * F::ROWS;
  }

  // For products of at least num_rows rows each, all of them [all_rows, output_size].
  AmxPanels(int64_t num_rows, int64_t all_rows, int64_t output_size)
      : height_(std::min(amx::STRIP, num_rows)),
        is_large_(all_rows * output_size * sizeof(Value) >= LARGE_PRODUCT && output_size % PANEL<F> == 0) {
    tiles_.set_rows(height_);
  }
  ~AmxPanels() {
    while (unwritten_.row < unwritten_.num_rows) write_row();
    _mm_sfence();  // what was written past the cache is there before the others are told
  }

  // As multiply_panel, for all rows of the shape, as many as a strip has at least.
  void multiply(const Value* x, const Value* weight, const Value* bias, const Shape& shape, int64_t panel, Value* out) {
    alignas(64) float starts[2][PANEL<F>] = {};  // of every row
    const int64_t num_parts = shape.num_parts(), part_size = shape.output_size / num_parts;
    const int64_t first = panel * PANEL<F>, width = std::min(PANEL<F>, part_size - first);
    for (int64_t part = 0; part < num_parts && bias != nullptr; ++part) {
      std::copy_n(bias + part * part_size + first, width, starts[part]);
    }
    const int64_t size = shape.input_size * PANEL<F>, last = shape.num_rows - height_;  // where the last strip begins
    const int64_t num_blocks = (shape.num_rows + F::ROWS - 1) / F::ROWS;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t row = block * F::ROWS, rows[2] = {std::min(row, last), std::min(row + amx::STRIP, last)};
      const bool are_two = row + amx::STRIP < shape.num_rows;
      const auto run = are_two ? &AmxPanels::multiply_strips<2> : &AmxPanels::multiply_strips<1>;
      const float* sums[2] = {};
      for (int64_t part = 0; part < num_parts; ++part) {
        const Value* weights = weight + (part * part_size + first) * shape.input_size;
        const Value* ahead = weights + (num_blocks == 1 ? AMX_AHEAD / sizeof(Value) : size + size * block / num_blocks);
        sums[part] = (this->*run)(x, weights, starts[part], shape, rows, ahead, size / num_blocks);
      }
      Value *one = out + rows[0] * shape.out_stride + first, *other = out + rows[1] * shape.out_stride + first;
      unwritten_ = {sums[0], sums[1], {one, other}, 0, are_two ? 2 * height_ : height_, shape.out_stride, width};
      due_ = 0;
    }
  }

 private:
  struct Unwritten {  // sums
    const float *sums, *gated;  // if there are two parts, sums are gates
    Value* strips[2];
    int64_t row, num_rows, stride, width;
  };

  // Returns the sums.
  template <int STRIPS>
  const float* multiply_strips(
      const Value* x, const Value* weight, const float* start, const Shape& shape, const int64_t (&rows)[2],
      const Value* ahead, int64_t num_ahead) {
    constexpr int64_t CACHE_LINE = 64 / sizeof(Value);
    const int64_t steps = shape.input_size / amx::STEP;
    const int64_t lines_a_step = (num_ahead / CACHE_LINE + steps - 1) / steps;
    int64_t counts[amx::NUM_BETWEEN<STRIPS>];
    for (int64_t time = 0; time < amx::NUM_BETWEEN<STRIPS>; ++time) {
      counts[time] = amx::count_before<STRIPS>(lines_a_step, time + 1) - amx::count_before<STRIPS>(lines_a_step, time);
    }
    const Value* strips[2] = {x + rows[0] * shape.x_stride, x + rows[1] * shape.x_stride};
    const Value* lines[2] = {weight, weight + TILE_SIZE};
    amx::fill<STRIPS>(start);
    const int64_t all_steps = shape.num_parts() * steps;
    for (int64_t step = 0; step < steps; ++step) {
      amx::multiply_add<STRIPS>(strips, shape.x_stride * sizeof(Value), lines, LINE_STRIDE, [&](int time) INLINED {
        for (int64_t line = 0; line < counts[time]; ++line, ahead += CACHE_LINE) __builtin_prefetch(ahead, 0, 2);
      });
      for (int i = 0; i < 2; ++i) strips[i] += amx::STEP, lines[i] += amx::STEP * PANEL<F>;
      for (due_ += unwritten_.num_rows; due_ >= all_steps; due_ -= all_steps) write_row();
    }
    float* sums = sums_[next_++ % 4];
    amx::store<STRIPS>({sums, sums + height_ * PANEL<F>}, PANEL<F> * sizeof(float));
    return sums;
  }

  // The next of the rows that are not yet written, if there is one.
  ALWAYS_INLINE void write_row() {
    Unwritten& all = unwritten_;
    if (all.row == all.num_rows) return;
    const int64_t place = all.row * PANEL<F>;
    Value* target =
        all.row < height_ ? all.strips[0] + all.row * all.stride : all.strips[1] + (all.row - height_) * all.stride;
    const F::Line values = all.gated == nullptr ? F::round(all.sums + place) : activate(all.sums + place, all.gated + place);
    if (is_large_) F::store_past_cache(target, values);
    else if (all.width == PANEL<F>) F::store(target, values);
    else std::memcpy(target, &values, all.width * sizeof(Value));
    ++all.row;
  }

  static ALWAYS_INLINE F::Line activate(const float* gates, const float* gated) {
    alignas(64) Value values[PANEL<F>];
    activate_sums(gates, gated, PANEL<F>, values);
    return F::load(values);
  }

  const int64_t height_;  // of a strip
  const bool is_large_;   // whole panels only, so that every line of them is one of the cache
  amx::Tiles tiles_;
  Unwritten unwritten_{};
  int64_t due_ = 0;  // of the unwritten rows, times the steps that they are spread over
  int64_t next_ = 0;
  alignas(64) float sums_[4][2 * amx::STRIP * PANEL<F>];  // the last strips' and those before, of one part or two
};

}  // namespace linear
}  // namespace

#endif
