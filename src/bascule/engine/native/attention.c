/* Attention of a step's tokens over KV in place: the context is taken KEYS tokens at a time, wherever its runs lie,
 * with the softmax kept up to date as in FlashAttention. A task is up to QUERIES tokens of one sequence and one key
 * head; the query heads that share the key head are rows of one product, so that keys are read once for all of them. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "attention.h"

static int64_t carve(const Model *m, uint8_t *at, Work *work) {
    int64_t rows = QUERIES * (m->heads / m->kv_heads), dim = m->head_dim, used = 0;
#define TAKE(field, bytes) work->field = (void *)(at + used), used += ((bytes) + 63) / 64 * 64
    TAKE(keys, KEYS * dim * 2);
    TAKE(values, KEYS * dim * 2);
    TAKE(query, rows * dim * 2);
    TAKE(scores, rows * KEYS * 4);
    TAKE(weights, rows * KEYS * 2);
    TAKE(decay, rows * 4);
    TAKE(output, rows * dim * 4);
    TAKE(maximum, rows * 4);
    TAKE(total, rows * 4);
    TAKE(limit, rows * 4);
#undef TAKE
    return used;
}

int64_t attention_scratch(const Model *model) {
    Work unused;
    return carve(model, NULL, &unused);
}

/* Sixteen rows of sixteen 32-bit numbers become sixteen columns. */
ALWAYS void transpose(__m512i r[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Keys with pairs of their dimensions side by side for all tokens. */
static void pack_keys(const bf16 *const token[KEYS], int from, int dim, bf16 *to) {
    for (int first = 0; first < KEYS; first += 16)
        for (int d = 0; d < dim; d += 32) {
            __m512i rows[16];
            UNROLL for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(token[first + i] + from + d);
            transpose(rows);
            UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + ((d / 2 + i) * KEYS + first) * 2, rows[i]);
        }
}

/* Values with pairs of tokens side by side for all dimensions. */
static void pack_values(const bf16 *const token[KEYS], int64_t from, int dim, bf16 *to) {
    const __m512i lower = _mm512_loadu_si512(pair_order[0]), upper = _mm512_loadu_si512(pair_order[1]);
    for (int pair = 0; pair < KEYS / 2; pair++)
        for (int d = 0; d < dim; d += 32) {
            __m512i first = _mm512_loadu_si512(token[2 * pair] + from + d);
            __m512i second = _mm512_loadu_si512(token[2 * pair + 1] + from + d);
            bf16 *at = to + (pair * dim + d) * 2;
            _mm512_storeu_si512(at, _mm512_permutex2var_epi16(first, lower, second));
            _mm512_storeu_si512(at + 32, _mm512_permutex2var_epi16(first, upper, second));
        }
}

/* Scores against packed keys. */
ALWAYS void score(const int count, const Work *work, int row, int dim, __m512 scores[TILE][4]) {
    UNROLL for (int r = 0; r < count; r++) UNROLL for (int c = 0; c < 4; c++) scores[r][c] = _mm512_setzero_ps();
    const bf16 *query = work->query + (int64_t)row * dim;
    for (int d = 0; d < dim; d += 2) {
        __m512bh keys[4];
        UNROLL for (int c = 0; c < 4; c++) keys[c] = (__m512bh)_mm512_loadu_si512(work->keys + d * KEYS + c * 32);
        UNROLL for (int r = 0; r < count; r++) {
            __m512bh pair = pair_of(query + r * dim + d);
            UNROLL for (int c = 0; c < 4; c++) scores[r][c] = _mm512_dpbf16_ps(scores[r][c], pair, keys[c]);
        }
    }
}

/* Adds the weighted values to `count` rows of the output, `width` times 16 dimensions from `from` on. */
ALWAYS void add_values(const int count, const int width, const Work *work, int row, int from, int dim, bf16 weights[TILE][KEYS], const float decay[TILE]) {
    __m512 sums[TILE][4];
    float *output = work->output + (int64_t)row * dim + from;
    UNROLL for (int r = 0; r < count; r++)
        UNROLL for (int c = 0; c < width; c++)
            sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(output + r * dim + 16 * c), _mm512_set1_ps(decay[r]));
    for (int pair = 0; pair < KEYS / 2; pair++) {
        __m512bh values[4];
        UNROLL for (int c = 0; c < width; c++)
            values[c] = (__m512bh)_mm512_loadu_si512(work->values + (pair * dim + from) * 2 + c * 32);
        UNROLL for (int r = 0; r < count; r++) {
            __m512bh both = pair_of(weights[r] + 2 * pair);
            UNROLL for (int c = 0; c < width; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], both, values[c]);
        }
    }
    UNROLL for (int r = 0; r < count; r++)
        UNROLL for (int c = 0; c < width; c++) _mm512_storeu_ps(output + r * dim + 16 * c, sums[r][c]);
}

ALWAYS void tile(const int count, const Work *work, int row, int first, int dim, float scale) {
    bf16 weights[TILE][KEYS] __attribute__((aligned(64)));
    float decay[TILE];
    __m512 scores[TILE][4];
    score(count, work, row, dim, scores);
    weigh(count, work, row, first, scale, scores, weights, decay, NULL, 0);
    int from = 0;
    for (; from + 64 <= dim; from += 64) add_values(count, 4, work, row, from, dim, weights, decay);
    if (from < dim) add_values(count, 2, work, row, from, dim, weights, decay);
}

