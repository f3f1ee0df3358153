/* The processor's matrices of bfloat16 (AMX): eight registers, tiles, of up to 16 rows of 64 bytes.
 *
 *     sums [rows][16] float  +=  rows [rows][32] bfloat16  .  weights [16 pairs][16][2] bfloat16
 *
 * Linux gives a process tiles if it asks.  It is asked once, when the library is loaded; where it
 * refuses, `prefixcache_amx` is 0 and no code here may run.  A thread configures its tiles before
 * the first, and releases them after the last: what is left configured is saved at every switch.
 */
#ifndef PREFIXCACHE_AMX_H
#define PREFIXCACHE_AMX_H

#include <stdint.h>

/* Whether tiles may be used: 0 or 1.  A test may clear it, while nothing runs. */
extern int64_t prefixcache_amx;

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && \
    defined(__AVX512BF16__)
#define PREFIXCACHE_AMX

#if defined(__AMX_INT8__)
#define PREFIXCACHE_AMX_INT8 /* every processor with the one has the other, so far */
#endif

#include "vectors.h"

enum {
    AMX_ROWS = 16,         /* of a tile, at most */
    AMX_INPUTS = 32,       /* bfloat16 of its row */
    AMX_BYTES = 16 * 64    /* of a whole tile */
};

/* Sizes of the eight tiles, as `ldtilecfg` reads them. */
struct amx_sizes {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} __attribute__((aligned(64)));

/* What tiles are loaded from has been written: the compiler does not see that they read it. */
INLINE void amx_written(const void *from) { __asm__ volatile("" : : "r"(from) : "memory"); }

/* Configure tile `i` to have rows[i] rows, all of 64 bytes. */
INLINE void amx_begin(const uint8_t rows[8]) {
    struct amx_sizes sizes = {.palette = 1};
    for (int i = 0; i < 8; i++) sizes.bytes[i] = 64, sizes.rows[i] = rows[i];
    amx_written(&sizes);
    _tile_loadconfig(&sizes);
}

INLINE void amx_end(void) { _tile_release(); }

#endif
#endif
