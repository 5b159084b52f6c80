// From patch tokens to the defect map. `reference.py` is the definition of both kernels.
//
//   patch_probabilities   tokens [B, L, N, D] FP16 → probs [B, K+1, N] FP32
//   defect_map            probs → anomaly [B, H, pitch] FP16 and u8, types [B, H, pitch] u8, peaks, histogram
#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Unit tokens · bank / temperature, softmax over the channels, mean over the layers. The logits never leave the registers.
//
// One warp takes 16 patches of one layer; the warps of a block take the layers of the same patches, so that the mean is
// a sum in shared memory, in a fixed order. A lane loads 16 bytes of two patches at a time; a dot product doesn't care
// in which order its columns come, so these bytes are the matrix fragments as they are.
// Block (32, L, R), grid (patches / 16 / R, B).

constexpr int PATCHES_PER_WARP = 16;
constexpr int CHUNK = 128;                // columns of the bank in shared memory at once
constexpr int CHUNK_STRIDE = CHUNK + 32;  // halves; the two rows of one 16-byte load phase lie in different banks
constexpr int SHARE_STRIDE = 20;          // floats; keeps the lanes of one store in different banks
constexpr int BANK_BYTES = MAX_BANK_ROWS * CHUNK_STRIDE * 2;

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

// ---------------------------------------------------------------------------------------------------------------------
// From the patch grid straight to the output: `A_y · P · A_xᵀ` of every channel, with resize and smoothing folded into the
// two tap tables. Anomaly = 1 - normal channel; type = the channel with the highest value, the lowest of equals.
//
// A thread owns 4 neighbouring columns of 1 or 2 rows and goes through the channels. Its 4 columns read one window of the
// grid (`group_weights`, zero where a column doesn't reach), whose weights stay in registers. A block first
// applies the rows' taps to the part of the grid below it, a few channels at a time, into shared memory.
// Block ceil(groups · rows, 32) threads, grid (columns, rows, B).

constexpr int COLUMNS_PER_THREAD = 4;
constexpr int PEAKS = MAX_BANK_ROWS;   // per image: the maximum of each channel, and in the last place of the anomaly
constexpr int HISTOGRAM_BINS = 2048;   // of the anomaly in [0, 1]

struct MapJob {
    const float* probs;              // [B, K+1, grid_rows, grid_columns]
    const Bank* bank;
    const int* row_starts;           // [H]
    const float* row_weights;        // [H, row_taps]
    const int* group_starts;         // [pitch / 4], never falling
    const float4* group_weights;     // [pitch / 4, window]: weights of a window's column for the group's 4 pixels
    unsigned short* anomaly_half;    // [B, H, pitch] FP16, or null
    unsigned char* anomaly_byte;     // [B, H, pitch], 255 times the anomaly, or null
    unsigned char* types;            // [B, H, pitch]
    unsigned* peaks;                 // [B, PEAKS] FP32 bits, zero before
    unsigned* histogram;             // [B, HISTOGRAM_BINS], zero before, or null
    int grid_rows, grid_columns, height, width, pitch, row_taps, window;
    int groups, lines;               // of threads in one block
    int span;                        // columns of the grid that a block's columns read, at most
    int channels_at_once;            // that fit into shared memory
};

__device__ __forceinline__ void raise(unsigned* peak, unsigned value) {
    // Most values are no new maximum, and a look is far cheaper than an atomic that all blocks queue for.
    if (value > *static_cast<volatile unsigned*>(peak)) {
        atomicMax(peak, value);
    }
}

// Counts four neighbours, equal ones in one go: flat maps would otherwise have all threads queue for one bin.
__device__ __forceinline__ void count(unsigned* histogram, const float (&anomaly)[4], int valid) {
    unsigned run = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS_PER_THREAD; i++) {
        const int bin = bin_of(anomaly[i], HISTOGRAM_BINS);
        const int next = i + 1 < valid ? bin_of(anomaly[(i + 1) % 4], HISTOGRAM_BINS) : -1;
        run++;
        if (i < valid && next != bin) {
            atomicAdd(&histogram[bin], run);
            run = 0;
        }
    }
}

