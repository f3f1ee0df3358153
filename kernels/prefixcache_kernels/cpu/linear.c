/* Products of some rows with packed weights, with what stands before and behind them in a layer.
 *
 *     out = after(norm(x) . weights' + bias)       after: nothing, + residual, silu(gate) * up
 *
 * A step that decodes reads every weight once, so weights lie in the order in which they are read:
 * panels of 16 outputs, and in a panel pairs of inputs.
 *
 *     BFLOAT16   [outputs / 16][inputs / 2][16][2]         FLOAT32   [outputs / 16][inputs][16]
 *     INT8       [outputs / 16][inputs / 64] of: a BFLOAT16 scale for each of the 16 outputs,
 *                [64 / 2][16][2]; zeros fill up the last 64 inputs
 *
 * Rows are cut into tiles of a few, as even as can be; a tile's numbers are laid side by side:
 * [inputs][rows].  A tile and some panels meet in registers.  Every output is one sum, in the order
 * of the inputs, in one lane of one accumulator: its bits are the same in every tile, beside any
 * other rows, for any number of threads.
 *
 * A processor with matrices (AMX) multiplies those of BFLOAT16 with them, whatever the number of
 * rows: it rounds sums in its own way, and a row alone has to have the bits it has beside others.
 *
 * With weights of 8 bits a row becomes integers of 16 bits, scaled per 64 inputs: less is lost than
 * in BFLOAT16.  The sum of 64 products is exact: 64 * 127 * 32767 is below 2^31.  So matrices take
 * many rows, where there are any of integers, and a few are met as everywhere: the bits are the same.
 */
#include "amx.h"
#include "linear.h"

#include <math.h>

#ifdef _OPENMP
#include <omp.h>
#endif

enum { LANES = 16, VECTORS = LANES / WIDTH /* of a panel */ };

/* CHUNK: panels that a thread takes at a time; ROWS: of the largest tile; TALL: likewise, where pairs
 * of BFLOAT16 meet.  `PANELS_OF` rows: how many panels keep the accumulators within the registers,
 * are enough to hide latency, and few enough that the processor foresees what is read next. */
#if defined(__AVX512F__)
enum { CHUNK = 12, ROWS = 8 };
#define PANELS_OF(type, rows) \
    ((rows) > ROWS ? 1 : ((int[]){(type) == INT8 ? 4 : 6, 6, 6, 6, 4, 4, 3, 3}[((rows) - 1) % ROWS]))
#else
enum { CHUNK = 4, ROWS = 6 };
#define PANELS_OF(type, rows) ((int[]){4, 2, (type) == INT8 ? 1 : 2, 1, 1, 1}[(rows) - 1])
#endif

#if defined(__AVX512BF16__)
enum { TALL = 16 }; /* weights come from memory once, and from one place: measured */
#else
enum { TALL = ROWS };
#endif

enum {
    GROUP = PREFIXCACHE_GROUP, /* inputs with a scale of their own */
    RECORD = LANES * (2 + GROUP) /* bytes of a panel's group */
};

enum { MEETING = 192 << 10 /* bytes of tiles that meet a chunk before the next one is read */ };

/* ---- tiles ---- */

INLINE int64_t tallest(const struct linear *c) { return c->weight_type == BFLOAT16 ? TALL : ROWS; }

INLINE int64_t tiles_of(const struct linear *c) { return (c->rows + tallest(c) - 1) / tallest(c); }

/* The first row of a tile: sizes differ by one at most. */
INLINE int64_t first_of(const struct linear *c, int64_t tile) {
    int64_t tiles = tiles_of(c), size = c->rows / tiles, more = c->rows % tiles;
    return tile * size + (tile < more ? tile : more);
}

INLINE float rounded(float x) {
    uint32_t word = (uint32_t)float_to_bfloat(x) << 16;
    memcpy(&x, &word, 4);
    return x;
}

INLINE int64_t groups_of(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }

