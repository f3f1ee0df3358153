/* Some keys and many rows: the lanes of a vector are rows.
 *
 *     scores   [TILE keys, rows]  = keys [TILE, dim] x queries [dim, rows]
 *     answers  [value_dim, rows] += values [TILE, value_dim]' x weights [TILE, rows]
 *
 * Products stay in registers; keys and values are factors, one number at a time, in the order in
 * which they lie; and no sum goes across a vector, for a row's maximum and sum are lanes as well.
 * Of bfloat16 two numbers are a factor, where the processor has an instruction for that: two
 * dimensions of a key, and the values of two keys in one dimension.
 */
#ifndef PREFIXCACHE_MANY_H
#define PREFIXCACHE_MANY_H

#include "tile.h"

enum {
    PANEL = WIDE * WIDTH, /* rows side by side */
    SOON = 4              /* rows of values that are fetched at a time */
};

/* Rows of a task, and how far their softmax has come. */
struct panel {
    float *query, *answer; /* [dim, PANEL], or pairs [dim / 2, PANEL]; [value_dim, PANEL] */
    float *top, *total;    /* [PANEL]: maximum, sum */
    int32_t *low, *high;   /* [PANEL]: first and last + 1 key */
    int64_t begin, end;    /* keys that some row sees */
    int64_t all_begin, all_end; /* keys that every row sees */
    int64_t num_vectors;
};

INLINE void many_scores(const int wide, const float *query, int64_t dim, const float *const *keys,
                        float *scores) {
    vec acc[STEP][WIDE];
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++) acc[i][j] = (vec){0};
    for (int64_t d = 0; d < dim; d++) {
        vec q[WIDE];
        for (int j = 0; j < wide; j++) q[j] = load(query + d * PANEL + j * WIDTH);
        for (int i = 0; i < STEP; i++) {
            vec key = splat(keys[i][d]);
            for (int j = 0; j < wide; j++) acc[i][j] += key * q[j];
        }
    }
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++) store(scores + i * PANEL + j * WIDTH, acc[i][j]);
}

INLINE void many_values(const int wide, const float *weights, const struct rows *values,
                        int64_t from, int64_t num_keys, float *answer) {
    vec acc[STEP][WIDE];
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++) acc[i][j] = load(answer + i * PANEL + j * WIDTH);
    for (int64_t k = 0; k < num_keys; k++) {
        vec w[WIDE];
        for (int j = 0; j < wide; j++) w[j] = load(weights + k * PANEL + j * WIDTH);
        const float *value = values->row[k] + from;
        for (int i = 0; i < STEP; i++)
            for (int j = 0; j < wide; j++) acc[i][j] += splat(value[i]) * w[j];
    }
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++) store(answer + i * PANEL + j * WIDTH, acc[i][j]);
}

/* Scores of the panel's vector `j` get a mask and, where they rise, a new maximum, which is given. */
INLINE vec many_tops(const struct panel *p, int j, float *scores, int64_t from, int64_t num_keys,
                     int64_t value_dim, float cap) {
    float *answer = p->answer + j * WIDTH, *top = p->top + j * WIDTH, *total = p->total + j * WIDTH;
    if (cap != 0)
        for (int64_t k = 0; k < num_keys; k++)
            store(scores + k * PANEL, capped(load(scores + k * PANEL), cap));
    if (from < p->all_begin || from + num_keys > p->all_end) {
        ivec low, high;
        memcpy(&low, p->low + j * WIDTH, sizeof low);
        memcpy(&high, p->high + j * WIDTH, sizeof high);
        for (int64_t k = 0; k < num_keys; k++) {
            ivec key = splat_int((int32_t)(from + k)), seen = (key >= low) & (key < high);
            store(scores + k * PANEL, pick(seen, load(scores + k * PANEL), splat(-INFINITY)));
        }
    }
    vec best = load(scores), was = load(top);
    for (int64_t k = 1; k < num_keys; k++) best = larger(best, load(scores + k * PANEL));
    ivec rises = best > was + splat(SLACK);
    if (any(rises)) {
        vec now = pick(rises, best, was), shrink = power_of_two(was - now);
        store(top, now);
        store(total, load(total) * shrink);
        for (int64_t d = 0; d < value_dim; d++)
            store(answer + d * PANEL, load(answer + d * PANEL) * shrink);
        was = now;
    }
    return was;
}

