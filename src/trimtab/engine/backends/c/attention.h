/* Attention over a tree of segments, rotary embedding included: by tiles that stay in a cache, without hidden scores.

   A segment's tokens attend to the virtual tokens, the segments on its path from the root, and its own up to themselves: its
   keys, in this order. A task is one segment's heads of one group, or one of them. It gathers and rotates the keys once, then
   goes through the queries in blocks and the keys in tiles, with the running softmax of flash attention (Dao 2023,
   arXiv:2307.08691). The backward pass makes the scores again from one number a query and head; each task sums the gradients
   of its keys in a place of its own, and those are added up in a fixed order, so that results do not depend on which thread
   was faster, nor on how many there are.

   Matrix products are tiles of ROWS x COLUMNS numbers held in registers; what they read is padded to whole tiles with zeros. */

enum { NAME(QUERIES) = 64, NAME(KEYS) = 256 };
#define QUERIES NAME(QUERIES)
#define KEYS NAME(KEYS)

typedef struct {
    int64_t segments, tokens, groups, per_group, head, virtual_tokens;
    int64_t window, chunk;              /* 0 for none */
    int64_t rotary, interleaved;        /* how many numbers of a head are rotated, and whether neighbours with each other */
    int64_t q_row, k_row, v_row, d_row; /* between rows of q, of k, of v, and of dq, dk and dv */
    double scale;
    const int64_t *start, *end;    /* of each segment, in tokens */
    const int64_t *path, *on_path; /* segment s sees segments on_path[path[s]] to on_path[path[s + 1] - 1], itself the last */
    const int64_t *users, *user, *before; /* and is seen by user[users[s]] to user[users[s + 1] - 1], after so many keys */
    const int64_t *order; /* segments, the most work first */
} NAME(Tree);

static inline int64_t NAME(keys)(const NAME(Tree) * t, int64_t segment) {
    int64_t keys = t->virtual_tokens;
    for (int64_t n = t->path[segment]; n < t->path[segment + 1]; n++) keys += t->end[t->on_path[n]] - t->start[t->on_path[n]];
    return keys;
}

