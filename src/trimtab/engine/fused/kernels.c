/* The passes over memory that torch has no single operation for, each once over its data.

   Every function is defined for float and for double; `rows` are shared out among OpenMP's threads. Matrices are row-major,
   with the distance between rows given where they may be columns of a wider one. Compiled at first use by kernels.py, which
   has the same in torch for where there is no compiler. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { SILU, GELU_TANH };

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

#define DEFINE(REAL, NAME, EXP, SQRT, TANH)                                                                                   \
                                                                                                                              \
/* y = x / rms(x) * (offset + weight); rstd = 1 / rms(x), where rms(x) = sqrt(mean(x^2) + eps). */                            \
void NAME##_norm(const REAL *x, const REAL *weight, REAL *y, REAL *rstd, int64_t rows, int64_t n, int64_t x_row,              \
                 int64_t y_row, double offset, double eps) {                                                                  \
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {                                         \
        const REAL *a = x + r * x_row;                                                                                        \
        REAL *b = y + r * y_row, sum = 0, one = (REAL)offset;                                                                 \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) sum += a[i] * a[i];                            \
        REAL scale = 1 / SQRT(sum / n + (REAL)eps);                                                                           \
        for (int64_t i = 0; i < n; i++) b[i] = a[i] * scale * (one + weight[i]);                                              \
        rstd[r] = scale;                                                                                                      \
    }                                                                                                                         \
}                                                                                                                             \
                                                                                                                              \
/* dx of the same: rstd * (g - xhat * mean(g * xhat)), with g = dy * (offset + weight) and xhat = x * rstd. */                \
void NAME##_norm_backward(const REAL *dy, const REAL *x, const REAL *weight, const REAL *rstd, REAL *dx, int64_t rows,        \
                          int64_t n, int64_t dy_row, int64_t x_row, int64_t dx_row, double offset) {                          \
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {                                         \
        const REAL *g = dy + r * dy_row, *a = x + r * x_row;                                                                  \
        REAL *d = dx + r * dx_row, sum = 0, scale = rstd[r], one = (REAL)offset;                                              \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) sum += g[i] * (one + weight[i]) * a[i];        \
        REAL back = sum / n * scale * scale;                                                                                  \
        for (int64_t i = 0; i < n; i++) d[i] = scale * (g[i] * (one + weight[i]) - a[i] * back);                              \
    }                                                                                                                         \
}                                                                                                                             \
                                                                                                                              \
/* h = act(g) * u. g and u are columns of wider matrices. */                                                                  \
void NAME##_gate(const REAL *g, const REAL *u, REAL *h, int64_t rows, int64_t n, int64_t row, int kind) {                     \
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {                                         \
        const REAL *a = g + r * row, *b = u + r * row;                                                                        \
        REAL *c = h + r * n;                                                                                                  \
        if (kind == SILU)                                                                                                     \
            for (int64_t i = 0; i < n; i++) c[i] = a[i] / (1 + EXP(-a[i])) * b[i];                                            \
        else                                                                                                                  \
            for (int64_t i = 0; i < n; i++) {                                                                                 \
                REAL t = TANH((REAL)0.7978845608028653559 * (a[i] + (REAL)0.044715 * a[i] * a[i] * a[i]));                    \
                c[i] = (REAL)0.5 * a[i] * (1 + t) * b[i];                                                                     \
            }                                                                                                                 \
    }                                                                                                                         \
}                                                                                                                             \
                                                                                                                              \
/* dg = dh * u * act'(g) and du = dh * act(g); and h again, over dh. */                                                       \
void NAME##_gate_backward(REAL *dh, const REAL *g, const REAL *u, REAL *dg, REAL *du, int64_t rows, int64_t n,                \
                          int64_t row, int64_t d_row, int64_t dh_row, int kind) {                                             \
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {                                         \
        const REAL *a = g + r * row, *b = u + r * row;                                                                        \
        REAL *d = dh + r * dh_row, *p = dg + r * d_row, *q = du + r * d_row;                                                  \
        if (kind == SILU)                                                                                                     \
            for (int64_t i = 0; i < n; i++) {                                                                                 \
                REAL s = 1 / (1 + EXP(-a[i])), act = a[i] * s, up = d[i];                                                     \
                p[i] = up * b[i] * (s + act * (1 - s));                                                                       \
                q[i] = up * act;                                                                                              \
                d[i] = act * b[i];                                                                                            \
            }                                                                                                                 \
        else                                                                                                                  \
            for (int64_t i = 0; i < n; i++) {                                                                                 \
                const REAL k = (REAL)0.7978845608028653559, c = (REAL)0.044715;                                               \
                REAL t = TANH(k * (a[i] + c * a[i] * a[i] * a[i])), up = d[i], act = (REAL)0.5 * a[i] * (1 + t);              \
                REAL slope = (REAL)0.5 * (1 + t) + (REAL)0.5 * a[i] * (1 - t * t) * k * (1 + 3 * c * a[i] * a[i]);            \
                p[i] = up * b[i] * slope;                                                                                     \
                q[i] = up * act;                                                                                              \
                d[i] = act * b[i];                                                                                            \
            }                                                                                                                 \
    }                                                                                                                         \
}                                                                                                                             \
                                                                                                                              \
/* Rotary embedding, in place, of `heads` heads of size 2 * half in each row: by the angle, or back by it (sign -1). */       \
void NAME##_rotate(REAL *x, const REAL *cos, const REAL *sin, int64_t rows, int64_t heads, int64_t half, int64_t row,         \
                   double sign) {                                                                                             \
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {                                         \
        const REAL *c = cos + r * 2 * half, *s = sin + r * 2 * half, way = (REAL)sign;                                        \
        for (int64_t h = 0; h < heads; h++) {                                                                                 \
            REAL *a = x + r * row + h * 2 * half, *b = a + half;                                                              \
            for (int64_t i = 0; i < half; i++) {                                                                              \
                REAL one = a[i], two = b[i];                                                                                  \
                a[i] = one * c[i] - way * two * s[i];                                                                         \
                b[i] = two * c[i + half] + way * one * s[i + half];                                                           \
            }                                                                                                                 \
        }                                                                                                                     \
    }                                                                                                                         \
}                                                                                                                             \
                                                                                                                              \
/* Of a tile of logits z (rows, n), over it exp(z - top); top and sum are those of all tiles so far, and fade what the        \
   earlier sums and sums of vectors have to be multiplied by: exp(top before - top now). */                                   \
void NAME##_sweep(REAL *z, REAL *top, REAL *sum, REAL *fade, int64_t rows, int64_t n) {                                       \
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {                                         \
        REAL *a = z + r * n, most = top[r], total = 0;                                                                        \
        _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; i++) most = a[i] > most ? a[i] : most;           \
        _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) { a[i] = EXP(a[i] - most); total += a[i]; }  \
        fade[r] = EXP(top[r] - most);                                                                                         \
        sum[r] = sum[r] * fade[r] + total;                                                                                    \
        top[r] = most;                                                                                                        \
    }                                                                                                                         \
}

DEFINE(float, f32, exp_f32, sqrtf, tanh_f32)
DEFINE(double, f64, exp, sqrt, tanh)