/* Floats of a row in the room: what any type of weights asks of it. */
INLINE int64_t room_of(int64_t inputs) { return groups_of(inputs) * GROUP; }

INLINE int64_t panel_bytes(enum type type, int64_t inputs) {
    return type == INT8 ? groups_of(inputs) * RECORD : inputs * LANES * size_of(type);
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
    for (i = 0; i + WIDTH <= num; i += WIDTH)
        store(to + i, load(to + i) * splat(scale) * load(c->norm + i));
    for (; i < num; i++) to[i] = to[i] * scale * c->norm[i];
}

/* Bring the numbers of a group to 16 bits, in their own place, as `int32_t`; give their scale.  One
 * that is not finite makes the scale not a number, and so all products of its row. */
static float to_integers(float *x) {
    vec most = {0};
    ivec wrong = {0};
    for (int i = 0; i < GROUP; i += WIDTH) {
        const vec number = load(x + i), size = (vec)((ivec)number & splat_int(0x7fffffff));
        wrong |= ~(size <= splat(3.4028235e38f));
        most = larger(size, most);
    }
    float largest_size = largest(most), times = largest_size > 0 ? 32767 / largest_size : 0;
    if (any(wrong)) largest_size = NAN, times = 0;
    if (times > 3.4028235e38f) times = 0; /* of numbers below 1e-34 nothing is left */
    for (int i = 0; i < GROUP; i += WIDTH) {
        const vec whole = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
        const ivec code = (ivec)(load(x + i) * splat(times) + whole) - splat_int(0x4b400000);
        memcpy(x + i, &code, sizeof code);
    }
    return largest_size / 32767;
}

/* Lay a row of a tile as integers: [inputs / 2][rows] pairs, then [groups][rows] scales. */
static void lay_integers(float *row, int64_t r, int64_t rows, int64_t inputs, float *to) {
    const int64_t num = groups_of(inputs) * GROUP;
    uint32_t *pairs = (uint32_t *)to;
    float *scales = to + rows * num / 2;
    for (int64_t k = inputs; k < num; k++) row[k] = 0;
    for (int64_t k = 0; k < num; k += GROUP) {
        scales[k / GROUP * rows + r] = to_integers(row + k);
        const uint32_t *codes = (const uint32_t *)row + k;
        for (int64_t i = 0; i < GROUP; i += 2)
            pairs[(k + i) / 2 * rows + r] = (codes[i] & 0xffff) | codes[i + 1] << 16;
    }
}

/* Round a row to BFLOAT16, in its own place, as products with such weights take it: as pairs, or as
 * floats.  Gives how many there are.  Apart from laying them, for so it is done by whole vectors. */
static int64_t round_row(float *row, int64_t inputs) {
#if defined(__AVX512BF16__)
    const int64_t num = (inputs + 2 * WIDTH - 1) / (2 * WIDTH) * (2 * WIDTH);
    for (int64_t k = inputs; k < num; k++) row[k] = 0;
    for (int64_t k = 0; k < num; k += 2 * WIDTH)
        _mm512_storeu_si512(row + k / 2, rounded_pairs(load(row + k), load(row + k + WIDTH)));
    return inputs / 2;
#else
    for (int64_t k = 0; k < inputs; k++) row[k] = rounded(row[k]);
    return inputs;
#endif
}

/* Lay the rows of a tile side by side: [inputs][rows], [inputs / 2][rows] pairs of BFLOAT16, or
 * integers.  `row`: room for one. */
static void lay(const struct linear *c, int64_t tile, float *row) {
    const int64_t first = first_of(c, tile), rows = first_of(c, tile + 1) - first;
    float *to = c->room + first * room_of(c->inputs);
    for (int64_t r = 0; r < rows; r++) {
        read_input(c, first + r, row);
        if (c->weight_type == INT8) {
            lay_integers(row, r, rows, c->inputs, to);
            continue;
        }
        int64_t num = c->inputs;
        if (c->weight_type == BFLOAT16) num = round_row(row, num);
        for (int64_t k = 0; k < num; k++) to[k * rows + r] = row[k];
    }
}

