// One token for each row of logits on a CPU, by the method of sampler.py, in whose place cpu_layers.py calls it.
//
// A row is read for the largest logit of each GROUP of tokens, and of all. To sample among all tokens it is read again, for
// the sums of the groups' weights, which need an exponential each; the group that the uniform number falls into is weighed
// once more, to find the token in it. With top_k or top_p only the n most likely tokens are looked at, which lie in the n
// groups with the largest maxima; if n tokens do not reach top_p, more.
//
// A row is one thread's work, so that its token does not depend on the other rows, or on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "../utils/cpu_blocks.h"
#include "../utils/cpu_dtypes.h"
#include "../utils/cpu_math.h"

namespace {
namespace sampler {

using namespace blocks;

constexpr int64_t GROUP = 128;  // tokens
constexpr int64_t UNSOUND = -1;  // what stands for a token in a row without a largest finite logit
constexpr float NEGLIGIBLE = -126.0f;  // below it exp2_nonpositive is 0
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr int64_t FIRST = 16, MORE = 8;  // tokens that top_p looks at first, and times as many then
static_assert(GROUP % BLOCK == 0);

// The logits of a group as float32; behind the last token of the vocabulary comes minus infinity.
struct Group {
  alignas(64) std::array<float, GROUP> values;

  template <class T>
  void load(const T* source, int64_t count) {
    for (int64_t i = 0; i + BLOCK <= count; i += BLOCK) write(read(source + i), &values[i]);
    for (int64_t i = count / BLOCK * BLOCK; i < count; ++i) values[i] = static_cast<float>(source[i]);
    std::fill(values.begin() + count, values.end(), NOTHING);
  }

  // NaN if there is one.
  float largest() const {
    Block result = read(&values[0]);
    for (int64_t i = BLOCK; i < GROUP; i += BLOCK) {
      const Block next = read(&values[i]);
      result = {at::vec::maximum(result.low, next.low), at::vec::maximum(result.high, next.high)};
    }
    const auto larger = [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); };
    return at::vec::vec_reduce_all<float>(larger, larger(result.low, result.high));
  }

  float sum() const {
    Block result = read(&values[0]);
    for (int64_t i = BLOCK; i < GROUP; i += BLOCK) result = result + read(&values[i]);
    return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, result.low + result.high);
  }
};

// How one row is sampled; see `Filters` in sampler.py.
struct Choice {
  float temperature, uniform;
  int64_t top_k;
  float top_p, min_p;

  // Of differences of logits, for powers of 2; finite, so that none is none at any temperature.
  float scale() const { return std::min(LOG2_E / temperature, std::numeric_limits<float>::max()); }
};

struct Candidate {
  float logit;
  int64_t token;

  // The more likely, of equals the first token.
  bool operator<(const Candidate& other) const {
    return logit > other.logit || (logit == other.logit && token < other.token);
  }
};

template <class T>
class Row {
 public:
  // Used again for each row.
  struct Tables {
    std::vector<float> largest, ordered;  // logits of the groups
    std::vector<double> sums;             // of the groups' weights, up to each
    std::vector<Candidate> candidates;
    std::vector<double> kept;  // cumulative weights of the candidates that are kept
  };

  Row(const T* logits, int64_t size, Tables& tables)
      : logits_(logits), size_(size), num_groups_((size + GROUP - 1) / GROUP), tables_(tables) {
    tables.largest.resize(num_groups_);
    tables.sums.resize(num_groups_);
  }

  int64_t pick(const Choice& choice) {
    if (!find_largest()) return UNSOUND;
    if (!(choice.temperature > 0.0f)) return pick_largest();
    const bool is_filtered = (choice.top_k > 0 && choice.top_k < size_) || choice.top_p < 1.0f;
    return is_filtered ? pick_filtered(choice) : pick_any(choice);
  }

 private:
  int64_t count(int64_t group) const { return std::min(GROUP, size_ - group * GROUP); }

  Group load(int64_t group) const {
    Group result;
    result.load(logits_ + group * GROUP, count(group));
    return result;
  }