/* Scores of the panel's vector `j` become weights. */
INLINE void many_softmax(const struct panel *p, int j, float *scores, int64_t from,
                         int64_t num_keys, int64_t value_dim, float cap) {
    const vec was = many_tops(p, j, scores, from, num_keys, value_dim, cap);
    float *total = p->total + j * WIDTH;
    vec all = {0};
    for (int64_t k = 0; k < num_keys; k++) {
        vec weight = power_of_two(load(scores + k * PANEL) - was);
        all += weight;
        store(scores + k * PANEL, weight);
    }
    store(total, load(total) + all);
}

INLINE void some_rows(const int wide, const struct panel *p, const struct rows *keys,
                      const struct rows *values, int64_t from, int64_t num_keys, int64_t dim,
                      int64_t value_dim, float cap, const struct ahead *ahead) {
    float scores[TILE * PANEL] __attribute__((aligned(64)));
    int64_t fetched = 0;
    for (int64_t k = 0; k < num_keys; k += STEP) {
        if (ahead) fetch_keys(ahead, k, STEP);
        many_scores(wide, p->query, dim, keys->row + k, scores + k * PANEL);
    }
    for (int j = 0; j < wide; j++)
        many_softmax(p, j, scores + j * WIDTH, from, num_keys, value_dim, cap);
    for (int64_t d = 0; d < value_dim; d += STEP) {
        if (ahead && fetched < TILE) fetch_values(ahead, fetched, SOON), fetched += SOON;
        many_values(wide, scores, values, d, num_keys, p->answer + d * PANEL);
    }
}

/* Attend a panel to keys `from` up to `from + num_keys` of the task. */
INLINE void many_rows(const struct panel *p, const struct rows *keys, const struct rows *values,
                      int64_t from, int64_t num_keys, int64_t dim, int64_t value_dim, float cap,
                      const struct ahead *ahead) {
#define SOME_ROWS(WIDE) some_rows(WIDE, p, keys, values, from, num_keys, dim, value_dim, cap, ahead)
    switch (p->num_vectors) {
        case 1: SOME_ROWS(1); break;
        case 2: SOME_ROWS(2); break;
        default: SOME_ROWS(3);
    }
#undef SOME_ROWS
}

/* ---- queries, keys and values of bfloat16: a lane has two numbers of a row ---- */

#ifdef PREFIXCACHE_PAIRS

INLINE __m512bh splat_pair(const void *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

INLINE void many_pair_scores(const int wide, const float *query, int64_t dim, const char *cache,
                             const int64_t *places, float scale, float *scores) {
    __m512 acc[STEP][WIDE];
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++) acc[i][j] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 2, query += PANEL) {
        __m512bh q[WIDE];
        for (int j = 0; j < wide; j++) q[j] = (__m512bh)_mm512_loadu_si512(query + j * WIDTH);
        for (int i = 0; i < STEP; i++) {
            const __m512bh key = splat_pair(cache + places[i] + 2 * d);
            for (int j = 0; j < wide; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], key, q[j]);
        }
    }
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++)
            store(scores + i * PANEL + j * WIDTH, (vec)acc[i][j] * splat(scale));
}

/* Values of a tile by twos of its keys: `[TILE / 2, dim]` pairs. */
INLINE void pair_up(const char *cache, const int64_t *places, int64_t dim, uint32_t *to) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int k = 0; k < TILE; k += 2)
        for (int64_t d = 0; d < dim; d += PAIRS, to += PAIRS) {
            const __m512i a = _mm512_loadu_si512(cache + places[k] + 2 * d);
            const __m512i b = _mm512_loadu_si512(cache + places[k + 1] + 2 * d);
            const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi64(even, low, odd));
            _mm512_storeu_si512(to + WIDTH, _mm512_permutex2var_epi64(even, high, odd));
        }
}

