// The small layers between the matrix products on a CPU: RMSNorm, alone or behind the residual addition, SwiGLU's
// activation, rotary positions. Called by cpu_layers.py, in place of the plain layers' chains of torch operations: each
// reads and writes memory once, and a decode step of a few tokens is spared some forty calls a layer.
//
// The arithmetic is the plain layers', in float32, rounded to the dtype at the same places. The rotation's is the same to
// the bit; a norm adds up its squares in another order, and the activation's exponential is another, to 2 units in the
// last place of float32. A row is one thread's work, from its first
// value to its last, so that its result does not depend on the other rows, or on the number of threads.
//
// Rows may be apart in memory, as in a view of one part of a merged projection; the values of a row lie together.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_dtypes.h"
#include "../utils/cpu_math.h"
#include "../utils/cpu_memory.h"

namespace {
namespace layers {

using namespace blocks;

// Values that are worth a second thread: waking it costs some 5 us.
constexpr int64_t CHEAP_GRAIN = 16384;
constexpr int64_t COSTLY_GRAIN = 4096;  // with an exponential for each

// ---- rows of a tensor [num_tokens, size] or [num_tokens, num_heads, size] ----

template <class T>
struct Rows {
  T* data;
  int64_t num_tokens, num_heads, size;
  int64_t token_stride, head_stride;

  int64_t count() const { return num_tokens * num_heads; }
  T* operator[](int64_t row) const { return data + row / num_heads * token_stride + row % num_heads * head_stride; }
};

template <class T>
Rows<T> rows_of(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "expected [num_tokens, size] or [num_tokens, num_heads, size], got ", x.sizes());
  TORCH_CHECK(x.stride(-1) == 1 || x.size(-1) == 1, "the values of a row must lie together, strides are ", x.strides());
  const bool has_heads = x.dim() == 3;
  using Scalar = std::remove_const_t<T>;
  return {const_cast<T*>(x.const_data_ptr<Scalar>()), x.size(0), has_heads ? x.size(1) : 1, x.size(-1),
          x.stride(0), has_heads ? x.stride(1) : 0};
}

// work(row) for each row, on several threads where all of them have `grain` values to work on.
template <class Work>
void for_each_row(int64_t num_rows, int64_t size, int64_t grain, const Work& work) {
  at::parallel_for(0, num_rows, std::max<int64_t>(1, grain / std::max<int64_t>(1, size)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

// ---- RMSNorm ----

template <class T>
void norm_row(const T* x, const T* weight, int64_t size, float eps, T* out) {
  Block squares{Vec(0.0f), Vec(0.0f)};
  for_each_block(size, [&](int64_t first, int64_t count) INLINED {
    const Block values = read(x + first, count);
    squares = squares + values * values;
  });
  const float sum = at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, squares.low + squares.high);
  const Vec factor(1.0f / std::sqrt(sum / static_cast<float>(size) + eps));
  for_each_block(size, [&](int64_t first, int64_t count) INLINED {
    const Block normed = rounded<T>(read(x + first, count) * Block{factor, factor});
    write(read(weight + first, count) * normed, out + first, count);
  });
}

void check_weight(const at::Tensor& weight, const at::Tensor& x) {
  const bool fits = weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == x.size(-1);
  TORCH_CHECK(fits && weight.scalar_type() == x.scalar_type(), "the norm's weight does not fit its input ", x.sizes());
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_weight(weight, x);
  at::Tensor out = x.dim() == 2 ? memory::empty_rows(x.size(0), x.size(1), x.scalar_type()) : memory::empty_like(x);
  with_dtype(x, "kernel for", [&]<class T>() {
    const auto source = rows_of<const T>(x);
    const auto target = rows_of<T>(out);
    const T* scale = weight.const_data_ptr<T>();
    for_each_row(source.count(), source.size, CHEAP_GRAIN, [&](int64_t row) {
      norm_row(source[row], scale, source.size, static_cast<float>(eps), target[row]);
    });
  });
  return out;
}

// The norm of x + residual, and the sum.
std::tuple<at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  check_weight(weight, x);
  TORCH_CHECK(residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type(), "the residual must be like x");
  TORCH_CHECK(x.dim() == 2, "expected [num_tokens, size], got ", x.sizes());
  at::Tensor out = memory::empty_rows(x.size(0), x.size(1), x.scalar_type()), sum = memory::empty_like(x);
  with_dtype(x, "kernel for", [&]<class T>() {
    const auto left = rows_of<const T>(x), right = rows_of<const T>(residual);
    const auto normed = rows_of<T>(out), total = rows_of<T>(sum);
    const T* scale = weight.const_data_ptr<T>();
    for_each_row(left.count(), left.size, CHEAP_GRAIN, [&](int64_t row) {
      const T *a = left[row], *b = right[row];
      T* c = total[row];
      for_each_block(left.size, [&](int64_t first, int64_t count) INLINED {
        write(read(a + first, count) + read(b + first, count), c + first, count);
      });
      norm_row<T>(c, scale, left.size, static_cast<float>(eps), normed[row]);
    });
  });
  return {out, sum};
}

// ---- SwiGLU's activation ----

// x: gate and up side by side.
at::Tensor silu_and_mul(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "expected gate and up side by side, got ", x.sizes());
  const int64_t size = x.size(1) / 2;
  at::Tensor out = memory::empty_rows(x.size(0), size, x.scalar_type());
  with_dtype(x, "kernel for", [&]<class T>() {
    const auto source = rows_of<const T>(x);
    const auto target = rows_of<T>(out);
    for_each_row(source.count(), size, COSTLY_GRAIN, [&](int64_t row) {
      const T *gate = source[row], *up = gate + size;
      T* result = target[row];
      for_each_block(size, [&](int64_t first, int64_t count) INLINED {
        write(activate<T>(read(gate + first, count), read(up + first, count)), result + first, count);
      });
    });
  });
  return out;
}

// ---- rotary positions ----

// cos_sin: of one position, cos of each angle, then sin of each.
template <class T>
void rotate_head(const T* x, const float* cos_sin, int64_t half, T* out) {
  for_each_block(half, [&](int64_t first, int64_t count) INLINED {
    const Block cos = read(cos_sin + first, count), sin = read(cos_sin + half + first, count);
    const Block x1 = read(x + first, count), x2 = read(x + half + first, count);
    write(x1 * cos - x2 * sin, out + first, count);
    write(x2 * cos + x1 * sin, out + half + first, count);
  });
}

void check_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos_sin) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) == positions.size(0), "expected heads of each of the positions, got ", x.sizes());
  TORCH_CHECK(x.size(2) == cos_sin.size(-1) && x.size(2) % 2 == 0, "the table is for heads of ", cos_sin.size(-1));
}

