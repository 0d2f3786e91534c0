// The divergences, entry by entry.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "../shared/row_math.h"

namespace topd {
inline namespace CPU_CAPABILITY {
namespace divergence {

// kEvenJSD is the JSD at beta = 1/2, in float.
enum class Kind { kForwardKL, kReverseKL, kJSD, kEvenJSD, kSkewKL, kSkewReverseKL, kTotalVariation };

inline Kind kind_of(c10::string_view name) {
  if (name == "forward_kl") return Kind::kForwardKL;
  if (name == "reverse_kl") return Kind::kReverseKL;
  if (name == "jsd") return Kind::kJSD;
  if (name == "skew_kl") return Kind::kSkewKL;
  if (name == "skew_reverse_kl") return Kind::kSkewReverseKL;
  if (name == "total_variation") return Kind::kTotalVariation;
  TORCH_CHECK_VALUE(false, "unknown divergence '", name, "'");
}

// What an entry adds to the value, and what its gradient is made of: with E the row's sum of `centre` and of p_S A, the forward
// KL's gradient is A - p_S E, and that of any other divergence p_S (A - E) times a constant.
template <typename T>
struct Term {
  Vec<T> value, a, centre;
};

// `complement` is 1 - parameter, taken in double: near 1 the difference of floats has no digits.
template <typename T, Kind kind>
inline Term<T> term_of(const Entry<T>& entry, T parameter, T complement) {
  const Vec<T> zero(0);
  if constexpr (kind == Kind::kForwardKL) {
    const Vec<T> gap = entry.gap();
    if (parameter == kInf<T>) return {entry.forward_term(), gap, zero};
    const Vec<T> clip(parameter), e = where(at_most(Vec<T>(kFar<T>), entry.d), Vec<T>(kFar<T>), entry.teacher_p * entry.d);
    const Mask<T> clipped = less(clip, e);
    return {where(clipped, gap + clip, entry.forward_term()), where(clipped, entry.student_p, gap),
            where(clipped, entry.teacher_p, zero)};
  } else if constexpr (kind == Kind::kReverseKL) {
    return {entry.reverse_term(), entry.d.neg(), zero};
  } else if constexpr (kind == Kind::kTotalVariation) {
    const Vec<T> gap = entry.gap(), half(0.5);
    return {half * gap.abs(), where(less(zero, gap), half, where(less(gap, zero), half.neg(), zero)), zero};
  } else if constexpr (kind == Kind::kJSD) {
    const Mixture<T> mix(entry, parameter, complement);
    return {mix.jsd_term(entry, parameter, complement), Vec<T>(complement) * mix.student_d, zero};
  } else if constexpr (kind == Kind::kEvenJSD) {
    const EvenMixture mix(entry);
    return {mix.term, Vec<T>(0.5f) * mix.student_d, zero};
  } else if constexpr (kind == Kind::kSkewKL) {
    const Mixture<T> mix(entry, parameter, complement);
    return {kl_term(entry.teacher_p, mix.m, mix.teacher_d), Vec<T>(-complement) * mix.teacher_excess, zero};
  } else {
    const Mixture<T> mix(entry, complement, parameter);
    return {kl_term(entry.student_p, mix.m, mix.student_d), mix.student_d - Vec<T>(parameter) * mix.student_excess, zero};
  }
}

}  // namespace divergence
}  // namespace CPU_CAPABILITY
}  // namespace topd
