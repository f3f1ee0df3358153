/* A layer of Llama's family in one call: products, rotation, the pool's slots, attention, products.
 *
 *     x ── norm ── qkv ──┬─ rotate ── query ──┐
 *     │                  └─ rotate ── the pool's slots ── attention ── out ── + x
 *     └─ x ── norm ── gate, up ── silu(gate) * up ── down ── + x
 *
 * What goes from layer to layer (x) is float32, whatever the weights and the pool are.  Every row is
 * computed by itself, so it has the same bits beside any others; of attention see `attend.c`.
 */
#include "linear.h"

#include <math.h>

struct call; /* of attend.c */
int64_t prefixcache_attend(const struct call *c);

struct matrix {
    const void *weights; /* packed, see `linear.c` */
    const float *bias;   /* or null */
    int64_t inputs, outputs, columns, type;
};

struct layer {
    struct matrix qkv, out, gate_up, down;
    const float *input_norm, *post_norm; /* [hidden] */
    const float *q_norm, *k_norm;        /* [dim], or null */
};

/* A step of the model; the same for all of its layers but for the pool's addresses. */
struct step {
    float *x;              /* [rows, hidden] */
    float *wide;           /* [rows, qkv's columns], then [rows, down's inputs] */
    char *query, *attended; /* [rows, heads, dim] of the pool's type */
    float *room;           /* as of `struct linear`, for the widest inputs */
    const float *cos, *sin; /* [rows, dim / 2] */
    const int64_t *slots;  /* [rows], each in the pool; -1: none */
    char *keys, *values;   /* [blocks, block_size, kv_heads, dim]; each slot's numbers in one row */
    int64_t rows, heads, kv_heads, dim, pool_type, num_threads;
    int64_t key_stride, value_stride; /* in bytes, of a slot: slots lie in one row */
    float eps;
};

enum { BEFORE = 1, AFTER = 2 }; /* up to attention, and that; what is behind it */

static void multiply(const struct step *s, const struct matrix *m, const void *x, int64_t x_type,
                     const float *norm, void *out, enum after after) {
    const struct linear c = {
        .weights = m->weights,
        .bias = m->bias,
        .x = x,
        .norm = norm,
        .out = out,
        .room = s->room,
        .rows = s->rows,
        .inputs = m->inputs,
        .outputs = m->outputs,
        .columns = m->columns,
        .x_stride = m->inputs * size_of(x_type),
        .out_stride = m->columns * 4,
        .weight_type = m->type,
        .x_type = x_type,
        .out_type = FLOAT32,
        .after = after,
        .num_threads = s->num_threads,
        .eps = s->eps,
    };
    prefixcache_linear(&c);
}

/* Normalise and rotate a head; write it as the pool's type.  `made`: room for it. */
static void place_head(const struct step *s, const float *x, const float *norm, const float *cos,
                       const float *sin, float *made, void *to) {
    const int64_t half = s->dim / 2;
    float scale = 1;
    if (norm) {
        float total = 0;
        for (int64_t d = 0; d < s->dim; d++) total += x[d] * x[d];
        scale = 1 / sqrtf(total / (float)s->dim + s->eps);
    }
    for (int64_t d = 0; d < half; d++) {
        float a = x[d], b = x[d + half];
        if (norm) a = a * scale * norm[d], b = b * scale * norm[d + half];
        made[d] = a * cos[d] - b * sin[d];
        made[d + half] = b * cos[d] + a * sin[d];
    }
    write_row(to, made, s->dim, s->pool_type);
}

/* Rotate a row's queries and keys; its keys and values go to their slot. */
static void place_row(const struct step *s, const struct layer *l, int64_t row) {
    const int64_t dim = s->dim, bytes = dim * size_of(s->pool_type);
    const float *x = s->wide + row * l->qkv.columns;
    const float *cos = s->cos + row * dim / 2, *sin = s->sin + row * dim / 2;
    float made[dim]; /* the caller bounds it */
    for (int64_t h = 0; h < s->heads; h++, x += dim)
        place_head(s, x, l->q_norm, cos, sin, made, s->query + (row * s->heads + h) * bytes);
    const int64_t slot = s->slots[row];
    if (slot < 0) return;
    char *key = s->keys + slot * s->key_stride, *value = s->values + slot * s->value_stride;
    for (int64_t h = 0; h < s->kv_heads; h++, x += dim)
        place_head(s, x, l->k_norm, cos, sin, made, key + h * bytes);
    write_row(value, x, s->kv_heads * dim, s->pool_type);
}

/* Cosines and sines [rows, half] of positions times frequencies, each by itself. */
void prefixcache_rotation(const int64_t *positions, const float *frequencies, int64_t rows,
                          int64_t half, float scale, float *cos, float *sin) {
    for (int64_t i = 0; i < rows * half; i++) {
        const float angle = (float)positions[i / half] * frequencies[i % half];
        cos[i] = cosf(angle) * scale;
        sin[i] = sinf(angle) * scale;
    }
}

/* Compute a layer, or the parts of it that are asked for.  `attention` is that of the step, with
 * this layer's keys and values.  Gives what `prefixcache_attend` does. */
int64_t prefixcache_layer(const struct step *s, const struct layer *l, const struct call *attention,
                          int64_t parts) {
    if (parts & BEFORE) {
        multiply(s, &l->qkv, s->x, FLOAT32, l->input_norm, s->wide, STORED);
#pragma omp parallel for schedule(static) num_threads(s->num_threads) if (s->num_threads > 1)
        for (int64_t row = 0; row < s->rows; row++) place_row(s, l, row);
        int64_t failed = prefixcache_attend(attention);
        if (failed) return failed;
    }
    if (parts & AFTER) {
        multiply(s, &l->out, s->attended, s->pool_type, 0, s->x, ADDED);
        multiply(s, &l->gate_up, s->x, FLOAT32, l->post_norm, s->wide, GATED);
        multiply(s, &l->down, s->wide, FLOAT32, 0, s->x, ADDED);
    }
    return 0;
}
