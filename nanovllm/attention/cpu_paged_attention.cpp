// Paged attention on a CPU: one kernel for prefill chunks and decodes alike. Built and called by cpu.py.
//
// A task is up to ROWS_PER_TASK rows, see cpu_attention_tasks.h. It walks over the context in partitions of PARTITION tokens,
// and in each over tiles of a few rows, so that K and V of a partition come from memory once and from the L2 cache then.
//
// Cache of one layer: [block, KV head, K then V, tile of 16 tokens], where STEP is 1, and 2 for the bf16 dot product and AMX:
//     K of a tile: [head_dim / STEP, 16 tokens, STEP]     a step is multiplied with a query's dimension(s),
//     V of a tile: [16 tokens / STEP, head_dim, STEP]     ... with a probability, or two:
// so both products of attention are the same loop, over the lines of cpu_formats.h.
//
// Softmax. Each partition is reduced on its own to (maximum, sum, weighted V), and the results are merged from the first
// partition to the last (online softmax: Milakov and Gimelshein 2018; partitions: Dao et al. 2023, "Flash-Decoding").
// Long contexts may be split among threads between partitions, and what several sequences have in common is reduced for all of
// them together; the merging is the same then.
//
// The result of a row is a function of its own query, K and V, bit for bit: the operations on a row and their order do
// not depend on the other rows of its tile, on the number of threads or on how the prompt was cut into chunks. Hence
// -ffp-contract=off, explicit fused operations, and loops whose order of summation is written out. Columns behind a row's
// position are given probability 0, which adds nothing; V that was never written, which may be NaN, is replaced by 0.
// The threads are torch's own (at::parallel_for): one pool, so that products and attention do not compete for cores.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "../utils/cpu_formats.h"
#include "../utils/cpu_math.h"
#include "../utils/cpu_memory.h"
#include "cpu_attention_products.h"
#include "cpu_attention_softmax.h"
#include "cpu_attention_store.h"
#include "cpu_attention_tasks.h"

namespace {

template <class F>
constexpr int64_t ROWS_PER_TASK = F::BY_AMX ? 128 : 48;  // a multiple of a tile's rows

// ---- the work on a task ----

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

// Run work() on the threads of torch's pool, on no more of them than there are tasks.
template <class Work>
void on_all_threads(int64_t num_tasks, const Work& work) {
  at::parallel_for(0, std::min<int64_t>(num_tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    if (begin < end) work();
  });
}

template <class F>
void merge_partials(const Batch<F>& batch, const Task& task, const Reduced* partials, const float* outs) {
  const int64_t head_dim = batch.shape.head_dim;
  std::vector<float> total_out(head_dim);
  for (int64_t row = 0; row < task.num_rows; ++row) {
    Reduced total = batch.begin(task, task.first_row + row, total_out.data());
    for (int64_t partition = task.first_partition; partition < task.end_partition; ++partition) {
      const int64_t index = task.partials + (partition - task.first_partition) * task.num_rows + row;
      merge(total, total_out.data(), partials[index], outs + index * head_dim, head_dim);
    }
    batch.end(task, task.first_row + row, total, total_out.data());
  }
}

template <class F>
void attend_level(const Batch<F>& batch, const std::vector<Segment>& level) {
  std::vector<Task> split;
  int64_t num_partials = 0;
  const std::vector<Task> whole = list_tasks(batch.tree, level, batch.shape, ROWS_PER_TASK<F>);
  const std::vector<Task> tasks = split_tasks(whole, F::ROWS, split, num_partials);
  std::vector<Reduced> partials(num_partials);
  const at::Tensor partial_outs = memory::empty({num_partials, batch.shape.head_dim}, at::kFloat);
  float* outs = partial_outs.mutable_data_ptr<float>();
  const int64_t num_tasks = tasks.size();
  std::atomic<int64_t> counter{0};
  on_all_threads(num_tasks, [&] {
    Worker<F> worker(batch, partials.data(), outs);
    int64_t next = counter++;
    while (next < num_tasks) {
      const Task& task = tasks[next];
      next = counter++;  // known before the work begins
      worker.run(task, next < num_tasks ? &tasks[next] : nullptr);
    }
  });
  at::parallel_for(0, split.size(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) merge_partials<F>(batch, split[begin], partials.data(), outs);
  });
}

// ---- operators ----

// Values of a row that both products take, for with_format: of a query, or of V's tokens in a block.
int64_t row_size(const Shape& shape) { return std::gcd(shape.head_dim, shape.block_size); }

