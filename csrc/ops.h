// The C++ kernels by op; their schemas are declared in Python (topd/ops).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace topd {
inline namespace CPU_CAPABILITY {

std::tuple<at::Tensor, at::Tensor, at::Tensor> divergence_rows(
    at::Tensor& student_product, at::Tensor& teacher_product, const std::optional<at::Tensor>& student_bias,
    const std::optional<at::Tensor>& teacher_bias, const std::optional<at::Tensor>& tokens, double student_scale,
    std::optional<double> student_softcap, double teacher_scale, std::optional<double> teacher_softcap, double temperature,
    c10::string_view divergence, double parameter, double hard_weight, bool grad, bool scores,
    const std::optional<at::Tensor>& grad_tile, double grad_scale);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> logprob_rows(
    at::Tensor& product, const std::optional<at::Tensor>& bias, const at::Tensor& ids, double scale,
    std::optional<double> softcap, double temperature, const std::optional<at::Tensor>& entropy_tile, bool grad, bool entropy,
    const std::optional<at::Tensor>& grad_tile, double grad_scale);

void weighted_gather(at::Tensor& out, const at::Tensor& table, const at::Tensor& ids, const at::Tensor& weights);

void weighted_scatter(at::Tensor& out, const at::Tensor& rows, const at::Tensor& ids, const at::Tensor& weights);

std::tuple<at::Tensor, at::Tensor, at::Tensor> transport(
    const at::Tensor& student_table, const at::Tensor& student_ids, const at::Tensor& student_lengths,
    const at::Tensor& teacher_table, const at::Tensor& teacher_ids, const at::Tensor& teacher_lengths, c10::string_view cost,
    double epsilon, int64_t max_iterations, double tolerance);

void bf16_addmm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factors, double beta,
                double alpha);

void advise_huge_pages(at::Tensor& buffer);

}  // namespace CPU_CAPABILITY
}  // namespace topd
