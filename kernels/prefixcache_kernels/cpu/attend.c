/* Attention over paged keys and values on a CPU, read where they lie, summed in float32.
 *
 * The caller cuts a batch into tasks.  A task is some packed queries and one stretch of keys that
 * they attend: a sequence's own part, or a run that a group of sequences shares.  Every task gives
 * a partial answer per query and head; then a query's partial answers are merged by their sums.
 * Queries times the heads that share a key head are the rows of a task.
 *
 *     task 0   queries 0 1 2   keys of the run          partial answers   0 1 2
 *     task 1   query 0         its own keys                               3
 *     task 2   query 1         its own keys                               4
 *     merged   query 0 = (0, 3), query 1 = (1, 4), ...
 *
 * The softmax runs along the keys (Milakov and Gimelshein, 2018).  What is computed depends on the
 * tasks alone, not on the number of threads.  With `fixed`, and tasks cut by position, a query's
 * answer depends on nothing but itself and its keys.
 */
#include "few.h"
#include "many.h"
#include "matrices.h"

#ifdef _OPENMP
#include <omp.h>
#endif

struct task {
    int64_t first;       /* of its places: in `queries`, `low`, `high` and the partial answers */
    int64_t num_queries; /* its places are consecutive */
    int64_t blocks;      /* where the ids of its blocks begin */
    int64_t skip;        /* slots before its first key in the first block */
    int64_t num_keys;    /* at least 1 */
};

struct call {
    /* The step. */
    const struct task *tasks;
    const int32_t *queries, *low, *high; /* of each place: packed query; its first, last + 1 key */
    const int32_t *blocks;
    const int32_t *merge_start, *merge; /* [T + 1] into places: the partial answers of a query */
    int64_t num_tasks, num_queries;
    /* The kind of layer. */
    int64_t heads, kv_heads, dim, value_dim, block_size, pool_blocks;
    int64_t query_type, cache_type;
    int64_t query_strides[2];                  /* in bytes, of a query and a head; then 1 number */
    int64_t key_strides[3], value_strides[3];  /* in bytes, of a block, a slot and a head */
    float scale, softcap;                      /* 0: no cap */
    int64_t fixed; /* whether a row is computed as if there were many, however few there are */
    const float *eights;                       /* [256]: what the codes of FLOAT8 mean */
    float *partial; /* [places, heads, value_dim + 2]: an answer, its maximum, its sum */
    float *room;    /* [num_threads, prefixcache_room]: what a task keeps; stacks may be small */
    int64_t num_threads, room_size;
    /* The layer. */
    const char *query, *keys, *values; /* [T, heads, dim]; [blocks, block_size, kv_heads, dim] */
    const float *sinks, *key_scale, *value_scale; /* [heads], [kv_heads], [kv_heads]; or null */
    char *out;  /* [T, heads, value_dim] of the type of `query`, contiguous */
    float *lse; /* [T, heads], natural; or null */
};

enum { MOST = 1 << 17 /* numbers of queries and answers of few rows, if all heads are at once */ };

static const float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

INLINE int64_t whole(int64_t dim) { return (dim + UNIT - 1) / UNIT * UNIT; }

INLINE int copied(const struct call *c, int64_t dim) {
    return c->cache_type != FLOAT32 || dim % UNIT;
}

INLINE float *partial(const struct call *c, int64_t place, int64_t head) {
    return c->partial + (place * c->heads + head) * (c->value_dim + 2);
}

/* Where the TILE keys from `from` on lie, in bytes from the cache's first; the last is repeated. */
INLINE void locate(const struct call *c, const struct task *t, int64_t from, int64_t *keys,
                   int64_t *values) {
    int64_t at = t->skip + from, block = at / c->block_size, slot = at % c->block_size;
    for (int i = 0; i < TILE; i++) {
        int64_t id = c->blocks[t->blocks + block];
        keys[i] = id * c->key_strides[0] + slot * c->key_strides[1];
        values[i] = id * c->value_strides[0] + slot * c->value_strides[1];
        if (from + i + 1 < t->num_keys && ++slot == c->block_size) slot = 0, block++;
    }
}

INLINE const char *query_of(const struct call *c, int64_t place, int64_t head) {
    return c->query + c->queries[place] * c->query_strides[0] + head * c->query_strides[1];
}

/* What makes products of queries with keys scores in powers of two. */
INLINE float scale_of(const struct call *c, int64_t kv_head) {
    const float scale = c->scale * LOG2_E;
    return c->key_scale ? scale * c->key_scale[kv_head] : scale;
}

