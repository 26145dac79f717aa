// Memory for kernels. What they compute is kept for what they compute next: torch's allocator gives large blocks of a CPU's
// memory back to the system, which has to clear every page when it is used again, some per cent of a step's time. What is
// large lies in large pages: with small ones the processor spends up to a tenth of the time on finding where they are.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {
namespace memory {

constexpr size_t LARGE = 1 << 17;  // bytes from which the C library may give memory back at once
constexpr size_t PAGE = 4096, LARGE_PAGE = 1 << 21;

size_t rounded_up(size_t size) {
  const size_t page = size < LARGE_PAGE ? PAGE : LARGE_PAGE;
  return (size + page - 1) / page * page;
}

// `size` as rounded_up gives it.
void* allocate(size_t size) {
  void* data = std::aligned_alloc(size < LARGE_PAGE ? PAGE : LARGE_PAGE, size);
  if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (size >= LARGE_PAGE) madvise(data, size, MADV_HUGEPAGE);  // a wish: where there are no large pages, it stays without them
#endif
  return data;
}

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
    if (block.data == nullptr) block = {allocate(size), size};
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
  // The smallest free block that is large enough. One that is much too large will do: to get another from the system, and to
  // give one back for it, would cost more than what lies idle, at each layer.
  Block reuse(size_t size) {
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->size >= size && (best == free_.end() || block->size < best->size)) best = block;
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

size_t num_bytes(at::IntArrayRef sizes, at::ScalarType dtype) {
  size_t size = c10::elementSize(dtype);
  for (const int64_t each : sizes) size *= each;
  return size;
}

// An uninitialised tensor that lasts, such as weights or a KV cache: in large pages, unless `populate` gets it in others.
at::Tensor empty_lasting(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::from_blob(allocate(rounded_up(num_bytes(sizes, dtype))), sizes, [](void* data) { std::free(data); }, dtype);
}

// Get the memory of tensors[.., first to end - 1] from the system, which clears each page when it is used for the first time:
// all threads together, where otherwise one would wait for it and the others for that one. What is in it stays. What would be
// one large page goes with the row in which it begins.
void populate(at::TensorList tensors, int64_t first, int64_t end, bool in_large_pages) {
  std::vector<std::pair<char*, size_t>> parts;
  for (const at::Tensor& tensor : tensors) {
    const size_t size = tensor.nbytes(), row = size / tensor.size(0);
    const auto bound = [&](size_t index) { return std::min((index * row + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE, size); };
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
#ifdef __linux__
    if (!in_large_pages) madvise(data + bound(first), bound(end) - bound(first), MADV_NOHUGEPAGE);
#endif
    for (size_t at = bound(first); at < bound(end); at += LARGE_PAGE) {
      parts.emplace_back(data + at, std::min(LARGE_PAGE, bound(end) - at));
    }
  }
  at::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t stop) {
    for (; begin < stop; ++begin) {
      const auto [data, size] = parts[begin];
      // Added to, not read and written: for a reading alone the system would find another page, of zeros.
      for (size_t at = 0; at < size; at += PAGE) __atomic_fetch_add(data + at, 0, __ATOMIC_RELAXED);
    }
  });
}

// An uninitialised tensor. Its memory comes back when the tensor is not used any more.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  static Pool& pool = *new Pool;  // never destroyed: tensors may be freed later than statics
  const size_t size = num_bytes(sizes, dtype);
  if (size < LARGE) return at::empty(sizes, dtype);
  const Block block = pool.take(rounded_up(size));
  return at::from_blob(block.data, sizes, [block](void*) { pool.give_back(block); }, dtype);
}

// Bytes of data that a core's first-level cache holds.
int64_t first_level_cache() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  if (const int64_t size = sysconf(_SC_LEVEL1_DCACHE_SIZE); size >= 32768) return size;
#endif
  return 32768;
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
