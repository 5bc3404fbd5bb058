/* What eager PyTorch does wastefully on a CPU, in one pass each: PolyGLU, SwiGLU, RMSNorm with rotary positions, the loss, attention
   without gradients, a decoded token's products. An eager operator reads and writes all of its tensor and waits for its slowest thread; a
   feed-forward of PolyGLU is seventy of them forward and back (LOG.md).

   native.py compiles this file once and calls it; where it cannot, the plain formulas of ops.py and kernels.py do the same. Conventions:
   arrays are fp32, or where `half` says so bf16; arithmetic is fp32. Work is cut by the shapes alone, never by the number of threads, so
   results do not depend on it. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define TILE 512 /* numbers converted at a time: small enough for the first cache */
#define AHEAD 128 /* vectors of a weight asked of the memory before they are multiplied: it takes that long to answer */
#define INLINE inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
/* fewer threads, or one, where their start would cost more than the work (numbers touched) */
#define PRAGMA(text) _Pragma(#text)
#define PARALLEL(work) PRAGMA(omp parallel for num_threads((work) < 16384 ? 1 : threads))

/* ---- numbers ------------------------------------------------------------------------------------------------------- */

static void load(float *to, const void *from, int64_t at, int n, int half) {
    if (!half) {
        memcpy(to, (const float *)from + at, n * sizeof(float));
        return;
    }
    const uint16_t *bits = (const uint16_t *)from + at;
    uint32_t *wide = (uint32_t *)to;
    for (int i = 0; i < n; i++) wide[i] = (uint32_t)bits[i] << 16;
}

static void store(void *to, int64_t at, const float *from, int n, int half) {
    if (!half) {
        memcpy((float *)to + at, from, n * sizeof(float));
        return;
    }
    uint16_t *bits = (uint16_t *)to + at;
    const uint32_t *wide = (const uint32_t *)from;
    int i = 0;
#ifdef __AVX512BF16__
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(bits + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < n; i++) { /* to the nearest, ties to even; what is not a number stays none */
        uint32_t x = wide[i], nearest = x + 0x7fff + (x >> 16 & 1);
        bits[i] = ((x & 0x7fffffff) > 0x7f800000 ? x | 0x400000 : nearest) >> 16;
    }
}

/* exp to 1 ulp: 2^n times the Taylor series of what is left, |r| <= ln 2 / 2. From -87 down it stays at 1.6e-38, for
   numbers below the normal ones take a processor a hundred times as long; from 88 up at 1.7e38. NaN stays NaN. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x, x = x > 88.0f ? 88.0f : x; /* two instructions; nested, five */
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact */
    float series = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f)))))));
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return series * power.value;
}

static inline float sigmoid(float x) { return 1 / (1 + exp_(-x)); }

/* ---- PolyGLU: y = (sum_k g_k sigma_k(a)) u, g = softmax_k(al + s), sigma = relu, tanh, silu, gelu --------------------- */

typedef struct {
    float relu, tanh, silu, gelu, mean; /* the four values, and their mix */
    float g0, g1, g2, g3;               /* their gates */
    float sig, phi, bell;               /* sigmoid(a), the normal distribution up to a, exp(-a^2 / 2) */
} Mix;

/* z: a neuron's four numbers, f apart, s: a token's. They are al and s if some are `far` apart, else exp(al) and exp(s), each scaled by
   the largest of its four: then no gate needs an exponential, and their sum cannot vanish. */
