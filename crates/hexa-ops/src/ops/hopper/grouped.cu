// Grouped matrix products on Hopper's matrix units (wgmma), for bf16 and f16 with f32 sums.
//
// One persistent kernel, compiled for one of two problems over positions in expert order:
//
//   ROWS  (ESMM)    out[p, n]    = epilogue(sum_k a[row(p), k] * b[expert(p)][k, n])
//   SUMS  (ESTMM)   out[e][m, n] = sum over positions p of expert e of a[row(p), m] * b[row(p), n]
//
// ROWS may be of a window of the positions. Its rows are all that `a` has if that lies in expert
// order, and all that `out2` has if that is the activation.
//
// A cube has two or three warpgroups that multiply, each 64 rows of a tile, and one that copies
// operands into a ring of stages. Copies of the next tile are under way during a tile's epilogue.
//
// What bounds such a kernel is the second-level cache: 128 x 256 tiles at 800 TFLOP/s would read
// 9 TB/s from it, and 6 to 7 are there. Therefore two cubes form a cluster that works on tiles one
// above the other, and share b: each copies half of it, by bulk tensor copies into both. An expert's
// last tile, if it has none below, makes pairs of tiles side by side, which share nothing. Rows of a
// that lie in expert order come by bulk tensor copies (A_BULK), others are gathered by asynchronous
// copies of 16 bytes, with zeros for what is missing.
//
// The launcher puts these definitions in front (see source.rs): BM, BN, STAGES, TOP_K, the registers
// per thread, the functions wgmma() and, for half of the columns, wgmma_half(); PROBLEM_SUMS, A_SOURCE,
// A_BULK, B_TRANSPOSED, OUT_SOURCE, OUT_TRANSPOSED, EPILOGUE, ACTIVATION, GATED, HAS_BIAS, HAS_GATES,
// IS_F16, SPLIT.

#define CONSUMER_WARPS (BM / 16)
#define ACCUMULATORS (BN / 2)
#define CONSUMERS (2 * BM)
#define PRODUCERS 128
#define LINES (PRODUCERS / 8)  // rows that all producers copy 128 bytes of at a time
#define GROUP_M 8  // pairs of row tiles
// Whether pairs of a last round that no more than half of the clusters would have are halved.
#define HALVES (!PROBLEM_SUMS && EPILOGUE == EPILOGUE_STORE && BN >= 192)
// Columns of b that a half tile copies: whole boxes.
#define HALF_COLUMNS (B_TRANSPOSED ? BN / 2 : (BN / 2 + 63) / 64 * 64)

// ---- Stages ----
// Operands lie in rows of 128 bytes, eight rows to a swizzle atom: 16-byte chunk c of row r is at
// r * 128 + ((c ^ (r & 7)) << 4), as wgmma's 128-byte swizzle reads them.
#define A_BYTES (BM * BK * 2)
#define STAGE_BYTES (A_BYTES + B_BYTES)
// The activation's gradient also needs the pre-activation's tile. It comes through the ring as
// well, behind the operands, in steps of 128 rows x H_COLUMNS in rows of 256 bytes, swizzled alike.
#define H_COLUMNS (BN == 192 ? 96 : 128)
#define H_STEPS (EPILOGUE == EPILOGUE_ACTIVATE_VJP ? BN * (1 + GATED) / H_COLUMNS : 0)
// Epilogue: each warp passes 16 rows x 64 columns of results at a time through shared memory.
#define PATCH_BYTES (CONSUMER_WARPS * 2048)
// Dynamic shared memory: the stages, the patches, then barriers, then the experts' tile table.
#define SHARED_BARRIERS (STAGES * STAGE_BYTES + PATCH_BYTES)
#define SHARED_TABLE (SHARED_BARRIERS + STAGES * 16)

