// Vectors of floats as wide as the target's registers, through the GCC/Clang vector extension, so the same source serves
// x86 and Arm.  Storage types are widened to float32 on load; all arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparq {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOWEST = std::numeric_limits<float>::lowest();

#define SPARQ_INLINE inline __attribute__((always_inline))
// Loops of constant length, unrolled early enough for their arrays of vectors to become registers.
#if defined(__clang__)
#define SPARQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SPARQ_UNROLL _Pragma("GCC unroll 16")
#endif

SPARQ_INLINE Floats splat(float x) { return x - Floats{}; }
SPARQ_INLINE Floats absolute(Floats x) { return x > 0.f ? x : -x; }
SPARQ_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

SPARQ_INLINE bool any(Ints lanes) {
    uint64_t part[W / 2], all = 0;
    memcpy(part, &lanes, sizeof lanes);
    for (int i = 0; i < W / 2; i++) all |= part[i];
    return all != 0;
}

SPARQ_INLINE Bits as_bits(Floats x) { Bits b; memcpy(&b, &x, sizeof b); return b; }
SPARQ_INLINE Floats as_floats(Bits b) { Floats x; memcpy(&x, &b, sizeof x); return x; }

SPARQ_INLINE Ints load_ints(const int32_t* p) { Ints v; memcpy(&v, p, sizeof v); return v; }
SPARQ_INLINE Floats load(const float* p) { Floats v; memcpy(&v, p, sizeof v); return v; }
SPARQ_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
template <int n>
SPARQ_INLINE void store_first(float* p, Floats v) { memcpy(p, &v, n * sizeof(float)); }

#if defined(__AVX512F__) || (defined(__AVX__) && defined(__F16C__))
// The one conversion by intrinsics: GCC 12 makes an instruction for each element of a vector of _Float16.
SPARQ_INLINE Floats load(const Float16* p) {
#if defined(__AVX512F__)
    __m256i h;
    memcpy(&h, p, sizeof h);
    __m512 x = _mm512_cvtph_ps(h);
#else
    __m128i h;
    memcpy(&h, p, sizeof h);
    __m256 x = _mm256_cvtph_ps(h);
#endif
    return reinterpret_cast<Floats>(x);
}
#elif defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
SPARQ_INLINE Floats load(const Float16* p) {
    typedef __fp16 Native __attribute__((vector_size(2 * W)));  // in C++, GCC 12 has no _Float16 for Arm
    Native h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Floats);
}
#else
// Shift exponent and mantissa into place and multiply by 2^112: right for subnormals too.  Inf and NaN need their
// exponent.
SPARQ_INLINE Floats load(const Float16* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    Bits b = __builtin_convertvector(h, Bits), sign = (b & 0x8000u) << 16, magnitude = (b & 0x7fffu) << 13;
    Bits finite = as_bits(as_floats(magnitude) * splat(0x1p112f));
    return as_floats(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SPARQ_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)
#else
#define SPARQ_SHUFFLE(a, b, index) __builtin_shuffle(a, b, Ints{(index)...})
#endif

template <int from, int... lane>
SPARQ_INLINE Floats interleave(Floats a, Floats b, std::integer_sequence<int, lane...>) {
    return SPARQ_SHUFFLE(a, b, lane % 2 * W + (lane + from) / 2);
}

template <int from, int... lane>
SPARQ_INLINE Floats every_second(Floats a, Floats b, std::integer_sequence<int, lane...>) {
    return SPARQ_SHUFFLE(a, b, 2 * lane + from);
}

template <int distance, int... lane>
SPARQ_INLINE Floats rotate(Floats v, std::integer_sequence<int, lane...>) {
    return SPARQ_SHUFFLE(v, v, (lane + distance) % W);
}

// The lanes a, b, a, b, ... of the lower or the upper halves.
using Lanes = std::make_integer_sequence<int, W>;
SPARQ_INLINE Floats interleave_low(Floats a, Floats b) { return interleave<0>(a, b, Lanes()); }
SPARQ_INLINE Floats interleave_high(Floats a, Floats b) { return interleave<W>(a, b, Lanes()); }

// Of two vectors in a row, the elements of even index into `a`, of odd index into `b`.
SPARQ_INLINE void separate(Floats& a, Floats& b) {
    Floats even = every_second<0>(a, b, Lanes());
    b = every_second<1>(a, b, Lanes());
    a = even;
}

// Loads of 2 W elements at a time.  bfloat16 is cheapest to widen where it lies: elements of even index into `a`, of
// odd index into `b`.  The other types come in their own order.  `store_pair` undoes it; `slot` says where element i of
// a row of pairs ends up when the two vectors are stored one after the other.
constexpr int64_t PAIR = 2 * W;

template <class T>
SPARQ_INLINE void load_pair(const T* p, Floats& a, Floats& b) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        Bits bits;
        memcpy(&bits, p, sizeof bits);
        a = as_floats(bits << 16);
        b = as_floats(bits & 0xffff0000u);
    } else {
        a = load(p);
        b = load(p + W);
    }
}

// The first n < 2 W elements, zeros behind them; nothing past them is read.
template <class T>
SPARQ_INLINE void load_pair_part(const T* p, int64_t n, Floats& a, Floats& b) {
    T padded[PAIR] = {};
    memcpy(padded, p, n * sizeof(T));
    load_pair(padded, a, b);
}

template <class T>
SPARQ_INLINE void store_pair(float* p, Floats a, Floats b) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        store(p, interleave_low(a, b));
        store(p + W, interleave_high(a, b));
    } else {
        store(p, a);
        store(p + W, b);
    }
}

