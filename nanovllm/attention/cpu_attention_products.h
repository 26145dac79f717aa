// The two products of attention, for a tile of rows: scores with K, and the sum of V weighted by probabilities. See
// cpu_paged_attention.cpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../utils/cpu_amx.h"
#include "../utils/cpu_formats.h"
#include "../utils/cpu_math.h"

namespace {

constexpr int64_t TILE = LINE;      // tokens in a tile of K
constexpr int64_t PARTITION = 256;  // tokens that are reduced on their own; a change changes results by rounding
constexpr int64_t MAX_TILES = PARTITION / TILE;
constexpr int64_t MAX_HEAD_DIM = 256;
// Values from one row of scores, probabilities or queries to the next: constants spare the inner loops a pointer a row, and
// no power of two, or all rows would lie in the same few sets of the L1 cache. They begin with a line of the cache.
constexpr int64_t SCORE_STRIDE = PARTITION + 2 * TILE;
constexpr int64_t QUERY_STRIDE = MAX_HEAD_DIM + 2 * TILE;

#define NO_INLINE __attribute__((noinline))  // a function of its own for the inner loops: all registers are theirs

// ---- the two products, for a tile of ROWS rows ----

// Tokens that both products take at once: AMX weighs V of two tiles.
template <class F>
constexpr int64_t SPAN = F::BY_AMX ? amx::STEP : TILE;

// What one partition of a context looks like to the kernel: where each tile's K and V are.
template <class F>
struct Partition {
  const typename F::Scalar *k[MAX_TILES], *v[MAX_TILES];
  int64_t num_tiles;

  // K of a tile, if there is one.
  const typename F::Scalar* k_or(int64_t tile, const typename F::Scalar* other) const {
    return tile < num_tiles ? k[tile] : other;
  }
};

// sums[row][line] += values[row][s] * lines[line][s] for each step s. AHEAD: fetch what lies alike in `ahead` meanwhile, for
// the product that comes next: decodes are bound by memory. Full tiles of rows, of which there are usually several, are not.
template <class F, int64_t STRIDE, bool AHEAD, int ROWS, int LINES>
ALWAYS_INLINE void accumulate(
    typename F::Sums (&sums)[ROWS][LINES], const typename F::Value* values,
    const typename F::Scalar* const (&lines)[LINES], int64_t line_stride, int64_t steps,
    const typename F::Scalar* const (&ahead)[LINES]) {
  for (int64_t step = 0; step < steps; ++step) {
    typename F::Line line[LINES];
#pragma GCC unroll 8
    for (int l = 0; l < LINES; ++l) {
      line[l] = F::load(lines[l] + step * line_stride);
      if constexpr (AHEAD) __builtin_prefetch(ahead[l] + step * line_stride);
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const auto operand = F::broadcast(values + r * STRIDE + step * F::STEP);
#pragma GCC unroll 8
      for (int l = 0; l < LINES; ++l) F::multiply_add(sums[r][l], operand, line[l]);
    }
  }
}

template <class F, int ROWS, int LINES>
ALWAYS_INLINE void clear(typename F::Sums (&sums)[ROWS][LINES]) {
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int l = 0; l < LINES; ++l) sums[r][l] = F::zero();
  }
}

template <class F, int ROWS, int LINES>
ALWAYS_INLINE void put(const typename F::Sums (&sums)[ROWS][LINES], float* target, int64_t row_stride) {
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int l = 0; l < LINES; ++l) F::store(target + r * row_stride + l * TILE, sums[r][l]);
  }
}

// Lines whose sums for so many rows fit the registers. The fewer rows, the more of the cache is read at once, and as it lies.
template <class F, int ROWS>
constexpr int LINES_FOR = std::bit_floor(std::min(8u, static_cast<unsigned>(F::ROWS * F::LINES / ROWS)));

