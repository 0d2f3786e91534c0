// What weighted_gather and weighted_scatter share: checked operands, and a row added to another.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace topd {
inline namespace CPU_CAPABILITY {

// to += weight from, in to's type.
template <typename Sum, typename Entry>
inline void add_row(Sum* to, const Entry* from, Sum weight, int64_t width) {
  for (int64_t i = 0; i < width; ++i) to[i] += weight * static_cast<Sum>(from[i]);
}

class WeightedRows {
 public:
  WeightedRows(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& ids, const at::Tensor& weights,
               const char* name)
      : sums_(out.scalar_type()), entries_(rows.scalar_type()), width_(out.size(-1)) {
    TORCH_CHECK_VALUE(out.dim() == 2 && rows.dim() == 2 && out.size(1) == rows.size(1), "out and ", name,
                      " must be [..., H] of one width, got ", out.sizes(), " and ", rows.sizes());
    TORCH_CHECK_VALUE(out.is_contiguous() && (rows.stride(1) == 1 || rows.size(1) == 1), "out must be contiguous, and ", name,
                      " along H");
    TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && ids.dim() == 2 && weights.sizes() == ids.sizes(),
                      "ids must be int64 [N, M] and weights [N, M], got ", ids.sizes(), " and ", weights.sizes());
    TORCH_CHECK_VALUE(weights.scalar_type() == sums_ && (sums_ == at::kFloat || sums_ == at::kDouble),
                      "out and weights must both be float32 or both float64");
    held_ids_ = ids.contiguous(), held_weights_ = weights.contiguous();
    id_ = held_ids_.const_data_ptr<int64_t>(), weight_ = held_weights_.const_data_ptr();
  }

  int64_t id(int64_t i) const { return id_[i]; }
  template <typename Sum>
  Sum weight(int64_t i) const {
    return static_cast<const Sum*>(weight_)[i];
  }
  int64_t grain() const { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width_)); }

  // Calls body(Sum{}, Entry{}).
  template <typename Body>
  void dispatch(const Body& body) const {
    if (sums_ == at::kDouble) by_entry(double{}, body);
    else by_entry(float{}, body);
  }

 private:
  template <typename Sum, typename Body>
  void by_entry(Sum sum, const Body& body) const {
    switch (entries_) {
      case at::kFloat: return body(sum, float{});
      case at::kDouble: return body(sum, double{});
      case at::kBFloat16: return body(sum, at::BFloat16{});
      case at::kHalf: return body(sum, at::Half{});
      default: TORCH_CHECK_VALUE(false, "rows must be floating, got ", entries_);
    }
  }

  at::ScalarType sums_, entries_;
  int64_t width_;
  at::Tensor held_ids_, held_weights_;
  const int64_t* id_;
  const void* weight_;
};

}  // namespace CPU_CAPABILITY
}  // namespace topd