static INLINE Mix mix(const int far, float a, const float *z, int64_t f, const float *s) {
    Mix m;
    if (far) {
        float z0 = z[0] + s[0], z1 = z[f] + s[1], z2 = z[2 * f] + s[2], z3 = z[3 * f] + s[3], top = MAX(MAX(z0, z1), MAX(z2, z3));
        m.g0 = exp_(z0 - top), m.g1 = exp_(z1 - top), m.g2 = exp_(z2 - top), m.g3 = exp_(z3 - top);
    } else {
        m.g0 = z[0] * s[0], m.g1 = z[f] * s[1], m.g2 = z[2 * f] * s[2], m.g3 = z[3 * f] * s[3];
    }
    float size = fabsf(a), share = 1 / (m.g0 + m.g1 + m.g2 + m.g3);
    m.g0 *= share, m.g1 *= share, m.g2 *= share, m.g3 *= share;
    float e = exp_(-size), e2 = e * e, low = 1 + e, high = 1 + e2, both = 1 / (low * high); /* sigmoid and tanh by one division */
    m.sig = (a < 0 ? e : 1) * high * both;
    /* Abramowitz and Stegun 7.1.26: the error function to 1.5e-7, out of the bell that its derivative needs anyway */
    float t = 1 / (1 + 0.3275911f * 0.70710678f * size);
    float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    m.bell = exp_(-0.5f * a * a), tail *= 0.5f * m.bell;
    m.phi = a < 0 ? tail : 1 - tail;
    m.relu = a > 0 ? a : 0, m.tanh = copysignf((1 - e2) * low * both, a), m.silu = a * m.sig, m.gelu = a * m.phi;
    m.mean = m.g0 * m.relu + m.g1 * m.tanh + m.g2 * m.silu + m.g3 * m.gelu;
    return m;
}

/* au (n, 2f) = [a | u], its rows `stride` apart; al (rows, 4, f); s (n, 4) */
void polyglu_forward(int half, int threads, int64_t n, int64_t f, int64_t rows, int64_t stride, int64_t far, const void *au,
                     const float *al, const float *s, void *y) {
    PARALLEL(n *f)
    for (int64_t i = 0; i < n; i++) {
        float a[TILE], u[TILE], out[TILE], token[4] = {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]};
        for (int64_t j = 0; j < f; j += TILE) {
            const float *z = al + i / (n / rows) * 4 * f + j;
            int m = MIN(TILE, f - j);
            load(a, au, i * stride + j, m, half);
            load(u, au, i * stride + f + j, m, half);
            if (far)
                for (int k = 0; k < m; k++) out[k] = mix(1, a[k], z + k, f, token).mean * u[k];
            else
                for (int k = 0; k < m; k++) out[k] = mix(0, a[k], z + k, f, token).mean * u[k];
            store(y, i * f + j, out, m, half);
        }
    }
}

/* One token's m neurons: da and du, and what they add to the gradients of al, d (4, f), and of s, sums (4). */
static INLINE void differentiate(const int far, int m, int64_t f, const float *a, const float *u, const float *g, const float *z,
                                 const float *token, float *da, float *du, float *d, float *sums) {
    float t0 = 0, t1 = 0, t2 = 0, t3 = 0;
#pragma omp simd reduction(+ : t0, t1, t2, t3)
    for (int k = 0; k < m; k++) {
        Mix x = mix(far, a[k], z + k, f, token);
        float dm = g[k] * u[k];
        du[k] = g[k] * x.mean;
        da[k] = dm * (x.g0 * (a[k] > 0) + x.g1 * (1 - x.tanh * x.tanh) + x.g2 * (x.sig + x.silu * (1 - x.sig)) +
                      x.g3 * (x.phi + 0.39894228f * a[k] * x.bell));
        float d0 = x.g0 * dm * (x.relu - x.mean), d1 = x.g1 * dm * (x.tanh - x.mean);
        float d2 = x.g2 * dm * (x.silu - x.mean), d3 = x.g3 * dm * (x.gelu - x.mean);
        d[k] += d0, d[f + k] += d1, d[2 * f + k] += d2, d[3 * f + k] += d3;
        t0 += d0, t1 += d1, t2 += d2, t3 += d3;
    }
    sums[0] += t0, sums[1] += t1, sums[2] += t2, sums[3] += t3;
}