// ---- Where tiles lie ----
struct Tile {
  int expert;
  int first;  // ROWS: first position; SUMS: first position of the part
  int len;    // ROWS: rows of the tile; SUMS: positions of the part
  int m0, n0;
  bool shares_b;
  bool is_half;  // HALVES: its first BN / 2 columns alone
  int part;      // SUMS: slab of the partial sums, or -1 for the result itself
};

// Where experts' tiles lie. Sums over the most positions come first, so that no cluster begins with
// one when the others are nearly done.
struct Table {
  int* begin;  // [num_experts + 1] first positions in the window, by expert
  int* parts;  // [num_experts + 1] SPLIT: slabs of partial sums before an expert's
  int* order;  // [num_experts] experts
  int* tiles;  // [num_experts + 1] pairs of tiles before each of the ordered experts
};

// An expert's positions, from `first` on, in `count` parts of `len`, the last of which may be shorter.
struct Run {
  int first, rows, count, len;
};

__device__ __forceinline__ Run find_run(Table table, int expert, const Params& p) {
  int first = table.begin[expert], rows = table.begin[expert + 1] - first;
#if PROBLEM_SUMS && SPLIT
  int chunk = (int)p.chunk;
  if (rows > chunk) {
    int count = (rows + chunk - 1) / chunk;
    return {first, rows, count, ((rows + count - 1) / count + BK - 1) / BK * BK};
  }
#endif
  return {first, rows, 1, rows};
}

__device__ __forceinline__ void build_table(Table table, const int* offsets, const Params& p) {
  int experts = (int)p.num_experts;
  int n_tiles = ((int)p.n + BN - 1) / BN;
  for (int e = threadIdx.x; e <= experts; e += blockDim.x)
    table.begin[e] = window_begin(offsets, e, p);
  __syncthreads();
#if PROBLEM_SUMS
  int* lengths = table.tiles;  // until the tiles are counted
  for (int e = threadIdx.x; e < experts; e += blockDim.x) lengths[e] = find_run(table, e, p).len;
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int length = lengths[e], rank = 0;
    for (int other = 0; other < experts; ++other)
      rank += lengths[other] > length || (lengths[other] == length && other < e);
    table.order[rank] = e;
  }
#else
  for (int e = threadIdx.x; e < experts; e += blockDim.x) table.order[e] = e;
#endif
  __syncthreads();
  if (threadIdx.x < 32)
    sums_before(table.tiles, experts, [&](int i) {
      Run run = find_run(table, table.order[i], p);
#if PROBLEM_SUMS
      return run.count * (((int)p.m + 2 * BM - 1) / (2 * BM)) * n_tiles;
#else
      int m_tiles = (run.len + BM - 1) / BM;
      return m_tiles / 2 * n_tiles + m_tiles % 2 * ((n_tiles + 1) / 2);
#endif
    });
#if PROBLEM_SUMS && SPLIT
  else if (threadIdx.x < 64)
    sums_before(table.parts, experts, [&](int e) {
      int count = find_run(table, e, p).count;
      return count > 1 ? count : 0;
    });
#endif
  __syncthreads();
}

// Of `pairs` pairs of tiles those before the first that is halved.
__device__ __forceinline__ int whole_pairs(int pairs) {
  int clusters = gridDim.x / CLUSTER, rest = pairs % clusters;
  return HALVES && 2 * rest <= clusters ? pairs - rest : pairs;
}

// Number of the pair of tiles that this cluster works on in a round. Sums, of which the longest come
// first, are dealt out forth and back.
__device__ __forceinline__ int dealt(int round) {
  int clusters = gridDim.x / CLUSTER, cluster = blockIdx.x / CLUSTER;
#if PROBLEM_SUMS
  if (round % 2) cluster = clusters - 1 - cluster;
#endif
  return round * clusters + cluster;
}

