// Patch tokens [B, L, N, D] FP16 → probability of each bank row on each patch, [B, K+1, N] FP32: unit tokens · bank /
// temperature, softmax over the channels, mean over the layers. `reference.py` is the definition. The logits never leave
// the registers.
//
// One warp takes 16 patches of one layer; the warps of a block take the layers of the same patches, so that the mean is
// a sum in shared memory, in a fixed order. A lane loads 16 bytes of two patches at a time; a dot product doesn't care
// in which order its columns come, so these bytes are the matrix fragments as they are.
// Block (32, L, R), grid (patches / 16 / R, B).
#include "common.cuh"

constexpr int PATCHES_PER_WARP = 16;
constexpr int CHUNK = 128;                // columns of the bank in shared memory at once
constexpr int CHUNK_STRIDE = CHUNK + 32;  // halves; the two rows of one 16-byte load phase lie in different banks
constexpr int SHARE_STRIDE = 20;          // floats; keeps the lanes of one store in different banks

__device__ __forceinline__ uint4 load_or_zero(const uint4* from, unsigned index, bool inside) {
    return inside ? from[index] : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ float sum_of_squares(uint4 eight) {
    float sum = 0.0f;
    const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 value = half2_to_float2(pairs[i]);
        sum += value.x * value.x + value.y * value.y;
    }
    return sum;
}

__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Softmax of one patch, whose logits lie in the four lanes of a quad: elements `first` and `first + 1` of every tile.
// `factor` is scale / |token|; the result is divided by the number of layers.
__device__ __forceinline__ void softmax_in_quad(
    float (&logits)[BANK_TILES][4], int first, float factor, int channels, int column, float layers
) {
    float highest = -3.0e38f;
#pragma unroll
    for (int tile = 0; tile < BANK_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& logit = logits[tile][first + i];
            logit = tile * BANK_TILE + column + i < channels ? logit * factor : -3.0e38f;
            highest = fmaxf(highest, logit);
        }
    }
    highest = quad_max(highest);
    float sum = 0.0f;
#pragma unroll
    for (int tile = 0; tile < BANK_TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& logit = logits[tile][first + i];
            logit = __expf(logit - highest);
            sum += logit;
        }
    }
    const float share = 1.0f / (quad_sum(sum) * layers);
#pragma unroll
    for (int tile = 0; tile < BANK_TILES; tile++) {
        logits[tile][first] *= share;
        logits[tile][first + 1] *= share;
    }
}

