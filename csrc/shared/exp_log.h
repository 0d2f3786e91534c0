// exp and log of float vectors, inline: a call into SLEEF spills every vector register around it. Both stay within 2 ulp
// over their range (tests/ops/test_divergence_rows.py). double uses SLEEF.
#pragma once

#include <array>

#include "lanes.h"

namespace topd {
inline namespace CPU_CAPABILITY {

inline Vec<double> exp(const Vec<double>& x) { return {x.low.exp(), x.high.exp()}; }
inline Vec<double> log_share(const Vec<double>& y, const Vec<double>& excess, const Mask<double>& mild) {
  const Vec<double> far{y.low.log(), y.high.log()}, close{excess.low.log1p(), excess.high.log1p()};
  return where(mild, close, far);
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

// x 2^n for integral n in [-160, 1]; underflows gradually.
inline Register<float> scale_by_power(const Register<float>& x, const Register<float>& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(x, n);
#else
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const auto power = [&](__m256i k) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, bias), 23)); };
  return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
#endif
}

// Splits positive normal y into m 2^n with m in [sqrt(1/2), sqrt(2)).
template <typename V>
struct Split {
  V mantissa, exponent;
};
inline Split<Register<float>> split(const Register<float>& y) {
#if defined(CPU_CAPABILITY_AVX512)
  using Ints = __m512i;
  const Ints offset = _mm512_sub_epi32(_mm512_castps_si512(y), _mm512_set1_epi32(0x3f3504f3));
  const Ints n = _mm512_srai_epi32(offset, 23);
  const Ints m = _mm512_sub_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(n, 23));
  return {_mm512_castsi512_ps(m), _mm512_cvtepi32_ps(n)};
#else
  using Ints = __m256i;
  const Ints offset = _mm256_sub_epi32(_mm256_castps_si256(y), _mm256_set1_epi32(0x3f3504f3));
  const Ints n = _mm256_srai_epi32(offset, 23);
  const Ints m = _mm256_sub_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(n, 23));
  return {_mm256_castsi256_ps(m), _mm256_cvtepi32_ps(n)};
#endif
}

inline Vec<float> scale_by_power(const Vec<float>& x, const Vec<float>& n) {
  return {scale_by_power(x.low, n.low), scale_by_power(x.high, n.high)};
}
inline Split<Vec<float>> split(const Vec<float>& y) {
  const auto low = split(y.low), high = split(y.high);
  return {{low.mantissa, high.mantissa}, {low.exponent, high.exponent}};
}

constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// exp(x) for x <= 88; 0 at -inf, NaN at NaN. Range reduction by ln 2 in two parts, then
// 1 + r + r^2 Q(r) with Q fitted on |r| <= ln 2 / 2 (error 1e-8).
inline Vec<float> exp(const Vec<float>& x) {
  const Vec<float> bounded = larger(Vec<float>(-110.0f), x);
  const Vec<float> n = (bounded * Vec<float>(1.44269504088896341f)).round();
  Vec<float> r = fmadd(n, Vec<float>(-kLn2High), bounded);
  r = fmadd(n, Vec<float>(-kLn2Low), r);
  constexpr std::array<float, 4> c{0.008363192901f, 0.041666463017f, 0.166665762663f, 0.5f};
  Vec<float> tail(0.001393366954f);
  for (const float each : c) tail = fmadd(tail, r, Vec<float>(each));
  return scale_by_power(Vec<float>(1.0f) + fmadd(tail * r, r, r), n);
}

// log(y) of a share y in (0, 1]; where `mild`, log(1 + excess), excess in [-1/2, 0] and y = 1 + excess rounded: what that
// dropped is added as dropped / y, with 1 - excess for 1 / y. The logarithm is a polynomial fitted to
// (log(1 + f) - f + f^2 / 2) / f^3 over the mantissas (error 8e-10 of it).
inline Vec<float> log_share(const Vec<float>& y, const Vec<float>& excess, const Mask<float>& mild) {
  const Vec<float> one(1.0f);
  const Vec<float> dropped = where(mild, (excess - (y - one)) * (one - excess), Vec<float>(0.0f));
  const auto [m, n] = split(y);
  const Vec<float> f = m - one, square = f * f;
  constexpr std::array<float, 8> c{-0.117089614f, 0.118826263f, -0.123991080f, 0.142194271f,
                                   -0.166684017f, 0.200021446f, -0.250000030f, 0.333333135f};
  Vec<float> series(0.067972891f);
  for (const float each : c) series = fmadd(series, f, Vec<float>(each));
  const Vec<float> log_m = f + fmadd(series * f, square, Vec<float>(-0.5f) * square);
  return fmadd(n, Vec<float>(kLn2High), fmadd(n, Vec<float>(kLn2Low), log_m + dropped));
}

#else

inline Vec<float> exp(const Vec<float>& x) { return {x.low.exp(), x.high.exp()}; }
inline Vec<float> log_share(const Vec<float>& y, const Vec<float>& excess, const Mask<float>& mild) {
  const Vec<float> far{y.low.log(), y.high.log()}, close{excess.low.log1p(), excess.high.log1p()};
  return where(mild, close, far);
}

#endif

}  // namespace CPU_CAPABILITY
}  // namespace topd