// This cube's tile of the cluster's pair number `index`: experts one after the other; within one,
// groups of GROUP_M pairs by all column tiles, so that what runs at one time shares operands in the
// cache. The second tile of a pair may be empty.
__device__ __forceinline__ Tile find_tile(Table table, int index, int rank, const Params& p) {
  Tile tile;
#if HALVES
  int whole = whole_pairs(table.tiles[p.num_experts]), half = (index - whole) % 2;
  tile.is_half = index >= whole;
  if (tile.is_half) index = whole + (index - whole) / 2;
#endif
  int low = last_not_above(table.tiles, (int)p.num_experts, index);
  tile.expert = table.order[low];
  tile.part = -1;
  Run run = find_run(table, tile.expert, p);
  int n_tiles = ((int)p.n + BN - 1) / BN;
  int local = index - table.tiles[low];
#if PROBLEM_SUMS
  int m_tiles = ((int)p.m + 2 * BM - 1) / (2 * BM);
  int part = local / (m_tiles * n_tiles), start = part * run.len;
  local %= m_tiles * n_tiles;
  tile.first = run.first + start;
  tile.len = min(run.len, run.rows - start);
#if SPLIT
  if (run.count > 1) tile.part = table.parts[tile.expert] + part;
#endif
#else
  int m_tiles = (run.len + BM - 1) / BM / 2;
#endif
  tile.shares_b = PROBLEM_SUMS || local < m_tiles * n_tiles;
  if (tile.shares_b) {
    int group = local / (GROUP_M * n_tiles);
    int first_m = group * GROUP_M, height = min(GROUP_M, m_tiles - first_m);
    int rest = local % (GROUP_M * n_tiles);
    tile.m0 = (first_m + rest % height) * (2 * BM) + rank * BM;
    tile.n0 = rest / height * BN;
  } else {
    tile.m0 = m_tiles * (2 * BM);
    tile.n0 = (2 * (local - m_tiles * n_tiles) + rank) * BN;
  }
#if HALVES
  if (tile.is_half) tile.n0 += half * (BN / 2);
#endif
#if !PROBLEM_SUMS
  tile.first = run.first + tile.m0;
  tile.len = tile.n0 < (int)p.n ? max(0, min(BM, run.len - tile.m0)) : 0;
#endif
  return tile;
}

// ---- Copies ----
#if PROBLEM_SUMS
// Rows of a for a thread's positions of a step.
__device__ __forceinline__ void find_rows(int* rows, const int* slots, int first, int valid_rows) {
  int line = (threadIdx.x - CONSUMERS) >> 3;
#pragma unroll
  for (int i = 0; i < BK / LINES; ++i)
    rows[i] = line + LINES * i < valid_rows
        ? source_row<A_SOURCE>(slots, first + line + LINES * i) : 0;
}
#endif

#if HALVES
// A step's b of a half tile: if the cubes share it, what this one has to copy into both.
template <bool SHARED>
__device__ __forceinline__ void copy_b_of_half_tile(u32 stage, const TensorMap* map, int n0, int row,
                                                    int matrix, int rank, u32 barrier) {
#if B_TRANSPOSED
  // It is one box.
  if (SHARED && rank == 0) copy_box(stage, map, row, n0, matrix, barrier);
  if (!SHARED) copy_own_box(stage, map, row, n0, matrix, barrier);
#else
#pragma unroll
  for (int block = 0; block < HALF_COLUMNS / 64; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 target = stage + block * 8192 + half * 4096;
      int column = n0 + block * 64, line = row + half * (BK / 2);
      if (SHARED && rank == half) copy_box(target, map, column, line, matrix, barrier);
      if (!SHARED) copy_own_box(target, map, column, line, matrix, barrier);
    }
  }
#endif
}
#endif

