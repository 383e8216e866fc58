// One SparQ decode step (arXiv 2312.04985, algorithm 1) for every batch row and KV head.
//
// Phases, each a function over a range so that work can be split over positions as well as over heads:
//   prepare   top-r components of the group's summed |q|, queries scaled for scoring in base 2
//   score     per tile of 256 positions: logits summed over the r component runs, a few at a time while the next few
//             are on their way (of the four-bit index by integer products, codes.h; its last, incomplete tile from rows
//             of K), then turned into 2^x; each unit of 64 keeps its own integer reference exponent and sum
//   combine   the group's summed softmax per position, and the maximum of every 16th position of a tile of 256
//   select    what at least `wanted` of those maxima reach, the wanted-th largest score reaches too, so only positions at
//             least that good compete, as many as the budget or the mass asks for; the local window is appended; alpha
//   attend    exact attention over chunks of the chosen rows
//   merge     chunks joined, blend with the mean value
// With many heads one task does all phases of a head, so that its scratch stays in the core's cache.  With few, each
// phase is split over tiles or chunks and a barrier follows.  Results do not depend on the split or the number of
// threads: the boundaries of units and chunks are fixed, and references are integers, so rescaling is exact and equal
// logits give equal scores anywhere.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "arguments.h"
#include "codes.h"
#include "select.h"
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sparq {
namespace {

constexpr int LANES = 16;            // maxima kept per tile: one for every 16th position
constexpr int64_t CHUNK = 128;       // chosen positions per attend task
constexpr int64_t UNIT = 64;         // neighbouring positions whose scores share a reference exponent
constexpr int64_t TILE = 256;        // positions scored and combined in one go
static_assert(BLOCK % TILE == 0, "a tile lies within one block of storage, or in whole pages");
constexpr int64_t PARTS = TILE / MIN_PAGE;  // the most pages that a tile can lie in
static_assert(GROUP == TILE && TILE == 2 * CHUNK, "a tile is coded, or scored from two chunks of rows");
constexpr int64_t UNITS = TILE / UNIT;
constexpr int64_t LINE = 64;         // bytes
constexpr int RUNS = W == 16 ? 8 : 4;  // components added at a time; as many are fetched ahead, which fits the L1 cache
constexpr int64_t ROWS_AHEAD = 24;    // the same for rows of K
constexpr int64_t TILES_AHEAD = 2;    // coded tiles are fetched so many early: one takes less time than memory does
constexpr int64_t COMBINED_AHEAD = 2;  // tiles' weights
constexpr float FAINTEST = 0x1p-100f;  // scores below count as 0: the same for a position whatever its unit's reference
constexpr float EXCLUDED = -1;       // score of a position that does not compete; scores are at least 0

// Where the time goes, for benchmarks/phases.py: nothing unless it is compiled with SPARQ_PHASES.
#if defined(SPARQ_PHASES)
std::atomic<int64_t> phase_nanoseconds[7];  // of whole heads, in the order above; and of whole calls
class Stopwatch {
    std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();

  public:
    void lap(int phase) {
        auto now = std::chrono::steady_clock::now();
        phase_nanoseconds[phase] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count();
        last = now;
    }
};
#else
struct Stopwatch {
    void lap(int) {}
};
#endif

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
        size_t bytes = count * sizeof(T), room = (bytes + LINE - 1) / LINE * LINE;
#if defined(__SANITIZE_ADDRESS__)
        room += LINE;  // a fence that nothing may touch
        if (base) {
            ASAN_UNPOISON_MEMORY_REGION(base + used, bytes);
            ASAN_POISON_MEMORY_REGION(base + used + bytes, room - bytes);
        }
#endif
        used += room;
    }
};

// Units of that many tiles, and room for a vector to end in.
constexpr int64_t padded_units(int64_t tiles) { return (tiles * UNITS + W - 1) / W * W; }

// What one query of a batch row sees.
struct Row {
    int64_t first = 0, end = 0;    // valid positions lie in [first, end)
    int64_t later_end = 0;         // positions in [end, later_end) belong to later queries: V's sum counts them too
    int64_t n = 0;                 // how many of them are valid
    int64_t budget = 0;            // positions attended; the most where the scores' mass decides
    int64_t least = 0;             // ... and the fewest
    int64_t window = 0;            // newest valid positions forced in ...
    int64_t window_begin = 0;      // ... all at or behind this one
    const uint8_t* mask = nullptr;

    bool everything() const { return least == n; }
};

// r, up to whole vectors.
int64_t padded_components(const Arguments& a) { return (a.r + W - 1) / W * W; }

// Everything a head needs between its phases.
struct Scratch {
    float* scored_queries;   // [r, 4] for every four queries of the group
    float* queries;          // [G, d padded], times scale (and log2 e without softcap)
    float* row_queries;      // [G, d padded]: of these, the components that score, over tau; with a coded index only
    int32_t* components;     // [r]
    float* weights;          // [tiles, G, TILE]: 2^(x - reference)
    float* reference;        // [G, units]: integers
    float* sum;              // [G, units]
    float* unit_weight;      // [G, units]: 2^(reference - maximum) / z
    float* score;            // [positions]
    float* maxima;           // [tiles, LANES]
    int32_t* keys;           // [positions + W]
    int32_t* candidates;     // [positions + W]
    int32_t* picks;          // [k_max + W]
    int32_t* chosen;         // [k_max]
    int64_t* budget;         // [1]: how many
    float* mass;             // [G]: of the softmax over the scores, what the chosen positions have
    float* row_weights;      // [chunks, G, CHUNK]: softmax over a chunk's rows, not normalised
    float* partial;          // [chunks, G, d padded]
    float* partial_max;      // [chunks, G]
    float* partial_sum;      // [chunks, G]

    size_t place(char* base, const Arguments& a, int64_t tiles, int64_t padded_dim) {
        Layout layout{base};
        int64_t positions = tiles * TILE, chunks = (a.k_max + CHUNK - 1) / CHUNK, units = padded_units(tiles);
        layout.place(scored_queries, padded_components(a) * a.group);
        layout.place(queries, a.group * padded_dim);
        layout.place(row_queries, a.key_ranges ? a.group * padded_dim : 0);
        layout.place(components, a.head_dim + W);
        layout.place(weights, a.group * positions);
        layout.place(reference, a.group * units);
        layout.place(sum, a.group * units);
        layout.place(unit_weight, a.group * units);
        layout.place(score, positions);
        layout.place(maxima, tiles * LANES);
        layout.place(keys, positions + W);
        layout.place(candidates, positions + W);
        layout.place(picks, positions + W);
        layout.place(chosen, a.k_max);
        layout.place(budget, 1);
        layout.place(mass, a.group);
        layout.place(row_weights, chunks * a.group * CHUNK);
        layout.place(partial, chunks * a.group * padded_dim);
        layout.place(partial_max, chunks * a.group);
        layout.place(partial_sum, chunks * a.group);
        return layout.used;
    }
};

// Of batch row b, query i.
Row make_row(const Arguments& a, int64_t b, int64_t i) {
    Row row;
    row.later_end = std::clamp<int64_t>(a.length[b * a.length_batch], 0, a.cached);
    row.end = std::max<int64_t>(row.later_end - (a.query_length - 1 - i), 0);
    row.first = a.start ? std::clamp<int64_t>(a.start[b * a.start_batch], 0, row.end) : 0;
    row.n = row.end - row.first;
    if (a.mask) {
        row.mask = a.mask + b * a.mask_batch;
        row.n = 0;
        for (int64_t s = row.first; s < row.end; s++) row.n += row.mask[s] != 0;
    }
    bool dense = row.n < a.dense_below;
    row.budget = dense ? row.n : std::min(row.n, std::max(a.k, a.k_divisor ? row.n / a.k_divisor : 0));
    row.window = a.local < 0 ? row.budget / 4 : std::min(a.local, row.budget);
    row.least = a.mass > 0 && !dense ? std::max(std::min(a.k_min, row.n), row.window) : row.budget;
    row.window_begin = row.end - row.window;
    if (row.mask) {
        row.window_begin = row.end;
        for (int64_t found = 0; found < row.window; found += row.mask[row.window_begin] != 0) row.window_begin--;
    }
    return row;
}

