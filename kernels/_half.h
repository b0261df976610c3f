// Shared by the CPU kernels: instruction sets, and half precision without compiler support.

#pragma once

#include <cstdint>
#include <cstring>

#include "_compiler.h"

// Compile a function for each of these instruction sets; the loader chooses one.
#if defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

enum Type { F32, F64, BF16, F16 };  // DTYPE_CODES of operators.py

struct BF16x {
  uint16_t bits;
};
struct F16x {
  uint16_t bits;
};

INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class R> INLINE R load(const R *p, int64_t i) { return p[i]; }
template <class R> INLINE R load(const BF16x *p, int64_t i) { return bits_to_float(uint32_t(p[i].bits) << 16); }
template <class R> INLINE R load(const F16x *p, int64_t i) {
  const uint32_t h = p[i].bits, sign = (h & 0x8000u) << 16, body = h & 0x7fffu;
  // After the shift the exponent is 112 too small; the product corrects it, for subnormal numbers too.
  const uint32_t finite = float_to_bits(bits_to_float(body << 13) * 0x1p112f);
  return bits_to_float(sign | (body >= 0x7c00u ? (body << 13) | 0x7f800000u : finite));
}

template <class R> INLINE void store(R *p, int64_t i, R x) { p[i] = x; }
INLINE void store(BF16x *p, int64_t i, float x) {  // to nearest, ties to even
  const uint32_t b = float_to_bits(x);
  p[i].bits = uint16_t(x != x ? 0x7fc0u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
INLINE void store(F16x *p, int64_t i, float x) {  // to nearest, ties to even
  const uint32_t b = float_to_bits(x), sign = (b >> 16) & 0x8000u, body = b & 0x7fffffffu;
  // Below 2^-14 half floats are multiples of 2^-24: adding 0.5 rounds to such a multiple.
  const uint32_t tiny = float_to_bits(bits_to_float(body) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13;
  const uint32_t finite = body >= 0x477ff000u ? 0x7c00u : (body < 0x38800000u ? tiny : normal);
  p[i].bits = uint16_t(sign | (body > 0x7f800000u ? 0x7e00u : finite));
}