/* A query's numbers, scaled so. */
INLINE void read_query(const struct call *c, int64_t place, int64_t head, float *to) {
    const float scale = scale_of(c, head / (c->heads / c->kv_heads));
    read_row(to, query_of(c, place, head), c->dim, c->query_type, c->eights);
    for (int64_t d = 0; d < c->dim; d++) to[d] *= scale;
}

/* ---- a task's room: on the heap, for a caller's stack may be small and heads many ---- */

INLINE float *take(float **room, int64_t numbers) {
    float *taken = *room;
    *room += whole(numbers);
    return taken;
}

INLINE void clear(float *numbers, int64_t num) { memset(numbers, 0, 4 * num); }

INLINE int few(const struct call *c, int64_t rows) { return rows <= FEW && !c->fixed; }

#ifdef PREFIXCACHE_AMX
static int64_t matrices_room(const struct call *c, int64_t rows) {
    const int64_t padded = (rows + SIDE - 1) / SIDE * SIDE, width = whole(c->value_dim + 1);
    const int64_t deep = (c->dim + DEEP - 1) / DEEP * SIDE;
    return padded * (deep + width) + whole(padded) + SPAN * deep + SPAN / 2 * width +
           3 * SIDE * SPAN + 8 * UNIT;
}
#endif

/* Whether a task of `rows` rows is a product of matrices.  Not with `fixed`: a query alone would have
 * to be one as well, to have the same bits as among others, and it fills 3 of a matrix's 16 rows, or
 * 1, for which all keys would be laid out anew. */
INLINE int in_matrices(const struct call *c, int64_t rows) {
#ifdef PREFIXCACHE_AMX
    return !few(c, rows) && !c->fixed && c->query_type == BFLOAT16 && c->cache_type == BFLOAT16 &&
           prefixcache_amx;
#else
    return 0;
#endif
}

/* Numbers that tasks of `rows` rows keep if `num_heads` are attended at once; at least. */
static int64_t room_of(const struct call *c, int64_t rows, int64_t num_heads) {
    const int64_t sizes = whole(c->dim) + whole(c->value_dim);
    if (few(c, rows)) return whole(num_heads * rows * (sizes + 2)) + TILE * sizes + 8 * UNIT;
#ifdef PREFIXCACHE_AMX
    if (in_matrices(c, rows)) return matrices_room(c, rows);
#endif
    const int64_t padded = (rows + PANEL - 1) / PANEL * PANEL;
    return whole(padded * (sizes + 4)) + TILE * sizes + whole(c->dim) + 8 * UNIT;
}

/* Whether a task of few rows attends all heads at once, for they lie side by side in memory: if
 * there are tasks enough, and as long as queries and answers stay in the cache. */
static int all_heads(const struct call *c, int64_t rows) {
    const int enough = c->num_threads == 1 || c->num_tasks >= 4 * c->num_threads;
    return few(c, rows) && enough &&
           c->kv_heads * rows * (whole(c->dim) + whole(c->value_dim)) <= MOST;
}

/* Whether queries meet keys and values of bfloat16 as pairs. */
INLINE int in_pairs(const struct call *c) {
#ifdef PREFIXCACHE_PAIRS
    return c->query_type == BFLOAT16 && c->cache_type == BFLOAT16 && c->dim % PAIRS == 0 &&
           c->value_dim % PAIRS == 0;
#else
    return 0;
#endif
}

/* ---- few rows ---- */