// Which lanes of a tile lie in [first, end) and are allowed by the mask: -1 or 0 each.  Returns how many do.
int64_t tile_lanes(const Row& row, int64_t tile, int64_t end, int32_t* keep) {
    int64_t count = 0;
    for (int64_t i = 0; i < TILE; i++) {
        int64_t s = tile * TILE + i;
        bool valid = s >= row.first && s < end && (!row.mask || row.mask[s]);
        keep[i] = -static_cast<int32_t>(valid);
        count += valid;
    }
    return count;
}

bool whole_tile(const Row& row, int64_t tile, int64_t end) {
    if (tile * TILE < row.first || (tile + 1) * TILE > end) return false;
    if (!row.mask) return true;
    uint8_t all = 1;
    for (int64_t i = 0; i < TILE; i++) all &= row.mask[tile * TILE + i] != 0;
    return all;
}

// Sum of rows [begin, end), in their order; of those that a mask allows.
template <class T>
void sum_rows(const T* rows, int64_t begin, int64_t end, int64_t stride, const uint8_t* mask, int64_t dim,
              float* sum) {
    float total[MAX_HEAD_DIM + PAIR] = {};  // in load_pair's order
    int64_t whole = dim / PAIR * PAIR;
    for (int64_t p = begin; p < end; p++) {
        if (mask && !mask[p]) continue;
        Floats x, y;
        auto add = [&](int64_t i) {
            store(total + i, load(total + i) + x);
            store(total + i + W, load(total + i + W) + y);
        };
        for (int64_t i = 0; i < whole; i += PAIR) {
            load_pair(rows + p * stride + i, x, y);
            add(i);
        }
        if (whole < dim) {
            load_pair_part(rows + p * stride + whole, dim - whole, x, y);
            add(whole);
        }
    }
    for (int64_t i = 0; i < dim; i++) sum[i] = total[slot<T>(i)];
}

template <class T>
class Decoder {
    const Arguments& a;
    const int64_t group, dim, padded_dim, tiles, units;
    const int64_t page_bits, part;  // positions of a page, as a power of two; of a tile, those that lie in one page
    const bool capped, coded;
    std::vector<Row> rows;
    std::vector<Scratch> scratch;

  public:
    Decoder(const Arguments& arguments, Arena& arena, bool per_head)
        : a(arguments),
          group(a.group),
          dim(a.head_dim),
          padded_dim((a.head_dim + PAIR - 1) / PAIR * PAIR),
          tiles((a.cached + TILE - 1) / TILE),
          units(padded_units(tiles)),
          page_bits(__builtin_ctzll(a.page)),
          part(std::min(a.page, TILE)),
          capped(a.softcap > 0),
          coded(a.key_ranges),
          rows(a.batch * a.query_length),
          scratch(per_head ? heads() : a.threads) {
        size_t each = Scratch().place(nullptr, a, tiles, padded_dim);
        char* memory = arena.reserve(each * scratch.size());
        for (size_t i = 0; i < scratch.size(); i++) scratch[i].place(memory + i * each, a, tiles, padded_dim);
    }

    // What is worked on by itself: a KV head of one query of one batch row, KV heads innermost.
    int64_t heads() const { return a.batch * a.query_length * a.num_kv_heads; }
    int64_t max_chunks() const { return (a.k_max + CHUNK - 1) / CHUNK; }
    // Where part i of n begins: whole vectors of units never belong to two parts.
    int64_t part_begin(int64_t i, int64_t n) const {
        constexpr int64_t together = std::max<int64_t>(W / UNITS, 1);
        return std::min((tiles + together - 1) / together * i / n * together, tiles);
    }
    void read_row(int64_t i) { rows[i] = make_row(a, i / a.query_length, i % a.query_length); }

    // All phases of one head, one after the other.
    void whole_head(int64_t head, int64_t slot) {
        Scratch& s = scratch[slot];
        Stopwatch watch;
        prepare(head, s);
        watch.lap(0);
        score(head, s, 0, tiles);
        watch.lap(1);
        combine(head, s, 0, tiles);
        watch.lap(2);
        select(head, s);
        watch.lap(3);
        for (int64_t chunk = 0; chunk < max_chunks(); chunk++) attend(head, s, chunk);
        watch.lap(4);
        merge(head, s);
        watch.lap(5);
    }

    void prepare(int64_t head) { prepare(head, scratch[head]); }
    void score(int64_t head, int64_t from, int64_t to) { score(head, scratch[head], from, to); }
    void combine(int64_t head, int64_t from, int64_t to) { combine(head, scratch[head], from, to); }
    void select(int64_t head) { select(head, scratch[head]); }
    void attend(int64_t head, int64_t chunk) { attend(head, scratch[head], chunk); }
    void merge(int64_t head) { merge(head, scratch[head]); }

  private:
    const Row& row_of(int64_t head) const { return rows[head / a.num_kv_heads]; }

    int64_t batch_row(int64_t head) const { return head / a.num_kv_heads / a.query_length; }

    template <class Element>
    const Element* head_of(const void* base, int64_t head, int64_t batch_stride, int64_t head_stride) const {
        return static_cast<const Element*>(base) + batch_row(head) * batch_stride + head % a.num_kv_heads * head_stride;
    }

    // Where a head's share of something cached begins: in its row, or in page 0 with a table.
    template <class Element>
    const Element* cached_of(const void* base, int64_t head, int64_t batch_stride, int64_t head_stride) const {
        return head_of<Element>(base, head, a.block_table ? 0 : batch_stride, head_stride);
    }

    const int32_t* table_of(int64_t head) const {
        return a.block_table ? a.block_table + batch_row(head) * a.table_batch : nullptr;
    }

    // From there to the rows of some positions.
    void find_rows(const int32_t* table, const int32_t* positions, int64_t count, int64_t page_stride,
                   int64_t position_stride, int64_t* rows) const {
        if (!table) {
            for (int64_t i = 0; i < count; i++) rows[i] = positions[i] * position_stride;
            return;
        }
        for (int64_t i = 0; i < count; i++)
            rows[i] = table[positions[i] >> page_bits] * page_stride +
                      (positions[i] & (a.page - 1)) * position_stride;
    }

    int64_t query_index(int64_t head) const { return head / a.num_kv_heads % a.query_length; }

    // Which of the results [B, Hkv * count, Q] belongs to element i of this head's `count`.
    int64_t result_index(int64_t head, int64_t count, int64_t i) const {
        int64_t b = head / a.num_kv_heads / a.query_length, h = head % a.num_kv_heads;
        return ((b * a.num_kv_heads + h) * count + i) * a.query_length + query_index(head);
    }

    // The row's units, widened to whole vectors.
    static int64_t first_unit(const Row& row) { return row.first / TILE * UNITS / W * W; }
    static int64_t end_unit(const Row& row) { return ((row.end + TILE - 1) / TILE * UNITS + W - 1) / W * W; }

    // Queries share what they load: up to four at a time.
    static int64_t queries_at_once(int64_t left) { return std::min<int64_t>(left, 4); }