/* A task is one of `pieces` runs of tokens of a row, and has sums of its own for al: dal (rows, pieces, 4, f), zero at the start. */
void polyglu_backward(int half, int threads, int64_t n, int64_t f, int64_t rows, int64_t pieces, int64_t stride, int64_t far,
                      const void *dy, const void *au, const float *al, const float *s, void *dau, float *dal, float *ds) {
    int64_t row = n / rows, size = (row + pieces - 1) / pieces;
    PARALLEL(n *f)
    for (int64_t task = 0; task < rows * pieces; task++) {
        int64_t first = task / pieces * row + task % pieces * size, last = MIN(first + size, (task / pieces + 1) * row);
        for (int64_t i = first; i < last; i++) {
            float a[TILE], u[TILE], g[TILE], da[TILE], du[TILE], token[4] = {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]};
            float *sums = memset(ds + 4 * i, 0, 4 * sizeof(float));
            for (int64_t j = 0; j < f; j += TILE) {
                const float *z = al + task / pieces * 4 * f + j;
                float *d = dal + task * 4 * f + j;
                int m = MIN(TILE, f - j);
                load(a, au, i * stride + j, m, half);
                load(u, au, i * stride + f + j, m, half);
                load(g, dy, i * f + j, m, half);
                if (far)
                    differentiate(1, m, f, a, u, g, z, token, da, du, d, sums);
                else
                    differentiate(0, m, f, a, u, g, z, token, da, du, d, sums);
                store(dau, i * 2 * f + j, da, m, half);
                store(dau, i * 2 * f + f + j, du, m, half);
            }
        }
    }
}

/* ---- SwiGLU: y = silu(a) u ------------------------------------------------------------------------------------------ */

void swiglu_forward(int half, int threads, int64_t n, int64_t f, int64_t stride, const void *au, void *y) {
    PARALLEL(n *f)
    for (int64_t i = 0; i < n; i++) {
        float a[TILE], u[TILE];
        for (int64_t j = 0; j < f; j += TILE) {
            int m = MIN(TILE, f - j);
            load(a, au, i * stride + j, m, half);
            load(u, au, i * stride + f + j, m, half);
            for (int k = 0; k < m; k++) a[k] *= sigmoid(a[k]) * u[k];
            store(y, i * f + j, a, m, half);
        }
    }
}

void swiglu_backward(int half, int threads, int64_t n, int64_t f, int64_t stride, const void *dy, const void *au, void *dau) {
    PARALLEL(n *f)
    for (int64_t i = 0; i < n; i++) {
        float a[TILE], u[TILE], g[TILE];
        for (int64_t j = 0; j < f; j += TILE) {
            int m = MIN(TILE, f - j);
            load(a, au, i * stride + j, m, half);
            load(u, au, i * stride + f + j, m, half);
            load(g, dy, i * f + j, m, half);
            for (int k = 0; k < m; k++) {
                float sig = sigmoid(a[k]), silu = a[k] * sig;
                a[k] = g[k] * u[k] * (sig + silu * (1 - sig));
                u[k] = g[k] * silu;
            }
            store(dau, i * 2 * f + j, a, m, half);
            store(dau, i * 2 * f + f + j, u, m, half);
        }
    }
}

/* ---- the gate of PolyGLU: its noise, its pool ------------------------------------------------------------------------ */

static INLINE uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * 0x21F0AAAD;
    x = (x ^ x >> 15) * 0x735A2D97;
    return x ^ x >> 15;
}

/* u (rows, size) between 0 and 1, of two keys a row: the plain formula's, in numbers of 32 bits */
void uniform(int half, int threads, int64_t rows, int64_t size, const int64_t *keys, const int64_t *others, float *u) {
    PARALLEL(rows *size)
    for (int64_t r = 0; r < rows; r++) {
        uint32_t key = keys[r], other = others[r];
        for (uint32_t i = 0; i < size; i++) u[r * size + i] = (2 * (int32_t)(hash(hash(i + key) ^ other) >> 9) + 1) * 0x1p-24f;
    }
}

/* y (n, c): the sum of x from start to end, of each token its own; x counts `in` times, y `out` times, where these are given. total: room
   for (n + 1, c), in fp64, so that a difference of sums forgets what lay before. One thread: it is a few numbers a token. */
void window_sum(int half, int threads, int64_t n, int64_t c, const float *x, const double *in, const int64_t *start, const int64_t *end,
                const double *out, double *total, float *y) {
    memset(total, 0, c * sizeof(double));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < c; j++) total[(i + 1) * c + j] = total[i * c + j] + x[i * c + j] * (in ? in[i] : 1);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < c; j++) y[i * c + j] = (total[end[i] * c + j] - total[start[i] * c + j]) * (out ? out[i] : 1);
}

