// What Python hands over, already checked.  cpu.py mirrors this struct field by field.
#pragma once

#include <cstdint>

namespace sparq {

constexpr int64_t BLOCK = 2048;        // layout.BLOCK
constexpr int64_t GROUP = 256;         // layout.GROUP
constexpr int64_t MIN_PAGE = 64;       // layout.MIN_PAGE
constexpr int64_t MAX_HEAD_DIM = 512;  // MAX_HEAD_DIM of arguments.py

struct Arguments {
    const void* query;           // [B, Hq, Q, d]
    const void* key;             // [B, Hkv, S, d]
    const void* key_components;  // [B, Hkv, blocks, d, BLOCK], or codes [B, Hkv, groups, d, GROUP / 2]
    const void* value;           // [B, Hkv, S, d]
    const float* value_sum;      // [B, Hkv, d]
    const void* key_ranges;      // [B, Hkv, groups, d, 2], or null: key_components are no codes
    const int32_t* block_table;  // [B, pages in a row], or null; with it the above are [P, Hkv, ...], a page for a row
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
    int64_t page;   // positions of a page; BLOCK without a table
    int64_t pages;  // P
    // In elements.
    int64_t query_batch, query_head, query_position;
    int64_t key_batch, key_head, key_position;  // _batch: from page to page where there is a table
    int64_t components_batch, components_head, components_block, components_run;  // the last two not of codes
    int64_t value_batch, value_head, value_position;
    int64_t sum_batch, sum_head;
    int64_t ranges_batch, ranges_head;
    int64_t table_batch;
    int64_t length_batch, start_batch, mask_batch;

    int64_t dtype;      // 0 float32, 1 bfloat16, 2 float16
    int64_t r, k;
    int64_t k_divisor;  // 0: none
    int64_t local;      // -1: a quarter of the budget
    int64_t k_max;
    int64_t k_min;
    int64_t dense_below;
    double scale;
    double softcap;     // 0: none
    double mean_from;   // infinite: no mean value
    double mass;        // 0: all of the budget is used
};

// For the making of codes.
struct EncodeArguments {
    const void* key;  // [B, Hkv, S, d]
    void* codes;      // [B, Hkv, groups, d, GROUP / 2]
    void* ranges;     // [B, Hkv, groups, d, 2]
    int64_t threads;
    int64_t batch, num_kv_heads, head_dim;
    int64_t key_batch, key_head, key_position;
    int64_t codes_batch, codes_head;
    int64_t ranges_batch, ranges_head;
    int64_t first, last;  // groups [first, last)
    int64_t dtype;
};

// For tokens into pages.
struct SlotArguments {
    void* key;             // [P, Hkv, N, d]
    void* value;           // [P, Hkv, N, d]
    void* key_components;  // [P, Hkv, 1, d, N], or codes [P, Hkv, N / GROUP, d, GROUP / 2]
    float* value_sum;      // [P, Hkv, d]
    void* key_ranges;      // [P, Hkv, N / GROUP, d, 2] or null
    const void* new_key;   // [T, Hkv, d]
    const void* new_value;
    const int64_t* slots;  // [T]
    int64_t threads;
    int64_t tokens, pages, num_kv_heads, page, head_dim;
    int64_t key_page, key_head, key_position;
    int64_t value_page, value_head, value_position;
    int64_t components_page, components_head, components_run;  // the last not of codes
    int64_t sum_page, sum_head;
    int64_t ranges_page, ranges_head;
    int64_t new_key_token, new_key_head, new_key_component;
    int64_t new_value_token, new_value_head, new_value_component;
    int64_t slots_token;
    int64_t dtype;
};

}  // namespace sparq
