// Exact selection of the largest keys, ties to the lower index.
#pragma once

#include <algorithm>

#include "simd.h"

namespace sparq {

// How many of n keys are at least `threshold`.  The array is padded with INT32_MIN to a multiple of W.
inline int64_t count_at_least(const int32_t* keys, int64_t n, int32_t threshold) {
    Ints found = {};
    for (int64_t i = 0; i < n; i += W) found -= load_ints(keys + i) >= threshold;
    int64_t count = 0;
    for (int lane = 0; lane < W; lane++) count += found[lane];
    return count;
}

inline void pad_keys(int32_t* keys, int64_t n) {
    for (int64_t i = n; i % W; i++) keys[i] = std::numeric_limits<int32_t>::min();
}

// The `wanted`-th largest of n padded keys, 1 <= wanted <= n: bisection on the key's value.
inline int32_t kth_largest(const int32_t* keys, int64_t n, int64_t wanted) {
    auto [least, most] = std::minmax_element(keys, keys + n);
    int64_t low = *least, high = *most;  // count_at_least(low) >= wanted > count_at_least(high + 1)
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