    // work(count, g) for every four queries of the group and for those left, from query g; the count as a type.
    template <class Work>
    SPARQ_INLINE void for_queries(const Work& work) const {
        int64_t g = 0;
        for (; g + 4 <= group; g += 4) work(std::integral_constant<int, 4>(), g);
        switch (group - g) {
            case 1: work(std::integral_constant<int, 1>(), g); break;
            case 2: work(std::integral_constant<int, 2>(), g); break;
            case 3: work(std::integral_constant<int, 3>(), g); break;
        }
    }

    void prepare(int64_t head, Scratch& s) const {
        const Row& row = row_of(head);
        if (row.n == 0) return;
        const T* q = head_of<T>(a.query, head, a.query_batch, a.query_head * group) +
                     query_index(head) * a.query_position;
        float magnitude[MAX_HEAD_DIM] = {};
        float to_logit = static_cast<float>(capped ? a.scale / a.softcap : a.scale * LOG2E);
        for (int64_t g = 0; g < group; g++) {
            float* out = s.queries + g * padded_dim;
            for (int64_t i = 0; i < padded_dim; i += PAIR) {
                Floats x, y;
                load_dims(q + g * a.query_head, i, x, y);
                store(magnitude + i, load(magnitude + i) + absolute(x));
                store(magnitude + i + W, load(magnitude + i + W) + absolute(y));
                store(out + i, x * to_logit);
                store(out + i + W, y * to_logit);
            }
        }
        if (row.everything()) return;

        for (int64_t g = 0; g < group; g++) {  // vectors of units begin before and end behind the row's
            int64_t begin = row.first / TILE * UNITS, end = (row.end + TILE - 1) / TILE * UNITS;
            std::fill(s.reference + g * units + first_unit(row), s.reference + g * units + begin, LOWEST);
            std::fill(s.reference + g * units + end, s.reference + g * units + end_unit(row), LOWEST);
            std::fill(s.sum + g * units + first_unit(row), s.sum + g * units + begin, 0.f);
            std::fill(s.sum + g * units + end, s.sum + g * units + end_unit(row), 0.f);
        }
        int32_t keys[MAX_HEAD_DIM + W];
        for (int64_t i = 0; i < dim; i++) memcpy(keys + i, magnitude + slot<T>(i), sizeof(float));  // bits order alike
        select_largest(keys, dim, a.r, s.components);
        for (int64_t g = 0; g < group; g++) {
            const float* query = s.queries + g * padded_dim;
            Floats all = {};
            for (int64_t i = 0; i < padded_dim; i += W) all += absolute(load(query + i));
            float some = 0;
            for (int64_t c = 0; c < a.r; c++) some += std::fabs(query[slot<T>(s.components[c])]);
            float tau = std::sqrt(some / horizontal_sum(all));
            if (!(tau > 0)) tau = 1;
            int64_t together = queries_at_once(group - g / 4 * 4);
            float* out = s.scored_queries + g / 4 * 4 * a.r + g % 4;
            if (coded) {
                together = 1;
                out = s.scored_queries + g * padded_components(a);
                std::fill(out + a.r, out + padded_components(a), 0.f);
                std::fill_n(s.row_queries + g * padded_dim, padded_dim, 0.f);
            }
            for (int64_t c = 0; c < a.r; c++) {
                int64_t from = slot<T>(s.components[c]);
                out[c * together] = query[from] / tau;
                if (coded) s.row_queries[g * padded_dim + from] = query[from] / tau;
            }
        }
    }

    // Elements [i, i + PAIR) of a row of head_dim, zeros behind its end.
    void load_dims(const T* row, int64_t i, Floats& x, Floats& y) const {
        if (i + PAIR <= dim) load_pair(row + i, x, y);
        else load_pair_part(row + i, dim - i, x, y);
    }

    static SPARQ_INLINE void prefetch(const T* p, int64_t count) {
        const char* bytes = reinterpret_cast<const char*>(p);
        for (int64_t i = 0; i < int64_t(count * sizeof(T)); i += LINE) __builtin_prefetch(bytes + i);
    }

    // Adds C components times their queries to `count` logits of a tile: sums[TILE / W][G][W], pairs of vectors as
    // load_pair leaves them.  What `next` points to, if anything, is prefetched.
    // Not inlined: it needs the registers that the caller's constants would take.
    template <int G, int C>
    static __attribute__((noinline)) void add_components(const T* const* runs, const T* const* next,
                                                         const float* queries, int64_t count, float* sums) {
        for (int64_t i = 0; i < count; i += PAIR) {
            if (next)
                for (int c = 0; c < C; c++) prefetch(next[c] + i, PAIR);
            Floats x[C][2];
            for (int c = 0; c < C; c++) load_pair(runs[c] + i, x[c][0], x[c][1]);
            for (int h = 0; h < 2; h++)
                for (int g = 0; g < G; g++) {
                    float* out = sums + (i + h * W) * G + g * W;
                    Floats sum = load(out);
                    for (int c = 0; c < C; c++) sum += x[c][h] * queries[c * G + g];
                    store(out, sum);
                }
        }
    }

    // Logits of a part of a tile for G queries, ordered as in add_components.  A few runs at a time, each read from end
    // to end, are streams that the processor's own prefetcher follows; all r side by side are too many for it.
    template <int G>
    void part_logits(const T* begin, const int32_t* components, const float* queries, float* sums) const {
        std::fill_n(sums, part * G, 0.f);
        int64_t done = 0;
        auto add = [&](auto count) {
            constexpr int C = decltype(count)::value;
            for (; done + C <= a.r; done += C) {
                const T *runs[C], *next[C];
                for (int i = 0; i < C; i++) {
                    runs[i] = begin + components[done + i] * a.components_run;
                    next[i] = begin + components[std::min(done + i + RUNS, a.r - 1)] * a.components_run;
                }
                add_components<G, C>(runs, done + RUNS < a.r ? next : nullptr, queries + done * G, part, sums);
            }
        };
        add(std::integral_constant<int, RUNS>());
        add(std::integral_constant<int, RUNS / 2>());
        add(std::integral_constant<int, 1>());
    }

    // In place: logits become base-2 exponents (capped), and -Inf in lanes not kept.
    void finish_logits(float* x, const int32_t* keep) const {
        for (int64_t i = 0; i < TILE; i += W) {
            Floats logit = load(x + i);
            if (capped) logit = tanh(logit) * static_cast<float>(a.softcap * LOG2E);
            if (keep) logit = load_ints(keep + i) ? logit : splat(-INFINITE);
            store(x + i, logit);
        }
    }

    // In place: x becomes 2^(x - reference), for U times N values that share a reference and a sum.
    // NAN_FREE: that there is no NaN among them is known.
    template <int64_t N, int U, bool NAN_FREE>
    static void exponentiate(float* x, float* reference, float* sum) {
        Floats of_unit[U], poison = {};
        for (int u = 0; u < U; u++) {
            Floats highest = splat(LOWEST);
            for (int64_t i = 0; i < N; i += W) {
                Floats value = load(x + u * N + i);
                highest = max(value, highest);
                if constexpr (!NAN_FREE) poison += value;
            }
            of_unit[u] = highest;
        }
        Floats top = round_to_int(horizontal_maxima(of_unit));
        store_first<U>(reference, top);
        auto raise = [&](auto exp2) __attribute__((always_inline)) {
            for (int u = 0; u < U; u++) {
                float shared = reference[u];  // not read again after every store
                Floats total = {};
                for (int64_t i = 0; i < N; i += W) {
                    Floats weight = exp2(load(x + u * N + i), shared);
                    total += weight;
                    store(x + u * N + i, weight);
                }
                of_unit[u] = total;
            }
        };
        bool tame = !any(absolute(top) >= 0x1p21f);
        if constexpr (!NAN_FREE) tame = tame && !std::isnan(horizontal_sum(poison));
        if (tame) raise([](Floats value, float shared) { return exp2_scaled_fast(value, shared); });
        else raise([](Floats value, float shared) { return exp2_scaled(value, shared); });
        store_first<U>(sum, horizontal_sums(of_unit));
    }

