/* A tile: some consecutive keys or values of one head, wherever the pool has them. */
#ifndef PREFIXCACHE_TILE_H
#define PREFIXCACHE_TILE_H

#include "vectors.h"

#include <math.h>

enum {
    TILE = 16, /* keys at a time; a multiple of WIDTH and of STEP */
    UNIT = 16  /* what sizes of rows are rounded up to; likewise */
};

#if defined(__AVX512BF16__)
#define PREFIXCACHE_PAIRS /* numbers of bfloat16 meet by twos, where they lie */

enum { PAIRS = 2 * WIDTH /* numbers of a vector of pairs */ };
#endif

/* A running maximum is raised only by more than this, so weights are at most 2^8 and answers are
 * seldom scaled anew; the quotient at the end is the same.  Scores are powers of two. */
static const float SLACK = 8;

static const float NOTHING = -3.4e38f; /* the maximum of no scores: finite, for differences */

/* Where each row is.  Rows that are no floats, or no whole vectors, are copied first. */
struct rows {
    const float *row[TILE];
    float *copy; /* [TILE, width] with zeros behind each row, or null */
    int64_t width;
};

INLINE void find_rows(struct rows *rows, const char *cache, const int64_t *places, int64_t dim,
                      enum type type, const float *eights) {
    for (int i = 0; i < TILE; i++) {
        const char *row = cache + places[i];
        if (rows->copy) {
            float *copy = rows->copy + i * rows->width;
            read_row(copy, row, dim, type, eights);
            rows->row[i] = copy;
        } else {
            rows->row[i] = (const float *)row;
        }
    }
}

/* The tile that comes next.  Its rows are brought into the cache while this one is attended: they
 * are too far apart for the processor to foresee.  Measured: up to 1.4 times as fast. */
struct ahead {
    const char *keys, *values; /* of the head */
    const int64_t *key_places, *value_places;
    int64_t key_bytes, value_bytes; /* of a row */
};

INLINE void fetch(const char *cache, const int64_t *places, int64_t num_rows, int64_t num_bytes) {
    for (int64_t i = 0; i < num_rows; i++)
        for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(cache + places[i] + at);
}

INLINE void fetch_keys(const struct ahead *a, int64_t from, int64_t num_rows) {
    fetch(a->keys, a->key_places + from, num_rows, a->key_bytes);
}

INLINE void fetch_values(const struct ahead *a, int64_t from, int64_t num_rows) {
    fetch(a->values, a->value_places + from, num_rows, a->value_bytes);
}

#endif