  // Whether there is a finite one, and neither NaN nor plus infinity.
  bool find_largest() {
    largest_ = NOTHING;
    for (int64_t group = 0; group < num_groups_; ++group) {
      const float value = tables_.largest[group] = load(group).largest();
      if (std::isnan(value)) return false;
      largest_ = std::max(largest_, value);
    }
    return std::isfinite(largest_);
  }

  // The first of equals.
  int64_t pick_largest() const {
    const int64_t group = std::find(tables_.largest.begin(), tables_.largest.end(), largest_) - tables_.largest.begin();
    const Group logits = load(group);
    return group * GROUP + (std::find(logits.values.begin(), logits.values.end(), largest_) - logits.values.begin());
  }

  // A token's probability, but for a factor: that of the most likely token of all is 1.
  float weight(float logit, const Choice& choice) const { return exp2_nonpositive((logit - largest_) * choice.scale()); }

  // Those of a group's tokens; 0 below min_p.
  Group weigh(int64_t group, const Choice& choice) const {
    Group result = load(group);
    const float largest = largest_, scale = choice.scale(), min_p = choice.min_p;
    for (float& value : result.values) {
      const float weight = exp2_nonpositive((value - largest) * scale);
      value = weight < min_p ? 0.0f : weight;
    }
    return result;
  }

  // The sum of all weights.
  double sum_groups(const Choice& choice) {
    double total = 0.0;
    for (int64_t group = 0; group < num_groups_; ++group) {
      const bool counts = (tables_.largest[group] - largest_) * choice.scale() >= NEGLIGIBLE;
      tables_.sums[group] = total += counts ? weigh(group, choice).sum() : 0.0;
    }
    return total;
  }

  int64_t pick_any(const Choice& choice) {
    const double target = choice.uniform * sum_groups(choice);  // below the total, so that some sum is above it
    const int64_t group = std::upper_bound(tables_.sums.begin(), tables_.sums.end(), target) - tables_.sums.begin();
    const Group weights = weigh(group, choice);
    std::array<double, GROUP> sums;
    double inside = 0.0;
    for (int64_t i = 0; i < GROUP; ++i) sums[i] = inside += weights.values[i];
    // Rounding must not lift the target to the group's total: it is then always a token of some probability.
    const double rest = std::min(target - (group > 0 ? tables_.sums[group - 1] : 0.0), std::nextafter(inside, 0.0));
    return group * GROUP + (std::upper_bound(sums.begin(), sums.end(), rest) - sums.begin());
  }

  // The n most likely tokens, those that are equal to the last of them, and perhaps some more, the most likely first.
  // Whether these are all tokens that are possible.
  bool find_candidates(int64_t n) {
    auto& found = tables_.candidates;
    float bound = NOTHING;
    if (n < num_groups_) {
      auto& ordered = tables_.ordered = tables_.largest;
      std::nth_element(ordered.begin(), ordered.begin() + (n - 1), ordered.end(), std::greater<>());
      bound = ordered[n - 1];
    }
    found.clear();
    for (int64_t group = 0; group < num_groups_; ++group) {
      if (tables_.largest[group] < bound) continue;
      const Group logits = load(group);
      for (int64_t i = 0; i < GROUP; ++i) {
        const float logit = logits.values[i];
        if (logit >= bound && logit > NOTHING) found.push_back({logit, group * GROUP + i});
      }
    }
    const bool are_too_many = bound == NOTHING && n < static_cast<int64_t>(found.size());
    if (are_too_many) {
      const auto last = found.begin() + (n - 1);
      std::nth_element(found.begin(), last, found.end());
      const auto is_equal = [least = last->logit](const Candidate& one) { return one.logit == least; };
      found.erase(std::partition(last + 1, found.end(), is_equal), found.end());
    }
    std::sort(found.begin(), found.end());
    return bound == NOTHING && !are_too_many;
  }

