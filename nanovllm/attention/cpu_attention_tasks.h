// Which rows of a step meet which part of the cache, and in what order. See cpu_paged_attention.cpp.
//
// Rows. Query heads that share a K and V head are rows of one matrix: row = query * group + head in the group.
//
// Sequences whose contexts begin with the same blocks (a system prompt, some answers to one prompt) form a tree: partitions
// that several have in common are a segment, from which branches go on, down to what is a sequence's own. The rows of all
// sequences under a segment meet it together: it is read once, not once a sequence, and the rows fill the tiles. Segments of
// one depth are a level; levels are computed one after the other, from the root. Without common blocks there is one level.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu_attention_products.h"

namespace {

struct Shape {
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t v_offset() const { return block_size * head_dim; }  // from K of a tile to its V
};

struct Sequences {  // of a step: see AttentionMetadata in context.py
  const int32_t *cu_seqlens_q, *context_lens, *block_tables;
  int64_t size, block_table_stride;

  int64_t num_queries(int64_t seq) const { return cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]; }
  const int32_t* blocks(int64_t seq) const { return block_tables + seq * block_table_stride; }
  // Blocks that lie before the first query, so that all of the sequence's queries see all of them.
  int64_t num_blocks_before(int64_t seq, int64_t block_size) const {
    return std::max<int64_t>(0, context_lens[seq] - num_queries(seq)) / block_size;
  }
};

struct Query {
  int64_t token;    // of the step
  int64_t visible;  // tokens of its context that it sees
};

struct Segment {
  int64_t seq;  // one of its sequences, for the blocks
  int64_t first_query, num_queries;
  int64_t first_partition, end_partition;
  bool is_last;  // a sequence's own: it ends where a query sees no further

  int64_t end_for(const Query& query) const {
    return is_last ? (query.visible + PARTITION - 1) / PARTITION : end_partition;
  }
};

class Tree {
 public:
  std::vector<Query> queries;  // those of sequences under one segment lie together
  std::vector<std::vector<Segment>> levels;

  Tree(const Sequences& sequences, int64_t block_size) : sequences_(sequences), order_(sequences.size) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      const int32_t *of_a = sequences.blocks(a), *of_b = sequences.blocks(b);
      return std::lexicographical_compare(
          of_a, of_a + sequences.num_blocks_before(a, block_size), of_b, of_b + sequences.num_blocks_before(b, block_size));
    });
    for (size_t place = 0; place < order_.size(); ++place) {
      const int64_t seq = order_[place], num_queries = sequences.num_queries(seq);
      first_queries_.push_back(queries.size());
      for (int64_t query = 0; query < num_queries; ++query) {
        queries.push_back({sequences.cu_seqlens_q[seq] + query, sequences.context_lens[seq] - num_queries + query + 1});
      }
      common_.push_back(place == 0 ? 0 : count_common(order_[place - 1], seq, block_size));
    }
    first_queries_.push_back(queries.size());
    if (!order_.empty()) grow(0, order_.size(), 0, 0);
  }

 private:
  int64_t count_common(int64_t a, int64_t b, int64_t block_size) const {
    const int64_t most = std::min(sequences_.num_blocks_before(a, block_size), sequences_.num_blocks_before(b, block_size));
    const int32_t* blocks = sequences_.blocks(a);
    return (std::mismatch(blocks, blocks + most, sequences_.blocks(b)).first - blocks) * block_size / PARTITION;
  }

  // Sequences from `first` to before `end` of the order, which have all partitions before `partition` in common.
  void grow(int64_t first, int64_t end, int64_t partition, int64_t depth) {
    if (end - first == 1) return add(depth, first, end, partition, 0, true);
    const int64_t common = *std::min_element(common_.begin() + first + 1, common_.begin() + end);
    if (common > partition) add(depth++, first, end, partition, common, false);
    for (int64_t begin = first, next; begin < end; begin = next) {
      for (next = begin + 1; next < end && common_[next] > common;) ++next;
      grow(begin, next, common, depth);
    }
  }

  void add(int64_t depth, int64_t first, int64_t end, int64_t first_partition, int64_t end_partition, bool is_last) {
    const int64_t query = first_queries_[first], num_queries = first_queries_[end] - query;
    if (depth >= static_cast<int64_t>(levels.size())) levels.resize(depth + 1);
    levels[depth].push_back({order_[first], query, num_queries, first_partition, end_partition, is_last});
  }

  const Sequences sequences_;
  std::vector<int64_t> order_;          // of sequences, by their blocks
  std::vector<int64_t> first_queries_;  // of each in the order, and the number of all
  std::vector<int64_t> common_;         // partitions that each in the order has in common with the one before it
};

// Rows of a segment and a KV head, and the partitions of their context to reduce.
struct Task {
  const Segment* segment;
  int64_t kv_head, first_row, num_rows;
  int64_t first_partition, end_partition;
  int64_t partials;  // where the partitions' results go, to be merged later; -1: merge here
};

// All tasks of a level, each over its whole segment.
std::vector<Task> list_tasks(const Tree& tree, const std::vector<Segment>& level, const Shape& shape, int64_t rows_per_task) {
  std::vector<Task> tasks;
  for (const Segment& segment : level) {
    const int64_t begin = segment.first_query * shape.group(), end = begin + segment.num_queries * shape.group();
    for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
      for (int64_t first = begin; first < end; first += rows_per_task) {
        const int64_t num_rows = std::min(rows_per_task, end - first);
        const Query& last = tree.queries[(first + num_rows - 1) / shape.group()];
        tasks.push_back({&segment, kv_head, first, num_rows, segment.first_partition, segment.end_for(last), -1});
      }
    }
  }
  return tasks;
}

inline int64_t cost(const Task& task, int64_t rows_of_tile) {
  return (task.num_rows + rows_of_tile - 1) / rows_of_tile * (task.end_partition - task.first_partition);
}

// Split what is more than a quarter of a thread's share, between partitions.
// Returns the tasks to run; `split` gets the tasks that were split, to be merged, and `num_partials` grows.
std::vector<Task> split_tasks(
    const std::vector<Task>& whole, int64_t rows_of_tile, std::vector<Task>& split, int64_t& num_partials) {
  int64_t total = 0;
  for (const Task& task : whole) total += cost(task, rows_of_tile);
  const int64_t largest = std::max<int64_t>(1, total / (4 * at::get_num_threads()));
  std::vector<Task> tasks;
  for (Task task : whole) {
    if (cost(task, rows_of_tile) <= largest || at::get_num_threads() == 1) {
      tasks.push_back(task);
      continue;
    }
    const int64_t end = task.end_partition;
    const int64_t span = std::max<int64_t>(1, largest * (end - task.first_partition) / cost(task, rows_of_tile));
    task.partials = num_partials;
    split.push_back(task);
    for (; task.first_partition < end; task.first_partition += span) {
      task.end_partition = std::min(end, task.first_partition + span);
      tasks.push_back(task);
      task.partials += (task.end_partition - task.first_partition) * task.num_rows;
    }
    num_partials = task.partials;
  }
  return tasks;
}

}  // namespace
