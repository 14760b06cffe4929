/* Attention where each key head has few query rows, as in decode: what counts is the speed of memory, so keys and values
 * are read once, where they lie, nearly in their order, and asked for well before. */
#include "attention.h"

enum { PART = 16 };  /* tokens of the context that are read side by side */
enum { SOON = 32 };  /* how many tokens before it is read memory is asked for */

/* Lanes of four vectors, summed up to one in each quarter. */
ALWAYS __m512 sum_quarters(const __m512 x[4]) {
    __m512 even = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 odd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(even, odd, 0x44), _mm512_shuffle_ps(even, odd, 0xee));
}

/* The quarters of four such vectors summed: of the sixteen vectors before, one lane each, in order. */
ALWAYS __m512 sum_all(const __m512 x[4]) {
    __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
    __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
}

/* Scores of PART tokens whose keys are read where they lie, each a sum over the lanes of one product. */
ALWAYS void score_part(const int count, const Work *work, const bf16 *const token[PART], int64_t place, int row, const int dim, float *to,
                       Feed *feed) {
    const bf16 *query = work->query + (int64_t)row * dim;
    __m512 quarters[TILE][4];
    UNROLL for (int q = 0; q < 4; q++) {
        UNROLL for (int r = 0; r < count; r++) {
            __m512 sums[4];
            UNROLL for (int i = 0; i < 4; i++) {
                sums[i] = _mm512_setzero_ps();
                for (int d = 0; d < dim; d += 32) {
                    __m512bh key = (__m512bh)_mm512_loadu_si512(token[4 * q + i] + place + d);
                    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(query + r * dim + d), key);
                }
            }
            quarters[r][q] = sum_quarters(sums);
        }
        fetch(feed, 3 * dim / 32);
    }
    UNROLL for (int r = 0; r < count; r++) _mm512_storeu_ps(to + r * KEYS, sum_all(quarters[r]));
}

/* As `add_values`, of PART values where they lie. */
ALWAYS void add_part(const int count, const int width, const Work *work, const bf16 *const token[PART], int64_t place, int row, int from,
                     const int dim, const bf16 *weights, Feed *feed) {
    const __m512i lower = _mm512_loadu_si512(pair_order[0]), upper = _mm512_loadu_si512(pair_order[1]);
    float *output = work->output + (int64_t)row * dim + from;
    __m512 sums[TILE][4];
    UNROLL for (int r = 0; r < count; r++)
        UNROLL for (int c = 0; c < width; c++) sums[r][c] = _mm512_loadu_ps(output + r * dim + 16 * c);
    UNROLL for (int t = 0; t < PART; t += 2) {
        __m512bh values[4];
        UNROLL for (int c = 0; c < width; c += 2) {
            __m512i one = _mm512_loadu_si512(token[t] + place + from + 16 * c);
            __m512i two = _mm512_loadu_si512(token[t + 1] + place + from + 16 * c);
            values[c] = (__m512bh)_mm512_permutex2var_epi16(one, lower, two);
            values[c + 1] = (__m512bh)_mm512_permutex2var_epi16(one, upper, two);
        }
        fetch(feed, 3 * width / 4);
        UNROLL for (int r = 0; r < count; r++) {
            __m512bh both = pair_of(weights + r * KEYS + t);
            UNROLL for (int c = 0; c < width; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], both, values[c]);
        }
    }
    UNROLL for (int r = 0; r < count; r++)
        UNROLL for (int c = 0; c < width; c++) _mm512_storeu_ps(output + r * dim + 16 * c, sums[r][c]);
}

/* KEYS tokens for all heads of a task of few rows, `count` a head. Keys, then values are read PART tokens at a time for
 * all heads, nearly in the order in which they lie. What comes SOON tokens later is asked for meanwhile: three eighths
 * beside the scores, a quarter beside the softmax, the rest beside the values. */
ALWAYS void all_heads(const int count, const Work *work, int heads, const bf16 *const token[KEYS], const bf16 *const soon[KEYS], int64_t values,
                      int first, const int dim, float scale) {
    const bf16 *rows[2 * KEYS];
    for (int i = 0; i < KEYS; i++) {
        rows[i] = i < KEYS - SOON ? token[i + SOON] : token[i + SOON - KEYS] + values;
        rows[KEYS + i] = i < KEYS - SOON ? token[i + SOON] + values : soon[i + SOON - KEYS];
    }
    Feed feed = {rows, 0, heads * dim};
    for (int part = 0; part < KEYS; part += PART)
        for (int h = 0; h < heads; h++)
            score_part(count, work, token + part, h * dim, h * count, dim, work->scores + h * count * KEYS + part, &feed);
    for (int h = 0; h < heads; h++) {
        __m512 scores[TILE][4];
        UNROLL for (int r = 0; r < count; r++)
            UNROLL for (int c = 0; c < 4; c++) scores[r][c] = _mm512_loadu_ps(work->scores + (h * count + r) * KEYS + 16 * c);
        weigh(count, work, h * count, first, scale, scores, (bf16(*)[KEYS])work->weights + h * count, work->decay + h * count, &feed, dim / count);
    }
    for (int row = 0; row < heads * count; row++)
        for (int d = 0; d < dim; d += 16) {
            float *output = work->output + row * dim + d;
            _mm512_storeu_ps(output, _mm512_mul_ps(_mm512_loadu_ps(output), _mm512_set1_ps(work->decay[row])));
        }
    for (int part = 0; part < KEYS; part += PART)
        for (int h = 0; h < heads; h++) {
            const bf16 *weights = work->weights + h * count * KEYS + part;
            int from = 0;
            for (; from + 64 <= dim; from += 64)
                add_part(count, 4, work, token + part, values + h * dim, h * count, from, dim, weights, &feed);
            if (from < dim) add_part(count, 2, work, token + part, values + h * dim, h * count, from, dim, weights, &feed);
        }
    while (feed.row < rows + 2 * KEYS) fetch(&feed, 1);
}

void attend_few(int count, const Work *work, int heads, const bf16 *const token[KEYS], const bf16 *const soon[KEYS], int64_t values, int first,
                int dim, float scale) {
    switch (2 * count + (dim == 64)) {
#define CASE(n)                                                                                    \
    case 2 * n: all_heads(n, work, heads, token, soon, values, first, dim, scale); break;          \
    case 2 * n + 1: all_heads(n, work, heads, token, soon, values, first, 64, scale); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}
