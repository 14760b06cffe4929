/* int8 and int4 of bfloat16 KV, bit for bit what grouped.py computes; native.py calls this.

   A block in a plane is [rows][columns] numbers of 16 bits. A group is a row, or with `down` a column. Every operation
   is a single one of float32, rounded by itself (compile with -ffp-contract=off), in the order of grouped.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LIMIT 32384 /* 2**126 as bfloat16, see floats.py */
#define TINY 3456   /* 2**-100 */

typedef struct {
    int64_t planes, blocks, rows, columns, down;
    int64_t bits_plane, bits_block;     /* strides of the numbers, in bytes; a block's are in one piece */
    int64_t record_plane, record_block; /* strides of the records, in bytes */
} Shape;

static inline float wide(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &word, 4);
    return number;
}

/* To the nearest, half way away from zero. */
static inline uint16_t narrow(float number) {
    uint32_t word;
    memcpy(&word, &number, 4);
    return (uint16_t)((word + 0x8000) >> 16);
}

static inline uint16_t larger(uint16_t one, uint16_t other) { return one > other ? one : other; }

/* ---------------------------------------------------------------- int8 */

/* The largest magnitude of each group, as bits. */
static void bounds_of(const Shape *shape, const uint16_t *restrict x, uint16_t *restrict bound) {
    const int64_t rows = shape->rows, columns = shape->columns;
    if (shape->down) {
        for (int64_t c = 0; c < columns; c++) bound[c] = x[c] & 0x7FFF;
        for (int64_t r = 1; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) bound[c] = larger(bound[c], x[r * columns + c] & 0x7FFF);
    } else {
        for (int64_t r = 0; r < rows; r++) {
            uint16_t most = 0;
            for (int64_t c = 0; c < columns; c++) most = larger(most, x[r * columns + c] & 0x7FFF);
            bound[r] = most;
        }
    }
}

static inline int8_t code8(uint16_t bits, float inverse) { return (int8_t)rintf(wide(bits) * inverse); }

static int encode8_block(const Shape *shape, const uint16_t *restrict x, uint8_t *restrict record) {
    const int64_t rows = shape->rows, columns = shape->columns, groups = shape->down ? columns : rows;
    uint16_t bound[groups];
    float inverse[groups];
    bounds_of(shape, x, bound);
    uint16_t most = 0;
    for (int64_t g = 0; g < groups; g++) most = larger(most, bound[g]);
    const int bad = most >= LIMIT;
    for (int64_t g = 0; g < groups; g++) {
        if (bad || bound[g] < TINY) bound[g] = 0;
        inverse[g] = bound[g] ? 127.0f / wide(bound[g]) : 0.0f;
    }
    memcpy(record, bound, 2 * groups);
    int8_t *restrict codes = (int8_t *)record + 2 * groups;
    if (bad) {
        memset(codes, 0, rows * columns);
        return 1;
    }
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *restrict from = x + r * columns;
        int8_t *restrict to = codes + r * columns;
        if (shape->down)
            for (int64_t c = 0; c < columns; c++) to[c] = code8(from[c], inverse[c]);
        else
            for (int64_t c = 0; c < columns; c++) to[c] = code8(from[c], inverse[r]);
    }
    return 0;
}

static int decode8_block(const Shape *shape, const uint8_t *restrict record, uint16_t *restrict x) {
    const int64_t rows = shape->rows, columns = shape->columns, groups = shape->down ? columns : rows;
    const float part = (float)(1.0 / 127);
    uint16_t bound[groups];
    float width[groups];
    memcpy(bound, record, 2 * groups);
    uint16_t most = 0;
    for (int64_t g = 0; g < groups; g++) most = larger(most, bound[g]);
    const int bad = most >= LIMIT;
    for (int64_t g = 0; g < groups; g++) width[g] = bad ? 0.0f : wide(bound[g]);
    const int8_t *restrict codes = (const int8_t *)record + 2 * groups;
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *restrict from = codes + r * columns;
        uint16_t *restrict to = x + r * columns;
        if (shape->down)
            for (int64_t c = 0; c < columns; c++) to[c] = narrow((float)from[c] * part * width[c]);
        else
            for (int64_t c = 0; c < columns; c++) to[c] = narrow((float)from[c] * part * width[r]);
    }
    return bad;
}

/* ---------------------------------------------------------------- int4 */

/* Bits as integers in the order of the numbers, and back. */
static inline int16_t place_of(uint16_t bits) { return (int16_t)(bits ^ ((uint16_t)((int16_t)bits >> 15) & 0x7FFF)); }
static inline uint16_t bits_at(int16_t place) { return (uint16_t)(place ^ ((place >> 15) & 0x7FFF)); }

static inline int16_t lesser(int16_t one, int16_t other) { return one < other ? one : other; }
static inline int16_t greater(int16_t one, int16_t other) { return one > other ? one : other; }

/* The least and the greatest number of each group, by their places. */
static void ends_of(const Shape *shape, const uint16_t *restrict x, int16_t *restrict low, int16_t *restrict high) {
    const int64_t rows = shape->rows, columns = shape->columns;
    if (shape->down) {
        for (int64_t c = 0; c < columns; c++) low[c] = high[c] = place_of(x[c]);
        for (int64_t r = 1; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) {
                const int16_t place = place_of(x[r * columns + c]);
                low[c] = lesser(low[c], place);
                high[c] = greater(high[c], place);
            }
    } else {
        for (int64_t r = 0; r < rows; r++) {
            int16_t least = INT16_MAX, most = INT16_MIN;
            for (int64_t c = 0; c < columns; c++) {
                const int16_t place = place_of(x[r * columns + c]);
                least = lesser(least, place);
                most = greater(most, place);
            }
            low[r] = least;
            high[r] = most;
        }
    }
}

