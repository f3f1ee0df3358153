/* Some keys and many rows: the lanes of a vector are rows.
 *
 *     scores   [TILE keys, rows]  = keys [TILE, dim] x queries [dim, rows]
 *     answers  [value_dim, rows] += values [TILE, value_dim]' x weights [TILE, rows]
 *
 * Products stay in registers; keys and values are factors, one number at a time, in the order in
 * which they lie; and no sum goes across a vector, for a row's maximum and sum are lanes as well.
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
    float *query, *answer; /* [dim, PANEL], [value_dim, PANEL] */
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

/* Scores of the panel's vector `j` become weights. */
INLINE void many_softmax(const struct panel *p, int j, float *scores, int64_t from,
                         int64_t num_keys, int64_t value_dim, float cap) {
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

#endif