    template <int G>
    void score_tile(const T* const* parts, const T* next_tile, const int32_t* keep, Scratch& s, int64_t g,
                    int64_t index) const {
        alignas(LINE) float sums[TILE * G];
        for (int64_t p = 0; p < TILE / part; p++)
            part_logits<G>(parts[p], s.components, s.scored_queries + g * a.r, sums + p * part * G);
        // Meanwhile the first runs of the next tile are fetched, by the first queries of the group for all.
        constexpr int64_t PIECE = (TILE + UNITS * G - 1) / (UNITS * G);
        int64_t fetched = g == 0 && next_tile ? std::min<int64_t>(a.r, RUNS) : 0;
        for (int64_t i = 0; i < G; i++) {
            float* x = tile_weights(s, g + i, index);
            for (int64_t u = 0; u < UNITS; u++) {
                if ((i * UNITS + u) * PIECE < part)
                    for (int64_t c = 0; c < fetched; c++)
                        prefetch(next_tile + s.components[c] * a.components_run + (i * UNITS + u) * PIECE, PIECE);
                for (int64_t p = u * UNIT; p < (u + 1) * UNIT; p += PAIR) {
                    const float* pair = sums + p * G + i * W;
                    store_pair<T>(x + p, load(pair), load(pair + G * W));
                }
            }
        }
        finish_tile<G, false>(keep, s, g, index);
    }

    // The same of a tile that is coded.  What is to be fetched meanwhile, of a later one, may be null.
    void score_codes(const uint8_t* tile, const uint8_t* later_tile, const T* ranges, const T* later_ranges,
                     const int32_t* keep, Scratch& s, int64_t index) const {
        int64_t padded_r = padded_components(a), count = (a.r + 3) / 4;
        alignas(LINE) uint8_t quads[MAX_HEAD_DIM * RUN];  // [count, RUN, 4]: the codes of four components side by side
        for (int64_t q = 0; q < count; q++) {
            const uint8_t* runs[4];
            for (int64_t m = 0; m < 4; m++)  // behind the last one that one again, at the weight 0
                runs[m] = tile + s.components[std::min(4 * q + m, a.r - 1)] * RUN;
            interleave_runs(runs, quads + q * 4 * RUN);
        }
        if (later_ranges) prefetch(later_ranges, 2 * dim);
        if (index + 1 < tiles) fetch_weights<1>(s, index + 1);  // written next: a line is read before
        float low[MAX_HEAD_DIM + W], step[MAX_HEAD_DIM + W];
        widen_ranges(ranges, s.components, a.r, padded_r, low, step);
        RunsAhead ahead{later_tile, s.components, a.r};
        for_queries([&](auto count, int64_t g) {
            score_codes<count>(quads, low, step, ahead, keep, s, g, index);
            ahead.codes = nullptr;  // the first queries of the group fetch for all
        });
    }

    template <int G>
    void score_codes(const uint8_t* quads, const float* low, const float* step, const RunsAhead& ahead,
                     const int32_t* keep, Scratch& s, int64_t g, int64_t index) const {
        int64_t padded_r = padded_components(a), count = (a.r + 3) / 4;
        int8_t weights[G][MAX_HEAD_DIM + W];
        ByteWeights of[G];
        byte_weights<G>(s.scored_queries + g * padded_r, low, step, padded_r, weights, of);
        coded_logits<G>(quads, count, weights, of, ahead, tile_weights(s, g, index));
        bool finite = true;  // codes and ranges are: only the query can bring a NaN
        for (int64_t i = 0; i < G; i++) finite &= std::isfinite(of[i].base) && std::isfinite(of[i].unit);
        if (finite) finish_tile<G, true>(keep, s, g, index);
        else finish_tile<G, false>(keep, s, g, index);
    }

    // The same of a tile of which not all positions are there yet, from rows of K.
    void score_rows(const T* keys, const int32_t* table, const Row& row, const int32_t* keep, Scratch& s,
                    int64_t index) const {
        int32_t positions[TILE];
        int64_t rows[TILE];
        int64_t first = std::max(index * TILE, row.first), count = std::min((index + 1) * TILE, row.end) - first;
        for (int64_t i = 0; i < count; i++) positions[i] = static_cast<int32_t>(first + i);
        find_rows(table, positions, count, a.key_batch, a.key_position, rows);
        float logits[4 * CHUNK];
        for_queries([&](auto together, int64_t g) {
            const float* queries = s.row_queries + g * padded_dim;
            for (int64_t begin = 0; begin < count; begin += CHUNK) {
                int64_t some = std::min(CHUNK, count - begin);
                row_logits<together>(keys, rows + begin, nullptr, nullptr, some, queries, logits);
                for (int64_t i = 0; i < together; i++)
                    std::copy_n(logits + i * CHUNK, some, tile_weights(s, g + i, index) + first % TILE + begin);
            }
            finish_tile<together, false>(keep, s, g, index);
        });
    }

    // All of a tile's, of which the processor does not see that they come next.
    template <int writes>
    void fetch_weights(const Scratch& s, int64_t tile) const {
        const float* weights = tile_weights(s, 0, tile);
        for (int64_t i = 0; i < group * TILE; i += LINE / sizeof(float)) __builtin_prefetch(weights + i, writes);
    }

    float* tile_weights(const Scratch& s, int64_t g, int64_t tile) const { return s.weights + (tile * group + g) * TILE; }

    // In place: a tile's logits for G queries from g on become weights, with a reference and a sum for each unit.
    // As many queries at a time, a power of two, as fill a vector with their units.
    template <int G, bool NAN_FREE>
    void finish_tile(const int32_t* keep, Scratch& s, int64_t g, int64_t tile) const {
        constexpr int FIT = std::max<int>(W / UNITS, 1), SOME = std::min(FIT, G == 3 ? 2 : G);
        for (int64_t i = 0; i < G && (capped || keep); i++) finish_logits(tile_weights(s, g + i, tile), keep);
        for (int64_t i = 0; i + SOME <= G; i += SOME) finish_units<SOME, NAN_FREE>(s, g + i, tile);
        if constexpr (G % SOME) finish_units<G % SOME, NAN_FREE>(s, g + G / SOME * SOME, tile);
    }

    template <int SOME, bool NAN_FREE>
    void finish_units(Scratch& s, int64_t g, int64_t tile) const {
        float reference[SOME * UNITS], sum[SOME * UNITS];
        exponentiate<UNIT, SOME * UNITS, NAN_FREE>(tile_weights(s, g, tile), reference, sum);
        for (int64_t i = 0; i < SOME; i++) {
            int64_t unit = (g + i) * units + tile * UNITS;
            memcpy(s.reference + unit, reference + i * UNITS, UNITS * sizeof(float));
            memcpy(s.sum + unit, sum + i * UNITS, UNITS * sizeof(float));
        }
    }

    void skip_tile(Scratch& s, int64_t tile) const {
        for (int64_t g = 0; g < group; g++) {
            int64_t unit = g * units + tile * UNITS;
            std::fill_n(tile_weights(s, g, tile), TILE, 0.f);
            std::fill_n(s.reference + unit, UNITS, LOWEST);
            std::fill_n(s.sum + unit, UNITS, 0.f);
        }
    }