template <class F, int ROWS, int LINES>
ALWAYS_INLINE void score_tiles(
    const typename F::Value* q, const Partition<F>& kv, int64_t tile, int64_t head_dim, float* scores) {
  const typename F::Scalar *lines[LINES], *v[LINES];
  for (int l = 0; l < LINES; ++l) {
    lines[l] = kv.k[tile + l];
    v[l] = kv.v[tile + l];
  }
  typename F::Sums sums[ROWS][LINES];
  clear<F, ROWS, LINES>(sums);
  const int64_t steps = head_dim / F::STEP;
  accumulate<F, QUERY_STRIDE, (ROWS < F::ROWS)>(sums, q, lines, TILE * F::STEP, steps, v);
  put<F, ROWS, LINES>(sums, scores + tile * TILE, SCORE_STRIDE);
}

// scores[row][token] = q[row] . k[token] for the tiles from `tile` on. q: [ROWS][QUERY_STRIDE]. Meanwhile V is fetched.
template <class F, int ROWS, int LINES = LINES_FOR<F, ROWS>>
NO_INLINE void score(
    const typename F::Value* q, const Partition<F>& kv, int64_t num_tiles, int64_t head_dim, float* scores,
    int64_t tile = 0) {
  for (; tile + LINES <= num_tiles; tile += LINES) score_tiles<F, ROWS, LINES>(q, kv, tile, head_dim, scores);
  if constexpr (LINES > 1) {
    if (tile < num_tiles) score<F, ROWS, LINES / 2>(q, kv, num_tiles, head_dim, scores, tile);
  }
}

template <class F, int ROWS, int LINES>
ALWAYS_INLINE void weigh_lines(
    const typename F::Value* p, const Partition<F>& kv, const Partition<F>& next, int64_t num_tiles, int64_t dim,
    int64_t head_dim, float* out) {
  typename F::Sums sums[ROWS][LINES];
  clear<F, ROWS, LINES>(sums);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const typename F::Scalar *lines[LINES], *ahead[LINES];
    for (int l = 0; l < LINES; ++l) {
      lines[l] = kv.v[tile] + (dim + l * TILE) * F::STEP;
      ahead[l] = next.k_or(tile, kv.v[tile]) + (dim + l * TILE) * F::STEP;
    }
    constexpr int64_t STEPS = TILE / F::STEP;
    accumulate<F, SCORE_STRIDE, (ROWS < F::ROWS)>(sums, p + tile * TILE, lines, head_dim * F::STEP, STEPS, ahead);
  }
  put<F, ROWS, LINES>(sums, out + dim, head_dim);
}

// out[row] = sum of p[row][token] * v[token] over the first num_tiles tiles, from dimension `dim` on. p: [ROWS][SCORE_STRIDE].
// Meanwhile K of the next partition is fetched.
template <class F, int ROWS, int LINES = LINES_FOR<F, ROWS>>
NO_INLINE void weigh(
    const typename F::Value* p, const Partition<F>& kv, const Partition<F>& next, int64_t num_tiles, int64_t head_dim,
    float* out, int64_t dim = 0) {
  for (; dim + LINES * TILE <= head_dim; dim += LINES * TILE) {
    weigh_lines<F, ROWS, LINES>(p, kv, next, num_tiles, dim, head_dim, out);
  }
  if constexpr (LINES > 1) {
    if (dim < head_dim) weigh<F, ROWS, LINES / 2>(p, kv, next, num_tiles, head_dim, out, dim);
  }
}

// ---- the same by AMX, for 1 to 32 rows ----

#ifdef NANOVLLM_AMX
// Where the strips of some rows begin; see cpu_amx.h.
template <class T>
struct Strips {
  T* rows[2];
  Strips(T* first, int64_t num_rows, int64_t stride)
      : rows{first, first + std::max<int64_t>(0, num_rows - amx::STRIP) * stride} {}
};

// Brings tiles into the second-level cache, into which all of a partition goes: evenly over so many calls of amx::multiply_add,
// some lines at each of its times, and a line of each tile in turn, which keeps the memory busier than one tile does.
class Ahead {
 public:
  Ahead(const at::BFloat16* const* tiles, int64_t num_tiles, int64_t head_dim, int64_t num_calls)
      : tiles_(tiles), num_tiles_(num_tiles) {
    const int64_t num_lines = num_tiles * head_dim * TILE / amx::STEP;
    lines_a_call_ = (num_lines + num_calls - 1) / num_calls;
    left_ = num_lines;
  }

