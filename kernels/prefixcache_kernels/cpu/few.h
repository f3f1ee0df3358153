/* A tile of keys and few rows: the lanes of a vector are dimensions, then keys of the tile.
 *
 * What decoding does: every number of keys and values is used by the few heads of a group, so
 * memory sets the pace, and a sum across a vector per key and row is affordable.
 */
#ifndef PREFIXCACHE_FEW_H
#define PREFIXCACHE_FEW_H

#include "tile.h"

enum {
    FEW = 8,  /* rows; more are faster side by side */
    SOME = 4, /* rows, and vectors of an answer, that fit the registers together */
};

INLINE void scores_of(const int num, const float *query, int64_t dim, const struct rows *keys,
                      int64_t num_keys, float *scores) {
    for (int64_t k = 0; k < num_keys; k++) {
        vec acc[SOME] = {{0}};
        for (int64_t d = 0; d < dim; d += WIDTH) {
            vec key = load(keys->row[k] + d);
            for (int r = 0; r < num; r++) acc[r] += key * load(query + r * dim + d);
        }
        for (int r = 0; r < num; r++) scores[r * TILE + k] = sum(acc[r]);
    }
}

INLINE void values_of(const int num, const int wide, const float *weights,
                      const struct rows *values, int64_t from, int64_t num_keys, float *answer,
                      int64_t dim) {
    vec acc[SOME][SOME];
    for (int r = 0; r < num; r++)
        for (int j = 0; j < wide; j++) acc[r][j] = load(answer + r * dim + from + j * WIDTH);
    for (int64_t k = 0; k < num_keys; k++)
        for (int j = 0; j < wide; j++) {
            vec value = load(values->row[k] + from + j * WIDTH);
            for (int r = 0; r < num; r++) acc[r][j] += splat(weights[r * TILE + k]) * value;
        }
    for (int r = 0; r < num; r++)
        for (int j = 0; j < wide; j++) store(answer + r * dim + from + j * WIDTH, acc[r][j]);
}

/* `[rows, TILE]` products of queries `[rows, dim]` with the keys. */
INLINE void few_scores(int64_t num, const float *query, int64_t dim, const struct rows *keys,
                       int64_t num_keys, float *scores) {
    for (int64_t r = 0; r < num; r += SOME) {
        const float *q = query + r * dim;
        float *s = scores + r * TILE;
        switch (num - r) {
            case 1: scores_of(1, q, dim, keys, num_keys, s); break;
            case 2: scores_of(2, q, dim, keys, num_keys, s); break;
            case 3: scores_of(3, q, dim, keys, num_keys, s); break;
            default: scores_of(4, q, dim, keys, num_keys, s);
        }
    }
}

/* Scores of a row become weights of the keys [low, high) of the tile. */
INLINE void few_softmax(float *scores, float *answer, int64_t dim, float *top, float *total,
                        int64_t low, int64_t high, float cap) {
    vec s[TILE / WIDTH], best = splat(NOTHING);
    for (int j = 0; j < TILE / WIDTH; j++) {
        ivec key = lanes() + splat_int(j * WIDTH);
        ivec seen = (key >= splat_int((int32_t)low)) & (key < splat_int((int32_t)high));
        s[j] = load(scores + j * WIDTH);
        if (cap != 0) s[j] = capped(s[j], cap);
        s[j] = pick(seen, s[j], splat(-INFINITY));
        best = larger(best, s[j]);
    }
    float found = largest(best);
    if (found > *top + SLACK) {
        float shrink = exp2f(*top - found);
        *top = found, *total *= shrink;
        for (int64_t d = 0; d < dim; d += WIDTH)
            store(answer + d, load(answer + d) * splat(shrink));
    }
    vec all = {0};
    for (int j = 0; j < TILE / WIDTH; j++) {
        s[j] = power_of_two(s[j] - splat(*top));
        all += s[j];
        store(scores + j * WIDTH, s[j]);
    }
    *total += sum(all);
}

