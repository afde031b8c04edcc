// Runs recorded tiles through the host twin, as a program of its own: for the sanitizers, which a Python process with
// torch in it does not suit. usage: driver INPUT OUTPUT (native byte order, see replay.py)
#include "host/twin.cpp"

#include <memory>

namespace {

struct Header {
  int64_t dtype, rows, vocab, row_stride, offset, topk;
  float scale, softcap, threshold, unused;
};

template <typename T>
void read(FILE* file, T* data, size_t count) {
  if (fread(data, sizeof(T), count, file) != count) exit(3);
}
template <typename T>
void write(FILE* file, const T* data, size_t count) {
  if (fwrite(data, sizeof(T), count, file) != count) exit(4);
}

// Memory of exactly `bytes`, so that a sanitizer sees one element beyond; a sparse mapping where that is too much.
struct Memory {
  char* data;
  size_t bytes;
  bool sparse;
  explicit Memory(size_t bytes) : bytes(bytes), sparse(bytes > (size_t)1 << 28) {
    data = sparse ? (char*)mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                  : (char*)malloc(bytes);
    if (!data || data == MAP_FAILED) exit(5);
    if (!sparse) memset(data, 0xFF, bytes);
  }
  ~Memory() {
    if (sparse) munmap(data, bytes);
    else free(data);
  }
};

#define PICK(NAME, dtype) (dtype == 0 ? NAME##_f32 : dtype == 1 ? NAME##_bf16 : NAME##_f16)

void run(const Header& h, FILE* in, FILE* out) {
  const size_t size = h.dtype == 0 ? 4 : 2, row_bytes = h.vocab * size;
  // each vector in an allocation of its own
  std::unique_ptr<int64_t[]> labels(new int64_t[h.rows]);
  std::unique_ptr<float[]> weight(new float[h.rows]), nll(new float[h.rows]), entropy(new float[h.rows]),
      topk(new float[h.rows]), maximum(new float[h.rows]), rest(new float[h.rows]), mass(new float[h.vocab]);
  std::unique_ptr<unsigned char[]> correct(new unsigned char[h.rows]), keep(new unsigned char[h.vocab]);
  read(in, labels.get(), h.rows);
  read(in, weight.get(), h.rows);
  Memory memory((h.offset + (h.rows - 1) * h.row_stride + h.vocab) * size);
  char* tile = memory.data + h.offset * size;
  for (int64_t r = 0; r < h.rows; r++) read(in, tile + r * h.row_stride * size, row_bytes);

  int error = PICK(eaft_tile_statistics, h.dtype)(tile, h.row_stride, labels.get(), h.rows, h.vocab, h.scale, h.softcap,
                                                  (int)h.topk, nll.get(), entropy.get(), topk.get(), correct.get(),
                                                  maximum.get(), rest.get(), nullptr);
  error |= PICK(eaft_tile_gradient, h.dtype)(tile, h.row_stride, labels.get(), h.rows, h.vocab, h.scale, h.softcap,
                                             nll.get(), maximum.get(), rest.get(), weight.get(), nullptr);
  error |= PICK(eaft_tile_columns, h.dtype)(tile, h.row_stride, h.rows, h.vocab, h.threshold, keep.get(), mass.get(),
                                            nullptr);
  if (error) exit(6);
  if (!h.topk) memset(topk.get(), 0, h.rows * sizeof(float));
  for (const float* vector : {nll.get(), entropy.get(), topk.get(), maximum.get(), rest.get()})
    write(out, vector, h.rows);
  write(out, correct.get(), h.rows);
  for (int64_t r = 0; r < h.rows; r++) write(out, tile + r * h.row_stride * size, row_bytes);
  write(out, keep.get(), h.vocab);
  write(out, mass.get(), h.vocab);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  FILE *in = fopen(arguments[1], "rb"), *out = fopen(arguments[2], "wb");
  if (!in || !out) return 2;
  Header header;
  while (fread(&header, sizeof header, 1, in) == 1) run(header, in, out);
  fclose(in);
  fclose(out);
  return 0;
}