    // Component 0 of the run that begins with a position.
    const T* run_at(const T* components, const int32_t* table, int64_t position) const {
        int64_t block = position >> page_bits;
        return components + (table ? table[block] * a.components_batch : block * a.components_block) +
               (position & (a.page - 1));
    }

    // What is kept of a tile that is coded, `each` elements in all; from page to page there are `page_stride`.
    template <class Element>
    const Element* of_tile(const Element* base, const int32_t* table, int64_t tile, int64_t each,
                           int64_t page_stride) const {
        if (!table) return base + tile * each;
        int64_t position = tile * TILE;
        return base + table[position >> page_bits] * page_stride + (position & (a.page - 1)) / TILE * each;
    }
    // [d, RUN].
    const uint8_t* codes_at(const uint8_t* codes, const int32_t* table, int64_t tile) const {
        return of_tile(codes, table, tile, dim * RUN, a.components_batch);
    }
    // [d, 2].
    const T* ranges_at(const T* ranges, const int32_t* table, int64_t tile) const {
        return of_tile(ranges, table, tile, 2 * dim, a.ranges_batch);
    }

    void score(int64_t head, Scratch& s, int64_t from, int64_t to) const {
        const Row& row = row_of(head);
        if (row.everything()) return;
        from = std::max(from, row.first / TILE);
        to = std::min(to, (row.end + TILE - 1) / TILE);
        const int32_t* table = table_of(head);
        const T* components = cached_of<T>(a.key_components, head, a.components_batch, a.components_head);
        const uint8_t* codes = cached_of<uint8_t>(a.key_components, head, a.components_batch, a.components_head);
        const T* ranges = cached_of<T>(a.key_ranges, head, a.ranges_batch, a.ranges_head);
        auto is_coded = [&](int64_t j) { return coded && j < to && (j + 1) * TILE <= row.end; };
        for (int64_t j = from; j < from + TILES_AHEAD && is_coded(j); j++) {
            RunsAhead first{codes_at(codes, table, j), s.components, a.r};
            for (int64_t c = 0; c < a.r; c++) first.fetch(c);
            prefetch(ranges_at(ranges, table, j), 2 * dim);
        }
        int32_t lanes[TILE];
        for (int64_t j = from; j < to; j++) {
            const int32_t* keep = nullptr;
            if (!whole_tile(row, j, row.end)) {
                if (tile_lanes(row, j, row.end, lanes) == 0) {
                    skip_tile(s, j);
                    continue;
                }
                keep = lanes;
            }
            if (is_coded(j)) {
                int64_t later = j + TILES_AHEAD;
                bool more = is_coded(later);
                score_codes(codes_at(codes, table, j), more ? codes_at(codes, table, later) : nullptr,
                            ranges_at(ranges, table, j), more ? ranges_at(ranges, table, later) : nullptr, keep, s, j);
                continue;
            }
            if (coded) {
                score_rows(cached_of<T>(a.key, head, a.key_batch, a.key_head), table, row, keep, s, j);
                continue;
            }
            const T* parts[PARTS];  // behind the row's end its last page again: what is behind it in the table is stale
            for (int64_t p = 0; p < TILE / part; p++) {
                int64_t position = j * TILE + p * part;
                parts[p] = run_at(components, table, position < row.end ? position : (row.end - 1) / part * part);
            }
            const T* next = j + 1 < to ? run_at(components, table, (j + 1) * TILE) : nullptr;
            for_queries([&](auto count, int64_t g) { score_tile<count>(parts, next, keep, s, g, j); });
        }
    }

    // Softmax normalisation of the units in [from, to) for query g; all units' references and sums are known by now.
    // False when a NaN or an infinity is among them.
    bool weigh_units(const Row& row, Scratch& s, int64_t g, int64_t from, int64_t to) const {
        const float *reference = s.reference + g * units, *sum = s.sum + g * units;
        Floats highest = splat(LOWEST), z = {};
        for (int64_t u = first_unit(row); u < end_unit(row); u += W) highest = max(load(reference + u), highest);
        float top = horizontal_max(highest);
        for (int64_t u = first_unit(row); u < end_unit(row); u += W)
            z += load(sum + u) * power_of_two_or_zero(load(reference + u) - top);
        float scale = 1 / horizontal_sum(z);
        for (int64_t u = from; u < to; u += W)
            store(s.unit_weight + g * units + u, power_of_two_or_zero(load(reference + u) - top) * scale);
        return std::isfinite(scale);
    }

    void combine(int64_t head, Scratch& s, int64_t from, int64_t to) const {
        const Row& row = row_of(head);
        if (row.everything()) return;
        from = std::max(from, row.first / TILE);
        to = std::min(to, (row.end + TILE - 1) / TILE);
        if (from >= to) return;
        bool sound = true;  // otherwise no score means anything, and all count as 0
        for (int64_t g = 0; g < group; g++)
            sound &= weigh_units(row, s, g, from * UNITS / W * W, to * UNITS);
        int32_t keep[TILE];
        for (int64_t j = to - 1; j >= from; j--) {  // the last tiles are still in the processor's cache
            bool whole = whole_tile(row, j, row.window_begin);
            if (!whole) tile_lanes(row, j, row.window_begin, keep);
            if (j - COMBINED_AHEAD >= from) fetch_weights<0>(s, j - COMBINED_AHEAD);
            combine_tile(s, j, whole ? nullptr : keep, sound);
        }
    }

    void combine_tile(Scratch& s, int64_t tile, const int32_t* keep, bool sound) const {
        constexpr int M = LANES / W, V = UNIT / W;
        Floats maxima[M];
        for (int m = 0; m < M; m++) maxima[m] = splat(EXCLUDED);
        for (int64_t u = 0; u < UNITS; u++) {
            int64_t lane = u * UNIT, position = tile * TILE + lane, unit = tile * UNITS + u;
            Floats total[V] = {};
            for (int64_t g = 0; g < group; g++) {
                float share = s.unit_weight[g * units + unit];
                const float* weights = tile_weights(s, g, tile) + lane;
                SPARQ_UNROLL for (int v = 0; v < V; v++) {
                    Floats score = load(weights + v * W) * share;
                    total[v] += score >= FAINTEST ? score : Floats{};
                }
            }
            SPARQ_UNROLL for (int v = 0; v < V; v++) {
                if (!sound) total[v] = Floats{};
                if (keep) total[v] = load_ints(keep + lane + v * W) ? total[v] : splat(EXCLUDED);
                store(s.score + position + v * W, total[v]);
                maxima[v % M] = max(total[v], maxima[v % M]);
            }
        }
        for (int m = 0; m < M; m++) store(s.maxima + tile * LANES + m * W, maxima[m]);
    }

    // Positions scoring at least `bound`, ascending, and their keys.  Returns how many.
    int64_t gather_candidates(const Scratch& s, int64_t from, int64_t to, float bound) const {
        int32_t least;
        memcpy(&least, &bound, sizeof least);  // bits of scores order like the scores
        int64_t count = 0;
        for (int64_t j = from; j < to; j++) {
            Ints hits = {};
            for (int lane = 0; lane < LANES; lane += W) hits |= load(s.maxima + j * LANES + lane) >= bound;
            if (any(hits))
                count += keep_at_least(reinterpret_cast<const int32_t*>(s.score + j * TILE), TILE, least, j * TILE,
                                       s.candidates + count, s.keys + count);
        }
        return count;
    }