/* `after`, or null: a task that is likely to be next in this thread; its first tile is fetched. */
static void attend_few(const struct call *c, const struct task *t, const struct task *after,
                       int64_t begin, int64_t end, float *room) {
    const int64_t group = c->heads / c->kv_heads, num = t->num_queries * group;
    const int64_t dim = whole(c->dim), value_dim = whole(c->value_dim), num_heads = end - begin;
    const int pairs = in_pairs(c);
    float scores[FEW * TILE];
    float *query = take(&room, num_heads * num * dim);
    float *answer = take(&room, num_heads * num * value_dim);
    float *top = take(&room, num_heads * num), *total = take(&room, num_heads * num);
    float *key_copy = take(&room, TILE * dim), *value_copy = take(&room, TILE * value_dim);
    struct rows keys = {.copy = copied(c, c->dim) ? key_copy : 0, .width = dim};
    struct rows values = {.copy = copied(c, c->value_dim) ? value_copy : 0, .width = value_dim};
    int64_t key_places[2][TILE], value_places[2][TILE];
    clear(query, num_heads * num * dim);
    clear(answer, num_heads * num * value_dim);
    clear(key_copy, TILE * dim);
    clear(value_copy, TILE * value_dim);
    for (int64_t i = 0; i < num_heads * num; i++) {
        int64_t row = i % num, head = (begin + i / num) * group + row % group;
        top[i] = NOTHING, total[i] = 0;
        if (pairs)
            memcpy((uint16_t *)query + i * dim, query_of(c, t->first + row / group, head), 2 * dim);
        else
            read_query(c, t->first + row / group, head, query + i * dim);
    }
    const float cap = c->softcap * LOG2_E;
    const int64_t key_bytes = c->dim * size_of(c->cache_type);
    const int64_t value_bytes = c->value_dim * size_of(c->cache_type);
    int now = 0;
    locate(c, t, 0, key_places[0], value_places[0]);
    for (int64_t h = begin; h < end; h++) {
        fetch(c->keys + h * c->key_strides[2], key_places[0], TILE, key_bytes);
        fetch(c->values + h * c->value_strides[2], value_places[0], TILE, value_bytes);
    }
    for (int64_t tile = 0; tile < t->num_keys; tile += TILE, now = !now) {
        int64_t left = t->num_keys - tile, num_keys = left < TILE ? left : TILE;
        const struct task *next = left > TILE ? t : after;
        if (next)
            locate(c, next, left > TILE ? tile + TILE : 0, key_places[!now], value_places[!now]);
        for (int64_t h = begin; h < end; h++) {
            const char *k = c->keys + h * c->key_strides[2];
            const char *v = c->values + h * c->value_strides[2];
            if (next) {
                fetch(k, key_places[!now], TILE, key_bytes);
                fetch(v, value_places[!now], TILE, value_bytes);
            }
            float *q = query + (h - begin) * num * dim;
            float *a = answer + (h - begin) * num * value_dim;
#ifdef PREFIXCACHE_PAIRS
            if (pairs)
                pair_scores(num, (const uint16_t *)query + (h - begin) * num * dim, dim, k,
                            key_places[now], scale_of(c, h), scores);
#endif
            if (!pairs) {
                find_rows(&keys, k, key_places[now], c->dim, c->cache_type, c->eights);
                find_rows(&values, v, value_places[now], c->value_dim, c->cache_type, c->eights);
                few_scores(num, q, dim, &keys, num_keys, scores);
            }
            for (int64_t r = 0; r < num; r++) {
                int64_t place = t->first + r / group, i = (h - begin) * num + r;
                few_softmax(scores + r * TILE, a + r * value_dim, value_dim, top + i, total + i,
                            c->low[place] - tile, c->high[place] - tile, cap);
            }
#ifdef PREFIXCACHE_PAIRS
            if (pairs) pair_values(num, scores, v, value_places[now], num_keys, a, value_dim);
#endif
            if (!pairs) few_values(num, scores, &values, num_keys, a, value_dim);
        }
    }
    for (int64_t i = 0; i < num_heads * num; i++) {
        int64_t row = i % num, head = (begin + i / num) * group + row % group;
        float *to = partial(c, t->first + row / group, head);
#ifdef PREFIXCACHE_PAIRS
        if (pairs) in_order(to, answer + i * value_dim, value_dim);
#endif
        if (!pairs) memcpy(to, answer + i * value_dim, 4 * c->value_dim);
        to[c->value_dim] = top[i], to[c->value_dim + 1] = total[i];
    }
}

/* ---- many rows ---- */

