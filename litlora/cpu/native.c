/* What an answer's tokens, a few at a time, need of a CPU: every weight once, as it lies in memory; and what merging needs, `put_on`. For x86-64
   with AVX2 and FMA.

   Letters for shapes are those of model.py. All numbers of an answer that go in and come out are fp32. Each sum is taken in the same order
   however many rows there are, so that several tokens at once give the same bits as one by one.

   native.py calls these with pointers, where it has found the dtypes, sizes and layouts that they rely on: `run`, at the end, a list of calls;
   low_rank.py calls `put_on`. */

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum kind { FP32, BF16, INT8, NF4 };
enum { BLOCK = 64, TILE = 4 };  /* numbers of NF4 that share a scale; sums in registers at once */
enum { TOGETHER = 8, KEYS = 32 };  /* queries that read keys together, so many at a time: what stays in the nearest cache */

/* As library.py has it: another one, and what is called here is of another version. */
int version(void) { return 6; }

int usable(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

INLINE float sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

INLINE float largest(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

/* ---- threads ----

   Helpers take parts of a job while there are some. Who has the job does what nobody has taken, and waits for nobody who has taken nothing: a
   core that is busy with something else costs its own share, where a barrier, as OpenMP's, would wait for it at every product. */

typedef void work(const void *job, long part);

enum { MOST = 255, SPINS = 40000 };  /* helpers; looks for a job, about 1 ms in all, before one sleeps: longer than between two */

static struct {
    atomic_flag taken;      /* somebody has a job; who comes meanwhile does without helpers */
    atomic_ulong open;      /* number of the job that parts may be taken of; 0: none */
    atomic_long next;       /* the first part that nobody has taken */
    atomic_int inside;      /* helpers that may be looking at the job */
    atomic_int sleepers;
    pthread_mutex_t bed;
    pthread_cond_t wake;
    int hired;
    unsigned long jobs;     /* so far */
    work *work;             /* of the job that is open: written while nobody is inside */
    const void *job;
    long parts, helpers;
} pool = {.taken = ATOMIC_FLAG_INIT, .bed = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static int is_news(unsigned long open, unsigned long done) { return open != 0 && open != done; }

static void *help(void *number) {
    unsigned long open, done = 0;
    for (;;) {
        int spins = 0;
        while (!is_news(open = atomic_load(&pool.open), done) && spins++ < SPINS)
            _mm_pause();
        if (!is_news(open, done)) {
            pthread_mutex_lock(&pool.bed);
            atomic_fetch_add(&pool.sleepers, 1);
            while (!is_news(open = atomic_load(&pool.open), done))
                pthread_cond_wait(&pool.wake, &pool.bed);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.bed);
        }
        atomic_fetch_add(&pool.inside, 1);
        if (atomic_load(&pool.open) == open && (long)(intptr_t)number < pool.helpers)  /* else it was closed before this helper was seen inside */
            for (long part; (part = atomic_fetch_add(&pool.next, 1)) < pool.parts;)
                pool.work(pool.job, part);
        atomic_fetch_sub(&pool.inside, 1);
        done = open;
    }
    return 0;
}

static void forked(void) {  /* a child has no helpers, and what they held is held by nobody */
    pthread_mutex_init(&pool.bed, 0);
    pthread_cond_init(&pool.wake, 0);
    atomic_flag_clear(&pool.taken);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleepers, 0);
    pool.hired = 0;
}

static void hire(int helpers) {
    sigset_t all, before;
    if (!pool.jobs)
        pthread_atfork(0, 0, forked);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  /* signals are the others' */
    for (pthread_t thread; pool.hired < helpers && pool.hired < MOST; pool.hired++) {
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)pool.hired))
            break;  /* fewer do as well */
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

