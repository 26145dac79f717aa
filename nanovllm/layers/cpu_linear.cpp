// Matrix products of linear layers in float32, on a CPU: activations times a weight that is kept in the checkpoint's dtype.
// Called by cpu_linear.py.
//
// Where a CPU has no instructions for 16-bit products, a model runs in float32. Its weights need not: widened as they are
// used, they take half the memory, and half the time to read, which is what a decode step of few sequences waits for.
//
// A packed weight is [num_panels, input_size, PANEL]: the weights that PANEL outputs give to an input lie side by side. A
// tile of the product, TILE_ROWS rows by PANEL outputs, is held in registers while the inputs go by. Each tile widens them
// anew: a multiply-add waits for its unit, widening fills the time.
//
// Each value of the product is one chain of fused multiply-adds, from the first input to the last, whatever the number of
// rows and threads: bit for bit the same.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../utils/cpu_dtypes.h"
#include "../utils/cpu_math.h"

namespace {
namespace linear {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t PANEL = 2 * Vec::size();
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t TILE_ROWS = 12;  // with 32 registers
#else
constexpr int64_t TILE_ROWS = 6;  // with 16
#endif
constexpr int64_t MAX_ROWS = 192;  // whose activations stay in the second-level cache while panels go by
constexpr int64_t AHEAD = 8192;    // bytes: a stream from memory stops at each page unless it is asked to go on
// Inputs at a time: of so many, a panel's weights stay in the first-level cache, with a tile's activations, for all tiles.
template <class T>
constexpr int64_t DEPTH = 16384 / (PANEL * sizeof(T));

int64_t count_panels(int64_t output_size) { return (output_size + PANEL - 1) / PANEL; }

struct Values {  // of a panel
  Vec low, high;
};

template <class T>
ALWAYS_INLINE Values widen(const T* source) {
  Values values;
  if constexpr (std::is_same_v<T, float>) {
    values = {Vec::loadu(source), Vec::loadu(source + Vec::size())};
  } else {  // half by half, each by one instruction that loads and extends
    at::vec::load_to_float<T>(source, values.low);
    at::vec::load_to_float<T>(source + Vec::size(), values.high);
  }
  return values;
}

// Bring what will be needed soon into the second-level cache: the first has enough to hold.
ALWAYS_INLINE void ask_for(const void* now) { __builtin_prefetch(static_cast<const char*>(now) + AHEAD, 0, 2); }

// body(row) for each row, written out. With loops in its place, GCC also stores every sum at every step where an array of
// sums is larger than the 256 bytes up to which it sees that nobody reads what was stored: from 5 rows of AVX-512 on.
template <int64_t ROWS, class Body>
ALWAYS_INLINE void for_rows(const Body& body) {
  const auto each = [&]<int64_t... ROW>(std::integer_sequence<int64_t, ROW...>) { (body(ROW), ...); };
  each(std::make_integer_sequence<int64_t, ROWS>());
}

// out[ROWS][PANEL] += x[ROWS][depth] times weight[depth][PANEL].
template <int64_t ROWS, class T>
void multiply_tile(const float* x, int64_t x_stride, const T* weight, int64_t depth, float* out, int64_t out_stride) {
  Vec low[ROWS], high[ROWS];
  for_rows<ROWS>([&](int64_t row) {
    low[row] = Vec::loadu(out + row * out_stride);
    high[row] = Vec::loadu(out + row * out_stride + Vec::size());
  });
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (!std::is_same_v<T, float>) ask_for(weight + k * PANEL);
    const Values w = widen(weight + k * PANEL);
    for_rows<ROWS>([&](int64_t row) {
      const Vec value(x[row * x_stride + k]);
      low[row] = at::vec::fmadd(value, w.low, low[row]);
      high[row] = at::vec::fmadd(value, w.high, high[row]);
    });
  }
  for_rows<ROWS>([&](int64_t row) {
    low[row].store(out + row * out_stride);
    high[row].store(out + row * out_stride + Vec::size());
  });
}

template <class T>
using Tile = void (*)(const float*, int64_t, const T*, int64_t, float*, int64_t);

template <class T, int64_t... ROWS>
constexpr std::array<Tile<T>, sizeof...(ROWS)> all_tiles(std::integer_sequence<int64_t, ROWS...>) {
  return {multiply_tile<ROWS + 1, T>...};
}

template <class T>
constexpr auto TILES = all_tiles<T>(std::make_integer_sequence<int64_t, TILE_ROWS>());

// Rows in tiles of about equal size.
template <class T>
void multiply_rows(
    const float* x, int64_t x_stride, int64_t num_rows, const T* weight, int64_t depth, float* out, int64_t out_stride) {
  const int64_t num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
    const int64_t rows = (num_rows - row) / (num_tiles - tile);
    TILES<T>[rows - 1](x + row * x_stride, x_stride, weight, depth, out + row * out_stride, out_stride);
    row += rows;
  }
}

