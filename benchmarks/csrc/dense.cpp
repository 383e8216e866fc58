// Dense attention of one new token over a cache, with the same care as SparQ's kernel and its vectors: the opponent that
// says what sparsity gains over a good dense kernel.  Split over positions as in flash-decoding, so that few heads keep
// all cores busy too; softmax online, a block of positions at a time; each row of K and V read once for all queries of
// a GQA group; arithmetic in float32.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"

namespace sparq {
namespace {

// What Python hands over, already checked but for the lengths.  dense_cpu.py mirrors this struct field by field.
struct Arguments {
    const void* query;      // [B, Hq, 1, d]
    const void* key;        // [B, Hkv, S, d]
    const void* value;      // [B, Hkv, S, d]
    const int64_t* length;  // [B]
    void* output;           // [B, Hq, 1, d], contiguous
    int64_t threads;
    int64_t batch, num_kv_heads, group, head_dim, cached;
    // In elements.
    int64_t query_batch, query_head;
    int64_t key_batch, key_head, key_position;
    int64_t value_batch, value_head, value_position;
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    double scale;
};

constexpr int64_t BLOCK = 32;           // positions per step of the online softmax: its K and V fit the L1 cache
constexpr int64_t SHORTEST_PART = 256;  // positions; a shorter part does not pay for its merge
constexpr int64_t LINE = 64;            // bytes
static_assert(BLOCK % W == 0, "a block's logits are whole vectors");

struct alignas(LINE) Line { float x[LINE / sizeof(float)]; };

int64_t padded(int64_t floats) { return (floats + PAIR - 1) / PAIR * PAIR; }

template <int n>
struct Sum { Floats value = {}; };

template <int... n>
struct Sums : Sum<n>... {
    template <int i>
    SPARQ_INLINE Floats& at() { return Sum<i>::value; }
};

template <class T>
class Dense {
    const Arguments& a;
    const int64_t group, dim, pairs, width;  // width: floats of a row in pairs
    int64_t parts;                           // of each head
    int64_t partial_size, local_size;
    std::unique_ptr<Line[]> memory;

  public:
    explicit Dense(const Arguments& arguments)
        : a(arguments),
          group(a.group),
          dim(a.head_dim),
          pairs((a.head_dim + PAIR - 1) / PAIR),
          width(pairs * PAIR),
          parts(std::clamp<int64_t>((8 * a.threads + heads() - 1) / heads(), 1,
                                    std::max<int64_t>(a.cached / SHORTEST_PART, 1))),
          partial_size(padded(group * (width + 2))),
          local_size(padded(group * (width + BLOCK + 1))),
          memory(new Line[(heads() * parts * partial_size + a.threads * local_size) * sizeof(float) / LINE + 1]) {}

    int64_t heads() const { return a.batch * a.num_kv_heads; }
    int64_t tasks() const { return heads() * parts; }

    // Attention of one head's queries over one part of the positions.
    void attend(int64_t task, int64_t thread) const {
        int64_t head = task / parts, part = task % parts;
        int64_t b = head / a.num_kv_heads, h = head % a.num_kv_heads;
        const T* keys = static_cast<const T*>(a.key) + b * a.key_batch + h * a.key_head;
        const T* values = static_cast<const T*>(a.value) + b * a.value_batch + h * a.value_head;
        int64_t length = a.length[b], blocks = (length + BLOCK - 1) / BLOCK;
        int64_t begin = blocks * part / parts * BLOCK, end = std::min(blocks * (part + 1) / parts * BLOCK, length);

        float* queries = floats() + tasks() * partial_size + thread * local_size;
        float* weights = queries + group * width;
        float* rescale = weights + group * BLOCK;
        const T* query = static_cast<const T*>(a.query) + b * a.query_batch + h * group * a.query_head;
        for (int64_t g = 0; g < group; g++) prepare(query + g * a.query_head, queries + g * width);

        Partial p = partial(task);
        std::fill_n(p.sums, group * width, 0.f);
        std::fill_n(p.reference, group, LOWEST);
        std::fill_n(p.total, group, 0.f);
        for (int64_t from = begin; from < end; from += BLOCK) {
            int64_t count = std::min(BLOCK, end - from), next = std::min(BLOCK, end - from - count);
            const T *k = keys + from * a.key_position, *v = values + from * a.value_position;
            by_four([&](auto size, int64_t g) {
                constexpr int G = decltype(size)::value;
                logits<G>(k, g ? 0 : count, count, v, queries + g * width, weights + g * BLOCK);
            });
            for (int64_t g = 0; g < group; g++) {
                std::fill(weights + g * BLOCK + count, weights + (g + 1) * BLOCK, -INFINITE);
                exponentiate(weights + g * BLOCK, p.reference[g], p.total[g], rescale[g]);
            }
            by_four([&](auto size, int64_t g) {
                constexpr int G = decltype(size)::value;
                add_values<G>(v, count, k + count * a.key_position, g ? 0 : next, weights + g * BLOCK, rescale + g,
                              p.sums + g * width);
            });
        }
    }

