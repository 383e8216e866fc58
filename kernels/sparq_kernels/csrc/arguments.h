// What Python hands over, already checked.  cpu.py mirrors this struct field by field.
#pragma once

#include <cstdint>

namespace sparq {

constexpr int64_t BLOCK = 2048;        // layout.BLOCK
constexpr int64_t GROUP = 256;         // layout.GROUP
constexpr int64_t MAX_HEAD_DIM = 512;  // MAX_HEAD_DIM of arguments.py

struct Arguments {
    const void* query;           // [B, Hq, Q, d]
    const void* key;             // [B, Hkv, S, d]
    const void* key_components;  // [B, Hkv, blocks, d, BLOCK], or codes [B, Hkv, blocks, d, BLOCK / 2]
    const void* value;           // [B, Hkv, S, d]
    const float* value_sum;      // [B, Hkv, d]
    const void* key_ranges;      // [B, Hkv, groups, d, 2], or null: key_components are no codes
    const int64_t* length;       // [B]
    const int64_t* start;        // [B] or null
    const uint8_t* mask;         // [B, S] or null
    void* output;                // [B, Hq, Q, d], contiguous
    float* alpha;                // [B, Hq, Q], contiguous
    int64_t* positions;          // [B, Hkv, Q, k_max], contiguous, or null
    float* lse;                  // [B, Hq, Q], contiguous
    int32_t* read;               // [B, Hkv, Q], contiguous
    int64_t threads;

    int64_t batch, num_kv_heads, group, query_length, head_dim, cached;
    // In elements.
    int64_t query_batch, query_head, query_position;
    int64_t key_batch, key_head, key_position;
    int64_t components_batch, components_head, components_block;
    int64_t value_batch, value_head, value_position;
    int64_t sum_batch, sum_head;
    int64_t ranges_batch, ranges_head;
    int64_t length_batch, start_batch, mask_batch;

    int64_t dtype;      // 0 float32, 1 bfloat16, 2 float16
    int64_t r, k;
    int64_t k_divisor;  // 0: none
    int64_t local;      // -1: a quarter of the budget
    int64_t k_max;
    int64_t k_min;
    double scale;
    double softcap;     // 0: none
    double mean_from;   // infinite: no mean value
    double mass;        // 0: all of the budget is used
};

// For the making of codes.
struct EncodeArguments {
    const void* key;  // [B, Hkv, S, d]
    void* codes;      // [B, Hkv, blocks, d, BLOCK / 2]
    void* ranges;     // [B, Hkv, groups, d, 2]
    int64_t threads;
    int64_t batch, num_kv_heads, head_dim;
    int64_t key_batch, key_head, key_position;
    int64_t codes_batch, codes_head, codes_block;
    int64_t ranges_batch, ranges_head;
    int64_t first, last;  // groups [first, last)
    int64_t dtype;
};

}  // namespace sparq
