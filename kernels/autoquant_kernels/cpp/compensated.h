// One block of 16 columns of a row, rounded column by column; included once per instruction set.

namespace {
namespace LEVEL_NAME {

// A column of 16 rows: PARTS vectors, or 16 floats.
typedef PerBlock Column;

struct Carried {
    Column number[BLOCK];  // E2M1 or E4M3 numbers
    Column before[BLOCK];  // what was rounded to them
    Column error[BLOCK];   // over the diagonal
};

// Round the columns of 16 rows under one scale each, and sum up squared errors.
template <F (*ROUND)(F)>
static void carry(
    const Column* w, const float* upper, const float* reciprocal, const Column& scale,
    Carried& to, Column& total) {
    for (int i = 0; i < PARTS; ++i) {
        F rest[BLOCK], sum = {};
        const F s = scale.vector[i], safe = divisor(s);
        for (int j = 0; j < BLOCK; ++j) rest[j] = w[j].vector[i];
        for (int j = 0; j < BLOCK; ++j) {
            const F q = ROUND(rest[j] / safe);
            const F error = (rest[j] - q * s) * reciprocal[j];
            to.number[j].vector[i] = q;
            to.before[j].vector[i] = rest[j];
            to.error[j].vector[i] = error;
            sum = j ? sum + error * error : error * error;
            for (int k = j + 1; k < BLOCK; ++k) rest[k] -= error * upper[j * BLOCK + k];
        }
        total.vector[i] = sum;
    }
}

// The scale of least error among those around `start`; `start` on ties.
static void search_scale(
    const Job& job, const Column* w, const float* upper, const float* reciprocal,
    const Column& start, Carried& carried, Column& best) {
    Column scale, total, least;
    best = start;
    for (int i = 0; i < PARTS; ++i) scale.vector[i] = start.vector[i] * job.scale;
    carry<round_e2m1>(w, upper, reciprocal, scale, carried, least);
    for (int offset = -3; offset <= 8; ++offset) {
        Column tried;
        for (int i = 0; i < PARTS; ++i) {
            tried.vector[i] = neighbour(start.vector[i], offset);
            scale.vector[i] = tried.vector[i] * job.scale;
        }
        carry<round_e2m1>(w, upper, reciprocal, scale, carried, total);
        for (int i = 0; i < PARTS; ++i) {
            const U better = (U)(total.vector[i] < least.vector[i]);
            best.vector[i] = if_else(better, tried.vector[i], best.vector[i]);
            least.vector[i] = if_else(better, total.vector[i], least.vector[i]);
        }
    }
}

// Columns of up to 16 rows, and what errors are multiplied with.
static void load_columns(const Job& job, int64_t row, int count, Column* w, float* reciprocal) {
    const float* in = static_cast<const float*>(job.in) + row * BLOCK;
    for (int j = 0; j < BLOCK; ++j) {
        reciprocal[j] = 1.0f / job.moments[j * BLOCK + j];
        for (int r = 0; r < count; ++r) w[j].of[r] = in[r * BLOCK + j];
    }
}

static void nvfp4_rows(const Job& job, int64_t row, int count) {
    auto* codes = static_cast<uint8_t*>(job.out) + row * (BLOCK / 2);
    auto* stored = static_cast<uint8_t*>(job.out2) + row;
    auto* errors = static_cast<float*>(job.out3) + row * BLOCK;
    const float* upper = job.moments;
    Column w[BLOCK] = {}, start, scale, total;
    float reciprocal[BLOCK];
    uint8_t code[BLOCK] = {};
    memcpy(code, stored, size_t(count));
    load_columns(job, row, count, w, reciprocal);
    for (int i = 0; i < PARTS; ++i)
        start.vector[i] = e4m3_magnitude(widen(load_as<B>(code + i * LANES)));
    Carried carried;
    Column best = start;
    if (job.rule == HESSIAN) search_scale(job, w, upper, reciprocal, start, carried, best);
    for (int i = 0; i < PARTS; ++i) {
        const B byte = narrow_to_8(e4m3_code(best.vector[i]));
        memcpy(code + i * LANES, &byte, sizeof byte);
        scale.vector[i] = best.vector[i] * job.scale;
    }
    carry<round_e2m1>(w, upper, reciprocal, scale, carried, total);
    memcpy(stored, code, size_t(count));
    Column nibble[BLOCK];
    for (int j = 0; j < BLOCK; ++j)
        for (int i = 0; i < PARTS; ++i) {
            const F q = carried.number[j].vector[i], s = scale.vector[i];
            const U sign = (U)(carried.before[j].vector[i] < 0.0f) & 8u & (U)(s == s);
            const U magnitudes = e2m1_code(number(magnitude(q))) & (U)(q == q);
            nibble[j].vector[i] = number(magnitudes | sign);
        }
    for (int r = 0; r < count; ++r)
        for (int j = 0; j < BLOCK; ++j) {
            uint32_t own;
            memcpy(&own, &nibble[j].of[r], sizeof own);
            uint8_t& byte = codes[r * (BLOCK / 2) + j / 2];
            byte = j % 2 ? uint8_t(byte | (own << 4)) : uint8_t(own);
            errors[r * BLOCK + j] = carried.error[j].of[r];
        }
}

static void fp8_rows(const Job& job, int64_t row, int count) {
    auto* codes = static_cast<uint8_t*>(job.out) + row * BLOCK;
    auto* errors = static_cast<float*>(job.out2) + row * BLOCK;
    Column w[BLOCK] = {}, scale, total;
    float reciprocal[BLOCK];
    load_columns(job, row, count, w, reciprocal);
    for (int i = 0; i < PARTS; ++i) scale.vector[i] = all(job.scale);
    Carried carried;
    carry<round_e4m3>(w, job.moments, reciprocal, scale, carried, total);
    uint8_t column[BLOCK];
    for (int j = 0; j < BLOCK; ++j) {
        for (int i = 0; i < PARTS; ++i) {
            const F q = carried.number[j].vector[i], v = carried.before[j].vector[i];
            const U sign = (bits(v) >> 24) & 0x80u & (U)(v == v);
            const B byte = narrow_to_8(e4m3_code(number(magnitude(q))) | sign);
            memcpy(column + i * LANES, &byte, sizeof byte);
        }
        for (int r = 0; r < count; ++r) {
            codes[r * BLOCK + j] = column[r];
            errors[r * BLOCK + j] = carried.error[j].of[r];
        }
    }
}

template <void (*ROWS)(const Job&, int64_t, int)>
static void compensated_tiles(const Job& whole, int64_t first, int64_t last) {
    const int64_t rows = whole.elements / BLOCK, tiles = (rows + BLOCK - 1) / BLOCK;
    Job job = whole;
    for (int64_t t = first; t < last; ++t) {
        const int64_t part = t / tiles, row = (t - part * tiles) * BLOCK;
        job.scale = whole.scales[part];
        job.moments = whole.moments + part * whole.part_moments;
        const int64_t left = rows - row;
        ROWS(job, part * rows + row, left < BLOCK ? int(left) : BLOCK);
    }
}

}  // namespace LEVEL_NAME
}  // namespace