    // Joins the parts of a head and writes its output.
    void merge(int64_t head) const {
        for (int64_t g = 0; g < group; g++) {
            float highest = LOWEST, total = 0;
            for (int64_t i = 0; i < parts; i++) highest = std::max(highest, partial(head * parts + i).reference[g]);
            for (int64_t i = 0; i < parts; i++) total += partial(head * parts + i).total[g] * share(head, i, g, highest);
            T* output = static_cast<T*>(a.output) + (head * group + g) * dim;
            for (int64_t pair = 0; pair < pairs; pair++) {
                Floats x = {}, y = {};
                for (int64_t i = 0; i < parts; i++) {
                    const float* sums = partial(head * parts + i).sums + g * width + pair * PAIR;
                    float factor = share(head, i, g, highest) / total;
                    x += load(sums) * factor;
                    y += load(sums + W) * factor;
                }
                float ordered[PAIR];
                store_pair<T>(ordered, x, y);
                int64_t from = offset(pair), count = std::min(PAIR, dim);
                for (int64_t i = 0; i < count; i++) narrow(ordered[i], output + from + i);
            }
        }
    }

  private:
    // What a part leaves behind: sums of values times weights (not normalised), and the weights' integer reference
    // exponent and total.
    struct Partial { float *sums, *reference, *total; };

    float* floats() const { return memory[0].x; }

    Partial partial(int64_t task) const {
        float* sums = floats() + task * partial_size;
        return {sums, sums + group * width, sums + group * width + group};
    }

    float share(int64_t head, int64_t part, int64_t g, float highest) const {
        return power_of_two_or_zero(splat(partial(head * parts + part).reference[g] - highest))[0];
    }

    // Queries share each row they load: up to four at a time.
    template <class Task>
    void by_four(const Task& task) const {
        for (int64_t g = 0; g < group; g += 4) switch (group - g) {
            case 1: task(std::integral_constant<int, 1>(), g); break;
            case 2: task(std::integral_constant<int, 2>(), g); break;
            case 3: task(std::integral_constant<int, 3>(), g); break;
            default: task(std::integral_constant<int, 4>(), g); break;
        }
    }

    // Where a pair of vectors begins in a row.  The last pair ends with the row, so it may overlap the one before.
    int64_t offset(int64_t pair) const { return std::max<int64_t>(std::min(pair * PAIR, dim - PAIR), 0); }

    SPARQ_INLINE void load_dims(const T* row, int64_t pair, Floats& x, Floats& y) const {
        if (dim >= PAIR) load_pair(row + offset(pair), x, y);
        else load_pair_part(row, dim, x, y);
    }

    // Scaled for exponents of 2, as pairs; elements that two pairs share are zero in the second.
    void prepare(const T* query, float* out) const {
        for (int64_t pair = 0; pair < pairs; pair++) {
            T elements[PAIR] = {};
            int64_t first = offset(pair);
            for (int64_t i = pair * PAIR; i < std::min((pair + 1) * PAIR, dim); i++) elements[i - first] = query[i];
            Floats x, y;
            load_pair(elements, x, y);
            store(out + pair * PAIR, x * static_cast<float>(a.scale * LOG2E));
            store(out + pair * PAIR + W, y * static_cast<float>(a.scale * LOG2E));
        }
    }

    static SPARQ_INLINE void prefetch(const T* row, int64_t elements) {
        const char* bytes = reinterpret_cast<const char*>(row);
        for (int64_t i = 0; i < int64_t(elements * sizeof(T)); i += LINE) __builtin_prefetch(bytes + i);
    }

    // dots[g * ROWS + j] = vector of sums of products of query g and row j.  Every sum is named, as GCC 12 would keep an
    // array in memory.
    template <int G, int... n>
    SPARQ_INLINE void add_products(const T* const* rows, const float* queries, Floats* dots,
                                   std::integer_sequence<int, n...>) const {
        constexpr int ROWS = W / G;
        Sums<n...> sums;
        for (int64_t pair = 0; pair < pairs; pair++) {
            Floats x[ROWS], y[ROWS];
            for (int j = 0; j < ROWS; j++) load_dims(rows[j], pair, x[j], y[j]);
            const float* query = queries + pair * PAIR;
            ((sums.template at<n>() += x[n % ROWS] * load(query + n / ROWS * width)), ...);
            ((sums.template at<n>() += y[n % ROWS] * load(query + n / ROWS * width + W)), ...);
        }
        ((dots[n] = sums.template at<n>()), ...);
    }