struct Shape {
  int64_t num_rows, input_size, output_size, x_stride;
};

// One panel of the product of at most MAX_ROWS rows.
template <class T>
void multiply_panel(const float* x, const T* weight, const float* bias, const Shape& shape, int64_t panel, float* out) {
  alignas(64) float edge[MAX_ROWS * PANEL];  // in place of `out` for a panel that reaches beyond it
  const int64_t width = std::min(PANEL, shape.output_size - panel * PANEL);
  float* target = width == PANEL ? out + panel * PANEL : edge;
  const int64_t stride = width == PANEL ? shape.output_size : PANEL;
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    if (bias == nullptr) std::fill_n(target + row * stride, width, 0.0f);
    else std::copy_n(bias + panel * PANEL, width, target + row * stride);
  }
  const T* values = weight + panel * shape.input_size * PANEL;
  for (int64_t k = 0; k < shape.input_size; k += DEPTH<T>) {
    const int64_t depth = std::min(DEPTH<T>, shape.input_size - k);
    multiply_rows(x + k, shape.x_stride, shape.num_rows, values + k * PANEL, depth, target, stride);
  }
  if (width < PANEL) {
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      std::copy_n(edge + row * PANEL, width, out + row * shape.output_size + panel * PANEL);
    }
  }
}

template <class T>
void multiply(const float* x, const T* weight, const float* bias, const Shape& shape, float* out) {
  const int64_t num_panels = count_panels(shape.output_size);
  const int64_t num_blocks = (shape.num_rows + MAX_ROWS - 1) / MAX_ROWS;
  at::parallel_for(0, num_blocks * num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / num_panels;
      const int64_t row = block * shape.num_rows / num_blocks, last = (block + 1) * shape.num_rows / num_blocks;
      const Shape part{last - row, shape.input_size, shape.output_size, shape.x_stride};
      multiply_panel(x + row * shape.x_stride, weight, bias, part, task % num_panels, out + row * shape.output_size);
    }
  });
}

// A panel: from a row of inputs for each of `width` outputs to the outputs of each input side by side.
template <class T>
void pack_panel(const T* source, int64_t width, int64_t input_size, T* target) {
  for (int64_t k = 0; k < input_size; ++k) {
    T* values = target + k * PANEL;
    for (int64_t output = 0; output < width; ++output) values[output] = source[output * input_size + k];
    std::fill(values + width, values + PANEL, T(0));
  }
}

