/* Vectors of floats as wide as the processor's, and what attention does to them.
 *
 * GCC's and Clang's vector extension gives the arithmetic; where a single instruction exists that
 * neither finds by itself, it is named.  Without AVX the vectors are four floats wide, which every
 * 64-bit processor has.
 */
#ifndef PREFIXCACHE_VECTORS_H
#define PREFIXCACHE_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

/* WIDTH: floats of a vector.  STEP x WIDE: vectors that a product keeps in registers; with the WIDE
 * it reads and one factor they just fit the 32 (AVX-512, NEON) or 16 registers. */
#if defined(__AVX512F__)
enum { WIDTH = 16, STEP = 8, WIDE = 3 };
#elif defined(__AVX__)
enum { WIDTH = 8, STEP = 4, WIDE = 3 };
#elif defined(__aarch64__)
enum { WIDTH = 4, STEP = 8, WIDE = 3 };
#else
enum { WIDTH = 4, STEP = 4, WIDE = 3 };
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const vec *)from; }

INLINE void store(float *to, vec x) { *(vec *)to = x; }

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE ivec splat_int(int32_t x) { return x - (ivec){0}; }

/* Lane by lane: `yes` where `where` is all ones, `no` where it is 0. */
INLINE vec pick(ivec where, vec yes, vec no) {
    return (vec)(((ivec)yes & where) | ((ivec)no & ~where));
}

/* The second if either is not a number. */
INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lanes[WIDTH];
    memcpy(lanes, &x, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

INLINE float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lanes[WIDTH];
    memcpy(lanes, &x, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
#endif
}

INLINE int any(ivec where) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)where, (__m512i)where) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)where) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < WIDTH; i++) found |= where[i];
    return found != 0;
#endif
}

INLINE ivec lanes(void) {
    ivec x;
    for (int i = 0; i < WIDTH; i++) x[i] = i;
    return x;
}

/* 2^x to 2 units in the last place for x <= 126; 0 below -126.  The whole part of x goes to the
 * exponent, the rest through a polynomial of degree 6 (Cephes' exp2f). */
INLINE vec power_of_two(vec x) {
    const vec whole = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = larger(splat(-127.0f), x);
    vec rounded = x + whole;
    vec rest = x - (rounded - whole);
    vec y = splat(1.535336188319500e-4f);
    y = y * rest + splat(1.339887440266574e-3f);
    y = y * rest + splat(9.618437357674640e-3f);
    y = y * rest + splat(5.550332471162809e-2f);
    y = y * rest + splat(2.402264791363012e-1f);
    y = y * rest + splat(6.931472028550421e-1f);
    y = y * rest + splat(1.0f);
    ivec exponent = ((ivec)rounded + splat_int(127 - 0x4b400000)) << 23;
    return y * (vec)exponent;
}

#if defined(__AVX512BF16__)
/* Two vectors of floats as one of 32 BFLOAT16, rounded to the nearest; as `float_to_bfloat`, except
 * that what is below the smallest normal number becomes 0, as in all products of BFLOAT16. */
INLINE __m512i rounded_pairs(vec first, vec second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

/* 2^x to 1 part in 200,000, for weights of bfloat16; 0 where that has no number so small.  The
 * instruction that scales takes the whole part of x by itself. */
INLINE __m512 rough_power(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, 1 /* what is above the next integer below */);
    __m512 y = _mm512_set1_ps(1.3534167e-2f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.2011464e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4144275e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9300383e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(y, x);
}
#endif

/* `bound * tanh(x / bound)`, as exact near 0 as anywhere: a cap far above the scores leaves them as
 * they are.  Small quotients go through a polynomial (Cephes' tanhf), others through 2^x. */
INLINE vec capped(vec x, float bound) {
    vec u = x * splat(1 / bound), z = u * u;
    vec y = splat(-5.70498872745e-3f);
    y = y * z + splat(2.06390887954e-2f);
    y = y * z + splat(-5.37397155531e-2f);
    y = y * z + splat(1.33314422036e-1f);
    y = y * z + splat(-3.33332819422e-1f);
    vec small = x + x * (y * z);
    u = larger(splat(-20.0f), u);
    u = -larger(splat(-20.0f), -u);
    vec power = power_of_two(u * splat(2.88539008f)); /* 2 log2(e) */
    vec large = splat(bound) - splat(2 * bound) / (power + splat(1.0f));
    return pick(z < splat(0.390625f), small, large); /* 0.625 squared */
}

/* Types of numbers in memory, as the caller names them. */
enum type { FLOAT32, BFLOAT16, FLOAT16, FLOAT8, INT8 /* of packed weights alone */ };

INLINE int size_of(enum type type) { return type == FLOAT32 ? 4 : type >= FLOAT8 ? 1 : 2; }

INLINE float half_to_float(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, word;
    float x;
    if (rest >= 0x7c00) { /* infinite, or not a number */
        word = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        word = sign | ((rest << 13) + (112u << 23));
    } else { /* below the smallest normal number: a multiple of 2^-24 */
        x = (float)rest * 5.9604644775390625e-8f;
        memcpy(&word, &x, 4);
        word |= sign;
    }
    memcpy(&x, &word, 4);
    return x;
#endif
}

INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t word;
    memcpy(&word, &x, 4);
    uint16_t sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    if (word > 0x7f800000) return sign | 0x7e00;
    if (word >= 0x477ff000) return sign | 0x7c00; /* rounds to more than 65,504 */
    if (word < 0x38800000) { /* a multiple of 2^-24, rounded by adding 0.5 in float */
        float small;
        memcpy(&small, &word, 4);
        small += 0.5f;
        memcpy(&word, &small, 4);
        return sign | (uint16_t)(word - 0x3f000000);
    }
    word += 0xfff + (word >> 13 & 1);
    return sign | (uint16_t)((word >> 13) - (112u << 10));
#endif
}

INLINE uint16_t float_to_bfloat(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return word >> 16 | 0x40;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

/* Read `num` numbers as floats.  `eights`: what each code of FLOAT8 means. */
INLINE void read_row(float *to, const void *from, long num, enum type type, const float *eights) {
    if (type == FLOAT32) {
        const float *numbers = from;
        long i = 0;
        for (; i + WIDTH <= num; i += WIDTH) store(to + i, load(numbers + i));
        for (; i < num; i++) to[i] = numbers[i];
    } else if (type == BFLOAT16) {
        const uint16_t *codes = from;
        uint32_t *words = (uint32_t *)to;
        for (long i = 0; i < num; i++) words[i] = (uint32_t)codes[i] << 16;
    } else if (type == FLOAT16) {
        const uint16_t *codes = from;
        long i = 0;
#if defined(__AVX512F__)
        for (; i + 16 <= num; i += 16)
            _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(codes + i))));
#elif defined(__F16C__)
        for (; i + 8 <= num; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(codes + i))));
#endif
        for (; i < num; i++) to[i] = half_to_float(codes[i]);
    } else {
        const uint8_t *codes = from;
        for (long i = 0; i < num; i++) to[i] = eights[codes[i]];
    }
}

/* Write `num` floats, rounded to the nearest number of the type; not to FLOAT8. */
INLINE void write_row(void *to, const float *from, long num, enum type type) {
    if (type == FLOAT32) {
        memcpy(to, from, 4 * num);
    } else if (type == BFLOAT16) {
        uint16_t *codes = to;
        for (long i = 0; i < num; i++) codes[i] = float_to_bfloat(from[i]);
    } else {
        uint16_t *codes = to;
        for (long i = 0; i < num; i++) codes[i] = float_to_half(from[i]);
    }
}

#endif
