// Exact selection of the largest keys, ties to the lower index.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace sparq {

// How many of n keys are at least `threshold`.  The array is padded with INT32_MIN to a multiple of W.
SPARQ_INLINE int64_t count_at_least(const int32_t* keys, int64_t n, int32_t threshold) {
    Ints found = {};
    for (int64_t i = 0; i < n; i += W) found -= load_ints(keys + i) >= threshold;
    int32_t lane[W];
    memcpy(lane, &found, sizeof found);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

inline void pad_keys(int32_t* keys, int64_t n) {
    for (int64_t i = n; i % W; i++) keys[i] = std::numeric_limits<int32_t>::min();
}

// A key that at least `wanted` of n padded keys reach, 1 <= wanted <= n, and at most `spare` more of them, unless they
// are ties with the wanted-th largest: bisection on the key's value.
inline int32_t threshold_of(const int32_t* keys, int64_t n, int64_t wanted, int64_t spare) {
    int64_t low = keys[0], high = keys[0];  // count_at_least(low) >= wanted > count_at_least(high + 1)
    if (n >= W) {
        Ints least = load_ints(keys), most = least;
        for (int64_t i = W; i + W <= n; i += W) {
            Ints key = load_ints(keys + i);
            least = key < least ? key : least;
            most = key > most ? key : most;
        }
        for (int lane = 0; lane < W; lane++) {
            low = std::min<int64_t>(low, least[lane]);
            high = std::max<int64_t>(high, most[lane]);
        }
    }
    for (int64_t i = n / W * W; i < n; i++) {
        low = std::min<int64_t>(low, keys[i]);
        high = std::max<int64_t>(high, keys[i]);
    }
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        int64_t count = count_at_least(keys, n, static_cast<int32_t>(middle));
        if (count < wanted) {
            high = middle - 1;
        } else {
            low = middle;
            if (count <= wanted + spare) break;
        }
    }
    return static_cast<int32_t>(low);
}

// Appends to `indices` the first + i, ascending, with keys[i] >= threshold, and these keys to `kept`, which may be
// `keys`; both have room for W more.  Returns how many.
SPARQ_INLINE int64_t keep_at_least(const int32_t* keys, int64_t n, int32_t threshold, int64_t first, int32_t* indices,
                                   int32_t* kept) {
    int64_t count = 0, i = 0;
#if defined(__AVX512F__)
    __m512i index = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                     _mm512_set1_epi32(static_cast<int32_t>(first)));
    for (; i + W <= n; i += W) {
        __m512i key = _mm512_loadu_si512(keys + i);
        __mmask16 large = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(threshold));
        _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(large, index));
        _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(large, key));
        count += __builtin_popcount(large);
        index = _mm512_add_epi32(index, _mm512_set1_epi32(W));
    }
#endif
    for (; i < n; i++) {
        int32_t key;
        memcpy(&key, keys + i, sizeof key);  // the keys may be the bits of floats
        indices[count] = static_cast<int32_t>(first + i);
        kept[count] = key;
        count += key >= threshold;
    }
    return count;
}

// Indices of the `wanted` largest of n keys in ascending order; the keys are lost.  `keys` and `out` have room for W
// more.
inline void select_largest(int32_t* keys, int64_t n, int64_t wanted, int32_t* out) {
    if (wanted <= 0) return;
    pad_keys(keys, n);
    int32_t threshold = threshold_of(keys, n, wanted, 0);
    if (count_at_least(keys, n, threshold) == wanted) {
        keep_at_least(keys, n, threshold, 0, out, keys);
        return;
    }
    int64_t above = threshold == std::numeric_limits<int32_t>::max() ? 0 : count_at_least(keys, n, threshold + 1);
    int64_t ties = wanted - above, taken = 0;
    for (int64_t i = 0; i < n && taken < wanted; i++) {
        bool tie = keys[i] == threshold && ties > 0;
        ties -= tie;
        out[taken] = static_cast<int32_t>(i);
        taken += tie || keys[i] > threshold;
    }
}

// The fewest of n keys, bits of scores of at least 0, whose scores add up to `mass`: 0 where that is nothing, n + 1 where
// all are too few, or `mass` is no number.  The keys are padded here.
inline int64_t needed_for(int32_t* keys, int64_t n, float mass) {
    if (mass <= 0 && std::isfinite(mass)) return 0;
    pad_keys(keys, n);
    auto sum_at_least = [&](int32_t threshold) {
        Floats sum = {};
        for (int64_t i = 0; i < n; i += W) {
            Ints key = load_ints(keys + i);
            sum += key >= threshold ? reinterpret_cast<Floats>(key) : Floats{};
        }
        return horizontal_sum(sum);
    };
    if (n == 0 || !(sum_at_least(0) >= mass)) return n + 1;
    int64_t low = 0, high = *std::max_element(keys, keys + n);  // sum_at_least(low) >= mass > sum_at_least(high + 1)
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (sum_at_least(static_cast<int32_t>(middle)) < mass) high = middle - 1;
        else low = middle;
    }
    int32_t last = static_cast<int32_t>(low);
    int64_t above = count_at_least(keys, n, last + 1), ties = count_at_least(keys, n, last) - above;
    float score;
    memcpy(&score, &last, sizeof score);
    float rest = (mass - sum_at_least(last + 1)) / score;
    return above + std::clamp<int64_t>(static_cast<int64_t>(std::ceil(std::min(rest, float(ties)))), 1, ties);
}

}  // namespace sparq
