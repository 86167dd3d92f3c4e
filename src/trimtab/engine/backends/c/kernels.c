/* What torch has no single operation for, for float and for double: passes.h, attention.h and recurrence.h.

   Compiled at first use by ../_compile.py, called by ../cpu.py. Threads are OpenMP's. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SILU, GELU_TANH };

#ifdef __AVX512F__
enum { VECTOR_BYTES = 64, ROWS = 8 };
#else
enum { VECTOR_BYTES = 32, ROWS = 4 };
#endif
/* Tiles of products, ROWS x COLUMNS, are as many vectors as registers hold beside what is multiplied. */
typedef float f32_vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double f64_vector __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
#define VECTOR NAME(vector)
#define LANES (VECTOR_BYTES / (int64_t)sizeof(REAL))
#define COLUMNS (2 * LANES)

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t tile) { return (n + tile - 1) / tile * tile; }

/* e^x to 2 units in the last place, written so that compilers make vectors of it; 0 below -87. NaN stays NaN. */
static inline float exp_f32(float x) {
    float y = x > 88.7f ? 88.7f : x < -87.3f ? -87.3f : x;
    float n = rintf(y * 1.44269504089f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float two_to_n;
    memcpy(&two_to_n, &bits, 4);
    return x < -87.3f ? 0.0f : p * two_to_n;
}
static inline float tanh_f32(float x) { return 1.0f - 2.0f / (1.0f + exp_f32(2.0f * x)); } /* to 1e-7, absolute */

#define REAL float
#define NAME(x) f32_##x
#define EXP exp_f32
#define TANH tanh_f32
#define SQRT sqrtf
#define LOG logf
#define LOWEST -3e38f
#include "attention.h"
#include "passes.h"
#include "recurrence.h"

#undef REAL
#undef NAME
#undef EXP
#undef TANH
#undef SQRT
#undef LOG
#undef LOWEST

#define REAL double
#define NAME(x) f64_##x
#define EXP exp
#define TANH tanh
#define SQRT sqrt
#define LOG log
#define LOWEST -1e300
#include "attention.h"
#include "passes.h"
#include "recurrence.h"
