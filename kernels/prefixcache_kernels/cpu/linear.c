/* Products of some rows with packed weights, with what stands before and behind them in a layer.
 *
 *     out = after(norm(x) . weights' + bias)       after: nothing, + residual, silu(gate) * up
 *
 * A step that decodes reads every weight once, so weights lie in the order in which they are read:
 * panels of 16 outputs, and in a panel pairs of inputs.
 *
 *     BFLOAT16   [outputs / 16][inputs / 2][16][2]         FLOAT32   [outputs / 16][inputs][16]
 *
 * Rows are cut into tiles of a few, as even as can be; a tile's numbers are laid side by side:
 * [inputs][rows].  A tile and some panels meet in registers.  Every output is one sum, in the order
 * of the inputs, in one lane of one accumulator: its bits are the same in every tile, beside any
 * other rows, for any number of threads.
 */
#include "linear.h"

#include <math.h>

#ifdef _OPENMP
#include <omp.h>
#endif

enum { LANES = 16, VECTORS = LANES / WIDTH /* of a panel */ };

/* CHUNK: panels that a thread takes at a time; ROWS: of the largest tile.  `panels_of` rows: how
 * many panels keep the accumulators within the registers, yet are enough to hide latency. */
#if defined(__AVX512F__)
enum { CHUNK = 12, ROWS = 8 };
#define PANELS_OF(rows) ((int[]){12, 12, 6, 6, 4, 4, 3, 3}[(rows) - 1])
#else
enum { CHUNK = 4, ROWS = 6 };
#define PANELS_OF(rows) ((int[]){4, 2, 2, 1, 1, 1}[(rows) - 1])
#endif

enum { MEETING = 192 << 10 /* bytes of tiles that meet a chunk before the next one is read */ };

/* ---- tiles ---- */

INLINE int64_t tiles_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

/* The first row of a tile: sizes differ by one at most. */
INLINE int64_t first_of(int64_t rows, int64_t tile) {
    int64_t tiles = tiles_of(rows), size = rows / tiles, more = rows % tiles;
    return tile * size + (tile < more ? tile : more);
}

INLINE float rounded(float x) {
    uint32_t word = (uint32_t)float_to_bfloat(x) << 16;
    memcpy(&x, &word, 4);
    return x;
}

/* Read a row as floats, divided by its root mean square if there is a norm. */
static void read_input(const struct linear *c, int64_t row, float *to) {
    const int64_t num = c->inputs;
    read_row(to, c->x + row * c->x_stride, num, c->x_type, 0);
    if (!c->norm) return;
    vec squares[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= num; i += 4 * WIDTH)
        for (int j = 0; j < 4; j++) {
            vec x = load(to + i + j * WIDTH);
            squares[j] += x * x;
        }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < num; i++) total += to[i] * to[i];
    const float scale = 1 / sqrtf(total / (float)num + c->eps);
    for (i = 0; i < num; i++) to[i] = to[i] * scale * c->norm[i];
}

/* `row`: room for one.  Lay the rows of a tile side by side: [inputs][rows], or [inputs / 2][rows] pairs of BFLOAT16. */
static void lay(const struct linear *c, int64_t tile, float *row) {
    const int64_t first = first_of(c->rows, tile), rows = first_of(c->rows, tile + 1) - first;
    float *to = c->room + first * c->inputs;
    for (int64_t r = 0; r < rows; r++) {
        read_input(c, first + r, row);
        if (c->weight_type == FLOAT32) {
            for (int64_t k = 0; k < c->inputs; k++) to[k * rows + r] = row[k];
            continue;
        }
#if defined(__AVX512BF16__)
        uint32_t *pairs = (uint32_t *)to;
        for (int64_t k = 0; k < c->inputs / 2; k++)
            pairs[k * rows + r] = float_to_bfloat(row[2 * k]) |
                                  (uint32_t)float_to_bfloat(row[2 * k + 1]) << 16;
#else
        for (int64_t k = 0; k < c->inputs; k++) to[k * rows + r] = rounded(row[k]);
#endif
    }
}

/* ---- products ---- */

INLINE void products(const enum type type, const int rows, const int panels, const char *weights,
                     const float *x, int64_t inputs, vec acc[][CHUNK][VECTORS]) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++) acc[r][p][v] = (vec){0};
    if (type == FLOAT32) {
        const int64_t panel = inputs * 4 * LANES;
        for (int64_t k = 0; k < inputs; k++, weights += 4 * LANES, x += rows)
            for (int p = 0; p < panels; p++) {
                const float *w = (const float *)(weights + p * panel);
                __builtin_prefetch(weights + p * panel + 2048);
                vec weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) weight[v] = load(w + v * WIDTH);
                for (int r = 0; r < rows; r++)
                    for (int v = 0; v < VECTORS; v++) acc[r][p][v] += weight[v] * splat(x[r]);
            }
        return;
    }
    const int64_t panel = inputs * 2 * LANES;
#if defined(__AVX512BF16__)
    for (int64_t k = 0; k < inputs / 2; k++, weights += 4 * LANES, x += rows)
        for (int p = 0; p < panels; p++) {
            __builtin_prefetch(weights + p * panel + 2048);
            __m512i weight = _mm512_loadu_si512(weights + p * panel);
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, x + r, 4);
                acc[r][p][0] = (vec)_mm512_dpbf16_ps((__m512)acc[r][p][0], (__m512bh)weight,
                                                     (__m512bh)_mm512_set1_epi32(pair));
            }
        }