// The rows' taps of some channels, for the part of the grid below a block: [channels, lines of the block, span].
__device__ __forceinline__ void make_band(
    float* band, const MapJob& job, const float* first_channel, int channels, int top, int tile_lines, int left
) {
    const size_t plane = static_cast<size_t>(job.grid_rows) * job.grid_columns;
    for (int i = threadIdx.x; i < channels * tile_lines * job.span; i += blockDim.x) {
        const int x = i % job.span, y = i / job.span % tile_lines, channel = i / job.span / tile_lines;
        const int row = min(top + y, job.height - 1);
        const int column = min(left + x, job.grid_columns - 1);
        const float* values = first_channel + channel * plane + job.row_starts[row] * job.grid_columns + column;
        float sum = 0.0f;
        for (int tap = 0; tap < job.row_taps; tap++) {
            sum += job.row_weights[row * job.row_taps + tap] * values[tap * job.grid_columns];
        }
        band[i] = sum;
    }
}

// The anomaly of four neighbours from their normal channel; returns the highest as bits.
__device__ __forceinline__ unsigned write_anomaly(
    const MapJob& job, const float (&normal)[COLUMNS_PER_THREAD], size_t place, int valid, unsigned* histogram
) {
    float anomaly[COLUMNS_PER_THREAD];
    unsigned bytes = 0, highest = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS_PER_THREAD; c++) {
        anomaly[c] = clamp_unit(1.0f - normal[c]);
        bytes |= static_cast<unsigned>(__float2int_rn(anomaly[c] * 255.0f)) << 8 * c;
        highest = c < valid ? max(highest, __float_as_uint(anomaly[c])) : highest;
    }
    if (job.anomaly_half) {
        *reinterpret_cast<uint2*>(job.anomaly_half + place) =
            make_uint2(float2_to_half2(anomaly[0], anomaly[1]), float2_to_half2(anomaly[2], anomaly[3]));
    }
    if (job.anomaly_byte) {
        *reinterpret_cast<unsigned*>(job.anomaly_byte + place) = bytes;
    }
    if (job.histogram) {
        count(histogram, anomaly, valid);
    }
    return highest;
}