/* ---- products ---- */

/* To each lane add the two products of its pair of weights, 16 bits each, with a pair of x. */
INLINE ivec add_pairs(ivec sum, ivec weights, ivec pair) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, (__m512i)pair);
#elif defined(__AVX512BW__)
    return sum + (ivec)_mm512_madd_epi16((__m512i)weights, (__m512i)pair);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (ivec)_mm256_madd_epi16((__m256i)weights, (__m256i)pair);
#else
    return sum + (weights << 16 >> 16) * (pair << 16 >> 16) + (weights >> 16) * (pair >> 16);
#endif
}

/* The weights of a vector's outputs, two inputs each, as pairs of 16 bits. */
INLINE ivec read_pairs(const int8_t *w) {
#if defined(__AVX512BW__)
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)w));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)w));
#else
    ivec pairs;
    for (int i = 0; i < WIDTH; i++)
        pairs[i] = (int32_t)((uint32_t)w[2 * i + 1] << 16 | (uint16_t)w[2 * i]);
    return pairs;
#endif
}

INLINE void products_of_integers(const int rows, const int panels, const char *weights,
                                 const float *x, int64_t inputs, vec acc[][CHUNK][VECTORS]) {
    const int64_t groups = groups_of(inputs), panel = groups * RECORD;
    const int32_t *pairs = (const int32_t *)x;
    const float *scales = x + rows * groups * GROUP / 2;
    for (int64_t g = 0; g < groups; g++, weights += RECORD, scales += rows) {
        ivec sums[TALL][CHUNK][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < panels; p++)
                for (int v = 0; v < VECTORS; v++) sums[r][p][v] = (ivec){0};
        const char *w = weights + 2 * LANES;
        for (int k = 0; k < GROUP / 2; k++, w += 2 * LANES, pairs += rows)
            for (int p = 0; p < panels; p++) {
                __builtin_prefetch(w + p * panel + 2048);
                ivec weight[VECTORS];
                for (int v = 0; v < VECTORS; v++)
                    weight[v] = read_pairs((const int8_t *)w + p * panel + v * 2 * WIDTH);
                for (int r = 0; r < rows; r++)
                    for (int v = 0; v < VECTORS; v++)
                        sums[r][p][v] = add_pairs(sums[r][p][v], weight[v], splat_int(pairs[r]));
            }
        for (int p = 0; p < panels; p++) {
            float scale[LANES] __attribute__((aligned(64)));
            read_row(scale, weights + p * panel, LANES, BFLOAT16, 0);
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECTORS; v++)
                    acc[r][p][v] += __builtin_convertvector(sums[r][p][v], vec) *
                                    (load(scale + v * WIDTH) * splat(scales[r]));
        }
    }
}

INLINE void products(const enum type type, const int rows, const int panels, const char *weights,
                     const float *x, int64_t inputs, vec acc[][CHUNK][VECTORS]) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++) acc[r][p][v] = (vec){0};
    if (type == INT8) {
        products_of_integers(rows, panels, weights, x, inputs, acc);
        return;
    }
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
    const int ahead = rows < 5 ? 512 : 2048; /* bytes: measured */
    for (int64_t k = 0; k < inputs / 2; k++, weights += 4 * LANES, x += rows)
        for (int p = 0; p < panels; p++) {
            __builtin_prefetch(weights + p * panel + ahead);
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
        for (int64_t i = 0; i < num; i += WIDTH)
            store(numbers + i, load(numbers + i) + load(c->bias + at + i));
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
    if (c->out_type != FLOAT32) {
        write_row(to, numbers, num, c->out_type);
        return;
    }
    float *out = (float *)to;
    int64_t i = 0;
    if (c->after == ADDED) {
        for (; i + WIDTH <= num; i += WIDTH) store(out + i, load(out + i) + load(numbers + i));
        for (; i < num; i++) out[i] += numbers[i];
    } else {
        for (; i + WIDTH <= num; i += WIDTH) store(out + i, load(numbers + i));
        for (; i < num; i++) out[i] = numbers[i];
    }
}

