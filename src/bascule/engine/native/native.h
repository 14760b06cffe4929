/* The decoder of the Llama family for CPUs with AVX-512 and its bfloat16 instructions: what the parts share.
 *
 * Every function that takes a `Step` is called by all threads of one parallel region and shares its work out over
 * them; it returns when all of it is done. Numbers between the matrix products are float32, their inputs bfloat16. */
#ifndef BASCULE_NATIVE_H
#define BASCULE_NATIVE_H

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

enum { PANEL = 32 };  /* outputs of a matrix that are laid out side by side */
enum { GROUP = 32 };  /* inputs that share a scale and an offset in a quantised matrix */
enum { QUERIES = 64 };  /* tokens of one sequence that one attention task takes */
enum { KEYS = 64 };  /* tokens of the context that it takes at a time */

enum { BFLOAT16 = 0, NIBBLES = 1 };

/* A weight matrix [outputs, inputs], cut into panels of PANEL outputs, the last one padded with zeros.
 *
 * BFLOAT16: a panel is [inputs / 2][PANEL][2] numbers.
 * NIBBLES: a panel is a list of groups; a group is `planes` times [2 halves][4][16 outputs][2 inputs] words of four
 * nibbles, then PANEL scales and PANEL offsets in float16. Nibble i of word z belongs to the inputs 8z + 2i and
 * 8z + 2i + 1. One plane holds the codes 0 to 15; of two, the first holds the low halves of bytes, the second the high
 * halves, as two's complement. Weight = code * scale + offset. */
typedef struct {
    int32_t layout, planes;
    int32_t outputs, inputs;
    const uint8_t *data;
    const float *bias;  /* [outputs], or NULL */
} Matrix;

typedef struct {
    const float *attention_norm, *mlp_norm;
    const float *head_norm;  /* [heads + kv_heads, head_dim], or NULL */
    Matrix query_key_value, attention_output;
    Matrix gate_up;  /* panels of 16 gate outputs, then the same 16 of up */
    Matrix down;
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, threads;
    float norm_eps;
    const float *frequencies;  /* [head_dim / 2], radians a position */
    const float *norm;
    Matrix embedding, head;
    const Layer *layer;
} Model;

/* One step: the packed tokens of all sequences, and where their KV lies. */
typedef struct {
    int32_t tokens, sequences, drawn;
    const int32_t *token, *position;  /* [tokens] */
    const int64_t *slot;  /* [tokens] */
    const int32_t *drawn_row;  /* [drawn] */
    const int32_t *first_row;  /* [sequences + 1] */
    const int32_t *first_run;  /* [sequences + 1] into the runs of slots that hold the sequences' contexts */
    const int64_t *run_start;
    const int32_t *run_count;
    bf16 *kv;  /* [2 * layers][slots][kv_heads][head_dim] */
    int64_t plane;  /* numbers in one of the 2 * layers */
    uint8_t *scratch;  /* `scratch_bytes` of them, aligned to 64 */
    float *logits;  /* [drawn, vocab] */
} Step;

/* What becomes of a product: stored or added to float32, or gate and up joined to silu(gate) * up in bfloat16. */
typedef enum { STORE, ADD, GATE } Ending;

typedef struct {
    Ending ending;
    void *to;
    int64_t stride;  /* numbers from one row to the next */
} Target;

int64_t matmul_scratch(const Model *model);
void matmul(const Matrix *weight, const bf16 *x, int rows, Target target, uint8_t *scratch);
void embed_row(const Matrix *weight, int row, float *to);

int64_t attention_scratch(const Model *model);
void attend(const Model *model, const Step *step, int layer, const bf16 *query, bf16 *to, uint8_t *scratch);

static inline __m512 to_float(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* 2 ** x to about 2e-7 for x <= 127; what is below -126 gives less than 2e-38, and NaN gives NaN. */
static inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  /* of two of which one is NaN, max is the second */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);  /* -0.5 to 0.5; the coefficients are ln(2) ** n / n! */
    __m512 sum = _mm512_set1_ps(1.5403530e-4f);
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.3333558e-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

#endif