/* c (ROWS x COLUMNS) = or += a b, where a has `depth` columns. */
static inline __attribute__((always_inline)) void NAME(tile)(const REAL *restrict a, int64_t a_row, int64_t a_column,
                                                             const REAL *restrict b, int64_t b_row, REAL *restrict c,
                                                             int64_t c_row, int64_t depth, int add) {
    VECTOR sum[ROWS][2];
    for (int i = 0; i < ROWS; i++) {
        sum[i][0] = add ? *(const VECTOR *)(c + i * c_row) : (VECTOR){0};
        sum[i][1] = add ? *(const VECTOR *)(c + i * c_row + LANES) : (VECTOR){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        VECTOR left = *(const VECTOR *)(b + k * b_row), right = *(const VECTOR *)(b + k * b_row + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            REAL one = a[i * a_row + k * a_column];
            sum[i][0] += one * left;
            sum[i][1] += one * right;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        *(VECTOR *)(c + i * c_row) = sum[i][0];
        *(VECTOR *)(c + i * c_row + LANES) = sum[i][1];
    }
}

/* Which keys of a tile a block of queries attends to. Query i stands at place `at + i` among the keys. */
typedef struct {
    int64_t at, queries, tile, keys, window, chunk;
} NAME(View);

static inline int64_t NAME(first_seen)(int64_t place, int64_t window, int64_t chunk) { /* of all keys, by the query at a place */
    return most(window ? place - window + 1 : 0, chunk ? place - place % chunk : 0);
}
static inline int64_t NAME(first_key)(NAME(View) v, int64_t query) { /* in the tile, that this query sees */
    return least(most(NAME(first_seen)(v.at + query, v.window, v.chunk) - v.tile, 0), v.keys);
}
static inline int64_t NAME(key_end)(NAME(View) v, int64_t query) { return most(least(v.at + query + 1 - v.tile, v.keys), 0); }
static inline int64_t NAME(first_query)(NAME(View) v, int64_t key) { /* that sees this key of the tile */
    return least(most(v.tile + key - v.at, 0), v.queries);
}
static inline int64_t NAME(query_end)(NAME(View) v, int64_t key) {
    int64_t place = v.tile + key, end = v.at + v.queries;
    if (v.window) end = least(end, place + v.window);
    if (v.chunk) end = least(end, place - place % v.chunk + v.chunk);
    return most(end - v.at, 0);
}

/* s (QUERIES x KEYS) = a b, where something is seen: a QUERIES x wide; b head x all keys, in panels of COLUMNS. */
static void NAME(scores)(NAME(View) v, const REAL *a, int64_t wide, const REAL *b, int64_t head, REAL *s) {
    for (int64_t j = 0; j < v.keys; j += COLUMNS) {
        int64_t first = NAME(first_query)(v, j) / ROWS * ROWS, end = NAME(query_end)(v, least(j + COLUMNS, v.keys) - 1);
        for (int64_t i = first; i < end; i += ROWS)
            NAME(tile)(a + i * wide, wide, 1, b + (v.tile + j) * head, COLUMNS, s + i * KEYS + j, KEYS, head, 0);
    }
}

/* c (QUERIES x wide) += s b, where b (keys x wide) are rows of all keys. */
static void NAME(by_query)(NAME(View) v, const REAL *s, const REAL *b, int64_t wide, REAL *c) {
    for (int64_t j = 0; j < wide; j += COLUMNS)
        for (int64_t i = 0; i < v.queries; i += ROWS) {
            int64_t first = NAME(first_key)(v, i), end = NAME(key_end)(v, least(i + ROWS, v.queries) - 1);
            if (end > first)
                NAME(tile)(s + i * KEYS + first, KEYS, 1, b + (v.tile + first) * wide + j, wide, c + i * wide + j, wide,
                           end - first, 1);
        }
}

/* c (keys x wide), rows of all keys, += s^T b, where b is QUERIES x wide. */
static void NAME(by_key)(NAME(View) v, const REAL *s, const REAL *b, int64_t wide, REAL *c) {
    for (int64_t j = 0; j < wide; j += COLUMNS)
        for (int64_t i = 0; i < v.keys; i += ROWS) {
            int64_t first = NAME(first_query)(v, i), end = NAME(query_end)(v, least(i + ROWS, v.keys) - 1);
            if (end > first)
                NAME(tile)(s + first * KEYS + i, 1, KEYS, b + first * wide + j, wide, c + (v.tile + i) * wide + j, wide,
                           end - first, 1);
        }
}

/* Zeros over keys of the tile to which a query does not attend, for the products of tiles that are attended to in part. */
static inline void NAME(zero_hidden)(NAME(View) v, int64_t query, REAL *row) {
    for (int64_t j = 0, first = NAME(first_key)(v, query); j < first; j++) row[j] = 0;
    for (int64_t j = NAME(key_end)(v, query); j < round_up(v.keys, COLUMNS); j++) row[j] = 0;
}

/* And over the rows below the last query, down to a whole tile. */
static inline void NAME(zero_rest)(NAME(View) v, REAL *s) {
    memset(s + v.queries * KEYS, 0, (round_up(v.queries, ROWS) - v.queries) * KEYS * sizeof(REAL));
}

/* The first tile of keys that a block of queries sees some of. */
static inline int64_t NAME(first_tile)(int64_t at, int64_t window, int64_t chunk) {
    return most(NAME(first_seen)(at, window, chunk), 0) / KEYS * KEYS;
}

static inline REAL NAME(largest)(const REAL *x, int64_t n, REAL least_so_far) {
    REAL lanes[LANES], largest = least_so_far;
    for (int64_t i = 0; i < LANES; i++) lanes[i] = largest;
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES)
        for (int64_t i = 0; i < LANES; i++) lanes[i] = x[at + i] > lanes[i] ? x[at + i] : lanes[i];
    for (int64_t i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (; at < n; at++) largest = x[at] > largest ? x[at] : largest;
    return largest;
}

static inline REAL NAME(sum)(const REAL *x, int64_t n) {
    VECTOR lanes = {0};
    REAL sum = 0;
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES) lanes += *(const VECTOR *)(x + at);
    for (int64_t i = 0; i < LANES; i++) sum += lanes[i];
    for (; at < n; at++) sum += x[at];
    return sum;
}

/* `scale` times one head's row, of which the first numbers are rotated by their token's angles (RoFormer, arXiv:2104.09864);
   `way` is -1 in the backward pass. */
static inline void NAME(rotate)(const NAME(Tree) * t, const REAL *x, const REAL *cos, const REAL *sin, int64_t token, REAL *to,
                                REAL scale, REAL way) {
    int64_t half = t->rotary / 2;
    cos += token * t->rotary;
    sin += token * t->rotary;
    if (t->interleaved)
        for (int64_t i = 0; i < 2 * half; i += 2) {
            REAL one = x[i], two = x[i + 1];
            to[i] = scale * (one * cos[i] - way * two * sin[i]);
            to[i + 1] = scale * (two * cos[i + 1] + way * one * sin[i + 1]);
        }
    else
        for (int64_t i = 0; i < half; i++) {
            REAL one = x[i], two = x[i + half];
            to[i] = scale * (one * cos[i] - way * two * sin[i]);
            to[i + half] = scale * (two * cos[i + half] + way * one * sin[i + half]);
        }
    for (int64_t i = t->rotary; i < t->head; i++) to[i] = scale * x[i];
}

/* A head's keys (rotated, if there are angles) or values of all that a segment attends to, as rows of `wide` numbers. */
static void NAME(gather)(const NAME(Tree) * t, int64_t segment, int64_t group, const REAL *x, int64_t row, const REAL *first,
                         const REAL *cos, const REAL *sin, int64_t wide, REAL *to) {
    int64_t head = t->head, at = 0;
    for (; at < t->virtual_tokens; at++)
        memcpy(to + at * wide, first + (group * t->virtual_tokens + at) * head, head * sizeof(REAL));
    for (int64_t n = t->path[segment]; n < t->path[segment + 1]; n++)
        for (int64_t i = t->start[t->on_path[n]]; i < t->end[t->on_path[n]]; i++, at++) {
            const REAL *from = x + i * row + group * head;
            if (cos)
                NAME(rotate)(t, from, cos, sin, i, to + at * wide, 1, 1);
            else
                memcpy(to + at * wide, from, head * sizeof(REAL));
        }
    if (wide > head)
        for (int64_t i = 0; i < at; i++) memset(to + i * wide + head, 0, (wide - head) * sizeof(REAL));
    memset(to + at * wide, 0, (round_up(at, COLUMNS) - at) * wide * sizeof(REAL));
}

/* Rows as columns, in panels of COLUMNS. */
static void NAME(transpose)(const REAL *rows, int64_t wide, int64_t head, int64_t count, REAL *to) {
    for (int64_t panel = 0; panel < count; panel += COLUMNS)
        for (int64_t i = 0; i < head; i++)
            for (int64_t j = 0; j < COLUMNS; j++) to[panel * head + i * COLUMNS + j] = rows[(panel + j) * wide + i];
}

/* Heads in a task: those of a group share its keys, where that leaves enough tasks for the threads. */
static inline int64_t NAME(heads_per_task)(const NAME(Tree) * t) { return t->segments * t->groups < 8 ? 1 : t->per_group; }

static REAL *NAME(memory)(int64_t numbers) { return aligned_alloc(64, round_up(numbers * (int64_t)sizeof(REAL), 64)); }

/* out (T, H K) and, for each head and token, the logarithm of its softmax's sum, sums (H T). A head's sink, if there are
   sinks (H), is one more logit of its softmaxes, without a value. Returns how many tasks found no memory. */
int64_t NAME(attend)(const NAME(Tree) * t, const REAL *q, const REAL *k, const REAL *v, const REAL *cos, const REAL *sin,
                     const REAL *virtual_k, const REAL *virtual_v, const REAL *sinks, REAL *out, REAL *sums) {
    int64_t head = t->head, heads = t->groups * t->per_group, wide = round_up(head, COLUMNS), failed = 0;
    int64_t heads_per_task = NAME(heads_per_task)(t), parts = heads / heads_per_task;
    REAL scale = (REAL)t->scale;
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t task = 0; task < t->segments * parts; task++) {
        int64_t s = t->order[task / parts], part = task % parts, group = part * heads_per_task / t->per_group;
        int64_t keys = NAME(keys)(t, s), padded = round_up(keys, COLUMNS);
        REAL *rows = NAME(memory)(padded * (wide + head) + QUERIES * (2 * wide + KEYS));
        if (!rows) {
            failed++;
            continue;
        }
        REAL *columns = rows + padded * wide, *a = columns + padded * head, *c = a + QUERIES * wide, *scores = c + QUERIES * wide;
        NAME(gather)(t, s, group, k, t->k_row, virtual_k, cos, sin, wide, rows);
        NAME(transpose)(rows, wide, head, padded, columns);
        NAME(gather)(t, s, group, v, t->v_row, virtual_v, 0, 0, wide, rows);
        for (int64_t h = part * heads_per_task; h < (part + 1) * heads_per_task; h++)
            for (int64_t at = t->start[s]; at < t->end[s]; at += QUERIES) {
                int64_t count = least(QUERIES, t->end[s] - at), before = keys - (t->end[s] - at);
                REAL top[QUERIES], total[QUERIES];
                memset(a, 0, 2 * QUERIES * wide * sizeof(REAL));
                for (int64_t i = 0; i < count; i++) {
                    const REAL *from = q + (at + i) * t->q_row + h * head;
                    NAME(rotate)(t, from, cos, sin, at + i, a + i * wide, scale, 1);
                    top[i] = sinks ? sinks[h] : LOWEST;
                    total[i] = sinks ? 1 : 0;
                }
                for (int64_t tile = NAME(first_tile)(before, t->window, t->chunk); tile < before + count; tile += KEYS) {
                    NAME(View) view = {before, count, tile, least(KEYS, before + count - tile), t->window, t->chunk};
                    NAME(scores)(view, a, wide, columns, head, scores);
                    for (int64_t i = 0; i < count; i++) {
                        int64_t first = NAME(first_key)(view, i), seen = NAME(key_end)(view, i) - first;
                        REAL *row = scores + i * KEYS + first, now = NAME(largest)(row, seen, top[i]), fade = EXP(top[i] - now);
                        for (int64_t j = 0; j < seen; j++) row[j] = EXP(row[j] - now);
                        total[i] = total[i] * fade + NAME(sum)(row, seen);
                        top[i] = now;
                        for (int64_t j = 0; j < wide; j++) c[i * wide + j] *= fade;
                        NAME(zero_hidden)(view, i, scores + i * KEYS);
                    }
                    NAME(zero_rest)(view, scores);
                    NAME(by_query)(view, scores, rows, wide, c);
                }
                for (int64_t i = 0; i < count; i++) {
                    REAL *to = out + (at + i) * heads * head + h * head, share = 1 / total[i];
                    for (int64_t j = 0; j < head; j++) to[j] = c[i * wide + j] * share;
                    sums[h * t->tokens + at + i] = top[i] + LOG(total[i]);
                }
            }
        free(rows);
    }
    return failed;
}

