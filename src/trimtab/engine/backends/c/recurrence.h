/* Gated linear recurrences over a tree of segments, with or without the delta rule. For each head, a state S (K x V) and each token:

       S <- diag(exp(g)) S;   w = beta (v - S'k), or v without beta;   S <- S + k w';   out = S'q

   A segment starts from the state in which its parent ended. Shapes: T tokens, H heads of values in G groups that share q and k;
   q, k: T G K; v, out: T H V; g: T H, or T H K; beta: T H; states: segments or blocks, H K V. V is a multiple of COLUMNS / 2. */

#ifndef RECURRENCE_BLOCK
#define RECURRENCE_BLOCK 32 /* tokens between states that are kept for the backward pass */
typedef struct {
    int64_t segments, heads, per_group, key, value, decays; /* decays: numbers of g for each head */
    const int64_t *start, *end, *parent, *first_block;
} Recurrence;
#endif

#define STEP NAME(recurrence_step)
static inline REAL NAME(horizontal)(VECTOR x) {
    REAL sum = 0;
    for (int64_t i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* One token: changes S, and gives u = v - S'k (or v) and, unless it is NULL, out. */
static inline void STEP(int64_t K, int64_t n, REAL *S, const REAL *q, const REAL *k, const REAL *v, const REAL *g, int64_t decays,
                        REAL beta, int delta, REAL *u, REAL *out) {
    VECTOR sum[64];
    for (int64_t c = 0; c < n; c++) sum[c] = (VECTOR){0};
    REAL decay = EXP(g[0]);
    for (int64_t i = 0; i < K; i++) {
        VECTOR *row = (VECTOR *)(S + i * n * LANES);
        if (decays > 1) decay = EXP(g[i]);
        for (int64_t c = 0; c < n; c++) {
            row[c] *= decay;
            sum[c] += k[i] * row[c];
        }
    }
    VECTOR *to = (VECTOR *)u;
    const VECTOR *from = (const VECTOR *)v;
    for (int64_t c = 0; c < n; c++) {
        to[c] = from[c];
        if (delta) to[c] -= sum[c];
    }
    for (int64_t c = 0; c < n; c++) sum[c] = (VECTOR){0};
    for (int64_t i = 0; i < K; i++) {
        VECTOR *row = (VECTOR *)(S + i * n * LANES);
        REAL factor = k[i] * beta;
        for (int64_t c = 0; c < n; c++) {
            row[c] += factor * to[c];
            sum[c] += q[i] * row[c];
        }
    }
    if (out != NULL) memcpy(out, sum, n * sizeof(VECTOR));
}

/* Gives out, the state at the end of each segment, and, unless it is NULL, at the start of each block. Returns 1 without memory. */
int64_t NAME(recurrence)(const Recurrence *r, const REAL *q, const REAL *k, const REAL *v, const REAL *g, const REAL *beta, REAL *out,
                         REAL *ends, REAL *starts) {
    int64_t K = r->key, V = r->value, H = r->heads, G = H / r->per_group, size = K * V, failed = 0;
#pragma omp parallel for schedule(dynamic)
    for (int64_t h = 0; h < H; h++) {
        REAL *S = malloc((size + V) * sizeof(REAL));
        if (S == NULL) { failed = 1; continue; }
        for (int64_t s = 0; s < r->segments; s++) {
            if (r->parent[s] < 0) memset(S, 0, size * sizeof(REAL));
            else memcpy(S, ends + (r->parent[s] * H + h) * size, size * sizeof(REAL));
            for (int64_t t = r->start[s]; t < r->end[s]; t++) {
                int64_t at = t - r->start[s], row = t * H + h, shared = (t * G + h / r->per_group) * K;
                if (starts != NULL && at % RECURRENCE_BLOCK == 0)
                    memcpy(starts + ((r->first_block[s] + at / RECURRENCE_BLOCK) * H + h) * size, S, size * sizeof(REAL));
                STEP(K, V / LANES, S, q + shared, k + shared, v + row * V, g + row * r->decays, r->decays,
                     beta != NULL ? beta[row] : 1, beta != NULL, S + size, out + row * V);
            }
            memcpy(ends + (s * H + h) * size, S, size * sizeof(REAL));
        }
        free(S);
    }
    return failed;
}

/* Gradients, of q and k for each head: T H K. `dends` are zeros, segments x H K V. Returns 1 without memory. */
int64_t NAME(recurrence_backward)(const Recurrence *r, const REAL *q, const REAL *k, const REAL *v, const REAL *g, const REAL *beta,
                                  const REAL *starts, const REAL *dout, REAL *dends, REAL *dq, REAL *dk, REAL *dv, REAL *dg, REAL *dbeta) {
    int64_t K = r->key, V = r->value, H = r->heads, G = H / r->per_group, size = K * V, n = V / LANES, failed = 0;
#pragma omp parallel for schedule(dynamic)
    for (int64_t h = 0; h < H; h++) {
        REAL *states = malloc(((RECURRENCE_BLOCK + 1) * (size + V)) * sizeof(REAL)), *us = states + (RECURRENCE_BLOCK + 1) * size;
        if (states == NULL) { failed = 1; continue; }
        for (int64_t s = r->segments - 1; s >= 0; s--) {
            REAL *dS = dends + (s * H + h) * size;
            int64_t length = r->end[s] - r->start[s];
            for (int64_t b = (length - 1) / RECURRENCE_BLOCK; b >= 0; b--) {
                int64_t first = r->start[s] + b * RECURRENCE_BLOCK, count = least(RECURRENCE_BLOCK, r->end[s] - first);
                memcpy(states, starts + ((r->first_block[s] + b) * H + h) * size, size * sizeof(REAL));
                for (int64_t j = 0; j < count; j++) {
                    int64_t row = (first + j) * H + h, shared = ((first + j) * G + h / r->per_group) * K;
                    memcpy(states + (j + 1) * size, states + j * size, size * sizeof(REAL));
                    STEP(K, n, states + (j + 1) * size, q + shared, k + shared, v + row * V, g + row * r->decays, r->decays,
                         beta != NULL ? beta[row] : 1, beta != NULL, us + j * V, NULL);
                }
                for (int64_t j = count - 1; j >= 0; j--) {
                    int64_t row = (first + j) * H + h, shared = ((first + j) * G + h / r->per_group) * K;
                    const REAL *qt = q + shared, *kt = k + shared, *gt = g + row * r->decays;
                    const VECTOR *u = (const VECTOR *)(us + j * V), *dot = (const VECTOR *)(dout + row * V);
                    REAL rate = beta != NULL ? beta[row] : 1, decay = EXP(gt[0]), dtotal = 0;
                    VECTOR dw[64];
                    for (int64_t c = 0; c < n; c++) dw[c] = (VECTOR){0};
                    for (int64_t i = 0; i < K; i++) { /* out = S'q; S = D S- + k w' */
                        const VECTOR *S = (const VECTOR *)(states + (j + 1) * size + i * V);
                        VECTOR *d = (VECTOR *)(dS + i * V), a = {0}, b2 = {0};
                        for (int64_t c = 0; c < n; c++) {
                            a += S[c] * dot[c];
                            d[c] += qt[i] * dot[c];
                            b2 += d[c] * u[c];
                            dw[c] += kt[i] * d[c];
                        }
                        dq[row * K + i] = NAME(horizontal)(a);
                        dk[row * K + i] = rate * NAME(horizontal)(b2);
                    }
                    VECTOR *dvt = (VECTOR *)(dv + row * V), drate = {0};
                    for (int64_t c = 0; c < n; c++) {
                        drate += dw[c] * u[c];
                        dvt[c] = rate * dw[c];
                    }
                    if (beta != NULL) dbeta[row] = NAME(horizontal)(drate);
                    for (int64_t i = 0; i < K; i++) { /* u = v - S'k; S' = D S- */
                        const VECTOR *before = (const VECTOR *)(states + j * size + i * V);
                        VECTOR *d = (VECTOR *)(dS + i * V), a = {0}, b2 = {0};
                        if (r->decays > 1) decay = EXP(gt[i]);
                        for (int64_t c = 0; c < n; c++) {
                            VECTOR decayed = decay * before[c];
                            if (beta != NULL) {
                                d[c] -= kt[i] * dvt[c];
                                a += decayed * dvt[c];
                            }
                            b2 += d[c] * decayed;
                            d[c] *= decay;
                        }
                        dk[row * K + i] -= NAME(horizontal)(a);
                        if (r->decays > 1) dg[row * K + i] = NAME(horizontal)(b2);
                        else dtotal += NAME(horizontal)(b2);
                    }
                    if (r->decays == 1) dg[row] = dtotal;
                }
            }
            if (r->parent[s] >= 0) {
                REAL *up = dends + (r->parent[s] * H + h) * size;
                for (int64_t i = 0; i < size; i++) up[i] += dS[i];
            }
        }
        free(states);
    }
    return failed;
}
#undef STEP
