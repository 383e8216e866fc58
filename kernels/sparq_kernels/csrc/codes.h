// The four-bit index: reading its codes as quads of bytes, and making them.
//
// A run of GROUP positions of a component is GROUP / 2 bytes: byte j has the code of position j in its low bits, that of
// j + GROUP / 2 in its high bits.  Products need the codes of four components of one position side by side, which is
// what the processors' dot products of bytes take.
#pragma once

#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "simd.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace sparq {

constexpr int64_t RUN = GROUP / 2;           // bytes of a run
constexpr int LEVELS = 15;

// Four runs side by side: out[4 j + m] is byte j of run m.
SPARQ_INLINE void interleave_runs(const uint8_t* const (&runs)[4], uint8_t* out) {
#if defined(__AVX512BW__)
    // Unpacking works inside 16 bytes, so the words are first put where it leaves them in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < RUN; i += 64) {
        __m512i v[4];
        for (int m = 0; m < 4; m++) v[m] = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(runs[m] + i));
        __m512i low01 = _mm512_unpacklo_epi8(v[0], v[1]), high01 = _mm512_unpackhi_epi8(v[0], v[1]);
        __m512i low23 = _mm512_unpacklo_epi8(v[2], v[3]), high23 = _mm512_unpackhi_epi8(v[2], v[3]);
        _mm512_storeu_si512(out + 4 * i, _mm512_unpacklo_epi16(low01, low23));
        _mm512_storeu_si512(out + 4 * i + 64, _mm512_unpackhi_epi16(low01, low23));
        _mm512_storeu_si512(out + 4 * i + 128, _mm512_unpacklo_epi16(high01, high23));
        _mm512_storeu_si512(out + 4 * i + 192, _mm512_unpackhi_epi16(high01, high23));
    }
#elif defined(__AVX2__)
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int64_t i = 0; i < RUN; i += 32) {
        __m256i v[4];
        for (int m = 0; m < 4; m++)
            v[m] = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(runs[m] + i)), order);
        __m256i low01 = _mm256_unpacklo_epi8(v[0], v[1]), high01 = _mm256_unpackhi_epi8(v[0], v[1]);
        __m256i low23 = _mm256_unpacklo_epi8(v[2], v[3]), high23 = _mm256_unpackhi_epi8(v[2], v[3]);
        __m256i* to = reinterpret_cast<__m256i*>(out + 4 * i);
        _mm256_storeu_si256(to, _mm256_unpacklo_epi16(low01, low23));
        _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi16(low01, low23));
        _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi16(high01, high23));
        _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi16(high01, high23));
    }
#else
    for (int64_t i = 0; i < RUN; i++)
        for (int m = 0; m < 4; m++) out[4 * i + m] = runs[m][i];
#endif
}

// sum + the four products of each lane's codes, 0 .. 15, with the four signed bytes of `weights`.
SPARQ_INLINE Ints add_products(Ints sum, Ints codes, int32_t weights) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(codes),
                                                      _mm512_set1_epi32(weights)));
#elif defined(__AVX512BW__)
    __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(codes), _mm512_set1_epi32(weights));
    return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
        reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(codes), _mm256_set1_epi32(weights)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), _mm256_set1_epi32(weights));
    return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return reinterpret_cast<Ints>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(codes),
                                            vreinterpretq_s8_s32(vdupq_n_s32(weights))));
#else
    for (int m = 0; m < 4; m++)
        sum += ((codes >> (8 * m)) & 15) * static_cast<int32_t>(static_cast<int8_t>(weights >> (8 * m)));
    return sum;
#endif
}

// Least values and steps of the components that score; zeros behind them, up to whole vectors.
// ranges: [d, 2].  low, step: [padded_r].
template <class T>
inline void widen_ranges(const T* ranges, const int32_t* components, int64_t r, int64_t padded_r, float* low,
                         float* step) {
    T pairs[2 * (MAX_HEAD_DIM + W)];
    for (int64_t c = 0; c < r; c++) memcpy(pairs + 2 * c, ranges + 2 * components[c], 2 * sizeof(T));
    memset(static_cast<void*>(pairs + 2 * r), 0, 2 * (padded_r - r) * sizeof(T));
    for (int64_t c = 0; c < padded_r; c += W) {
        Floats a, b;
        load_pair(pairs + 2 * c, a, b);
        if constexpr (!std::is_same_v<T, BFloat16>) separate(a, b);
        store(low + c, a);
        store(step + c, b);
    }
}

// n elements to float32, in their order.
inline void widen(const float* in, int64_t n, float* out) { std::copy_n(in, n, out); }
inline void widen(const BFloat16* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = static_cast<uint32_t>(in[i].bits) << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}
inline void widen(const Float16* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += W) {
        Float16 padded[W] = {};
        memcpy(padded, in + i, std::min<int64_t>(W, n - i) * sizeof(Float16));
        float wide[W];
        store(wide, load(padded));
        std::copy_n(wide, std::min<int64_t>(W, n - i), out + i);
    }
}