/* A tile's products with some panels: [rows][CHUNK * LANES]. */
INLINE void meet(const enum type type, const int rows, const int panels, const char *weights,
                 const float *x, int64_t inputs, float *to) {
    vec acc[TALL][CHUNK][VECTORS];
    products(type, rows, panels, weights, x, inputs, acc);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++)
                store(to + (r * CHUNK + p) * LANES + v * WIDTH, acc[r][p][v]);
}

INLINE void meet_chunk(const enum type type, const int rows, int64_t panels, const char *weights,
                       const float *x, int64_t inputs, float *to) {
    const int wide = PANELS_OF(type, rows);
    const int64_t panel = panel_bytes(type, inputs);
    int64_t p = 0;
    for (; p + wide <= panels; p += wide)
        meet(type, rows, wide, weights + p * panel, x, inputs, to + p * LANES);
    for (; p < panels; p++)
        meet(type, rows, 1, weights + p * panel, x, inputs, to + p * LANES);
}

static void chunk_and_tile(const struct linear *c, int64_t panel, int64_t panels, int64_t tile) {
    const int64_t first = first_of(c, tile), rows = first_of(c, tile + 1) - first;
    const char *weights = (const char *)c->weights +
                          panel * panel_bytes(c->weight_type, c->inputs);
    const float *x = c->room + first * room_of(c->inputs);
    float out[TALL * CHUNK * LANES] __attribute__((aligned(64)));
#define MEET(ROWS)                                                                 \
    case ROWS:                                                                     \
        if (c->weight_type == FLOAT32)                                             \
            meet_chunk(FLOAT32, ROWS, panels, weights, x, c->inputs, out);         \
        else if (c->weight_type == INT8)                                           \
            meet_chunk(INT8, ROWS, panels, weights, x, c->inputs, out);            \
        else                                                                       \
            meet_chunk(BFLOAT16, ROWS, panels, weights, x, c->inputs, out);        \
        break;
#define MEET_TALL(ROWS)                                                            \
    case ROWS: meet_chunk(BFLOAT16, ROWS, panels, weights, x, c->inputs, out); break;
    switch (rows) {
        MEET(1) MEET(2) MEET(3) MEET(4) MEET(5) MEET(6)
#if defined(__AVX512F__)
        MEET(7) MEET(8)
#endif
#if defined(__AVX512BF16__)
        MEET_TALL(9) MEET_TALL(10) MEET_TALL(11) MEET_TALL(12)
        MEET_TALL(13) MEET_TALL(14) MEET_TALL(15) MEET_TALL(16)
#endif
    }
#undef MEET
#undef MEET_TALL
    for (int64_t r = 0; r < rows; r++)
        finish(c, first + r, panel * LANES, panels * LANES, out + r * CHUNK * LANES);
}

/* ---- with the processor's matrices (AMX): weights of BFLOAT16, and many rows with INT8 ---- */

#ifdef PREFIXCACHE_AMX

/* Rows are cut into blocks of 16, laid [inputs / 32][rows][32].  A panel's 16 pairs of inputs are a
 * tile as they lie.  Two blocks meet two panels, or one block up to four: the sums of each are in
 * the same order, so a row's bits are the same.
 *
 *                weights 6   weights 7
 *     rows 4     sums 0      sums 1            tiles of the processor
 *     rows 5     sums 2      sums 3
 */
enum { SIDE = 2 /* blocks that meet two panels */, FOUR = 4 /* panels that a block meets */ };

enum { MANY = 12 /* rows, from which on matrices are faster with INT8: measured */ };

enum { HELD = 512 << 10 /* bytes of rows, and of a chunk's panels, that stay in the cache */ };