    // Approximate score mass of the chosen positions [begin, end) for G queries, added to what is in s.mass.
    template <int G>
    void sum_mass(Scratch& s, int64_t g, int64_t begin, int64_t end) const {
        double sum[G] = {};  // k may be tens of thousands
        for (int64_t i = begin; i < end; i++) {
            int64_t position = s.chosen[i], unit = position / UNIT;
            const float* weights = tile_weights(s, g, position / TILE) + position % TILE;
            for (int j = 0; j < G; j++) sum[j] += weights[j * TILE] * s.unit_weight[(g + j) * units + unit];
        }
        for (int j = 0; j < G; j++) s.mass[g + j] += static_cast<float>(sum[j]);
    }

    void add_mass(Scratch& s, int64_t begin, int64_t end) const {
        for_queries([&](auto count, int64_t g) { sum_mass<count>(s, g, begin, end); });
    }

    // Appends the valid positions [begin, end) to what is chosen.  Returns how many are then.
    int64_t take(const Row& row, Scratch& s, int64_t taken, int64_t begin) const {
        for (int64_t p = begin; p < row.end; p++)
            if (!row.mask || row.mask[p]) s.chosen[taken++] = static_cast<int32_t>(p);
        return taken;
    }

    void select(int64_t head, Scratch& s) const {
        const Row& row = row_of(head);
        int64_t taken = row.everything() ? take(row, s, 0, row.first) : choose(row, s);
        *s.budget = taken;
        if (a.positions) {
            int64_t* out = a.positions + result_index(head, 1, 0) * a.k_max;
            for (int64_t i = 0; i < a.k_max; i++) out[i] = i < taken ? s.chosen[i] : -1;
        }
        a.read[result_index(head, 1, 0)] = static_cast<int32_t>(taken);
    }

    // By score, and the local window behind them.  Returns how many are chosen.
    int64_t choose(const Row& row, Scratch& s) const {
        int64_t wanted = row.budget - row.window;
        std::fill_n(s.mass, group, 0.f);
        float missing = static_cast<float>(a.mass * group);
        if (a.mass > 0) {
            add_mass(s, 0, take(row, s, 0, row.window_begin));
            for (int64_t g = 0; g < group; g++) missing -= s.mass[g];
            std::fill_n(s.mass, group, 0.f);
        }
        if (wanted > 0) {
            int64_t from = row.first / TILE, to = (row.window_begin + TILE - 1) / TILE;
            int64_t lanes = (to - from) * LANES;
            float bound = 0;
            if (lanes > wanted) {
                memcpy(s.keys, s.maxima + from * LANES, lanes * sizeof(float));
                pad_keys(s.keys, lanes);
                int32_t key = std::max(threshold_of(s.keys, lanes, wanted, wanted / 8), 0);
                memcpy(&bound, &key, sizeof bound);
            }
            int64_t count = gather_candidates(s, from, to, bound);
            if (a.mass > 0)
                wanted = std::clamp(needed_for(s.keys, count, missing), row.least - row.window, wanted);
            select_largest(s.keys, count, wanted, s.picks);
            for (int64_t i = 0; i < wanted; i++) s.chosen[i] = s.candidates[s.picks[i]];
        }
        int64_t taken = take(row, s, std::max<int64_t>(wanted, 0), row.window_begin);
        add_mass(s, 0, taken);
        return taken;
    }

    // out[g][i] = query g . key at[i], in base 2 (capped before that).  G queries and a few rows make a vector of
    // dot products, so that a query is loaded once for these rows.
    template <int G>
    void row_logits(const T* keys, const int64_t* at, const T* values, const int64_t* values_at, int64_t count,
                    const float* queries, float* out) const {
        constexpr int ROWS = W / G;
        for (int64_t i = 0; i < count; i += ROWS) {
            const T *rows[ROWS], *later_rows[ROWS], *value_rows[ROWS];
            for (int j = 0; j < ROWS; j++) {
                int64_t row = std::min(i + j, count - 1);  // behind the last one, that one again
                rows[j] = keys + at[row];
                later_rows[j] = keys + at[std::min(row + ROWS_AHEAD, count - 1)];
                if (values) value_rows[j] = values + values_at[row];
            }
            Floats dots[W];  // in registers, as long as nothing clears it as memory
            SPARQ_UNROLL for (int d = 0; d < W; d++) dots[d] = Floats{};
            Floats x[ROWS], y[ROWS];
            auto add = [&](const float* query) __attribute__((always_inline)) {
                SPARQ_UNROLL for (int g = 0; g < G; g++)
                    SPARQ_UNROLL for (int j = 0; j < ROWS; j++) {
                        dots[g * ROWS + j] += x[j] * load(query + g * padded_dim);
                        dots[g * ROWS + j] += y[j] * load(query + g * padded_dim + W);
                    }
            };
            int64_t c = 0;
            for (; c + PAIR <= dim; c += PAIR) {
                if (values)  // the first queries of the group fetch the rows for all, a few lines at a time
                    SPARQ_UNROLL for (int j = 0; j < ROWS; j++) {
                        prefetch(later_rows[j] + c, PAIR);
                        prefetch(value_rows[j] + c, PAIR);
                    }
                SPARQ_UNROLL for (int j = 0; j < ROWS; j++) load_pair(rows[j] + c, x[j], y[j]);
                add(queries + c);
            }
            if (c < dim) {
                SPARQ_UNROLL for (int j = 0; j < ROWS; j++) load_pair_part(rows[j] + c, dim - c, x[j], y[j]);
                add(queries + c);
            }
            float sums[W];
            store(sums, horizontal_sums(dots));
            int64_t wanted = CHUNK % ROWS ? std::min<int64_t>(ROWS, count - i) : ROWS;
            for (int g = 0; g < G; g++) memcpy(out + g * CHUNK + i, sums + g * ROWS, wanted * sizeof(float));
        }
    }

    void attend(int64_t head, Scratch& s, int64_t chunk) const {
        int64_t begin = chunk * CHUNK, count = std::min(CHUNK, *s.budget - begin);
        if (count <= 0) return;
        const int32_t* chosen = s.chosen + begin;
        float* partial = s.partial + chunk * group * padded_dim;
        float* weights = s.row_weights + chunk * group * CHUNK;
        const T* keys = cached_of<T>(a.key, head, a.key_batch, a.key_head);
        const T* values = cached_of<T>(a.value, head, a.value_batch, a.value_head);
        int64_t rows[CHUNK], value_rows[CHUNK];
        find_rows(table_of(head), chosen, count, a.key_batch, a.key_position, rows);
        find_rows(table_of(head), chosen, count, a.value_batch, a.value_position, value_rows);
        for (int64_t i = 0; i < std::min(count, ROWS_AHEAD); i++) prefetch(keys + rows[i], dim);
        for_queries([&](auto together, int64_t g) {
            const T* ahead = g == 0 ? values : nullptr;
            row_logits<together>(keys, rows, ahead, value_rows, count, s.queries + g * padded_dim, weights + g * CHUNK);
        });
        for (int64_t g = 0; g < group; g++) {
            float* w = weights + g * CHUNK;
            if (capped)
                for (int64_t i = 0; i < count; i += W)
                    store(w + i, tanh(load(w + i)) * static_cast<float>(a.softcap * LOG2E));
            std::fill(w + count, w + CHUNK, -INFINITE);
            exponentiate<CHUNK, 1, false>(w, s.partial_max + chunk * group + g, s.partial_sum + chunk * group + g);
        }
        for_queries([&](auto together, int64_t g) {
            weighted_rows<together>(values, value_rows, count, weights + g * CHUNK, partial + g * padded_dim);
        });
    }

