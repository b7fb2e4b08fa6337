// NVFP4, FP8 and token-KL kernels for CPUs: plain C++17, without headers of any framework.
//
// The kernels are written once, in vectors of LANES floats, and compiled for every instruction set.
// Every float32 operation is rounded once, in the order of reference.py, so that all levels return
// the same bits: compile with -ffp-contract=off and never with -ffast-math.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MEMBER inline __attribute__((always_inline))
#define INLINE static MEMBER
#define PRAGMA(...) _Pragma(#__VA_ARGS__)

namespace {

constexpr int BLOCK = 16;
constexpr int TILE = 256;  // 16 blocks: their scales fill one vector of 16 floats

enum Dtype : int32_t { BFLOAT16, FLOAT16, FLOAT32 };
enum Rule : int32_t { MAX, MSE, FOUR_OVER_SIX, DIAGONAL, HESSIAN };
enum Operation : int32_t {
    FAKE_QUANT_NVFP4,
    FAKE_QUANT_NVFP4_WEIGHT,
    QUANTIZE_NVFP4,
    COMPENSATE_NVFP4,
    DEQUANTIZE_NVFP4,
    FAKE_QUANT_FP8,
    QUANTIZE_FP8,
    COMPENSATE_FP8,
    DEQUANTIZE_FP8,
    TOKEN_KL,
    OPERATIONS
};

struct Job {
    const void* in;
    const void* in2;
    void* out;
    void* out2;
    void* out3;
    int64_t elements;  // of one part
    int64_t parts;     // rows for TOKEN_KL, else matrices with a scale of their own
    const float* scales;
    const float* moments;  // of the part that is worked on, for every block of a row; or its factor
    int64_t row_blocks;    // blocks of a row
    int64_t part_moments;  // floats from the moments of a part to those of the next
    int64_t first_block;   // of the tile that is worked on, within the part
    float scale;           // of the part that is worked on
    int32_t dtype;         // of the tensor that is not packed
    int32_t rule;
};

using Kernel = void (*)(const Job&, int64_t first, int64_t last);

}  // namespace

#define LEVEL 0
#define LEVEL_NAME scalar
#define LANES 4
#include "lanes.h"
#include "blocks.h"
#include "operations.h"
#include "compensated.h"
#include "kernels.h"
#undef LEVEL
#undef LEVEL_NAME
#undef LANES

#if defined(__x86_64__)
#if defined(__clang__)
#define TARGET(names) \
    PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#else
#define TARGET(names) PRAGMA(GCC push_options) PRAGMA(GCC target(names))
#define TARGET_END PRAGMA(GCC pop_options)
#endif

#define LEVEL 1
#define LEVEL_NAME avx2
#define LANES 8
TARGET("avx2")
#include "lanes.h"
#include "blocks.h"
#include "operations.h"
#include "compensated.h"
#include "kernels.h"
#undef LEVEL
#undef LEVEL_NAME
#undef LANES
TARGET_END

#define LEVEL 2
#define LEVEL_NAME avx512
#define LANES 16
TARGET("avx2,avx512f,avx512bw,avx512dq,avx512vl")
#include "lanes.h"
#include "blocks.h"
#include "operations.h"
#include "compensated.h"
#include "kernels.h"
#undef LEVEL
#undef LEVEL_NAME
#undef LANES
TARGET_END

#define LEVEL 3
#define LEVEL_NAME avx512bf16
#define LANES 16
TARGET("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "lanes.h"
#include "blocks.h"
#include "operations.h"
#include "compensated.h"
#include "kernels.h"
#undef LEVEL
#undef LEVEL_NAME
#undef LANES
TARGET_END
#endif

namespace {

constexpr const Kernel* LEVELS[] = {
    scalar::KERNELS,
#if defined(__x86_64__)
    avx2::KERNELS,
    avx512::KERNELS,
    avx512bf16::KERNELS,
#endif
};

// VCVTNEPS2BF16 flushes subnormal results to zero. Below this scale some results are subnormal.
constexpr float SMALLEST_SCALE_WITHOUT_SUBNORMALS = 0x1p-116f;

bool writes_bfloat16_subnormals(const Job& job, int32_t operation) {
    if (job.dtype != BFLOAT16 || operation == QUANTIZE_NVFP4 || operation == COMPENSATE_NVFP4 ||
        operation == QUANTIZE_FP8 || operation == TOKEN_KL)
        return false;
    for (int64_t part = 0; part < job.parts; ++part)
        if (job.scales[part] < SMALLEST_SCALE_WITHOUT_SUBNORMALS) return true;
    return false;
}

}  // namespace

extern "C" int32_t autoquant_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
    if (avx512) return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

extern "C" void autoquant_run(int32_t operation, int32_t level, const Job* job, int32_t threads) {
    if (level == 3 && writes_bfloat16_subnormals(*job, operation)) level = 2;
    const Kernel kernel = LEVELS[level][operation];
    const bool by_row = operation == TOKEN_KL;
    const bool compensates = operation == COMPENSATE_NVFP4 || operation == COMPENSATE_FP8;
    const int64_t blocks = compensates ? job->row_blocks : 1, unit = blocks * TILE;
    const int64_t units = job->parts * (by_row ? 1 : (job->elements + unit - 1) / unit);
    const int64_t least = by_row || blocks > 64 ? 1 : 64 / blocks;
    const int64_t share = units / (8 * int64_t(threads));
    const int64_t grain = share > least ? share : least;
    const int64_t grains = (units + grain - 1) / grain;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (grains > 1 && threads > 1)
    for (int64_t i = 0; i < grains; ++i) {
        const int64_t last = (i + 1) * grain;
        kernel(*job, i * grain, last < units ? last : units);
    }
}
