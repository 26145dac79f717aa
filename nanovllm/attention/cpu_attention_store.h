// Storing K and V of a step's tokens in the cache, whose layout cpu_paged_attention.cpp explains.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "../utils/cpu_formats.h"
#include "cpu_attention_products.h"
#include "cpu_attention_tasks.h"

namespace {

void check_heads(const at::Tensor& tensor, const at::Tensor& cache, const char* name) {
  TORCH_CHECK(tensor.dim() == 3 && tensor.scalar_type() == cache.scalar_type(), name, " does not fit the cache");
  const bool together = tensor.stride(2) == 1 && (tensor.size(1) == 1 || tensor.stride(1) == tensor.size(2));
  TORCH_CHECK(together, name, ": the heads of a token must lie together");
}

// cache: [num_blocks, num_kv_heads, 2, block_size / 16, 16 * head_dim].
Shape shape_of(const at::Tensor& cache, int64_t num_heads) {
  TORCH_CHECK(cache.dim() == 5 && cache.is_contiguous() && cache.size(2) == 2, "not a cache of this backend");
  TORCH_CHECK(cache.size(4) <= TILE * MAX_HEAD_DIM, "heads have ", MAX_HEAD_DIM, " dimensions at most");
  return {num_heads, cache.size(1), cache.size(4) / TILE, cache.size(3) * TILE};
}

struct NewTokens {
  const at::Tensor &k, &v, &slot_mapping;

  Shape check(const at::Tensor& cache) const {
    check_heads(k, cache, "k");
    check_heads(v, cache, "v");
    TORCH_CHECK(slot_mapping.scalar_type() == at::kLong && slot_mapping.is_contiguous(), "slot_mapping must be int64");
    TORCH_CHECK(slot_mapping.size(0) == k.size(0) && v.sizes() == k.sizes(), "k, v and slot_mapping differ in length");
    const Shape shape = shape_of(cache, k.size(1));
    TORCH_CHECK(k.size(1) == shape.num_kv_heads && k.size(2) == shape.head_dim, "k does not fit the cache");
    return shape;
  }
};

// K and V of a step's tokens, and the cache that they go into.
template <class F>
struct Writer {
  using Scalar = typename F::Scalar;
  Shape shape;
  const Scalar *k, *v;
  int64_t k_stride, v_stride, num_tokens;
  const int64_t* slots;
  Scalar* cache;

  Writer(const NewTokens& tokens, const at::Tensor& cache, const Shape& shape)
      : shape(shape), k(tokens.k.const_data_ptr<Scalar>()), v(tokens.v.const_data_ptr<Scalar>()),
        k_stride(tokens.k.stride(0)), v_stride(tokens.v.stride(0)), num_tokens(tokens.k.size(0)),
        slots(tokens.slot_mapping.const_data_ptr<int64_t>()), cache(cache.mutable_data_ptr<Scalar>()) {}

  // Get the lines for V, which would be waited for.
  void fetch(int64_t token, int64_t head) const {
    if (slots[token] < 0) return;
    const Scalar* v_tile = place(slots[token], head).v;
    for (int64_t d = 0; d < shape.head_dim; d += TILE) __builtin_prefetch(v_tile + d * F::STEP, 1);
  }

  void write(int64_t token, int64_t head) const {
    const int64_t head_dim = shape.head_dim;
    if (slots[token] < 0) return;
    const auto [k_tile, v_tile] = place(slots[token], head);
    const Scalar *k_head = k + token * k_stride + head * head_dim, *v_head = v + token * v_stride + head * head_dim;
    for (int64_t d = 0; d < head_dim; d += F::STEP) {
      for (int64_t i = 0; i < F::STEP; ++i) k_tile[d * TILE + i] = k_head[d + i];
    }
    for (int64_t d = 0; d < head_dim; ++d) v_tile[d * F::STEP] = v_head[d];
  }

  // A unit is 16 tokens of one head: prompts fill a tile while it is in the L1 cache.
  void write_all() const {
    const int64_t chunks = (num_tokens + TILE - 1) / TILE;
    at::parallel_for(0, chunks * shape.num_kv_heads, 4, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit / shape.num_kv_heads * TILE;
        for (int64_t token = first; token < std::min(first + TILE, num_tokens); ++token) {
          write(token, unit % shape.num_kv_heads);
        }
      }
    });
  }

 private:
  struct Place {  // of a token's first values
    Scalar *k, *v;
  };
  Place place(int64_t slot, int64_t head) const {
    const int64_t block = slot / shape.block_size, offset = slot % shape.block_size;
    Scalar* k_block = cache + 2 * (block * shape.num_kv_heads + head) * shape.v_offset();
    Scalar* v_block = k_block + shape.v_offset();
    return {
        k_block + offset / TILE * TILE * shape.head_dim + offset % TILE * F::STEP,
        v_block + offset / F::STEP * F::STEP * shape.head_dim + offset % F::STEP};
  }
};

}  // namespace
