// Matrix products of linear layers on a CPU: activations in the dtype that the model runs in, times a weight that is kept in
// the checkpoint's. Called by cpu_linear.py.
//
// Sums are float32. Where a CPU has no instructions for 16-bit products, weights of 16 bits are widened as they are used:
// they take half the memory, and half the time to read, which is what a decode step of few sequences waits for. Where it has
// AVX-512's or AMX for bfloat16, both sides stay as they are: see cpu_formats.h. The inner loops are in cpu_linear_tiles.h, those
// for AMX in cpu_linear_amx.h.
//
// A packed weight is [num_panels, input_size / STEP, PANEL, STEP]: the weights that PANEL outputs give to one input, or two,
// lie side by side; for AMX those of 16 outputs and 32 inputs, see `place` in cpu_panels.h.
//
// Each value of the product is one chain of multiply-adds (or AMX's, of 32 inputs at a time), from the first input to the
// last, whatever the number of rows and threads: bit for bit the same.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_dtypes.h"
#include "../utils/cpu_formats.h"
#include "../utils/cpu_math.h"
#include "../utils/cpu_memory.h"
#include "cpu_linear_amx.h"
#include "cpu_linear_tiles.h"
#include "cpu_panels.h"

namespace {
namespace linear {

constexpr const char* PURPOSE = "product with weights of";

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