    // out[g][i] = query g . key i, for `count` keys; meanwhile the first `ahead` rows of `values` are fetched.  W dot
    // products at a time end in one vector.
    template <int G>
    void logits(const T* keys, int64_t ahead, int64_t count, const T* values, const float* queries, float* out) const {
        constexpr int ROWS = W / G;
        for (int64_t i = 0; i < count; i += ROWS) {
            const T* rows[ROWS];
            for (int j = 0; j < ROWS; j++) {
                rows[j] = keys + std::min(i + j, count - 1) * a.key_position;
                if (i + j < ahead) prefetch(values + (i + j) * a.value_position, dim);
            }
            Floats dots[W];
            std::fill_n(dots, W, Floats{});
            add_products<G>(rows, queries, dots, std::make_integer_sequence<int, G * ROWS>());
            float sums[W];
            store(sums, horizontal_sums(dots));
            int64_t rows_left = std::min<int64_t>(ROWS, count - i);
            for (int g = 0; g < G; g++) memcpy(out + g * BLOCK + i, sums + g * ROWS, rows_left * sizeof(float));
        }
    }

    // In place: a block's x become 2^(x - reference), the reference no lower than before.  `rescale` is what earlier
    // weights have to be multiplied by.
    static SPARQ_INLINE void exponentiate(float* x, float& reference, float& total, float& rescale) {
        Floats highest = splat(LOWEST), sum = {};
        for (int64_t i = 0; i < BLOCK; i += W) highest = max(load(x + i), highest);
        float top = std::max(reference, round_to_int(horizontal_max(highest)));
        rescale = power_of_two_or_zero(splat(reference - top))[0];
        for (int64_t i = 0; i < BLOCK; i += W) {
            Floats weight = exp2_scaled(load(x + i), top);
            sum += weight;
            store(x + i, weight);
        }
        total = total * rescale + horizontal_sum(sum);
        reference = top;
    }

    // sums[g] = sums[g] * rescale[g] + sum of weights[g][i] * value i; meanwhile the first `ahead` rows of `keys` are
    // fetched.
    template <int G>
    void add_values(const T* values, int64_t count, const T* keys, int64_t ahead, const float* weights,
                    const float* rescale, float* sums) const {
        constexpr int TOGETHER = W < 16 ? 1 : G > 2 ? 2 : 4;  // pairs of vectors whose sums the registers hold
        int64_t pair = 0;
        for (; pair + TOGETHER <= pairs; pair += TOGETHER, ahead = 0)
            add_columns<G, TOGETHER>(values, count, keys, ahead, weights, rescale, sums, pair);
        for (; pair < pairs; pair++, ahead = 0)
            add_columns<G, 1>(values, count, keys, ahead, weights, rescale, sums, pair);
    }

    template <int G, int PAIRS>
    void add_columns(const T* values, int64_t count, const T* keys, int64_t ahead, const float* weights,
                     const float* rescale, float* sums, int64_t pair) const {
        Floats sum[G * 2 * PAIRS];
        for (int n = 0; n < G * 2 * PAIRS; n++) sum[n] = Floats{};
        for (int64_t i = 0; i < count; i++) {
            if (i < ahead) prefetch(keys + i * a.key_position, dim);
            Floats x[2 * PAIRS];
            for (int p = 0; p < PAIRS; p++)
                load_dims(values + i * a.value_position, pair + p, x[2 * p], x[2 * p + 1]);
            for (int g = 0; g < G; g++)
                for (int p = 0; p < 2 * PAIRS; p++) sum[g * 2 * PAIRS + p] += x[p] * weights[g * BLOCK + i];
        }
        for (int g = 0; g < G; g++)
            for (int p = 0; p < 2 * PAIRS; p++) {
                float* out = sums + g * width + pair * PAIR + p * W;
                store(out, load(out) * rescale[g] + sum[g * 2 * PAIRS + p]);
            }
    }
};

bool lengths_in_range(const Arguments& a) {
    return std::all_of(a.length, a.length + a.batch, [&](int64_t length) { return 1 <= length && length <= a.cached; });
}

// Tasks are shared out one by one: rows differ in length.
template <class T>
void attention(const Arguments& a) {
    Dense<T> dense(a);
    std::atomic<int64_t> threads{0}, next_part{0}, next_head{0};
#pragma omp parallel num_threads(static_cast<int>(a.threads))
    {
        FlushSubnormals flush;
        const int64_t slot = threads.fetch_add(1);
        for (int64_t i; (i = next_part.fetch_add(1)) < dense.tasks();) dense.attend(i, slot);
#pragma omp barrier
        for (int64_t i; (i = next_head.fetch_add(1)) < dense.heads();) dense.merge(i);
    }
}

}  // namespace
}  // namespace sparq

extern "C" int64_t dense_arguments_size() { return sizeof(sparq::Arguments); }

// 0 when done, 1 for a dtype it does not know, 2 when memory ran out, 3 when a length is out of range.
extern "C" int64_t dense_attention(const void* arguments) {
    using namespace sparq;
    const Arguments& a = *static_cast<const Arguments*>(arguments);
    if (!lengths_in_range(a)) return 3;
    try {
        switch (a.dtype) {
            case 0: attention<float>(a); return 0;
            case 1: attention<BFloat16>(a); return 0;
            case 2: attention<Float16>(a); return 0;
            default: return 1;
        }
    } catch (const std::bad_alloc&) {
        return 2;
    }
}