/* Scores of the panel's vector `j` become weights, rounded, by twos of keys: `[num_keys / 2, PANEL]`.
 * What is summed is what they are rounded to: so the mean of equal values is that value. */
INLINE void many_pair_softmax(const struct panel *p, int j, float *scores, int64_t from,
                              int64_t num_keys, int64_t value_dim, float cap, uint32_t *weights) {
    const vec was = many_tops(p, j, scores, from, num_keys, value_dim, cap);
    const __m512i by_turns = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    float *total = p->total + j * WIDTH;
    vec all = {0};
    for (int64_t k = 0; k < num_keys; k += 2, weights += PANEL) {
        const __m512 first = rough_power((__m512)(load(scores + k * PANEL) - was));
        __m512 second = _mm512_setzero_ps();
        if (k + 1 < num_keys) second = rough_power((__m512)(load(scores + (k + 1) * PANEL) - was));
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        const ivec pair = (ivec)_mm512_permutexvar_epi16(by_turns, rounded);
        all += (vec)(pair << 16) + (vec)(pair & splat_int(-65536));
        _mm512_storeu_si512(weights, (__m512i)pair);
    }
    store(total, load(total) + all);
}

INLINE void many_pair_values(const int wide, const uint32_t *weights, const uint32_t *values,
                             int64_t value_dim, int64_t num_keys, float *answer) {
    __m512 acc[STEP][WIDE];
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++) acc[i][j] = (__m512)load(answer + i * PANEL + j * WIDTH);
    for (int64_t k = 0; k < num_keys; k += 2, weights += PANEL, values += value_dim) {
        __m512bh w[WIDE];
        for (int j = 0; j < wide; j++) w[j] = (__m512bh)_mm512_loadu_si512(weights + j * WIDTH);
        for (int i = 0; i < STEP; i++) {
            const __m512bh value = splat_pair(values + i);
            for (int j = 0; j < wide; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], value, w[j]);
        }
    }
    for (int i = 0; i < STEP; i++)
        for (int j = 0; j < wide; j++)
            store(answer + i * PANEL + j * WIDTH, (vec)acc[i][j]);
}

INLINE void some_pair_rows(const int wide, const struct panel *p, const char *keys,
                           const int64_t *places, const uint32_t *values, int64_t from,
                           int64_t num_keys, int64_t dim, int64_t value_dim, float scale, float cap,
                           const struct ahead *ahead) {
    float scores[TILE * PANEL] __attribute__((aligned(64)));
    uint32_t weights[TILE / 2 * PANEL] __attribute__((aligned(64)));
    int64_t fetched = 0;
    for (int64_t k = 0; k < num_keys; k += STEP) {
        if (ahead) fetch_keys(ahead, k, STEP);
        many_pair_scores(wide, p->query, dim, keys, places + k, scale, scores + k * PANEL);
    }
    for (int j = 0; j < wide; j++)
        many_pair_softmax(p, j, scores + j * WIDTH, from, num_keys, value_dim, cap,
                          weights + j * WIDTH);
    for (int64_t d = 0; d < value_dim; d += STEP) {
        if (ahead && fetched < TILE) fetch_values(ahead, fetched, SOON), fetched += SOON;
        many_pair_values(wide, weights, values + d, value_dim, num_keys, p->answer + d * PANEL);
    }
}

/* `many_rows`, of keys as they lie and of values as `pair_up` gives them. */
INLINE void many_pair_rows(const struct panel *p, const char *keys, const int64_t *places,
                           const uint32_t *values, int64_t from, int64_t num_keys, int64_t dim,
                           int64_t value_dim, float scale, float cap, const struct ahead *ahead) {
#define SOME_ROWS(WIDE)                                                                          \
    some_pair_rows(WIDE, p, keys, places, values, from, num_keys, dim, value_dim, scale, cap, ahead)
    switch (p->num_vectors) {
        case 1: SOME_ROWS(1); break;
        case 2: SOME_ROWS(2); break;
        default: SOME_ROWS(3);
    }
#undef SOME_ROWS
}

#endif

#endif