/* ---- RMSNorm, and rotary positions ----------------------------------------------------------------------------------- */

/* The turn of `swap` in the plain formula: x[j] cos[j] + x[j + e/2] sin[j], where sin = [-sin, sin]; sign -1 turns back. */
static void turn(float *x, int64_t e, const float *cos, const float *sin, float sign) {
    for (int64_t j = 0; j < e / 2; j++) {
        float a = x[j], b = x[j + e / 2];
        x[j] = a * cos[j] + sign * b * sin[j];
        x[j + e / 2] = b * cos[j + e / 2] + sign * a * sin[j + e / 2];
    }
}

static inline float inverse_rms(const float *x, int64_t e, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < e; j++) sum += x[j] * x[j];
    return 1 / sqrtf(sum / e + eps);
}

/* x (n, heads, e), strides `row` and `head`; weight (heads or 1, e), or none: no norm; cos, sin (n, e), or none: not turned */
void norm_forward(int half, int threads, int64_t n, int64_t heads, int64_t e, int64_t row, int64_t head, const void *x,
                  const float *weight, int64_t weights, float eps, const float *cos, const float *sin, void *y) {
    PARALLEL(n *heads *e)
    for (int64_t i = 0; i < n; i++) {
        float wide[e];
        for (int64_t h = 0; h < heads; h++) {
            load(wide, x, i * row + h * head, e, half);
            if (weight) {
                const float *w = weight + h % weights * e, scale = inverse_rms(wide, e, eps);
                for (int64_t j = 0; j < e; j++) wide[j] *= scale * w[j];
            }
            if (cos) turn(wide, e, cos + i * e, sin + i * e, 1);
            store(y, (i * heads + h) * e, wide, e, half);
        }
    }
}

/* A task is `size` rows, and has sums of its own for the weight: dw (tasks, weights, e), zero at the start. */
void norm_backward(int half, int threads, int64_t n, int64_t heads, int64_t e, int64_t row, int64_t head, int64_t size, const void *dy,
                   const void *x, const float *weight, int64_t weights, float eps, const float *cos, const float *sin, void *dx,
                   float *dw) {
    PARALLEL(n *heads *e)
    for (int64_t task = 0; task < (n + size - 1) / size; task++) {
        float g[e], unit[e];
        for (int64_t i = task * size; i < MIN(n, (task + 1) * size); i++)
            for (int64_t h = 0; h < heads; h++) {
                load(g, dy, (i * heads + h) * e, e, half);
                if (cos) turn(g, e, cos + i * e, sin + i * e, -1);
                if (weight) {
                    load(unit, x, i * row + h * head, e, half);
                    const float *w = weight + h % weights * e, scale = inverse_rms(unit, e, eps);
                    float *sums = dw + (task * weights + h % weights) * e, along = 0;
#pragma omp simd reduction(+ : along)
                    for (int64_t j = 0; j < e; j++) {
                        unit[j] *= scale;
                        sums[j] += unit[j] * g[j];
                        g[j] *= w[j];
                        along += unit[j] * g[j];
                    }
                    for (int64_t j = 0; j < e; j++) g[j] = (g[j] - unit[j] * along / e) * scale;
                }
                store(dx, (i * heads + h) * e, g, e, half);
            }
    }
}

/* ---- the loss -------------------------------------------------------------------------------------------------------- */