// A step's b: this cube's half into both cubes or, if they share none, both halves into this one. One
// thread.
__device__ __forceinline__ void copy_b(u32 stage, const TensorMap* map, const Tile& tile, int step,
                                       int rank, u32 barrier) {
#if PROBLEM_SUMS
  int row = tile.first + step * BK, matrix = 0;
#else
  int row = step * BK, matrix = tile.expert;
#endif
#if HALVES
  if (tile.is_half) {
    barrier_arrive_expecting(barrier, HALF_COLUMNS * BK * 2);
    if (tile.shares_b) copy_b_of_half_tile<true>(stage, map, tile.n0, row, matrix, rank, barrier);
    else copy_b_of_half_tile<false>(stage, map, tile.n0, row, matrix, rank, barrier);
    return;
  }
#endif
  barrier_arrive_expecting(barrier, B_BYTES);
  if (tile.shares_b) {
    copy_half_of_b<true>(stage, map, tile.n0, row, matrix, rank, barrier);
  } else {
    for (int half = 0; half < CLUSTER; ++half)
      copy_half_of_b<false>(stage, map, tile.n0, row, matrix, half, barrier);
  }
}

#if H_STEPS
// Pre-activations of the tile in the ring, whose stages begin with stage number `turn`: the warp's
// 16 rows, and 16 columns from `column`, as patch_store() takes them.
__device__ __forceinline__ void ring_h(u32* h, u32 base, int turn, int warp_row, int column) {
  int lane = threadIdx.x % 32, matrix = lane >> 3;
  int row = warp_row + (matrix & 1) * 8 + (lane & 7);
  u32 in_stage = row * 256 + (((matrix >> 1) ^ (row & 7)) << 4);
  u32 stage = base + (turn + column / H_COLUMNS) % STAGES * STAGE_BYTES;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(h[0]), "=r"(h[1]), "=r"(h[2]), "=r"(h[3])
               : "r"(stage + (in_stage ^ (column % H_COLUMNS / 8 << 4))) : "memory");
}
#endif

// ---- Products ----
// Adds the products of a tile's steps, whose stages begin with stage number `turn`, to the sums of
// warpgroup `group`. Each stage but the last is given back when it has been read.
template <bool IS_HALF>
__device__ __forceinline__ void multiply(float* acc, u32 base, int group, int turn, int steps) {
  u32 full = base + SHARED_BARRIERS, empty = full + STAGES * 8;
  int lane = threadIdx.x % 32;
  for (int step = 0; step < steps; ++step, ++turn) {
    int s = turn % STAGES;
    barrier_wait(full + s * 8, (turn / STAGES) & 1);
#if !A_BULK || PROBLEM_SUMS
    // The copies wrote through the generic proxy, the matrix unit reads through the asynchronous.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    u32 stage = base + s * STAGE_BYTES;
    u64 a_desc = descriptor(stage + group * 8192, 8192);
    u64 b_desc = descriptor(stage + A_BYTES, 8192);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < BK / 16; ++k) {
      u64 a_part = a_desc + k * (A_FIRST_IS_K ? 128 : 2), b_part = b_desc + k * (B_FIRST_IS_K ? 128 : 2);
#if HALVES
      if (IS_HALF) {
        wgmma_half(acc, a_part, b_part);
        continue;
      }
#endif
      wgmma(acc, a_part, b_part);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (step > 0 && lane < CLUSTER) barrier_arrive_at(empty + ((turn - 1) % STAGES) * 8, lane);
  }
}