INLINE int64_t tiles_along(int64_t inputs) { return (inputs + AMX_INPUTS - 1) / AMX_INPUTS; }

/* A block's rows: where they lie, and how many they are. */
struct block {
    const char *from;
    int64_t rows;
    const float *scales; /* [groups][rows], of integers */
};

/* Bytes of a row in its block. */
INLINE int64_t row_bytes(const struct linear *c) {
    return c->weight_type == INT8 ? groups_of(c->inputs) * 2 * GROUP : tiles_along(c->inputs) * 64;
}

static struct block block_of(const struct linear *c, int64_t index) {
    const int64_t first = index * AMX_ROWS, left = c->rows - first, bytes = row_bytes(c);
    const float *scales = c->room + c->rows * bytes / 4; /* behind all blocks */
    return (struct block){(const char *)c->room + first * bytes,
                          left < AMX_ROWS ? left : AMX_ROWS,
                          scales + first * groups_of(c->inputs)};
}

/* Lay a row into its block.  `made`: room for its floats. */
static void lay_amx(const struct linear *c, int64_t row, float *made) {
    const int64_t along = tiles_along(c->inputs);
    const struct block block = block_of(c, row / AMX_ROWS);
    char *to = (char *)block.from + row % AMX_ROWS * 64;
    read_input(c, row, made);
    for (int64_t k = c->inputs; k < along * AMX_INPUTS; k++) made[k] = 0;
    for (int64_t k = 0; k < along; k++, made += AMX_INPUTS)
        _mm512_storeu_si512(to + k * block.rows * 64, rounded_pairs(load(made), load(made + WIDTH)));
}

/* The last weights of a panel, if they are of fewer than 32 inputs: zeros are put behind them. */
INLINE const char *last_weights(const char *panel, int64_t inputs, char *copy) {
    const int64_t whole = inputs / AMX_INPUTS, left = inputs % AMX_INPUTS;
    memset(copy, 0, AMX_BYTES);
    memcpy(copy, panel + whole * AMX_BYTES, left * 2 * LANES);
    amx_written(copy);
    return copy;
}

/* Two blocks and two panels: [rows][2 * LANES] sums.  The blocks are to stay in the first cache:
 * weights are loaded past it, as far as the processor can. */
static void meet_two(const struct block *rows, const char *weights, int64_t panel, int64_t inputs,
                     float *to) {
    char copy[2][AMX_BYTES] __attribute__((aligned(64)));
    const char *first = rows[0].from, *second = rows[1].from;
    const int64_t step = rows[1].rows * 64;
#define ADD(WEIGHTS, OTHERS)            \
    _tile_loadd(4, first, 64);          \
    _tile_stream_loadd(6, WEIGHTS, 64); \
    _tile_dpbf16ps(0, 4, 6);            \
    _tile_loadd(5, second, 64);         \
    _tile_dpbf16ps(2, 5, 6);            \
    _tile_stream_loadd(7, OTHERS, 64);  \
    _tile_dpbf16ps(1, 4, 7);            \
    _tile_dpbf16ps(3, 5, 7);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const char *w = weights;
    for (int64_t k = inputs / AMX_INPUTS; k > 0; k--) {
        ADD(w, w + panel)
        w += AMX_BYTES, first += AMX_BYTES, second += step;
    }
    if (inputs % AMX_INPUTS) {
        const char *last = last_weights(weights, inputs, copy[0]);
        const char *other = last_weights(weights + panel, inputs, copy[1]);
        ADD(last, other)
    }
#undef ADD
    _tile_stored(0, to, 2 * 64);
    _tile_stored(1, to + LANES, 2 * 64);
    _tile_stored(2, to + AMX_ROWS * 2 * LANES, 2 * 64);
    _tile_stored(3, to + AMX_ROWS * 2 * LANES + LANES, 2 * 64);
}

