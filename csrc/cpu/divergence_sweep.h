// The sweeps of divergence_rows over one row: products to logits (only where something changes them); largest entry;
// normaliser; divergence, scores and the two operands of the gradient, A into the student's row and p_S into a scratch row (so
// that the teacher's need not be written back to memory); gradient into the student's row.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../shared/distribution.h"
#include "divergence_pair.h"
#include "divergence_terms.h"

namespace topd {
inline namespace CPU_CAPABILITY {
namespace divergence {

// The order of python_api/topd/scores.py.
enum Score {
  kForward,
  kReverse,
  kStudentEntropy,
  kTeacherEntropy,
  kStudentLogprob,
  kTeacherLogprob,
  kAgreement,
  kStudentLost,
  kTeacherLost,
  kScores
};

// What all rows of a call share.
template <typename T>
struct Call {
  Kind kind;
  Transform<T> student, teacher;
  T parameter, complement, hard_weight;
  bool grad, scores;
};

// A row of both tiles, and what else belongs to it.
template <typename T>
struct Row {
  T* student;
  T* teacher;
  int64_t student_size, teacher_size;
  const int64_t* token;   // or null
  T* scratch;             // [V], for the gradient
  const T* next_student;  // this thread's next row, or null where there is none to fetch
  const T* next_teacher;
};

template <typename T>
struct Result {
  T value;
  bool finite;
  std::array<T, kScores> scores{};
};

template <typename T, Kind kind, bool with_scores>
struct Sweeper {
  static constexpr bool kCentred = kind != Kind::kForwardKL;
  static constexpr bool kMixed = kind != Kind::kForwardKL && kind != Kind::kReverseKL && kind != Kind::kTotalVariation;
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

  // Computes the value and the scores, leaves A in the student's row and p_S times the slope in the scratch row, and returns E.
  // A and E: see Term.
  T values(const Row<T>& row, int64_t size, const Pair<T>& pair, Result<T>& out) const {
    const int64_t mode = pair.student.index;
    const Vec<T> zero(0);
    // Subtracted from every A, so that the gradient does not cancel where p_S is near 1.
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
        [&](int64_t offset, int64_t lanes) TOPD_INLINE {
          if (row.next_student) fetch(row.next_student + offset), fetch(row.next_teacher + offset);
          const Entry<T> entry = pair.template entry<kMixed>(row.student + offset, row.teacher + offset, lanes);
          const Term<T> term = term_of<T, kind>(entry, call.parameter, call.complement);
          value_block = value_block + term.value;
          if constexpr (with_scores) {
            blocks[kForward] = blocks[kForward] + entry.forward_term();
            blocks[kReverse] = blocks[kReverse] + entry.reverse_term();
            blocks[kStudentEntropy] = blocks[kStudentEntropy] + entropy_term(entry.student_p, entry.student_logprob);
            blocks[kTeacherEntropy] = blocks[kTeacherEntropy] + entropy_term(entry.teacher_p, entry.teacher_logprob);
          }
          if (!call.grad) return;
          const Vec<T> slope = call.student.slope(load(row.student + offset, lanes));
          if constexpr (kCentred) {
            const Vec<T> a = term.a - a_mode;
            centre_block = fmadd(entry.student_p, a, centre_block);
            store(a, row.student + offset, lanes);
          } else {
            centre_block = centre_block + term.centre;
            store(term.a * slope, row.student + offset, lanes);
          }
          store(entry.student_p * slope, row.scratch + offset, lanes);
        },
        [&](int64_t) TOPD_INLINE {
          value += lane_sum(value_block), centre += lane_sum(centre_block);
          value_block = centre_block = zero;
          if constexpr (with_scores) {
            for (int i = 0; i < 4; ++i) sums[i] += lane_sum(blocks[i]), blocks[i] = zero;
          }
        });
    out.value = infinite(pair) ? kInf<T> : static_cast<T>(value);
    if constexpr (with_scores) {
      std::copy(sums.begin(), sums.end(), out.scores.begin());
      if (pair.forward_inf) out.scores[kForward] = kInf<T>;
      if (pair.reverse_inf) out.scores[kReverse] = kInf<T>;
    }
    return static_cast<T>(centre);
  }

  bool infinite(const Pair<T>& pair) const {
    if (kind == Kind::kForwardKL) return pair.forward_inf && call.parameter == kInf<T>;
    return kind == Kind::kReverseKL && pair.reverse_inf;
  }

  static Vec<T> entropy_term(const Vec<T>& p, const Vec<T>& logprob) { return (p * larger(logprob, Vec<T>(-kFar<T>))).neg(); }

  void gradient(const Row<T>& row, int64_t size, T value, T centre, T token_logprob, T token_logit) const {
    const T hard = row.token ? call.hard_weight : T(0);
    const bool dead = kCentred && std::isinf(value);    // only the forward KL has a gradient where it is inf
    if (!kCentred && centre == 0 && hard == 0) return;  // A is the gradient
    const auto combined = [&](const Vec<T>& a, const Vec<T>& p, T weight) TOPD_INLINE {
      if (dead) return p * Vec<T>(weight);
      return kCentred ? p * (a - Vec<T>(centre - weight)) : a - p * Vec<T>(centre - weight);
    };
    T token_part = 0;
    if (hard != 0) {
      const Vec<T> a(row.student[*row.token]), p(row.scratch[*row.token]);
      const T slope = first_lane(call.student.slope(Vec<T>(token_logit)));
      token_part = first_lane(combined(a, p, T(0))) + hard * slope * std::expm1(token_logprob);
    }
    sweep<T>(
        size,
        [&](int64_t offset, int64_t lanes) TOPD_INLINE {
          T* const a = row.student + offset;
          store(combined(load(a, lanes), load(row.scratch + offset, lanes), hard), a, lanes);
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
void run_row(const Call<T>& call, const Row<T>& row, Result<T>& out) {
  switch (call.kind) {
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

}  // namespace divergence
}  // namespace CPU_CAPABILITY
}  // namespace topd