    // out[g] = sum of weights[g][i] * row at[i].
    template <int G>
    void weighted_rows(const T* values, const int64_t* at, int64_t count, const float* weights, float* out) const {
        constexpr int V = W == 8 ? 2 : 4;
        int64_t c = 0;
        for (; c + V * W <= dim; c += V * W) {
            Floats sum[G][V] = {};
            for (int64_t i = 0; i < count; i++) {
                const T* row = values + at[i] + c;
                Floats x[V];
                for (int v = 0; v < V; v += 2) load_pair(row + v * W, x[v], x[v + 1]);
                for (int g = 0; g < G; g++)
                    for (int v = 0; v < V; v++) sum[g][v] += x[v] * weights[g * CHUNK + i];
            }
            for (int g = 0; g < G; g++)
                for (int v = 0; v < V; v += 2)
                    store_pair<T>(out + g * padded_dim + c + v * W, sum[g][v], sum[g][v + 1]);
        }
        for (; c < dim; c += PAIR) {
            Floats sum[G][2] = {};
            for (int64_t i = 0; i < count; i++) {
                Floats x, y;
                load_dims(values + at[i], c, x, y);
                for (int g = 0; g < G; g++) {
                    sum[g][0] += x * weights[g * CHUNK + i];
                    sum[g][1] += y * weights[g * CHUNK + i];
                }
            }
            for (int g = 0; g < G; g++) store_pair<T>(out + g * padded_dim + c, sum[g][0], sum[g][1]);
        }
    }

    void merge(int64_t head, Scratch& s) const {
        const Row& row = row_of(head);
        float sum[MAX_HEAD_DIM];
        bool blends = std::isfinite(a.mean_from) && *s.budget < row.n;
        if (blends && a.block_table) sum_pages(head, row, sum);
        else if (blends) sum_row(head, row, sum);
        for (int64_t g = 0; g < group; g++) merge_query(head, row, s, g, blends ? sum : nullptr);
    }

    // Sum of the values that a query sees: of all in its row, less those that later queries see and it does not.
    void sum_row(int64_t head, const Row& row, float* sum) const {
        const float* value_sum = head_of<float>(a.value_sum, head, a.sum_batch, a.sum_head);
        float later[MAX_HEAD_DIM] = {};
        if (row.end < row.later_end)
            sum_rows(head_of<T>(a.value, head, a.value_batch, a.value_head), std::max(row.end, row.first),
                     row.later_end, a.value_position, row.mask, dim, later);
        for (int64_t i = 0; i < dim; i++) sum[i] = value_sum[i] - later[i];
    }

    // The same of whole pages, one after the other, and of the rows behind them.
    void sum_pages(int64_t head, const Row& row, float* sum) const {
        constexpr int64_t AHEAD = 4;
        const int32_t* table = table_of(head);
        const float* sums = cached_of<float>(a.value_sum, head, a.sum_batch, a.sum_head);
        const T* values = cached_of<T>(a.value, head, a.value_batch, a.value_head);
        int64_t whole = row.end >> page_bits;
        std::fill_n(sum, dim, 0.f);
        for (int64_t p = 0; p < whole; p++) {
            if (p + AHEAD < whole)
                for (int64_t i = 0; i < dim; i += LINE / sizeof(float))
                    __builtin_prefetch(sums + table[p + AHEAD] * a.sum_batch + i);
            for (int64_t i = 0; i < dim; i++) sum[i] += sums[table[p] * a.sum_batch + i];
        }
        if (whole << page_bits == row.end) return;
        const T* rows = values + table[whole] * a.value_batch;
        float last[MAX_HEAD_DIM];
        sum_rows(rows, 0, row.end & (a.page - 1), a.value_position, nullptr, dim, last);
        for (int64_t i = 0; i < dim; i++) sum[i] += last[i];
    }

    // Joins the chunks of query g and writes its output.
    // value_sum: of what the query sees; null where no mean value is asked for.
    void merge_query(int64_t head, const Row& row, const Scratch& s, int64_t g, const float* value_sum) const {
        float out[MAX_HEAD_DIM] = {};
        int64_t chunks = (*s.budget + CHUNK - 1) / CHUNK;
        bool everything = *s.budget == row.n;
        float highest = LOWEST, z = 0;
        for (int64_t c = 0; c < chunks; c++) highest = std::max(highest, s.partial_max[c * group + g]);
        for (int64_t c = 0; c < chunks; c++)
            z += s.partial_sum[c * group + g] * power_of_two_or_zero(splat(s.partial_max[c * group + g] - highest))[0];
        float alpha = everything ? 1.f : s.mass[g];
        bool blend = value_sum && !(alpha < static_cast<float>(a.mean_from));
        float attended = blend ? alpha : 1.f;
        for (int64_t c = 0; c < chunks; c++) {
            const float* partial = s.partial + (c * group + g) * padded_dim;
            float share = power_of_two_or_zero(splat(s.partial_max[c * group + g] - highest))[0] / z * attended;
            for (int64_t i = 0; i < padded_dim; i += W) store(out + i, load(out + i) + load(partial + i) * share);
        }
        if (blend) {
            float share = (1 - attended) / static_cast<float>(row.n);
            for (int64_t i = 0; i < dim; i++) out[i] += share * value_sum[i];
        }
        int64_t result = result_index(head, group, g);
        a.alpha[result] = alpha;
        a.lse[result] = row.n ? (highest + std::log2(z)) / LOG2E : -INFINITE;
        T* output = static_cast<T*>(a.output) + result * dim;
        for (int64_t i = 0; i < dim; i++) narrow(out[i], output + i);
    }
};

// Tasks 0 .. count-1 shared out one by one: rows differ in length.  Each counter serves one phase.
template <class Task>
void share(std::atomic<int64_t>& next, int64_t count, const Task& task) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
}

bool rows_in_range(const Arguments& a) {
    for (int64_t b = 0; b < a.batch; b++) {
        int64_t length = a.length[b * a.length_batch];
        if (length < 0 || length > a.cached || (a.start && a.start[b * a.start_batch] < 0)) return false;
        for (int64_t p = 0; a.block_table && p * a.page < length; p++) {
            int64_t page = a.block_table[b * a.table_batch + p];
            if (page < 0 || page >= a.pages) return false;
        }
    }
    return true;
}

template <class T>
void encode(const EncodeArguments& a) {
    constexpr int64_t TOGETHER = 8;  // groups in a row that are one thread's
    int64_t tasks = (a.last - a.first + TOGETHER - 1) / TOGETHER;  // of each head
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(a.threads))
    share(next, a.batch * a.num_kv_heads * tasks, [&](int64_t i) {
        int64_t b = i / tasks / a.num_kv_heads, h = i / tasks % a.num_kv_heads;
        int64_t begin = a.first + i % tasks * TOGETHER, end = std::min(begin + TOGETHER, a.last);
        const T* key = static_cast<const T*>(a.key) + b * a.key_batch + h * a.key_head;
        uint8_t* codes = static_cast<uint8_t*>(a.codes) + b * a.codes_batch + h * a.codes_head;
        T* ranges = static_cast<T*>(a.ranges) + b * a.ranges_batch + h * a.ranges_head;
        for (int64_t group = begin; group < end; group++)
            encode_group<T>(key + group * GROUP * a.key_position, a.key_position, a.head_dim,
                            codes + group * a.head_dim * RUN, ranges + group * 2 * a.head_dim, group + 1 < end);
    });
}

// Rows of pages, what is kept of a page, and codes of a group: rows first, for the others are made of them.
template <class T>
class SlotWriter {
    const SlotArguments& a;
    static constexpr int64_t TOGETHER = 64;  // tokens whose components are written in one go