/* Every part of a job, by `threads` at most. */
static void shared(work *work, const void *job, long parts, int threads) {
    if (threads < 2 || atomic_flag_test_and_set(&pool.taken)) {
        for (long part = 0; part < parts; part++)
            work(job, part);
        return;
    }
    if (pool.hired < threads - 1)
        hire(threads - 1);
    pool.work = work, pool.job = job, pool.parts = parts, pool.helpers = threads - 1;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.open, ++pool.jobs);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.bed);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.bed);
    }
    for (long part; (part = atomic_fetch_add(&pool.next, 1)) < parts;)
        work(job, part);
    atomic_store(&pool.open, 0);
    for (int spins = 0; atomic_load(&pool.inside); spins++)
        spins < SPINS ? _mm_pause() : (void)sched_yield();  /* its core may be ours */
    atomic_flag_clear(&pool.taken);
}

/* ---- x W^T ---- */

/* Eight numbers of a row of W from the i-th on, without their scale; of NF4: `thirty_two`. */
INLINE __m256 eight(enum kind kind, const char *row, long i) {
    if (kind == FP32)
        return _mm256_loadu_ps((const float *)row + i);
    if (kind == BF16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(row + 2 * i))), 16));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + i))));
}

/* NF4's 16 values in four registers: the first bytes of all, the second ones, and so on, the same in each half. */
INLINE void split(const float *values, __m256i *bytes) {
    char of[4][16];
    for (int k = 0; k < 64; k++)
        of[k % 4][k / 4] = ((const char *)values)[k];
    for (int k = 0; k < 4; k++)
        bytes[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)of[k]));
}

/* A row's NF4 numbers from the i-th on, eight by eight. Two codes a byte, the first one high; each byte of each number is looked up by itself, 32
   at once, and the bytes are put together. In a half of the register are every other four, so that eight come to lie side by side. */
INLINE void thirty_two(const char *row, long i, const __m256i *bytes, __m256 *numbers) {
    const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,
                                           2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    __m256i both = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(row + i / 2))), twice);
    __m256i codes = _mm256_blendv_epi8(both, _mm256_srli_epi16(both, 4), _mm256_set1_epi16(255));
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    __m256i first = _mm256_shuffle_epi8(bytes[0], codes), second = _mm256_shuffle_epi8(bytes[1], codes);
    __m256i third = _mm256_shuffle_epi8(bytes[2], codes), fourth = _mm256_shuffle_epi8(bytes[3], codes);
    __m256i low = _mm256_unpacklo_epi8(first, second), low_above = _mm256_unpacklo_epi8(third, fourth);
    __m256i high = _mm256_unpackhi_epi8(first, second), high_above = _mm256_unpackhi_epi8(third, fourth);
    numbers[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low_above));
    numbers[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low_above));
    numbers[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high_above));
    numbers[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high_above));
}

