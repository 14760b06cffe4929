/* One step of the decoder, from token ids to logits. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "native.h"

/* The step's arrays in scratch memory, and this thread's own part of it. */
typedef struct {
    float *hidden;  /* [tokens, hidden] */
    float *projected;  /* [tokens, heads + 2 kv_heads, head_dim] */
    float *cosine, *sine;  /* [tokens, head_dim / 2] */
    bf16 *normed;  /* [tokens, hidden] */
    bf16 *query, *attended;  /* [tokens, heads, head_dim] */
    bf16 *gated;  /* [tokens, intermediate] */
    uint8_t *own;
} Arrays;

static int64_t own_bytes(const Model *m) {
    int64_t matmul = matmul_scratch(m), attention = attention_scratch(m);
    return ((matmul > attention ? matmul : attention) + 4095) / 4096 * 4096;
}

static int64_t carve(const Model *m, int64_t tokens, int thread, uint8_t *at, Arrays *arrays) {
    int64_t used = own_bytes(m) * m->threads, dim = m->head_dim, heads = m->heads + 2 * m->kv_heads;
    arrays->own = at + own_bytes(m) * thread;
#define TAKE(field, bytes) arrays->field = (void *)(at + used), used += ((bytes) + 63) / 64 * 64
    TAKE(hidden, tokens * m->hidden * 4);
    TAKE(projected, tokens * heads * dim * 4);
    TAKE(cosine, tokens * dim / 2 * 4);
    TAKE(sine, tokens * dim / 2 * 4);
    TAKE(normed, tokens * m->hidden * 2);
    TAKE(query, tokens * m->heads * dim * 2);
    TAKE(attended, tokens * m->heads * dim * 2);
    TAKE(gated, tokens * m->intermediate * 2);
#undef TAKE
    return used;
}

int64_t scratch_bytes(const Model *model, int64_t tokens) {
    Arrays unused;
    return carve(model, tokens, 0, NULL, &unused);
}

static __m512 norm_scale(const float *x, int size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += 16) {
        __m512 part = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    return _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
}

/* Row i of `to` is the RMS norm of row `rows[i]` of `from`, or of row i where `rows` is NULL. */
static void norm(const float *from, const int32_t *rows, int count, int size, const float *weight, float eps, bf16 *to) {
#pragma omp for schedule(static)
    for (int i = 0; i < count; i++) {
        const float *x = from + (int64_t)(rows ? rows[i] : i) * size;
        __m512 scale = norm_scale(x, size, eps);
        for (int k = 0; k < size; k += 16) {
            __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k), scale), _mm512_loadu_ps(weight + k));
            _mm256_storeu_si256((__m256i *)(to + (int64_t)i * size + k), to_bf16(scaled));
        }
    }
}

static void begin(const Model *m, const Step *step, const Arrays *a) {
    int half = m->head_dim / 2;
#pragma omp for schedule(static)
    for (int t = 0; t < step->tokens; t++) {
        embed_row(&m->embedding, step->token[t], a->hidden + (int64_t)t * m->hidden);
        for (int i = 0; i < half; i++) {
            float angle = (float)step->position[t] * m->frequencies[i];
            a->cosine[t * half + i] = cosf(angle);
            a->sine[t * half + i] = sinf(angle);
        }
    }
}

/* Number i of a head is paired with number i + head_dim / 2, and the pair turned by its angle (RoFormer). */
static void rotate(float *head, const float *weight, const float *cosine, const float *sine, int dim, float eps, bf16 *to) {
    __m512 scale = weight ? norm_scale(head, dim, eps) : _mm512_set1_ps(1.0f);
    int half = dim / 2;
    for (int i = 0; i < half; i += 16) {
        __m512 first = _mm512_loadu_ps(head + i), second = _mm512_loadu_ps(head + half + i);
        if (weight) {
            first = _mm512_mul_ps(_mm512_mul_ps(first, scale), _mm512_loadu_ps(weight + i));
            second = _mm512_mul_ps(_mm512_mul_ps(second, scale), _mm512_loadu_ps(weight + half + i));
        }
        __m512 c = _mm512_loadu_ps(cosine + i), s = _mm512_loadu_ps(sine + i);
        _mm256_storeu_si256((__m256i *)(to + i), to_bf16(_mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s))));
        _mm256_storeu_si256((__m256i *)(to + half + i), to_bf16(_mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s))));
    }
}

/* Queries turned, keys turned and stored, values stored. */
static void place(const Model *m, const Step *step, const Arrays *a, int layer) {
    const float *weight = m->layer[layer].head_norm;
    int dim = m->head_dim, heads = m->heads + m->kv_heads;
#pragma omp for schedule(static)
    for (int t = 0; t < step->tokens; t++) {
        float *from = a->projected + (int64_t)t * (heads + m->kv_heads) * dim;
        const float *cosine = a->cosine + t * (dim / 2), *sine = a->sine + t * (dim / 2);
        bf16 *keys = step->kv + 2 * layer * step->plane + step->slot[t] * m->kv_heads * dim, *values = keys + step->plane;
        for (int h = 0; h < heads; h++) {
            bf16 *to = h < m->heads ? a->query + ((int64_t)t * m->heads + h) * dim : keys + (h - m->heads) * dim;
            rotate(from + h * dim, weight ? weight + h * dim : NULL, cosine, sine, dim, m->norm_eps, to);
        }
        for (int i = 0; i < m->kv_heads * dim; i += 16)
            _mm256_storeu_si256((__m256i *)(values + i), to_bf16(_mm512_loadu_ps(from + heads * dim + i)));
    }
}

void forward(const Model *m, const Step *step) {
#pragma omp parallel num_threads(m->threads)
    {
        Arrays a;
        carve(m, step->tokens, omp_get_thread_num(), step->scratch, &a);
        int tokens = step->tokens, width = (m->heads + 2 * m->kv_heads) * m->head_dim;
        begin(m, step, &a);
        for (int index = 0; index < m->layers; index++) {
            const Layer *layer = m->layer + index;
            norm(a.hidden, NULL, tokens, m->hidden, layer->attention_norm, m->norm_eps, a.normed);
            matmul(&layer->query_key_value, a.normed, tokens, (Target){STORE, a.projected, width}, a.own);
            place(m, step, &a, index);
            attend(m, step, index, a.query, a.attended, a.own);
            matmul(&layer->attention_output, a.attended, tokens, (Target){ADD, a.hidden, m->hidden}, a.own);
            norm(a.hidden, NULL, tokens, m->hidden, layer->mlp_norm, m->norm_eps, a.normed);
            matmul(&layer->gate_up, a.normed, tokens, (Target){GATE, a.gated, m->intermediate}, a.own);
            matmul(&layer->down, a.gated, tokens, (Target){ADD, a.hidden, m->hidden}, a.own);
        }
        norm(a.hidden, step->drawn_row, step->drawn, m->hidden, m->norm, m->norm_eps, a.normed);
        matmul(&m->head, a.normed, step->drawn, (Target){STORE, step->logits, m->vocab}, a.own);
    }
}
