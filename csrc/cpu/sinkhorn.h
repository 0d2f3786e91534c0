// One entropic transport problem with uniform marginals, in double. Names and algorithm are those of
// python_api/topd/ops/transport/eager.py.
#pragma once

#include <cmath>
#include <vector>

#include "../shared/exp_log.h"

namespace topd {
inline namespace CPU_CAPABILITY {

class Problem {
 public:
  void resize(int64_t rows, int64_t columns) {
    rows_ = rows, columns_ = columns, a_ = 1.0 / rows, b_ = 1.0 / columns;
    // Lines padded to whole vectors: their last entries are never read as numbers of the problem.
    stride_ = padded(columns);
    cost_.assign(rows * stride_, 0), plan_.assign(rows * stride_, 0);
    f_.assign(rows, 0), row_sums_.assign(rows, 0);
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  double& cost_at(int64_t r, int64_t c) { return cost_[r * stride_ + c]; }
  double plan_at(int64_t r, int64_t c) const { return plan_[r * stride_ + c]; }

  double mean_cost() const {
    double sum = 0;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < columns_; ++c) sum += cost_[r * stride_ + c];
    return sum / static_cast<double>(rows_ * columns_);
  }

  // Finds the plan with exact columns, and returns the largest |row sum - marginal| in units of the marginal.
  double solve(double epsilon, int64_t max_iterations, double tolerance) {
    stage_ = std::max(epsilon, spread());
    int64_t tried = 0;
    evaluate();
    for (int64_t i = 0; i < max_iterations; ++i) {
      const bool final_stage = stage_ <= epsilon;
      if (error_ <= (final_stage ? tolerance : kStageTolerance)) {
        if (final_stage) break;
        stage_ = std::max(stage_ / kStageFactor, epsilon), tried = 0;
        evaluate();
      }
      if (tried++ < kStageSinkhorn || !newton()) sinkhorn();
    }
    if (stage_ > epsilon) stage_ = epsilon, evaluate();  // out of iterations: what is left at the epsilon that was asked for
    return error_;
  }

  // Moves the plan onto its marginals and returns <P, C>.
  double round() {
    std::vector<double> missing_a(rows_), column(columns_, 0);
    for (int64_t r = 0; r < rows_; ++r) {
      const double factor = std::min(1.0, a_ / std::max(row_sums_[r], 1e-300));
      for (int64_t c = 0; c < columns_; ++c) column[c] += plan_[r * stride_ + c] *= factor;
    }
    for (double& each : column) each = std::min(1.0, b_ / std::max(each, 1e-300));
    std::vector<double> missing_b(columns_, b_);
    double total = 0, distance = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < columns_; ++c) {
        sum += plan_[r * stride_ + c] *= column[c];
        missing_b[c] -= plan_[r * stride_ + c];
      }
      missing_a[r] = std::max(0.0, a_ - sum), total += missing_a[r];
    }
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) {
        double& entry = plan_[r * stride_ + c];
        if (total > 0) entry += missing_a[r] * std::max(0.0, missing_b[c]) / total;
        distance += entry * cost_[r * stride_ + c];
      }
    }
    return distance;
  }

 private:
  static constexpr double kStageFactor = 4, kStageTolerance = 0.1, kRidge = 1e-6, kArmijo = 1e-4;
  static constexpr int64_t kStageSinkhorn = 2, kMaxHalvings = 20, kLanes = Vec<double>::size();

  static int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

  double spread() const {
    double low = kInf<double>, high = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) {
        low = std::min(low, cost_[r * stride_ + c]), high = std::max(high, cost_[r * stride_ + c]);
      }
    }
    return high - low;
  }

  // Computes plan, row sums, D(f) and the error at (f, stage).
  void evaluate() {
    const double inverse = 1 / stage_;
    std::vector<double>&top = top_, &sum = sum_;
    top.assign(stride_, -kInf<double>), sum.assign(stride_, 0);
    for (int64_t r = 0; r < rows_; ++r) {
      each_vector([&](int64_t column) {
        scaled(r, column, inverse).store(&plan_[r * stride_ + column]);
        larger(Vec<double>::loadu(&top[column]), Vec<double>::loadu(&plan_[r * stride_ + column])).store(&top[column]);
      });
    }
    for (int64_t r = 0; r < rows_; ++r) {
      each_vector([&](int64_t column) {
        double* const entry = &plan_[r * stride_ + column];
        const Vec<double> e = exp(Vec<double>::loadu(entry) - Vec<double>::loadu(&top[column]));
        e.store(entry);
        (Vec<double>::loadu(&sum[column]) + e).store(&sum[column]);
      });
    }
    dual_ = 0;
    for (int64_t c = 0; c < columns_; ++c) dual_ += b_ * stage_ * (std::log(b_) - top[c] - std::log(sum[c]));
    for (int64_t c = 0; c < stride_; ++c) sum[c] = c < columns_ ? b_ / sum[c] : 0;
    error_ = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      Vec<double> total(0);
      each_vector([&](int64_t column) {
        double* const entry = &plan_[r * stride_ + column];
        const Vec<double> p = Vec<double>::loadu(entry) * Vec<double>::loadu(&sum[column]);
        p.store(entry);
        total = total + p;
      });
      row_sums_[r] = lane_sum(total);
      dual_ += a_ * f_[r];
      if (const double error = std::abs(row_sums_[r] - a_) / a_; !(error <= error_)) error_ = error;
      if (std::isnan(error_)) return;
    }
  }

  template <typename Visit>
  void each_vector(const Visit& visit) const {
    for (int64_t column = 0; column < stride_; column += kLanes) visit(column);
  }
  Vec<double> scaled(int64_t r, int64_t column, double inverse) const {
    return (Vec<double>(f_[r]) - Vec<double>::loadu(&cost_[r * stride_ + column])) * Vec<double>(inverse);
  }

  void sinkhorn() {
    for (int64_t r = 0; r < rows_; ++r) f_[r] += stage_ * std::log(a_ / std::max(row_sums_[r], 1e-300));
    evaluate();
  }

  // Takes a Newton step with a line search on D; returns false, and changes nothing, where there is none to take.
  bool newton() {
    if (!factorise()) return false;
    const std::vector<double> start = f_;
    std::vector<double> step(rows_);
    double slope = 0;
    for (int64_t r = 0; r < rows_; ++r) step[r] = a_ - row_sums_[r];
    substitute(step);
    for (int64_t r = 0; r < rows_; ++r) step[r] *= stage_, slope += step[r] * (a_ - row_sums_[r]);
    const double before = dual_;
    double size = 1;
    for (int64_t halving = 0; halving < kMaxHalvings; ++halving, size /= 2) {
      for (int64_t r = 0; r < rows_; ++r) f_[r] = start[r] + size * step[r];
      evaluate();
      if (dual_ - before >= kArmijo * size * slope - 1e-15 * std::abs(before)) return true;
    }
    f_ = start;
    evaluate();
    return false;
  }

  // Factorises H = diag(r) - P diag(1/b) Pᵀ + ridge + a 11ᵀ a as Uᵀ U, U in the upper triangle of padded lines.
  bool factorise() {
    const int64_t width = padded(rows_);
    transposed_.assign(columns_ * width, 0), factor_.resize(rows_ * width);
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < columns_; ++c) transposed_[c * width + r] = plan_[r * stride_ + c];
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t column = i / kLanes * kLanes; column < width; column += kLanes) {
        Vec<double> sum(0);
        for (int64_t c = 0; c < columns_; ++c)
          sum = fmadd(Vec<double>(plan_[i * stride_ + c]), Vec<double>::loadu(&transposed_[c * width + column]), sum);
        fmadd(sum, Vec<double>(-1 / b_), Vec<double>(a_ * a_)).store(&factor_[i * width + column]);
      }
      factor_[i * width + i] += row_sums_[i] + kRidge * a_;
    }
    for (int64_t k = 0; k < rows_; ++k) {
      double* const pivot = &factor_[k * width];
      if (!(pivot[k] > 0)) return false;
      const double root = 1 / std::sqrt(pivot[k]);
      for (int64_t column = k / kLanes * kLanes; column < width; column += kLanes)
        (Vec<double>::loadu(pivot + column) * Vec<double>(root)).store(pivot + column);
      for (int64_t i = k + 1; i < rows_; ++i) {
        const Vec<double> factor(-pivot[i]);
        for (int64_t column = i / kLanes * kLanes; column < width; column += kLanes) {
          double* const to = &factor_[i * width + column];
          fmadd(factor, Vec<double>::loadu(pivot + column), Vec<double>::loadu(to)).store(to);
        }
      }
    }
    return true;
  }

  // Replaces x by H^-1 x.
  void substitute(std::vector<double>& x) const {
    const int64_t width = padded(rows_);
    for (int64_t k = 0; k < rows_; ++k) {
      const double* const pivot = &factor_[k * width];
      x[k] /= pivot[k];
      for (int64_t i = k + 1; i < rows_; ++i) x[i] -= pivot[i] * x[k];
    }
    for (int64_t k = rows_ - 1; k >= 0; --k) {
      const double* const pivot = &factor_[k * width];
      for (int64_t i = k + 1; i < rows_; ++i) x[k] -= pivot[i] * x[i];
      x[k] /= pivot[k];
    }
  }

  int64_t rows_ = 0, columns_ = 0, stride_ = 0;
  double a_ = 0, b_ = 0, stage_ = 0, dual_ = 0, error_ = 0;
  std::vector<double> cost_, plan_, f_, row_sums_, factor_, transposed_, top_, sum_;
};

}  // namespace CPU_CAPABILITY
}  // namespace topd
