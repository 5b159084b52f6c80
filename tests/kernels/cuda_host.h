// Compiles unchanged CUDA C++ kernels with a plain C++17 compiler, without any CUDA header, and runs them on the CPU.
//
// Here are CUDA's words: types, built-in functions and warp operations, and the device functions that common.cuh writes
// in PTX. The threads themselves are cuda_host_engine.h. Not covered: timing, the caches' memory model, and how the
// hardware rounds inside __expf, rsqrtf, divisions and the matrix product (expect a few units in the last place).
#pragma once

#define DAPO_EDGE_HOST 1

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// ---------------------------------------------------------------------------------------------------------------------
// Vector types, aligned as on the device: a sanitizer build names every misaligned access.

#define EMU_VECTORS(base, T)                                                   \
    struct alignas(2 * sizeof(T)) base##2 { T x, y; };                         \
    struct base##3 { T x, y, z; };                                             \
    struct alignas(4 * sizeof(T)) base##4 { T x, y, z, w; };                   \
    inline base##2 make_##base##2(T x, T y) { return {x, y}; }                 \
    inline base##3 make_##base##3(T x, T y, T z) { return {x, y, z}; }         \
    inline base##4 make_##base##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTORS(float, float)
EMU_VECTORS(int, int)
EMU_VECTORS(uint, unsigned)
EMU_VECTORS(short, short)
EMU_VECTORS(ushort, unsigned short)
EMU_VECTORS(char, signed char)
EMU_VECTORS(uchar, unsigned char)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#include "cuda_host_engine.h"

// ---------------------------------------------------------------------------------------------------------------------
// Words. They come after the last standard header, because these use some of them for themselves.

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (emu::self().index)
#define blockIdx (emu::block().index)
#define blockDim (emu::block().threads_shape)
#define gridDim (emu::block().grid)
#define warpSize 32
#define __shared__ EMU_SHARED
#define DYNAMIC_SHARED(name) unsigned char* name = emu::block().dynamic

// ---------------------------------------------------------------------------------------------------------------------
// Bits and numbers

namespace emu {

template <class To, class From> To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits in another type");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// The device's conversions keep to the range of the type, and make 0 of NaN.
template <class T> T saturated(float value) {
    if (std::isnan(value)) return 0;
    const double least = std::numeric_limits<T>::min(), most = std::numeric_limits<T>::max();
    return value <= least ? std::numeric_limits<T>::min()
        : value >= most   ? std::numeric_limits<T>::max()
                          : static_cast<T>(value);
}

inline float reciprocal_root(float value) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value))); }

}  // namespace emu

inline unsigned __float_as_uint(float value) { return emu::bits<unsigned>(value); }
inline int __float_as_int(float value) { return emu::bits<int>(value); }
inline float __uint_as_float(unsigned value) { return emu::bits<float>(value); }
inline float __int_as_float(int value) { return emu::bits<float>(value); }