// [output_size, input_size] -> [num_panels, input_size, PANEL], zeros beyond output_size. Where there is nothing to add, a
// panel takes as much memory as its rows, and the weight's own is used: it does not hold the weight any more.
at::Tensor pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "expected a contiguous weight, got ", weight.sizes());
  const int64_t output_size = weight.size(0), input_size = weight.size(1), num_panels = count_panels(output_size);
  const bool in_place = output_size % PANEL == 0;
  const std::array<int64_t, 3> shape{num_panels, input_size, PANEL};
  at::Tensor packed = in_place ? weight.view(shape) : weight.new_empty(shape);
  with_dtype(weight, "product with weights of", [&]<class T>() {
    const T* source = weight.const_data_ptr<T>();
    T* target = packed.mutable_data_ptr<T>();
    const int64_t size = input_size * PANEL;
    at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> rows(in_place ? size : 0);
      for (int64_t panel = begin; panel < end; ++panel) {
        if (in_place) std::copy_n(source + panel * size, size, rows.begin());
        const int64_t width = std::min(PANEL, output_size - panel * PANEL);
        pack_panel(in_place ? rows.data() : source + panel * size, width, input_size, target + panel * size);
      }
    });
  });
  return packed;
}

// Rows of what was packed, widened: token_ids int64 [num_tokens] -> float32 [num_tokens, input_size].
at::Tensor look_up(const at::Tensor& token_ids, const at::Tensor& weight) {
  TORCH_CHECK(token_ids.dim() == 1 && token_ids.is_contiguous() && token_ids.scalar_type() == at::kLong, "not token ids");
  TORCH_CHECK(weight.dim() == 3 && weight.size(2) == PANEL, "not a packed weight: ", weight.sizes());
  const int64_t num_tokens = token_ids.size(0), input_size = weight.size(1);
  at::Tensor out = weight.new_empty({num_tokens, input_size}, at::kFloat);
  const int64_t* tokens = token_ids.const_data_ptr<int64_t>();
  float* target = out.mutable_data_ptr<float>();
  with_dtype(weight, "product with weights of", [&]<class T>() {
    const T* values = weight.const_data_ptr<T>();
    at::parallel_for(0, num_tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t token = tokens[index];
        TORCH_CHECK_INDEX(token >= 0 && token < weight.size(0) * PANEL, "token ", token, " is not in the table");
        const T* row = values + token / PANEL * input_size * PANEL + token % PANEL;
        for (int64_t k = 0; k < input_size; ++k) target[index * input_size + k] = static_cast<float>(row[k * PANEL]);
      }
    });
  });
  return out;
}

// The rows of x at a distance at which the same inputs of all of them fit into the first-level cache: with a power of two,
// or a multiple of a large one, they would compete for a few places.
at::Tensor spread(const at::Tensor& x) {
  const bool is_spread = x.size(0) <= 1 || x.stride(0) * sizeof(float) % 2048 != 0;
  if (is_spread && x.stride(1) == 1) return x;
  at::Tensor rows = x.new_empty({x.size(0), x.size(1) + 16}).narrow(1, 0, x.size(1));
  return rows.copy_(x);
}

// x [num_rows, input_size] times a packed weight, plus bias -> [num_rows, output_size].
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t output_size) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat, "expected float32 [num_rows, input_size], got ", x.sizes());
  const bool fits = weight.dim() == 3 && weight.size(1) == x.size(1) && weight.size(2) == PANEL &&
                    weight.size(0) == count_panels(output_size);
  TORCH_CHECK(fits, "a packed weight ", weight.sizes(), " does not fit an input ", x.sizes());
  const at::Tensor rows = spread(x);
  at::Tensor out = x.new_empty({x.size(0), output_size});
  const float* added = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  with_dtype(weight, "product with weights of", [&]<class T>() {
    const Shape shape{x.size(0), x.size(1), output_size, rows.stride(0)};
    multiply(rows.const_data_ptr<float>(), weight.const_data_ptr<T>(), added, shape, out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace linear
}  // namespace

TORCH_LIBRARY_FRAGMENT(NANOVLLM_OPS, library) {
  library.def("pack_weight_(Tensor(a!) weight) -> Tensor(a!)", &linear::pack);
  library.def("look_up(Tensor token_ids, Tensor weight) -> Tensor", &linear::look_up);
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, int output_size) -> Tensor", &linear::product);
}
