/* What both ways of attention share: a task's memory, the softmax, and what is fetched meanwhile. */
#ifndef BASCULE_ATTENTION_H
#define BASCULE_ATTENTION_H

#include <math.h>
#include <string.h>

#include "native.h"

enum { TILE = 6 };  /* query rows at a time: 24 of 32 registers hold scores, then outputs */

#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* A task's working memory; `rows` are QUERIES times the heads of a group. */
typedef struct {
    bf16 *keys;  /* [head_dim / 2][KEYS][2] */
    bf16 *values;  /* [KEYS / 2][head_dim][2] */
    bf16 *query;  /* [rows][head_dim] */
    float *scores;  /* [rows][KEYS], where keys are not packed */
    bf16 *weights;  /* [rows][KEYS], likewise */
    float *decay;  /* [rows], likewise */
    float *output;  /* [rows][head_dim] */
    float *maximum, *total;  /* [rows], of scores times log2(e) / sqrt(head_dim) */
    int32_t *limit;  /* [rows] tokens of the context that the row sees */
} Work;

static const uint16_t pair_order[2][32] = {{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
                                           {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                            24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};

ALWAYS __m512bh pair_of(const bf16 *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* Memory that will be read soon, in the order in which it will be: row after row, in lines of 64 bytes. A line that is
 * asked for when too many are on their way already may never come, so they are asked for one by one, beside the work. */
typedef struct {
    const bf16 *const *row;
    int from, numbers;  /* the next line, and the end, of a row */
} Feed;

ALWAYS void fetch(Feed *feed, int lines) {
    for (int i = 0; i < lines; i++) {
        _mm_prefetch(*feed->row + feed->from, _MM_HINT_T0);
        feed->from += 32;
        if (feed->from == feed->numbers) feed->from = 0, feed->row++;
    }
}

/* Softmax of `count` rows of scores, of which the keys from `first` to the rows' limits count: leaves the weights in
 * bfloat16, and in `decay` what the rows' former outputs are to be multiplied by. Fetches `lines` of `feed` a row. */
ALWAYS void weigh(const int count, const Work *work, int row, int first, float scale, __m512 scores[TILE][4], bf16 weights[TILE][KEYS],
                  float decay[TILE], Feed *feed, int lines) {
    UNROLL for (int r = 0; r < count; r++) {
        fetch(feed, lines);
        int seen = work->limit[row + r] - first;
        uint64_t visible = seen >= KEYS ? ~0ull : seen <= 0 ? 0 : (1ull << seen) - 1;
        __m512 top = _mm512_set1_ps(-INFINITY);
        UNROLL for (int c = 0; c < 4; c++) {
            scores[r][c] = _mm512_mul_ps(scores[r][c], _mm512_set1_ps(scale));
            top = _mm512_mask_max_ps(top, (__mmask16)(visible >> 16 * c), top, scores[r][c]);
        }
        float before = work->maximum[row + r], now = fmaxf(before, _mm512_reduce_max_ps(top));
        __m512 sum = _mm512_setzero_ps();
        UNROLL for (int c = 0; c < 4; c++) {
            __m512 weight = exp2_of(_mm512_sub_ps(scores[r][c], _mm512_set1_ps(now)));
            weight = _mm512_maskz_mov_ps((__mmask16)(visible >> 16 * c), weight);
            sum = _mm512_add_ps(sum, weight);
            _mm256_storeu_si256((__m256i *)(weights[r] + 16 * c), to_bf16(weight));
        }
        decay[r] = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(before - now)));
        work->maximum[row + r] = now;
        work->total[row + r] = work->total[row + r] * decay[r] + _mm512_reduce_add_ps(sum);
    }
}

/* KEYS tokens of the context for a task of few rows, `count` (up to TILE) for each of its heads: keys and values are read
 * where they lie, `token` says where the keys are, and values are `values` numbers behind. `soon` are the next KEYS. */
void attend_few(int count, const Work *work, int heads, const bf16 *const token[KEYS], const bf16 *const soon[KEYS], int64_t values, int first,
                int dim, float scale);

#endif
