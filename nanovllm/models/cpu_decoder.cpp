// Decoder layers on a CPU, some in one call: the kernels of the files before this one, in the order of the layers in
// qwen3.py, which call them one by one and give the same, bit for bit. A step of few tokens is spared a dozen calls from
// Python for each layer: in a small model they take longer than its products. Called by cpu_decoder.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../utils/cpu_memory.h"

namespace {
namespace decoder {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Weights = c10::List<Optional>;

struct Layer {  // its weights, in the order in which cpu_decoder.py gives them; and how many there are
  Tensor input_norm, qkv;
  Optional qkv_bias, q_norm, k_norm;
  Tensor o;
  Optional o_bias;
  Tensor mlp_norm, gate_up;
  Optional gate_up_bias;
  Tensor down;
  Optional down_bias;
  static constexpr int64_t SIZE = 12;
};

Layer layer_of(const Weights& weights, int64_t index) {
  const auto at = [&](int64_t place) -> Optional { return weights[index * Layer::SIZE + place]; };
  return {*at(0), *at(1), at(2), at(3), at(4), *at(5), at(6), *at(7), *at(8), at(9), *at(10), at(11)};
}

struct Step {  // see AttentionMetadata in context.py
  Tensor positions, cos_sin, slot_mapping, cu_seqlens_q, context_lens, block_tables;
  double eps, scale;

  int64_t num_tokens() const { return positions.size(0); }
  bool has_only_decodes() const { return num_tokens() == context_lens.size(0); }
  // The step of some sequences alone, where each has one token.
  Step of(int64_t first, int64_t size) const {
    return {
        positions.narrow(0, first, size), cos_sin, slot_mapping.narrow(0, first, size), cu_seqlens_q.narrow(0, 0, size + 1),
        context_lens.narrow(0, first, size), block_tables.narrow(0, first, size), eps, scale};
  }
};

// x [num_tokens, input_size] times a weight: packed by cpu_linear.cpp, by oneDNN, or not.
Tensor multiply(const Tensor& x, const Tensor& weight, const Optional& bias, int64_t output_size) {
  if (linear::is_packed(weight)) return linear::product(x, weight, bias, output_size);
  if (!weight.is_mkldnn()) return at::linear(x, weight, bias);
  using Operands = c10::List<std::optional<at::Scalar>>;
  using Product = Tensor(
      const Tensor&, const Tensor&, const Optional&, std::string_view, Operands, std::optional<std::string_view>);
  static const auto product =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Product>();
  return product.call(x, weight, bias, "none", Operands(), "");
}

int64_t input_size(const Tensor& weight) { return weight.size(1) * (linear::is_packed(weight) ? weight.size(3) : 1); }

// Where each sequence's outputs begin among all: cu_seqlens_q of a step of them alone. All come last in their sequences.
Tensor cu_seqlens_of(const Tensor& outputs, const Tensor& cu_seqlens_q) {
  const Tensor result = at::zeros_like(cu_seqlens_q);
  const int64_t num_outputs = outputs.size(0), *tokens = outputs.const_data_ptr<int64_t>();
  const auto* begins = cu_seqlens_q.const_data_ptr<int32_t>();
  for (int64_t seq = 1, output = 0; seq < result.size(0); ++seq) {
    for (; output < num_outputs && tokens[output] < begins[seq]; ++output) {
      TORCH_CHECK(tokens[output] == begins[seq] - 1, "token ", tokens[output], " is an output, but not its sequence's last");
    }
    result.mutable_data_ptr<int32_t>()[seq] = output;
  }
  return result;
}

// outputs: the tokens to attend for, if not all; K and V of all are stored.
Tensor self_attention(
    const Tensor& x, const Layer& layer, const Tensor& cache, const Step& step, const Optional& outputs) {
  const int64_t num_tokens = x.size(0), q_size = input_size(layer.o), head_dim = step.cos_sin.size(2);
  const int64_t num_heads = q_size / head_dim, num_kv_heads = cache.size(1), all_heads = num_heads + 2 * num_kv_heads;
  const Tensor heads =
      multiply(x, layer.qkv, layer.qkv_bias, all_heads * head_dim).view({num_tokens, all_heads, head_dim});
  Tensor q = heads.narrow(1, 0, num_heads), k = heads.narrow(1, num_heads, num_kv_heads);
  const Tensor v = heads.narrow(1, num_heads + num_kv_heads, num_kv_heads);
  std::tie(q, k) = layers::rotate(step.positions, q, k, step.cos_sin, layer.q_norm, layer.k_norm, step.eps);
  if (outputs.has_value()) q = q.index_select(0, *outputs);
  const Tensor cu_seqlens_q = outputs.has_value() ? cu_seqlens_of(*outputs, step.cu_seqlens_q) : step.cu_seqlens_q;
  const Tensor out = memory::empty_rows(q.size(0), q_size, q.scalar_type());
  const Tensor out_heads = out.view({q.size(0), num_heads, head_dim});
  store_and_attend(
      q, k, v, cache, out_heads, step.slot_mapping, cu_seqlens_q, step.context_lens, step.block_tables, step.scale);
  return multiply(out, layer.o, layer.o_bias, x.size(1));
}

Tensor activate(const Tensor& x, const Layer& layer) {
  const int64_t size = 2 * input_size(layer.down);
  if (linear::is_packed(layer.gate_up)) return linear::gated_product(x, layer.gate_up, layer.gate_up_bias, size);
  return layers::silu_and_mul(multiply(x, layer.gate_up, layer.gate_up_bias, size));
}

Tensor mlp(const Tensor& x, const Layer& layer) {
  return multiply(activate(x, layer), layer.down, layer.down_bias, x.size(1));
}

using States = std::tuple<Tensor, Tensor>;  // the last layer's output, and the residual that it is still to be added to

// One layer after the other. The last stores K and V of all tokens, and computes the rest for the outputs alone.
States run_in_turn(
    Tensor hidden_states, Optional residual, const Weights& weights, at::TensorList kv_cache, const Step& step,
    const Optional& outputs) {
  const int64_t num_layers = kv_cache.size();
  for (int64_t index = 0; index < num_layers; ++index) {
    const Layer layer = layer_of(weights, index);
    const auto add_and_norm = [&](const Tensor& norm) {
      if (!residual.has_value()) return std::tuple{layers::rms_norm(hidden_states, norm, step.eps), hidden_states};
      return layers::add_rms_norm(hidden_states, *residual, norm, step.eps);
    };
    std::tie(hidden_states, residual) = add_and_norm(layer.input_norm);
    const Optional wanted = index + 1 == num_layers ? outputs : std::nullopt;
    hidden_states = self_attention(hidden_states, layer, kv_cache[index], step, wanted);
    if (wanted.has_value()) residual = residual->index_select(0, *wanted);
    std::tie(hidden_states, residual) = add_and_norm(layer.mlp_norm);
    hidden_states = mlp(hidden_states, layer);
  }
  return {hidden_states, *residual};
}

// ---- decodes, shared out among threads ----

// Each of two threads can take half of many decodes through all layers by itself. They do not wait for each other after every
// product, and while one waits for K and V from memory, the other may multiply, which waits for nothing. But both read all
// weights, the later one from the cache that they share. Few rows lose by that, whose products take as long as reading their
// weights, and so would more by AMX, which multiplies several times as fast. More threads than two have not been measured.
constexpr int64_t NUM_SHARES = 2, MIN_SHARE = 24;  // threads, and rows of each
constexpr int64_t ROW_COST = 300;  // what a row's products cost, in tokens of a context that is attended to in that time

bool is_worth_sharing(const Step& step, const Weights& weights) {
  const Tensor qkv = layer_of(weights, 0).qkv;
#ifdef NANOVLLM_AMX
  if (qkv.scalar_type() == at::kBFloat16) return false;
#endif
  return linear::is_packed(qkv) && step.has_only_decodes() && at::get_num_threads() == NUM_SHARES &&
         step.num_tokens() >= NUM_SHARES * MIN_SHARE;
}

// The row at which the first of two shares ends, which cost the same.
int64_t find_middle(const Tensor& context_lens) {
  const auto* lens = context_lens.const_data_ptr<int32_t>();
  const int64_t num_rows = context_lens.size(0);
  int64_t whole = num_rows * ROW_COST, part = 0, row = 0;
  whole = std::accumulate(lens, lens + num_rows, whole);
  while (2 * part < whole) part += ROW_COST + lens[row++];
  return std::min(row, num_rows - 1);
}

States run_shares(
    const Tensor& hidden_states, const Optional& residual, const Weights& weights, at::TensorList kv_cache, const Step& step) {
  const int64_t middle = find_middle(step.context_lens), bounds[] = {0, middle, step.num_tokens()};
  std::vector<Tensor> outs(NUM_SHARES), residuals(NUM_SHARES);
  at::parallel_for(0, NUM_SHARES, 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode guard;  // of this thread
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = bounds[share], size = bounds[share + 1] - first;
      const Optional before = residual.has_value() ? Optional(residual->narrow(0, first, size)) : std::nullopt;
      std::tie(outs[share], residuals[share]) = run_in_turn(
          hidden_states.narrow(0, first, size), before, weights, kv_cache, step.of(first, size), std::nullopt);
    }
  });
  return {at::cat(outs), at::cat(residuals)};
}

