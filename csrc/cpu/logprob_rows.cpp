// topd::logprob_rows on the CPU: each row of the tile is read once from memory and swept while it lies in cache.
//
// The chosen entries are taken out of the row (-inf stays behind), the rest has a softmax of its own, and the row's normaliser is
// put together from it and the chosen logits in double. Sweeps: product to logits (only where something changes it); largest
// entry; normaliser; the entropy and its gradient where asked for; the gradient of the rest.

#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "../distribution.h"
#include "../operands.h"
#include "../row_math.h"

namespace topd {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T>
struct Row {
  T* logits;
  T* entropy_grad;  // or null
  const T* next;    // this thread's next row, or null
  const int64_t* ids;
  T* logprobs;
  bool* first;
  T* slope;   // or null
  T* chosen;  // scratch [M]
};

template <typename T>
struct Result {
  T entropy = 0, outside;
  bool finite;
};

template <typename T>
struct Sweeper {
  const Transform<T>& transform;
  int64_t size, count;  // V and M
  bool grad, entropy;

  Result<T> run(const Row<T>& row) const {
    apply(transform, row.logits, size);
    take_out(row);
    const Distribution<T> rest = distribution(row.logits, size);
    const bool empty = rest.top == -kInf<T>;  // or NaN beside -inf
    double top = rest.top;
    for (int64_t m = 0; m < count; ++m) top = std::max<double>(top, row.chosen[m]);
    const double log_rest = log_of_others(row, rest, empty, top);
    Result<T> out;
    out.finite = std::isfinite(top) && std::isfinite(log_rest) && !(empty && has_nan(row.logits));
    if (!out.finite) return without_distribution(row);
    for (int64_t m = 0; m < count; ++m) row.logprobs[m] = static_cast<T>((row.chosen[m] - top) - log_rest);
    out.outside = empty ? -kInf<T> : static_cast<T>(((rest.top - top) + rest.log_rest) - log_rest);
    if (entropy) out.entropy = entropy_of(row, static_cast<T>(top), log_rest);
    if (grad) gradient(row, rest, empty);
    return out;
  }

  // The chosen logits, -inf for an id outside the vocabulary, and -inf in their place.
  void take_out(const Row<T>& row) const {
    const auto inside = [&](int64_t id) { return 0 <= id && id < size; };
    for (int64_t m = 0; m < count; ++m) {
      row.chosen[m] = inside(row.ids[m]) ? row.logits[row.ids[m]] : -kInf<T>;
      if (row.slope) row.slope[m] = first_lane(transform.slope(Vec<T>(row.chosen[m])));
    }
    for (int64_t m = 0; m < count; ++m) {
      row.first[m] = inside(row.ids[m]) && row.logits[row.ids[m]] != -kInf<T>;
      if (row.first[m]) row.logits[row.ids[m]] = -kInf<T>;
    }
  }

  // log1p of what the entries beside the largest one add: log Z - top.
  double log_of_others(const Row<T>& row, const Distribution<T>& rest, bool empty, double top) const {
    bool skipped = rest.top == top;
    double others = 0;
    if (!empty) others = skipped ? std::expm1(rest.log_rest) : std::exp((rest.top - top) + rest.log_rest);
    for (int64_t m = 0; m < count; ++m) {
      if (!row.first[m]) continue;
      if (!skipped && row.chosen[m] == top) skipped = true;
      else others += std::exp(row.chosen[m] - top);
    }
    return std::log1p(others);
  }

  bool has_nan(const T* row) const {
    return std::any_of(row, row + size, [](T logit) { return std::isnan(logit); });
  }

  Result<T> without_distribution(const Row<T>& row) const {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    std::fill(row.logprobs, row.logprobs + count, kNaN);
    if (grad) std::fill(row.logits, row.logits + size, T(0));
    if (row.entropy_grad) std::fill(row.entropy_grad, row.entropy_grad + size, T(0));
    return {kNaN, kNaN, false};
  }

  // log Z - top - E with E = sum p (z - top); the gradient is -p (z - top - E).
  T entropy_of(const Row<T>& row, T top, double log_rest) const {
    const T share = static_cast<T>(std::exp(-log_rest));
    const auto gap = [&](const Vec<T>& logits) TOPD_INLINE { return larger(logits - Vec<T>(top), Vec<T>(-kFar<T>)); };
    const auto probability = [&](const Vec<T>& a) TOPD_INLINE { return exp(a) * Vec<T>(share); };
    double mean = 0;
    Vec<T> sum(0);
    sweep<T>(
        size,
        [&](int64_t at, int64_t lanes) TOPD_INLINE {
          const Vec<T> a = gap(load(row.logits + at, lanes)), p = probability(a);
          sum = fmadd(p, a, sum);
          if (row.entropy_grad) store(p, row.entropy_grad + at, lanes);
        },
        [&](int64_t) TOPD_INLINE { mean += lane_sum(sum), sum = Vec<T>(0); });
    for (int64_t m = 0; m < count; ++m) {
      if (row.first[m]) mean += first_lane(probability(gap(Vec<T>(row.chosen[m])))) * (row.chosen[m] - top);
    }
    if (row.entropy_grad) {
      const Vec<T> centre(static_cast<T>(mean));
      const auto term = [&](const Vec<T>& logits, const Vec<T>& p) TOPD_INLINE {
        return p * (centre - gap(logits)) * transform.slope(logits);
      };
      sweep<T>(
          size,
          [&](int64_t at, int64_t lanes) TOPD_INLINE {
            T* const to = row.entropy_grad + at;
            store(term(load(row.logits + at, lanes), load(to, lanes)), to, lanes);
          },
          [](int64_t) {});
      for (int64_t m = 0; m < count; ++m) {
        const Vec<T> logit(row.chosen[m]);
        if (row.first[m]) row.entropy_grad[row.ids[m]] = first_lane(term(logit, probability(gap(logit))));
      }
    }
    return static_cast<T>(log_rest - mean);
  }