// ---- The kernel ----
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(CONSUMERS + PRODUCERS, 1) hexa_grouped(
    const __grid_constant__ TensorMap b_map,
#if A_BULK
    const __grid_constant__ TensorMap a_map, const u16*,
#endif
    const u16*, const u16* __restrict__ a,
    const int* __restrict__ slots, const int* __restrict__ offsets,
#if HAS_BIAS
    const u16* __restrict__ bias,
#endif
#if HAS_GATES
    const u16* __restrict__ gates,
#endif
#if EPILOGUE == EPILOGUE_ACTIVATE_VJP
    const u16* pre_activation, float* __restrict__ gate_parts,
#endif
#if PROBLEM_SUMS && SPLIT
    float* __restrict__ parts,
#endif
#if EPILOGUE != EPILOGUE_STORE
    u16* __restrict__ out2,
#endif
    u16* out, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  u32 base = shared_address(shared);
  u32 full = base + SHARED_BARRIERS, empty = full + STAGES * 8;
  Table table;
  table.begin = (int*)(shared + SHARED_TABLE);
  table.parts = table.begin + p.num_experts + 1;
  table.order = table.parts + p.num_experts + 1;
  table.tiles = table.order + p.num_experts;
  int rank = blockIdx.x % CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + s * 8, PRODUCERS + 1);
      barrier_init(empty + s * 8, CLUSTER * CONSUMER_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  build_table(table, offsets, p);
  cluster_sync();
  int num_tiles = table.tiles[p.num_experts];
#if HALVES
  num_tiles += num_tiles - whole_pairs(num_tiles);
#endif
#if EPILOGUE == EPILOGUE_ACTIVATE
  out2 -= p.first * (p.n / (1 + GATED));
#endif

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    int producer = threadIdx.x - CONSUMERS;
    int chunk = producer & 7, line = producer >> 3;
    auto place = [&](int row) { return row * 128 + ((chunk ^ (row & 7)) << 4); };
    int turn = 0;
    for (int round = 0, index; (index = dealt(round)) < num_tiles; ++round) {
      Tile tile = find_tile(table, index, rank, p);
#if PROBLEM_SUMS
      int steps = (tile.len + BK - 1) / BK;
      int rows[BK / LINES];
#if !A_BULK
      find_rows(rows, slots, tile.first, tile.len);
#endif
#else
      int steps = ((int)p.k + BK - 1) / BK;
      u32 rows[BM / LINES];
#pragma unroll
      for (int i = 0; i < BM / LINES; ++i)
        rows[i] = line + LINES * i < tile.len
            ? source_row<A_SOURCE>(slots, tile.first + line + LINES * i) : 0;
#endif
      for (int step = 0; step < steps + H_STEPS; ++step, ++turn) {
        int s = turn % STAGES;
        if (turn >= STAGES) barrier_wait(empty + s * 8, (turn / STAGES - 1) & 1);
        u32 stage = base + s * STAGE_BYTES;
#if H_STEPS
        if (step >= steps) {
          int h_chunk = producer & 15, h_line = producer >> 4;
          int column = tile.n0 * (1 + GATED) + (step - steps) * H_COLUMNS + h_chunk * 8;
          bool valid_column = h_chunk * 8 < H_COLUMNS && column < (int)p.n * (1 + GATED);
          const u16* source = pre_activation + (u64)(tile.first + h_line) * p.h_stride + column;
#pragma unroll 8
          for (int i = 0; i < BM / (PRODUCERS / 16); ++i) {
            int row = h_line + PRODUCERS / 16 * i;
            bool valid = valid_column && row < tile.len;
            copy16(stage + row * 256 + ((h_chunk ^ (row & 7)) << 4),
                   valid ? source + (u64)(PRODUCERS / 16 * i) * p.h_stride : a, valid);
          }
          if (producer == 0) barrier_arrive(full + s * 8);
          arrive_after_copies(full + s * 8);
          continue;
        }
#endif
#if A_BULK
#if PROBLEM_SUMS
        // What follows the expert's last row must count as zero: copied by hand.
        bool in_bulk = tile.len - step * BK >= BK;
#else
        constexpr bool in_bulk = true;
#endif
        if (in_bulk) {
          if (producer == 0) {
            barrier_expect(full + s * 8, A_BYTES);
#if PROBLEM_SUMS
#pragma unroll
            for (int block = 0; block < BM / 64; ++block)
              copy_own_box(stage + block * 8192, &a_map, tile.m0 + block * 64,
                           tile.first + step * BK, 0, full + s * 8);
#else
            copy_own_box(stage, &a_map, step * BK, tile.first - (int)p.first, 0, full + s * 8);
#endif
            copy_b(stage + A_BYTES, &b_map, tile, step, rank, full + s * 8);
          }
          barrier_arrive(full + s * 8);
          continue;
        }
#endif
        if (producer == 0) copy_b(stage + A_BYTES, &b_map, tile, step, rank, full + s * 8);
#if PROBLEM_SUMS
        int valid_rows = tile.len - step * BK;
#if A_BULK
        find_rows(rows, slots, tile.first + step * BK, valid_rows);
#endif
#pragma unroll
        for (int i = 0; i < BK / LINES; ++i) {
          const u16* row = a + (u64)rows[i] * p.lda + tile.m0 + chunk * 8;
#pragma unroll
          for (int block = 0; block < BM / 64; ++block) {
            bool valid =
                line + LINES * i < valid_rows && tile.m0 + block * 64 + chunk * 8 < (int)p.m;
            copy16(stage + place(line + LINES * i) + block * 8192, valid ? row + block * 64 : a,
                   valid);
          }
        }
        if (!A_BULK && step + 1 < steps)
          find_rows(rows, slots, tile.first + (step + 1) * BK, valid_rows - BK);
#else
        int k = step * BK + chunk * 8;
        bool valid_k = k < (int)p.k;
#pragma unroll
        for (int i = 0; i < BM / LINES; ++i) {
          bool valid = valid_k && line + LINES * i < tile.len;
          copy16(stage + place(line + LINES * i), a + (valid ? (u64)rows[i] * p.lda + k : 0),
                 valid);
        }
#endif
        arrive_after_copies(full + s * 8);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int group = warp / 4;
  u32 patch = base + STAGES * STAGE_BYTES + warp * 2048;
  int turn = 0;
  for (int round = 0, index; (index = dealt(round)) < num_tiles; ++round) {
    Tile tile = find_tile(table, index, rank, p);
#if PROBLEM_SUMS
    int steps = (tile.len + BK - 1) / BK;
    bool empty_tile = tile.m0 >= (int)p.m;
#else
    int steps = ((int)p.k + BK - 1) / BK;
    bool empty_tile = tile.len == 0;
#endif
    float acc[ACCUMULATORS];
#if HAS_BIAS
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      int column = tile.n0 + j * 8 + (lane % 4) * 2;
      u32 pair = *(const u32*)(bias + (u64)tile.expert * p.bias_stride + min(column, (int)p.n - 2));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        acc[j * 4 + half * 2] = low_float(pair);
        acc[j * 4 + half * 2 + 1] = high_float(pair);
      }
    }
#else
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = 0.0f;
#endif
    // Without this the compiler makes the products wait for one another.
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#if HALVES
    if (tile.is_half) multiply<true>(acc, base, group, turn, steps);
    else multiply<false>(acc, base, group, turn, steps);
#else
    multiply<false>(acc, base, group, turn, steps);
#endif
    turn += steps;
#if H_STEPS
    for (int step = 0; step < H_STEPS; ++step)
      barrier_wait(full + (turn + step) % STAGES * 8, ((turn + step) / STAGES) & 1);
#endif
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    if (steps > 0 && lane < CLUSTER) barrier_arrive_at(empty + ((turn - 1) % STAGES) * 8, lane);

    // ---- Epilogue: 16 rows x 64 columns at a time ----
    if (!empty_tile) {
    int warp_row = group * 64 + (warp % 4) * 16;
#if HAS_GATES || EPILOGUE == EPILOGUE_ACTIVATE_VJP
    // This lane's rows of the sums.
    float gate[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = warp_row + half * 8 + lane / 4;
      gate[half] = low_float(gates[slots[tile.first + (row < tile.len ? row : 0)]]);
    }
#endif
#if !PROBLEM_SUMS
    // Rows that this lane stores: 16 bytes of every fourth.
    int rows_left = tile.len - warp_row - lane / 8;
#if OUT_SOURCE == BY_POSITION
    u64 first_row = tile.first + warp_row + lane / 8;
    auto out_row = [&](int i) { return first_row + 4 * i; };
#else
    u32 out_rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out_rows[i] = 4 * i < rows_left
          ? source_row<OUT_SOURCE>(slots, tile.first + warp_row + 4 * i + lane / 8) : 0;
    auto out_row = [&](int i) { return (u64)out_rows[i]; };
#endif
#if HALVES
    int end = tile.is_half ? min((int)p.n, tile.n0 + BN / 2) : (int)p.n;
#else
    int end = (int)p.n;
#endif
    auto store_rows = [&](u16* to, u64 stride, int width, int column) {
      column += (lane % 8) * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint4 v = patch_load(patch_chunk(patch, 4 * i + lane / 8, lane % 8));
        if (4 * i < rows_left && column < width)
          store16(to + out_row(i) * stride + column, v);
      }
    };
#endif
#if EPILOGUE == EPILOGUE_ACTIVATE_VJP
    float dot[2] = {0.0f, 0.0f};
#endif
#pragma unroll
    for (int part = 0; part < BN / 64; ++part) {
      float* sums = acc + part * 32;
      int column = tile.n0 + part * 64;
#if HALVES
      if (tile.is_half && part * 64 >= BN / 2) break;
#endif
#if PROBLEM_SUMS
#if SPLIT
      if (tile.part >= 0) {
        float* slab = parts + (u64)tile.part * p.m * p.n;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int m = tile.m0 + warp_row + half * 8 + lane / 4, n = column + j * 8 + (lane % 4) * 2;
            if (m < (int)p.m && n < (int)p.n) {
#if OUT_TRANSPOSED
              slab[(u64)n * p.m + m] = sums[j * 4 + half * 2];
              slab[(u64)(n + 1) * p.m + m] = sums[j * 4 + half * 2 + 1];
#else
              *(float2*)(slab + (u64)m * p.n + n) =
                  make_float2(sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]);
#endif
            }
          }
        }
        continue;
      }