// What goes in is what came out of the layers before; the first layer of a model has no residual. outputs: see ForwardContext in
// context.py. Of a prompt nearly all of the last layer is spared.
States run_layers(
    const Tensor& hidden_states, const Optional& residual, const Weights& weights, at::TensorList kv_cache,
    const Tensor& positions, const Tensor& cos_sin, const Tensor& slot_mapping, const Tensor& cu_seqlens_q,
    const Tensor& context_lens, const Tensor& block_tables, double eps, double scale, Optional outputs) {
  const int64_t num_weights = kv_cache.size() * Layer::SIZE;
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == num_weights, "weights of other layers than the caches");
  if (outputs.has_value() && outputs->size(0) == hidden_states.size(0)) outputs.reset();  // all of them
  const Step step{positions, cos_sin, slot_mapping, cu_seqlens_q, context_lens, block_tables, eps, scale};
  const bool shares = !outputs.has_value() && is_worth_sharing(step, weights);
  return shares ? run_shares(hidden_states, residual, weights, kv_cache, step)
                : run_in_turn(hidden_states, residual, weights, kv_cache, step, outputs);
}

}  // namespace decoder
}  // namespace

TORCH_LIBRARY_FRAGMENT(NANOVLLM_OPS, library) {
  library.def(
      "run_layers(Tensor hidden_states, Tensor? residual, Tensor?[] weights, Tensor(a!)[] kv_cache, Tensor positions, "
      "Tensor cos_sin, Tensor slot_mapping, Tensor cu_seqlens_q, Tensor context_lens, Tensor block_tables, float eps, "
      "float scale, Tensor? outputs) -> (Tensor, Tensor)",
      &decoder::run_layers);
}
