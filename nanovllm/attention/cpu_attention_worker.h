// The work on a task: scores, softmax and weighted V of its rows, partition by partition. See cpu_paged_attention.cpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "../utils/cpu_formats.h"
#include "cpu_attention_products.h"
#include "cpu_attention_softmax.h"
#include "cpu_attention_store.h"
#include "cpu_attention_tasks.h"

namespace {

template <class F>
constexpr int64_t ROWS_PER_TASK = F::BY_AMX ? 128 : 48;  // a multiple of a tile's rows

template <class F>
struct Batch {
  using Scalar = typename F::Scalar;
  Shape shape;
  float scale;  // of scores, for powers of 2
  const Scalar* q;
  int64_t q_stride;
  const Scalar* cache;
  Scalar* out;
  int64_t out_stride;
  Sequences sequences;
  const Tree& tree;
  const std::optional<Writer<F>>& decodes;  // still to be stored: one token of each sequence
  // Of each KV head and row: what was reduced on the levels before, where there are several.
  Reduced* totals;
  float* total_outs;

  const Query& query(int64_t row) const { return tree.queries[row / shape.group()]; }
  int64_t head_offset(const Task& task, int64_t row) const {
    return (task.kv_head * shape.group() + row % shape.group()) * shape.head_dim;
  }
  const Scalar* k_tile(const Task& task, int64_t position) const {
    const int64_t block = sequences.blocks(task.segment->seq)[position / shape.block_size];
    const int64_t head = block * shape.num_kv_heads + task.kv_head;
    return cache + (2 * head * shape.block_size + position % shape.block_size / TILE * TILE) * shape.head_dim;
  }
  int64_t total_index(const Task& task, int64_t row) const {
    return task.kv_head * tree.queries.size() * shape.group() + row;
  }
  // What was reduced of a row before its segment.
  Reduced begin(const Task& task, int64_t row, float* weighted) const {
    if (task.segment->first_partition == 0) return {};
    const int64_t index = total_index(task, row);
    std::copy_n(total_outs + index * shape.head_dim, shape.head_dim, weighted);
    return totals[index];
  }
  // Store the token that a task's sequence decodes, if it is this task that reads it.
  void store(const Task& task, const Task* next_task) const {
    if (!decodes.has_value()) return;
    const Query& last = query(task.first_row);
    if (task.end_partition * PARTITION >= last.visible) decodes->write(last.token, task.kv_head);
    if (next_task != nullptr) decodes->fetch(query(next_task->first_row).token, next_task->kv_head);
  }
  // Leave what has been reduced of a row for the next level, or write its result.
  void end(const Task& task, int64_t row, const Reduced& reduced, const float* weighted) const {
    if (!task.segment->is_last) {
      const int64_t index = total_index(task, row);
      totals[index] = reduced;
      std::copy_n(weighted, shape.head_dim, total_outs + index * shape.head_dim);
      return;
    }
    Scalar* target = out + query(row).token * out_stride + head_offset(task, row);
    if (reduced.sum == 0.0f) {  // a row that sees nothing
      std::fill(target, target + shape.head_dim, Scalar(0.0f));
      return;
    }
    const float factor = 1.0f / reduced.sum;
    for (int64_t d = 0; d < shape.head_dim; ++d) target[d] = static_cast<Scalar>(weighted[d] * factor);
  }
};

// One thread's memory and the work on a task.
template <class F>
class Worker {
 public:
  using Scalar = typename F::Scalar;
  using Value = typename F::Value;

  Worker(const Batch<F>& batch, Reduced* partials, float* partial_outs)
      : batch_(batch), partials_(partials), partial_outs_(partial_outs), head_dim_(batch.shape.head_dim) {}

  // next_task: what comes then, if anything; what it reads first is fetched at the end.
  void run(const Task& task, const Task* next_task) {
    batch_.store(task, next_task);
    load_queries(task);
    if (task.partials < 0) {
      for (int64_t row = 0; row < task.num_rows; ++row) {
        reduced_[row] = batch_.begin(task, task.first_row + row, &totals_[row * head_dim_]);
      }
    }
    find_tiles(task, task.first_partition, next_);
    for (int64_t partition = task.first_partition; partition < task.end_partition; ++partition) {
      kv_ = next_;
      if (partition + 1 < task.end_partition) find_tiles(task, partition + 1, next_);
      else if (next_task != nullptr) find_tiles(*next_task, next_task->first_partition, next_);
      else next_.num_tiles = 0;
      for (int64_t row = 0; row < task.num_rows; row += F::ROWS) {
        reduce_rows(task, partition, row, std::min<int64_t>(F::ROWS, task.num_rows - row));
      }
    }
    if (task.partials >= 0) return;
    for (int64_t row = 0; row < task.num_rows; ++row) {
      batch_.end(task, task.first_row + row, reduced_[row], &totals_[row * head_dim_]);
    }
  }

 private:
  void load_queries(const Task& task) {
    for (int64_t i = 0; i < task.num_rows; ++i) {
      const int64_t row = task.first_row + i;
      const Scalar* q = batch_.q + batch_.query(row).token * batch_.q_stride + batch_.head_offset(task, row);
      for (int64_t d = 0; d < head_dim_; d += TILE) F::pack(q + d, &q_[i * QUERY_STRIDE + d]);
    }
  }

  void find_tiles(const Task& task, int64_t partition, Partition<F>& kv) const {
    const int64_t begin = partition * PARTITION;
    const int64_t visible = batch_.query(task.first_row + task.num_rows - 1).visible;
    const int64_t end = std::min(visible, begin + PARTITION);
    kv.num_tiles = 0;
    for (int64_t first = begin; first < end; first += SPAN<F>) {
      for (int64_t position = first; position < first + SPAN<F>; position += TILE, ++kv.num_tiles) {
        const int64_t known = std::min(position, (end - 1) / TILE * TILE);  // the rest of a span need not be fetched
        kv.k[kv.num_tiles] = batch_.k_tile(task, known);
        kv.v[kv.num_tiles] = kv.k[kv.num_tiles] + batch_.shape.v_offset();
      }
    }
  }

