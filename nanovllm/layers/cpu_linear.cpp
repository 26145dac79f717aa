// Matrix products of linear layers on a CPU: activations in the dtype that the model runs in, times a weight that is kept in
// the checkpoint's. Called by cpu_linear.py.
//
// Sums are float32. Where a CPU has no instructions for 16-bit products, weights of 16 bits are widened as they are used:
// they take half the memory, and half the time to read, which is what a decode step of few sequences waits for. Where it has
// AVX-512's or AMX for bfloat16, both sides stay as they are: see cpu_formats.h; the loops for AMX are in cpu_linear_amx.h.
//
// A packed weight is [num_panels, input_size / STEP, PANEL, STEP]: the weights that PANEL outputs give to one input, or two,
// lie side by side; for AMX those of 16 outputs and 32 inputs, see `place` in cpu_panels.h. A tile of the product, ROWS rows by
// PANEL outputs, is held in registers while the inputs go by. Each tile widens them anew: a multiply-add waits for its unit,
// widening fills the time.
//
// Each value of the product is one chain of multiply-adds (or AMX's, of 32 inputs at a time), from the first input to the
// last, whatever the number of rows and threads: bit for bit the same.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_dtypes.h"
#include "../utils/cpu_formats.h"
#include "../utils/cpu_math.h"
#include "../utils/cpu_memory.h"
#include "cpu_linear_amx.h"
#include "cpu_panels.h"

namespace {
namespace linear {

constexpr const char* PURPOSE = "product with weights of";
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
#ifdef NANOVLLM_AMX
template <>
struct Panels<AmxFormat, at::BFloat16> : AmxPanels {
  using AmxPanels::AmxPanels;
};
#endif

template <class F, class T>
void multiply(
    const typename F::Value* x, const typename F::Scalar* weight, const T* bias, const Shape& shape, T* out) {
  using Panels = Panels<F, T>;
  const int64_t part_size = shape.output_size / shape.num_parts(), num_panels = count_panels<F>(part_size);
  const int64_t max_rows = Panels::max_rows(shape.input_size), num_blocks = (shape.num_rows + max_rows - 1) / max_rows;
  at::parallel_for(0, num_blocks * num_panels, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    Panels panels(shape.num_rows / num_blocks, shape.num_rows, part_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / num_panels;
      const int64_t row = block * shape.num_rows / num_blocks, last = (block + 1) * shape.num_rows / num_blocks;
      Shape part = shape;
      part.num_rows = last - row;
      panels.multiply(x + row * shape.x_stride, weight, bias, part, task % num_panels, out + row * shape.out_stride);
    }
  });
}

// A panel: from a row of inputs for each of `width` outputs to the layout of `place`, zeros for other outputs.
template <class F, class T>
void pack_panel(const T* source, int64_t width, int64_t input_size, T* target) {
  for (int64_t first = 0; first < input_size; first += F::DEPTH) {
    for (int64_t output = 0; output < PANEL<F>; ++output) {
      const T* inputs = source + output * input_size + first;
      T* values = target + place<F>(first, output);
      for (int64_t k = 0; k < F::DEPTH; ++k) {
        values[k / F::STEP * LINE * F::STEP + k % F::STEP] = output < width ? inputs[k] : T(0);
      }
    }
  }
}

template <class F>
at::Tensor pack_panels(const at::Tensor& weight) {
  using T = typename F::Scalar;
  const int64_t output_size = weight.size(0), input_size = weight.size(1), num_panels = count_panels<F>(output_size);
  const at::Tensor packed =
      memory::empty_lasting({num_panels, input_size / F::STEP, PANEL<F>, F::STEP}, weight.scalar_type());
  const T* source = weight.const_data_ptr<T>();
  T* target = packed.mutable_data_ptr<T>();
  const int64_t size = input_size * PANEL<F>;
  at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t width = std::min(PANEL<F>, output_size - panel * PANEL<F>);
      pack_panel<F>(source + panel * size, width, input_size, target + panel * size);
    }
  });
  return packed;
}

// [output_size, input_size] -> [num_panels, input_size / STEP, PANEL, STEP], zeros beyond output_size, for products with
// activations of `dtype`.
at::Tensor pack(const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "expected a contiguous weight, got ", weight.sizes());
  const bool in_pairs = dtype == at::kBFloat16 && weight.size(1) % 2 == 0;
  at::Tensor packed;
  with_format(weight, in_pairs, weight.size(1), PURPOSE, [&]<class F>() { packed = pack_panels<F>(weight); });
  return packed;
}

bool is_packed(const at::Tensor& weight) { return weight.dim() == 4; }

template <class F>
void check_packed(const at::Tensor& weight) {
  TORCH_CHECK(is_packed(weight) && weight.size(2) == PANEL<F> && weight.size(3) == F::STEP, "not a packed weight: ", weight.sizes());
}