#endif
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float* v = sums + j * 4;
#if OUT_TRANSPOSED
        patch_store_transposed(patch, j, v);
#else
        patch_store(patch, j, v);
#endif
      }
      __syncwarp();
      u16* result = out + (u64)tile.expert * p.out_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#if OUT_TRANSPOSED
        int row = 16 * i + lane / 2, n = column + row, m = tile.m0 + warp_row + (lane % 2) * 8;
        uint4 v = patch_load(patch_chunk_transposed(patch, row, lane % 2));
        if (n < (int)p.n && m < (int)p.m) store16(result + (u64)n * p.m + m, v);
#else
        int row = 4 * i + lane / 8, m = tile.m0 + warp_row + row, n = column + (lane % 8) * 8;
        uint4 v = patch_load(patch_chunk(patch, row, lane % 8));
        if (n < (int)p.n && m < (int)p.m) store16(result + (u64)m * p.n + n, v);
#endif
      }
#elif EPILOGUE == EPILOGUE_STORE || EPILOGUE == EPILOGUE_ACTIVATE
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float* v = sums + j * 4;
#if HAS_GATES
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] *= gate[(i >> 1) & 1];
#endif
        patch_store(patch, j, v);
      }
      __syncwarp();
      store_rows(out, p.n, end, column);
      __syncwarp();