// Query weights of one group of positions as signed bytes.  With w = query * step of a component, a logit is
//     sum of query * lo  +  sum of w * code.
// w is rounded to unit * n, |n| <= 127.  What that loses of w times the middle of the codes is added to the first sum:
// at most LEVELS / 2 * sum |w - unit * n| <= LEVELS / 4 * r * unit is lost of a logit, unit = max |w| / 127.
struct ByteWeights {
    float base, unit;
};

// For G queries.  queries: [G, padded_r], low, step: [padded_r], r values and zeros behind them, up to whole vectors.
template <int G>
inline void byte_weights(const float* queries, const float* low, const float* step, int64_t padded_r,
                         int8_t (*out)[MAX_HEAD_DIM + W], ByteWeights* of) {
    constexpr int N = G == 3 ? 4 : G;
    Floats sum[N], largest[N], lost[N];
    SPARQ_UNROLL for (int g = 0; g < N; g++) sum[g] = largest[g] = lost[g] = Floats{};
    for (int64_t c = 0; c < padded_r; c += W) {
        Floats l = load(low + c), s = load(step + c);
        SPARQ_UNROLL for (int g = 0; g < G; g++) {
            Floats q = load(queries + g * padded_r + c);
            sum[g] += q * l;
            largest[g] = max(absolute(q * s), largest[g]);
        }
    }
    Floats most = horizontal_maxima(largest), base = horizontal_sums(sum), unit = most / 127.f;
    Floats inverse = most > 0.f ? 127.f / most : Floats{};
    for (int64_t c = 0; c < padded_r; c += W) {
        typedef int8_t Bytes __attribute__((vector_size(W)));
        Floats s = load(step + c);
        SPARQ_UNROLL for (int g = 0; g < G; g++) {
            Floats w = load(queries + g * padded_r + c) * s, n = (w * inverse[g] + ROUNDER) - ROUNDER;
            lost[g] += w - n * unit[g];
            Bytes bytes = __builtin_convertvector(__builtin_convertvector(n, Ints), Bytes);
            memcpy(out[g] + c, &bytes, sizeof bytes);
        }
    }
    base += LEVELS * 0.5f * horizontal_sums(lost);
    for (int g = 0; g < G; g++) of[g] = {base[g], unit[g]};
}

// Runs of a later group of positions, fetched a few at a time while this one is worked on: all at once they are more
// cache lines than a processor keeps on their way, and it would wait.
struct RunsAhead {
    const uint8_t* codes;  // null: there is no such group
    const int32_t* components;
    int64_t r;

    SPARQ_INLINE void fetch(int64_t c) const {
        if (!codes || c >= r) return;
        const uint8_t* run = codes + components[c] * RUN;
        for (int64_t i = 0; i < RUN; i += 64) __builtin_prefetch(run + i);
    }
};

// x[g, j] = the logit of position j of a group of positions, for G queries whose bytes are weights[g][quads][4].
// The runs ahead are fetched meanwhile.
template <int G>
inline void coded_logits(const uint8_t* quads, int64_t count, const int8_t (*weights)[MAX_HEAD_DIM + W],
                         const ByteWeights* of, const RunsAhead& ahead, float* x) {
    constexpr int V = W == 8 ? 2 : 4;  // vectors of sums for each query: what the registers hold
    for (int64_t at = 0; at < RUN; at += V * W)
        for (int high = 0; high < 2; high++) {
            int64_t fetched = (at / (V * W) * 2 + high) * count;
            Ints sums[G][V] = {};
            for (int64_t q = 0; q < count; q++) {
                ahead.fetch(fetched + q);
                int32_t four[G];
                for (int g = 0; g < G; g++) memcpy(four + g, weights[g] + 4 * q, 4);
                for (int v = 0; v < V; v++) {
                    Bits codes;
                    memcpy(&codes, quads + 4 * (q * RUN + at + v * W), sizeof codes);
                    Ints nibbles = reinterpret_cast<Ints>((high ? codes >> 4 : codes) & 0x0f0f0f0fu);
                    for (int g = 0; g < G; g++) sums[g][v] = add_products(sums[g][v], nibbles, four[g]);
                }
            }
            for (int g = 0; g < G; g++)
                for (int v = 0; v < V; v++)
                    store(x + g * GROUP + high * RUN + at + v * W,
                          of[g].base + of[g].unit * __builtin_convertvector(sums[g][v], Floats));
        }
}