#else
    for (int64_t k = 0; k < inputs / 2; k++, weights += 4 * LANES, x += 2 * rows)
        for (int p = 0; p < panels; p++) {
            const ivec *w = (const ivec *)(weights + p * panel);
            __builtin_prefetch(weights + p * panel + 2048);
            vec weight[VECTORS];
            for (int v = 0; v < VECTORS; v++) weight[v] = (vec)(w[v] << 16);
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][p][v] += weight[v] * splat(x[r]);
            for (int v = 0; v < VECTORS; v++) weight[v] = (vec)(w[v] & splat_int(-65536));
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][p][v] += weight[v] * splat(x[rows + r]);
        }
#endif
}

INLINE vec silu(vec x) { return x / (splat(1.0f) + power_of_two(x * splat(-1.44269504f))); }

/* What becomes of a row's products with a chunk, which begin at column `at`. */
static void finish(const struct linear *c, int64_t row, int64_t at, int64_t num, float *numbers) {
    if (c->bias)
        for (int64_t i = 0; i < num; i++) numbers[i] += c->bias[at + i];
    if (c->after == GATED) { /* panels by turns: gate, up */
        for (int64_t i = 0; i < num; i += 2 * LANES)
            for (int v = 0; v < LANES; v += WIDTH) {
                vec gate = load(numbers + i + v), up = load(numbers + i + LANES + v);
                store(numbers + i / 2 + v, silu(gate) * up);
            }
        at /= 2, num /= 2;
    }
    const int64_t left = c->columns - at;
    if (num > left) num = left; /* the last panel may be wider than what is left */
    char *to = c->out + row * c->out_stride + at * size_of(c->out_type);
    if (c->after == ADDED) {
        float *sums = (float *)to;
        for (int64_t i = 0; i < num; i++) sums[i] += numbers[i];
    } else {
        write_row(to, numbers, num, c->out_type);
    }
}

/* A tile's products with some panels: [rows][CHUNK * LANES]. */
INLINE void meet(const enum type type, const int rows, const int panels, const char *weights,
                 const float *x, int64_t inputs, float *to) {
    vec acc[ROWS][CHUNK][VECTORS];
    products(type, rows, panels, weights, x, inputs, acc);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++)
                store(to + (r * CHUNK + p) * LANES + v * WIDTH, acc[r][p][v]);
}

INLINE void meet_chunk(const enum type type, const int rows, int64_t panels, const char *weights,
                       const float *x, int64_t inputs, float *to) {
    const int wide = PANELS_OF(rows);
    const int64_t panel = inputs * LANES * size_of(type);
    int64_t p = 0;
    for (; p + wide <= panels; p += wide)
        meet(type, rows, wide, weights + p * panel, x, inputs, to + p * LANES);
    for (; p < panels; p++)
        meet(type, rows, 1, weights + p * panel, x, inputs, to + p * LANES);
}

static void chunk_and_tile(const struct linear *c, int64_t panel, int64_t panels, int64_t tile) {
    const int64_t first = first_of(c->rows, tile), rows = first_of(c->rows, tile + 1) - first;
    const char *weights = (const char *)c->weights +
                          panel * c->inputs * LANES * size_of(c->weight_type);
    const float *x = c->room + first * c->inputs;
    float out[ROWS * CHUNK * LANES] __attribute__((aligned(64)));
#define MEET(ROWS)                                                                 \
    case ROWS:                                                                     \
        if (c->weight_type == FLOAT32)                                             \
            meet_chunk(FLOAT32, ROWS, panels, weights, x, c->inputs, out);         \
        else                                                                       \
            meet_chunk(BFLOAT16, ROWS, panels, weights, x, c->inputs, out);        \
        break;
    switch (rows) {
        MEET(1) MEET(2) MEET(3) MEET(4) MEET(5) MEET(6)
#if defined(__AVX512F__)
        MEET(7) MEET(8)
#endif
    }
#undef MEET
    for (int64_t r = 0; r < rows; r++)
        finish(c, first + r, panel * LANES, panels * LANES, out + r * CHUNK * LANES);
}

/* Multiply.  The caller has checked all sizes and places. */
void prefixcache_linear(const struct linear *c) {
    const int64_t tiles = tiles_of(c->rows), num_panels = c->outputs / LANES;
    const int64_t chunks = (num_panels + CHUNK - 1) / CHUNK;
    int64_t at_once = MEETING / (ROWS * 4 * c->inputs);
    if (at_once < 1) at_once = 1;
#pragma omp parallel num_threads(c->num_threads) if (c->num_threads > 1)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *row = c->room + (c->rows + thread) * c->inputs;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) lay(c, tile, row);
        for (int64_t from = 0; from < tiles; from += at_once) {
            const int64_t end = from + at_once < tiles ? from + at_once : tiles;
#pragma omp for schedule(dynamic) nowait
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t panel = chunk * CHUNK, left = num_panels - panel;
                for (int64_t tile = from; tile < end; tile++)
                    chunk_and_tile(c, panel, left < CHUNK ? left : CHUNK, tile);
            }
        }
    }
}