  void gradient(const Row<T>& row, const Distribution<T>& rest, bool empty) const {
    if (empty) return std::fill(row.logits, row.logits + size, T(0));
    const Vec<T> top(rest.top), share(rest.share);
    sweep<T>(
        size,
        [&](int64_t at, int64_t lanes) TOPD_INLINE {
          if (row.next) fetch(row.next + at);
          const Vec<T> logits = load(row.logits + at, lanes);
          store(exp(logits - top) * share * transform.slope(logits), row.logits + at, lanes);
        },
        [](int64_t) {});
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> logprob_rows(
    at::Tensor& product, const std::optional<at::Tensor>& bias, const at::Tensor& ids, double scale,
    std::optional<double> softcap, double temperature, const std::optional<at::Tensor>& entropy_tile, bool grad, bool entropy,
    const std::optional<at::Tensor>& grad_tile, double grad_scale) {
  TORCH_CHECK_VALUE(!grad_tile, "grad_tile must be None on the CPU: the gradient goes into product");
  TORCH_CHECK_VALUE(grad_scale == 1, "grad_scale is for float16 tiles, which the CPU has not, and must be 1, got ", grad_scale);
  TORCH_CHECK_VALUE(product.dim() == 2 && product.size(1) > 0 && product.stride(1) == 1,
                    "product must be [C, V], contiguous along the vocabulary, got ", product.sizes());
  const int64_t rows = product.size(0), size = product.size(1);
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && ids.dim() == 2 && ids.size(0) == rows, "ids must be int64 [C, M], got ",
                    ids.sizes());
  const bool entropy_grad = entropy_tile && grad && entropy;
  TORCH_CHECK_VALUE(!entropy_grad || (entropy_tile->sizes() == product.sizes() && entropy_tile->stride(1) == 1 &&
                                      entropy_tile->scalar_type() == product.scalar_type()),
                    "entropy_tile must be like product");
  const at::Tensor held = ids.contiguous();
  const int64_t* const id = held.const_data_ptr<int64_t>();
  const int64_t count = ids.size(1);
  at::Tensor logprobs = at::empty({rows, count}, product.options());
  at::Tensor entropies = at::empty({entropy ? rows : 0}, product.options());
  at::Tensor outside = at::empty({rows}, product.options());
  at::Tensor first = at::empty({rows, count}, product.options().dtype(at::kBool));
  at::Tensor slope = at::empty({softcap ? rows : 0, count}, product.options());
  at::Tensor finite = at::empty({rows}, product.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(product.scalar_type(), "topd::logprob_rows", [&] {
    using T = scalar_t;
    const Transform<T> transform{bias_of<T>(bias, product, "bias"), scale, softcap.value_or(0), temperature};
    const Sweeper<T> sweeper{transform, size, count, grad, entropy};
    T* const tile = product.data_ptr<T>();
    T* const second = entropy_grad ? entropy_tile->data_ptr<T>() : nullptr;
    T* const logprob = logprobs.data_ptr<T>();
    T* const entropy_data = entropies.data_ptr<T>();
    T* const outside_data = outside.data_ptr<T>();
    T* const slopes = softcap ? slope.data_ptr<T>() : nullptr;
    bool* const firsts = first.data_ptr<bool>();
    bool* const finite_data = finite.data_ptr<bool>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(count);
      for (int64_t i = begin; i < end; ++i) {
        T* const row = tile + i * product.stride(0);
        const Result<T> out = sweeper.run({row, second ? second + i * entropy_tile->stride(0) : nullptr,
                                           i + 1 < end ? row + product.stride(0) : nullptr, id + i * count,
                                           logprob + i * count, firsts + i * count, slopes ? slopes + i * count : nullptr,
                                           scratch.data()});
        if (entropy) entropy_data[i] = out.entropy;
        outside_data[i] = out.outside;
        finite_data[i] = out.finite;
      }
    });
  });
  return {logprobs, entropies, outside, first, slope, finite};
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