/* y[t][r] for `rows` rows of W, so many rows `apart`, and `tokens` rows of x: TILE sums at most. `per_row`: scales; `bytes`: of NF4's values. */
INLINE void tile(enum kind kind, int rows, int tokens, const char *W, long row_bytes, long apart, const float *scales, long per_row,
                 const __m256i *bytes, const float *x, float *y, long in, long out, float onto) {
    __m256 even[TILE], odd[TILE];
    for (int k = 0; k < rows * tokens; k++)
        even[k] = odd[k] = _mm256_setzero_ps();
    for (long start = 0; kind == NF4 && start < in; start += BLOCK) {
        __m256 one[TILE], two[TILE], numbers[4];
        for (int k = 0; k < rows * tokens; k++)
            one[k] = two[k] = _mm256_setzero_ps();
        for (long i = start; i < start + BLOCK; i += 32)
            for (int r = 0; r < rows; r++) {
                thirty_two(W + r * apart * row_bytes, i, bytes, numbers);
                for (int t = 0, k = r * tokens; t < tokens; t++, k++)
                    for (int part = 0; part < 4; part += 2) {
                        const float *from = x + t * in + i + 8 * part;
                        one[k] = _mm256_fmadd_ps(numbers[part], _mm256_loadu_ps(from), one[k]);
                        two[k] = _mm256_fmadd_ps(numbers[part + 1], _mm256_loadu_ps(from + 8), two[k]);
                    }
            }
        for (int k = 0; k < rows * tokens; k++) {
            __m256 scale = _mm256_set1_ps(scales[k / tokens * apart * per_row + start / BLOCK]);
            even[k] = _mm256_fmadd_ps(one[k], scale, even[k]);
            odd[k] = _mm256_fmadd_ps(two[k], scale, odd[k]);
        }
    }
    for (long i = 0; kind != NF4 && i + 16 <= in; i += 16)
        for (int r = 0; r < rows; r++) {
            const char *row = W + r * apart * row_bytes;
            __m256 left = eight(kind, row, i), right = eight(kind, row, i + 8);
            for (int t = 0, k = r * tokens; t < tokens; t++, k++) {
                even[k] = _mm256_fmadd_ps(left, _mm256_loadu_ps(x + t * in + i), even[k]);
                odd[k] = _mm256_fmadd_ps(right, _mm256_loadu_ps(x + t * in + i + 8), odd[k]);
            }
        }
    for (int r = 0, k = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++, k++) {
            if (in % 16)  /* eight more; never of NF4 */
                even[k] = _mm256_fmadd_ps(eight(kind, W + r * apart * row_bytes, in - 8), _mm256_loadu_ps(x + t * in + in - 8), even[k]);
            float product = sum(_mm256_add_ps(even[k], odd[k])) * (kind == INT8 ? scales[r * apart] : 1), *to = y + t * out + r * apart;
            *to = onto == 0 ? product : *to + onto * product;
        }
}

/* The rows of W from `first` to `last`, as some runs of rows side by side, each of which a CPU sees as a stream of its own: neighbours would
   be one stream that jumps, which is fetched at half the speed and less. */
INLINE void rows_of(enum kind kind, const char *W, const float *scales, const float *values, const float *x, float *y, long n, long in,
                    long out, float onto, long first, long last) {
    long row_bytes = kind == FP32 ? 4 * in : kind == BF16 ? 2 * in : kind == INT8 ? in : in / 2;
    long per_row = kind == INT8 ? 1 : kind == NF4 ? in / BLOCK : 0, runs = n == 1 ? TILE : TILE / 2, run = (last - first) / runs;
    __m256i bytes[4];
    if (kind == NF4)
        split(values, bytes);
    for (long end = first + run; first < end; first++) {
        const char *row = W + first * row_bytes;
        const float *own = scales + first * per_row;
        if (n == 1)
            tile(kind, TILE, 1, row, row_bytes, run, own, per_row, bytes, x, y + first, in, out, onto);
        long t = 0;
        for (; n > 1 && t + 2 <= n; t += 2)
            tile(kind, TILE / 2, 2, row, row_bytes, run, own, per_row, bytes, x + t * in, y + t * out + first, in, out, onto);
        if (n > 1 && t < n)
            tile(kind, TILE / 2, 1, row, row_bytes, run, own, per_row, bytes, x + t * in, y + t * out + first, in, out, onto);
    }
    for (first += (runs - 1) * run; first < last; first++)
        for (long t = 0; t < n; t++)
            tile(kind, 1, 1, W + first * row_bytes, row_bytes, 0, scales + first * per_row, per_row, bytes, x + t * in,
                 y + t * out + first, in, out, onto);
}

/* y (n, out) = x (n, in) times W (out, in) transposed, or, where `onto` is not 0, y += `onto` times that; in a multiple of 8, of 64 for NF4.
   INT8: a scale (out,) for each row; NF4: one for each 64 numbers, and its 16 `values`. */
struct product {
    const char *W;
    const float *scales, *values, *x;
    float *y;
    long kind, n, in, out, parts, threads;
    double onto;
};

