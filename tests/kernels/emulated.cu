// Kernels that try the emulator, right ones and wrong ones. Lines that a test expects in a report end with a mark.
#include "../../dapo_edge/kernels/common.cuh"

// One block per row: cosines to all rows of the bank, softmax(scale * cosine). Halves in, dynamic shared: a float per class.
__device__ float block_sum(float value) {
    __shared__ float sums[32];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp];
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) softmax_of_cosines(
    const unsigned* __restrict__ features,
    const unsigned* __restrict__ bank,
    float* __restrict__ probabilities,
    int dimensions,
    int classes,
    float scale
) {
    DYNAMIC_SHARED(memory);
    float* logits = reinterpret_cast<float*>(memory);
    const int pairs = dimensions / 2, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    const unsigned* row = features + static_cast<size_t>(blockIdx.x) * pairs;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        const float2 value = half2_to_float2(row[i]);
        squares += value.x * value.x + value.y * value.y;
    }
    const float factor = scale * rsqrtf(block_sum(squares));
    for (int k = threadIdx.x / 32; k < classes; k += warps) {
        float sum = 0.0f;
        for (int i = lane; i < pairs; i += 32) {
            const float2 a = half2_to_float2(row[i]), b = half2_to_float2(bank[k * pairs + i]);
            sum += a.x * b.x + a.y * b.y;
        }
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0) logits[k] = sum * factor;
    }
    __syncthreads();
    float total = 0.0f;
    for (int k = threadIdx.x; k < classes; k += blockDim.x) total += logits[k] = __expf(logits[k]);
    total = block_sum(total);
    for (int k = threadIdx.x; k < classes; k += blockDim.x) probabilities[blockIdx.x * classes + k] = logits[k] / total;
}

extern "C" __global__ void halves(const unsigned* pairs, float2* floats, unsigned* back) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    floats[i] = half2_to_float2(pairs[i]);
    back[i] = float2_to_half2(floats[i].x, floats[i].y);
}

extern "C" __global__ void round_to_half(const float* values, unsigned short* result) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    result[i] = float_to_half(values[i]);
}

extern "C" __global__ void matrix_product(const unsigned (*a)[4], const unsigned (*b)[2], float (*d)[4]) {
    mma_16x8x16(d[threadIdx.x], a[threadIdx.x], b[threadIdx.x]);
}

extern "C" __global__ void warp_operations(const unsigned* values, unsigned* result, double* wide) {
    constexpr unsigned all = 0xffffffffu;
    const unsigned i = threadIdx.x, n = blockDim.x, mine = values[i];
    result[i] = __shfl_xor_sync(all, mine, 5);
    result[n + i] = __shfl_down_sync(all, mine, 3, 8);
    result[2 * n + i] = __shfl_up_sync(all, mine, 2);
    result[3 * n + i] = __shfl_sync(all, mine, 19, 16);
    result[4 * n + i] = __ballot_sync(all, mine & 1);
    if (i < 64) {
        result[5 * n + i] = warp_max(mine);
    } else {  // half a warp: garbage stands for the lanes that aren't there
        unsigned highest = mine;
        for (int distance = 8; distance > 0; distance /= 2) {
            highest = max(highest, __shfl_xor_sync(0xffffu, highest, distance));
        }
        result[5 * n + i] = highest;
    }
    if (i & 2) {
        result[6 * n + i] = __shfl_xor_sync(0xccccccccu, mine, 1);
    } else {
        result[6 * n + i] = __shfl_xor_sync(0x33333333u, mine, 1);
    }
    wide[i] = __shfl_xor_sync(all, mine / 3.0, 1);
}

extern "C" __global__ void atomics(
    const int* values, unsigned* histogram, unsigned long long* total, float* floats, int* extremes
) {
    __shared__ unsigned counts[16];
    if (threadIdx.x < 16) counts[threadIdx.x] = 0;
    __syncthreads();
    const int value = values[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&counts[value & 15], 1u);
    atomicAdd(total, static_cast<unsigned long long>(value & 0xffff));
    atomicAdd(floats, static_cast<float>(value));
    atomicMax(&extremes[0], value);
    atomicMin(&extremes[1], value);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&histogram[threadIdx.x], counts[threadIdx.x]);
}

extern "C" __global__ void numbers(
    const unsigned* words, const float* floats, unsigned* permuted, int* rounded, float* clamped
) {
    const int i = threadIdx.x, n = blockDim.x;
    permuted[i] = __byte_perm(words[i], words[n + i], words[2 * n + i]);
    rounded[i] = __float2int_rn(floats[i]);
    rounded[n + i] = max(i - 128, -3);
    clamped[i] = __saturatef(floats[i]);
    clamped[n + i] = rsqrtf(static_cast<float>(i + 1));
}

extern "C" __global__ void places(int* result) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned number = block * blockDim.x * blockDim.y * blockDim.z + thread;
    result[number] = static_cast<int>(number);
}

struct Job {
    float* values;
    int count;
    float factor;
};

extern "C" __global__ void scaled(const Job job) {
    for (int i = threadIdx.x; i < job.count; i += blockDim.x) job.values[i] *= job.factor;
}

// ---------------------------------------------------------------------------------------------------------------------
// Right, unless a macro takes a barrier away

extern "C" __global__ void reversed(float* values) {
    DYNAMIC_SHARED(memory);
    float* copy = reinterpret_cast<float*>(memory);
    copy[threadIdx.x] = values[threadIdx.x];  // reversed writes
#ifndef NO_BARRIER
    __syncthreads();
#endif
    values[threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];  // reversed reads
}

extern "C" __global__ void neighbours(float* values) {
    __shared__ float copy[64];
    copy[threadIdx.x] = values[threadIdx.x];  // neighbours writes
    const float other = __shfl_xor_sync(0xffffffffu, values[threadIdx.x], 1);  // moves a value, orders no memory
#ifndef NO_WARP_BARRIER
    __syncwarp();
#endif
    values[threadIdx.x] = copy[threadIdx.x ^ 1] - other;  // neighbours reads
}

// ---------------------------------------------------------------------------------------------------------------------
// Wrong

extern "C" __global__ void waits_for_each_other(float*) {
    if (threadIdx.x < 48) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

extern "C" __global__ void meets_elsewhere(float* values) {
    if (threadIdx.x < 20) {
        __syncthreads();
    } else {
        values[threadIdx.x] = 1.0f;
        __syncthreads();
    }
}

extern "C" __global__ void outside_its_mask(float*) {
    if (threadIdx.x < 4) __syncwarp(7u);
}

extern "C" __global__ void two_masks(float*) { __syncwarp(threadIdx.x % 32 == 31 ? 0xc0000000u : 0xffffffffu); }

extern "C" __global__ void writes_too_far(float*) {
    DYNAMIC_SHARED(memory);
    reinterpret_cast<float*>(memory)[threadIdx.x] = 1.0f;  // too far
}

extern "C" __global__ void reads_too_far(float* values) {
    values[threadIdx.x] = values[threadIdx.x + 1];  // reads_too_far
}

extern "C" __global__ void misaligned(float* values) {
    const float4 four = *reinterpret_cast<const float4*>(values + threadIdx.x / 2);  // misaligned
    values[threadIdx.x] = four.x;
}
