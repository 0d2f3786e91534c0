// topd::transport on the CPU: one problem a task. Both windows' rows are gathered and the cost is formed in a thread's scratch,
// then potentials, plan and Newton steps in double (python_api/topd/ops/transport/eager.py has the algorithm).

#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <numeric>

#include "../shared/sweep.h"
#include "sinkhorn.h"

namespace topd {
inline namespace CPU_CAPABILITY {
namespace {

enum class Cost { kCosine, kSquaredEuclidean, kMismatch };

Cost cost_of(c10::string_view name) {
  if (name == "cosine") return Cost::kCosine;
  if (name == "sqeuclidean") return Cost::kSquaredEuclidean;
  if (name == "mismatch") return Cost::kMismatch;
  TORCH_CHECK_VALUE(false, "unknown cost '", name, "'");
}

struct Side {
  at::Tensor table, held_ids, held_lengths;
  const int64_t* ids;
  const int64_t* lengths;
  int64_t window;

  Side(const at::Tensor& rows, const at::Tensor& tokens, const at::Tensor& counts, const char* name)
      : table(rows.stride(1) == 1 ? rows : rows.contiguous()), held_ids(tokens.contiguous()),
        held_lengths(counts.contiguous()) {
    TORCH_CHECK_VALUE(rows.dim() == 2 && tokens.dim() == 2 && counts.dim() == 1 && counts.size(0) == tokens.size(0), name,
                      " takes table [V, d], ids [m, K] and lengths [m]");
    TORCH_CHECK_VALUE(tokens.scalar_type() == at::kLong && counts.scalar_type() == at::kLong, name,
                      " ids and lengths are int64");
    ids = held_ids.const_data_ptr<int64_t>(), lengths = held_lengths.const_data_ptr<int64_t>(), window = tokens.size(1);
    for (int64_t i = 0; i < counts.size(0); ++i) {
      TORCH_CHECK_VALUE(1 <= lengths[i] && lengths[i] <= window, name, " lengths must lie in [1, ", window, "], got ",
                        lengths[i]);
    }
  }

  // Window i's vectors in T, one after the other, of unit length where asked; a zero vector stays one.
  template <typename T>
  void gather(int64_t i, std::vector<T>& out, bool unit) const {
    const int64_t width = table.size(1);
    out.resize(lengths[i] * width);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, table.scalar_type(), "topd::transport", [&] {
      const scalar_t* const from = table.const_data_ptr<scalar_t>();
      for (int64_t k = 0; k < lengths[i]; ++k) {
        const int64_t id = ids[i * window + k];
        TORCH_CHECK_VALUE(0 <= id && id < table.size(0), "ids must lie in [0, ", table.size(0), "), got ", id);
        const scalar_t* const row = from + id * table.stride(0);
        T* const to = &out[k * width];
        for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(row[d]);
        const double norm = unit ? std::sqrt(squared_norm(to, width)) : 1;
        if (norm == 0 || norm == 1) continue;
        const T inverse = static_cast<T>(1 / norm);
        if (std::isnormal(inverse))
          for (int64_t d = 0; d < width; ++d) to[d] *= inverse;
        else
          for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(to[d] / norm);
      }
    });
  }

  // In double: the squares of float32 may leave its range.
  template <typename T>
  static double squared_norm(const T* x, int64_t width) {
    std::array<double, 8> sums{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8)
      for (int64_t j = 0; j < 8; ++j) sums[j] += static_cast<double>(x[d + j]) * x[d + j];
    for (; d < width; ++d) sums[0] += static_cast<double>(x[d]) * x[d];
    return std::accumulate(sums.begin(), sums.end(), 0.0);
  }
};

// The costs of one pair of windows at a time, from a thread's scratch: the student's vectors line by line, the teacher's
// transposed, so that a vector of teacher positions is summed at once.
template <typename T>
class Costs {
 public:
  Costs(Cost kind, const Side& student, const Side& teacher) : kind_(kind), student_(student), teacher_(teacher) {}

  void fill(int64_t i, Problem& problem) {
    const int64_t rows = student_.lengths[i], columns = teacher_.lengths[i];
    problem.resize(rows, columns);
    if (kind_ == Cost::kMismatch) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          problem.cost_at(r, c) = student_.ids[i * student_.window + r] != teacher_.ids[i * teacher_.window + c];
      return;
    }
    load(i, rows, columns);
    if (kind_ == Cost::kCosine) {
      products(problem, [](const Vec<T>& x, const Vec<T>& y, const Vec<T>& sum) TOPD_INLINE { return fmadd(x, y, sum); });
      cosine(problem);
    } else {
      products(problem,
               [](const Vec<T>& x, const Vec<T>& y, const Vec<T>& sum) TOPD_INLINE { return fmadd(x - y, x - y, sum); });
    }
  }

 private:
  // kSummed entries are summed in T before the sum goes on in double.
  static constexpr int64_t kLanes = Vec<T>::size(), kRows = 4, kSummed = 256;

  void load(int64_t i, int64_t rows, int64_t columns) {
    width_ = student_.table.size(1), stride_ = (columns + kLanes - 1) / kLanes * kLanes;
    const bool unit = kind_ == Cost::kCosine;
    student_.gather<T>(i, x_, unit), teacher_.gather<T>(i, lines_, unit);
    x_.resize((rows + kRows - 1) / kRows * kRows * width_, T(0)), y_.assign(width_ * stride_, T(0));
    constexpr int64_t kBlock = 16;
    for (int64_t block = 0; block < width_; block += kBlock)
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t d = block; d < std::min(block + kBlock, width_); ++d) y_[d * stride_ + c] = lines_[c * width_ + d];
  }