/* nll (n) of target (n) under logits (n, padded), of which `vocab` count; with `grads` their place takes its gradient */
void cross_entropy(int half, int threads, int64_t n, int64_t vocab, int64_t padded, int64_t grads, const int64_t *target,
                   void *logits, float *nll) {
    PARALLEL(n *vocab)
    for (int64_t i = 0; i < n; i++) {
        float x[TILE], wanted, top = -INFINITY, sum = 0;
        load(&wanted, logits, i * padded + target[i], 1, half);
        for (int pass = 0; pass < 2 + grads; pass++) /* the largest, the sum of exponentials, the gradient */
            for (int64_t j = 0; j < padded; j += TILE) {
                int m = MIN(TILE, padded - j), real = MAX(0, MIN(m, vocab - j));
                load(x, logits, i * padded + j, m, half);
                if (pass == 0) {
#pragma omp simd reduction(max : top)
                    for (int k = 0; k < real; k++) top = MAX(top, x[k]);
                } else if (pass == 1) {
#pragma omp simd reduction(+ : sum)
                    for (int k = 0; k < real; k++) sum += exp_(x[k] - top);
                } else {
                    for (int k = 0; k < real; k++) x[k] = exp_(x[k] - top) / sum;
                    for (int k = real; k < m; k++) x[k] = 0;
                    if (target[i] >= j && target[i] < j + m) x[target[i] - j] -= 1;
                    store(logits, i * padded + j, x, m, half);
                }
            }
        nll[i] = logf(sum) + (top - wanted);
    }
}

/* ---- decoding: a few rows, one query ---------------------------------------------------------------------------------- */

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64))); /* two bf16 each: inputs 2i and 2i + 1 of one output */

/* sum + x w of both numbers of a pair: by the instruction that multiplies bf16 where there is one, else in fp32 */
static INLINE Lanes multiply(Lanes sum, uint32_t x, Pairs w) {
    Pairs both = x - (Pairs){0};
#ifdef __AVX512BF16__
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)w);
#else
    return sum + (Lanes)(both << 16) * (Lanes)(w << 16) + (Lanes)(both & 0xffff0000) * (Lanes)(w & 0xffff0000);
#endif
}

/* 32 outputs of `rows` rows of pairs, a constant wherever this is inlined, so that the sums stay in registers; w: pairs of bf16, or of
   `squeezed` weights three vectors for four inputs */
static INLINE void product(const int rows, const int squeezed, int64_t pairs, const uint32_t *x, const Pairs *w, const Lanes *scale,
                           float *y, int64_t out, int64_t first) {
    Lanes sum[8][2] = {0};
    for (int64_t i = 0; i < pairs; i += 2, w += squeezed ? 3 : 4) {
        for (int n = 0; n < 3 && squeezed; n++) __builtin_prefetch(w + n + AHEAD);
#pragma GCC unroll 4
        for (int n = 0; n < 4 && i + n / 2 < pairs; n++) {
            Pairs number = w[squeezed ? n / 2 : n], power = w[2];
            if (squeezed) {
                number = n % 2 ? number & 0x807f807f : (number >> 8 & 0x007f007f) | (number << 8 & 0x80008000);
                power = n == 0 ? power << 7 : n == 1 ? power << 3 : n == 2 ? power >> 1 : power >> 5;
                number |= power & 0x07800780;
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) sum[r][n % 2] = multiply(sum[r][n % 2], x[r * pairs + i + n / 2], number);
        }
    }
    for (int r = 0; r < rows; r++) {
        if (squeezed) sum[r][0] *= scale[0], sum[r][1] *= scale[1];
        memcpy(y + r * out + first, sum[r], MIN(32, out - first) * sizeof(float));
    }
}

/* A bf16 weight (out, in) in 12 bits a number instead of 16, nothing lost: what decoding waits for is the memory. The numbers of one output
   have few exponents: half a byte counts them from `base`, which lies one below the fifteen that most of them have, and is 0 where the
   number is. One that has another is a stray (one or two in ten thousand of trained weights): zero here, and in a list.

   A block is 32 outputs: 2^(base - 64) of each, so that nothing has to be added to an exponent where time counts; three vectors of half
   words (16, 2) for four inputs; the number of strays, room for `most` values, and for their places. Of the three, two hold signs and
   fractions of two inputs each: outputs 16 to 31 where bf16 has them, 0 to 15 turned by eight bits. The third has the half bytes of both. */
typedef struct { Lanes *scale; uint16_t *halves; int32_t *strays, *place; float *value; int64_t quads, most; } Block;