struct PatchJob {
    const uint4* tokens;  // [B, L, N, D] FP16, eight at a time
    const Bank* bank;
    float* probs;  // [B, K+1, N]
    int patches;   // N
    int eighths;   // D / 8
    int width;     // of a bank row, in eights
};

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS_PER_SM) patch_probabilities(const PatchJob job) {
    DYNAMIC_SHARED(memory);
    const uint4* __restrict__ tokens = job.tokens;
    const Bank* __restrict__ bank = job.bank;
    const int patches = job.patches, eighths = job.eighths, width = job.width;
    uint4* rows = reinterpret_cast<uint4*>(memory);   // [MAX_BANK_ROWS, CHUNK_STRIDE] halves
    float* shares = reinterpret_cast<float*>(memory);  // [R, MAX_BANK_ROWS, SHARE_STRIDE], when the rows are done with
    const int layers = blockDim.y;
    const int lane = threadIdx.x, group = lane / 4, quarter = lane % 4;
    const int threads = 32 * blockDim.y * blockDim.z;
    const int thread = lane + 32 * (threadIdx.y + blockDim.y * threadIdx.z);
    const int patch = (blockIdx.x * blockDim.z + threadIdx.z) * PATCHES_PER_WARP + group;
    // In units of 16 bytes, the largest batch has far fewer than 2^31 of them. Patches beyond the last one repeat it.
    const unsigned image_layer = (blockIdx.y * layers + threadIdx.y) * patches;
    const unsigned upper = (image_layer + min(patch, patches - 1)) * eighths + quarter;
    const unsigned lower = (image_layer + min(patch + 8, patches - 1)) * eighths + quarter;
    const int reach = eighths - quarter;
    const int channels = bank->channels;
    const uint4* bank_rows = reinterpret_cast<const uint4*>(bank + 1);

    const uint4* own_words = rows + group * (CHUNK_STRIDE / 8) + quarter;

    float logits[BANK_TILES][4] = {};
    float upper_square = 0.0f, lower_square = 0.0f;
    uint4 next_upper = load_or_zero(tokens, upper, 0 < reach);
    uint4 next_lower = load_or_zero(tokens, lower, 0 < reach);
#pragma unroll 1
    for (int column = 0; column < width; column += 4) {
        if (column % (CHUNK / 8) == 0) {
            __syncthreads();
#pragma unroll 1  // registers are scarce: the logits of 65 channels take 36
            for (int i = thread; i < ceil_div(channels, BANK_TILE) * BANK_TILE * (CHUNK / 8); i += threads) {
                const int row = i / (CHUNK / 8), from = column + i % (CHUNK / 8);
                rows[row * (CHUNK_STRIDE / 8) + i % (CHUNK / 8)] =
                    load_or_zero(bank_rows, row * width + from, from < width);
            }
            __syncthreads();
        }
        const uint4 high = next_upper, low = next_lower;
        upper_square += sum_of_squares(high);
        lower_square += sum_of_squares(low);
        next_upper = load_or_zero(tokens, upper + column + 4, column + 4 < reach);
        next_lower = load_or_zero(tokens, lower + column + 4, column + 4 < reach);
        const uint4* words = own_words + column % (CHUNK / 8);
#pragma unroll
        for (int tile = 0; tile < BANK_TILES; tile++) {
            if (tile * BANK_TILE < channels) {
                const uint4 word = words[tile * BANK_TILE * (CHUNK_STRIDE / 8)];
                mma_16x8x16(logits[tile], {high.x, low.x, high.y, low.y}, {word.x, word.y});
                mma_16x8x16(logits[tile], {high.z, low.z, high.w, low.w}, {word.z, word.w});
            }
        }
    }
    const float scale = bank->scale;
    const int column = 2 * quarter;
    const float upper_factor = scale / fmaxf(sqrtf(quad_sum(upper_square)), 1e-12f);
    const float lower_factor = scale / fmaxf(sqrtf(quad_sum(lower_square)), 1e-12f);
    softmax_in_quad(logits, 0, upper_factor, channels, column, layers);
    softmax_in_quad(logits, 2, lower_factor, channels, column, layers);

    float* share = shares + threadIdx.z * (MAX_BANK_ROWS * SHARE_STRIDE);
    for (int layer = 0; layer < layers; layer++) {
        __syncthreads();
        if (static_cast<int>(threadIdx.y) == layer) {
#pragma unroll
            for (int tile = 0; tile < BANK_TILES; tile++) {
                if (tile * BANK_TILE < channels) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int channel = tile * BANK_TILE + column + i % 2;
                        float& sum = share[channel * SHARE_STRIDE + group + 8 * (i / 2)];
                        sum = layer == 0 ? logits[tile][i] : sum + logits[tile][i];
                    }
                }
            }
        }
    }
    __syncthreads();
    const int first = blockIdx.x * blockDim.z * PATCHES_PER_WARP;
    const int taken = blockDim.z * PATCHES_PER_WARP;
    float* out = job.probs + static_cast<size_t>(blockIdx.y) * channels * patches;
    for (int i = thread; i < channels * taken; i += threads) {
        const int channel = i / taken, index = i % taken;
        if (first + index < patches) {
            out[static_cast<size_t>(channel) * patches + first + index] =
                shares[(index / PATCHES_PER_WARP * MAX_BANK_ROWS + channel) * SHARE_STRIDE + index % PATCHES_PER_WARP];
        }
    }
}
