/* Elementwise passes that torch has no single operation for, each once over its data; threads share the rows.

   Matrices are row-major, and given with the distance between rows where they may be columns of a wider one. */

/* y = x / rms(x) * (offset + weight); rstd = 1 / rms(x), where rms(x) = sqrt(mean(x^2) + eps). */
void NAME(norm)(const REAL *x, const REAL *weight, REAL *y, REAL *rstd, int64_t rows, int64_t n, int64_t x_row, int64_t y_row,
                double offset, double eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const REAL *a = x + r * x_row;
        REAL *b = y + r * y_row, sum = 0, one = (REAL)offset;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += a[i] * a[i];
        REAL scale = 1 / SQRT(sum / n + (REAL)eps);
        for (int64_t i = 0; i < n; i++) b[i] = a[i] * scale * (one + weight[i]);
        rstd[r] = scale;
    }
}

/* dx of the same, rstd * (g - xhat * mean(g * xhat)), with g = dy * (offset + weight) and xhat = x * rstd;
   plus that of the residual connection, if any. */
void NAME(norm_backward)(const REAL *dy, const REAL *x, const REAL *weight, const REAL *rstd, const REAL *residual, REAL *dx,
                         int64_t rows, int64_t n, int64_t dy_row, int64_t x_row, int64_t dx_row, int64_t residual_row,
                         double offset) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const REAL *g = dy + r * dy_row, *a = x + r * x_row, *other = residual + r * residual_row;
        REAL *d = dx + r * dx_row, sum = 0, scale = rstd[r], one = (REAL)offset;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += g[i] * (one + weight[i]) * a[i];
        REAL back = sum / n * scale * scale;
        if (residual)
            for (int64_t i = 0; i < n; i++) d[i] = scale * (g[i] * (one + weight[i]) - a[i] * back) + other[i];
        else
            for (int64_t i = 0; i < n; i++) d[i] = scale * (g[i] * (one + weight[i]) - a[i] * back);
    }
}

/* h = act(g) * u. */
void NAME(gate)(const REAL *g, const REAL *u, REAL *h, int64_t rows, int64_t n, int64_t g_row, int64_t u_row,
                int64_t kind) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const REAL *a = g + r * g_row, *b = u + r * u_row;
        REAL *c = h + r * n;
        if (kind == SILU)
            for (int64_t i = 0; i < n; i++) c[i] = a[i] / (1 + EXP(-a[i])) * b[i];
        else
            for (int64_t i = 0; i < n; i++) {
                REAL t = TANH((REAL)0.7978845608028653559 * (a[i] + (REAL)0.044715 * a[i] * a[i] * a[i]));
                c[i] = (REAL)0.5 * a[i] * (1 + t) * b[i];
            }
    }
}

/* dg = dh * u * act'(g) and du = dh * act(g); and h again, over dh. */
void NAME(gate_backward)(REAL *dh, const REAL *g, const REAL *u, REAL *dg, REAL *du, int64_t rows, int64_t n, int64_t g_row,
                         int64_t u_row, int64_t d_row, int64_t dh_row, int64_t kind) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const REAL *a = g + r * g_row, *b = u + r * u_row;
        REAL *d = dh + r * dh_row, *p = dg + r * d_row, *q = du + r * d_row;
        if (kind == SILU)
            for (int64_t i = 0; i < n; i++) {
                REAL s = 1 / (1 + EXP(-a[i])), act = a[i] * s, up = d[i];
                p[i] = up * b[i] * (s + act * (1 - s));
                q[i] = up * act;
                d[i] = act * b[i];
            }
        else
            for (int64_t i = 0; i < n; i++) {
                const REAL k = (REAL)0.7978845608028653559, c = (REAL)0.044715;
                REAL t = TANH(k * (a[i] + c * a[i] * a[i] * a[i])), up = d[i], act = (REAL)0.5 * a[i] * (1 + t);
                REAL slope = (REAL)0.5 * (1 + t) + (REAL)0.5 * a[i] * (1 - t * t) * k * (1 + 3 * c * a[i] * a[i]);
                p[i] = up * b[i] * slope;
                q[i] = up * act;
                d[i] = act * b[i];
            }
    }
}

/* Replaces a tile of logits z (rows, n) by exp(z - top). top and sum are those of all tiles so far; fade is by what sums over
   earlier tiles have to be multiplied: exp(top before - top now). */
void NAME(softmax_tile)(REAL *z, REAL *top, REAL *sum, REAL *fade, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        REAL *a = z + r * n, most = top[r], total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < n; i++) most = a[i] > most ? a[i] : most;
        for (int64_t from = 0; from < n; from += 512) { /* in two levels: one long sum would round too often */
            REAL part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t i = from; i < least(from + 512, n); i++) {
                a[i] = EXP(a[i] - most);
                part += a[i];
            }
            total += part;
        }
        fade[r] = EXP(top[r] - most);
        sum[r] = sum[r] * fade[r] + total;
        top[r] = most;
    }
}
