/* x [rows, inputs] times a packed matrix. Few rows read the weights once at the speed of memory; many run at that of
 * the multipliers, with quantised panels unpacked to bfloat16 first. */
#include <omp.h>
#include <string.h>

#include "native.h"

enum { TILE = 12 };  /* rows of x at a time: 24 of 32 registers hold sums */
enum { NIBBLE_TILE = 6 };  /* the same where each sum has another inside the group */
enum { DIRECT = 8 };  /* rows up to which nibbles are not unpacked first */
enum { AHEAD = 8192 };  /* bytes that few rows fetch in advance; nearer, the fetched come too late beside 8 rows */

#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 12")

static inline int64_t group_bytes(const Matrix *w) { return w->planes * 512 + 128; }

static inline int64_t panel_bytes(const Matrix *w) {
    return w->layout == BFLOAT16 ? (int64_t)w->inputs * PANEL * 2 : w->inputs / GROUP * group_bytes(w);
}

static inline __m512i nibble_table(int plane_is_high) {
    /* bfloat16 of 0..15, or of 16 * (0..7, -8..-1), twice: an index has five bits, of which the fifth is a stranger */
    static const bf16 low[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    static const bf16 high[16] = {0x0000, 0x4180, 0x4200, 0x4240, 0x4280, 0x42a0, 0x42c0, 0x42e0,
                                  0xc300, 0xc2e0, 0xc2c0, 0xc2a0, 0xc280, 0xc240, 0xc200, 0xc180};
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(plane_is_high ? high : low)));
}

ALWAYS void finish(__m512 left, __m512 right, const Matrix *w, int panel, Target target, int64_t row) {
    int column = panel * PANEL, valid = w->outputs - column;
    __mmask16 first = valid >= 16 ? 0xffff : (__mmask16)((1u << valid) - 1);
    __mmask16 second = valid >= 32 ? 0xffff : valid <= 16 ? 0 : (__mmask16)((1u << (valid - 16)) - 1);
    if (w->bias) {
        left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(first, w->bias + column));
        right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(second, w->bias + column + 16));
    }
    if (target.ending == GATE) {
        __m512 exponential = exp2_of(_mm512_min_ps(_mm512_mul_ps(left, _mm512_set1_ps(-1.44269504f)), _mm512_set1_ps(126.0f)));
        __m512 silu = _mm512_div_ps(left, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential));
        bf16 *to = (bf16 *)target.to + row * target.stride + panel * 16;
        _mm256_mask_storeu_epi16(to, first, to_bf16(_mm512_mul_ps(silu, right)));
        return;
    }
    float *to = (float *)target.to + row * target.stride + column;
    if (target.ending == ADD) {
        left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(first, to));
        right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(second, to + 16));
    }
    _mm512_mask_storeu_ps(to, first, left);
    if (second) _mm512_mask_storeu_ps(to + 16, second, right);
}

/* A pair of neighbouring inputs of one row, in all lanes. */
ALWAYS __m512bh pair_of(const bf16 *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* What a tile fetches meanwhile: `stride` bytes from `at` on for each pair of inputs. */
typedef struct {
    const uint8_t *at;
    int stride;
} Ahead;

/* One tile alone fetches what it will read soon itself; several share the next panel out, which none of them reads. */
static Ahead ahead_of(const Matrix *w, const uint8_t *panel_data, int tile, int tiles) {
    if (tiles == 1) return (Ahead){panel_data + AHEAD, 128};
    int stride = (128 + tiles - 1) / tiles;
    return (Ahead){panel_data + panel_bytes(w) + (int64_t)tile * stride * (w->inputs / 2), stride};
}

ALWAYS void tile(const int count, const uint8_t *panel_data, Ahead ahead, const Matrix *w, int panel, const bf16 *x, int64_t row, Target target) {
    __m512 sums[TILE][2];
    int64_t inputs = w->inputs;
    UNROLL for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 2, panel_data += 128, ahead.at += ahead.stride) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(panel_data), right = (__m512bh)_mm512_loadu_si512(panel_data + 64);
        _mm_prefetch(ahead.at, _MM_HINT_T0);
        if (ahead.stride > 64) _mm_prefetch(ahead.at + 64, _MM_HINT_T0);
        UNROLL for (int r = 0; r < count; r++) {
            __m512bh pair = pair_of(x + r * inputs + k);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, right);
        }
    }
    UNROLL for (int r = 0; r < count; r++) finish(sums[r][0], sums[r][1], w, panel, target, row + r);
}

