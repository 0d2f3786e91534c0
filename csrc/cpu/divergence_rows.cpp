// topd::divergence_rows on the CPU: each row of both tiles is read once from memory and swept while it lies in cache.

#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "divergence_sweep.h"

namespace topd {
inline namespace CPU_CAPABILITY {
namespace {

using divergence::kScores;

// Room for this row and the next of both tiles in a second-level cache. A longer row has none to spare for the next.
constexpr int64_t kCacheBytes = 1 << 20;

void check_products(const at::Tensor& student, const at::Tensor& teacher) {
  TORCH_CHECK_VALUE(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0),
                    "student_product and teacher_product must be [C, V_s] and [C, V_t], got ", student.sizes(), " and ",
                    teacher.sizes());
  TORCH_CHECK_VALUE(student.scalar_type() == teacher.scalar_type(), "both products must share a dtype");
  TORCH_CHECK_VALUE(student.size(1) > 0 && teacher.size(1) > 0, "both products must have at least one column");
  TORCH_CHECK_VALUE(student.stride(1) == 1 && teacher.stride(1) == 1, "both products must be contiguous along the vocabulary");
}

// The tokens, contiguous; undefined where there are none.
at::Tensor checked(const std::optional<at::Tensor>& tokens, int64_t rows, int64_t size) {
  if (!tokens) return {};
  TORCH_CHECK_VALUE(tokens->scalar_type() == at::kLong && tokens->dim() == 1 && tokens->size(0) == rows,
                    "tokens must be int64 [C]");
  const at::Tensor out = tokens->contiguous();
  const int64_t* const token = out.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_VALUE(0 <= token[i] && token[i] < size, "tokens must lie in [0, ", size, "), got ", token[i]);
  return out;
}

// The op's results: value [C], scores [kScores, C] or [0, C], finite [C].
struct Results {
  at::Tensor value, scores, finite;
};

template <typename T>
void run_rows(const divergence::Call<T>& call, const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& tokens,
              const Results& results) {
  const int64_t rows = student.size(0), size = std::min(student.size(1), teacher.size(1));
  const int64_t student_stride = student.stride(0), teacher_stride = teacher.stride(0);
  const int64_t* const token = tokens.defined() ? tokens.const_data_ptr<int64_t>() : nullptr;
  T* const student_data = student.data_ptr<T>();
  T* const teacher_data = teacher.data_ptr<T>();
  T* const value = results.value.data_ptr<T>();
  T* const scores = results.scores.data_ptr<T>();
  bool* const finite = results.finite.data_ptr<bool>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(call.grad ? size : 0);
    for (int64_t i = begin; i < end; ++i) {
      T* const student_row = student_data + i * student_stride;
      T* const teacher_row = teacher_data + i * teacher_stride;
      const bool ahead = i + 1 < end && 4 * size * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
      divergence::Result<T> out;
      divergence::run_row<T>(call,
                             {.student = student_row,
                              .teacher = teacher_row,
                              .student_size = student.size(1),
                              .teacher_size = teacher.size(1),
                              .token = token ? token + i : nullptr,
                              .scratch = scratch.data(),
                              .next_student = ahead ? student_row + student_stride : nullptr,
                              .next_teacher = ahead ? teacher_row + teacher_stride : nullptr},
                             out);
      value[i] = out.value;
      finite[i] = out.finite;
      for (int64_t k = 0; call.scores && k < kScores; ++k) scores[k * rows + i] = out.scores[k];
    }
  });
}

}  // namespace

DivergenceRows divergence_rows(at::Tensor& student, at::Tensor& teacher, const std::optional<at::Tensor>& student_bias,
                               const std::optional<at::Tensor>& teacher_bias, const std::optional<at::Tensor>& tokens,
                               double student_scale, std::optional<double> student_softcap, double teacher_scale,
                               std::optional<double> teacher_softcap, double temperature, c10::string_view name,
                               double parameter, double hard_weight, bool grad, bool scores,
                               const std::optional<at::Tensor>& grad_tile, double grad_scale) {
  TORCH_CHECK_VALUE(!grad_tile, "grad_tile must be None on the CPU: the gradient goes into student_product");
  TORCH_CHECK_VALUE(grad_scale == 1.0, "grad_scale is for tiles of float16, which the CPU does not have, and must be 1, got ",
                    grad_scale);
  check_products(student, teacher);
  const int64_t rows = student.size(0);
  const at::Tensor checked_tokens = checked(tokens, rows, std::min(student.size(1), teacher.size(1)));
  const divergence::Kind kind = divergence::kind_of(name);
  const Results results{.value = at::empty({rows}, student.options()),
                        .scores = at::empty({scores ? kScores : 0, rows}, student.options()),
                        .finite = at::empty({rows}, student.options().dtype(at::kBool))};
  AT_DISPATCH_FLOATING_TYPES(student.scalar_type(), "topd::divergence_rows", [&] {
    using T = scalar_t;
    const T* const student_add = bias_of<T>(student_bias, student, "student_bias");
    const T* const teacher_add = bias_of<T>(teacher_bias, teacher, "teacher_bias");
    const divergence::Call<T> call{.kind = kind,
                                   .student = {student_add, student_scale, student_softcap.value_or(0), temperature},
                                   .teacher = {teacher_add, teacher_scale, teacher_softcap.value_or(0), temperature},
                                   .parameter = static_cast<T>(parameter),
                                   .complement = static_cast<T>(1 - parameter),
                                   .hard_weight = static_cast<T>(hard_weight),
                                   .grad = grad,
                                   .scores = scores};
    run_rows(call, student, teacher, checked_tokens, results);
  });
  return {results.value, results.scores, results.finite};
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
