// The operations on one tile and on one row; included once per instruction set.

namespace {
namespace LEVEL_NAME {

// ---- operations on one tile: bytes per block of 16 elements, then the work -----------------------

template <class T>
constexpr int STORED = BLOCK * sizeof(typename T::type);

template <class T>
struct FakeQuantNvfp4 {
    static constexpr int IN = STORED<T>, IN2 = 0, OUT = STORED<T>, OUT2 = 0;
    static MEMBER void tile(
        const Job& job, const void* in, const void*, void* out, void*) {
        const auto* x = static_cast<const typename T::type*>(in);
        auto* y = static_cast<typename T::type*>(out);
        PerBlock amax, scale, safe;
        largest<T>(x, amax);
        bool clamp = false;
        for (int i = 0; i < PARTS; ++i) {
            const F t = at_most(all(448.0f), amax.vector[i] / all(6.0f * job.scale));
            scale.vector[i] = round_e4m3(t) * job.scale;
            safe.vector[i] = divisor(scale.vector[i]);
            const U outside = (U)(t < 0x1p-6f) | (U)(t >= 448.0f);
            clamp |= any(outside);
        }
        if (clamp)
            round_blocks<T, true>(x, scale, safe, y, -0.0f);
        else
            round_blocks<T, false>(x, scale, safe, y, -0.0f);
    }
};

template <class T>
struct FakeQuantNvfp4Weight {
    static constexpr int IN = STORED<T>, IN2 = 0, OUT = STORED<T>, OUT2 = 0;
    static MEMBER void tile(
        const Job& job, const void* in, const void*, void* out, void*) {
        const auto* x = static_cast<const typename T::type*>(in);
        PerBlock scale, safe;
        weight_scales<T>(job, x, scale);
        for (int i = 0; i < PARTS; ++i) {
            scale.vector[i] = scale.vector[i] * job.scale;
            safe.vector[i] = divisor(scale.vector[i]);
        }
        round_blocks<T, true>(x, scale, safe, static_cast<typename T::type*>(out), 0.0f);
    }
};

template <class T>
struct QuantizeNvfp4 {
    static constexpr int IN = STORED<T>, IN2 = 0, OUT = BLOCK / 2, OUT2 = 1;
    static MEMBER void tile(
        const Job& job, const void* in, const void*, void* out, void* out2) {
        const auto* x = static_cast<const typename T::type*>(in);
        PerBlock e, safe;
        weight_scales<T>(job, x, e);
        for (int i = 0; i < PARTS; ++i) {
            safe.vector[i] = divisor(e.vector[i] * job.scale);
            const B code = narrow_to_8(e4m3_code(e.vector[i]));
            memcpy(static_cast<uint8_t*>(out2) + i * LANES, &code, sizeof code);
        }
        uint8_t nibbles[TILE];
        for (int b = 0; b < BLOCK; ++b)
            for (int i = 0; i < PARTS; ++i) {
                const int at = b * BLOCK + i * LANES;
                const F v = T::load(x + at), q = round_e2m1(v / all(safe.of[b]));
                const U sign = (U)(v < 0.0f) & 8u;
                const U code = (e2m1_code(number(magnitude(q))) | sign) & (U)(q == q);
                const B byte = narrow_to_8(code);
                memcpy(nibbles + at, &byte, sizeof byte);
            }
        auto* packed = static_cast<uint8_t*>(out);
        for (int i = 0; i < TILE / 2; ++i)
            packed[i] = uint8_t(nibbles[2 * i] | (nibbles[2 * i + 1] << 4));
    }
};

INLINE F e2m1_number(U code) {
#if LEVEL >= 2
    const __m512 table = _mm512_setr_ps(
        0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    return (F)_mm512_permutexvar_ps((__m512i)code, table);
#elif LEVEL == 1
    const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
    const U magnitude = (U)_mm256_permutevar8x32_ps(table, (__m256i)code);
    return number(magnitude | ((code & 8u) << 28));
#else
    const U m = code & 7u;
    const F large = number((m << 22) + (126u << 23));
    const F small = if_else((U)(m == 0u), F{}, all(0.5f));
    return number(bits(if_else((U)(m < 2u), small, large)) | ((code & 8u) << 28));
#endif
}

template <class T>
struct DequantizeNvfp4 {
    static constexpr int IN = BLOCK / 2, IN2 = 1, OUT = STORED<T>, OUT2 = 0;
    static MEMBER void tile(
        const Job& job, const void* in, const void* in2, void* out, void*) {
        const auto* packed = static_cast<const uint8_t*>(in);
        const auto* stored = static_cast<const uint8_t*>(in2);
        auto* y = static_cast<typename T::type*>(out);
        PerBlock scale;
        for (int i = 0; i < PARTS; ++i) {
            const U code = widen(load_as<B>(stored + i * LANES));
            scale.vector[i] = with_sign_of(e4m3_magnitude(code & 0x7fu), number(code << 24)) *
                              job.scale;
        }
        U shift;
        for (int i = 0; i < LANES; ++i) shift[i] = uint32_t(i % 8) * 4;
        for (int b = 0; b < BLOCK; ++b) {
            uint32_t word[2];
            memcpy(word, packed + b * 8, sizeof word);
            for (int i = 0; i < PARTS; ++i) {
#if LANES == 16
                const U words = (U)_mm512_mask_set1_epi32(
                    _mm512_set1_epi32(int(word[0])), 0xff00, int(word[1]));
#else
                const U words = U{} + (word[i * LANES / 8] >> (i * LANES % 8 * 4));
#endif
                const F q = e2m1_number((words >> shift) & 15u);
                T::store(y + b * BLOCK + i * LANES, q * all(scale.of[b]));
            }
        }
    }
};

template <class T>
struct FakeQuantFp8 {
    static constexpr int IN = STORED<T>, IN2 = 0, OUT = STORED<T>, OUT2 = 0;
    static MEMBER void tile(
        const Job& job, const void* in, const void*, void* out, void*) {
        const auto* x = static_cast<const typename T::type*>(in);
        auto* y = static_cast<typename T::type*>(out);
        for (int at = 0; at < TILE; at += LANES) {
            const F v = T::load(x + at), q = round_e4m3(v / all(job.scale));
            T::store(y + at, with_sign_of(q * job.scale, v));
        }
    }
};

template <class T>
struct QuantizeFp8 {
    static constexpr int IN = STORED<T>, IN2 = 0, OUT = BLOCK, OUT2 = 0;
    static MEMBER void tile(
        const Job& job, const void* in, const void*, void* out, void*) {
        const auto* x = static_cast<const typename T::type*>(in);
        for (int at = 0; at < TILE; at += LANES) {
            const F v = T::load(x + at), q = round_e4m3(v / all(job.scale));
            const U sign = (bits(v) >> 24) & 0x80u & (U)(v == v);
            const B code = narrow_to_8(e4m3_code(number(magnitude(q))) | sign);
            memcpy(static_cast<uint8_t*>(out) + at, &code, sizeof code);
        }
    }
};

template <class T>
struct DequantizeFp8 {
    static constexpr int IN = BLOCK, IN2 = 0, OUT = STORED<T>, OUT2 = 0;
    static MEMBER void tile(
        const Job& job, const void* in, const void*, void* out, void*) {
        const auto* codes = static_cast<const uint8_t*>(in);
        auto* y = static_cast<typename T::type*>(out);
        for (int at = 0; at < TILE; at += LANES) {
            const U code = widen(load_as<B>(codes + at));
            const F q = with_sign_of(e4m3_magnitude(code & 0x7fu), number(code << 24));
            T::store(y + at, q * job.scale);
        }
    }
};

template <class Op>
static void tiles_of_part(Job& job, int64_t part, int64_t first, int64_t last) {
    const int64_t before = part * job.elements;
    const auto* in = static_cast<const uint8_t*>(job.in) + before * Op::IN / BLOCK;
    const auto* in2 = static_cast<const uint8_t*>(job.in2) + before * Op::IN2 / BLOCK;
    auto* out = static_cast<uint8_t*>(job.out) + before * Op::OUT / BLOCK;
    auto* out2 = static_cast<uint8_t*>(job.out2) + before * Op::OUT2 / BLOCK;
    for (int64_t t = first; t < last; ++t) {
        const int64_t left = job.elements - t * TILE, block = t * (TILE / BLOCK);
        job.first_block = block;
        if (left >= TILE) {
            Op::tile(job, in + block * Op::IN, in2 + block * Op::IN2, out + block * Op::OUT,
                     out2 + block * Op::OUT2);
            continue;
        }
        uint8_t from[TILE * 4] = {}, from2[BLOCK] = {}, to[TILE * 4], to2[BLOCK];
        memcpy(from, in + block * Op::IN, size_t(left * Op::IN / BLOCK));
        if (Op::IN2) memcpy(from2, in2 + block * Op::IN2, size_t(left * Op::IN2 / BLOCK));
        Op::tile(job, from, from2, to, to2);
        memcpy(out + block * Op::OUT, to, size_t(left * Op::OUT / BLOCK));
        if (Op::OUT2) memcpy(out2 + block * Op::OUT2, to2, size_t(left * Op::OUT2 / BLOCK));
    }
}

template <class Op>
static void tiles(const Job& whole, int64_t first, int64_t last) {
    const int64_t size = (whole.elements + TILE - 1) / TILE;
    Job job = whole;
    while (first < last) {
        const int64_t part = first / size, start = part * size;
        const int64_t stop = last < start + size ? last : start + size;
        job.scale = whole.scales[part];
        job.moments = whole.moments + part * whole.part_moments;
        tiles_of_part<Op>(job, part, first - start, stop - start);
        first = stop;
    }
}

// ---- KL divergence per row -----------------------------------------------------------------------

// exp(x) for x <= 0 to 2 units in the last place, 0 below -87; coefficients of Cephes' expf.
INLINE F exponential(F x) {
    const F shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    const F r = x - n * 0.693359375f - n * -2.12194440e-4f;
    F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const F power = number((bits(shifted) << 23) + (127u << 23));
    return if_else((U)(x < -87.0f), F{}, y * power);
}

template <class T>
INLINE F load_some(const typename T::type* p, int64_t count) {
    if (count >= LANES) return T::load(p);
    typename T::type padded[LANES];
    T::store(padded, all(-INFINITY));
    memcpy(padded, p, size_t(count) * sizeof *p);
    return T::load(padded);
}

template <class T>
INLINE float row_maximum(const typename T::type* x, int64_t n) {
    F largest = all(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) largest = at_least(load_some<T>(x + i, n - i), largest);
    float value = largest[0];
    for (int i = 1; i < LANES; ++i) value = largest[i] > value ? largest[i] : value;
    return value;
}

INLINE double total(F v) {
    double value = 0;
    for (int i = 0; i < LANES; ++i) value += v[i];
    return value;
}

// sum p (zp - zq) / sum p + log(sum q / sum p) + max zq - max zp, with unnormalized p and q.
template <class T>
INLINE float row_kl(const typename T::type* zp, const typename T::type* zq, int64_t n) {
    const float max_p = row_maximum<T>(zp, n), max_q = row_maximum<T>(zq, n);
    double sum_p = 0, sum_q = 0, sum_pd = 0;
    for (int64_t start = 0; start < n; start += TILE) {
        F p_lanes = {}, q_lanes = {}, pd_lanes = {};
        const int64_t stop = start + TILE < n ? start + TILE : n;
        for (int64_t i = start; i < stop; i += LANES) {
            const F a = load_some<T>(zp + i, n - i), b = load_some<T>(zq + i, n - i);
            const F p = exponential(a - max_p), q = exponential(b - max_q);
            p_lanes += p;
            q_lanes += q;
            pd_lanes += if_else((U)(p == 0.0f), F{}, p * (a - b));
        }
        sum_p += total(p_lanes);
        sum_q += total(q_lanes);
        sum_pd += total(pd_lanes);
    }
    const double kl = sum_pd / sum_p + std::log(sum_q / sum_p) + (double(max_q) - double(max_p));
    return kl < 0 ? 0.0f : float(kl);
}

template <class T>
struct TokenKl {
    static void rows(const Job& job, int64_t first, int64_t last) {
        const auto* p = static_cast<const typename T::type*>(job.in);
        const auto* q = static_cast<const typename T::type*>(job.in2);
        for (int64_t row = first; row < last; ++row)
            static_cast<float*>(job.out)[row] =
                row_kl<T>(p + row * job.elements, q + row * job.elements, job.elements);
    }
};

}  // namespace LEVEL_NAME
}  // namespace