  template <int STRIPS>
  ALWAYS_INLINE void fetch(int time) {
    const int64_t end = amx::count_before<STRIPS>(lines_a_call_, time + 1);
    for (int64_t line = amx::count_before<STRIPS>(lines_a_call_, time); line < end; ++line) fetch_line();
  }

 private:
  ALWAYS_INLINE void fetch_line() {
    if (left_ == 0) return;
    --left_;
    __builtin_prefetch(tiles_[tile_] + place_, 0, 2);
    if (++tile_ == num_tiles_) tile_ = 0, place_ += amx::STEP;
  }

  const at::BFloat16* const* tiles_;
  const int64_t num_tiles_;
  int64_t lines_a_call_, left_;
  int64_t tile_ = 0, place_ = 0;  // of the next line
};

template <int STRIPS>
NO_INLINE void score_strips(
    const at::BFloat16* q, int64_t num_rows, const Partition<AmxFormat>& kv, int64_t num_tiles, int64_t head_dim,
    float* scores) {
  const Strips<const at::BFloat16> queries(q, num_rows, QUERY_STRIDE);
  const Strips<float> sums(scores, num_rows, SCORE_STRIDE);
  constexpr int64_t LINES = amx::STEP * TILE;  // values that a tile takes at once
  Ahead ahead(kv.v, num_tiles, head_dim, num_tiles / 2 * (head_dim / amx::STEP));
  for (int64_t tile = 0; tile < num_tiles; tile += 2) {
    amx::clear<STRIPS>();
    for (int64_t step = 0; step < head_dim / amx::STEP; ++step) {
      const at::BFloat16* rows[2] = {queries.rows[0] + step * amx::STEP, queries.rows[1] + step * amx::STEP};
      const at::BFloat16* lines[2] = {kv.k[tile] + step * LINES, kv.k[tile + 1] + step * LINES};
      amx::multiply_add<STRIPS>(rows, QUERY_STRIDE * 2, lines, TILE * 4, [&](int time) INLINED {
        if constexpr (STRIPS == 1) ahead.fetch<STRIPS>(time);
      });
    }
    amx::store<STRIPS>({sums.rows[0] + tile * TILE, sums.rows[1] + tile * TILE}, SCORE_STRIDE * sizeof(float));
  }
}

template <int STRIPS>
NO_INLINE void weigh_strips(
    const at::BFloat16* p, int64_t num_rows, const Partition<AmxFormat>& kv, const Partition<AmxFormat>& next,
    int64_t num_tiles, int64_t head_dim, float* out) {
  const Strips<const at::BFloat16> probabilities(p, num_rows, SCORE_STRIDE);
  const Strips<float> sums(out, num_rows, head_dim);
  Ahead ahead(next.k, next.num_tiles, head_dim, num_tiles / 2 * (head_dim / amx::STEP));
  for (int64_t dim = 0; dim < head_dim; dim += 2 * TILE) {
    amx::clear<STRIPS>();
    for (int64_t tile = 0; tile < num_tiles; tile += 2) {  // V of two tiles lies together
      const at::BFloat16* rows[2] = {probabilities.rows[0] + tile * TILE, probabilities.rows[1] + tile * TILE};
      const at::BFloat16* lines[2] = {kv.v[tile] + dim * 2, kv.v[tile] + (dim + TILE) * 2};
      amx::multiply_add<STRIPS>(rows, SCORE_STRIDE * 2, lines, head_dim * 4, [&](int time) INLINED {
        if constexpr (STRIPS == 1) ahead.fetch<STRIPS>(time);
      });
    }
    amx::store<STRIPS>({sums.rows[0] + dim, sums.rows[1] + dim}, head_dim * sizeof(float));
  }
}
#endif

}  // namespace
