// Block maxima, squared errors and block scales of one tile; included once per instruction set.

namespace {
namespace LEVEL_NAME {

// ---- reductions over the 16 elements of each of 16 blocks ---------------------------------------

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, U{__VA_ARGS__})
#endif
// First and second halves of every group of 16, 8, 4 or 2 lanes of two vectors.
#if LANES == 16
#define FIRST_16 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define SECOND_16 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FIRST_8 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define SECOND_8 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define FIRST_4 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define SECOND_4 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define FIRST_2 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define SECOND_2 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define FIRST_8 0, 1, 2, 3, 8, 9, 10, 11
#define SECOND_8 4, 5, 6, 7, 12, 13, 14, 15
#define FIRST_4 0, 1, 4, 5, 8, 9, 12, 13
#define SECOND_4 2, 3, 6, 7, 10, 11, 14, 15
#define FIRST_2 0, 2, 4, 6, 8, 10, 12, 14
#define SECOND_2 1, 3, 5, 7, 9, 11, 13, 15
#else
#define FIRST_4 0, 1, 4, 5
#define SECOND_4 2, 3, 6, 7
#define FIRST_2 0, 2, 4, 6
#define SECOND_2 1, 3, 5, 7
#endif
#define FOLD(v, n, op, size)                                                        \
    for (int i = 0; i < (n) / 2; ++i)                                               \
        v[i] = op(SHUFFLE(v[2 * i], v[2 * i + 1], FIRST_##size),                    \
                  SHUFFLE(v[2 * i], v[2 * i + 1], SECOND_##size));

INLINE F sum(F a, F b) { return a + b; }

// Pairs i, i + 8 first, then i + 4, i + 2, i + 1: the order of reference.py.
#define FOLD_PARTS(part, op)                                                        \
    (PARTS == 1   ? part[0]                                                         \
     : PARTS == 2 ? op(part[0], part[PARTS / 2])                                    \
                  : op(op(part[0], part[PARTS / 2]), op(part[PARTS / 4], part[PARTS - 1])))

#if LANES == 16
#define FOLD_BLOCKS(v, op) \
    FOLD(v, 16, op, 16) FOLD(v, 8, op, 8) FOLD(v, 4, op, 4) FOLD(v, 2, op, 2)
#elif LANES == 8
#define FOLD_BLOCKS(v, op) FOLD(v, 16, op, 8) FOLD(v, 8, op, 4) FOLD(v, 4, op, 2)
#else
#define FOLD_BLOCKS(v, op) FOLD(v, 16, op, 4) FOLD(v, 8, op, 2)
#endif

// One value per block of a tile, as vectors for arithmetic and as floats for broadcasting.
union PerBlock {
    F vector[PARTS];
    float of[BLOCK];
};

// The bit patterns of magnitudes order like the numbers, and NaN above all of them.
template <class T>
INLINE void largest(const typename T::type* x, PerBlock& amax) {
    U folded[BLOCK];
    for (int b = 0; b < BLOCK; ++b) {
        U part[PARTS];
        for (int i = 0; i < PARTS; ++i)
            part[i] = magnitude(T::load(x + b * BLOCK + i * LANES));
        folded[b] = FOLD_PARTS(part, larger);
    }
    FOLD_BLOCKS(folded, larger)
    for (int i = 0; i < PARTS; ++i) amax.vector[i] = number(folded[i]);
}

// w - RN(dequantized) with its sign turned: the error of part i of block b under a scale.
template <class T>
INLINE F difference(
    const typename T::type* x, int b, int i, const PerBlock& scale, const PerBlock& safe) {
    const F w = T::load(x + b * BLOCK + i * LANES);
    return round_e2m1(w / all(safe.of[b])) * all(scale.of[b]) - w;
}

INLINE void divisors(const PerBlock& scale, PerBlock& safe) {
    for (int i = 0; i < PARTS; ++i) safe.vector[i] = divisor(scale.vector[i]);
}

template <class T>
INLINE void squared_error(const typename T::type* x, const PerBlock& scale, PerBlock& error) {
    PerBlock safe;
    divisors(scale, safe);
    F folded[BLOCK];
    for (int b = 0; b < BLOCK; ++b) {
        F part[PARTS];
        for (int i = 0; i < PARTS; ++i) {
            const F d = difference<T>(x, b, i, scale, safe);
            part[i] = d * d;
        }
        folded[b] = FOLD_PARTS(part, sum);
    }
    FOLD_BLOCKS(folded, sum)
    for (int i = 0; i < PARTS; ++i) error.vector[i] = folded[i];
}

// The moments of block b of the tile, `size` floats.
INLINE const float* moments_of(const Job& job, int b, int size) {
    return job.moments + (job.first_block + b) % job.row_blocks * size;
}

// Sum of d_i^2 m_i.
template <class T>
static void diagonal_error(
    const Job& job, const typename T::type* x, const PerBlock& scale, PerBlock& error) {
    PerBlock safe;
    divisors(scale, safe);
    F folded[BLOCK];
    for (int b = 0; b < BLOCK; ++b) {
        const float* m = moments_of(job, b, BLOCK);
        F part[PARTS];
        for (int i = 0; i < PARTS; ++i) {
            const F d = difference<T>(x, b, i, scale, safe);
            part[i] = d * d * load_as<F>(m + i * LANES);
        }
        folded[b] = FOLD_PARTS(part, sum);
    }
    FOLD_BLOCKS(folded, sum)
    for (int i = 0; i < PARTS; ++i) error.vector[i] = folded[i];
}

// Sum of d_i m_ij d_j, over j first.
template <class T>
static void hessian_error(
    const Job& job, const typename T::type* x, const PerBlock& scale, PerBlock& error) {
    PerBlock safe;
    divisors(scale, safe);
    F folded[BLOCK];
    for (int b = 0; b < BLOCK; ++b) {
        const float* m = moments_of(job, b, BLOCK * BLOCK);
        F d[PARTS], part[PARTS], row[BLOCK];
        for (int i = 0; i < PARTS; ++i) d[i] = difference<T>(x, b, i, scale, safe);
        for (int r = 0; r < BLOCK; ++r) {
            for (int i = 0; i < PARTS; ++i)
                part[i] = load_as<F>(m + r * BLOCK + i * LANES) * d[i];
            row[r] = FOLD_PARTS(part, sum);
        }
        FOLD_BLOCKS(row, sum)
        for (int i = 0; i < PARTS; ++i) part[i] = row[i] * d[i];
        folded[b] = FOLD_PARTS(part, sum);
    }
    FOLD_BLOCKS(folded, sum)
    for (int i = 0; i < PARTS; ++i) error.vector[i] = folded[i];
}

// ---- block scales -------------------------------------------------------------------------------

INLINE F stored_scale(F exact) {
    return round_e4m3(at_most(all(448.0f), at_least(all(0x1p-9f), exact)));
}

// The E4M3 number `offset` codes from `e`, within 1 and 126; NaN stays NaN.
INLINE F neighbour(F e, int offset) {
    typedef int32_t I __attribute__((vector_size(4 * LANES)));
    I code = (I)e4m3_code(e) + offset;
    code = (I)if_else((U)(code < 1), U{} + 1u, (U)code);
    code = (I)if_else((U)(code > 126), U{} + 126u, (U)code);
    return if_else((U)(e != e), e, e4m3_magnitude((U)code));
}

template <class T>
static void best_in_window(const Job& job, const typename T::type* x, PerBlock& e) {
    PerBlock scale, error, least, best;
    for (int offset = -3; offset <= 8; ++offset) {
        PerBlock candidate;
        for (int i = 0; i < PARTS; ++i) {
            candidate.vector[i] = neighbour(e.vector[i], offset);
            scale.vector[i] = candidate.vector[i] * job.scale;
        }
        if (job.rule == HESSIAN)
            hessian_error<T>(job, x, scale, error);
        else if (job.rule == DIAGONAL)
            diagonal_error<T>(job, x, scale, error);
        else
            squared_error<T>(x, scale, error);
        for (int i = 0; i < PARTS; ++i) {
            const U better = offset == -3 ? ~U{} : (U)(error.vector[i] < least.vector[i]);
            best.vector[i] = if_else(better, candidate.vector[i], best.vector[i]);
            least.vector[i] = if_else(better, error.vector[i], least.vector[i]);
        }
    }
    for (int i = 0; i < PARTS; ++i) {
        const F old = e.vector[i];
        e.vector[i] = if_else((U)(old != old), old, best.vector[i]);
    }
}

template <class T>
static void four_or_six(
    const typename T::type* x, float g, const PerBlock& amax, PerBlock& six) {
    PerBlock four, scale, error_four, error_six;
    for (int i = 0; i < PARTS; ++i) {
        four.vector[i] = stored_scale(amax.vector[i] * 1.5f / all(6.0f * g));
        scale.vector[i] = four.vector[i] * g;
    }
    squared_error<T>(x, scale, error_four);
    for (int i = 0; i < PARTS; ++i) scale.vector[i] = six.vector[i] * g;
    squared_error<T>(x, scale, error_six);
    for (int i = 0; i < PARTS; ++i)
        six.vector[i] = if_else(
            (U)(error_four.vector[i] < error_six.vector[i]), four.vector[i], six.vector[i]);
}

// E4M3 block scales as a checkpoint stores them; NaN for a block that holds a NaN.
template <class T>
INLINE void weight_scales(const Job& job, const typename T::type* x, PerBlock& e) {
    const float g = job.scale;
    PerBlock amax, exact;
    largest<T>(x, amax);
    for (int i = 0; i < PARTS; ++i) {
        exact.vector[i] = amax.vector[i] / all(6.0f * g);
        e.vector[i] = stored_scale(exact.vector[i]);
    }
    if (job.rule == FOUR_OVER_SIX)
        four_or_six<T>(x, g, amax, e);
    else if (job.rule != MAX)
        best_in_window<T>(job, x, e);
    for (int i = 0; i < PARTS; ++i)
        e.vector[i] = if_else((U)(exact.vector[i] == 0.0f), all(1.0f), e.vector[i]);
}

template <class T, bool CLAMP>
INLINE void round_blocks(
    const typename T::type* x, const PerBlock& scale, const PerBlock& safe, typename T::type* y,
    float zero) {
    for (int b = 0; b < BLOCK; ++b)
        for (int i = 0; i < PARTS; ++i) {
            const int at = b * BLOCK + i * LANES;
            const F v = T::load(x + at), quotient = v / all(safe.of[b]);
            const F q = CLAMP ? round_e2m1(quotient) : round_e2m1_unclamped(quotient);
            T::store(y + at, with_sign_of(q * all(scale.of[b]), v + zero));
        }
}

}  // namespace LEVEL_NAME
}  // namespace

#undef SHUFFLE
#undef FOLD
#undef FOLD_PARTS
#undef FOLD_BLOCKS
#undef FIRST_16
#undef SECOND_16
#undef FIRST_8
#undef SECOND_8
#undef FIRST_4
#undef SECOND_4
#undef FIRST_2
#undef SECOND_2