static void attend_many(const struct call *c, const struct task *t, int64_t kv_head, float *room) {
    const int64_t group = c->heads / c->kv_heads, num = t->num_queries * group;
    const int64_t dim = whole(c->dim), value_dim = whole(c->value_dim);
    const int64_t num_panels = (num + PANEL - 1) / PANEL;
    const int pairs = in_pairs(c);
    float *query = take(&room, num_panels * dim * PANEL);
    float *answer = take(&room, num_panels * value_dim * PANEL);
    float *top = take(&room, num_panels * PANEL), *total = take(&room, num_panels * PANEL);
    int32_t *low = (int32_t *)take(&room, num_panels * PANEL);
    int32_t *high = (int32_t *)take(&room, num_panels * PANEL);
    float *key_copy = take(&room, TILE * dim), *value_copy = take(&room, TILE * value_dim);
    float *row = take(&room, dim);
    struct panel panels[num_panels]; /* some hundred bytes: a task has few rows */
    struct rows keys = {.copy = copied(c, c->dim) ? key_copy : 0, .width = dim};
    struct rows values = {.copy = copied(c, c->value_dim) ? value_copy : 0, .width = value_dim};
    int64_t key_places[2][TILE], value_places[2][TILE];
    clear(query, num_panels * dim * PANEL);
    clear(answer, num_panels * value_dim * PANEL);
    clear(key_copy, TILE * dim);
    clear(value_copy, TILE * value_dim);
    for (int64_t p = 0; p < num_panels; p++) {
        int64_t first = p * PANEL, left = num - first;
        struct panel *panel = panels + p;
        *panel = (struct panel){.query = query + first * dim,
                                .answer = answer + first * value_dim,
                                .top = top + first,
                                .total = total + first,
                                .low = low + first,
                                .high = high + first,
                                .begin = t->num_keys,
                                .all_end = t->num_keys,
                                .num_vectors = left < PANEL ? (left + WIDTH - 1) / WIDTH : WIDE};
        for (int64_t r = first; r < first + PANEL; r++) {
            top[r] = NOTHING, total[r] = 0, low[r] = 0, high[r] = 0;
            if (r >= num) continue;
            int64_t place = t->first + r / group;
            const int64_t head = kv_head * group + r % group;
            if (pairs)
                memcpy(row, query_of(c, place, head), 2 * c->dim);
            else
                read_query(c, place, head, row);
            for (int64_t d = 0; d < (pairs ? c->dim / 2 : c->dim); d++)
                memcpy(panel->query + d * PANEL + r - first, row + d, 4); /* a pair is no float */
            low[r] = c->low[place], high[r] = c->high[place];
            if (low[r] < panel->begin) panel->begin = low[r];
            if (low[r] > panel->all_begin) panel->all_begin = low[r];
            if (high[r] > panel->end) panel->end = high[r];
            if (high[r] < panel->all_end) panel->all_end = high[r];
        }
    }
    const char *k = c->keys + kv_head * c->key_strides[2];
    const char *v = c->values + kv_head * c->value_strides[2];
    const int64_t key_bytes = c->dim * size_of(c->cache_type);
    const int64_t value_bytes = c->value_dim * size_of(c->cache_type);
    const float scale = scale_of(c, kv_head), cap = c->softcap * LOG2_E;
    int now = 0;
    locate(c, t, 0, key_places[0], value_places[0]);
    fetch(k, key_places[0], TILE, key_bytes);
    fetch(v, value_places[0], TILE, value_bytes);
    for (int64_t from = 0; from < t->num_keys; from += TILE, now = !now) {
        int64_t left = t->num_keys - from, num_keys = left < TILE ? left : TILE;
        if (left > TILE) locate(c, t, from + TILE, key_places[!now], value_places[!now]);
        struct ahead ahead = {k, v, key_places[!now], value_places[!now], key_bytes, value_bytes};
        if (!pairs) {
            find_rows(&keys, k, key_places[now], c->dim, c->cache_type, c->eights);
            find_rows(&values, v, value_places[now], c->value_dim, c->cache_type, c->eights);
        }
#ifdef PREFIXCACHE_PAIRS
        if (pairs) pair_up(v, value_places[now], value_dim, (uint32_t *)value_copy);
#endif
        for (int64_t p = 0; p < num_panels; p++) {
            if (panels[p].begin >= from + num_keys || panels[p].end <= from) continue;
            const struct ahead *soon = p == 0 && left > TILE ? &ahead : 0;
#ifdef PREFIXCACHE_PAIRS
            if (pairs)
                many_pair_rows(panels + p, k, key_places[now], (const uint32_t *)value_copy, from,
                               num_keys, c->dim, value_dim, scale, cap, soon);
#endif
            if (!pairs)
                many_rows(panels + p, &keys, &values, from, num_keys, c->dim, value_dim, cap, soon);
        }
    }
    for (int64_t r = 0; r < num; r++) {
        const struct panel *panel = panels + r / PANEL;
        float *to = partial(c, t->first + r / group, kv_head * group + r % group);
        for (int64_t d = 0; d < c->value_dim; d++) to[d] = panel->answer[d * PANEL + r % PANEL];
        to[c->value_dim] = top[r], to[c->value_dim + 1] = total[r];
    }
}

/* ---- many rows, by matrices ---- */

#ifdef PREFIXCACHE_AMX

