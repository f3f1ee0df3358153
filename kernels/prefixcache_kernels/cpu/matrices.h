/* Many keys and many rows of bfloat16, on a processor that multiplies matrices of it (AMX).
 *
 *     scores   [rows, SPAN keys]       = queries [rows, dim] x keys' [dim, SPAN]
 *     answers  [rows, value_dim + 1]  += weights [rows, SPAN] x (values, ones) [SPAN, value_dim + 1]
 *
 * A product takes 16 rows of 32 numbers from the left, and from the right 16 pairs of rows of 16,
 * each pair's numbers by turns; so a span of keys and values is laid out anew, once for all rows of
 * a task.  Sums are float32.  Queries and keys are taken as they are, so only their scores are
 * scaled; weights are rounded to bfloat16.  The column of ones gives the sums of what was rounded,
 * by which answers are divided: so the mean of equal values is that value.
 *
 *     keys     [SPAN / 16][dim / 32]          of 16 pairs of dimensions x 16 keys
 *     values   [SPAN / 32][value_dim / 16]    of 16 pairs of keys x 16 dimensions
 */
#ifndef PREFIXCACHE_MATRICES_H
#define PREFIXCACHE_MATRICES_H

#include "amx.h"
#include "tile.h"

#ifdef PREFIXCACHE_AMX

enum {
    SPAN = 128,          /* keys at a time: their scores with 32 rows stay in the nearest cache */
    SIDE = AMX_ROWS,     /* rows of a matrix, and columns of sums */
    DEEP = AMX_INPUTS,   /* numbers that meet in a product */
    MATRIX = SIDE * DEEP /* numbers of bfloat16 in 1 KiB */
};

/* Turn 16 rows of 16 words into columns. */
INLINE void turn(__m512i *r) {
    __m512i t[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    /* r[4 g + c] now has, in its quarter q, word 4 q + c of the rows 4 g to 4 g + 3. */
    for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    memcpy(r, t, sizeof t);
}

/* Numbers `from` up to `from + 32` of a row of `dim`, zeros behind it. */
INLINE __m512i read_deep(const char *row, int64_t from, int64_t dim) {
    const int64_t left = dim - from;
    if (left >= DEEP) return _mm512_loadu_si512(row + 2 * from);
    return _mm512_maskz_loadu_epi16(((__mmask32)1 << left) - 1, row + 2 * from);
}

/* Lay `num_keys` keys, at most 16, zeros behind them. */
INLINE void lay_keys(const char *cache, const int64_t *places, int64_t num_keys, int64_t dim,
                     uint16_t *to) {
    for (int64_t d = 0; d < dim; d += DEEP, to += MATRIX) {
        __m512i rows[SIDE];
        for (int i = 0; i < SIDE; i++)
            rows[i] = i < num_keys ? read_deep(cache + places[i], d, dim) : _mm512_setzero_si512();
        turn(rows);
        for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * DEEP, rows[i]);
    }
}

/* Lay `num_keys` values, at most 16, likewise: half of the matrices at `to`.  Behind the last number
 * of each is a one, and zeros up to `width`. */
INLINE void lay_values(const char *cache, const int64_t *places, int64_t num_keys, int64_t dim,
                       int64_t width, uint16_t *to) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int i = 0; i < SIDE; i += 2, to += DEEP)
        for (int64_t d = 0; d < width; d += DEEP) {
            __m512i pair[2];
            for (int j = 0; j < 2; j++) {
                pair[j] = _mm512_setzero_si512();
                if (i + j >= num_keys) continue;
                if (d < dim) pair[j] = read_deep(cache + places[i + j], d, dim);
                if (dim >= d && dim < d + DEEP)
                    pair[j] = _mm512_mask_set1_epi16(pair[j], (__mmask32)1 << (dim - d), 0x3f80);
            }
            __m512i low = _mm512_unpacklo_epi16(pair[0], pair[1]);
            __m512i high = _mm512_unpackhi_epi16(pair[0], pair[1]);
            uint16_t *at = to + d / SIDE * MATRIX;
            _mm512_store_si512(at, _mm512_permutex2var_epi64(low, first, high));
            if (d + SIDE < width)
                _mm512_store_si512(at + MATRIX, _mm512_permutex2var_epi64(low, second, high));
        }
}

