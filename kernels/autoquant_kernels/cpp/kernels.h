// One kernel per operation; included once per instruction set.

namespace {
namespace LEVEL_NAME {

template <template <class> class Op>
static void by_dtype(const Job& job, int64_t first, int64_t last) {
    if (job.dtype == BFLOAT16) return tiles<Op<Bfloat16>>(job, first, last);
    if (job.dtype == FLOAT16) return tiles<Op<Float16>>(job, first, last);
    return tiles<Op<Float32>>(job, first, last);
}

static void token_kl(const Job& job, int64_t first, int64_t last) {
    if (job.dtype == BFLOAT16) return TokenKl<Bfloat16>::rows(job, first, last);
    if (job.dtype == FLOAT16) return TokenKl<Float16>::rows(job, first, last);
    return TokenKl<Float32>::rows(job, first, last);
}

constexpr Kernel KERNELS[OPERATIONS] = {
    by_dtype<FakeQuantNvfp4>, by_dtype<FakeQuantNvfp4Weight>, by_dtype<QuantizeNvfp4>,
    compensated_tiles<nvfp4_block>, by_dtype<DequantizeNvfp4>, by_dtype<FakeQuantFp8>,
    by_dtype<QuantizeFp8>, compensated_tiles<fp8_block>, by_dtype<DequantizeFp8>, token_kl,
};

}  // namespace LEVEL_NAME
}  // namespace