static void attend_matrices(const struct call *c, const struct task *t, int64_t kv_head,
                            float *room) {
    const int64_t group = c->heads / c->kv_heads, num = t->num_queries * group;
    const int64_t rows = (num + SIDE - 1) / SIDE * SIDE, depth = (c->dim + DEEP - 1) / DEEP;
    const int64_t width = whole(c->value_dim + 1), across = width / SIDE;
    room += -((uintptr_t)room / 4) % UNIT; /* what crosses lines of the cache is read twice */
    uint16_t *query = (uint16_t *)take(&room, rows * depth * SIDE);
    float *answer = take(&room, rows * width), *top = take(&room, rows);
    uint16_t *keys = (uint16_t *)take(&room, SPAN * depth * SIDE);
    uint16_t *values = (uint16_t *)take(&room, SPAN / 2 * width);
    float *scores = take(&room, 2 * SIDE * SPAN);
    uint16_t *weights = (uint16_t *)take(&room, SIDE * SPAN);
    int64_t key_places[2][TILE], value_places[2][TILE];
    const char *k = c->keys + kv_head * c->key_strides[2];
    const char *v = c->values + kv_head * c->value_strides[2];
    const int64_t key_bytes = 2 * c->dim, value_bytes = 2 * c->value_dim;
    const float scale = scale_of(c, kv_head);
    clear(answer, rows * width);
    memset(query, 0, 2 * rows * depth * DEEP);
    for (int64_t r = 0; r < num; r++) {
        const char *from = query_of(c, t->first + r / group, kv_head * group + r % group);
        uint16_t *to = query + r / SIDE * depth * MATRIX + r % SIDE * DEEP;
        for (int64_t d = 0; d < c->dim; d += DEEP, to += MATRIX)
            _mm512_store_si512(to, read_deep(from, d, c->dim));
    }
    for (int64_t r = 0; r < rows; r++) top[r] = NOTHING;
    amx_begin((const uint8_t[8]){SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE});
    locate(c, t, 0, key_places[0], value_places[0]);
    int now = 0;
    for (int64_t from = 0; from < t->num_keys; from += SPAN) {
        const int64_t left = t->num_keys - from, num_keys = left < SPAN ? left : SPAN;
        const int64_t whole_keys = (num_keys + DEEP - 1) / DEEP * DEEP;
        for (int64_t i = 0; i < whole_keys; i += SIDE, now = !now) {
            if (left > i + SIDE) {
                locate(c, t, from + i + SIDE, key_places[!now], value_places[!now]);
                fetch(k, key_places[!now], TILE, key_bytes);
                fetch(v, value_places[!now], TILE, value_bytes);
            }
            const int64_t some = left - i < SIDE ? left - i : SIDE;
            lay_keys(k, key_places[now], some, c->dim, keys + i * depth * DEEP);
            lay_values(v, value_places[now], some, c->value_dim, width,
                       values + i / DEEP * across * MATRIX + i % DEEP / SIDE * (MATRIX / 2));
        }
        for (int64_t first = 0; first < num; first += 2 * SIDE) {
            const int64_t end = first + 2 * SIDE < num ? first + 2 * SIDE : num;
            const int two = end - first > SIDE;
            int64_t seen = 0; /* keys up to the last that some of these rows see */
            for (int64_t r = first; r < end; r += group - r % group) {
                const int64_t high = c->high[t->first + r / group] - from;
                seen = high > seen ? high : seen;
            }
            if (!seen) continue;
            seen = seen < num_keys ? (seen + DEEP - 1) / DEEP * DEEP : whole_keys;
            matrix_scores(two, query + first * depth * DEEP, keys, depth, seen, scores);
            for (int64_t r = first; r < end; r++) {
                const int64_t place = t->first + r / group;
                matrix_softmax(scores + (r - first) * SPAN, weights + (r - first) * SPAN,
                               answer + r * width, width, top + r, seen, c->low[place] - from,
                               c->high[place] - from, scale, c->softcap * LOG2_E);
            }
            matrix_values(two, weights, values, seen, width, answer + first * width);
        }
    }
    amx_end();
    for (int64_t r = 0; r < num; r++) {
        float *to = partial(c, t->first + r / group, kv_head * group + r % group);
        memcpy(to, answer + r * width, 4 * c->value_dim);
        to[c->value_dim] = top[r], to[c->value_dim + 1] = answer[r * width + c->value_dim];
    }
}

#endif