// Rotate the heads of q and k [num_tokens, num_heads, head_dim], normed before if there are weights for it; cos_sin: float32
// [num_positions, 1, head_dim].
std::tuple<at::Tensor, at::Tensor> rotate(
    const at::Tensor& positions, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos_sin,
    const std::optional<at::Tensor>& q_norm, const std::optional<at::Tensor>& k_norm, double eps) {
  TORCH_CHECK(cos_sin.dim() == 3 && cos_sin.is_contiguous() && cos_sin.scalar_type() == at::kFloat, "not a table of angles");
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.is_contiguous(), "positions must be int64");
  check_heads(q, positions, cos_sin);
  check_heads(k, positions, cos_sin);
  TORCH_CHECK(q.scalar_type() == k.scalar_type(), "q and k differ in dtype");
  if (q_norm.has_value()) check_weight(*q_norm, q);
  if (k_norm.has_value()) check_weight(*k_norm, k);
  at::Tensor q_out = memory::empty_like(q), k_out = memory::empty_like(k);
  const int64_t *position = positions.const_data_ptr<int64_t>(), head_dim = q.size(2), num_positions = cos_sin.size(0);
  const float* table = cos_sin.const_data_ptr<float>();
  with_dtype(q, "kernel for", [&]<class T>() {
    const auto q_rows = rows_of<const T>(q), k_rows = rows_of<const T>(k);
    const auto q_target = rows_of<T>(q_out), k_target = rows_of<T>(k_out);
    const T* q_weight = q_norm.has_value() ? q_norm->const_data_ptr<T>() : nullptr;
    const T* k_weight = k_norm.has_value() ? k_norm->const_data_ptr<T>() : nullptr;
    const int64_t size = (q_rows.num_heads + k_rows.num_heads) * head_dim;
    at::parallel_for(0, q_rows.num_tokens, std::max<int64_t>(1, CHEAP_GRAIN / size), [&](int64_t begin, int64_t end) {
      std::vector<T> normed(head_dim);
      for (int64_t token = begin; token < end; ++token) {
        TORCH_CHECK_INDEX(position[token] >= 0 && position[token] < num_positions, "position ", position[token],
                          " is not one of the table's ", num_positions);
        const float* angles = table + position[token] * head_dim;
        const auto rotate_all = [&](const Rows<const T>& from, const T* weight, const Rows<T>& to) {
          for (int64_t row = token * from.num_heads; row < (token + 1) * from.num_heads; ++row) {
            const T* head = from[row];
            if (weight != nullptr) {
              norm_row(head, weight, head_dim, static_cast<float>(eps), normed.data());
              head = normed.data();
            }
            rotate_head(head, angles, head_dim / 2, to[row]);
          }
        };
        rotate_all(q_rows, q_weight, q_target);
        rotate_all(k_rows, k_weight, k_target);
      }
    });
  });
  return {q_out, k_out};
}

}  // namespace layers
}  // namespace

// NANOVLLM_OPS: the namespace of the operators, of each build its own.
TORCH_LIBRARY_FRAGMENT(NANOVLLM_OPS, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &layers::rms_norm);
  library.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", &layers::add_rms_norm);
  library.def("silu_and_mul(Tensor x) -> Tensor", &layers::silu_and_mul);
  library.def(
      "rotate(Tensor positions, Tensor q, Tensor k, Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, float eps) -> "
      "(Tensor, Tensor)",
      &layers::rotate);
}