/* Add the weighted values to answers `[rows, dim]`. */
INLINE void few_values(int64_t num, const float *weights, const struct rows *values,
                       int64_t num_keys, float *answer, int64_t dim) {
    for (int64_t r = 0; r < num; r += SOME)
        for (int64_t d = 0; d < dim; d += SOME * WIDTH) {
            const float *w = weights + r * TILE;
            float *a = answer + r * dim;
            int64_t rows = num - r < SOME ? num - r : SOME;
            int64_t wide = dim - d < SOME * WIDTH ? (dim - d) / WIDTH : SOME;
#define CASE(ROWS, VECTORS)                                                \
    case ROWS * 10 + VECTORS:                                              \
        values_of(ROWS, VECTORS, w, values, d, num_keys, a, dim);          \
        break
#define CASES(ROWS) CASE(ROWS, 1); CASE(ROWS, 2); CASE(ROWS, 3); CASE(ROWS, 4)
            switch (rows * 10 + wide) { CASES(1); CASES(2); CASES(3); CASES(4); }
#undef CASES
#undef CASE
        }
}

/* ---- keys and values of bfloat16, read as pairs of numbers where they lie ---- */

#ifdef PREFIXCACHE_PAIRS

/* The sum of each of 16 vectors. */
INLINE vec sums(const __m512 *x) {
    __m512 t[8], u[4], v[2];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) +
               _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88) +
               _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd);
    return (vec)(_mm512_shuffle_f32x4(v[0], v[1], 0x88) + _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

/* `few_scores` of all TILE keys, with queries as they came; then scaled. */
INLINE void pair_scores(int64_t num, const uint16_t *query, int64_t dim, const char *cache,
                        const int64_t *places, float scale, float *scores) {
    for (int64_t r = 0; r < num; r++) {
        __m512 acc[TILE];
        for (int k = 0; k < TILE; k++) acc[k] = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += PAIRS) {
            const __m512bh q = (__m512bh)_mm512_loadu_si512(query + r * dim + d);
            for (int k = 0; k < TILE; k++)
                acc[k] = _mm512_dpbf16_ps(
                    acc[k], (__m512bh)_mm512_loadu_si512(cache + places[k] + 2 * d), q);
        }
        store(scores + r * TILE, sums(acc) * splat(scale));
    }
}

INLINE void pair_values_of(const int num, const int wide, const float *weights, const char *cache,
                           const int64_t *places, int64_t num_keys, float *answer, int64_t dim) {
    vec acc[SOME][SOME];
    for (int r = 0; r < num; r++)
        for (int j = 0; j < 2 * wide; j++) acc[r][j] = load(answer + r * dim + j * WIDTH);
    for (int64_t k = 0; k < num_keys; k++)
        for (int j = 0; j < wide; j++) {
            const ivec pairs = *(const ivec *)(cache + places[k] + 2 * j * PAIRS);
            const vec even = (vec)(pairs << 16), odd = (vec)(pairs & splat_int(-65536));
            for (int r = 0; r < num; r++) {
                const vec weight = splat(weights[r * TILE + k]);
                acc[r][2 * j] += weight * even;
                acc[r][2 * j + 1] += weight * odd;
            }
        }
    for (int r = 0; r < num; r++)
        for (int j = 0; j < 2 * wide; j++) store(answer + r * dim + j * WIDTH, acc[r][j]);
}

/* `few_values`, into answers whose vectors have by turns the even and the odd of 32 numbers. */
INLINE void pair_values(int64_t num, const float *weights, const char *cache,
                        const int64_t *places, int64_t num_keys, float *answer, int64_t dim) {
    for (int64_t r = 0; r < num; r += SOME)
        for (int64_t d = 0; d < dim; d += SOME / 2 * PAIRS) {
            const float *w = weights + r * TILE;
            float *a = answer + r * dim + d;
            const char *v = cache + 2 * d;
            int64_t rows = num - r < SOME ? num - r : SOME;
            int64_t wide = dim - d < SOME / 2 * PAIRS ? (dim - d) / PAIRS : SOME / 2;
#define CASE(ROWS, VECTORS)                                                \
    case ROWS * 10 + VECTORS:                                              \
        pair_values_of(ROWS, VECTORS, w, v, places, num_keys, a, dim);     \
        break
#define CASES(ROWS) CASE(ROWS, 1); CASE(ROWS, 2)
            switch (rows * 10 + wide) { CASES(1); CASES(2); CASES(3); CASES(4); }
#undef CASES
#undef CASE
        }
}

/* Such an answer, in the order of its numbers. */
INLINE void in_order(float *to, const float *answer, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) {
        const int64_t at = d % PAIRS;
        to[d] = answer[d - at + at % 2 * WIDTH + at / 2];
    }
}

#endif

#endif
