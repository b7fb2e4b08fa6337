// Vectors of LANES floats, the storage types and the two roundings; included once per instruction set.

namespace {
namespace LEVEL_NAME {

constexpr int PARTS = BLOCK / LANES;  // vectors per block, and vectors that hold 16 block scales

typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef uint8_t B __attribute__((vector_size(LANES)));

INLINE F all(float x) { return x - F{}; }

INLINE U bits(F v) { return (U)v; }
INLINE F number(U v) { return (F)v; }
INLINE U magnitude(F v) { return bits(v) & 0x7fffffffu; }
INLINE F if_else(U mask, F a, F b) { return number((bits(a) & mask) | (bits(b) & ~mask)); }
INLINE U if_else(U mask, U a, U b) { return (a & mask) | (b & ~mask); }

template <class V, class P>
INLINE V load_as(const P* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The smaller number; `v` where it is NaN.
INLINE F at_most(F limit, F v) {
#if LEVEL >= 2
    return (F)_mm512_min_ps((__m512)limit, (__m512)v);
#elif LEVEL == 1
    return (F)_mm256_min_ps((__m256)limit, (__m256)v);
#else
    return limit < v ? limit : v;
#endif
}

INLINE F at_least(F limit, F v) {
#if LEVEL >= 2
    return (F)_mm512_max_ps((__m512)limit, (__m512)v);
#elif LEVEL == 1
    return (F)_mm256_max_ps((__m256)limit, (__m256)v);
#else
    return limit > v ? limit : v;
#endif
}

INLINE U larger(U a, U b) {
#if LEVEL >= 2
    return (U)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif LEVEL == 1
    return (U)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}

INLINE bool any(U mask) {
#if LEVEL >= 2
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LEVEL == 1
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// ---- widening and narrowing: compilers take vector conversions apart ------------------------------

INLINE U widen(H h) {
#if LEVEL >= 2
    return (U)_mm512_cvtepu16_epi32((__m256i)h);
#elif LEVEL == 1
    return (U)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, U);
#endif
}

INLINE U widen(B b) {
#if LEVEL >= 2
    return (U)_mm512_cvtepu8_epi32((__m128i)b);
#elif LEVEL == 1
    return (U)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)b));
#else
    return __builtin_convertvector(b, U);
#endif
}

INLINE H narrow_to_16(U u) {
#if LEVEL >= 2
    return (H)_mm512_cvtepi32_epi16((__m512i)u);
#elif LEVEL == 1
    const __m256i low = _mm256_packus_epi32((__m256i)u, (__m256i)u);
    return (H)_mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 8));
#else
    return __builtin_convertvector(u, H);
#endif
}

INLINE B narrow_to_8(U u) {
#if LEVEL >= 2
    return (B)_mm512_cvtepi32_epi8((__m512i)u);
#elif LEVEL == 1
    const __m128i h = (__m128i)narrow_to_16(u);
    return (B)_mm_cvtsi128_si64(_mm_packus_epi16(h, h));
#else
    return __builtin_convertvector(u, B);
#endif
}

// ---- storage types ----------------------------------------------------------------------------

struct Bfloat16 {
    typedef uint16_t type;
    static MEMBER F load(const type* p) {
        return number(widen(load_as<H>(p)) << 16);
    }
    static MEMBER void store(type* p, F v) {
#if LEVEL == 3
        const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
        memcpy(p, &h, sizeof h);
#else
        const U u = bits(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const H h = narrow_to_16(if_else((U)(v != v), U{} + 0x7fc0u, rounded));
        memcpy(p, &h, sizeof h);
#endif
    }
};

struct Float16 {
    typedef uint16_t type;
    static MEMBER F load(const type* p) {
        const U h = widen(load_as<H>(p));
        const U magnitude = h & 0x7fffu, sign = (h & 0x8000u) << 16;
        const F normal = number((magnitude << 13) + (112u << 23));
        const F subnormal = number((magnitude << 13) + (113u << 23)) - 0x1p-14f;
        const F finite = if_else((U)(magnitude < 0x400u), subnormal, normal);
        const U special = bits(finite) + (112u << 23);
        return number(if_else((U)(magnitude >= 0x7c00u), special, bits(finite)) | sign);
    }
    static MEMBER void store(type* p, F v) {
        const U u = magnitude(v), sign = (bits(v) >> 16) & 0x8000u;
        const U normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
        const U subnormal = bits(number(u) + 0.5f) - (126u << 23);
        const U finite = if_else((U)(u < (113u << 23)), subnormal, normal);
        const U saturated = if_else((U)(u >= 0x477ff000u), U{} + 0x7c00u, finite);
        const H h = narrow_to_16(if_else((U)(u > 0x7f800000u), U{} + 0x7e00u, saturated) | sign);
        memcpy(p, &h, sizeof h);
    }
};

struct Float32 {
    typedef float type;
    static MEMBER F load(const type* p) { return load_as<F>(p); }
    static MEMBER void store(type* p, F v) { memcpy(p, &v, sizeof v); }
};

// ---- rounding ---------------------------------------------------------------------------------

// Adding 1.5 * 2^(exponent of v + shift) leaves no bits below one step of the target format.
template <unsigned SMALLEST_EXPONENT, unsigned SHIFT>
INLINE F round_at(F v) {
    constexpr unsigned K = (SHIFT << 23) + 0x400000u;
    const F magic = number(larger(bits(v) & 0x7f800000u, U{} + (SMALLEST_EXPONENT << 23)) + K);
    return (v + magic) - magic;
}

INLINE F round_e2m1_unclamped(F v) { return round_at<127, 22>(v); }
INLINE F round_e2m1(F v) {
    return round_e2m1_unclamped(at_most(all(6.0f), at_least(all(-6.0f), v)));
}
INLINE F round_e4m3(F v) {
    return round_at<121, 20>(at_most(all(448.0f), at_least(all(-448.0f), v)));
}

INLINE U e4m3_code(F magnitude) {
    const U normal = (bits(magnitude) >> 20) - (120u << 3);
    const U subnormal = (bits(magnitude + 0x1p-6f) >> 20) - (121u << 3);
    const U code = if_else((U)(magnitude < 0x1p-6f), subnormal, normal);
    return if_else((U)(magnitude != magnitude), U{} + 0x7fu, code);
}

INLINE F e4m3_magnitude(U code) {
    const F normal = number((code << 20) + (120u << 23));
    const F subnormal = number((code << 20) + (121u << 23)) - 0x1p-6f;
    const F finite = if_else((U)(code < 8u), subnormal, normal);
    return number(if_else((U)(code == 0x7fu), U{} + 0x7fc00000u, bits(finite)));
}

INLINE U e2m1_code(F magnitude) {
    const U large = (bits(magnitude) >> 22) - 252u;
    const U small = (bits(magnitude + 1.0f) >> 22) - 254u;
    return if_else((U)(magnitude < 1.0f), small, large);
}

INLINE F with_sign_of(F v, F x) { return number(bits(v) | (bits(x) & 0x80000000u)); }

// A block whose scale underflows to 0 holds zeros whatever it is divided by.
INLINE F divisor(F scale) { return if_else((U)(scale == 0.0f), all(1.0f), scale); }

}  // namespace LEVEL_NAME
}  // namespace