static void product_part(const void *job, long part) {
    struct product p = *(const struct product *)job;
    long tiles = (p.out + TILE - 1) / TILE, first = part * tiles / p.parts * TILE, last = (part + 1) * tiles / p.parts * TILE;
    last = last < p.out ? last : p.out;
    switch (p.kind) {
        case FP32: rows_of(FP32, p.W, p.scales, p.values, p.x, p.y, p.n, p.in, p.out, p.onto, first, last); return;
        case BF16: rows_of(BF16, p.W, p.scales, p.values, p.x, p.y, p.n, p.in, p.out, p.onto, first, last); return;
        case INT8: rows_of(INT8, p.W, p.scales, p.values, p.x, p.y, p.n, p.in, p.out, p.onto, first, last); return;
        case NF4: rows_of(NF4, p.W, p.scales, p.values, p.x, p.y, p.n, p.in, p.out, p.onto, first, last); return;
    }
}

/* ---- around it ---- */

/* e^x, to two units in the last place for x from -87 to 88; below, no smaller than e^-87: 2^n e^r with r at most ln(2) / 2 (Taylor to r^6). */
INLINE __m256 exponential(__m256 x) {
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.0f), x));  /* in this order what is no number stays none */
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  /* ln(2) in two parts, of which the first has few digits */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    static const float over_factorials[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f};
    __m256 y = _mm256_set1_ps(over_factorials[0]);
    for (int k = 1; k < 7; k++)
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(over_factorials[k]));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}

/* cap tanh(x / cap), or x where the cap is 0; tanh to three units in the last place: near 0, where 1 - 2 / (e^2x + 1) would lose digits, by the
   first five terms of its continued fraction, x / (1 + x^2 / (3 + x^2 / (5 + ...))). */
INLINE __m256 capped(__m256 x, float cap) {
    if (cap == 0)
        return x;
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    x = _mm256_div_ps(x, _mm256_set1_ps(cap));
    __m256 size = _mm256_andnot_ps(sign, x), square = _mm256_mul_ps(x, x);
    __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2), _mm256_add_ps(exponential(_mm256_add_ps(size, size)), one)));
    __m256 over = _mm256_fmadd_ps(_mm256_add_ps(square, _mm256_set1_ps(105)), square, _mm256_set1_ps(945));
    __m256 under = _mm256_fmadd_ps(_mm256_fmadd_ps(_mm256_set1_ps(15), square, _mm256_set1_ps(420)), square, _mm256_set1_ps(945));
    __m256 near = _mm256_div_ps(_mm256_mul_ps(x, over), under);
    __m256 tanh = _mm256_blendv_ps(near, _mm256_or_ps(far, _mm256_and_ps(sign, x)), _mm256_cmp_ps(size, one, _CMP_GT_OQ));
    return _mm256_mul_ps(tanh, _mm256_set1_ps(cap));
}

/* y (n, C) = x / sqrt(mean(x^2) + eps) * gains (C,); C a multiple of 8. */
struct rms_norm {
    const float *x, *gains;
    float *y;
    long n, C;
    double eps;
};

static void rms_norm(struct rms_norm of) {
    const float *x = of.x, *gains = of.gains;
    float *y = of.y, eps = of.eps;
    for (long C = of.C; of.n > 0; of.n--, x += C, y += C) {
        __m256 squares = _mm256_setzero_ps();
        for (long i = 0; i < C; i += 8) {
            __m256 v = _mm256_loadu_ps(x + i);
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(_mm256_set1_ps(sum(squares) / C + eps)));
        for (long i = 0; i < C; i += 8)
            _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse), _mm256_loadu_ps(gains + i)));
    }
}

/* gate = silu(gate) * up, `count` numbers of each; a multiple of 8. */
struct swiglu {
    const float *up;
    float *gate;
    long count;
};

