// What both forms of the grouped products share: where rows lie, what a launch is told, and the
// copies of b. Definitions in front of this text: those of the two forms (see source.rs).

#define BK 64
#define B_BYTES (BN * BK * 2)

// Row of a matrix for a position: the position itself, its slot, or its slot's token.
#define BY_POSITION 0
#define BY_SLOT 1
#define BY_TOKEN 2

#define EPILOGUE_STORE 0         // out = acc + bias, times the gate weight if HAS_GATES
#define EPILOGUE_ACTIVATE 1      // out = acc + bias, out2 = act(out)
#define EPILOGUE_ACTIVATE_VJP 2  // acc is the gradient of act(h), before gate weighting:
                                 // out = gate * acc * act'(h), out2 = gate * act(h), and
                                 // gate_parts[column tile][p] = sum of its acc * act(h)

struct Params {
  u64 num_experts;
  u64 m;      // SUMS: columns of a
  u64 n;      // columns of b
  u64 k;      // ROWS: summed width
  u64 lda;    // elements from row to row of a
  u64 chunk;  // SUMS, SPLIT: positions in one part; rows that stay: column tiles in one segment
  u64 num_slots;
  u64 bias_stride;  // elements from expert to expert
  u64 h_stride;     // elements from row to row of the pre-activation and its gradient
  u64 out_stride;   // SUMS: elements from expert to expert of the result
  u64 first, end;   // window of positions; all of them in SUMS
};

// First position of an expert in the window.
__device__ __forceinline__ int window_begin(const int* offsets, int expert, const Params& p) {
  return min(max(offsets[expert], (int)p.first), (int)p.end);
}

// out[i] = own(0) + ... + own(i - 1), for i up to count. One warp.
template <typename Own>
__device__ __forceinline__ void sums_before(int* out, int count, Own own) {
  int lane = threadIdx.x % 32, sum = 0;
  if (lane == 0) out[0] = 0;
  for (int base = 0; base < count; base += 32) {
    int i = base + lane, value = i < count ? own(i) : 0;
    for (int step = 1; step < 32; step *= 2) {
      int left = __shfl_up_sync(~0u, value, step);
      if (lane >= step) value += left;
    }
    if (i < count) out[i + 1] = sum + value;
    sum += __shfl_sync(~0u, value, 31);
  }
}

// The last i below count with before[i] <= index.
__device__ __forceinline__ int last_not_above(const int* before, int count, int index) {
  int low = 0, high = count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (before[middle] <= index) low = middle; else high = middle;
  }
  return low;
}

template <int SOURCE>
__device__ __forceinline__ int source_row(const int* slots, int position) {
  if (SOURCE == BY_POSITION) return position;
  int slot = slots[position];
  return SOURCE == BY_SLOT ? slot : slot / TOP_K;
}

// Half of a step's b, which begins at column n0 and at this row of the matrix, into both cubes of
// the cluster or into this one.
template <bool INTO_BOTH>
__device__ __forceinline__ void copy_half_of_b(u32 stage, const TensorMap* map, int n0, int row,
                                               int matrix, int half, u32 barrier) {
#pragma unroll
  for (int block = 0; block < (B_TRANSPOSED ? 1 : BN / 64); ++block) {
#if B_TRANSPOSED
    u32 target = stage + half * (B_BYTES / 2);
    int column = row, line = n0 + half * (BN / 2);
#else
    u32 target = stage + block * 8192 + half * 4096;
    int column = n0 + block * 64, line = row + half * (BK / 2);
#endif
    if (INTO_BOTH) copy_box(target, map, column, line, matrix, barrier);
    else copy_own_box(target, map, column, line, matrix, barrier);
  }
}