/* The gradients of q, k and v (columns of one matrix) and of the virtual keys and values (G P K), from that of out. Sinks are
   in `sums` already. */
int64_t NAME(attend_backward)(const NAME(Tree) * t, const REAL *q, const REAL *k, const REAL *v, const REAL *cos,
                              const REAL *sin, const REAL *virtual_k, const REAL *virtual_v, const REAL *out, const REAL *sums,
                              const REAL *dout, REAL *dq, REAL *dk, REAL *dv, REAL *dvirtual_k, REAL *dvirtual_v) {
    int64_t head = t->head, heads = t->groups * t->per_group, wide = round_up(head, COLUMNS), failed = 0, places = 0;
    int64_t heads_per_task = NAME(heads_per_task)(t), parts = heads / heads_per_task;
    int64_t *place = malloc(t->segments * sizeof(int64_t)); /* of a segment's gradients, in keys */
    for (int64_t s = 0; place && s < t->segments; s++) {
        place[s] = places;
        places += round_up(NAME(keys)(t, s), COLUMNS);
    }
    REAL *sums_of_keys = place ? NAME(memory)(2 * places * parts * wide) : 0, scale = (REAL)t->scale;
    if (!sums_of_keys) {
        free(place);
        return 1;
    }
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t task = 0; task < t->segments * parts; task++) {
        int64_t s = t->order[task / parts], part = task % parts, group = part * heads_per_task / t->per_group;
        int64_t keys = NAME(keys)(t, s), padded = round_up(keys, COLUMNS);
        REAL *rows = NAME(memory)(padded * (wide + 2 * head) + QUERIES * (3 * wide + 2 * KEYS));
        if (!rows) {
            failed++;
            continue;
        }
        REAL *columns = rows + padded * wide, *of_values = columns + padded * head, *a = of_values + padded * head;
        REAL *b = a + QUERIES * wide, *c = b + QUERIES * wide, *scores = c + QUERIES * wide, *slopes = scores + QUERIES * KEYS;
        REAL *to_k = sums_of_keys + 2 * (place[s] * parts + part * padded) * wide, *to_v = to_k + padded * wide;
        NAME(gather)(t, s, group, v, t->v_row, virtual_v, 0, 0, wide, rows);
        NAME(transpose)(rows, wide, head, padded, of_values);
        NAME(gather)(t, s, group, k, t->k_row, virtual_k, cos, sin, wide, rows);
        NAME(transpose)(rows, wide, head, padded, columns);
        memset(to_k, 0, 2 * padded * wide * sizeof(REAL));
        for (int64_t h = part * heads_per_task; h < (part + 1) * heads_per_task; h++)
            for (int64_t at = t->start[s]; at < t->end[s]; at += QUERIES) {
                int64_t count = least(QUERIES, t->end[s] - at), before = keys - (t->end[s] - at);
                REAL balance[QUERIES]; /* sum of P dP over the keys */
                memset(a, 0, 3 * QUERIES * wide * sizeof(REAL));
                for (int64_t i = 0; i < count; i++) {
                    const REAL *d = dout + ((at + i) * heads + h) * head, *o = out + ((at + i) * heads + h) * head;
                    const REAL *from = q + (at + i) * t->q_row + h * head;
                    REAL sum = 0;
                    for (int64_t j = 0; j < head; j++) sum += d[j] * o[j];
                    balance[i] = sum;
                    memcpy(b + i * wide, d, head * sizeof(REAL));
                    NAME(rotate)(t, from, cos, sin, at + i, a + i * wide, scale, 1);
                }
                for (int64_t tile = NAME(first_tile)(before, t->window, t->chunk); tile < before + count; tile += KEYS) {
                    NAME(View) view = {before, count, tile, least(KEYS, before + count - tile), t->window, t->chunk};
                    NAME(scores)(view, a, wide, columns, head, scores);
                    NAME(scores)(view, b, wide, of_values, head, slopes);
                    for (int64_t i = 0; i < count; i++) {
                        int64_t first = NAME(first_key)(view, i), end = NAME(key_end)(view, i);
                        REAL *p = scores + i * KEYS, *ds = slopes + i * KEYS, top = sums[h * t->tokens + at + i],
                             even = balance[i];
#pragma omp simd
                        for (int64_t j = first; j < end; j++) {
                            p[j] = EXP(p[j] - top);
                            ds[j] = p[j] * (ds[j] - even);
                        }
                        NAME(zero_hidden)(view, i, p);
                        NAME(zero_hidden)(view, i, ds);
                    }
                    NAME(zero_rest)(view, scores);
                    NAME(zero_rest)(view, slopes);
                    NAME(by_query)(view, slopes, rows, wide, c);
                    NAME(by_key)(view, slopes, a, wide, to_k);
                    NAME(by_key)(view, scores, b, wide, to_v);
                }
                for (int64_t i = 0; i < count; i++) {
                    REAL *to = dq + (at + i) * t->d_row + h * head;
                    NAME(rotate)(t, c + i * wide, cos, sin, at + i, to, scale, -1);
                }
            }
        free(rows);
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = -t->virtual_tokens; i < t->tokens; i++) {
        int64_t own = 0, from = 0, to = t->segments; /* virtual tokens are seen by all segments */
        if (i >= 0) {
            for (int64_t high = t->segments; high - own > 1;) /* the segment that the token is in */
                *(i < t->start[(own + high) / 2] ? &high : &own) = (own + high) / 2;
            from = t->users[own];
            to = t->users[own + 1];
        }
        for (int64_t g = 0; g < t->groups; g++) {
            REAL of_k[head], of_v[head];
            memset(of_k, 0, sizeof of_k);
            memset(of_v, 0, sizeof of_v);
            for (int64_t n = from; n < to; n++) {
                int64_t s = i < 0 ? n : t->user[n], at = i < 0 ? i + t->virtual_tokens : t->before[n] + i - t->start[own];
                int64_t padded = round_up(NAME(keys)(t, s), COLUMNS);
                for (int64_t part = g * t->per_group / heads_per_task; part < (g + 1) * t->per_group / heads_per_task; part++) {
                    const REAL *x = sums_of_keys + (2 * (place[s] * parts + part * padded) + at) * wide, *y = x + padded * wide;
                    for (int64_t j = 0; j < head; j++) {
                        of_k[j] += x[j];
                        of_v[j] += y[j];
                    }
                }
            }
            if (i < 0) {
                memcpy(dvirtual_k + (g * t->virtual_tokens + i + t->virtual_tokens) * head, of_k, sizeof of_k);
                memcpy(dvirtual_v + (g * t->virtual_tokens + i + t->virtual_tokens) * head, of_v, sizeof of_v);
            } else {
                NAME(rotate)(t, of_k, cos, sin, i, dk + i * t->d_row + g * head, 1, -1);
                memcpy(dv + i * t->d_row + g * head, of_v, sizeof of_v);
            }
        }
    }
    free(sums_of_keys);
    free(place);
    return failed;
}

#undef QUERIES
#undef KEYS