static void swiglu(struct swiglu of) {
    float *gate = of.gate;
    const float *up = of.up;
    __m256 one = _mm256_set1_ps(1), zero = _mm256_setzero_ps();
    for (long i = 0; i < of.count; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i);
        __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exponential(_mm256_sub_ps(zero, g))));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
}

/* y (n, T, R), of x (n, T, R) with strides; cos and sin (T, R) as a Turn has them. */
struct turned {
    const float *x, *cos, *sin;
    float *y;
    long stride_n, stride_T, n, T, R, interleaved;
};

static void turned(struct turned of) {
    float *y = of.y;
    for (long a = 0, R = of.R; a < of.n; a++)
        for (long t = 0; t < of.T; t++, y += R) {
            const float *from = of.x + a * of.stride_n + t * of.stride_T, *c = of.cos + t * R, *s = of.sin + t * R;
            for (long i = 0; i < R; i++)
                y[i] = from[i] * c[i] + from[of.interleaved ? i ^ 1 : i < R / 2 ? i + R / 2 : i - R / 2] * s[i];
        }
}

/* y = a + scale b, `count` numbers of each. */
struct summed {
    const float *a, *b;
    float *y;
    long count;
    double scale;
};

static void summed(struct summed of) {
    for (long i = 0; i < of.count; i++)
        of.y[i] = __builtin_fmaf((float)of.scale, of.b[i], of.a[i]);
}

/* x (B, K, T, D) with strides, D numbers in a row, to `positions` (B, T) of y (B, K, size, D). */
struct placed {
    const float *x;
    const int64_t *positions;
    float *y;
    long stride_B, stride_K, stride_T, B, K, T, size, D;
};

static void placed(struct placed of) {
    for (long b = 0; b < of.B; b++)
        for (long k = 0; k < of.K; k++, of.y += of.size * of.D)
            for (long t = 0; t < of.T; t++)
                __builtin_memcpy(of.y + of.positions[b * of.T + t] * of.D, of.x + b * of.stride_B + k * of.stride_K + t * of.stride_T,
                                 of.D * sizeof(float));
}

/* y += sum of weights[s] values[s] from `start` to `end`, 8 * `parts` numbers of each. */
INLINE void weighted(const float *values, const float *weights, float *y, long start, long end, long Dv, int parts) {
    __m256 total[8];
    for (int k = 0; k < parts; k++)
        total[k] = _mm256_loadu_ps(y + 8 * k);
    for (long s = start; s < end; s++)
        for (int k = 0; k < parts; k++)
            total[k] = _mm256_fmadd_ps(_mm256_set1_ps(weights[s]), _mm256_loadu_ps(values + s * Dv + 8 * k), total[k]);
    for (int k = 0; k < parts; k++)
        _mm256_storeu_ps(y + 8 * k, total[k]);
}

/* A query over keys (S, D) and values (S, Dv) from `start` to `end`, with scores (S + 7,) of its own that are written over, and one more of
   its head, the `sink`, which takes a share and gives no value (-inf: none). */
struct query {
    const float *q;
    float *y, *scores, sink;
    __m256 most;  /* of every eighth score */
    long start, end;
};

