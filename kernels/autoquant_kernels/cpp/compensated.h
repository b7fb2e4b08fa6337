// Rows rounded column by column, 16 rows at a time; included once per instruction set.

namespace {
namespace LEVEL_NAME {

// A column of 16 rows: PARTS vectors, or 16 floats.
typedef PerBlock Column;

struct Carried {
    Column number[BLOCK];  // E2M1 or E4M3 numbers
    Column before[BLOCK];  // what was rounded to them
    Column error[BLOCK];   // over the diagonal
};

// 16 columns of the upper factor from their diagonal on.
struct Diagonal {
    const float* upper;  // rows are `stride` apart
    int64_t stride;
    float reciprocal[BLOCK];
};

// Round the columns of a block of 16 rows under one scale each, and sum up squared errors.
template <F (*ROUND)(F)>
static void carry(
    const Column* w, const Diagonal& diagonal, const Column& scale, Carried& to, Column& total) {
    for (int i = 0; i < PARTS; ++i) {
        F rest[BLOCK], sum = {};
        const F s = scale.vector[i], safe = divisor(s);
        for (int j = 0; j < BLOCK; ++j) rest[j] = w[j].vector[i];
        for (int j = 0; j < BLOCK; ++j) {
            const float* upper = diagonal.upper + j * diagonal.stride;
            const F q = ROUND(rest[j] / safe);
            const F error = (rest[j] - q * s) * diagonal.reciprocal[j];
            to.number[j].vector[i] = q;
            to.before[j].vector[i] = rest[j];
            to.error[j].vector[i] = error;
            sum = j ? sum + error * error : error * error;
            for (int k = j + 1; k < BLOCK; ++k) rest[k] -= error * upper[k];
        }
        total.vector[i] = sum;
    }
}

// Subtract from a block of columns, which starts at `first`, the errors of all columns before it.
static void carry_in(
    const float* upper, int64_t stride, int64_t first, const Column* errors, Column* w) {
    constexpr int AT_ONCE = LANES == 16 ? 16 : 8;  // columns that registers hold
    for (int i = 0; i < PARTS; ++i)
        for (int start = 0; start < BLOCK; start += AT_ONCE) {
            F rest[AT_ONCE];
            for (int k = 0; k < AT_ONCE; ++k) rest[k] = w[start + k].vector[i];
            const float* row = upper + first + start;
            for (int64_t j = 0; j < first; ++j, row += stride) {
                const F error = errors[j].vector[i];
                for (int k = 0; k < AT_ONCE; ++k) rest[k] -= error * row[k];
            }
            for (int k = 0; k < AT_ONCE; ++k) w[start + k].vector[i] = rest[k];
        }
}

// The scale of least error among those around `start`; `start` on ties.
static void search_scale(
    float g, const Column* w, const Diagonal& diagonal, const Column& start, Column& best) {
    Carried carried;
    Column scale, total, least;
    best = start;
    for (int i = 0; i < PARTS; ++i) scale.vector[i] = start.vector[i] * g;
    carry<round_e2m1>(w, diagonal, scale, carried, least);
    for (int offset = -3; offset <= 8; ++offset) {
        Column tried;
        for (int i = 0; i < PARTS; ++i) {
            tried.vector[i] = neighbour(start.vector[i], offset);
            scale.vector[i] = tried.vector[i] * g;
        }
        carry<round_e2m1>(w, diagonal, scale, carried, total);
        for (int i = 0; i < PARTS; ++i) {
            const U better = (U)(total.vector[i] < least.vector[i]);
            best.vector[i] = if_else(better, tried.vector[i], best.vector[i]);
            least.vector[i] = if_else(better, total.vector[i], least.vector[i]);
        }
    }
}

// The E4M3 scales of a block of 16 rows from what is left of it.
static void compensated_scales(
    const Job& job, const Column* w, const Diagonal& diagonal, Column& scale) {
    float rows[TILE], weights[BLOCK];
    for (int j = 0; j < BLOCK; ++j) {
        const float own = diagonal.upper[j * diagonal.stride + j];
        weights[j] = 1.0f / (own * own);
        for (int r = 0; r < BLOCK; ++r) rows[r * BLOCK + j] = w[j].of[r];
    }
    Job choice = job;
    choice.rule = job.rule == HESSIAN ? int32_t(MAX) : job.rule;
    choice.moments = weights;
    choice.row_blocks = 1;
    weight_scales<Float32>(choice, rows, scale);
    if (job.rule != HESSIAN) return;
    const Column start = scale;
    search_scale(job.scale, w, diagonal, start, scale);
}

// The block of columns that starts at `first`, of `count` rows from `row` on: where it is written.
struct Place {
    int64_t row, first, columns;
    int count;
};

static void nvfp4_block(
    const Job& job, const Place& at, const Column* w, const Diagonal& diagonal, Carried& carried) {
    Column e, scale, total;
    compensated_scales(job, w, diagonal, e);
    for (int i = 0; i < PARTS; ++i) scale.vector[i] = e.vector[i] * job.scale;
    carry<round_e2m1>(w, diagonal, scale, carried, total);
    uint8_t stored[BLOCK], nibbles[BLOCK][BLOCK];
    for (int i = 0; i < PARTS; ++i) {
        const B byte = narrow_to_8(e4m3_code(e.vector[i]));
        memcpy(stored + i * LANES, &byte, sizeof byte);
    }
    for (int j = 0; j < BLOCK; ++j)
        for (int i = 0; i < PARTS; ++i) {
            const F q = carried.number[j].vector[i], s = scale.vector[i];
            const U sign = (U)(carried.before[j].vector[i] < 0.0f) & 8u & (U)(s == s);
            const U magnitudes = e2m1_code(number(magnitude(q))) & (U)(q == q);
            const B byte = narrow_to_8(magnitudes | sign);
            memcpy(nibbles[j] + i * LANES, &byte, sizeof byte);
        }
    const int64_t blocks = at.columns / BLOCK, block = at.row * blocks + at.first / BLOCK;
    auto* codes = static_cast<uint8_t*>(job.out) + block * (BLOCK / 2);
    auto* scales = static_cast<uint8_t*>(job.out2) + block;
    for (int r = 0; r < at.count; ++r) {
        scales[r * blocks] = stored[r];
        for (int j = 0; j < BLOCK / 2; ++j)
            codes[r * at.columns / 2 + j] =
                uint8_t(nibbles[2 * j][r] | (nibbles[2 * j + 1][r] << 4));
    }
}

static void fp8_block(
    const Job& job, const Place& at, const Column* w, const Diagonal& diagonal, Carried& carried) {
    Column scale, total;
    for (int i = 0; i < PARTS; ++i) scale.vector[i] = all(job.scale);
    carry<round_e4m3>(w, diagonal, scale, carried, total);
    auto* codes = static_cast<uint8_t*>(job.out) + at.row * at.columns + at.first;
    for (int j = 0; j < BLOCK; ++j) {
        uint8_t column[BLOCK];
        for (int i = 0; i < PARTS; ++i) {
            const F q = carried.number[j].vector[i], v = carried.before[j].vector[i];
            const U sign = (bits(v) >> 24) & 0x80u & (U)(v == v);
            const B byte = narrow_to_8(e4m3_code(number(magnitude(q))) | sign);
            memcpy(column + i * LANES, &byte, sizeof byte);
        }
        for (int r = 0; r < at.count; ++r) codes[r * at.columns + j] = column[r];
    }
}

using BlockRounder =
    void (*)(const Job&, const Place&, const Column*, const Diagonal&, Carried&);

// All columns of up to 16 rows; `errors` holds a column for each of them.
template <BlockRounder ROUND>
static void compensated_rows(
    const Job& job, int64_t row, int count, float* written, Column* errors) {
    const int64_t columns = job.row_blocks * BLOCK;
    const float* in = static_cast<const float*>(job.in) + row * columns;
    Column w[BLOCK] = {};
    Carried carried;
    for (int64_t first = 0; first < columns; first += BLOCK) {
        Diagonal diagonal = {job.moments + first * columns + first, columns, {}};
        for (int j = 0; j < BLOCK; ++j) {
            diagonal.reciprocal[j] = 1.0f / diagonal.upper[j * columns + j];
            for (int r = 0; r < count; ++r) w[j].of[r] = in[r * columns + first + j];
        }
        carry_in(job.moments, columns, first, errors, w);
        ROUND(job, {row, first, columns, count}, w, diagonal, carried);
        for (int j = 0; j < BLOCK; ++j) {
            errors[first + j] = carried.error[j];
            for (int r = 0; r < count; ++r)
                written[(row + r) * columns + first + j] = carried.error[j].of[r];
        }
    }
}

template <BlockRounder ROUND>
static void compensated_tiles(const Job& whole, int64_t first, int64_t last) {
    const int64_t columns = whole.row_blocks * BLOCK, rows = whole.elements / columns;
    const int64_t tiles = (rows + BLOCK - 1) / BLOCK;
    const std::unique_ptr<Column[]> errors(new Column[size_t(columns)]);
    Job job = whole;
    for (int64_t t = first; t < last; ++t) {
        const int64_t part = t / tiles, row = (t - part * tiles) * BLOCK, left = rows - row;
        job.scale = whole.scales[part];
        job.moments = whole.moments + part * whole.part_moments;
        compensated_rows<ROUND>(
            job, part * rows + row, left < BLOCK ? int(left) : BLOCK,
            static_cast<float*>(whole.out3), errors.get());
    }
}

}  // namespace LEVEL_NAME
}  // namespace
