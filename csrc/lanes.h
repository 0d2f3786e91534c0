// What the sweeps need beside at::vec: loads of a row's last entries, and comparisons whose masks stay masks (at::vec turns
// AVX-512's into vectors and back).
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <limits>
#include <type_traits>
#include <utility>

namespace topd {
inline namespace CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// Loads `count` entries; missing lanes are -inf, an entry of probability 0 on both sides, which contributes nothing.
template <typename T>
inline Vec<T> load(const T* from, int64_t count) {
  if (count >= Vec<T>::size()) return Vec<T>::loadu(from);
  std::array<T, Vec<T>::size()> lanes;
  lanes.fill(-kInf<T>);
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return Vec<T>::loadu(lanes.data());
}

template <typename T>
inline void store(const Vec<T>& value, T* to, int64_t count) {
  if (count >= Vec<T>::size()) value.store(to);
  else value.store(to, static_cast<int>(count));
}

template <typename T>
inline T first_lane(const Vec<T>& value) {
  std::array<T, Vec<T>::size()> lanes;
  value.store(lanes.data());
  return lanes[0];
}

template <typename T>
inline T lane_sum(const Vec<T>& value) {
  return at::vec::vec_reduce_all<T>([](const Vec<T>& x, const Vec<T>& y) { return x + y; }, value);
}

template <typename T>
inline T lane_max(const Vec<T>& value) {
  return at::vec::vec_reduce_all<T>([](const Vec<T>& x, const Vec<T>& y) { return at::vec::maximum(x, y); }, value);
}

template <typename T>
inline T lane_min(const Vec<T>& value) {
  return at::vec::vec_reduce_all<T>([](const Vec<T>& x, const Vec<T>& y) { return at::vec::minimum(x, y); }, value);
}

// less(a, b) and at_most(a, b) are masks for where(mask, yes, no); larger and smaller return b where either is NaN.
#if defined(CPU_CAPABILITY_AVX512)

inline __mmask16 less(const Vec<float>& a, const Vec<float>& b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline __mmask16 at_most(const Vec<float>& a, const Vec<float>& b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Vec<float> where(__mmask16 mask, const Vec<float>& yes, const Vec<float>& no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline Vec<float> larger(const Vec<float>& a, const Vec<float>& b) { return _mm512_max_ps(a, b); }
inline Vec<float> smaller(const Vec<float>& a, const Vec<float>& b) { return _mm512_min_ps(a, b); }

inline __mmask8 less(const Vec<double>& a, const Vec<double>& b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
inline __mmask8 at_most(const Vec<double>& a, const Vec<double>& b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
inline Vec<double> where(__mmask8 mask, const Vec<double>& yes, const Vec<double>& no) { return _mm512_mask_blend_pd(mask, no, yes); }
inline Vec<double> larger(const Vec<double>& a, const Vec<double>& b) { return _mm512_max_pd(a, b); }
inline Vec<double> smaller(const Vec<double>& a, const Vec<double>& b) { return _mm512_min_pd(a, b); }

#else

template <typename T>
inline Vec<T> less(const Vec<T>& a, const Vec<T>& b) { return a < b; }
template <typename T>
inline Vec<T> at_most(const Vec<T>& a, const Vec<T>& b) { return a <= b; }
template <typename T>
inline Vec<T> where(const Vec<T>& mask, const Vec<T>& yes, const Vec<T>& no) { return Vec<T>::blendv(no, yes, mask); }

#if defined(CPU_CAPABILITY_AVX2)
inline Vec<float> larger(const Vec<float>& a, const Vec<float>& b) { return _mm256_max_ps(a, b); }
inline Vec<float> smaller(const Vec<float>& a, const Vec<float>& b) { return _mm256_min_ps(a, b); }
inline Vec<double> larger(const Vec<double>& a, const Vec<double>& b) { return _mm256_max_pd(a, b); }
inline Vec<double> smaller(const Vec<double>& a, const Vec<double>& b) { return _mm256_min_pd(a, b); }
#else
template <typename T>
inline Vec<T> larger(const Vec<T>& a, const Vec<T>& b) { return where(less(b, a), a, b); }
template <typename T>
inline Vec<T> smaller(const Vec<T>& a, const Vec<T>& b) { return where(less(a, b), a, b); }
#endif

#endif

template <typename T>
using Mask = decltype(less(std::declval<Vec<T>>(), std::declval<Vec<T>>()));

}  // namespace CPU_CAPABILITY
}  // namespace topd
