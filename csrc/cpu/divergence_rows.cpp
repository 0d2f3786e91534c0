// topd::divergence_rows on the CPU: each row of both tiles is read once from memory and swept while it lies in cache.
//
// Sweeps of a row: products to logits (only where something changes them); largest entry; normaliser; divergence, scores and
// the two operands of the gradient, A into the student's row and p_S into a scratch row (so that the teacher's need not be
// written back to memory); gradient into the student's row.

#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "../distribution.h"
#include "../operands.h"
#include "../terms.h"

namespace topd {
inline namespace CPU_CAPABILITY {

// The order of topd/scores.py.
enum Score { kForward, kReverse, kStudentEntropy, kTeacherEntropy, kStudentLogprob, kTeacherLogprob, kAgreement,
             kStudentLost, kTeacherLost, kScores };

// Room for this row and the next of both tiles in a second-level cache. A longer row has none to spare for the next.
constexpr int64_t kCacheBytes = 1 << 20;

template <typename T>
struct Call {
  Transform<T> student, teacher;
  T parameter, complement, hard_weight;
  bool grad, scores;
};

template <typename T>
struct Row {
  T* student;
  T* teacher;
  int64_t student_size, teacher_size;
  const int64_t* token;  // or null
  T* scratch;            // [V], for the gradient
  const T* next_student;  // this thread's next row, or null where there is none to fetch
  const T* next_teacher;
};

template <typename T>
struct Result {
  T value;
  bool finite;
  std::array<T, kScores> scores{};
};

// Both distributions of a row, and d = log p_T - log p_S: where the offsets are near, the logits themselves are subtracted
// first, since the difference of near-equal numbers is exact.
template <typename T>
struct Pair {
  Distribution<T> student, teacher;
  T student_offset = 0, teacher_offset = 0, shift = 0, rest_gap;
  bool forward_inf = false, reverse_inf = false;  // an entry has probability on one side only

  Pair(const T* student_row, const T* teacher_row, int64_t size, Distribution<T> s, Distribution<T> t)
      : student(s), teacher(t), rest_gap(static_cast<T>(t.log_rest - s.log_rest)) {
    if (std::abs(t.top - s.top) <= 4) shift = t.top - s.top;
    else student_offset = s.top, teacher_offset = t.top;
    for (int64_t v = 0; (s.has_zero || t.has_zero) && v < size; ++v) {
      const bool student_zero = student_row[v] == -kInf<T>, teacher_zero = teacher_row[v] == -kInf<T>;
      forward_inf |= student_zero && !teacher_zero;
      reverse_inf |= teacher_zero && !student_zero;
    }
  }

  template <bool mixed>
  Entry<T> entry(const T* student_row, const T* teacher_row, int64_t lanes) const {
    const Vec<T> ys = load(student_row, lanes), yt = load(teacher_row, lanes);
    Entry<T> at;
    const Vec<T> student_shifted = ys - Vec<T>(student.top), teacher_shifted = yt - Vec<T>(teacher.top);
    at.student_logprob = student_shifted - Vec<T>(static_cast<T>(student.log_rest));
    at.teacher_logprob = teacher_shifted - Vec<T>(static_cast<T>(teacher.log_rest));
    const Vec<T> d =
        ((yt - Vec<T>(teacher_offset)) - (ys - Vec<T>(student_offset))) - Vec<T>(shift) - Vec<T>(rest_gap);
    at.d = smaller(larger(d, Vec<T>(-kFar<T>)), Vec<T>(kFar<T>));  // NaN, no probability on either side: -kFar
    at.near = at_most(at.d.abs(), Vec<T>(1));
    at.phi_d = phi(at.d);
    if constexpr (mixed) {  // exp(-|d|) is needed anyway, and gives the smaller side's probability
      const Mask<T> teacher_smaller = at_most(at.d, Vec<T>(0));
      at.ratio = exp(at.d.abs().neg());
      const Vec<T> more = exp(where(teacher_smaller, student_shifted, teacher_shifted)) *
                          where(teacher_smaller, Vec<T>(student.share), Vec<T>(teacher.share));
      const Vec<T> less = more * at.ratio;
      at.student_p = where(teacher_smaller, more, less);
      at.teacher_p = where(teacher_smaller, less, more);
    } else {
      at.student_p = exp(student_shifted) * Vec<T>(student.share);
      at.teacher_p = exp(teacher_shifted) * Vec<T>(teacher.share);
    }
    return at;
  }
};

template <typename T>
T lost_mass(T* tail, int64_t size, const Distribution<T>& common) {
  if (size == 0) return 0;
  const auto rest = distribution(tail, size);
  if (rest.top == -kInf<T>) return 0;
  return static_cast<T>(1 / (1 + std::exp(common.lse() - rest.lse())));
}

template <typename T, Kind kind, bool with_scores>
struct Sweeper {
  static constexpr bool kCentred = kind != Kind::kForwardKL;
  static constexpr bool kMixed =
      kind != Kind::kForwardKL && kind != Kind::kReverseKL && kind != Kind::kTotalVariation;
  const Call<T>& call;

  void run(const Row<T>& row, Result<T>& out) const {
    apply(call.student, row.student, row.student_size);
    apply(call.teacher, row.teacher, row.teacher_size);
    const int64_t size = std::min(row.student_size, row.teacher_size);
    const Pair<T> pair(row.student, row.teacher, size, distribution(row.student, size), distribution(row.teacher, size));
    out.finite = pair.student.exists() && pair.teacher.exists();
    if (!out.finite) {
      out.value = std::numeric_limits<T>::quiet_NaN();
      out.scores.fill(out.value);
      if (call.grad) std::fill(row.student, row.student + row.student_size, T(0));
      return;
    }
    const bool has_token = row.token != nullptr;
    const T token_logit = has_token ? row.student[*row.token] : T(0);
    if constexpr (with_scores) {
      if (has_token) {
        out.scores[kStudentLogprob] = pair.student.logprob(token_logit);
        out.scores[kTeacherLogprob] = pair.teacher.logprob(row.teacher[*row.token]);
      }
      out.scores[kAgreement] = pair.student.index == pair.teacher.index;
      out.scores[kStudentLost] = lost_mass(row.student + size, row.student_size - size, pair.student);
      out.scores[kTeacherLost] = lost_mass(row.teacher + size, row.teacher_size - size, pair.teacher);
    }
    const T centre = values(row, size, pair, out);
    if (call.grad) {
      gradient(row, size, out.value, centre, has_token ? pair.student.logprob(token_logit) : T(0), token_logit);
      std::fill(row.student + size, row.student + row.student_size, T(0));
    }
    if (has_token && call.hard_weight != 0) out.value -= call.hard_weight * pair.student.logprob(token_logit);
  }

  // The value and scores; leaves A in the student's row and p_S slope in the scratch. Returns E.
  T values(const Row<T>& row, int64_t size, const Pair<T>& pair, Result<T>& out) const {
    const int64_t mode = pair.student.index;
    const Vec<T> zero(0);
    Vec<T> a_mode(0);
    if constexpr (kCentred) {
      const Entry<T> entry = pair.template entry<kMixed>(row.student + mode, row.teacher + mode, 1);
      a_mode = Vec<T>(first_lane(term_of<T, kind>(entry, call.parameter, call.complement).a));
    }
    double value = 0, centre = 0;
    std::array<double, 4> sums{};
    Vec<T> value_block(0), centre_block(0);
    std::array<Vec<T>, 4> blocks{zero, zero, zero, zero};
    sweep<T>(
        size,
        [&](int64_t at, int64_t lanes) TOPD_INLINE {
          if (row.next_student) fetch(row.next_student + at), fetch(row.next_teacher + at);
          const Entry<T> entry = pair.template entry<kMixed>(row.student + at, row.teacher + at, lanes);
          const Term<T> term = term_of<T, kind>(entry, call.parameter, call.complement);
          value_block = value_block + term.value;
          if constexpr (with_scores) {
            blocks[kForward] = blocks[kForward] + entry.forward_term();
            blocks[kReverse] = blocks[kReverse] + entry.reverse_term();
            blocks[kStudentEntropy] = blocks[kStudentEntropy] + entropy_term(entry.student_p, entry.student_logprob);
            blocks[kTeacherEntropy] = blocks[kTeacherEntropy] + entropy_term(entry.teacher_p, entry.teacher_logprob);
          }
          if (!call.grad) return;
          const Vec<T> slope = call.student.slope(load(row.student + at, lanes));
          if constexpr (kCentred) {
            const Vec<T> a = term.a - a_mode;
            centre_block = fmadd(entry.student_p, a, centre_block);
            store(a, row.student + at, lanes);
          } else {
            centre_block = centre_block + term.centre;
            store(term.a * slope, row.student + at, lanes);
          }
          store(entry.student_p * slope, row.scratch + at, lanes);
        },
        [&](int64_t) TOPD_INLINE {
          value += lane_sum(value_block), centre += lane_sum(centre_block);
          value_block = centre_block = zero;
          if constexpr (with_scores) {
            for (int i = 0; i < 4; ++i) sums[i] += lane_sum(blocks[i]), blocks[i] = zero;
          }
        });
    const bool infinite = kind == Kind::kForwardKL ? pair.forward_inf && call.parameter == kInf<T>
                                                   : kind == Kind::kReverseKL && pair.reverse_inf;
    out.value = infinite ? kInf<T> : static_cast<T>(value);
    if constexpr (with_scores) {
      std::copy(sums.begin(), sums.end(), out.scores.begin());
      if (pair.forward_inf) out.scores[kForward] = kInf<T>;
      if (pair.reverse_inf) out.scores[kReverse] = kInf<T>;
    }
    return static_cast<T>(centre);
  }

  static Vec<T> entropy_term(const Vec<T>& p, const Vec<T>& logprob) {
    return (p * larger(logprob, Vec<T>(-kFar<T>))).neg();
  }

  void gradient(const Row<T>& row, int64_t size, T value, T centre, T token_logprob, T token_logit) const {
    const T hard = row.token ? call.hard_weight : T(0);
    const bool dead = kCentred && std::isinf(value);  // only the forward KL has a gradient where it is inf
    if (!kCentred && centre == 0 && hard == 0) return;  // A is the gradient
    const auto at = [&](const Vec<T>& a, const Vec<T>& p, T weight) TOPD_INLINE {
      if (dead) return p * Vec<T>(weight);
      return kCentred ? p * (a - Vec<T>(centre - weight)) : a - p * Vec<T>(centre - weight);
    };
    T token_part = 0;
    if (hard != 0) {
      const Vec<T> a(row.student[*row.token]), p(row.scratch[*row.token]);
      token_part = first_lane(at(a, p, T(0))) + hard * first_lane(call.student.slope(Vec<T>(token_logit))) * std::expm1(token_logprob);
    }
    sweep<T>(
        size,
        [&](int64_t i, int64_t lanes) TOPD_INLINE {
          store(at(load(row.student + i, lanes), load(row.scratch + i, lanes), hard), row.student + i, lanes);
        },
        [](int64_t) {});
    if (hard != 0) row.student[*row.token] = token_part;
  }
};

template <typename T, Kind kind>
void run_row(const Call<T>& call, const Row<T>& row, Result<T>& out) {
  if (call.scores) Sweeper<T, kind, true>{call}.run(row, out);
  else Sweeper<T, kind, false>{call}.run(row, out);
}

template <typename T>
void run_row(Kind kind, const Call<T>& call, const Row<T>& row, Result<T>& out) {
  switch (kind) {
    case Kind::kForwardKL: return run_row<T, Kind::kForwardKL>(call, row, out);
    case Kind::kReverseKL: return run_row<T, Kind::kReverseKL>(call, row, out);
    case Kind::kEvenJSD:
    case Kind::kJSD:
      if constexpr (std::is_same_v<T, float>)
        if (call.parameter == 0.5f) return run_row<T, Kind::kEvenJSD>(call, row, out);
      return run_row<T, Kind::kJSD>(call, row, out);
    case Kind::kSkewKL: return run_row<T, Kind::kSkewKL>(call, row, out);
    case Kind::kSkewReverseKL: return run_row<T, Kind::kSkewReverseKL>(call, row, out);
    case Kind::kTotalVariation: return run_row<T, Kind::kTotalVariation>(call, row, out);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> divergence_rows(
    at::Tensor& student, at::Tensor& teacher, const std::optional<at::Tensor>& student_bias,
    const std::optional<at::Tensor>& teacher_bias, const std::optional<at::Tensor>& tokens, double student_scale,
    std::optional<double> student_softcap, double teacher_scale, std::optional<double> teacher_softcap, double temperature,
    c10::string_view divergence, double parameter, double hard_weight, bool grad, bool scores,
    const std::optional<at::Tensor>& grad_tile, double grad_scale) {
  TORCH_CHECK_VALUE(!grad_tile, "grad_tile must be None on the CPU: the gradient goes into student_product");
  TORCH_CHECK_VALUE(grad_scale == 1, "grad_scale is for float16 tiles, which the CPU has not, and must be 1, got ", grad_scale);
  TORCH_CHECK_VALUE(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0),
                    "student_product and teacher_product must be [C, V_s] and [C, V_t], got ", student.sizes(), " and ",
                    teacher.sizes());
  TORCH_CHECK_VALUE(student.scalar_type() == teacher.scalar_type(), "both products must share a dtype");
  TORCH_CHECK_VALUE(student.size(1) > 0 && teacher.size(1) > 0, "both products must have at least one column");
  TORCH_CHECK_VALUE(student.stride(1) == 1 && teacher.stride(1) == 1, "both products must be contiguous along the vocabulary");
  const int64_t rows = student.size(0), size = std::min(student.size(1), teacher.size(1));
  TORCH_CHECK_VALUE(!tokens || (tokens->scalar_type() == at::kLong && tokens->dim() == 1 && tokens->size(0) == rows),
                    "tokens must be int64 [C]");
  const at::Tensor ids = tokens ? tokens->contiguous() : at::Tensor();
  const int64_t* id = tokens ? ids.const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; id && i < rows; ++i)
    TORCH_CHECK_VALUE(0 <= id[i] && id[i] < size, "tokens must lie in [0, ", size, "), got ", id[i]);

  const Kind kind = kind_of(divergence);
  at::Tensor value = at::empty({rows}, student.options());
  at::Tensor found = at::empty({scores ? kScores : 0, rows}, student.options());
  at::Tensor finite = at::empty({rows}, student.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(student.scalar_type(), "topd::divergence_rows", [&] {
    using T = scalar_t;
    const T* const student_add = bias_of<T>(student_bias, student, "student_bias");
    const T* const teacher_add = bias_of<T>(teacher_bias, teacher, "teacher_bias");
    const Call<T> call{{student_add, student_scale, student_softcap.value_or(0), temperature},
                       {teacher_add, teacher_scale, teacher_softcap.value_or(0), temperature},
                       static_cast<T>(parameter), static_cast<T>(1 - parameter), static_cast<T>(hard_weight), grad, scores};
    T* const student_data = student.data_ptr<T>();
    T* const teacher_data = teacher.data_ptr<T>();
    T* const value_data = value.data_ptr<T>();
    T* const found_data = found.data_ptr<T>();
    bool* const finite_data = finite.data_ptr<bool>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(grad ? size : 0);
      for (int64_t i = begin; i < end; ++i) {
        T* const student_row = student_data + i * student.stride(0);
        T* const teacher_row = teacher_data + i * teacher.stride(0);
        const bool ahead = i + 1 < end && 4 * size * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
        const Row<T> row{student_row, teacher_row, student.size(1), teacher.size(1), id ? id + i : nullptr, scratch.data(),
                         ahead ? student_row + student.stride(0) : nullptr, ahead ? teacher_row + teacher.stride(0) : nullptr};
        Result<T> out;
        run_row<T>(kind, call, row, out);
        value_data[i] = out.value;
        finite_data[i] = out.finite;
        for (int64_t k = 0; scores && k < kScores; ++k) found_data[k * rows + i] = out.scores[k];
      }
    });
  });
  return {value, found, finite};
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
