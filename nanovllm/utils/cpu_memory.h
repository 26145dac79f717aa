// Memory of what kernels compute, kept for what they compute next. torch's allocator gives large blocks of a CPU's memory
// back to the system, which has to clear every page when it is used again: some per cent of a step's time.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace {
namespace memory {

constexpr size_t LARGE = 1 << 17;  // bytes from which the C library may give memory back at once
constexpr size_t PAGE = 4096;

struct Block {
  void* data;
  size_t size;
};

// Of blocks that are in use and blocks that are not, together never more than were once in use at the same time.
class Pool {
 public:
  Block take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Block block = reuse(size);
    if (block.data == nullptr) block = {std::aligned_alloc(PAGE, size), size};
    if (block.data == nullptr) throw std::bad_alloc();
    used_ += block.size;
    most_ = std::max(most_, used_);
    while (used_ + unused_ > most_) release_oldest();
    return block;
  }

  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.size;
    unused_ += block.size;
    free_.push_back(block);
  }

 private:
  // The smallest free block that is large enough, unless it is much too large.
  Block reuse(size_t size) {
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const bool fits = block->size >= size && block->size <= 2 * size;
      if (fits && (best == free_.end() || block->size < best->size)) best = block;
    }
    if (best == free_.end()) return {nullptr, 0};
    const Block block = *best;
    free_.erase(best);
    unused_ -= block.size;
    return block;
  }

  void release_oldest() {
    std::free(free_.front().data);
    unused_ -= free_.front().size;
    free_.erase(free_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order in which they were given back
  size_t used_ = 0, unused_ = 0, most_ = 0;  // bytes
};

// An uninitialised tensor. Its memory comes back when the tensor is not used any more.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  static Pool& pool = *new Pool;  // never destroyed: tensors may be freed later than statics
  size_t size = c10::elementSize(dtype);
  for (const int64_t each : sizes) size *= each;
  if (size < LARGE) return at::empty(sizes, dtype);
  const Block block = pool.take((size + PAGE - 1) / PAGE * PAGE);
  return at::from_blob(block.data, sizes, [block](void*) { pool.give_back(block); }, dtype);
}

// Whether the same places of rows at this distance in bytes are the same few places of the first-level cache.
bool compete(size_t distance) { return distance % 4096 == 0; }

// Rows that a product will read, several at a time: they lie together, or somewhat apart if they would compete.
at::Tensor empty_rows(int64_t num_rows, int64_t size, at::ScalarType dtype) {
  const size_t value = c10::elementSize(dtype);
  if (num_rows <= 1 || !compete(size * value)) return empty({num_rows, size}, dtype);
  return empty({num_rows, size + static_cast<int64_t>(64 / value)}, dtype).narrow(1, 0, size);
}

at::Tensor empty_like(const at::Tensor& x) { return empty(x.sizes(), x.scalar_type()); }

}  // namespace memory
}  // namespace
