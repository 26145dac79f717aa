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
#include "cpu_attention_worker.h"

namespace {

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