void store(const at::Tensor& k, const at::Tensor& v, at::Tensor cache, const at::Tensor& slot_mapping) {
  const NewTokens tokens{k, v, slot_mapping};
  const Shape shape = tokens.check(cache);
  with_format(cache, true, row_size(shape), "kernel for", [&]<class F>() { Writer<F>(tokens, cache, shape).write_all(); });
}

// decodes: one token of each sequence, to be stored meanwhile; or nothing, if all are stored.
void attend_with(
    const NewTokens* decodes, const at::Tensor& q, const at::Tensor& cache, const at::Tensor& out,
    const at::Tensor& cu_seqlens_q, const at::Tensor& context_lens, const at::Tensor& block_tables, double scale) {
  check_heads(q, cache, "q");
  check_heads(out, cache, "out");
  TORCH_CHECK(out.sizes() == q.sizes(), "out must be like q");
  const Shape shape = shape_of(cache, q.size(1));
  TORCH_CHECK(q.size(2) == shape.head_dim && q.size(1) % shape.num_kv_heads == 0, "q does not fit the cache");
  TORCH_CHECK(block_tables.stride(1) == 1 || block_tables.size(1) == 1, "rows of block_tables must be contiguous");
  const int64_t num_seqs = context_lens.size(0);
  TORCH_CHECK(cu_seqlens_q.size(0) == num_seqs + 1 && block_tables.size(0) == num_seqs, "not one batch");
  const Sequences sequences{
      cu_seqlens_q.const_data_ptr<int32_t>(), context_lens.const_data_ptr<int32_t>(), block_tables.const_data_ptr<int32_t>(),
      num_seqs, block_tables.stride(0)};
  const Tree tree(sequences, shape.block_size);
  const int64_t num_totals = tree.levels.size() > 1 ? tree.queries.size() * shape.num_heads : 0;
  std::vector<Reduced> totals(num_totals);
  const at::Tensor total_outs = memory::empty({num_totals, shape.head_dim}, at::kFloat);
  with_format(q, true, row_size(shape), "kernel for", [&]<class F>() {
    using Scalar = typename F::Scalar;
    std::optional<Writer<F>> writer;
    if (decodes != nullptr) writer.emplace(*decodes, cache, shape);
    const Batch<F> batch{
        shape, static_cast<float>(scale * LOG2_E), q.const_data_ptr<Scalar>(), q.stride(0), cache.const_data_ptr<Scalar>(),
        out.mutable_data_ptr<Scalar>(), out.stride(0), sequences, tree, writer, totals.data(),
        total_outs.mutable_data_ptr<float>()};
    for (const std::vector<Segment>& level : tree.levels) attend_level<F>(batch, level);
  });
}

void attend(
    const at::Tensor& q, const at::Tensor& cache, at::Tensor out, const at::Tensor& cu_seqlens_q,
    const at::Tensor& context_lens, const at::Tensor& block_tables, double scale) {
  attend_with(nullptr, q, cache, out, cu_seqlens_q, context_lens, block_tables, scale);
}

// The same as both, one after the other. Decodes are stored by the thread that is about to read what lies around them: K and V of
// a token are spread over many lines, which would come from memory once more.
void store_and_attend(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor cache, at::Tensor out,
    const at::Tensor& slot_mapping, const at::Tensor& cu_seqlens_q, const at::Tensor& context_lens,
    const at::Tensor& block_tables, double scale) {
  const NewTokens tokens{k, v, slot_mapping};
  tokens.check(cache);
  const bool are_decodes = q.size(0) == context_lens.size(0) && k.size(0) == q.size(0);
  if (!are_decodes) store(k, v, cache, slot_mapping);
  attend_with(are_decodes ? &tokens : nullptr, q, cache, out, cu_seqlens_q, context_lens, block_tables, scale);
}

}  // namespace

// NANOVLLM_OPS: the namespace of the operators, of each build its own.
TORCH_LIBRARY_FRAGMENT(NANOVLLM_OPS, library) {
  library.def("empty_lasting(int[] sizes, ScalarType dtype) -> Tensor", &memory::empty_lasting);
  library.def("populate(Tensor(a!)[] tensors, int first, int end, bool in_large_pages) -> ()", &memory::populate);
  library.def("store(Tensor k, Tensor v, Tensor(a!) cache, Tensor slot_mapping) -> ()", &store);
  library.def(
      "attend(Tensor q, Tensor cache, Tensor(a!) out, Tensor cu_seqlens_q, Tensor context_lens, Tensor block_tables, "
      "float scale) -> ()",
      &attend);
  library.def(
      "store_and_attend(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, Tensor(b!) out, Tensor slot_mapping, "
      "Tensor cu_seqlens_q, Tensor context_lens, Tensor block_tables, float scale) -> ()",
      &store_and_attend);
}