static inline Block squeezed_block(const void *packed, int64_t bytes, int64_t first, int64_t in) {
    Block b = {.scale = (Lanes *)((char *)packed + first / 32 * bytes), .quads = (in + 3) / 4};
    b.halves = (uint16_t *)(b.scale + 2), b.strays = (int32_t *)(b.halves + 96 * b.quads), b.value = (float *)(b.strays + 1);
    b.most = (bytes - 132 - 192 * b.quads) / 8, b.place = (int32_t *)(b.value + b.most);
    return b;
}

/* packed (out / 32, bytes), at a multiple of 64 bytes; lost: how many strays found no room, added to it */
void squeeze(int half, int threads, int64_t in, int64_t out, int64_t bytes, const uint16_t *w, void *packed, int32_t *lost) {
    PARALLEL(in *out)
    for (int64_t first = 0; first < out; first += 32) {
        Block b = squeezed_block(packed, bytes, first, in);
        memset(b.scale, 0, bytes);
        for (int64_t l = 0; l < MIN(32, out - first); l++) {
            const uint16_t *row = w + (first + l) * in;
            int64_t count[256] = {0}, inside = 0, best = 0, base = 0;
            for (int64_t i = 0; i < in; i++) count[row[i] >> 7 & 255]++;
            for (int e = 1; e < 256; e++) { /* the fifteen up to e; from 2^64 up all are strays, for 2^(base - 64) must be a number */
                inside += count[e] - (e > 15 ? count[e - 15] : 0);
                if (e < 191 && inside > best) best = inside, base = MAX(e - 15, 0);
            }
            ((float *)b.scale)[l] = ldexpf(1, base - 64);
            for (int64_t i = 0; i < in; i++) {
                uint16_t rest = row[i] & 0x807f, power = (row[i] >> 7 & 255) - base;
                if (!(row[i] & 0x7fff)) continue;
                if (power < 1 || power > 15) {
                    int32_t n = b.strays[0]++;
                    if (n < b.most) load(b.value + n, row, i, 1, 1), b.place[n] = 32 * i + l;
                    continue;
                }
                uint16_t *at = b.halves + i / 4 * 96 + l % 16 * 2 + i % 2;
                at[i / 2 % 2 * 32] |= l < 16 ? (uint16_t)(rest << 8 | rest >> 8) : rest;
                at[64] |= power << (i / 2 % 2 * 8 + l / 16 * 4);
            }
        }
        if (b.strays[0] > b.most) {
            PRAGMA(omp atomic)
            *lost += b.strays[0] - b.most;
        }
    }
}

/* Not inlined: in the loops of its caller a compiler runs out of registers for the sums. */
static __attribute__((noinline)) void up_to_eight(int64_t rows, int64_t pairs, const uint32_t *x, const Block *b, float *y, int64_t out,
                                                  int64_t first) {
    switch (rows) {
#define CASE(n) case n: product(n, 1, pairs, x, (Pairs *)b->halves, b->scale, y, out, first); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
}

/* y (rows, out) = x (rows, in) w^T in fp32, x rounded to bf16; w as `squeeze` packs it. A block is read once, then multiplied by eight rows
   at a time out of the first caches. */
void linear_few(int half, int threads, int64_t rows, int64_t in, int64_t out, int64_t bytes, const float *x, const void *w, float *y) {
    int64_t pairs = (in + 3) / 4 * 2;
    uint32_t rounded[rows * pairs];
    PARALLEL(rows *in)
    for (int64_t r = 0; r < rows; r++) {
        float scaled[2 * pairs]; /* 2^64 times as large, exactly, so that neither they nor the weights come near the ends of their range */
        for (int64_t i = 0; i < 2 * pairs; i++) scaled[i] = i < in ? x[r * in + i] * 0x1p64f : 0;
        store(rounded, 2 * r * pairs, scaled, 2 * pairs, 1);
    }
    PARALLEL(in *out)
    for (int64_t first = 0; first < out; first += 32) {
        Block b = squeezed_block(w, bytes, first, in);
        for (int64_t r = 0; r < rows; r += 8) up_to_eight(MIN(8, rows - r), pairs, rounded + r * pairs, &b, y + r * out, out, first);
        for (int64_t n = 0; n < b.strays[0]; n++) {
            const uint16_t *input = (uint16_t *)rounded + b.place[n] / 32;
            float *sum = y + first + b.place[n] % 32;
            for (int64_t r = 0; r < rows; r++) {
                union { uint32_t bits; float value; } wide = {(uint32_t)input[2 * r * pairs] << 16};
                sum[r * out] += b.value[n] * (wide.value * 0x1p-64f);
            }
        }
    }
}

/* Sums of neighbours, of a and then of b: four rounds of it make of sixteen vectors the sum of each. */
static INLINE Lanes fold(Lanes a, Lanes b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    const Pairs even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

typedef float Loose __attribute__((vector_size(64), aligned(4)));

/* score (n, up to 15 more) = q key^T of n keys behind one another, E a multiple of 16; sixteen at a time, for a sum across a vector costs
   more than its products */
static void dots(const float *q, const float *key, int64_t n, int64_t E, float *score) {
    for (int64_t first = 0; first < n; first += 16) {
        Lanes sum[16] = {0};
        for (int64_t e = 0; e < E; e += 16)
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) sum[i] += *(Loose *)(q + e) * *(Loose *)(key + MIN(first + i, n - 1) * E + e); /* or the last again */
        for (int many = 16; many > 1; many /= 2)
            for (int i = 0; i < many / 2; i++) sum[i] = fold(sum[2 * i], sum[2 * i + 1]);
        memcpy(score + first, sum, sizeof(Lanes));
    }
}

/* sixteen numbers of p value, value (n, E) */
static INLINE Lanes mixture(const float *p, const float *value, int64_t n, int64_t E) {
    Lanes sum[4] = {0};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) sum[j] += p[i + j] * *(Loose *)(value + (i + j) * E);
    for (; i < n; i++) sum[0] += p[i] * *(Loose *)(value + i * E);
    return sum[0] + sum[1] + sum[2] + sum[3];
}