  // Let V of the partition's last span be a copy with 0 behind what has been written of it.
  void leave_out_unwritten(const Task& task, int64_t partition) {
    const int64_t first_tile = kv_.num_tiles - SPAN<F> / TILE;
    const int64_t num_written = batch_.sequences.context_lens[task.segment->seq] - partition * PARTITION - first_tile * TILE;
    if (num_written >= SPAN<F> || kv_.v[first_tile] == last_v_) return;
    const int64_t num_steps = (num_written + F::STEP - 1) / F::STEP, size = head_dim_ * F::STEP;
    std::copy_n(kv_.v[first_tile], num_steps * size, last_v_);
    std::fill(last_v_ + num_steps * size, last_v_ + SPAN<F> * head_dim_, Scalar(0.0f));
    for (int64_t token = num_written; token < num_steps * F::STEP; ++token) {
      for (int64_t d = 0; d < head_dim_; ++d) last_v_[(num_steps - 1) * size + d * F::STEP + token % F::STEP] = Scalar(0.0f);
    }
    for (int64_t tile = first_tile; tile < kv_.num_tiles; ++tile) {
      kv_.v[tile] = last_v_ + (tile - first_tile) * TILE * head_dim_;
    }
  }

  // Reduce a partition for a tile of rows, from `row` of the task on.
  void reduce_rows(const Task& task, int64_t partition, int64_t row, int64_t num_rows) {
    const int64_t begin = partition * PARTITION;
    const int64_t visible = batch_.query(task.first_row + row + num_rows - 1).visible - begin;
    const int64_t num_spans = (visible + SPAN<F> - 1) / SPAN<F>;
    const int64_t num_tiles = std::clamp<int64_t>(num_spans * SPAN<F> / TILE, 0, kv_.num_tiles);
    Reduced parts[F::ROWS];
    if (num_tiles > 0) compute(row, num_rows, num_tiles, [&] {
      leave_out_unwritten(task, partition);
      for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t num_valid = batch_.query(task.first_row + row + i).visible - begin;
        parts[i] = softmax<F>(
            &scores_[i * SCORE_STRIDE], num_valid, num_tiles * TILE, batch_.scale, &p_[i * SCORE_STRIDE]);
      }
    });
    for (int64_t i = 0; i < num_rows; ++i) {
      const float* out = &out_[i * head_dim_];
      if (task.partials < 0) {
        merge(reduced_[row + i], &totals_[(row + i) * head_dim_], parts[i], out, head_dim_);
      } else {
        const int64_t index = task.partials + (partition - task.first_partition) * task.num_rows + row + i;
        partials_[index] = parts[i];
        if (parts[i].sum != 0.0f) std::copy(out, out + head_dim_, partial_outs_ + index * head_dim_);
      }
    }
  }

  // Scores, softmax of each row, weighted sum of V: by the smallest kernel that has the rows.
  template <class Softmax>
  void compute(int64_t row, int64_t num_rows, int64_t num_tiles, const Softmax& softmax_rows) {
    const Value* q = &q_[row * QUERY_STRIDE];
#ifdef NANOVLLM_AMX
    if constexpr (F::BY_AMX) {
      tiles_.set_rows(std::min(amx::STRIP, num_rows));
      const bool is_one = num_rows <= amx::STRIP;
      (is_one ? score_strips<1> : score_strips<2>)(q, num_rows, kv_, num_tiles, head_dim_, scores_);
      softmax_rows();
      (is_one ? weigh_strips<1> : weigh_strips<2>)(p_, num_rows, kv_, next_, num_tiles, head_dim_, out_);
      return;
    }
#endif
    const auto with_rows = [&]<int ROWS>() {
      score<F, ROWS>(q, kv_, num_tiles, head_dim_, scores_);
      softmax_rows();
      weigh<F, ROWS>(p_, kv_, next_, num_tiles, head_dim_, out_);
    };
    if (num_rows == 1) return with_rows.template operator()<1>();
    if (num_rows == 2) return with_rows.template operator()<2>();
    if (num_rows == 3) return with_rows.template operator()<3>();
    if (num_rows == 4) return with_rows.template operator()<4>();
    if (num_rows <= 6) return with_rows.template operator()<6>();
    if constexpr (F::ROWS == 12) {
      if (num_rows <= 8) return with_rows.template operator()<8>();
      return with_rows.template operator()<12>();
    }
  }

  const Batch<F>& batch_;
  Reduced* partials_;
  float* partial_outs_;
  const int64_t head_dim_;
  Partition<F> kv_, next_;
  Reduced reduced_[ROWS_PER_TASK<F>];
  alignas(64) Value q_[ROWS_PER_TASK<F> * QUERY_STRIDE];
  alignas(64) Value p_[F::ROWS * SCORE_STRIDE];
  alignas(64) float scores_[F::ROWS * SCORE_STRIDE];
  alignas(64) float out_[F::ROWS * MAX_HEAD_DIM];  // [num_rows, head_dim]: of the partition
  alignas(64) float totals_[ROWS_PER_TASK<F> * MAX_HEAD_DIM];
  alignas(64) Scalar last_v_[SPAN<F> * MAX_HEAD_DIM];
#ifdef NANOVLLM_AMX
  std::conditional_t<F::BY_AMX, amx::Tiles, std::nullptr_t> tiles_{};
#endif
};

}  // namespace
