// Operands of the rows ops, and how their rows are shared out.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace topd {
inline namespace CPU_CAPABILITY {

// Entries that are worth a thread.
constexpr int64_t kGrain = 32768;

template <typename T>
const T* bias_of(const std::optional<at::Tensor>& bias, const at::Tensor& product, const char* name) {
  if (!bias) return nullptr;
  TORCH_CHECK_VALUE(bias->is_contiguous() && bias->scalar_type() == product.scalar_type() && bias->numel() == product.size(1),
                    name, " must be contiguous, of the products' dtype and width");
  return bias->const_data_ptr<T>();
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