/* A block and up to four panels: [rows][panels * LANES] sums. */
INLINE void meet_four(const int panels, struct block rows, const char *weights, int64_t panel,
                      int64_t inputs, float *to) {
    char copy[AMX_BYTES] __attribute__((aligned(64)));
    const char *from = rows.from, *w = weights;
    const int64_t wide = panels * 64;
#define EACH(DO) DO(0, 5) DO(1, 6) DO(2, 7) DO(3, 5)
#define ZERO(P, W) \
    if (P < panels) _tile_zero(P);
#define ADD(P, W)                          \
    if (P < panels) {                      \
        _tile_loadd(W, w + P * panel, 64); \
        _tile_dpbf16ps(P, 4, W);           \
    }
#define ADD_LAST(P, W)                                                       \
    if (P < panels) {                                                        \
        _tile_loadd(W, last_weights(weights + P * panel, inputs, copy), 64); \
        amx_written(copy); /* not before it is read */                       \
        _tile_dpbf16ps(P, 4, W);                                             \
    }
#define STORE(P, W) \
    if (P < panels) _tile_stored(P, to + P * LANES, wide);
    EACH(ZERO)
    for (int64_t k = inputs / AMX_INPUTS; k > 0; k--) {
        _tile_loadd(4, from, 64);
        EACH(ADD)
        w += AMX_BYTES, from += rows.rows * 64;
    }
    if (inputs % AMX_INPUTS) {
        _tile_loadd(4, from, 64);
        EACH(ADD_LAST)
    }
    EACH(STORE)
#undef EACH
#undef ZERO
#undef ADD
#undef ADD_LAST
#undef STORE
}

/* Configure the tiles for the blocks that meet next, unless they are. */
INLINE void shape_tiles(const struct block *rows, int64_t blocks, int64_t *shape) {
    const uint8_t first = rows[0].rows, last = rows[blocks - 1].rows, all = AMX_ROWS;
    if (*shape == blocks * 256 + last) return;
    *shape = blocks * 256 + last;
    if (blocks == SIDE)
        amx_begin((uint8_t[8]){first, first, last, last, first, last, all, all});
    else
        amx_begin((uint8_t[8]){last, last, last, last, last, all, all, all});
}

#ifdef PREFIXCACHE_AMX_INT8

/* A product of bytes takes 64 of them.  An integer is 256 * upper + lower, so a group of a row is two
 * tiles' rows: [groups][upper, lower][rows][64].  Both meet the weights, and their sums, which are
 * exact, are put together:
 *
 *                weights 5
 *     upper 2    sums 0
 *     lower 3    sums 1      sums of pairs = 256 * sums 0 + sums 1
 */
static void lay_amx_integers(const struct linear *c, int64_t row, float *made) {
    const int64_t groups = groups_of(c->inputs);
    const struct block block = block_of(c, row / AMX_ROWS);
    const int64_t r = row % AMX_ROWS;
    uint8_t *to = (uint8_t *)block.from + r * GROUP;
    float *scales = (float *)block.scales + r;
    read_input(c, row, made);
    for (int64_t k = c->inputs; k < groups * GROUP; k++) made[k] = 0;
    for (int64_t g = 0; g < groups; g++, made += GROUP) {
        scales[g * block.rows] = to_integers(made);
        for (int i = 0; i < GROUP; i += WIDTH) {
            const __m512i code = _mm512_loadu_si512(made + i);
            const __m128i upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32(code, 8));
            _mm_storeu_si128((void *)(to + 2 * g * block.rows * GROUP + i), upper);
            _mm_storeu_si128((void *)(to + (2 * g + 1) * block.rows * GROUP + i),
                             _mm512_cvtepi32_epi8(code));
        }
    }
}