static inline uint8_t code4(uint16_t bits, float low, float step) { return (uint8_t)(int32_t)rintf((wide(bits) - low) * step); }

static int encode4_block(const Shape *shape, const uint16_t *restrict x, uint8_t *restrict record, uint8_t *restrict codes) {
    const int64_t rows = shape->rows, columns = shape->columns, groups = shape->down ? columns : rows;
    const int64_t numbers = rows * columns, half = numbers / 2;
    int16_t least[groups], greatest[groups];
    float low[groups], high[groups], step[groups];
    uint16_t stored[groups], most = 0;
    uint8_t *restrict packed = record + 4 * groups;
    ends_of(shape, x, least, greatest);
    for (int64_t g = 0; g < groups; g++)
        most = larger(most, larger(bits_at(least[g]) & 0x7FFF, bits_at(greatest[g]) & 0x7FFF));
    if (most >= LIMIT) {
        memset(record, 0, 4 * groups + half);
        return 1;
    }
    for (int64_t g = 0; g < groups; g++) {
        low[g] = wide(bits_at(least[g])) + 0.0f; /* of two zeros the one without a sign */
        high[g] = wide(bits_at(greatest[g])) + 0.0f;
        if (high[g] - low[g] < 0x1p-100f) high[g] = low[g];
        const float width = high[g] - low[g];
        step[g] = width > 0 ? 15.0f / width : 0.0f;
    }
    for (int64_t g = 0; g < groups; g++) stored[g] = narrow(low[g]);
    memcpy(record, stored, 2 * groups);
    for (int64_t g = 0; g < groups; g++) stored[g] = narrow(high[g]);
    memcpy(record + 2 * groups, stored, 2 * groups);
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *restrict from = x + r * columns;
        uint8_t *restrict to = codes + r * columns;
        if (shape->down)
            for (int64_t c = 0; c < columns; c++) to[c] = code4(from[c], low[c], step[c]);
        else
            for (int64_t c = 0; c < columns; c++) to[c] = code4(from[c], low[r], step[r]);
    }
    for (int64_t i = 0; i < half; i++) packed[i] = codes[i] | (uint8_t)(codes[half + i] << 4);
    return 0;
}

static inline uint16_t number4(uint8_t code, float low, float high, float step) {
    const float number = (float)code * step + low;
    return narrow(number < high ? number : high);
}

static int decode4_block(const Shape *shape, const uint8_t *restrict record, uint16_t *restrict x, uint8_t *restrict codes) {
    const int64_t rows = shape->rows, columns = shape->columns, groups = shape->down ? columns : rows;
    const int64_t half = rows * columns / 2;
    /* A trifle long, so that the last step, cut off, gives `high` exactly too. */
    const float part = (float)((1 + 0x1p-21) / 15);
    float low[groups], high[groups], step[groups];
    uint16_t stored[2 * groups], most = 0;
    memcpy(stored, record, 4 * groups);
    for (int64_t g = 0; g < 2 * groups; g++) most = larger(most, stored[g] & 0x7FFF);
    const int bad = most >= LIMIT;
    for (int64_t g = 0; g < groups; g++) {
        low[g] = bad ? 0.0f : wide(stored[g]);
        high[g] = bad ? 0.0f : wide(stored[groups + g]);
        step[g] = (high[g] - low[g]) * part;
    }
    const uint8_t *restrict packed = record + 4 * groups;
    for (int64_t i = 0; i < half; i++) {
        codes[i] = packed[i] & 15;
        codes[half + i] = packed[i] >> 4;
    }
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *restrict from = codes + r * columns;
        uint16_t *restrict to = x + r * columns;
        if (shape->down)
            for (int64_t c = 0; c < columns; c++) to[c] = number4(from[c], low[c], high[c], step[c]);
        else
            for (int64_t c = 0; c < columns; c++) to[c] = number4(from[c], low[r], high[r], step[r]);
    }
    return bad;
}

/* ---------------------------------------------------------------- whole pieces

   [planes][blocks] blocks at `bits` and records at `records`; `bad` says of which there is no code, or no encoder writes.
   `scratch` has room for the numbers of a block, a byte each. */

#define BITS (uint16_t *)(bits + p * shape->bits_plane + b * shape->bits_block)
#define RECORD records + p * shape->record_plane + b * shape->record_block
#define EACH_BLOCK                                   \
    for (int64_t p = 0; p < shape->planes; p++)      \
        for (int64_t b = 0; b < shape->blocks; b++)  \
            bad[p * shape->blocks + b]

void encode8(const Shape *shape, uint8_t *bits, uint8_t *records, uint8_t *bad, uint8_t *scratch) {
    (void)scratch;
    EACH_BLOCK = encode8_block(shape, BITS, RECORD);
}

void decode8(const Shape *shape, uint8_t *bits, uint8_t *records, uint8_t *bad, uint8_t *scratch) {
    (void)scratch;
    EACH_BLOCK = decode8_block(shape, RECORD, BITS);
}

void encode4(const Shape *shape, uint8_t *bits, uint8_t *records, uint8_t *bad, uint8_t *scratch) {
    EACH_BLOCK = encode4_block(shape, BITS, RECORD, scratch);
}

void decode4(const Shape *shape, uint8_t *bits, uint8_t *records, uint8_t *bad, uint8_t *scratch) {
    EACH_BLOCK = decode4_block(shape, RECORD, BITS, scratch);
}