// Rows of what was packed: token_ids int64 [num_tokens] -> [num_tokens, input_size], in `dtype`.
at::Tensor look_up(const at::Tensor& token_ids, const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(token_ids.dim() == 1 && token_ids.is_contiguous() && token_ids.scalar_type() == at::kLong, "not token ids");
  at::Tensor out;
  with_format(weight, weight.size(-1) == 2, weight.size(1) * weight.size(-1), PURPOSE, [&]<class F>() {
    check_packed<F>(weight);
    const int64_t num_tokens = token_ids.size(0), input_size = weight.size(1) * F::STEP;
    out = memory::empty({num_tokens, input_size}, dtype);
    const int64_t* tokens = token_ids.const_data_ptr<int64_t>();
    const auto* values = weight.const_data_ptr<typename F::Scalar>();
    with_dtype(out, "embedding in", [&]<class T>() {
      T* target = out.mutable_data_ptr<T>();
      at::parallel_for(0, num_tokens, 16, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t token = tokens[index];
          TORCH_CHECK_INDEX(token >= 0 && token < weight.size(0) * PANEL<F>, "token ", token, " is not in the table");
          const auto* panel = values + token / PANEL<F> * input_size * PANEL<F>;
          for (int64_t k = 0; k < input_size; ++k) {
            target[index * input_size + k] = static_cast<T>(static_cast<float>(panel[place<F>(k, token % PANEL<F>)]));
          }
        }
      });
    });
  });
  return out;
}

// The rows of x as values of `dtype`, at a distance at which the same inputs of all of them fit into the first-level cache.
at::Tensor spread(const at::Tensor& x, at::ScalarType dtype) {
  const bool is_spread = x.size(0) <= 1 || !memory::compete(x.stride(0) * x.element_size());
  if (is_spread && x.stride(1) == 1 && x.scalar_type() == dtype) return x;
  return memory::empty_rows(x.size(0), x.size(1), dtype).copy_(x);
}

template <class F, class T>
at::Tensor product_of(const at::Tensor& x, const at::Tensor& weight, const T* bias, int64_t output_size, bool is_gated) {
  using Value = typename F::Value;
  if constexpr (!std::is_same_v<Value, float> && !std::is_same_v<Value, T>) {
    TORCH_CHECK(false, "a weight packed for bfloat16, not ", x.scalar_type());
  } else if (is_gated && output_size % (2 * PANEL<F>) != 0) {  // a panel holds gates and what they are for
    return layers::silu_and_mul(product_of<F>(x, weight, bias, output_size, false));
  } else {
    const at::Tensor rows = spread(x, c10::CppTypeToScalarType<Value>::value);
    at::Tensor out = memory::empty_rows(x.size(0), is_gated ? output_size / 2 : output_size, x.scalar_type());
    const Shape shape{x.size(0), x.size(1), output_size, rows.stride(0), out.stride(0), is_gated};
    const auto* values = weight.const_data_ptr<typename F::Scalar>();
    multiply<F>(rows.const_data_ptr<Value>(), values, bias, shape, out.mutable_data_ptr<T>());
    return out;
  }
}

// is_gated: see gated_product.
at::Tensor multiply_packed(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t output_size,
    bool is_gated) {
  TORCH_CHECK(x.dim() == 2, "expected [num_rows, input_size], got ", x.sizes());
  const bool bias_fits = !bias.has_value() || (bias->dim() == 1 && bias->size(0) == output_size && bias->is_contiguous());
  TORCH_CHECK(bias_fits, "the bias does not fit ", output_size, " outputs");
  at::Tensor out;
  with_format(weight, weight.size(-1) == 2, weight.size(1) * weight.size(-1), PURPOSE, [&]<class F>() {
    check_packed<F>(weight);
    const bool is_as_deep = x.size(1) > 0 && weight.size(1) * F::STEP == x.size(1);
    const bool fits = is_as_deep && weight.size(0) == count_panels<F>(output_size);
    TORCH_CHECK(fits, "a packed weight ", weight.sizes(), " does not fit an input ", x.sizes());
    with_dtype(x, "product of", [&]<class T>() {
      out = product_of<F>(x, weight, bias.has_value() ? bias->const_data_ptr<T>() : nullptr, output_size, is_gated);
    });
  });
  return out;
}

// x [num_rows, input_size] times a weight that was packed for its dtype, plus bias in it -> [num_rows, output_size].
at::Tensor product(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t output_size) {
  return multiply_packed(x, weight, bias, output_size, false);
}

// silu(gate) * up of a product whose outputs are gate and up side by side, bit for bit: -> [num_rows, output_size / 2].
at::Tensor gated_product(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t output_size) {
  TORCH_CHECK(output_size % 2 == 0, "gate and up differ in size: together they have ", output_size, " outputs");
  return multiply_packed(x, weight, bias, output_size, true);
}

}  // namespace linear
}  // namespace

TORCH_LIBRARY_FRAGMENT(NANOVLLM_OPS, library) {
  library.def("pack_weight(Tensor weight, ScalarType dtype) -> Tensor", &linear::pack);
  library.def("look_up(Tensor token_ids, Tensor weight, ScalarType dtype) -> Tensor", &linear::look_up);
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, int output_size) -> Tensor", &linear::product);
  library.def("gated_linear(Tensor x, Tensor weight, Tensor? bias, int output_size) -> Tensor", &linear::gated_product);
}