/* Scores [16 or 32 rows, SPAN] of `num_keys` keys, a multiple of 32.  Queries: [rows / 16][dim / 32]
 * matrices, of `depth` each. */
INLINE void matrix_scores(const int two, const uint16_t *query, const uint16_t *keys, int64_t depth,
                          int64_t num_keys, float *scores) {
    amx_written(keys);
    for (int64_t k = 0; k < num_keys; k += 2 * SIDE, keys += 2 * depth * MATRIX, scores += 2 * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
        for (int64_t d = 0; d < depth; d++) {
            _tile_loadd(4, query + d * MATRIX, 64);
            _tile_loadd(6, keys + d * MATRIX, 64);
            _tile_loadd(7, keys + (depth + d) * MATRIX, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, query + (depth + d) * MATRIX, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, scores, 4 * SPAN);
        _tile_stored(1, scores + SIDE, 4 * SPAN);
        if (!two) continue;
        _tile_stored(2, scores + SIDE * SPAN, 4 * SPAN);
        _tile_stored(3, scores + SIDE * SPAN + SIDE, 4 * SPAN);
    }
}

/* Add to answers [16 or 32 rows, width] the products of weights [rows, SPAN] with the values. */
INLINE void matrix_values(const int two, const uint16_t *weights, const uint16_t *values,
                          int64_t num_keys, int64_t width, float *answer) {
    const int64_t across = width / SIDE;
    amx_written(weights);
    for (int64_t n = 0; n < across; n += 2, answer += 2 * SIDE, values += 2 * MATRIX) {
        const int more = n + 1 < across;
        _tile_loadd(0, answer, 4 * width);
        if (more) _tile_loadd(1, answer + SIDE, 4 * width);
        if (two) _tile_loadd(2, answer + SIDE * width, 4 * width);
        if (two && more) _tile_loadd(3, answer + SIDE * width + SIDE, 4 * width);
        for (int64_t k = 0; k < num_keys; k += DEEP) {
            const uint16_t *v = values + k / DEEP * across * MATRIX;
            _tile_loadd(4, weights + k, 2 * SPAN);
            if (two) _tile_loadd(5, weights + SIDE * SPAN + k, 2 * SPAN);
            _tile_loadd(6, v, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (two) _tile_dpbf16ps(2, 5, 6);
            if (!more) continue;
            _tile_loadd(7, v + MATRIX, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (two) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, answer, 4 * width);
        if (more) _tile_stored(1, answer + SIDE, 4 * width);
        if (two) _tile_stored(2, answer + SIDE * width, 4 * width);
        if (two && more) _tile_stored(3, answer + SIDE * width + SIDE, 4 * width);
    }
}

/* Scores of a row with `num_keys` keys, a multiple of 32, become its weights.  The keys
 * [low, high) are seen. */
INLINE void matrix_softmax(float *scores, uint16_t *weights, float *answer, int64_t width,
                           float *top, int64_t num_keys, int64_t low, int64_t high, float scale,
                           float cap) {
    vec best = splat(NOTHING);
    const int masked = low > 0 || high < num_keys;
    for (int64_t k = 0; k < num_keys; k += WIDTH) {
        vec s = load(scores + k) * splat(scale);
        if (cap != 0) s = capped(s, cap);
        if (masked) {
            ivec key = lanes() + splat_int((int32_t)k);
            ivec seen = (key >= splat_int((int32_t)low)) & (key < splat_int((int32_t)high));
            s = pick(seen, s, splat(-INFINITY));
        }
        store(scores + k, s);
        best = larger(best, s);
    }
    if (any(best > splat(*top + SLACK))) {
        const float found = largest(best), shrink = exp2f(*top - found);
        *top = found;
        for (int64_t d = 0; d < width; d += WIDTH)
            store(answer + d, load(answer + d) * splat(shrink));
    }
    const vec was = splat(*top);
    for (int64_t k = 0; k < num_keys; k += 2 * WIDTH) {
        __m512 first = rough_power((__m512)(load(scores + k) - was));
        __m512 second = rough_power((__m512)(load(scores + k + WIDTH) - was));
        _mm512_store_si512(weights + k, rounded_pairs((vec)first, (vec)second));
    }
}

#endif
#endif
