// Both distributions of a row, the student's and the teacher's.
#pragma once

#include <cmath>

#include "../shared/distribution.h"
#include "../shared/row_math.h"

namespace topd {
inline namespace CPU_CAPABILITY {
namespace divergence {

// Where the largest logits are near each other, d = log p_T - log p_S begins with the difference of the logits themselves,
// which is exact where they are near-equal.
template <typename T>
struct Pair {
  Distribution<T> student, teacher;
  T student_offset = 0, teacher_offset = 0, shift = 0, rest_gap;
  bool forward_inf = false;  // whether an entry has probability in the teacher alone
  bool reverse_inf = false;  // and in the student alone

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

  // `mixed`: for a divergence to a mixture, which needs `ratio`.
  template <bool mixed>
  Entry<T> entry(const T* student_row, const T* teacher_row, int64_t lanes) const {
    const Vec<T> ys = load(student_row, lanes), yt = load(teacher_row, lanes);
    Entry<T> out;
    const Vec<T> student_shifted = ys - Vec<T>(student.top), teacher_shifted = yt - Vec<T>(teacher.top);
    out.student_logprob = student_shifted - Vec<T>(static_cast<T>(student.log_rest));
    out.teacher_logprob = teacher_shifted - Vec<T>(static_cast<T>(teacher.log_rest));
    const Vec<T> d = ((yt - Vec<T>(teacher_offset)) - (ys - Vec<T>(student_offset))) - Vec<T>(shift) - Vec<T>(rest_gap);
    out.d = smaller(larger(d, Vec<T>(-kFar<T>)), Vec<T>(kFar<T>));  // NaN, no probability on either side: -kFar
    out.near = at_most(out.d.abs(), Vec<T>(1));
    out.phi_d = phi(out.d);
    if constexpr (mixed) {  // the ratio gives the smaller probability too
      const Mask<T> teacher_smaller = at_most(out.d, Vec<T>(0));
      out.ratio = exp(out.d.abs().neg());
      const Vec<T> more = exp(where(teacher_smaller, student_shifted, teacher_shifted)) *
                          where(teacher_smaller, Vec<T>(student.share), Vec<T>(teacher.share));
      const Vec<T> less = more * out.ratio;
      out.student_p = where(teacher_smaller, more, less);
      out.teacher_p = where(teacher_smaller, less, more);
    } else {
      out.student_p = exp(student_shifted) * Vec<T>(student.share);
      out.teacher_p = exp(teacher_shifted) * Vec<T>(teacher.share);
    }
    return out;
  }
};

// The probability of the entries beyond the common ones, `tail`.
template <typename T>
T lost_mass(T* tail, int64_t size, const Distribution<T>& common) {
  if (size == 0) return 0;
  const auto rest = distribution(tail, size);
  if (rest.top == -kInf<T>) return 0;
  return static_cast<T>(1 / (1 + std::exp(common.lse() - rest.lse())));
}

}  // namespace divergence
}  // namespace CPU_CAPABILITY
}  // namespace topd