// WINDOW: columns of the grid that one group reads; 0 where that is only known at run time. ROWS of one thread.
template <int WINDOW, int ROWS>
__device__ __forceinline__ void make_map(const MapJob& job, unsigned char* memory) {
    unsigned* peaks = reinterpret_cast<unsigned*>(memory);              // [PEAKS]
    const int bins = job.histogram ? HISTOGRAM_BINS : 0;
    unsigned* histogram = peaks + PEAKS;                                // [bins]
    float* normal = reinterpret_cast<float*>(histogram + bins);         // [pixels of a thread, threads]
    float* band = normal + ROWS * COLUMNS_PER_THREAD * blockDim.x;            // [channels_at_once, tile_lines, span]
    for (int i = threadIdx.x; i < PEAKS + bins; i += blockDim.x) {
        peaks[i] = 0;
    }
    const int channels = job.bank->channels, tile_lines = job.lines * ROWS;
    const int line = threadIdx.x / job.groups, top = blockIdx.y * tile_lines;
    const int group = blockIdx.x * job.groups + threadIdx.x % job.groups;
    const int x = group * COLUMNS_PER_THREAD;
    const bool active = line < job.lines && x < job.pitch;
    const int left = job.group_starts[blockIdx.x * job.groups];
    const int offset = active ? job.group_starts[group] - left : 0;
    const int window = WINDOW ? WINDOW : job.window;
    const float4* own_weights = job.group_weights + static_cast<size_t>(active ? group : 0) * window;
    float4 weights[WINDOW ? WINDOW : 1];
#pragma unroll
    for (int tap = 0; tap < WINDOW; tap++) {
        weights[tap] = own_weights[tap];
    }
    const int valid = active ? min(COLUMNS_PER_THREAD, job.width - x) : 0;
    const size_t plane = static_cast<size_t>(job.grid_rows) * job.grid_columns;
    const float* grid = job.probs + blockIdx.z * channels * plane;

    float best[ROWS][COLUMNS_PER_THREAD];
#pragma unroll
    for (int pixel = 0; pixel < ROWS * COLUMNS_PER_THREAD; pixel++) {
        best[pixel / COLUMNS_PER_THREAD][pixel % COLUMNS_PER_THREAD] = -1.0f;
    }
    unsigned types[ROWS] = {};  // one byte per column
    for (int first = 0; first < channels; first += job.channels_at_once) {
        const int here = min(job.channels_at_once, channels - first);
        __syncthreads();
        make_band(band, job, grid + first * plane, here, top, tile_lines, left);
        __syncthreads();
        for (int i = 0; i < here; i++) {
            const unsigned channel = first + i;
            unsigned peak = 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int y = active ? line + r * job.lines : 0;
                const float* values = band + (i * tile_lines + y) * job.span + offset;
                float value[COLUMNS_PER_THREAD] = {};
#pragma unroll
                for (int tap = 0; tap < window; tap++) {
                    const float4 weight = WINDOW ? weights[tap] : own_weights[tap];
                    const float below = values[tap];
                    value[0] += weight.x * below;
                    value[1] += weight.y * below;
                    value[2] += weight.z * below;
                    value[3] += weight.w * below;
                }
#pragma unroll
                for (int c = 0; c < COLUMNS_PER_THREAD; c++) {
                    peak = max(peak, __float_as_uint(value[c]));
                    if (value[c] > best[r][c]) {
                        best[r][c] = value[c];
                        types[r] = (types[r] & ~(0xffu << 8 * c)) | channel << 8 * c;
                    }
                    if (channel == 0) {  // put aside: the anomaly is made when the weights' registers are free
                        normal[(r * COLUMNS_PER_THREAD + c) * blockDim.x + threadIdx.x] = value[c];
                    }
                }
            }
            // Columns beyond the map have no weights, and rows beyond it repeat the last one.
            peak = warp_max(active ? peak : 0);
            if (threadIdx.x % 32 == 0) {
                atomicMax(&peaks[channel], peak);
            }
        }
    }
    unsigned highest = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int y = top + line + r * job.lines;
        if (active && y < job.height) {
            const size_t place = (static_cast<size_t>(blockIdx.z) * job.height + y) * job.pitch + x;
            float own[COLUMNS_PER_THREAD];
#pragma unroll
            for (int c = 0; c < COLUMNS_PER_THREAD; c++) {
                own[c] = normal[(r * COLUMNS_PER_THREAD + c) * blockDim.x + threadIdx.x];
            }
            *reinterpret_cast<unsigned*>(job.types + place) = types[r];
            highest = max(highest, write_anomaly(job, own, place, valid, histogram));
        }
    }
    highest = warp_max(highest);
    if (threadIdx.x % 32 == 0) {
        atomicMax(&peaks[PEAKS - 1], highest);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < PEAKS; i += blockDim.x) {
        raise(&job.peaks[blockIdx.z * PEAKS + i], peaks[i]);
    }
    for (int i = threadIdx.x; i < bins; i += blockDim.x) {
        if (histogram[i] > 0) {
            atomicAdd(&job.histogram[blockIdx.z * HISTOGRAM_BINS + i], histogram[i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS_PER_SM) defect_map_4(const MapJob job) {
    DYNAMIC_SHARED(memory);
    make_map<4, 2>(job, memory);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS_PER_SM) defect_map_6(const MapJob job) {
    DYNAMIC_SHARED(memory);
    make_map<6, 2>(job, memory);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS_PER_SM) defect_map_8(const MapJob job) {
    DYNAMIC_SHARED(memory);
    make_map<8, 1>(job, memory);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS_PER_SM) defect_map_any(const MapJob job) {
    DYNAMIC_SHARED(memory);
    make_map<0, 2>(job, memory);
}