/* The scores of some keys, each key's sum in the order of `sum`, eight keys at once while there are. */
INLINE void scored(struct query *one, const float *keys, long from, long to, long D, float scale) {
    for (; from + 8 <= to; from += 8) {
        __m256 t[8];
        for (int k = 0; k < 8; k++)
            t[k] = _mm256_setzero_ps();
        for (long i = 0; i < D; i += 8) {
            __m256 q = _mm256_loadu_ps(one->q + i);
            for (int k = 0; k < 8; k++)
                t[k] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + (from + k) * D + i), t[k]);
        }
        for (int k = 0; k < 4; k++)  /* two keys a register, four numbers each */
            t[k] = _mm256_add_ps(_mm256_permute2f128_ps(t[2 * k], t[2 * k + 1], 0x20), _mm256_permute2f128_ps(t[2 * k], t[2 * k + 1], 0x31));
        for (int k = 0; k < 2; k++) {  /* four keys, two numbers each */
            __m256d left = _mm256_castps_pd(t[2 * k]), right = _mm256_castps_pd(t[2 * k + 1]);
            t[k] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(left, right)), _mm256_castpd_ps(_mm256_unpackhi_pd(left, right)));
        }
        __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(t[0], t[1], 0x88), _mm256_shuffle_ps(t[0], t[1], 0xdd));  /* keys 0, 2, 4, 6; 1, 3, 5, 7 */
        sums = _mm256_mul_ps(_mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)), _mm256_set1_ps(scale));
        _mm256_storeu_ps(one->scores + from, sums);
        one->most = _mm256_max_ps(sums, one->most);  /* of what is no number the other */
    }
    for (; from < to; from++) {
        __m256 total = _mm256_setzero_ps();
        for (long i = 0; i < D; i += 8)
            total = _mm256_fmadd_ps(_mm256_loadu_ps(one->q + i), _mm256_loadu_ps(keys + from * D + i), total);
        one->scores[from] = sum(total) * scale;
        one->most = _mm256_max_ps(_mm256_set1_ps(one->scores[from]), one->most);
    }
}

/* The j-th of `count` asks for its share of the next keys: they come while all compute with those that are here. */
INLINE void ahead(const float *side, long next, long last, long D, int j, int count) {
    long end = next + KEYS < last ? next + KEYS : last, lines = (end - next) * D / 16;
    for (long line = j * lines / count; line < (j + 1) * lines / count; line++)
        _mm_prefetch((const char *)(side + next * D + 16 * line), _MM_HINT_T0);
}

/* Several queries over the same keys and values, which are read once: some at a time, by each of them. */
static void attend(struct query *queries, int count, const float *keys, const float *values, long D, long Dv, float scale, float cap) {
    long first = queries[0].start, last = queries[0].end;
    for (int j = 0; j < count; j++) {
        first = queries[j].start < first ? queries[j].start : first;
        last = queries[j].end > last ? queries[j].end : last;
        queries[j].most = _mm256_set1_ps(-__builtin_inff());
        for (long i = 0; i < Dv; i++)
            queries[j].y[i] = 0;
    }
    for (long some = first; some < last; some += KEYS)
        for (int j = 0; j < count; j++) {
            struct query *one = queries + j;
            long from = some > one->start ? some : one->start, to = some + KEYS < one->end ? some + KEYS : one->end;
            ahead(keys, some + KEYS, last, D, j, count);
            scored(one, keys, from, to, D, scale);
        }
    for (int j = 0; j < count; j++) {
        struct query *one = queries + j;
        __m256 most = capped(_mm256_set1_ps(largest(one->most)), cap);  /* a cap keeps their order */
        double weights = _mm256_cvtss_f32(exponential(_mm256_sub_ps(_mm256_set1_ps(one->sink), most)));  /* none: e^-87, lost beside 1 */
        for (long s = one->start; s < one->end; s += 8)  /* beyond the end: what is there is no weight */
            _mm256_storeu_ps(one->scores + s, exponential(_mm256_sub_ps(capped(_mm256_loadu_ps(one->scores + s), cap), most)));
        for (long s = one->start; s < one->end; s++)
            weights += one->scores[s];
        for (long s = one->start; s < one->end; s++)
            one->scores[s] *= (float)(1 / weights);
    }
    for (long some = first; some < last; some += KEYS)
        for (int j = 0; j < count; j++) {
            struct query *one = queries + j;
            long from = some > one->start ? some : one->start, to = some + KEYS < one->end ? some + KEYS : one->end, i = 0;
            ahead(values, some + KEYS, last, Dv, j, count);
            for (; from < to && i + 64 <= Dv; i += 64)
                weighted(values + i, one->scores, one->y + i, from, to, Dv, 8);
            for (; from < to && i < Dv; i += 8)
                weighted(values + i, one->scores, one->y + i, from, to, Dv, 1);
        }
}