  // Keep candidates while the more likely ones do not reach top_p: so is the one that crosses the boundary.
  // Whether less likely ones would be kept, too.
  bool keep_candidates(const Choice& choice, double total) {
    tables_.kept.clear();
    double sum = 0.0;
    for (const Candidate& one : tables_.candidates) {
      const float value = weight(one.logit, choice);
      const bool is_kept = (choice.top_p >= 1.0f || sum < choice.top_p * total) && value >= choice.min_p;
      if (!is_kept && !tables_.kept.empty()) return false;
      tables_.kept.push_back(sum += value);
    }
    return sum < choice.top_p * total;
  }

  int64_t pick_filtered(const Choice& choice) {
    if (choice.top_k > 0 && choice.top_k < size_) {
      find_candidates(choice.top_k);
      auto& found = tables_.candidates;
      double total = 0.0;
      while (found.back().logit < found[std::min<int64_t>(choice.top_k, found.size()) - 1].logit) found.pop_back();
      for (const Candidate& one : found) total += weight(one.logit, choice);
      keep_candidates(choice, total);
    } else {
      Choice among_all = choice;
      among_all.min_p = 0.0f;  // top_p is of all tokens' probabilities
      const double total = sum_groups(among_all);
      for (int64_t n = FIRST;; n *= MORE) {
        const bool are_all = find_candidates(n);
        if (!keep_candidates(choice, total) || are_all) break;
      }
    }
    const auto& kept = tables_.kept;
    const int64_t place = std::upper_bound(kept.begin(), kept.end(), choice.uniform * kept.back()) - kept.begin();
    return tables_.candidates[std::min<int64_t>(place, kept.size() - 1)].token;
  }

  const T* logits_;
  int64_t size_, num_groups_;
  Tables& tables_;
  float largest_ = 0.0f;
};

template <class T>
const T* values_of(const at::Tensor& x, const at::Tensor& logits) {
  const bool fits = x.dim() == 1 && x.is_contiguous() && x.size(0) == logits.size(0);
  TORCH_CHECK(fits, "expected one value for each row of ", logits.sizes(), ", got ", x.sizes());
  return x.const_data_ptr<T>();
}

// The tokens of rows of logits [num_rows, vocab_size], int64; float32 and, for top_k, int64 [num_rows]: how to sample them.
at::Tensor sample(const at::Tensor& logits, const at::Tensor& temperatures, const at::Tensor& uniforms,
                  const std::optional<at::Tensor>& top_k, const std::optional<at::Tensor>& top_p,
                  const std::optional<at::Tensor>& min_p) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1, "the logits of a row must lie together");
  const float *temperature = values_of<float>(temperatures, logits), *uniform = values_of<float>(uniforms, logits);
  const int64_t* most = top_k ? values_of<int64_t>(*top_k, logits) : nullptr;
  const float* mass = top_p ? values_of<float>(*top_p, logits) : nullptr;
  const float* least = min_p ? values_of<float>(*min_p, logits) : nullptr;
  at::Tensor tokens = at::empty({logits.size(0)}, at::kLong);
  int64_t* out = tokens.mutable_data_ptr<int64_t>();
  with_dtype(logits, "sampler for", [&]<class T>() {
    const T* data = logits.const_data_ptr<T>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      typename Row<T>::Tables tables;
      for (int64_t row = begin; row < end; ++row) {
        Choice choice{temperature[row], uniform[row], 0, 1.0f, 0.0f};
        if (most) choice.top_k = most[row];
        if (mass) choice.top_p = mass[row];
        if (least) choice.min_p = least[row];
        out[row] = Row<T>(data + row * logits.stride(0), logits.size(1), tables).pick(choice);
      }
    });
  });
  return tokens;
}

}  // namespace sampler
}  // namespace

// NANOVLLM_OPS: the namespace of the operators, of each build its own.
TORCH_LIBRARY_FRAGMENT(NANOVLLM_OPS, library) {
  library.def(
      "sample(Tensor logits, Tensor temperatures, Tensor uniforms, Tensor? top_k, Tensor? top_p, Tensor? min_p) -> Tensor",
      &sampler::sample);
}
