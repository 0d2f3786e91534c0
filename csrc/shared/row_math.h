// The elementwise math of python_api/topd/ops/shared/row_math.py on at::vec vectors. Names and formulas are that file's.
#pragma once

#include <cmath>

#include "exp_log.h"

namespace topd {
inline namespace CPU_CAPABILITY {

// d is held in [-kFar, kFar]: an entry without probability on one side then contributes what it should with no case of its
// own, p d being 0 where p is, and a row whose value is truly inf is known beforehand (Pair).
template <typename T>
constexpr T kFar = std::is_same_v<T, float> ? T(1e30) : T(1e300);

// phi(d) = d^2 (even(d^2) - d odd(d^2)), highest power first. float: fitted on [0, 1] to 5e-9; double: 1 / (2k + 2)! and
// 1 / (2k + 3)!, the first dropped term is 4e-19.
template <typename T>
struct PhiSeries {
  static constexpr std::array<T, 9> make(int first) {
    std::array<T, 9> out{};
    double factorial = 1;
    for (int k = 2; k <= 18 + first - 2; ++k) {
      factorial *= k;
      if ((k - first) % 2 == 0 && k >= first) out[8 - (k - first) / 2] = static_cast<T>(1 / factorial);
    }
    return out;
  }
  static constexpr auto kEven = make(2), kOdd = make(3);
};
template <>
struct PhiSeries<float> {
  static constexpr std::array<float, 4> kEven{2.5358644052e-05f, 1.3885394437e-03f, 4.1666734964e-02f, 0.5f};
  static constexpr std::array<float, 4> kOdd{2.8062904676e-06f, 1.9838100707e-04f, 8.3333393559e-03f, 1.6666667163e-01f};
};

template <typename T>
struct PhiPair {
  Vec<T> plus, minus;  // phi(d), phi(-d)
};

// phi(d) = exp(-d) + d - 1 and phi(-d) for |d| <= 1, from the even and the odd half of one series.
template <typename T>
inline PhiPair<T> phi(const Vec<T>& d) {
  using Series = PhiSeries<T>;
  const Vec<T> square = d * d;
  Vec<T> even(Series::kEven[0]), odd(Series::kOdd[0]);
  for (size_t k = 1; k < Series::kEven.size(); ++k) {
    even = fmadd(even, square, Vec<T>(Series::kEven[k]));
    odd = fmadd(odd, square, Vec<T>(Series::kOdd[k]));
  }
  const Vec<T> tilt = d * odd;
  return {square * (even - tilt), square * (even + tilt)};
}

// A non-negative term of KL(p || q), d = log p - log q: p phi(d) where |d| <= 1, q - p + p d elsewhere.
template <typename T>
inline Vec<T> kl_term(const Vec<T>& p, const Vec<T>& q, const Vec<T>& d, const Mask<T>& near, const Vec<T>& phi_d) {
  return where(near, p * phi_d, fmadd(p, d, q - p));
}

template <typename T>
inline Vec<T> kl_term(const Vec<T>& p, const Vec<T>& q, const Vec<T>& d) {
  return kl_term<T>(p, q, d, at_most(d.abs(), Vec<T>(1)), phi(d).plus);
}

// One vector of entries of both distributions.
template <typename T>
struct Entry {
  Vec<T> student_logprob, teacher_logprob, student_p, teacher_p;
  Vec<T> d;          // log p_T - log p_S
  Mask<T> near;      // |d| <= 1
  PhiPair<T> phi_d;  // valid where near
  Vec<T> ratio;      // exp(-|d|), for mixtures alone

  // p_S - p_T
  Vec<T> gap() const { return where(near, teacher_p * (phi_d.plus - d), student_p - teacher_p); }
  Vec<T> forward_term() const { return kl_term<T>(teacher_p, student_p, d, near, phi_d.plus); }
  Vec<T> reverse_term() const { return kl_term<T>(student_p, teacher_p, d.neg(), near, phi_d.minus); }
};

// m = (1 - beta) p_S + beta p_T: log-ratios to m and relative excesses over it, accurate near p_S = p_T.
template <typename T>
struct Mixture {
  Vec<T> m, teacher_d, student_d, teacher_excess, student_excess;

  Mixture(const Entry<T>& entry, T beta, T rest) {  // rest = 1 - beta
    const Vec<T> size = entry.d.abs();
    const Mask<T> teacher_smaller = at_most(entry.d, Vec<T>(0));
    const Vec<T> less = where(teacher_smaller, Vec<T>(beta), Vec<T>(rest));  // the smaller side's share of m
    const Vec<T> more = where(teacher_smaller, Vec<T>(rest), Vec<T>(beta));
    const Vec<T> e = where(entry.near, phi(size).plus - size, entry.ratio - Vec<T>(1));  // expm1(-|d|)
    const Vec<T> excess = less * e;                                                      // m / larger - 1
    const Mask<T> mild = at_most(Vec<T>(-0.5), excess);                                  // below, 1 + excess would cancel
    const Vec<T> share = where(mild, Vec<T>(1) + excess, fmadd(less, entry.ratio, more));
    const Vec<T> larger_d = log_share(share, excess, mild).neg(), smaller_d = larger_d - size;
    m = Vec<T>(rest) * entry.student_p + Vec<T>(beta) * entry.teacher_p;
    teacher_d = where(teacher_smaller, smaller_d, larger_d);
    student_d = where(teacher_smaller, larger_d, smaller_d);
    teacher_excess = where(teacher_smaller, more * e, excess.neg()) / share;
    student_excess = where(teacher_smaller, excess.neg(), more * e) / share;
  }

  // beta KL(p_T || m) + (1 - beta) KL(p_S || m). Their parts q - p cancel, so where |d| > 1 only the p d remain; below, the
  // non-negative form keeps the digits.
  Vec<T> jsd_term(const Entry<T>& entry, T beta, T rest) const {
    const Vec<T> teacher = Vec<T>(beta) * entry.teacher_p, student = Vec<T>(rest) * entry.student_p;
    const Vec<T> near = fmadd(teacher, phi(teacher_d).plus, student * phi(student_d).plus);
    return where(entry.near, near, fmadd(teacher, teacher_d, student * student_d));
  }
};

// The JSD at beta = 1/2 from one series in place of a logarithm and two: with u = expm1(-|d|) / 2 in [-1/2, 0], m is 1 + u
// times the larger probability, log(1 + u) = u + u^2 kappa(u), psi(u) = (1 + u) log(1 + u) - u = u^2 (1 + (1 + u) kappa(u)).
struct EvenMixture {
  // kappa fitted on [-1/2, 0] to 5e-9.
  static constexpr std::array<float, 10> kKappa{1.6124811561f,  2.2975909427f, 1.8241911928f,  0.5596312338f, 0.3055154552f,
                                                -0.1437135666f, 0.2018291095f, -0.2499269222f, 0.3333344539f, -0.4999999972f};
  Vec<float> term, student_d;  // 1/2 KL(p_T || m) + 1/2 KL(p_S || m); log p_S - log m

  explicit EvenMixture(const Entry<float>& entry) {
    const Vec<float> zero(0), half(0.5f), one(1), size = entry.d.abs();
    const PhiPair<float> phi_size = phi(size);
    const Vec<float> e = where(entry.near, phi_size.plus - size, entry.ratio - one);
    const Vec<float> u = half * e, square = u * u;
    Vec<float> kappa(kKappa[0]);
    for (size_t k = 1; k < kKappa.size(); ++k) kappa = fmadd(kappa, u, Vec<float>(kKappa[k]));
    const Vec<float> psi = square * fmadd(one + u, kappa, one);
    const Vec<float> gained = where(entry.near, entry.ratio * phi_size.minus, fmadd(entry.ratio, size, e).neg());
    term = larger(entry.student_p, entry.teacher_p) * fmadd(half, gained, psi.neg());
    student_d = (fmadd(square, kappa, u) + larger(entry.d, zero)).neg();
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace topd