template <class T>
SPARQ_INLINE int64_t slot(int64_t i) {
    if constexpr (!std::is_same_v<T, BFloat16>) return i;
    return i / PAIR * PAIR + i % 2 * W + i % PAIR / 2;
}

SPARQ_INLINE uint32_t float_bits(float x) { uint32_t b; memcpy(&b, &x, sizeof b); return b; }

// Round to nearest, ties to even, as torch does.
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
    uint32_t b = float_bits(x);
    out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}
inline void narrow(float x, Float16* out) {
    uint32_t b = float_bits(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    } else {  // subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low mantissa bits
        float shifted;
        memcpy(&shifted, &magnitude, sizeof shifted);
        half = float_bits(shifted + 0.5f) - 0x3f000000u;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

// Folding a vector onto itself leaves the result in every lane.
template <int distance>
SPARQ_INLINE Floats rotate(Floats v) { return rotate<distance>(v, Lanes()); }

// Lane i becomes all of v[i] joined, for N vectors, a power of two; the lanes repeat behind the N-th.  Every round halves
// the vectors and doubles the number of results in each; what is left of one result is N lanes apart.
template <int N, class Join>
SPARQ_INLINE Floats horizontal(Floats (&v)[N], Join join) {
    static_assert(N <= W && (N & (N - 1)) == 0);
    SPARQ_UNROLL for (int half = N / 2; half; half /= 2)
        SPARQ_UNROLL for (int i = 0; i < half; i++)
            v[i] = join(interleave_low(v[i], v[i + half]), interleave_high(v[i], v[i + half]));
    if constexpr (W / N > 8) v[0] = join(v[0], rotate<N * 8 % W>(v[0]));
    if constexpr (W / N > 4) v[0] = join(v[0], rotate<N * 4 % W>(v[0]));
    if constexpr (W / N > 2) v[0] = join(v[0], rotate<N * 2 % W>(v[0]));
    if constexpr (W / N > 1) v[0] = join(v[0], rotate<N % W>(v[0]));
    return v[0];
}

template <int N>
SPARQ_INLINE Floats horizontal_sums(Floats (&v)[N]) {
    return horizontal(v, [](Floats a, Floats b) { return a + b; });
}

template <int N>
SPARQ_INLINE Floats horizontal_maxima(Floats (&v)[N]) {
    return horizontal(v, [](Floats a, Floats b) { return max(a, b); });
}

SPARQ_INLINE float horizontal_sum(Floats v) {
    Floats all[1] = {v};
    return horizontal_sums(all)[0];
}

SPARQ_INLINE float horizontal_max(Floats v) {
    Floats all[1] = {v};
    return horizontal_maxima(all)[0];
}

constexpr float ROUNDER = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits

SPARQ_INLINE Floats round_to_int(Floats x) {
    Floats magnitude = absolute(x);
    return magnitude < 0x1p22f ? (x + ROUNDER) - ROUNDER : x;  // above that, x is its own integer (or Inf, or NaN)
}

SPARQ_INLINE float round_to_int(float x) { return round_to_int(splat(x))[0]; }

// 2^n for integers n in [-126, 127].
SPARQ_INLINE Floats power_of_two(Floats n) {
    return as_floats((as_bits(n + ROUNDER) - float_bits(ROUNDER) + 127u) << 23);
}

// The same for any n <= 127, and 0 where that is no normal number.
SPARQ_INLINE Floats power_of_two_or_zero(Floats n) { return n < -126.f ? Floats{} : power_of_two(n); }

// 2^f for |f| <= 1/2, within 1.6e-7 of it.
SPARQ_INLINE Floats exp2_fraction(Floats f) {
    Floats p = splat(1.3264727e-3f);
    p = p * f + 9.671513e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314698e-1f;
    return p * f + 1.f;
}

constexpr float DEEPEST = -125.f;  // powers of two below 2^DEEPEST times the reference count as 0

// 2^x / 2^reference for an integer reference no less than round(x).  The fraction of x alone decides the mantissa and
// the scaling is exact, so equal x give equal mantissas whatever the reference.  0 for -Inf, NaN for NaN and +Inf.
SPARQ_INLINE Floats exp2_scaled(Floats x, float reference) {
    Floats n = round_to_int(x), exponent = n - reference;
    Floats scaled = exp2_fraction(x - n) * power_of_two(exponent > DEEPEST ? exponent : splat(DEEPEST));
    return exponent < DEEPEST ? Floats{} : scaled;
}

// The same bits in fewer steps, where no x is NaN and |reference| < 2^21.
SPARQ_INLINE Floats exp2_scaled_fast(Floats x, float reference) {
    Floats shifted = x + ROUNDER, n = shifted - ROUNDER;
    Bits exponent = as_bits(shifted) - float_bits(reference + ROUNDER);
    Bits scaled = as_bits(exp2_fraction(x - n)) + (exponent << 23);
    return n < reference + DEEPEST ? Floats{} : as_floats(scaled);
}

SPARQ_INLINE Floats tanh(Floats x) {
    Floats magnitude = absolute(x), square = x * x;
    Floats t = exp2_scaled(magnitude * (-2.f * LOG2E), 0.f);
    Floats large = (1.f - t) / (1.f + t);
    Floats series = x + x * square * (-1.f / 3.f + square * (2.f / 15.f - square * (17.f / 315.f)));
    return magnitude < 0.125f ? series : (x < 0.f ? -large : large);
}

// Results too small for a normal number become 0 at once instead of through a slow path of the processor.
class FlushSubnormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
  public:
    FlushSubnormals() { _mm_setcsr(before | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
  public:
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | (1ull << 24)));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

}  // namespace sparq