inline int __float2int_rn(float value) { return emu::saturated<int>(rintf(value)); }
inline int __float2int_rd(float value) { return emu::saturated<int>(floorf(value)); }
inline int __float2int_rz(float value) { return emu::saturated<int>(truncf(value)); }
inline unsigned __float2uint_rn(float value) { return emu::saturated<unsigned>(rintf(value)); }
inline unsigned __float2uint_rz(float value) { return emu::saturated<unsigned>(truncf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }

inline float __saturatef(float value) { return value > 0.0f ? fminf(value, 1.0f) : 0.0f; }  // NaN becomes 0
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// glibc has functions of these names, of its own or in newer versions.
#define __expf(value) expf(value)
#define __exp2f(value) exp2f(value)
#define __logf(value) logf(value)
#define __log2f(value) log2f(value)
#define rsqrtf(value) emu::reciprocal_root(value)

#define EMU_MIN_MAX(A, B, R)                                                   \
    inline R min(A first, B second) {                                          \
        const R a = first, b = second;                                         \
        return b < a ? b : a;                                                  \
    }                                                                          \
    inline R max(A first, B second) {                                          \
        const R a = first, b = second;                                         \
        return a < b ? b : a;                                                  \
    }

EMU_MIN_MAX(int, int, int)
EMU_MIN_MAX(unsigned, unsigned, unsigned)
EMU_MIN_MAX(int, unsigned, unsigned)
EMU_MIN_MAX(unsigned, int, unsigned)
EMU_MIN_MAX(long long, long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// Byte i of the result is the byte of {low, high} that nibble i of the selector names.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    }
    return result;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline int __ffs(int value) { return __builtin_ffs(value); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory

template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> void __stcs(T* address, T value) { *address = value; }
inline void __threadfence() {}  // one block runs at a time
inline void __threadfence_block() {}

namespace emu {

// Atomic, but it orders no other access: what the device's atomics promise.
template <class T, class Change> T update(T* address, Change change) {
    using Word = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;
    Word* word = reinterpret_cast<Word*>(address);
    Word before = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(
        word, &before, bits<Word>(change(bits<T>(before))), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED
    )) {
    }
    return bits<T>(before);
}

}  // namespace emu

#define EMU_ATOMIC(name, T, expression)                                                        \
    inline T name(T* address, T value) {                                                       \
        return emu::update(address, [value]([[maybe_unused]] T old) { return static_cast<T>(expression); }); \
    }
#define EMU_ATOMICS(T)                                    \
    EMU_ATOMIC(atomicAdd, T, old + value)                 \
    EMU_ATOMIC(atomicMax, T, old > value ? old : value)   \
    EMU_ATOMIC(atomicMin, T, old < value ? old : value)   \
    EMU_ATOMIC(atomicExch, T, value)

EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
inline int atomicAdd(int* address, int value) {  // wraps around, as on the device
    return static_cast<int>(atomicAdd(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(value)));
}
EMU_ATOMIC(atomicMax, int, old > value ? old : value)
EMU_ATOMIC(atomicMin, int, old < value ? old : value)
EMU_ATOMIC(atomicExch, int, value)
EMU_ATOMIC(atomicAdd, float, old + value)  // CUDA has no atomicMax of floats
EMU_ATOMIC(atomicExch, float, value)
EMU_ATOMIC(atomicOr, unsigned, old | value)
EMU_ATOMIC(atomicAnd, unsigned, old & value)

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warp operations

#define EMU_TEXT(number) #number
#define EMU_LINE(number) EMU_TEXT(number)
#define __syncthreads() emu::sync_block(__FILE__ ":" EMU_LINE(__LINE__))
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_lanes(mask); }

namespace emu {

// `value` of lane `source`, or the lane's own where the segment of `width` lanes has no such lane.
template <class T> T shuffle(unsigned mask, T value, int source, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
    constexpr int words = sizeof(T) / 4;
    unsigned mine[words], all[32][words];
    std::memcpy(mine, &value, sizeof(T));
    gather(mask, mine, all);
    const int lane = static_cast<int>(self().lane);
    if (lane / width == source / width && source >= 0) std::memcpy(&value, all[source], sizeof(T));
    return value;
}

inline int lane() { return static_cast<int>(self().lane); }

}  // namespace emu

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emu::shuffle(mask, value, (emu::lane() & ~(width - 1)) | (source & (width - 1)), width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
    return emu::shuffle(mask, value, emu::lane() ^ distance, width);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    return emu::shuffle(mask, value, emu::lane() + static_cast<int>(distance), width);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    return emu::shuffle(mask, value, emu::lane() - static_cast<int>(distance), width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const unsigned mine[1] = {predicate ? 1u : 0u};
    unsigned all[32][1], votes = 0;
    emu::gather(mask, mine, all);
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1 && all[lane][0] == 1) votes |= 1u << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// What common.cuh implements in PTX

inline float half_to_float(unsigned short half) {
    const unsigned exponent = half >> 10 & 31, mantissa = half & 1023u;
    const unsigned sign = static_cast<unsigned>(half >> 15) << 31;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), sign ? -1.0f : 1.0f);
    const unsigned rebiased = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | rebiased << 23 | mantissa << 13);
}

// To the nearest half, ties to even. NaN becomes the device's one NaN.
inline unsigned short float_to_half(float value) {
    const unsigned all = __float_as_uint(value), sign = all >> 16 & 0x8000u, magnitude = all & 0x7fffffffu;
    unsigned half;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude < 113u << 23) {  // below 2^-14 halves are multiples of 2^-24
        half = static_cast<unsigned>(rintf(std::fabs(value) * 0x1p24f));
    } else {  // the carry of rounding runs on into the exponent
        half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
        half = half > 0x7c00u ? 0x7c00u : half;
    }
    return static_cast<unsigned short>(sign | half);
}

inline float2 half2_to_float2(unsigned pair) {
    return {half_to_float(static_cast<unsigned short>(pair)), half_to_float(static_cast<unsigned short>(pair >> 16))};
}

inline unsigned float2_to_half2(float low, float high) {
    return float_to_half(low) | static_cast<unsigned>(float_to_half(high)) << 16;
}

inline unsigned warp_max(unsigned value) {
    unsigned all[32][1];
    const unsigned mine[1] = {value};
    emu::gather(0xffffffffu, mine, all);
    for (const auto& other : all) value = max(value, other[0]);
    return value;
}

// d[16 x 8] += a[16 x 16] · b[16 x 8]. Lane 4 g + t holds, of rows or columns g: a0 = A[g][2t, 2t+1], a1 = A[g+8][2t..],
// a2 = A[g][2t+8..], a3 = A[g+8][2t+8..]; b0 = B[2t, 2t+1][g], b1 = B[2t+8..][g]; d0, d1 = D[g][2t, 2t+1],
// d2, d3 = D[g+8][2t..]. The sum is exact and rounded once; the hardware cuts some of the last bits.
inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    unsigned all[32][6];
    emu::gather(0xffffffffu, mine, all);
    const int group = emu::lane() / 4, pair = emu::lane() % 4;
    for (int i = 0; i < 4; i++) {
        const int column = 2 * pair + i % 2, lower = i / 2;  // of D; its row is group + 8 lower
        double sum = d[i];
        for (int k = 0; k < 16; k += 2) {
            const int inner = k % 8 / 2, second = k / 8;
            const float2 row = half2_to_float2(all[4 * group + inner][2 * second + lower]);
            const float2 col = half2_to_float2(all[4 * column + inner][4 + second]);
            sum += static_cast<double>(row.x) * col.x + static_cast<double>(row.y) * col.y;
        }
        d[i] = static_cast<float>(sum);
    }
}