#if EPILOGUE == EPILOGUE_ACTIVATE && !GATED
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float act[8], slope;
#pragma unroll
        for (int i = 0; i < 8; ++i) activate(sums[j * 4 + i], act[i], slope);
        patch_store(patch, j, act);
      }
      __syncwarp();
      store_rows(out2, p.n, end, column);
      __syncwarp();
#elif EPILOGUE == EPILOGUE_ACTIVATE
      // Two neighbouring columns make one.
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float value, slope;
          activate(sums[j * 4 + half * 2], value, slope);
          value *= sums[j * 4 + half * 2 + 1];
          u32 at = patch_chunk(patch, half * 8 + lane / 4, j / 2) + (j % 2) * 8 + (lane % 4) * 2;
          asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"((u16)pack(value, 0.0f)) : "memory");
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (lane % 8 < 4) {
          uint4 v = patch_load(patch_chunk(patch, 4 * i + lane / 8, lane % 8));
          int at = column / 2 + (lane % 8) * 8;
          if (4 * i < rows_left && at < (int)p.n / 2)
            store16(out2 + out_row(i) * (p.n / 2) + at, v);
        }
      }
      __syncwarp();
#endif
#elif !GATED
      u32 weighted[16];
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        // Beside saving work, branches keep the compiler from doing all columns at one time, for which
        // it has no registers.
        if (column + j * 8 < (int)p.n) {
          u32 h[4], to_h[4];
          ring_h(h, base, turn, warp_row, part * 64 + j * 8);
          activate_vjp(sums + j * 4, h, gate, dot, to_h, weighted + j * 2);
          patch_store_pairs(patch, j, to_h);
        }
      }
      __syncwarp();
      store_rows(out, p.h_stride, end, column);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 2) patch_store_pairs(patch, j, weighted + j * 2);
      __syncwarp();
      store_rows(out2, p.n, end, column);
      __syncwarp();
