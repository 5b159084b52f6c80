// From a camera's bytes to the encoder's input: crop, resample, colour order, normalise, planes. `pixels.py` is the definition.
//
//   views [B], any size and format → images [B, 3, S, S] FP16 or FP32
//
// One pass: a block makes a tile of the output of one view. It goes down the source rows below its tile, a strip at a time:
// pixels → RGB bytes in shared memory → columns resampled → every thread adds its share to the rows it owns. A large source
// is first reduced to means of boxes, so each byte is read about once, and shared memory doesn't grow with the source. As in
// Pillow, whose pixels the encoder was tuned on, the columns come first, and all three steps round to a byte.
// Block (32, 8), grid (S / 32, S / tile rows, B).
#include "common.cuh"

enum Format { BGR8, RGB8, GRAY8, BAYER_RG8, NV12 };

constexpr int TILE_COLUMNS = 32;
constexpr int STRIP = 16;  // source rows at a time
constexpr int THREAD_ROWS = 8;
constexpr int MAX_ROWS_PER_THREAD = 4;

// One camera picture in device memory, the part of it that is looked at, and the tap tables that bring that part to S x S.
struct View {
    const unsigned char* pixels;
    const unsigned char* chroma;  // the plane of (Cb, Cr) pairs of NV12, with the same pitch
    const int* row_starts;        // [S], in rows of the reduced crop
    const float* row_weights;     // [S, row_taps]
    const int* column_starts;
    const float* column_weights;
    int width, height, pitch;  // of the whole picture; pitch in bytes
    int left, top, across, down;    // of the crop
    int reduce_across, reduce_down;  // pixels that become one before all else
    int row_taps, column_taps;
    int format;
};

__device__ __forceinline__ unsigned pack(int red, int green, int blue) {
    return static_cast<unsigned>(red) | static_cast<unsigned>(green) << 8 | static_cast<unsigned>(blue) << 16;
}

__device__ __forceinline__ int to_byte(int value) { return min(max(value, 0), 255); }

// Bilinear demosaicing of RGGB; a neighbour outside is the one mirrored at the border, which has the same colour.
__device__ __forceinline__ unsigned demosaic(const View& view, int x, int y) {
    const int west = x > 0 ? x - 1 : 1, east = x + 1 < view.width ? x + 1 : view.width - 2;
    const int north = y > 0 ? y - 1 : 1, south = y + 1 < view.height ? y + 1 : view.height - 2;
    const unsigned char* here = view.pixels + static_cast<size_t>(y) * view.pitch;
    const unsigned char* above = view.pixels + static_cast<size_t>(north) * view.pitch;
    const unsigned char* below = view.pixels + static_cast<size_t>(south) * view.pitch;
    const int centre = here[x];
    const int beside = (here[west] + here[east] + 1) / 2, upright = (above[x] + below[x] + 1) / 2;
    if ((x ^ y) & 1) {  // green
        return y & 1 ? pack(upright, centre, beside) : pack(beside, centre, upright);
    }
    const int cross = (here[west] + here[east] + above[x] + below[x] + 2) / 4;
    const int corners = (above[west] + above[east] + below[west] + below[east] + 2) / 4;
    return y & 1 ? pack(corners, cross, centre) : pack(centre, cross, corners);
}

// BT.601 with limited range, in the fixed point of OpenCV, so that both give the same bytes.
__device__ __forceinline__ unsigned from_nv12(const View& view, int x, int y) {
    const unsigned char* pair = view.chroma + static_cast<size_t>(y / 2) * view.pitch + x / 2 * 2;
    const int luma = max(view.pixels[static_cast<size_t>(y) * view.pitch + x] - 16, 0) * 1220542;
    const int blue = pair[0] - 128, red = pair[1] - 128, half = 1 << 19;
    return pack(
        to_byte((luma + 1673527 * red + half) >> 20), to_byte((luma - 852492 * red - 409993 * blue + half) >> 20),
        to_byte((luma + 2116026 * blue + half) >> 20)
    );
}

// The RGB bytes of one pixel, red in the lowest.
__device__ __forceinline__ unsigned read_pixel(const View& view, int x, int y) {
    if (view.format == BAYER_RG8) {
        return demosaic(view, x, y);
    }
    if (view.format == NV12) {
        return from_nv12(view, x, y);
    }
    const unsigned char* row = view.pixels + static_cast<size_t>(y) * view.pitch;
    if (view.format == GRAY8) {
        return pack(row[x], row[x], row[x]);
    }
    const unsigned char* pixel = row + 3 * static_cast<size_t>(x);
    return view.format == RGB8 ? pack(pixel[0], pixel[1], pixel[2]) : pack(pixel[2], pixel[1], pixel[0]);
}

