// Vec<T>: two registers of at::vec side by side, so that each step of a sweep has two independent chains to run. The math of a
// row is a few long chains of dependent instructions; with one register at a time the processor waits for most of them.
// Also the loads of a row's last entries, and comparisons whose masks stay masks (at::vec turns AVX-512's into vectors and
// back).
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
using Register = at::vec::Vectorized<T>;

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// less and at_most give masks for select(mask, yes, no); larger and smaller return b where either is NaN.
#if defined(CPU_CAPABILITY_AVX512)

inline __mmask16 less(const Register<float>& a, const Register<float>& b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline __mmask16 at_most(const Register<float>& a, const Register<float>& b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Register<float> select(__mmask16 mask, const Register<float>& yes, const Register<float>& no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}
inline Register<float> larger(const Register<float>& a, const Register<float>& b) { return _mm512_max_ps(a, b); }
inline Register<float> smaller(const Register<float>& a, const Register<float>& b) { return _mm512_min_ps(a, b); }

inline __mmask8 less(const Register<double>& a, const Register<double>& b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
inline __mmask8 at_most(const Register<double>& a, const Register<double>& b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
inline Register<double> select(__mmask8 mask, const Register<double>& yes, const Register<double>& no) {
  return _mm512_mask_blend_pd(mask, no, yes);
}
inline Register<double> larger(const Register<double>& a, const Register<double>& b) { return _mm512_max_pd(a, b); }
inline Register<double> smaller(const Register<double>& a, const Register<double>& b) { return _mm512_min_pd(a, b); }

#else

template <typename T>
inline Register<T> less(const Register<T>& a, const Register<T>& b) {
  return a < b;
}
template <typename T>
inline Register<T> at_most(const Register<T>& a, const Register<T>& b) {
  return a <= b;
}
template <typename T>
inline Register<T> select(const Register<T>& mask, const Register<T>& yes, const Register<T>& no) {
  return Register<T>::blendv(no, yes, mask);
}
#if defined(CPU_CAPABILITY_AVX2)
inline Register<float> larger(const Register<float>& a, const Register<float>& b) { return _mm256_max_ps(a, b); }
inline Register<float> smaller(const Register<float>& a, const Register<float>& b) { return _mm256_min_ps(a, b); }
inline Register<double> larger(const Register<double>& a, const Register<double>& b) { return _mm256_max_pd(a, b); }
inline Register<double> smaller(const Register<double>& a, const Register<double>& b) { return _mm256_min_pd(a, b); }
#else
template <typename T>
inline Register<T> larger(const Register<T>& a, const Register<T>& b) {
  return select(less(b, a), a, b);
}
template <typename T>
inline Register<T> smaller(const Register<T>& a, const Register<T>& b) {
  return select(less(a, b), a, b);
}
#endif

#endif

template <typename T>
struct Mask {
  decltype(less(std::declval<Register<T>>(), std::declval<Register<T>>())) low, high;
};

template <typename T>
struct Vec {
  Register<T> low, high;

  Vec() = default;
  Vec(T value) : low(value), high(value) {}
  Vec(const Register<T>& l, const Register<T>& h) : low(l), high(h) {}

  static constexpr int64_t half() { return Register<T>::size(); }
  static constexpr int64_t size() { return 2 * half(); }
  static Vec loadu(const T* from) { return {Register<T>::loadu(from), Register<T>::loadu(from + half())}; }
  void store(T* to) const { low.store(to), high.store(to + half()); }

  Vec operator+(const Vec& y) const { return {low + y.low, high + y.high}; }
  Vec operator-(const Vec& y) const { return {low - y.low, high - y.high}; }
  Vec operator*(const Vec& y) const { return {low * y.low, high * y.high}; }
  Vec operator/(const Vec& y) const { return {low / y.low, high / y.high}; }
  Vec neg() const { return {low.neg(), high.neg()}; }
  Vec abs() const { return {low.abs(), high.abs()}; }
  Vec round() const { return {low.round(), high.round()}; }
  Vec tanh() const { return {low.tanh(), high.tanh()}; }
};

template <typename T>
inline Vec<T> fmadd(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
  return {at::vec::fmadd(a.low, b.low, c.low), at::vec::fmadd(a.high, b.high, c.high)};
}
template <typename T>
inline Mask<T> less(const Vec<T>& a, const Vec<T>& b) {
  return {less(a.low, b.low), less(a.high, b.high)};
}
template <typename T>
inline Mask<T> at_most(const Vec<T>& a, const Vec<T>& b) {
  return {at_most(a.low, b.low), at_most(a.high, b.high)};
}
template <typename T>
inline Vec<T> where(const Mask<T>& mask, const Vec<T>& yes, const Vec<T>& no) {
  return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
}
template <typename T>
inline Vec<T> larger(const Vec<T>& a, const Vec<T>& b) {
  return {larger(a.low, b.low), larger(a.high, b.high)};
}
template <typename T>
inline Vec<T> smaller(const Vec<T>& a, const Vec<T>& b) {
  return {smaller(a.low, b.low), smaller(a.high, b.high)};
}

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
  if (count >= Vec<T>::size()) return value.store(to);
  std::array<T, Vec<T>::size()> lanes;
  value.store(lanes.data());
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Asks for a vector of entries that will be read later, so that memory works while the processor does.
template <typename T>
inline void fetch(const T* from) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < Vec<T>::size(); i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i, 1, 2);
#endif
}

template <typename T>
inline T first_lane(const Vec<T>& value) {
  std::array<T, Vec<T>::size()> lanes;
  value.store(lanes.data());
  return lanes[0];
}

template <typename T>
inline T lane_sum(const Vec<T>& value) {
  return at::vec::vec_reduce_all<T>([](const Register<T>& x, const Register<T>& y) { return x + y; }, value.low + value.high);
}
template <typename T>
inline T lane_max(const Vec<T>& value) {
  return at::vec::vec_reduce_all<T>([](const Register<T>& x, const Register<T>& y) { return at::vec::maximum(x, y); },
                                    larger(value.low, value.high));
}
template <typename T>
inline T lane_min(const Vec<T>& value) {
  return at::vec::vec_reduce_all<T>([](const Register<T>& x, const Register<T>& y) { return at::vec::minimum(x, y); },
                                    smaller(value.low, value.high));
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