static void any_tile(int count, const Work *work, int row, int first, int dim, float scale) {
    switch (count) {
#define CASE(n) case n: tile(n, work, row, first, dim, scale); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

/* Where a walk through the runs of a sequence's context stands. */
typedef struct {
    const int64_t *start;
    const int32_t *count;
    int32_t used;
} Walk;

static Walk walk_through(const Step *step, int sequence) {
    int first = step->first_run[sequence];
    return (Walk){step->run_start + first, step->run_count + first, 0};
}

/* The keys of the next tokens, KEYS of the `left`; places after the last repeat the first, whose weight will be 0. */
static void next_tokens(Walk *walk, int left, const bf16 *keys, int64_t token_numbers, const bf16 *token[KEYS]) {
    int wanted = left < KEYS ? left : KEYS;
    for (int i = 0; i < wanted; i++) {
        while (walk->used == *walk->count) walk->start++, walk->count++, walk->used = 0;
        token[i] = keys + (*walk->start + walk->used++) * token_numbers;
    }
    for (int i = wanted; i < KEYS; i++) token[i] = token[0];
}

/* Up to QUERIES tokens of one sequence, from row `first` of the step on, and some of its key heads. */
typedef struct {
    int sequence, head, heads, first, count;
} Task;

/* A task's rows are ordered by key head, then token, then query head of the group. */
static void load_queries(const Model *m, const Step *step, const Task *task, const Work *work, const bf16 *query) {
    int group = m->heads / m->kv_heads, dim = m->head_dim, row = 0;
    for (int h = task->head; h < task->head + task->heads; h++)
        for (int t = task->first; t < task->first + task->count; t++)
            for (int g = 0; g < group; g++, row++) {
                memcpy(work->query + row * dim, query + ((int64_t)t * m->heads + h * group + g) * dim, dim * sizeof(bf16));
                work->limit[row] = step->position[t] + 1;
                work->maximum[row] = -INFINITY;
                work->total[row] = 0.0f;
            }
    memset(work->output, 0, (size_t)row * dim * sizeof(float));
}

static void store_outputs(const Model *m, const Task *task, const Work *work, bf16 *to) {
    int group = m->heads / m->kv_heads, dim = m->head_dim, row = 0;
    for (int h = task->head; h < task->head + task->heads; h++)
        for (int t = task->first; t < task->first + task->count; t++)
            for (int g = 0; g < group; g++, row++) {
                bf16 *at = to + ((int64_t)t * m->heads + h * group + g) * dim;
                __m512 share = _mm512_set1_ps(1.0f / work->total[row]);
                for (int d = 0; d < dim; d += 16) {
                    __m512 output = _mm512_loadu_ps(work->output + row * dim + d);
                    _mm256_storeu_si256((__m256i *)(at + d), to_bf16(_mm512_mul_ps(output, share)));
                }
            }
}

static void run(const Model *m, const Step *step, int layer, const bf16 *query, bf16 *to, const Task *task, uint8_t *scratch) {
    Work work;
    carve(m, scratch, &work);
    int dim = m->head_dim, rows = task->count * (m->heads / m->kv_heads);
    int context = step->position[task->first + task->count - 1] + 1;
    int64_t numbers = (int64_t)m->kv_heads * dim;  /* from one token to the next */
    float scale = 1.44269504f / sqrtf((float)dim);
    const bf16 *keys = step->kv + 2 * layer * step->plane + task->head * dim, *places[2][KEYS];
    Walk walk = walk_through(step, task->sequence);
    load_queries(m, step, task, &work, query);
    next_tokens(&walk, context, keys, numbers, places[0]);
    for (int at = 0, now = 0; at < context; at += KEYS, now ^= 1) {
        const bf16 **token = places[now], **soon = places[now ^ 1];
        if (at + KEYS < context) {
            next_tokens(&walk, context - at - KEYS, keys, numbers, soon);
        } else if (task->sequence + m->threads < step->sequences) {  /* this thread's next task, likely */
            int next = task->sequence + m->threads;
            walk = walk_through(step, next);
            next_tokens(&walk, step->position[step->first_row[next + 1] - 1] + 1, keys, numbers, soon);
        } else {
            soon = token;
        }
        if (rows <= TILE) {
            attend_few(rows, &work, task->heads, token, soon, step->plane, at, dim, scale);
            continue;
        }
        for (int head = 0; head < task->heads; head++) {
            pack_keys(token, head * dim, dim, work.keys);
            pack_values(token, step->plane + head * dim, dim, work.values);
            for (int part = 0; part < rows; part += TILE) {
                int size = rows - part < TILE ? rows - part : TILE, row = head * rows + part;
                if (work.limit[row + size - 1] > at) any_tile(size, &work, row, at, dim, scale);
            }
        }
    }
    store_outputs(m, task, &work, to);
}

void attend(const Model *m, const Step *step, int layer, const bf16 *query, bf16 *to, uint8_t *scratch) {
    int longest = 0;
    for (int s = 0; s < step->sequences; s++) {
        int tokens = step->first_row[s + 1] - step->first_row[s];
        if (tokens > longest) longest = tokens;
    }
    /* All heads in one task read memory in one stream; one head a task shares long prompts out and fits the cache. */
    int heads = longest * m->kv_heads <= QUERIES && step->sequences >= m->threads ? m->kv_heads : 1;
#pragma omp for collapse(3) schedule(dynamic, 1)
    for (int sequence = 0; sequence < step->sequences; sequence++)
        for (int head = 0; head < m->kv_heads; head += heads)
            for (int part = 0; part < (longest + QUERIES - 1) / QUERIES; part++) {
                int first = step->first_row[sequence] + part * QUERIES, left = step->first_row[sequence + 1] - first;
                Task task = {sequence, head, heads, first, left < QUERIES ? left : QUERIES};
                if (left > 0) run(m, step, layer, query, to, &task, scratch);
            }
}