/* `chains` sums in a group for each row and half keep the multipliers busy where rows are few. */
ALWAYS void nibble_tile(const int count, const int chains, const int planes, const Matrix *w, int panel, const bf16 *x,
                        const float *group_sums, int64_t row, Target target) {
    const uint8_t *data = w->data + panel * panel_bytes(w);
    const __m512i tables[2] = {nibble_table(0), nibble_table(1)};
    const int64_t inputs = w->inputs, groups = inputs / GROUP;
    __m512 sums[NIBBLE_TILE][2];
    UNROLL for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, x += GROUP) {
        __m512 inner[NIBBLE_TILE][2][4];
        UNROLL for (int r = 0; r < count; r++)
            UNROLL for (int c = 0; c < chains; c++) inner[r][0][c] = inner[r][1][c] = _mm512_setzero_ps();
        UNROLL for (int z = 0; z < 4; z++) {
            __m512i words[2][2];
            UNROLL for (int plane = 0; plane < planes; plane++)
                UNROLL for (int h = 0; h < 2; h++) {
                    const uint8_t *at = data + plane * 512 + h * 256 + z * 64;
                    words[plane][h] = _mm512_loadu_si512(at);
                    _mm_prefetch(at + AHEAD, _MM_HINT_T0);
                }
            UNROLL for (int i = 0; i < 4; i++) {
                __m512bh codes[2][2];
                UNROLL for (int plane = 0; plane < planes; plane++)
                    UNROLL for (int h = 0; h < 2; h++) {
                        __m512i index = _mm512_srli_epi16(words[plane][h], 4 * i);
                        codes[plane][h] = (__m512bh)_mm512_permutexvar_epi16(index, tables[plane]);
                    }
                UNROLL for (int r = 0; r < count; r++) {
                    __m512bh pair = pair_of(x + r * inputs + 8 * z + 2 * i);
                    UNROLL for (int plane = 0; plane < planes; plane++)
                        UNROLL for (int h = 0; h < 2; h++) {
                            __m512 *sum = &inner[r][h][(i + plane) % chains];
                            *sum = _mm512_dpbf16_ps(*sum, pair, codes[plane][h]);
                        }
                }
            }
        }
        data += planes * 512;
        UNROLL for (int h = 0; h < 2; h++) {
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(data + 32 * h)));
            __m512 offset = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(data + 64 + 32 * h)));
            _mm_prefetch(data + AHEAD + 64 * h, _MM_HINT_T0);
            UNROLL for (int r = 0; r < count; r++) {
                __m512 sum = inner[r][h][0];
                UNROLL for (int c = 1; c < chains; c++) sum = _mm512_add_ps(sum, inner[r][h][c]);
                sum = _mm512_fmadd_ps(sum, scale, sums[r][h]);
                sums[r][h] = _mm512_fmadd_ps(_mm512_set1_ps(group_sums[r * groups + g]), offset, sum);
            }
        }
        data += 128;
    }
    UNROLL for (int r = 0; r < count; r++) finish(sums[r][0], sums[r][1], w, panel, target, row + r);
}

static void any_tile(int count, const uint8_t *panel_data, Ahead ahead, const Matrix *w, int panel, const bf16 *x, int64_t row, Target target) {
    switch (count) {
#define CASE(n) case n: tile(n, panel_data, ahead, w, panel, x, row, target); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

static void any_nibble_tile(int count, const Matrix *w, int panel, const bf16 *x, const float *group_sums, int64_t row, Target target) {
    switch (count * 2 + w->planes - 1) {
#define CASE(n, chains)                                                                                  \
    case n * 2: nibble_tile(n, chains, 1, w, panel, x, group_sums, row, target); break;                     \
    case n * 2 + 1: nibble_tile(n, chains, 2, w, panel, x, group_sums, row, target); break;
        CASE(1, 4) CASE(2, 2) CASE(3, 2) CASE(4, 1) CASE(5, 1) CASE(6, 1)
#undef CASE
    }
}

/* The lower or upper half of sixteen float16 numbers, each twice. */
ALWAYS __m512 twice(const uint8_t *numbers, int upper) {
    const __m512i order = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    __m512 all = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)numbers));
    return _mm512_permutexvar_ps(_mm512_add_epi32(order, _mm512_set1_epi32(8 * upper)), all);
}