/* Merge a query's partial answers, in the order of its list. */
static void merge(const struct call *c, int64_t query) {
    const int64_t begin = c->merge_start[query], end = c->merge_start[query + 1];
    const int64_t group = c->heads / c->kv_heads;
    float answer[c->value_dim];
    for (int64_t head = 0; head < c->heads; head++) {
        float sink = NOTHING, top;
        if (c->sinks) {
            sink = c->sinks[head] * LOG2_E;
            /* A finite one stays finite. */
            if (isinf(sink) && !isinf(c->sinks[head])) sink = sink < 0 ? NOTHING : -NOTHING;
        }
        top = sink;
        for (int64_t i = begin; i < end; i++) {
            float *part = partial(c, c->merge[i], head);
            if (part[c->value_dim] > top) top = part[c->value_dim];
        }
        float total = c->sinks ? exp2f(sink - top) : 0;
        memset(answer, 0, sizeof answer);
        for (int64_t i = begin; i < end; i++) {
            const float *part = partial(c, c->merge[i], head);
            float weight = exp2f(part[c->value_dim] - top);
            total += weight * part[c->value_dim + 1];
            for (int64_t d = 0; d < c->value_dim; d++) answer[d] += weight * part[d];
        }
        float share = (c->value_scale ? c->value_scale[head / group] : 1) / total;
        for (int64_t d = 0; d < c->value_dim; d++) answer[d] *= share;
        int64_t at = query * c->heads + head;
        write_row(c->out + at * c->value_dim * size_of(c->query_type), answer, c->value_dim,
                  c->query_type);
        if (c->lse) c->lse[at] = top == -NOTHING ? c->sinks[head] : (top + log2f(total)) * LN_2;
    }
}

/* Floats of a vector: what the library was compiled for. */
int64_t prefixcache_width(void) { return WIDTH; }

/* Whether numbers of bfloat16 meet by twos. */
int64_t prefixcache_pairs(void) {
#ifdef PREFIXCACHE_PAIRS
    return 1;
#else
    return 0;
#endif
}

/* Numbers of a thread's room: what the largest of its tasks keeps. */
int64_t prefixcache_room(const struct call *c) {
    const int64_t group = c->heads / c->kv_heads;
    int64_t most = 0;
    for (int64_t i = 0; i < c->num_tasks; i++) {
        int64_t rows = c->tasks[i].num_queries * group;
        int64_t room = room_of(c, rows, all_heads(c, rows) ? c->kv_heads : 1);
        most = room > most ? room : most;
    }
    return whole(most);
}

/* Attend all queries of a layer.  Gives 0; or 1, with nothing computed, if a task names a block
 * that the pool does not have. */
int64_t prefixcache_attend(const struct call *c) {
    uint32_t largest_id = 0;
    for (int64_t i = 0; i < c->num_tasks; i++) {
        const struct task *t = c->tasks + i;
        int64_t last = (t->skip + t->num_keys - 1) / c->block_size;
        for (int64_t block = 0; block <= last; block++) {
            uint32_t id = (uint32_t)c->blocks[t->blocks + block]; /* negative ones are large */
            largest_id = id > largest_id ? id : largest_id;
        }
    }
    if (c->num_tasks && largest_id >= c->pool_blocks) return 1;
    const int64_t group = c->heads / c->kv_heads, num_units = c->num_tasks * c->kv_heads;
    const struct task *end = c->tasks + c->num_tasks;
#pragma omp parallel for schedule(dynamic) num_threads(c->num_threads) if (c->num_threads > 1)
    for (int64_t unit = 0; unit < num_units; unit++) {
        const struct task *t = c->tasks + unit / c->kv_heads;
        int64_t head = unit % c->kv_heads, rows = t->num_queries * group;
        float *room = c->room;
#ifdef _OPENMP
        room += omp_get_thread_num() * c->room_size;
#endif
#ifdef PREFIXCACHE_AMX
        if (in_matrices(c, rows)) {
            attend_matrices(c, t, head, room);
            continue;
        }
#endif
        if (!few(c, rows))
            attend_many(c, t, head, room);
        else if (!all_heads(c, rows))
            attend_few(c, t, 0, head, head + 1, room);
        else if (head == 0)
            attend_few(c, t, t + c->num_threads < end ? t + c->num_threads : 0, 0, c->kv_heads,
                       room);
    }
#pragma omp parallel for schedule(static) num_threads(c->num_threads) if (c->num_threads > 1)
    for (int64_t query = 0; query < c->num_queries; query++) merge(c, query);
    return 0;
}