  // sum over d of f(x, y), kRows student positions and a vector of teacher positions at a time.
  template <typename F>
  void products(Problem& problem, const F& f) const {
    const int64_t blocks = (width_ + kSummed - 1) / kSummed;
    for (int64_t r = 0; r < problem.rows(); r += kRows) {
      const T* const x = &x_[r * width_];
      for (int64_t tile = 0; tile < stride_ / kLanes * blocks; ++tile) {
        const int64_t column = tile / blocks * kLanes, start = tile % blocks * kSummed;
        Vec<T> first(0), second(0), third(0), fourth(0);
        for (int64_t d = start; d < std::min(start + kSummed, width_); ++d) {
          const Vec<T> y = Vec<T>::loadu(&y_[d * stride_ + column]);
          first = f(Vec<T>(x[d]), y, first), second = f(Vec<T>(x[width_ + d]), y, second);
          third = f(Vec<T>(x[2 * width_ + d]), y, third), fourth = f(Vec<T>(x[3 * width_ + d]), y, fourth);
        }
        const std::array<Vec<T>, kRows> sums{first, second, third, fourth};
        std::array<T, kLanes> lanes;
        for (int64_t k = 0; k < std::min(kRows, problem.rows() - r); ++k) {
          sums[k].store(lanes.data());
          for (int64_t c = column; c < std::min(column + kLanes, problem.columns()); ++c)
            problem.cost_at(r + k, c) += lanes[c - column];
        }
      }
    }
  }

  // 1 - cosine from the products of unit vectors; a NaN stays one.
  void cosine(Problem& problem) const {
    for (int64_t r = 0; r < problem.rows(); ++r) {
      for (int64_t c = 0; c < problem.columns(); ++c) {
        const double gap = 1 - problem.cost_at(r, c);
        problem.cost_at(r, c) = gap < 0 ? 0 : gap;
      }
    }
  }

  Cost kind_;
  const Side& student_;
  const Side& teacher_;
  int64_t width_ = 0, stride_ = 0;
  std::vector<T> x_, y_, lines_;
};

}  // namespace

Transport transport(const at::Tensor& student_table, const at::Tensor& student_ids, const at::Tensor& student_lengths,
                    const at::Tensor& teacher_table, const at::Tensor& teacher_ids, const at::Tensor& teacher_lengths,
                    c10::string_view cost, double epsilon, int64_t max_iterations, double tolerance) {
  const Side student(student_table, student_ids, student_lengths, "student");
  const Side teacher(teacher_table, teacher_ids, teacher_lengths, "teacher");
  const Cost kind = cost_of(cost);
  const int64_t problems = student_ids.size(0);
  TORCH_CHECK_VALUE(teacher_ids.size(0) == problems, "student and teacher must hold the same number of windows");
  TORCH_CHECK_VALUE(kind == Cost::kMismatch || student_table.size(1) == teacher_table.size(1),
                    "student and teacher vectors must share a width");
  const bool wide = student_table.scalar_type() == at::kDouble || teacher_table.scalar_type() == at::kDouble;
  const auto options = student_table.options().dtype(wide ? at::kDouble : at::kFloat);
  at::Tensor distance = at::zeros({problems}, options), error = at::zeros({problems}, options);
  at::Tensor plan = at::zeros({problems, student.window, teacher.window}, options);
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "topd::transport", [&] {
    scalar_t* const distances = distance.data_ptr<scalar_t>();
    scalar_t* const errors = error.data_ptr<scalar_t>();
    scalar_t* const plans = plan.data_ptr<scalar_t>();
    at::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
      Problem problem;
      Costs<scalar_t> costs(kind, student, teacher);
      for (int64_t i = begin; i < end; ++i) {
        costs.fill(i, problem);
        const double scale = kind == Cost::kSquaredEuclidean ? std::max(problem.mean_cost(), 1e-12) : 1;
        errors[i] = static_cast<scalar_t>(problem.solve(epsilon * scale, max_iterations, tolerance));
        distances[i] = static_cast<scalar_t>(problem.round());
        for (int64_t r = 0; r < problem.rows(); ++r)
          for (int64_t c = 0; c < problem.columns(); ++c)
            plans[(i * student.window + r) * teacher.window + c] = static_cast<scalar_t>(problem.plan_at(r, c));
      }
    });
  });
  return {distance, plan, error};
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