#else
      // Two columns of the pre-activation for each one of the sums.
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float* v = sums + j * 4;
        u32 h[4];
        ring_h(h, base, turn, warp_row, part * 128 + j * 16);
        // h holds pairs (gate, up) of the sums' columns 8 * j + lane % 4 and 4 columns on. Those
        // sums are with lane c / 2 of this lane's quad, as its element c % 2; lanes exchange them.
        int quad = lane & ~3, q = lane % 4;
        u32 pairs[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weighted[2];
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            int from = quad + 2 * block + q / 2;
            float even = __shfl_sync(~0u, v[half * 2], from);
            float odd = __shfl_sync(~0u, v[half * 2 + 1], from);
            float value, slope, grad = q % 2 ? odd : even;
            u32 pair = h[half + 2 * block];
            float up = high_float(pair);
            activate(low_float(pair), value, slope);
            float product = value * up;
            dot[half] = fmaf(grad, product, dot[half]);
            weighted[block] = gate[half] * product;
            grad *= gate[half];
            pairs[half + 2 * block] = pack(grad * up * slope, grad * value);
          }
          // Back to where the sums were.
          int first = quad + 2 * q % 4, second = quad + (2 * q + 1) % 4;
          float a0 = __shfl_sync(~0u, weighted[0], first);
          float a1 = __shfl_sync(~0u, weighted[0], second);
          float b0 = __shfl_sync(~0u, weighted[1], first);
          float b1 = __shfl_sync(~0u, weighted[1], second);
          v[half * 2] = q < 2 ? a0 : b0;
          v[half * 2 + 1] = q < 2 ? a1 : b1;
        }
        patch_store_pairs(patch, j % 4 * 2, pairs);
        if (j % 4 == 3) {
          __syncwarp();
          store_rows(out, p.h_stride, 2 * p.n, 2 * column + (j / 4) * 64);
          __syncwarp();
        }
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float* v = sums + j * 4;
        patch_store(patch, j, v);
      }
      __syncwarp();
      store_rows(out2, p.n, end, column);
      __syncwarp();
#endif
    }
#if EPILOGUE == EPILOGUE_ACTIVATE_VJP
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dot[half] += __shfl_xor_sync(~0u, dot[half], 1);
      dot[half] += __shfl_xor_sync(~0u, dot[half], 2);
      if (lane % 4 == 0 && warp_row + half * 8 + lane / 4 < tile.len)
        gate_parts[(u64)(tile.n0 / BN) * p.num_slots + tile.first + warp_row + half * 8 +
                   lane / 4] = dot[half];
    }
#endif
    }
#if H_STEPS
    __syncwarp();
    for (int step = 0; step < H_STEPS; ++step, ++turn)
      if (lane < CLUSTER) barrier_arrive_at(empty + turn % STAGES * 8, lane);
#endif
  }
  }
  cluster_sync();  // a cube must not end while the other one's copies and arrivals reach it
}
