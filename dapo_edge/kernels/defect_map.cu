// Patch probabilities [B, K+1, h, w] → anomaly [B, H, pitch] FP16 and u8, types [B, H, pitch] u8, highest values, histogram.
// `reference.py` is the definition: `A_y · P · A_xᵀ` of every channel, with resize and smoothing folded into the two tap
// tables. Anomaly = 1 - normal channel; type = the channel with the highest value, the lowest of equals.
//
// A thread owns 4 neighbouring columns of 1 or 2 rows and goes through the channels. Its 4 columns read one window of the
// grid (`group_weights`, zero where a column doesn't reach), whose weights stay in registers. A block first
// applies the rows' taps to the part of the grid below it, a few channels at a time, into shared memory.
// Block ceil(groups · rows, 32) threads, grid (columns, rows, B).
#include "common.cuh"

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
    const int plane = job.grid_rows * job.grid_columns, warps = blockDim.x / 32;
    for (int y = threadIdx.x / 32; y < tile_lines; y += warps) {
        const int row = min(top + y, job.height - 1);
        const float* weights = job.row_weights + row * job.row_taps;
        const float* below = first_channel + job.row_starts[row] * job.grid_columns;
        for (int i = threadIdx.x % 32; i < channels * job.span; i += 32) {
            const int channel = i / job.span, x = i - channel * job.span;
            const float* values = below + channel * plane + min(left + x, job.grid_columns - 1);
            float sum = 0.0f;
            for (int tap = 0; tap < job.row_taps; tap++) {
                sum += weights[tap] * values[tap * job.grid_columns];
            }
            band[(channel * tile_lines + y) * job.span + x] = sum;
        }
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

// A value and its channel in one number, so that one maximum keeps both: values aren't negative, so their bits sort as
// they do, and the lowest ones (1.5e-5 of the value) are given up for the channel. The lowest of equal channels wins.
constexpr unsigned TAG = 127;

__device__ __forceinline__ unsigned types_of(const unsigned (&best)[COLUMNS_PER_THREAD]) {
    unsigned types = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS_PER_THREAD; c++) {
        types |= (TAG - (best[c] & TAG)) << 8 * c;
    }
    return types;
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
    const int valid = active ? min(COLUMNS_PER_THREAD, job.width - x) : 0;
    const size_t plane = static_cast<size_t>(job.grid_rows) * job.grid_columns;
    const float* grid = job.probs + blockIdx.z * channels * plane;

    unsigned best[ROWS][COLUMNS_PER_THREAD] = {};
    for (int first = 0; first < channels; first += job.channels_at_once) {
        const int here = min(job.channels_at_once, channels - first);
        __syncthreads();
        make_band(band, job, grid + first * plane, here, top, tile_lines, left);
        __syncthreads();
        float4 weights[WINDOW ? WINDOW : 1];  // not before: the band needs the registers
#pragma unroll
        for (int tap = 0; tap < WINDOW; tap++) {
            weights[tap] = own_weights[tap];
        }
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
                    const unsigned bits = __float_as_uint(value[c]);
                    peak = max(peak, bits);
                    best[r][c] = max(best[r][c], (bits & ~TAG) | (TAG - channel));
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
            *reinterpret_cast<unsigned*>(job.types + place) = types_of(best[r]);
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