  public:
    explicit SlotWriter(const SlotArguments& arguments) : a(arguments) {}

    int64_t tasks() const { return a.num_kv_heads * ((a.tokens + TOGETHER - 1) / TOGETHER); }

    void write(int64_t task) const {
        int64_t h = task % a.num_kv_heads, begin = task / a.num_kv_heads * TOGETHER;
        int64_t end = std::min(begin + TOGETHER, a.tokens), count = 0;
        const T* from[TOGETHER];
        T* to[TOGETHER];
        for (int64_t t = begin; t < end; t++) {
            int64_t slot = a.slots[t * a.slots_token];
            if (slot < 0) continue;
            int64_t page = slot / a.page, s = slot % a.page;
            const T* new_key = static_cast<const T*>(a.new_key) + t * a.new_key_token + h * a.new_key_head;
            const T* new_value = static_cast<const T*>(a.new_value) + t * a.new_value_token + h * a.new_value_head;
            copy(new_key, a.new_key_component, key_page(page, h) + s * a.key_position);
            copy(new_value, a.new_value_component, value_page(page, h) + s * a.value_position);
            if (a.key_ranges) continue;
            from[count] = new_key;
            to[count++] = static_cast<T*>(a.key_components) + page * a.components_page + h * a.components_head + s;
        }
        for (int64_t c = 0; c < a.head_dim; c++)
            for (int64_t i = 0; i < count; i++) to[i][c * a.components_run] = from[i][c * a.new_key_component];
    }

    void complete(int64_t task) const {
        int64_t h = task % a.num_kv_heads, begin = task / a.num_kv_heads * TOGETHER;
        for (int64_t t = begin; t < std::min(begin + TOGETHER, a.tokens); t++) {
            int64_t slot = a.slots[t * a.slots_token];
            if (slot < 0) continue;
            int64_t page = slot / a.page, s = slot % a.page;
            if (s == a.page - 1)
                sum_rows(value_page(page, h), 0, a.page, a.value_position, nullptr, a.head_dim,
                         a.value_sum + page * a.sum_page + h * a.sum_head);
            if (a.key_ranges && s % GROUP == GROUP - 1) encode(page, h, s / GROUP);
        }
    }

  private:
    T* key_page(int64_t page, int64_t h) const {
        return static_cast<T*>(a.key) + page * a.key_page + h * a.key_head;
    }
    T* value_page(int64_t page, int64_t h) const {
        return static_cast<T*>(a.value) + page * a.value_page + h * a.value_head;
    }

    void copy(const T* from, int64_t stride, T* to) const {
        if (stride == 1) memcpy(to, from, a.head_dim * sizeof(T));
        else
            for (int64_t c = 0; c < a.head_dim; c++) to[c] = from[c * stride];
    }

    void encode(int64_t page, int64_t h, int64_t group) const {
        uint8_t* codes = static_cast<uint8_t*>(a.key_components) + page * a.components_page + h * a.components_head;
        T* ranges = static_cast<T*>(a.key_ranges) + page * a.ranges_page + h * a.ranges_head;
        encode_group<T>(key_page(page, h) + group * GROUP * a.key_position, a.key_position, a.head_dim,
                        codes + group * a.head_dim * RUN, ranges + group * 2 * a.head_dim);
    }
};

template <class T>
void append_slots(const SlotArguments& a) {
    SlotWriter<T> writer(a);
    std::atomic<int64_t> next[2] = {};
    int64_t threads = std::min(a.threads, a.tokens * a.num_kv_heads / 64 + 1);  // to wake them costs more than a few rows
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        share(next[0], writer.tasks(), [&](int64_t i) { writer.write(i); });
#pragma omp barrier
        share(next[1], writer.tasks(), [&](int64_t i) { writer.complete(i); });
    }
}

template <class T>
void decode(const Arguments& a) {
    static thread_local Arena arena;
    Stopwatch call;
    int64_t heads = a.batch * a.query_length * a.num_kv_heads;
    bool whole_heads = heads >= 4 * a.threads || a.threads == 1;
    Decoder<T> decoder(a, arena, !whole_heads);
    std::atomic<int64_t> next[7] = {}, threads{0};
    int64_t parts = (4 * a.threads + heads - 1) / heads, chunks = decoder.max_chunks();

#pragma omp parallel num_threads(static_cast<int>(a.threads))
    {
        FlushSubnormals flush;
        // Not OpenMP's own number: where two of its runtimes are loaded, the function may be the other one's.
        const int64_t slot = threads.fetch_add(1);
        share(next[0], a.batch * a.query_length, [&](int64_t i) { decoder.read_row(i); });
#pragma omp barrier
        if (whole_heads) {
            share(next[1], heads, [&](int64_t head) { decoder.whole_head(head, slot); });
        } else {
            share(next[1], heads, [&](int64_t head) { decoder.prepare(head); });
#pragma omp barrier
            share(next[2], heads * parts,
                  [&](int64_t i) { decoder.score(i / parts, decoder.part_begin(i % parts, parts),
                                                 decoder.part_begin(i % parts + 1, parts)); });
#pragma omp barrier
            share(next[3], heads * parts,
                  [&](int64_t i) { decoder.combine(i / parts, decoder.part_begin(i % parts, parts),
                                                   decoder.part_begin(i % parts + 1, parts)); });
#pragma omp barrier
            share(next[4], heads, [&](int64_t head) { decoder.select(head); });
#pragma omp barrier
            share(next[5], heads * chunks, [&](int64_t i) { decoder.attend(i / chunks, i % chunks); });
#pragma omp barrier
            share(next[6], heads, [&](int64_t head) { decoder.merge(head); });
        }
    }
    call.lap(6);
}

}  // namespace
}  // namespace sparq

#if defined(SPARQ_PHASES)
// What has been counted since the last time, into seven numbers.
extern "C" void sparq_take_phases(int64_t* nanoseconds) {
    for (int i = 0; i < 7; i++) nanoseconds[i] = sparq::phase_nanoseconds[i].exchange(0);
}
#endif

extern "C" int64_t sparq_arguments_size() { return sizeof(sparq::Arguments); }

extern "C" int64_t sparq_has_threads() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// 0 when done, 1 for a dtype it does not know, 2 when memory ran out, 3 when a row's length or start is out of range.
extern "C" int64_t sparq_decode(const sparq::Arguments* arguments) {
    using namespace sparq;
    if (!rows_in_range(*arguments)) return 3;
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

extern "C" int64_t sparq_encode_arguments_size() { return sizeof(sparq::EncodeArguments); }

// 0 when done, 1 for a dtype it does not know.
extern "C" int64_t sparq_encode(const sparq::EncodeArguments* arguments) {
    using namespace sparq;
    switch (arguments->dtype) {
        case 0: encode<float>(*arguments); return 0;
        case 1: encode<BFloat16>(*arguments); return 0;
        case 2: encode<Float16>(*arguments); return 0;
        default: return 1;
    }
}

extern "C" int64_t sparq_slot_arguments_size() { return sizeof(sparq::SlotArguments); }

// 0 when done, 1 for a dtype it does not know, 3 when a slot lies behind the pages.
extern "C" int64_t sparq_append_slots(const sparq::SlotArguments* arguments) {
    using namespace sparq;
    for (int64_t t = 0; t < arguments->tokens; t++)
        if (arguments->slots[t * arguments->slots_token] >= arguments->pages * arguments->page) return 3;
    switch (arguments->dtype) {
        case 0: append_slots<float>(*arguments); return 0;
        case 1: append_slots<BFloat16>(*arguments); return 0;
        case 2: append_slots<Float16>(*arguments); return 0;
        default: return 1;
    }
}