/* y (B, T, H, Dv): of queries q (B, H, T, D) over keys and values (B, K, size, D or Dv). The last query of a row is at `positions` (B,) or,
   where that is NULL, at `last`; each sees itself and what comes before it, of these the `window` last (0: all). Scores are `capped`, and
   heads have `sinks` (H,), or NULL. `scores`: (parts, TOGETHER, size + 7). */
struct attention {
    const float *q, *keys, *values;
    const int64_t *positions;
    const float *sinks;
    float *scores, *y;
    long last, B, H, K, T, size, D, Dv, window, parts, threads;
    double scale, cap;
};

static void attention_part(const void *job, long part) {
    struct attention a = *(const struct attention *)job;
    struct query queries[TOGETHER];
    long group = a.H / a.K * a.T, all = a.B * a.K * group, last = (part + 1) * all / a.parts;  /* queries, first those of one head of keys */
    int count = 0;
    for (long n = part * all / a.parts; n < last; n++) {
        long head = n / group, b = head / a.K, t = n % a.T, h = head % a.K * (a.H / a.K) + n % group / a.T;
        long end = (a.positions ? a.positions[b] : a.last) + 1 - (a.T - 1 - t);
        queries[count] = (struct query){
            .q = a.q + ((b * a.H + h) * a.T + t) * a.D,
            .y = a.y + ((b * a.T + t) * a.H + h) * a.Dv,
            .sink = a.sinks ? a.sinks[h] : -__builtin_inff(),
            .scores = a.scores + (part * TOGETHER + count) * (a.size + 7),
            .start = a.window && end > a.window ? end - a.window : 0,
            .end = end,
        };
        if (++count == TOGETHER || n + 1 == last || (n + 1) / group != head) {
            attend(queries, count, a.keys + head * a.size * a.D, a.values + head * a.size * a.Dv, a.D, a.Dv, (float)a.scale, (float)a.cap);
            count = 0;
        }
    }
}

/* ---- a low-rank update put on a weight ---- */

enum { PANEL = 16, SIDE_BY_SIDE = 16 };  /* columns of a that lie together; panels that stay in the nearest cache for all rows */

/* What becomes of the numbers of a weight: sums of squares of W, of what is put on and of what rounding changes; bits that become others. */
struct tally {
    __m256 weight, update, rounding;
    __m256i changed;
};

/* Eight numbers to the nearest bf16, ties to even, as the upper halves of 32 bits; of what is finite. */
INLINE __m256i to_bf16(__m256 v) {
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000));
}

/* PANEL columns of `rows` rows: W + b a, rounded once, to `out`. */
INLINE void panel_put_on(enum kind kind, int rows, const char *W, char *out, long row_bytes, const float *b, long R, const float *a,
                         struct tally *tally) {
    __m256 sums[2 * TILE];
    for (int k = 0; k < 2 * rows; k++)
        sums[k] = _mm256_setzero_ps();
    for (long k = 0; k < R; k++, a += PANEL) {
        __m256 left = _mm256_loadu_ps(a), right = _mm256_loadu_ps(a + 8);
        for (int r = 0; r < rows; r++) {
            __m256 factor = _mm256_set1_ps(b[r * R + k]);
            sums[2 * r] = _mm256_fmadd_ps(factor, left, sums[2 * r]);
            sums[2 * r + 1] = _mm256_fmadd_ps(factor, right, sums[2 * r + 1]);
        }
    }
    for (int r = 0; r < rows; r++, W += row_bytes, out += row_bytes) {
        __m256i kept[2];
        for (int k = 0; k < 2; k++) {
            __m256 weight = eight(kind, W, 8 * k), update = sums[2 * r + k], merged = _mm256_add_ps(weight, update);
            kept[k] = kind == BF16 ? to_bf16(merged) : _mm256_castps_si256(merged);
            __m256 rounding = _mm256_sub_ps(_mm256_castsi256_ps(kept[k]), merged);
            tally->weight = _mm256_fmadd_ps(weight, weight, tally->weight);
            tally->update = _mm256_fmadd_ps(update, update, tally->update);
            tally->rounding = _mm256_fmadd_ps(rounding, rounding, tally->rounding);
            tally->changed = _mm256_or_si256(tally->changed, _mm256_xor_si256(kept[k], _mm256_castps_si256(weight)));
        }
        if (kind == BF16)  /* the upper halves, and in order: they are packed by halves of registers */
            kept[0] = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(kept[0], 16), _mm256_srli_epi32(kept[1], 16)), 0xd8);
        _mm256_storeu_si256((__m256i *)out, kept[0]);
        if (kind != BF16)
            _mm256_storeu_si256((__m256i *)(out + 32), kept[1]);
    }
}