/* A token of each row: its queries (B, G share, E) over the keys of an encoder (B, G, S, E), if there is one, the first pos[b] of the cache
   (B, G, room, E) and its own, which is put behind those. All in fp32, each by its strides: of a row (q, k, v); of batch and head, a key
   behind the other. Masks (B, S) and (B, room), if given: what is seen of them. */
void attend_one(int half, int threads, int64_t B, int64_t G, int64_t share, int64_t E, int64_t S, int64_t room, int64_t q_row, int64_t k_row,
                int64_t v_row, int64_t batch, int64_t head, int64_t other_batch, int64_t other_head, int64_t mask_row, const float *q,
                const float *k, const float *v, const int64_t *pos, float *keys, float *values, const uint8_t *mask, const float *other_keys,
                const float *other_values, const uint8_t *other_mask, float *y) {
    for (int64_t i = 0; i < B * G; i++) {
        int64_t b = i / G, g = i % G, to = b * batch + g * head + pos[b] * E;
        memcpy(keys + to, k + b * k_row + g * E, E * sizeof(float)), memcpy(values + to, v + b * v_row + g * E, E * sizeof(float));
    }
    PARALLEL(B *G *share *(S + room) * E)
    for (int64_t h = 0; h < B * G * share; h++) {
        int64_t b = h / share / G, g = h / share % G, n = pos[b] + 1, own = b * batch + g * head, other = b * other_batch + g * other_head;
        const float *query = q + b * q_row + h % (G * share) * E;
        float p[S + n + 16], top = -INFINITY, sum = 0, scale = 1 / sqrtf(E);
        dots(query, other_keys + other, S, E, p);
        dots(query, keys + own, n, E, p + S);
        for (int64_t i = 0; other_mask && i < S; i++) p[i] = other_mask[b * mask_row + i] ? p[i] : -INFINITY;
        for (int64_t i = 0; mask && i < n; i++) p[S + i] = mask[b * mask_row + i] ? p[S + i] : -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < S + n; i++) top = MAX(top, p[i]);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < S + n; i++) sum += p[i] = exp_((p[i] - top) * scale);
        for (int64_t e = 0; e < E; e += 16)
            *(Loose *)(y + h * E + e) = (mixture(p, other_values + other + e, S, E) + mixture(p + S, values + own + e, n, E)) / sum;
    }
}

/* ---- attention without gradients, of documents side by side ------------------------------------------------------------ */

