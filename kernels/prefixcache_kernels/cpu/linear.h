/* A product of some rows with packed weights, as its callers describe it; see `linear.c`. */
#ifndef PREFIXCACHE_LINEAR_H
#define PREFIXCACHE_LINEAR_H

#include "vectors.h"

/* Inputs that share a scale, of weights of 8 bits; rows in the room are padded to so many. */
#define PREFIXCACHE_GROUP 64

/* What becomes of the products; as the caller names it. */
enum after { STORED, ADDED, GATED };

struct linear {
    const void *weights;   /* packed */
    const float *bias;     /* [outputs], or null */
    const char *x;         /* [rows, inputs] */
    const float *norm;     /* [inputs]: x is divided by its root mean square, times this; or null */
    char *out;             /* [rows, columns] */
    float *room;           /* [rows + num_threads, inputs, rounded up to whole groups]: the tiles,
                            * and a row for each thread */
    int64_t rows, inputs, outputs; /* outputs: of the packed weights, whole panels */
    int64_t columns;       /* of the answer: what of `outputs`, or of half of them, is no padding */
    int64_t x_stride, out_stride; /* in bytes, of a row */
    int64_t weight_type, x_type, out_type; /* `enum type`; FLOAT32 if ADDED */
    int64_t after;
    int64_t num_threads;
    float eps;
};

void prefixcache_linear(const struct linear *c);

#endif