// The mean of a box of the crop, of what is left of it at the border. Pillow divides by a rounded-down reciprocal.
__device__ __forceinline__ unsigned read_box(const View& view, int x, int y) {
    if (view.reduce_across == 1 && view.reduce_down == 1) {
        return read_pixel(view, view.left + x, view.top + y);
    }
    const int first_x = x * view.reduce_across, end_x = min(first_x + view.reduce_across, view.across);
    const int first_y = y * view.reduce_down, end_y = min(first_y + view.reduce_down, view.down);
    unsigned red = 0, green = 0, blue = 0;
    for (int row = first_y; row < end_y; row++) {
        for (int column = first_x; column < end_x; column++) {
            const unsigned pixel = read_pixel(view, view.left + column, view.top + row);
            red += pixel & 255;
            green += pixel >> 8 & 255;
            blue += pixel >> 16;
        }
    }
    const unsigned count = (end_x - first_x) * (end_y - first_y);
    if (count == 1) {
        return pack(red, green, blue);
    }
    const unsigned reciprocal = (1u << 24) / count, half = count / 2;
    return pack((red + half) * reciprocal >> 24, (green + half) * reciprocal >> 24, (blue + half) * reciprocal >> 24);
}

// Halves go up, as in Pillow. Float sums may leave one a little below itself.
constexpr float HALF = 0.5f + 1.0f / 65536;
__device__ __forceinline__ int round_to_byte(float value) { return to_byte(__float2int_rd(value + HALF)); }

// One strip of columns resampled: `taps` pixels of a row of the strip become one.
__device__ __forceinline__ unsigned resample_column(const unsigned* pixels, const float* weights, int taps) {
    float red = 0.0f, green = 0.0f, blue = 0.0f;
    for (int tap = 0; tap < taps; tap++) {
        const unsigned pixel = pixels[tap];
        const float weight = weights[tap];
        red += weight * byte_to_float(pixel, 0);
        green += weight * byte_to_float(pixel, 1);
        blue += weight * byte_to_float(pixel, 2);
    }
    return pack(round_to_byte(red), round_to_byte(green), round_to_byte(blue));
}

struct PreprocessJob {
    const View* views;    // [B]
    void* images;         // [B, 3, S, S]
    int size;             // S
    int is_half;
    int rows_per_thread;  // of the output, at most 4
    int segment;          // columns of the reduced source that a tile reads, at most
    float scale[3];       // of red, green, blue: 1 / (255 · std)
    float bias[3];        // -mean / std
};

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS_PER_SM) preprocess(const PreprocessJob job) {
    DYNAMIC_SHARED(memory);
    const int size = job.size, segment = job.segment;
    unsigned* pixels = reinterpret_cast<unsigned*>(memory);  // [STRIP, segment] RGB bytes
    unsigned* narrow = pixels + STRIP * segment;  // [STRIP, TILE_COLUMNS], columns resampled
    const View& view = job.views[blockIdx.z];
    const int lane = threadIdx.x, line = threadIdx.y;
    const int first_column = blockIdx.x * TILE_COLUMNS, column = first_column + lane;
    const int last_column = min(first_column + TILE_COLUMNS, size) - 1;
    const int tile_rows = THREAD_ROWS * job.rows_per_thread, first_row = blockIdx.y * tile_rows;
    const int last_row = min(first_row + tile_rows, size) - 1;
    const bool active = column <= last_column;
    const int left = view.column_starts[first_column];
    const int reach = view.column_starts[last_column] + view.column_taps - left;
    const int bottom = view.row_starts[last_row] + view.row_taps;
    const int own_start = active ? view.column_starts[column] - left : 0;
    const float* own_weights = view.column_weights + static_cast<size_t>(active ? column : 0) * view.column_taps;

    float sums[MAX_ROWS_PER_THREAD][3] = {};
    for (int top = view.row_starts[first_row]; top < bottom; top += STRIP) {
        const int rows = min(STRIP, bottom - top);
        for (int y = line; y < rows; y += THREAD_ROWS) {
            for (int x = lane; x < reach; x += 32) {
                pixels[y * segment + x] = read_box(view, left + x, top + y);
            }
        }
        __syncthreads();
        for (int y = line; y < rows && active; y += THREAD_ROWS) {
            narrow[y * TILE_COLUMNS + lane] =
                resample_column(pixels + y * segment + own_start, own_weights, view.column_taps);
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < MAX_ROWS_PER_THREAD; r++) {
            const int row = first_row + line + r * THREAD_ROWS;
            if (r < job.rows_per_thread && row < size && active) {
                const int start = view.row_starts[row] - top;
                const float* weights = view.row_weights + static_cast<size_t>(row) * view.row_taps - start;
                for (int y = max(start, 0); y < min(start + view.row_taps, rows); y++) {
                    const unsigned pixel = narrow[y * TILE_COLUMNS + lane];
#pragma unroll
                    for (int c = 0; c < 3; c++) {
                        sums[r][c] += weights[y] * byte_to_float(pixel, c);
                    }
                }
            }
        }
    }
    const size_t plane = static_cast<size_t>(size) * size;
#pragma unroll
    for (int r = 0; r < MAX_ROWS_PER_THREAD; r++) {
        const int row = first_row + line + r * THREAD_ROWS;
        if (r < job.rows_per_thread && row < size && active) {
#pragma unroll
            for (int c = 0; c < 3; c++) {
                const float value = static_cast<float>(round_to_byte(sums[r][c])) * job.scale[c] + job.bias[c];
                const size_t place = (blockIdx.z * 3 + c) * plane + static_cast<size_t>(row) * size + column;
                if (job.is_half) {
                    static_cast<unsigned short*>(job.images)[place] = float_to_half(value);
                } else {
                    static_cast<float*>(job.images)[place] = value;
                }
            }
        }
    }
}
