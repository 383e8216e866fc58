// One SparQ decode step (arXiv 2312.04985, algorithm 1) for every batch row and KV head.
//
// Phases, each a function over a range so that work can be split over positions as well as over heads:
//   prepare   top-r components of the group's summed |q|, queries scaled for scoring in base 2
//   score     per block of 256 positions: logits from the r component runs, turned into 2^x at once while the next block's runs
//             are on their way; each block keeps its own integer reference exponent and sum
//   combine   the group's summed softmax per position, and the maximum of every 16th position of a block
//   select    the wanted-th largest of those maxima bounds the wanted-th largest score from below, so only positions at least
//             that good compete; the local window is appended
//   attend    exact attention over chunks of the chosen rows
//   merge     chunks joined, alpha, blend with the mean value
// With many heads one task does all phases of a head, so that its scratch stays in the core's cache.  With few, each phase is
// split over blocks or chunks and a barrier follows.  Results do not depend on the split or the number of threads: block and chunk
// boundaries are fixed, and references are integers, so rescaling is exact and equal logits give equal scores anywhere.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "arguments.h"
#include "select.h"
#include "simd.h"

#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);  // the one function needed: omp.h is not everywhere that OpenMP is
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparq {
namespace {

constexpr int LANES = 16;            // maxima kept per block: one for every 16th position
constexpr int64_t CHUNK = 128;       // chosen positions per attend task
constexpr int64_t LINE = 64;         // bytes
constexpr int64_t ROWS_AHEAD = 8;    // rows between a prefetch and its use
constexpr float FAINTEST = 0x1p-100f;  // scores below count as 0: the same for a position whatever its block's reference
constexpr float EXCLUDED = -1;       // score of a position that does not compete; scores are at least 0

// Memory that grows, is reused between calls, and is never initialised.
class Arena {
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    size_t capacity = 0;

  public:
    char* reserve(size_t bytes) {
        if (bytes > capacity) {
            constexpr size_t page = size_t(2) << 20;
            size_t rounded = (std::max(bytes, capacity + capacity / 2) + page - 1) / page * page;
            memory.reset();
            capacity = 0;
            void* p = nullptr;
            if (posix_memalign(&p, page, rounded)) throw std::bad_alloc();
#if defined(__linux__)
            madvise(p, rounded, MADV_HUGEPAGE);
#endif
            memory.reset(static_cast<char*>(p));
            capacity = rounded;
        }
        return memory.get();
    }
};

// Lays arrays out one after the other, each on its own cache lines; with no base it only measures.
struct Layout {
    char* base;
    size_t used = 0;

    template <class T>
    void place(T*& array, size_t count) {
        array = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (count * sizeof(T) + LINE - 1) / LINE * LINE;
    }
};

struct Row {
    int64_t first = 0, end = 0;    // valid positions lie in [first, end)
    int64_t n = 0;                 // how many of them are valid
    int64_t budget = 0;            // positions attended
    int64_t window = 0;            // newest valid positions forced in ...
    int64_t window_begin = 0;      // ... all at or behind this one
    const uint8_t* mask = nullptr;

    bool everything() const { return budget == n; }
};

// Everything a head needs between its phases.  Positions are relative to the first block that holds a valid one.
struct Scratch {
    float* scored_queries;   // [components, group tile] per tile of the group
    float* queries;          // [G, d padded], times scale (and log2 e without softcap)
    int32_t* components;     // [r]
    float* weights;          // [G, positions]: 2^(x - reference)
    float* reference;        // [G, blocks]
    float* sum;              // [G, blocks]
    float* block_weight;     // [G, blocks]: 2^(reference - maximum) / z
    float* score;            // [positions]
    float* maxima;           // [blocks, LANES]
    int32_t* keys;           // [positions + W]
    int32_t* candidates;     // [positions + W]
    int32_t* picks;          // [k_max + W]
    int32_t* chosen;         // [k_max]
    float* row_weights;      // [chunks, G, CHUNK]: softmax over a chunk's rows, not normalised
    float* partial;          // [chunks, G, d padded]
    float* partial_max;      // [chunks, G]
    float* partial_sum;      // [chunks, G]

    size_t place(char* base, const Arguments& a, int64_t blocks, int64_t padded_dim) {
        Layout layout{base};
        int64_t positions = blocks * BLOCK, chunks = (a.k_max + CHUNK - 1) / CHUNK;
        layout.place(scored_queries, a.r * a.group);
        layout.place(queries, a.group * padded_dim);
        layout.place(components, a.head_dim + W);
        layout.place(weights, a.group * positions);
        layout.place(reference, a.group * blocks);
        layout.place(sum, a.group * blocks);
        layout.place(block_weight, a.group * blocks);
        layout.place(score, positions);
        layout.place(maxima, blocks * LANES);
        layout.place(keys, positions + W);
        layout.place(candidates, positions + W);
        layout.place(picks, positions + W);
        layout.place(chosen, a.k_max);
        layout.place(row_weights, chunks * a.group * CHUNK);
        layout.place(partial, chunks * a.group * padded_dim);
        layout.place(partial_max, chunks * a.group);
        layout.place(partial_sum, chunks * a.group);
        return layout.used;
    }
};

Row make_row(const Arguments& a, int64_t b) {
    Row row;
    row.end = std::clamp<int64_t>(a.length[b * a.length_batch], 0, a.cached);
    row.first = a.start ? std::clamp<int64_t>(a.start[b * a.start_batch], 0, row.end) : 0;
    row.n = row.end - row.first;
    if (a.mask) {
        row.mask = a.mask + b * a.mask_batch;
        row.n = 0;
        for (int64_t s = row.first; s < row.end; s++) row.n += row.mask[s] != 0;
    }
    row.budget = std::min(row.n, std::max(a.k, a.k_divisor ? row.n / a.k_divisor : 0));
    row.window = a.local < 0 ? row.budget / 4 : std::min(a.local, row.budget);
    row.window_begin = row.end - row.window;
    if (row.mask) {
        row.window_begin = row.end;
        for (int64_t found = 0; found < row.window; found += row.mask[row.window_begin] != 0) row.window_begin--;
    }
    return row;
}

// Which lanes of a block lie in [first, end) and are allowed by the mask: -1 or 0 each.  Returns how many do.
int64_t block_lanes(const Row& row, int64_t block, int64_t end, int32_t* keep) {
    int64_t count = 0;
    for (int64_t i = 0; i < BLOCK; i++) {
        int64_t s = block * BLOCK + i;
        bool valid = s >= row.first && s < end && (!row.mask || row.mask[s]);
        keep[i] = -static_cast<int32_t>(valid);
        count += valid;
    }
    return count;
}

bool whole_block(const Row& row, int64_t block, int64_t end) {
    if (block * BLOCK < row.first || (block + 1) * BLOCK > end) return false;
    if (!row.mask) return true;
    uint8_t all = 1;
    for (int64_t i = 0; i < BLOCK; i++) all &= row.mask[block * BLOCK + i] != 0;
    return all;
}

template <class T>
class Decoder {
    const Arguments& a;
    const int64_t group, dim, padded_dim, blocks;
    const bool capped;
    std::vector<Row> rows;
    std::vector<Scratch> scratch;

  public:
    Decoder(const Arguments& arguments, Arena& arena, bool per_head)
        : a(arguments),
          group(a.group),
          dim(a.head_dim),
          padded_dim((a.head_dim + W - 1) / W * W),
          blocks((a.cached + BLOCK - 1) / BLOCK),
          capped(a.softcap > 0),
          rows(a.batch),
          scratch(per_head ? heads() : a.threads) {
        size_t each = Scratch().place(nullptr, a, blocks, padded_dim);
        char* memory = arena.reserve(each * scratch.size());
        for (size_t i = 0; i < scratch.size(); i++) scratch[i].place(memory + i * each, a, blocks, padded_dim);
    }

    int64_t heads() const { return a.batch * a.num_kv_heads; }
    int64_t max_chunks() const { return (a.k_max + CHUNK - 1) / CHUNK; }
    int64_t max_blocks() const { return blocks; }
    void read_row(int64_t b) { rows[b] = make_row(a, b); }

    // All phases of one head, one after the other.
    void whole_head(int64_t head, int64_t slot) {
        Scratch& s = scratch[slot];
        prepare(head, s);
        score(head, s, 0, blocks);
        combine(head, s, 0, blocks);
        select(head, s);
        for (int64_t chunk = 0; chunk < max_chunks(); chunk++) attend(head, s, chunk);
        merge(head, s);
    }

    void prepare(int64_t head) { prepare(head, scratch[head]); }
    void score(int64_t head, int64_t from, int64_t to) { score(head, scratch[head], from, to); }
    void combine(int64_t head, int64_t from, int64_t to) { combine(head, scratch[head], from, to); }
    void select(int64_t head) { select(head, scratch[head]); }
    void attend(int64_t head, int64_t chunk) { attend(head, scratch[head], chunk); }
    void merge(int64_t head) { merge(head, scratch[head]); }

  private:
    const Row& row_of(int64_t head) const { return rows[head / a.num_kv_heads]; }

    template <class Element>
    const Element* head_of(const void* base, int64_t head, int64_t batch_stride, int64_t head_stride) const {
        return static_cast<const Element*>(base) + head / a.num_kv_heads * batch_stride +
               head % a.num_kv_heads * head_stride;
    }

    // Queries of one tile share each component they load: up to four at a time.
    static int64_t tile_size(int64_t left) { return std::min<int64_t>(left, 4); }

    void prepare(int64_t head, Scratch& s) const {
        if (row_of(head).n == 0) return;
        const T* q = head_of<T>(a.query, head, a.query_batch, a.query_head * group);
        float magnitude[MAX_HEAD_DIM] = {};
        float to_logit = static_cast<float>(capped ? a.scale / a.softcap : a.scale * LOG2E);
        for (int64_t g = 0; g < group; g++) {
            for (int64_t i = 0; i < padded_dim; i++) {
                float x = i < dim ? widen(q[g * a.query_head + i]) : 0.f;
                if (i < dim) magnitude[i] += std::fabs(x);
                s.queries[g * padded_dim + i] = x * to_logit;
            }
        }
        if (row_of(head).everything()) return;

        int32_t keys[MAX_HEAD_DIM + W];
        memcpy(keys, magnitude, dim * sizeof(float));  // floats that are not negative order like their bits
        select_largest(keys, dim, a.r, s.components);
        for (int64_t g = 0; g < group; g++) {
            float all = 0, some = 0;
            for (int64_t i = 0; i < dim; i++) all += std::fabs(widen(q[g * a.query_head + i]));
            for (int64_t c = 0; c < a.r; c++) some += std::fabs(widen(q[g * a.query_head + s.components[c]]));
            float tau = std::sqrt(some / all);
            if (!(tau > 0)) tau = 1;
            int64_t tile_begin = g / 4 * 4, tile = tile_size(group - tile_begin);
            float* out = s.scored_queries + tile_begin * a.r + g % 4;
            for (int64_t c = 0; c < a.r; c++)
                out[c * tile] = widen(q[g * a.query_head + s.components[c]]) * (to_logit / tau);
        }
    }

    // Logits of one block for G queries: out[g][BLOCK].  The same runs of the block `ahead` elements further are prefetched.
    template <int G>
    static void block_logits(const T* block, int64_t ahead, const int32_t* components, int64_t r, const float* queries,
                             float* out, int64_t out_stride) {
        constexpr int V = W == 8 ? 2 : 4;  // vectors of positions in flight: G * V accumulators fit the registers
        for (int64_t i = 0; i < BLOCK; i += V * W) {
            Floats sum[G][V] = {};
            for (int64_t c = 0; c < r; c++) {
                const T* run = block + components[c] * BLOCK + i;
                for (int64_t byte = 0; byte < int64_t(V * W * sizeof(T)); byte += LINE)
                    __builtin_prefetch(reinterpret_cast<const char*>(run + ahead) + byte, 0, 2);
                Floats x[V];
                for (int v = 0; v < V; v++) x[v] = load(run + v * W);
                for (int g = 0; g < G; g++)
                    for (int v = 0; v < V; v++) sum[g][v] += x[v] * queries[c * G + g];
            }
            for (int g = 0; g < G; g++)
                for (int v = 0; v < V; v++) store(out + g * out_stride + i + v * W, sum[g][v]);
        }
    }

    // In place: logits x in base 2 become 2^(x - reference).  Lanes not kept become 0.
    void exponentiate(float* x, const int32_t* keep, float* reference, float* sum) const {
        Floats highest = splat(LOWEST), total = {};
        for (int64_t i = 0; i < BLOCK; i += W) {
            Floats logit = load(x + i);
            if (capped) logit = tanh(logit) * static_cast<float>(a.softcap * LOG2E);
            if (keep) logit = load_ints(keep + i) ? logit : splat(-INFINITE);
            if (capped || keep) store(x + i, logit);
            highest = max(logit, highest);
        }
        *reference = round_to_int(horizontal_max(highest));
        for (int64_t i = 0; i < BLOCK; i += W) {
            Floats weight = exp2_scaled(load(x + i), *reference);
            total += weight;
            store(x + i, weight);
        }
        *sum = horizontal_sum(total);
    }

    void score(int64_t head, Scratch& s, int64_t from, int64_t to) const {
        const Row& row = row_of(head);
        if (row.everything()) return;
        from = std::max(from, row.first / BLOCK);
        to = std::min(to, (row.end + BLOCK - 1) / BLOCK);
        const T* components = head_of<T>(a.key_components, head, a.components_batch, a.components_head);
        int64_t positions = blocks * BLOCK;
        int32_t lanes[BLOCK];
        for (int64_t j = from; j < to; j++) {
            const int32_t* keep = nullptr;
            int64_t kept = BLOCK;
            if (!whole_block(row, j, row.end)) {
                kept = block_lanes(row, j, row.end, lanes);
                keep = lanes;
            }
            if (kept == 0) {  // nothing here is read
                for (int64_t g = 0; g < group; g++) {
                    memset(s.weights + g * positions + j * BLOCK, 0, BLOCK * sizeof(float));
                    s.reference[g * blocks + j] = LOWEST;
                    s.sum[g * blocks + j] = 0;
                }
                continue;
            }
            const T* block = components + j * a.components_block;
            int64_t ahead = j + 1 < to ? a.components_block : 0;
            for (int64_t g = 0; g < group; g += 4) {
                const float* queries = s.scored_queries + g * a.r;
                float* out = s.weights + g * positions + j * BLOCK;
                int64_t next = g == 0 ? ahead : 0;
                switch (tile_size(group - g)) {
                    case 1: block_logits<1>(block, next, s.components, a.r, queries, out, positions); break;
                    case 2: block_logits<2>(block, next, s.components, a.r, queries, out, positions); break;
                    case 3: block_logits<3>(block, next, s.components, a.r, queries, out, positions); break;
                    default: block_logits<4>(block, next, s.components, a.r, queries, out, positions); break;
                }
            }
            for (int64_t g = 0; g < group; g++)
                exponentiate(s.weights + g * positions + j * BLOCK, keep, s.reference + g * blocks + j,
                             s.sum + g * blocks + j);
        }
    }

    // Softmax normalisation of every block in [from, to) for query g.  All blocks' references and sums are known by now.
    void weigh_blocks(const Row& row, Scratch& s, int64_t g, int64_t from, int64_t to) const {
        const float *reference = s.reference + g * blocks, *sum = s.sum + g * blocks;
        int64_t first = row.first / BLOCK, end = (row.end + BLOCK - 1) / BLOCK;
        float highest = *std::max_element(reference + first, reference + end);
        float z = 0;
        for (int64_t j = first; j < end; j++) z += sum[j] * power_of_two(reference[j], highest);
        for (int64_t j = from; j < to; j++) s.block_weight[g * blocks + j] = power_of_two(reference[j], highest) / z;
    }

    void combine(int64_t head, Scratch& s, int64_t from, int64_t to) const {
        const Row& row = row_of(head);
        if (row.everything()) return;
        from = std::max(from, row.first / BLOCK);
        to = std::min(to, (row.end + BLOCK - 1) / BLOCK);
        if (from >= to) return;
        int64_t positions = blocks * BLOCK;
        bool sound = true;  // false once a NaN or an infinity reached a sum: then no score means anything, and all count as 0
        for (int64_t g = 0; g < group; g++) {
            weigh_blocks(row, s, g, from, to);
            for (int64_t j = from; j < to; j++) sound &= std::isfinite(s.block_weight[g * blocks + j]);
        }
        int32_t keep[BLOCK];
        for (int64_t j = from; j < to; j++) {
            constexpr int M = LANES / W;
            bool whole = whole_block(row, j, row.window_begin);
            if (!whole) block_lanes(row, j, row.window_begin, keep);
            Floats maxima[M];
            for (int m = 0; m < M; m++) maxima[m] = splat(EXCLUDED);
            for (int64_t i = 0; i < BLOCK; i += LANES) {
                for (int m = 0; m < M; m++) {
                    int64_t lane = i + m * W;
                    Floats total = {};
                    for (int64_t g = 0; g < group; g++) {
                        Floats share = load(s.weights + g * positions + j * BLOCK + lane) * s.block_weight[g * blocks + j];
                        total += share >= FAINTEST ? share : Floats{};
                    }
                    if (!sound) total = Floats{};
                    if (!whole) total = load_ints(keep + lane) ? total : splat(EXCLUDED);
                    store(s.score + j * BLOCK + lane, total);
                    maxima[m] = max(total, maxima[m]);
                }
            }
            for (int m = 0; m < M; m++) store(s.maxima + j * LANES + m * W, maxima[m]);
        }
    }

    // Positions scoring at least `bound`, ascending, and their keys.  Returns how many.
    int64_t gather_candidates(const Scratch& s, int64_t from, int64_t to, float bound) const {
        int64_t count = 0;
        auto add = [&](int64_t position) {
            s.candidates[count] = static_cast<int32_t>(position);
            memcpy(s.keys + count, s.score + position, sizeof(float));
            count += s.score[position] >= bound;
        };
        for (int64_t j = from; j < to; j++) {
            const float* maxima = s.maxima + j * LANES;
            int lanes[LANES], hit = 0;
            for (int lane = 0; lane < LANES; lane++) {
                lanes[hit] = lane;
                hit += maxima[lane] >= bound;
            }
            if (hit == 0) continue;
            if (hit > 3) {
                for (int64_t i = 0; i < BLOCK; i++) add(j * BLOCK + i);
            } else {
                for (int64_t i = 0; i < BLOCK; i += LANES)
                    for (int h = 0; h < hit; h++) add(j * BLOCK + i + lanes[h]);
            }
        }
        return count;
    }

    void select(int64_t head, Scratch& s) const {
        const Row& row = row_of(head);
        int64_t wanted = row.everything() ? 0 : row.budget - row.window, taken = std::max<int64_t>(wanted, 0);
        if (wanted > 0) {
            int64_t from = row.first / BLOCK, to = (row.window_begin + BLOCK - 1) / BLOCK;
            int64_t lanes = (to - from) * LANES;
            float bound = 0;
            if (lanes > wanted) {
                memcpy(s.keys, s.maxima + from * LANES, lanes * sizeof(float));
                pad_keys(s.keys, lanes);
                int32_t key = std::max(kth_largest(s.keys, lanes, wanted), 0);
                memcpy(&bound, &key, sizeof bound);
            }
            int64_t count = gather_candidates(s, from, to, bound);
            select_largest(s.keys, count, wanted, s.picks);
            for (int64_t i = 0; i < wanted; i++) s.chosen[i] = s.candidates[s.picks[i]];
        }
        int64_t forced_from = row.everything() ? row.first : row.window_begin;
        for (int64_t p = forced_from; p < row.end; p++)
            if (!row.mask || row.mask[p]) s.chosen[taken++] = static_cast<int32_t>(p);
        if (a.positions) {
            int64_t* out = a.positions + head * a.k_max;
            for (int64_t i = 0; i < a.k_max; i++) out[i] = i < taken ? s.chosen[i] : -1;
        }
    }

    static void prefetch_row(const T* row, int64_t dim) {
        const char* p = reinterpret_cast<const char*>(row);
        for (int64_t byte = 0; byte < int64_t(dim * sizeof(T)); byte += LINE) __builtin_prefetch(p + byte, 0, 3);
    }

    // out[g][i] = query g . key of chosen[i], in base 2 (capped before that).
    void row_logits(int64_t head, const Scratch& s, const int32_t* chosen, int64_t count, float* out) const {
        const T* keys = head_of<T>(a.key, head, a.key_batch, a.key_head);
        const T* values = head_of<T>(a.value, head, a.value_batch, a.value_head);
        int64_t full = dim / W * W;
        for (int64_t i = 0; i < std::min(count, ROWS_AHEAD); i++) prefetch_row(keys + chosen[i] * a.key_position, dim);
        for (int64_t i = 0; i < count; i++) {
            if (i + ROWS_AHEAD < count) prefetch_row(keys + chosen[i + ROWS_AHEAD] * a.key_position, dim);
            prefetch_row(values + chosen[i] * a.value_position, dim);
            const T* row = keys + chosen[i] * a.key_position;
            for (int64_t g0 = 0; g0 < group; g0 += 4) {
                int64_t tile = tile_size(group - g0);
                Floats dot[4] = {};
                for (int64_t c = 0; c < padded_dim; c += W) {
                    Floats x = c < full ? load(row + c) : load_part(row + c, dim - c);
                    for (int64_t g = 0; g < tile; g++) dot[g] += x * load(s.queries + (g0 + g) * padded_dim + c);
                }
                for (int64_t g = 0; g < tile; g++) out[(g0 + g) * CHUNK + i] = horizontal_sum(dot[g]);
            }
        }
    }

    void attend(int64_t head, Scratch& s, int64_t chunk) const {
        const Row& row = row_of(head);
        int64_t begin = chunk * CHUNK, count = std::min(CHUNK, row.budget - begin);
        if (count <= 0) return;
        const int32_t* chosen = s.chosen + begin;
        float* partial = s.partial + chunk * group * padded_dim;
        float* weights = s.row_weights + chunk * group * CHUNK;
        row_logits(head, s, chosen, count, weights);
        int64_t padded_count = (count + W - 1) / W * W;
        for (int64_t g = 0; g < group; g++) {
            float* w = weights + g * CHUNK;
            for (int64_t i = count; i < padded_count; i++) w[i] = -INFINITE;
            Floats highest = splat(LOWEST), total = {};
            for (int64_t i = 0; i < padded_count; i += W) {
                Floats logit = load(w + i);
                if (capped) {
                    logit = tanh(logit) * static_cast<float>(a.softcap * LOG2E);
                    for (int lane = 0; lane < W; lane++)
                        if (i + lane >= count) logit[lane] = -INFINITE;
                    store(w + i, logit);
                }
                highest = max(logit, highest);
            }
            float reference = round_to_int(horizontal_max(highest));
            for (int64_t i = 0; i < padded_count; i += W) {
                Floats weight = exp2_scaled(load(w + i), reference);
                total += weight;
                store(w + i, weight);
            }
            s.partial_max[chunk * group + g] = reference;
            s.partial_sum[chunk * group + g] = horizontal_sum(total);
        }
        const T* values = head_of<T>(a.value, head, a.value_batch, a.value_head);
        for (int64_t g = 0; g < group; g += 4) {
            const float* w = weights + g * CHUNK;
            float* out = partial + g * padded_dim;
            switch (tile_size(group - g)) {
                case 1: weighted_rows<1>(values, chosen, count, w, out); break;
                case 2: weighted_rows<2>(values, chosen, count, w, out); break;
                case 3: weighted_rows<3>(values, chosen, count, w, out); break;
                default: weighted_rows<4>(values, chosen, count, w, out); break;
            }
        }
    }

    // out[g] = sum of weights[g][i] * row i.
    template <int G>
    void weighted_rows(const T* values, const int32_t* chosen, int64_t count, const float* weights, float* out) const {
        constexpr int V = W == 8 ? 2 : 4;
        int64_t c = 0;
        for (; c + V * W <= dim; c += V * W) {
            Floats sum[G][V] = {};
            for (int64_t i = 0; i < count; i++) {
                const T* row = values + chosen[i] * a.value_position + c;
                Floats x[V];
                for (int v = 0; v < V; v++) x[v] = load(row + v * W);
                for (int g = 0; g < G; g++)
                    for (int v = 0; v < V; v++) sum[g][v] += x[v] * weights[g * CHUNK + i];
            }
            for (int g = 0; g < G; g++)
                for (int v = 0; v < V; v++) store(out + g * padded_dim + c + v * W, sum[g][v]);
        }
        for (; c < dim; c += W) {
            Floats sum[G] = {};
            for (int64_t i = 0; i < count; i++) {
                const T* row = values + chosen[i] * a.value_position + c;
                Floats x = c + W <= dim ? load(row) : load_part(row, dim - c);
                for (int g = 0; g < G; g++) sum[g] += x * weights[g * CHUNK + i];
            }
            for (int g = 0; g < G; g++) store(out + g * padded_dim + c, sum[g]);
        }
    }

    // Approximate score mass of the chosen positions.
    float attended_mass(const Row& row, const Scratch& s, int64_t g) const {
        const float *weights = s.weights + g * blocks * BLOCK, *block_weight = s.block_weight + g * blocks;
        float mass = 0;
        for (int64_t i = 0; i < row.budget; i++) mass += weights[s.chosen[i]] * block_weight[s.chosen[i] / BLOCK];
        return mass;
    }

    void merge(int64_t head, Scratch& s) const {
        const Row& row = row_of(head);
        T* output = static_cast<T*>(a.output) + head * group * dim;
        float* alpha = a.alpha + head * group;
        int64_t chunks = (row.budget + CHUNK - 1) / CHUNK;
        const float* value_sum = head_of<float>(a.value_sum, head, a.sum_batch, a.sum_head);
        for (int64_t g = 0; g < group; g++) {
            alpha[g] = row.everything() ? 1.f : attended_mass(row, s, g);
            float highest = LOWEST, z = 0;
            for (int64_t c = 0; c < chunks; c++) highest = std::max(highest, s.partial_max[c * group + g]);
            for (int64_t c = 0; c < chunks; c++)
                z += s.partial_sum[c * group + g] * power_of_two(s.partial_max[c * group + g], highest);
            bool blend = a.mean_value && !row.everything();
            float attended = blend ? alpha[g] : 1.f;
            for (int64_t i = 0; i < dim; i++) {
                float y = 0;
                for (int64_t c = 0; c < chunks; c++)
                    y += s.partial[(c * group + g) * padded_dim + i] * power_of_two(s.partial_max[c * group + g], highest);
                float x = chunks ? attended * (y / z) : 0.f;
                if (blend) x += (1 - attended) * (value_sum[i] / row.n);
                narrow(x, output + g * dim + i);
            }
        }
    }
};

int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Tasks 0 .. count-1 shared out one by one: rows differ in length.  Each counter serves one phase.
template <class Task>
void share(std::atomic<int64_t>& next, int64_t count, const Task& task) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
}

template <class T>
void decode(const Arguments& a) {
    static thread_local Arena arena;
    int64_t heads = a.batch * a.num_kv_heads;
    bool whole_heads = heads >= 4 * a.threads || a.threads == 1;
    Decoder<T> decoder(a, arena, !whole_heads);
    std::atomic<int64_t> next[7] = {};
    int64_t parts = std::min(decoder.max_blocks(), (4 * a.threads + heads - 1) / heads), chunks = decoder.max_chunks();
    auto boundary = [&](int64_t part) { return decoder.max_blocks() * part / parts; };

#pragma omp parallel num_threads(static_cast<int>(a.threads))
    {
        FlushSubnormals flush;
        share(next[0], a.batch, [&](int64_t b) { decoder.read_row(b); });
#pragma omp barrier
        if (whole_heads) {
            share(next[1], heads, [&](int64_t head) { decoder.whole_head(head, thread_index()); });
        } else {
            share(next[1], heads, [&](int64_t head) { decoder.prepare(head); });
#pragma omp barrier
            share(next[2], heads * parts,
                  [&](int64_t i) { decoder.score(i / parts, boundary(i % parts), boundary(i % parts + 1)); });
#pragma omp barrier
            share(next[3], heads * parts,
                  [&](int64_t i) { decoder.combine(i / parts, boundary(i % parts), boundary(i % parts + 1)); });
#pragma omp barrier
            share(next[4], heads, [&](int64_t head) { decoder.select(head); });
#pragma omp barrier
            share(next[5], heads * chunks, [&](int64_t i) { decoder.attend(i / chunks, i % chunks); });
#pragma omp barrier
            share(next[6], heads, [&](int64_t head) { decoder.merge(head); });
        }
    }
}

}  // namespace
}  // namespace sparq

extern "C" int64_t sparq_arguments_size() { return sizeof(sparq::Arguments); }

// 0 when done, 1 for a dtype it does not know, 2 when memory ran out.
extern "C" int64_t sparq_decode(const sparq::Arguments* arguments) {
    using namespace sparq;
    try {
        switch (arguments->dtype) {
            case 0: decode<float>(*arguments); return 0;
            case 1: decode<BFloat16>(*arguments); return 0;
            case 2: decode<Float16>(*arguments); return 0;
            default: return 1;
        }
    } catch (const std::bad_alloc&) {
        return 2;
    }
}