/* A group's weights as a tile: [64 / 4][16][4].  They lie as pairs: two and two are put together. */
INLINE void lay_weights(const char *pairs, char *tile) {
    const __m512i by_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                              24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
                                              1, 16, 0);
    for (int i = 0; i < AMX_ROWS; i++) {
        const __m512i two = _mm512_loadu_si512(pairs + i * 64);
        _mm512_store_si512(tile + i * 64, _mm512_permutexvar_epi16(by_turns, two));
    }
    amx_written(tile);
}

/* A block and a panel: [rows][2 * LANES] products, in the order of the groups. */
INLINE void meet_integers(const int num, struct block rows, const char *weights, int64_t groups,
                          float *to) {
    char tile[AMX_BYTES] __attribute__((aligned(64)));
    ivec upper[AMX_ROWS], lower[AMX_ROWS];
    vec acc[AMX_ROWS];
    for (int r = 0; r < num; r++) acc[r] = (vec){0};
    const float *scales = rows.scales;
    for (int64_t g = 0; g < groups; g++, weights += RECORD, scales += num) {
        const char *from = rows.from + 2 * g * num * GROUP;
        lay_weights(weights + 2 * LANES, tile);
        _tile_loadd(5, tile, 64);
        _tile_loadd(2, from, 64);
        _tile_loadd(3, from + num * GROUP, 64);
        _tile_zero(0);
        _tile_zero(1);
        _tile_dpbssd(0, 2, 5);
        _tile_dpbusd(1, 3, 5);
        _tile_stored(0, upper, 64);
        _tile_stored(1, lower, 64);
        amx_written(upper);
        amx_written(lower);
        float scale[LANES] __attribute__((aligned(64)));
        read_row(scale, weights, LANES, BFLOAT16, 0);
        for (int r = 0; r < num; r++)
            acc[r] += __builtin_convertvector((upper[r] << 8) + lower[r], vec) *
                      (load(scale) * splat(scales[r]));
    }
    for (int r = 0; r < num; r++) store(to + r * 2 * LANES, acc[r]);
}

/* A chunk of panels and a block. */
static void meet_amx_integers(const struct linear *c, int64_t block, int64_t from, int64_t end,
                              int64_t *shape) {
    const int64_t panel = panel_bytes(INT8, c->inputs), groups = groups_of(c->inputs);
    const struct block rows = block_of(c, block);
    float sums[AMX_ROWS * 2 * LANES] __attribute__((aligned(64)));
    shape_tiles(&rows, 1, shape);
    for (int64_t p = from; p < end; p += 2) {
        const int64_t panels = end - p < 2 ? end - p : 2; /* gate and up stand side by side */
        for (int64_t i = 0; i < panels; i++) {
            const char *weights = (const char *)c->weights + (p + i) * panel;
            if (rows.rows == AMX_ROWS)
                meet_integers(AMX_ROWS, rows, weights, groups, sums + i * LANES);
            else
                meet_integers((int)rows.rows, rows, weights, groups, sums + i * LANES);
        }
        for (int64_t r = 0; r < rows.rows; r++)
            finish(c, block * AMX_ROWS + r, p * LANES, panels * LANES, sums + r * 2 * LANES);
    }
}

#endif

/* A chunk of panels and one or two blocks. */
static void meet_amx(const struct linear *c, int64_t block, int64_t blocks, int64_t from,
                     int64_t end, int64_t *shape) {
    const int64_t panel = panel_bytes(BFLOAT16, c->inputs);
    const struct block rows[SIDE] = {block_of(c, block), block_of(c, block + blocks - 1)};
    float sums[SIDE * AMX_ROWS * 2 * LANES] __attribute__((aligned(64)));
    shape_tiles(rows, blocks, shape);
    const int64_t num = blocks == SIDE ? AMX_ROWS + rows[1].rows : rows[0].rows;
    for (int64_t p = from; p < end;) {
        const char *weights = (const char *)c->weights + p * panel;
        int64_t panels = end - p, wide;
        if (blocks == SIDE) { /* a last one without another is met twice */
            meet_two(rows, weights, panels > 1 ? panel : 0, c->inputs, sums);
            panels = panels > 1 ? 2 : 1, wide = 2;
        } else if (panels >= FOUR) {
            meet_four(FOUR, rows[0], weights, panel, c->inputs, sums);
            panels = wide = FOUR;
        } else if (panels >= 2) {
            meet_four(2, rows[0], weights, panel, c->inputs, sums);
            panels = wide = 2;
        } else {
            meet_four(1, rows[0], weights, panel, c->inputs, sums);
            wide = 1;
        }
        for (int64_t r = 0; r < num; r++)
            finish(c, block * AMX_ROWS + r, p * LANES, panels * LANES, sums + r * wide * LANES);
        p += panels;
    }
}

