// What both kernel files share: half precision, the matrix product of a warp, maxima, pixels as floats.
//
// Compiled by nvcc or NVRTC alone, without the toolkit's headers: a device may have neither. Everything that only a GPU
// understands stands in the first part; on a CPU, tests/kernels/cuda_host.h brings the same functions.
#pragma once

#ifndef DAPO_EDGE_HOST

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Two halves in one register, the lower one first.
__device__ __forceinline__ float2 half2_to_float2(unsigned pair) {
    float2 value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(value.x), "=f"(value.y)
        : "r"(pair));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

__device__ __forceinline__ unsigned float2_to_half2(float low, float high) {
    return float_to_half(low) | static_cast<unsigned>(float_to_half(high)) << 16;
}

// d[16 x 8] += a[16 x 16] · b[16 x 8], halves in, FP32 sums; the whole warp takes part, fragments as PTX lays them out.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing has the half as deep one
    for (int half = 0; half < 2; half++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

// The largest of the 32 lanes' values, in every lane.
__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, value);
#else
    for (int distance = 16; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
#endif
}

#endif  // DAPO_EDGE_HOST

// Every kernel here runs in blocks of 256 threads or less. Four of them fit at 64 registers a thread; from Blackwell on the
// compiler pairs registers for its packed arithmetic and needs a few more.
constexpr int MAX_THREADS = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int BLOCKS_PER_SM = 3;
#else
constexpr int BLOCKS_PER_SM = 4;
#endif

// Byte `index` of four as a float: set as the low mantissa bits of 2^23, because conversions run at a quarter of the rate.
__device__ __forceinline__ float byte_to_float(unsigned bytes, int index) {
    return __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440 | index)) - 8388608.0f;
}

// Limits to [0, 1] but keeps NaN, which must reach whoever checks the map; the hardware's saturation makes it 0.
__device__ __forceinline__ float clamp_unit(float value) {
    return value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value;
}

// In which of `bins` equal parts of [0, 1] a value lies; NaN in the first, as only the named conversion promises.
__device__ __forceinline__ int bin_of(float value, int bins) { return min(__float2int_rz(value * bins), bins - 1); }

__host__ __device__ constexpr int ceil_div(int value, int step) { return (value + step - 1) / step; }

// The prompt bank in device memory, followed by its unit rows: FP16, [MAX_BANK_ROWS, width], zero beyond the channels and
// beyond the tokens' dimensions; width is those, rounded up to 32. A launch reads the number of channels here, so a
// captured graph serves every bank.
struct __align__(16) Bank {
    int channels;  // K + 1, at most 65
    float scale;   // 1 / temperature
    int reserved[2];
};

constexpr int BANK_TILE = 8;  // bank rows in one matrix product
constexpr int BANK_TILES = 9;
constexpr int MAX_BANK_ROWS = BANK_TILE * BANK_TILES;