/* One panel of a quantised matrix as a BFLOAT16 panel, each weight rounded once. */
ALWAYS void unpack(const int planes, const Matrix *w, int panel, uint8_t *to) {
    const uint8_t *data = w->data + panel * panel_bytes(w);
    const __m512i ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = ascending, high = _mm512_slli_epi32(_mm512_srai_epi32(_mm512_slli_epi32(ascending, 28), 28), 4);
    const __m512 tables[2] = {_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high)};
    for (int g = 0; g < w->inputs / GROUP; g++, data += group_bytes(w), to += 2048) {
        const uint8_t *scales = data + planes * 512;
        for (int h = 0; h < 2; h++) {
            __m512 scale[2], offset[2];  /* for eight outputs each, with both inputs of a pair */
            UNROLL for (int part = 0; part < 2; part++) {
                scale[part] = twice(scales + 32 * h, part);
                offset[part] = twice(scales + 64 + 32 * h, part);
            }
            UNROLL for (int z = 0; z < 4; z++) {
                __m512i words[2][2];
                UNROLL for (int plane = 0; plane < planes; plane++)
                    UNROLL for (int part = 0; part < 2; part++) {
                        const uint8_t *at = data + plane * 512 + h * 256 + z * 64 + part * 32;
                        words[plane][part] = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
                    }
                UNROLL for (int i = 0; i < 4; i++) {
                    __m512 weights[2];
                    UNROLL for (int part = 0; part < 2; part++) {
                        __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(words[0][part], 4 * i), tables[0]);
                        if (planes == 2) {
                            __m512i index = _mm512_srli_epi32(words[1][part], 4 * i);
                            code = _mm512_add_ps(code, _mm512_permutexvar_ps(index, tables[1]));
                        }
                        weights[part] = _mm512_fmadd_ps(code, scale[part], offset[part]);
                    }
                    __m512bh rounded = _mm512_cvtne2ps_pbh(weights[1], weights[0]);
                    _mm512_storeu_si512(to + (4 * z + i) * 128 + h * 64, (__m512i)rounded);
                }
            }
        }
    }
}

/* The sum of each row's inputs over each group, which every offset is multiplied by. */
static void sum_groups(const bf16 *x, int64_t count, float *to) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t g = 0; g < count; g++) {
        __m512bh values = (__m512bh)_mm512_loadu_si512(x + g * GROUP);
        to[g] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), values, ones));
    }
}

static int widest(const Model *m) {
    int widest = m->hidden > m->intermediate ? m->hidden : m->intermediate;
    return widest > m->heads * m->head_dim ? widest : m->heads * m->head_dim;
}

/* For each thread: one unpacked panel, in which the group sums of DIRECT rows find room too. */
int64_t matmul_scratch(const Model *model) { return (int64_t)widest(model) * PANEL * 2; }

void matmul(const Matrix *w, const bf16 *x, int rows, Target target, uint8_t *scratch) {
    int panels = (w->outputs + PANEL - 1) / PANEL;
    int direct = w->layout == NIBBLES && rows <= DIRECT, most = direct ? NIBBLE_TILE : TILE;
    int tiles = (rows + most - 1) / most;
    int64_t groups = w->inputs / GROUP;
    if (direct) sum_groups(x, rows * groups, (float *)scratch);
#pragma omp for schedule(static)
    for (int panel = 0; panel < panels; panel++) {
        const uint8_t *data = w->data + panel * panel_bytes(w);
        if (w->layout == NIBBLES && !direct) {
            if (w->planes == 1) unpack(1, w, panel, scratch);
            else unpack(2, w, panel, scratch);
            data = scratch;
        }
        for (int t = 0; t < tiles; t++) {
            int64_t row = (int64_t)rows * t / tiles;
            int count = (int)((int64_t)rows * (t + 1) / tiles - row);
            if (direct)
                any_nibble_tile(count, w, panel, x + row * w->inputs, (float *)scratch + row * groups, row, target);
            else
                any_tile(count, data, ahead_of(w, w->data + panel * panel_bytes(w), t, tiles), w, panel, x + row * w->inputs, row, target);
        }
    }
}

/* Row `row` of the matrix in float32. */
void embed_row(const Matrix *w, int row, float *to) {
    const uint8_t *data = w->data + row / PANEL * panel_bytes(w);
    int lane = row % PANEL;
    for (int k = 0; k < w->inputs; k++) {
        if (w->layout == BFLOAT16) {
            uint32_t bits = (uint32_t)((const bf16 *)data)[(k / 2 * PANEL + lane) * 2 + k % 2] << 16;
            memcpy(to + k, &bits, 4);
            continue;
        }
        const uint8_t *group = data + k / GROUP * group_bytes(w);
        int within = k % GROUP, word = (lane / 16 * 4 + within / 8) * 32 + lane % 16 * 2 + within % 2;
        int code = 0;
        for (int plane = 0; plane < w->planes; plane++) {
            int nibble = ((const uint16_t *)(group + plane * 512))[word] >> (within % 8 / 2 * 4) & 15;
            code += plane ? (nibble < 8 ? nibble : nibble - 16) * 16 : nibble;
        }
        const uint16_t *scales = (const uint16_t *)(group + w->planes * 512);
        to[k] = code * _cvtsh_ss(scales[lane]) + _cvtsh_ss(scales[PANEL + lane]);
    }
}
