// From a row of products to its softmax.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "exp_log.h"
#include "sweep.h"

namespace topd {
inline namespace CPU_CAPABILITY {

// What turns products into logits / temperature: softcap tanh(scale (product + bias) / softcap) / temperature; softcap 0 is
// none.
template <typename T>
struct Transform {
  const T* bias = nullptr;  // [V], or null
  double scale = 1, softcap = 0, temperature = 1;

  bool identity() const { return bias == nullptr && softcap == 0 && scale == temperature; }

  // d (logit / temperature) / d product. A logit of -inf, an entry that is left out, has none beside a softcap.
  Vec<T> slope(const Vec<T>& logits) const {
    const Vec<T> steep(static_cast<T>(scale / temperature));
    if (softcap == 0) return steep;
    const Vec<T> tanh = larger(logits * Vec<T>(static_cast<T>(temperature / softcap)), Vec<T>(-1));
    return steep * (Vec<T>(1) - tanh * tanh);
  }
};

template <typename T>
const T* bias_of(const std::optional<at::Tensor>& bias, const at::Tensor& product, const char* name) {
  if (!bias) return nullptr;
  TORCH_CHECK_VALUE(bias->is_contiguous() && bias->scalar_type() == product.scalar_type() && bias->numel() == product.size(1),
                    name, " must be contiguous, of the products' dtype and width");
  return bias->const_data_ptr<T>();
}

// The softmax of a row: its largest logit, and log1p of what the other entries add, which keeps the digits of a peaked row.
template <typename T>
struct Distribution {
  T top = -kInf<T>, share = 1;  // the largest logit and its probability
  double log_rest = 0;
  int64_t index = 0;      // of the largest logit
  bool has_zero = false;  // whether a logit is -inf

  bool exists() const { return std::isfinite(top) && std::isfinite(log_rest); }
  double lse() const { return top + log_rest; }
  T logprob(T logit) const { return static_cast<T>((logit - top) - log_rest); }
};

// From products to logits / temperature, in place.
template <typename T>
inline void apply(const Transform<T>& transform, T* row, int64_t size) {
  if (transform.identity()) return;
  const bool capped = transform.softcap != 0;
  const Vec<T> inner(static_cast<T>(transform.scale / (capped ? transform.softcap : transform.temperature)));
  const Vec<T> outer(static_cast<T>(transform.softcap / transform.temperature));
  sweep<T>(
      size,
      [&](int64_t offset, int64_t lanes) TOPD_INLINE {
        Vec<T> y = load(row + offset, lanes);
        if (transform.bias) y = y + load(transform.bias + offset, lanes);
        y = y * inner;
        store(capped ? outer * y.tanh() : y, row + offset, lanes);
      },
      [](int64_t) {});
}

// Writes to the row while it works, and leaves it as it was.
template <typename T>
inline Distribution<T> distribution(T* row, int64_t size) {
  Distribution<T> out;
  int64_t best_block = 0;
  Vec<T> block_top(-kInf<T>), bottom(kInf<T>);
  sweep<T>(
      size,
      [&](int64_t offset, int64_t lanes) TOPD_INLINE {
        const Vec<T> y = load(row + offset, lanes);
        block_top = larger(block_top, y);
        if (lanes == Vec<T>::size()) bottom = smaller(bottom, y);
        else
          for (int64_t i = 0; i < lanes; ++i) out.has_zero |= row[offset + i] == -kInf<T>;
      },
      [&](int64_t block) TOPD_INLINE {
        const T top = lane_max(block_top);
        if (top > out.top) out.top = top, best_block = block;
        block_top = Vec<T>(-kInf<T>);
      });
  out.has_zero |= lane_min(bottom) == -kInf<T>;
  const int64_t end = std::min(best_block + kBlock, size);
  for (out.index = best_block; out.index < end - 1 && row[out.index] != out.top; ++out.index) {}

  const T kept = row[out.index];  // the largest entry's own 1 would swallow the digits of a small rest
  row[out.index] = -kInf<T>;
  const Vec<T> top(out.top);
  double rest = 0;
  Vec<T> sum(0);
  sweep<T>(
      size, [&](int64_t offset, int64_t lanes) TOPD_INLINE { sum = sum + exp(load(row + offset, lanes) - top); },
      [&](int64_t) TOPD_INLINE {
        rest += lane_sum(sum);
        sum = Vec<T>(0);
      });
  row[out.index] = kept;
  out.log_rest = std::isfinite(kept) ? std::log1p(rest) : std::numeric_limits<double>::quiet_NaN();
  out.share = static_cast<T>(1 / (1 + rest));
  return out;
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
