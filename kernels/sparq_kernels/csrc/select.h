// Exact selection of the largest keys, ties to the lower index.
#pragma once

#include <algorithm>

#include "simd.h"

namespace sparq {

// How many of n keys are at least `threshold`.  The array is padded with INT32_MIN to a multiple of W.
inline int64_t count_at_least(const int32_t* keys, int64_t n, int32_t threshold) {
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

// The `wanted`-th largest of n padded keys, 1 <= wanted <= n: bisection on the key's value.
inline int32_t kth_largest(const int32_t* keys, int64_t n, int64_t wanted) {
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
        if (count_at_least(keys, n, static_cast<int32_t>(middle)) >= wanted) low = middle;
        else high = middle - 1;
    }
    return static_cast<int32_t>(low);
}

// Indices of the `wanted` largest of n keys in ascending order.  `keys` has room for padding.
inline void select_largest(int32_t* keys, int64_t n, int64_t wanted, int32_t* out) {
    if (wanted <= 0) return;
    pad_keys(keys, n);
    int32_t threshold = kth_largest(keys, n, wanted);
    int64_t above = threshold == std::numeric_limits<int32_t>::max() ? 0 : count_at_least(keys, n, threshold + 1);
    int64_t ties = wanted - above, taken = 0;
    for (int64_t i = 0; i < n && taken < wanted; i++) {
        bool tie = keys[i] == threshold && ties > 0;
        ties -= tie;
        out[taken] = static_cast<int32_t>(i);
        taken += tie || keys[i] > threshold;
    }
}

}  // namespace sparq