/* y (Nq, H, E) = softmax(q k^T / sqrt(E)) v in bf16, E even: queries from[s]:from[s + 1] of segment s over its keys at[s]:at[s + 1], H / G
   heads on each of G; rows of q, k, v lie so many numbers apart. causal: the last query sees every key. Keys and values are laid out once
   for the heads that share them; then eight queries at a time multiply all of their keys, by pairs of bf16 as above. */
void attend_segments(int half, int threads, int64_t S, int64_t H, int64_t G, int64_t E, int64_t causal, const int32_t *from,
                     const int32_t *at, int64_t q_row, int64_t k_row, int64_t v_row, const uint16_t *q, const uint16_t *k,
                     const uint16_t *v, void *y) {
    int64_t share = H / G;
    PRAGMA(omp parallel for schedule(dynamic) num_threads(threads))
    for (int64_t task = 0; task < S * G; task++) {
        int64_t s = task / G, g = task % G, n = from[s + 1] - from[s], m = at[s + 1] - at[s], even = (m + 1) / 2 * 2;
        Pairs keys[(m + 31) / 32 * E + 1], values[(E + 31) / 32 * even + 1]; /* (m / 32, E / 2, 32, 2), (E / 32, m / 2, 32, 2) */
        for (int64_t i = 0; i < m; i++)
            for (int64_t e = 0; e < E / 2; e++)
                memcpy((uint32_t *)(keys + i / 32 * E + 2 * e) + i % 32, k + (at[s] + i) * k_row + g * E + 2 * e, 4);
        for (int64_t i = 0; i < m; i += 2)
            for (int64_t first = 0; first < E; first += 32) {
                const uint16_t *one = v + (at[s] + i) * v_row + g * E + first, *two = i + 1 < m ? one + v_row : one; /* or p = 0 */
                uint32_t *pairs = (uint32_t *)(values + first / 32 * even + i);
                for (int64_t e = 0; e < MIN(32, E - first); e++) pairs[e] = one[e] | (uint32_t)two[e] << 16;
            }
        for (int64_t r = 0; r < n * share; r += 8) { /* row r: token r / share, head r % share */
            int64_t last = MIN(r + 8, n * share) - 1, seen = MAX(0, causal ? last / share + 1 + m - n : m), wide = (seen + 31) / 32 * 32;
            float score[8 * wide + 1], out[8 * E], sum[8];
            uint32_t x[4 * MAX(E, wide)], pairs = (seen + 1) / 2;
            for (int64_t j = 0; j < 8; j++) { /* past the last row that one again */
                int64_t row = MIN(r + j, last);
                memcpy(x + j * E / 2, q + (from[s] + row / share) * q_row + (g * share + row % share) * E, 2 * E);
            }
            for (int64_t i = 0; i < wide; i += 32) product(8, 0, E / 2, x, keys + i / 32 * E, NULL, score, wide, i);
            for (int64_t j = 0; j < 8; j++) {
                int64_t row = MIN(r + j, last), mine = MAX(0, causal ? row / share + 1 + m - n : m);
                float *p = score + j * wide, top = -1e30f, total = 1e-30f, scale = 1 / sqrtf(E); /* no keys: 0 */
                for (int64_t i = mine; i < wide; i++) p[i] = -INFINITY;
#pragma omp simd reduction(max : top)
                for (int64_t i = 0; i < wide; i++) top = MAX(top, p[i]);
#pragma omp simd reduction(+ : total)
                for (int64_t i = 0; i < wide; i++) total += p[i] = exp_((p[i] - top) * scale);
                store(x, 2 * j * pairs, p, 2 * pairs, 1);
                sum[j] = 1 / total;
            }
            for (int64_t e = 0; e < E; e += 32) product(8, 0, pairs, x, values + e / 32 * even, NULL, out, E, e);
            for (int64_t j = 0; r + j <= last; j++) {
                for (int64_t e = 0; e < E; e++) out[j * E + e] *= sum[j];
                store(y, ((from[s] + (r + j) / share) * H + g * share + (r + j) % share) * E, out + j * E, E, 1);
            }
        }
    }
}