// W vectors of W words: word i of vector j changes places with word j of vector i.
SPARQ_INLINE void transpose(Bits (&v)[W]) {
    Bits mixed[W];
    SPARQ_UNROLL for (int round = 1; round < W; round *= 2) {
        SPARQ_UNROLL for (int i = 0; i < W / 2; i++) {
            mixed[2 * i] = as_bits(interleave_low(as_floats(v[i]), as_floats(v[i + W / 2])));
            mixed[2 * i + 1] = as_bits(interleave_high(as_floats(v[i]), as_floats(v[i + W / 2])));
        }
        SPARQ_UNROLL for (int i = 0; i < W; i++) v[i] = mixed[i];
    }
}

// The least and the largest of what is finite in each column.
template <int64_t PART>
void find_finite_ranges(const float (*wide)[PART], Floats* low, Floats* high) {
    for (int64_t v = 0; v < PART / W; v++) {
        low[v] = splat(INFINITE), high[v] = splat(-INFINITE);
        for (int64_t s = 0; s < GROUP; s++) {
            Floats x = load(&wide[s][v * W]);
            Ints finite = absolute(x) < INFINITE;  // false for NaN
            Floats least = finite ? x : splat(INFINITE), most = finite ? x : splat(-INFINITE);
            low[v] = least < low[v] ? least : low[v];
            high[v] = most > high[v] ? most : high[v];
        }
    }
}

// One group of positions of one KV head: GROUP rows of K, `stride` elements apart.
// codes: [d, RUN].  ranges: [d, 2].  more: the rows behind are the next to be coded, and are fetched meanwhile: a part
// of every row is no stream that the processor would follow by itself.
template <class T>
void encode_group(const T* key, int64_t stride, int64_t dim, uint8_t* codes, T* ranges, bool more = false) {
    constexpr int64_t PART = 32;  // components at a time, in the order of load_pair: column slot(i) has component i
    constexpr int64_t V = PART / W;
    alignas(64) float wide[GROUP][PART];  // fits the L1 cache
    for (int64_t begin = 0; begin < dim; begin += PART) {
        int64_t count = std::min(PART, dim - begin);
        for (int64_t at = 0; at < count * RUN; at += 64)  // a line is read before a part of it is written
            __builtin_prefetch(codes + begin * RUN + at, 1);
        Floats low[V], high[V], poison = {};
        for (int64_t v = 0; v < V; v++) low[v] = splat(INFINITE), high[v] = splat(-INFINITE);
        for (int64_t s = 0; s < GROUP; s++) {
            const T* row = key + s * stride + begin;
            if (more)
                for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + GROUP * stride + i);
            for (int64_t v = 0; v < V; v += 2) {
                Floats x[2] = {};
                if ((v + 2) * W <= count) load_pair(row + v * W, x[0], x[1]);
                else if (v * W < count) load_pair_part(row + v * W, count - v * W, x[0], x[1]);
                for (int h = 0; h < 2; h++) {
                    store(&wide[s][(v + h) * W], x[h]);
                    low[v + h] = x[h] < low[v + h] ? x[h] : low[v + h];
                    high[v + h] = x[h] > high[v + h] ? x[h] : high[v + h];
                    poison += x[h] * 0.f;  // NaN where one is not finite
                }
            }
        }
        if (std::isnan(horizontal_sum(poison))) find_finite_ranges<PART>(wide, low, high);
        float lo[PART] = {}, inverse[PART] = {};
        uint8_t* runs[PART] = {};  // of each column; null behind the last component
        for (int64_t i = 0; i < count; i++) {
            int64_t at = slot<T>(i);
            float least = low[at / W][at % W], most = high[at / W][at % W], step;
            bool any = least <= most;
            T* range = ranges + 2 * (begin + i);
            narrow(any ? least : 0.f, range);
            narrow(any ? (most - least) / LEVELS : 0.f, range + 1);
            widen(range, 1, lo + at);
            widen(range + 1, 1, &step);
            inverse[at] = step > 0 ? 1 / step : 0;
            runs[at] = codes + (begin + i) * RUN;
        }
        for (int64_t v = 0; v < V; v++) {
            Floats least = load(lo + v * W), per_step = load(inverse + v * W);
            for (int64_t j = 0; j < RUN; j += 4 * W) {
                Bits words[W];  // bytes j + 4 i ... j + 4 i + 3 of W runs
                for (int64_t i = 0; i < W; i++) {
                    Bits word = {};
                    SPARQ_UNROLL for (int half = 0; half < 8; half++) {
                        Floats n = (load(&wide[j + 4 * i + half / 2 + half % 2 * RUN][v * W]) - least) * per_step;
                        n = n > 0.f ? n : Floats{};  // NaN too
                        n = n < float(LEVELS) ? n : splat(LEVELS);
                        word |= (as_bits(n + ROUNDER) & 15u) << (4 * half);  // the nearest integer, ties to even
                    }
                    words[i] = word;
                }
                transpose(words);
                for (int64_t i = 0; i < W; i++)
                    if (runs[v * W + i]) memcpy(runs[v * W + i] + j, words + i, sizeof words[i]);
            }
        }
    }
}

}  // namespace sparq