/* Panels of a chunk: they stay in the cache while rows meet them, and every thread gets some. */
static int64_t chunk_amx(const struct linear *c, int64_t blocks) {
    const int64_t num_panels = c->outputs / LANES;
    int64_t most = HELD / panel_bytes(c->weight_type, c->inputs);
    if (blocks == 1) most = FOUR;
    const int64_t fair = (num_panels + 4 * c->num_threads - 1) / (4 * c->num_threads);
    if (c->num_threads > 1 && fair < most) most = fair;
    return most < FOUR ? FOUR : most / FOUR * FOUR;
}

static void multiply_amx(const struct linear *c) {
    const int64_t blocks = (c->rows + AMX_ROWS - 1) / AMX_ROWS, num_panels = c->outputs / LANES;
    const int64_t size = chunk_amx(c, blocks), chunks = (num_panels + size - 1) / size;
    int64_t at_once = HELD / (AMX_ROWS * row_bytes(c)) / SIDE * SIDE;
    if (at_once < SIDE) at_once = SIDE;
#pragma omp parallel num_threads(c->num_threads) if (c->num_threads > 1)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *made = c->room + (c->rows + thread) * room_of(c->inputs);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c->rows; row++) {
#ifdef PREFIXCACHE_AMX_INT8
            if (c->weight_type == INT8) {
                lay_amx_integers(c, row, made);
                continue;
            }
#endif
            lay_amx(c, row, made);
        }
        amx_written(c->room);
        int64_t shape = 0;
        for (int64_t from = 0; from < blocks; from += at_once) {
            const int64_t end = from + at_once < blocks ? from + at_once : blocks;
#pragma omp for schedule(dynamic) nowait
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t panel = chunk * size;
                const int64_t last = panel + size < num_panels ? panel + size : num_panels;
                for (int64_t block = from; block < end; block += SIDE) {
                    const int64_t num = end - block < SIDE ? 1 : SIDE;
#ifdef PREFIXCACHE_AMX_INT8
                    if (c->weight_type == INT8) {
                        for (int64_t i = 0; i < num; i++)
                            meet_amx_integers(c, block + i, panel, last, &shape);
                        continue;
                    }
#endif
                    meet_amx(c, block, num, panel, last, &shape);
                }
            }
        }
        amx_end();
    }
}

#endif

/* Multiply.  The caller has checked all sizes and places. */
void prefixcache_linear(const struct linear *c) {
#ifdef PREFIXCACHE_AMX
    if (prefixcache_amx && c->weight_type == BFLOAT16) {
        multiply_amx(c);
        return;
    }
#endif
#ifdef PREFIXCACHE_AMX_INT8
    if (prefixcache_amx && c->weight_type == INT8 && c->rows >= MANY) {
        multiply_amx(c);
        return;
    }
#endif
    const int64_t tiles = tiles_of(c), num_panels = c->outputs / LANES;
    const int64_t chunks = (num_panels + CHUNK - 1) / CHUNK;
    int64_t at_once = MEETING / (tallest(c) * 4 * room_of(c->inputs));
    if (at_once < 1) at_once = 1;
#pragma omp parallel num_threads(c->num_threads) if (c->num_threads > 1)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *row = c->room + (c->rows + thread) * room_of(c->inputs);
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
