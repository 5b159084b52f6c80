// Runs one kernel from files: what a sanitizer build of the kernels does in a process of its own.
#pragma once

#include <cstring>

namespace emu {

// Numbers and bytes, as host_kernels.py wrote them.
class Input {
  public:
    explicit Input(const char* path) : file_(std::fopen(path, "rb")) {
        if (!file_) fail("'%s' can't be read", path);
    }
    ~Input() { std::fclose(file_); }
    Input(const Input&) = delete;

    void bytes(void* to, std::size_t size) {
        if (size && std::fread(to, 1, size, file_) != size) fail("the input ends early");
    }
    std::uint64_t number() {
        std::uint64_t value;
        bytes(&value, sizeof value);
        return value;
    }
    dim3 shape() {
        const auto x = number(), y = number(), z = number();
        return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    }

  private:
    std::FILE* file_;
};

// Device memory: aligned like cudaMalloc's, and exactly as long as asked for, so that AddressSanitizer sees its end.
struct Buffer {
    std::size_t size;
    unsigned char* data;
};

inline std::vector<Buffer> read_buffers(Input& input) {
    std::vector<Buffer> buffers(input.number());
    for (Buffer& buffer : buffers) {
        buffer.size = input.number();
        void* data = nullptr;
        if (posix_memalign(&data, 256, buffer.size)) fail("no memory");
        buffer.data = static_cast<unsigned char*>(data);
        input.bytes(data, buffer.size);
    }
    return buffers;
}

// The value of one parameter, with the addresses in it turned into those of this process's buffers.
inline void* read_argument(Input& input, const std::vector<Buffer>& buffers) {
    const std::size_t size = input.number();
    auto* value = static_cast<unsigned char*>(std::malloc(size));
    input.bytes(value, size);
    for (std::uint64_t addresses = input.number(); addresses > 0; addresses--) {
        const std::size_t place = input.number(), buffer = input.number(), offset = input.number();
        const unsigned char* address = buffers[buffer].data + offset;
        std::memcpy(value + place, &address, sizeof address);
    }
    return value;
}

template <class Kernel> int run_files(Kernel kernel, const char* input_path, const char* output_path) {
    Input input(input_path);
    const dim3 grid = input.shape(), threads = input.shape();
    const std::size_t dynamic_bytes = input.number();
    const int order = static_cast<int>(input.number());
    const std::vector<Buffer> buffers = read_buffers(input);
    std::vector<void*> arguments(input.number());
    for (void*& argument : arguments) argument = read_argument(input, buffers);

    launch(grid, threads, dynamic_bytes, order, [&] { call(kernel, arguments.data()); });

    std::FILE* output = std::fopen(output_path, "wb");
    for (const Buffer& buffer : buffers) {
        if (std::fwrite(buffer.data, 1, buffer.size, output) != buffer.size) fail("the output can't be written");
    }
    std::fclose(output);
    return 0;
}

}  // namespace emu