INLINE int rows_put_on(enum kind kind, const char *W, const float *b, const float *a, char *out, long rows, long in, long R, double *totals) {
    long bytes = kind == BF16 ? 2 : 4, panels = in / PANEL;
    __m256i changed = _mm256_setzero_si256();
    for (long some = 0; some < panels; some += SIDE_BY_SIDE) {
        long end = some + SIDE_BY_SIDE < panels ? some + SIDE_BY_SIDE : panels;
        for (long row = 0, count; row < rows; row += count) {
            struct tally tally = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), changed};
            count = row + TILE <= rows ? TILE : 1;
            for (long n = some; n < end; n++) {
                long start = (row * in + n * PANEL) * bytes;
                panel_put_on(kind, count == TILE ? TILE : 1, W + start, out + start, in * bytes, b + row * R, R, a + n * R * PANEL, &tally);
            }
            totals[0] += sum(tally.weight), totals[1] += sum(tally.update), totals[2] += sum(tally.rounding);
            changed = tally.changed;
        }
    }
    return !_mm256_testz_si256(changed, changed);
}

/* out = W + b a, rounded to what W is (fp32 or bf16): W (rows, in), b (rows, R), and a (R, in) as (in / PANEL, R, PANEL), in a multiple of PANEL.
   Adds to `totals` what a tally sums up, not finite where a number is not, or its square; whether any number became another one. */
int put_on(long kind, const char *W, const float *b, const float *a, char *out, long rows, long in, long R, double *totals) {
    return kind == BF16 ? rows_put_on(BF16, W, b, a, out, rows, in, R, totals) : rows_put_on(FP32, W, b, a, out, rows, in, R, totals);
}

/* ---- calls ---- */

enum op { PRODUCT, RMS_NORM, SWIGLU, TURNED, SUMMED, PLACED, ATTENTION_OF_FEW };

struct call {
    int64_t op;
    union {
        struct product product;
        struct rms_norm rms_norm;
        struct swiglu swiglu;
        struct turned turned;
        struct summed summed;
        struct placed placed;
        struct attention attention;
    };
};

/* How large a call is, for who writes them, and for how many queries there must be room for scores. */
long call_size(void) { return sizeof(struct call); }
long together(void) { return TOGETHER; }

/* One after the other. */
void run(const struct call *call, long count) {
    for (; count > 0; count--, call++)
        switch (call->op) {
            case PRODUCT: shared(product_part, &call->product, call->product.parts, call->product.threads); break;
            case RMS_NORM: rms_norm(call->rms_norm); break;
            case SWIGLU: swiglu(call->swiglu); break;
            case TURNED: turned(call->turned); break;
            case SUMMED: summed(call->summed); break;
            case PLACED: placed(call->placed); break;
            case ATTENTION_OF_FEW: shared(attention_part, &call->attention, call->attention.parts, call->attention.threads); break;
        }
}
