// ROWS of grouped.cu for summed widths that fit into shared memory, with the two epilogues that have
// an activation.
//
// The 128 rows of a stay in shared memory while the columns of b pass by, in tiles of BN, through a
// ring of stages. Two teams of two warpgroups multiply in turn, each every second column tile, so
// that one's epilogue runs beside the other's products. In the ring of grouped.cu the matrix unit
// stands still during epilogues; with few steps to a tile, as here, that is most of the time.
//
// Cubes share nothing, as in pairs each would wait for the other's teams, too. A row tile's column tiles
// are worked on in segments, dealt out one after the other, so that what runs at one time shares an
// expert's b in the cache; each begins with its rows of a, which are copied while the last one's
// products end.
//
// Definitions in front of this text, beside those of operands.cu: STAGES, STEPS (stages' depths in
// the summed width), the registers per thread, wgmma(), A_SOURCE, EPILOGUE, HAS_BIAS, IS_F16, and
// SUMS_BIAS (EPILOGUE_ACTIVATE_VJP: bias_parts are wanted, sums of `out` over 16 rows each).

#define BM 128
#define TEAM 256  // threads that multiply one column tile, each warpgroup 64 rows
#define CONSUMERS (2 * TEAM)
#define WARPS_OF_B 2  // producing warps before those that copy a; the first copies b
#define PRODUCERS_OF_A 64
#define LINES (PRODUCERS_OF_A / 8)  // rows that they copy 128 bytes of at a time
#define A_STEP_BYTES (BM * BK * 2)
#define PATCH 2048  // 16 rows of 64 columns, of each warp
#define SEGMENT_BYTES 24
// Dynamic shared memory: a's steps, the stages of b, patches, two segments' gate weights, barriers,
// multiplying warps' segments, and the table.
#define SHARED_STAGES (STEPS * A_STEP_BYTES)
#define SHARED_PATCHES (SHARED_STAGES + STAGES * B_BYTES)
#define SHARED_GATES (SHARED_PATCHES + PATCH * (CONSUMERS / 32))
#define SHARED_BARRIERS (SHARED_GATES + 2 * BM * 4)
#define SHARED_SEGMENTS (SHARED_BARRIERS + STAGES * 16 + STEPS * 24)
#define SHARED_TABLE (SHARED_SEGMENTS + SEGMENT_BYTES * (CONSUMERS / 32))

#define IS_VJP (EPILOGUE == EPILOGUE_ACTIVATE_VJP)

// ---- Where tiles lie ----
// In shared memory: a head, then the experts.
struct Head {
  int segments, chunks;  // of all experts, of one row tile
  int whole;             // segments before those of the last round that are halved
};
struct Entry {
  int begin, tiles;  // an expert's first position in the window; row tiles before its own
};

// Column tiles from `start` on of a cube's rows.
struct Segment {
  int expert, first, len;  // rows
  int start, tiles;        // column tiles
  bool exists, is_last;
};
static_assert(sizeof(Segment) == SEGMENT_BYTES, "shared memory has room for segments");

__device__ __forceinline__ void build_table(u8* shared, const int* offsets, const Params& p) {
  Head* head = (Head*)(shared + SHARED_TABLE);
  Entry* entries = (Entry*)(head + 1);
  int experts = (int)p.num_experts;
  if (threadIdx.x < 32) {
    int lane = threadIdx.x, sum = 0;
    for (int base = 0; base <= experts; base += 32) {
      int e = base + lane, begin = e <= experts ? window_begin(offsets, e, p) : 0;
      int end = e < experts ? window_begin(offsets, e + 1, p) : begin;
      int tiles = (end - begin + BM - 1) / BM, before = tiles;
      for (int step = 1; step < 32; step *= 2) {
        int left = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += left;
      }
      if (e <= experts) entries[e] = {begin, sum + before - tiles};
      sum += __shfl_sync(~0u, before, 31);
    }
    int n_tiles = ((int)p.n + BN - 1) / BN, chunks = (n_tiles + (int)p.chunk - 1) / (int)p.chunk;
    if (lane == 0) {
      // If no more than half of the cubes would have a last segment, twice as many get half of one,
      // where both teams have a tile in each half, or one has in the row's last.
      int segments = sum * chunks, rest = segments % (int)gridDim.x;
      int chunk = (int)p.chunk, last = n_tiles % chunk;
      bool halves = 2 * rest <= (int)gridDim.x && chunk >= 4 && chunk % 2 == 0 &&
                    (last == 0 || last > chunk / 2);
      *head = {halves ? segments + rest : segments, chunks, halves ? segments - rest : segments};
    }
  }
  __syncthreads();
}

__device__ __forceinline__ u32 thread_index() {
  u32 index; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index)); return index;
}

// This cube's segment number `turn`.
__device__ __forceinline__ Segment find_segment(u8* shared, int turn, const Params& p) {
  u32 cube, cubes;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cube));
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(cubes));
  volatile Head* head = (volatile Head*)(shared + SHARED_TABLE);
  volatile Entry* entries = (volatile Entry*)(head + 1);
  int segments = head->segments, chunks = head->chunks, whole = head->whole;
  int index = turn * cubes + cube;
  Segment segment;
  segment.exists = index < segments;
  segment.is_last = index + (int)cubes >= segments;
  int len = (int)p.chunk, half = 0;
  if (index >= whole) {
    len /= 2;
    half = (index - whole) % 2;
    index = whole + (index - whole) / 2;
  }
  int tile = index / chunks, low = 0, high = (int)p.num_experts;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (entries[middle].tiles <= tile) low = middle; else high = middle;
  }
  segment.expert = __shfl_sync(~0u, low, 0);
  int first = entries[low].begin + (tile - entries[low].tiles) * BM;
  segment.first = __shfl_sync(~0u, first, 0);
  segment.len = __shfl_sync(~0u, min(BM, entries[low + 1].begin - first), 0);
  int start = index % chunks * (int)p.chunk + half * len;
  segment.start = __shfl_sync(~0u, start, 0);
  segment.tiles = __shfl_sync(~0u, min(len, ((int)p.n + BN - 1) / BN - start), 0);
  return segment;
}

__device__ __forceinline__ void keep(volatile Segment& to, const Segment& from) {
  to.expert = from.expert; to.first = from.first; to.len = from.len;
  to.start = from.start; to.tiles = from.tiles;
  to.is_last = from.is_last;
}

// ---- The kernel ----
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1) hexa_grouped(
    const __grid_constant__ TensorMap b_map, const u16*, const u16* __restrict__ a,
    const int* __restrict__ slots, const int* __restrict__ offsets,
#if HAS_BIAS
    const u16* __restrict__ bias,
#endif
#if IS_VJP
    const u16* __restrict__ gates, const u16* pre_activation, float* __restrict__ gate_parts,
#endif
#if SUMS_BIAS
    float* __restrict__ bias_parts,
#endif
    u16* __restrict__ out2, u16* out, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  u32 base = shared_address(shared);
  u32 full = base + SHARED_BARRIERS, empty = full + STAGES * 8;
  u32 a_full = empty + STAGES * 8, a_empty = a_full + STEPS * 8;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, TEAM / 32);
    }
    for (int s = 0; s < STEPS; ++s) {
      // The first step's arrivals announce the gate weights, too.
      barrier_init(a_full + s * 8, PRODUCERS_OF_A * (s == 0 && IS_VJP ? 2 : 1));
      for (int team = 0; team < 2; ++team)
        barrier_init(a_empty + (team * STEPS + s) * 8, TEAM / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  build_table(shared, offsets, p);
#if !IS_VJP
  out2 -= p.first * p.n;
#endif

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    int warp = (threadIdx.x - CONSUMERS) / 32;
    if (warp == 0) {
      int turn = 0;
      for (int number = 0;; ++number) {
        Segment segment = find_segment(shared, number, p);
        if (!segment.exists) break;
        if (threadIdx.x % 32 == 0) {
          for (int tile = segment.start; tile < segment.start + segment.tiles; ++tile) {
            for (int step = 0; step < STEPS; ++step, ++turn) {
              int s = turn % STAGES;
              if (turn >= STAGES) barrier_wait(empty + s * 8, (turn / STAGES - 1) & 1);
              barrier_arrive_expecting(full + s * 8, B_BYTES);
              for (int half = 0; half < 2; ++half)
                copy_half_of_b<false>(base + SHARED_STAGES + s * B_BYTES, &b_map, tile * BN,
                                      step * BK, segment.expert, half, full + s * 8);
            }
          }
        }
        __syncwarp();
      }
    } else if (warp >= WARPS_OF_B) {
      int producer = threadIdx.x - CONSUMERS - 32 * WARPS_OF_B;
      int chunk = producer & 7, line = producer >> 3;
      for (int number = 0;; ++number) {
        Segment segment = find_segment(shared, number, p);
        if (!segment.exists) break;
        u32 source[BM / LINES];
#pragma unroll
        for (int i = 0; i < BM / LINES; ++i) {
          int position = segment.first + line + LINES * i;
          source[i] = line + LINES * i < segment.len
              ? source_row<A_SOURCE>(slots, position) - (A_SOURCE == BY_POSITION ? (int)p.first : 0)
              : 0;
        }
#if IS_VJP
        // Of the two segments' places this one's is free: the teams have begun the last segment.
        float gate[BM / PRODUCERS_OF_A];
#pragma unroll
        for (int i = 0; i < BM / PRODUCERS_OF_A; ++i) {
          int row = producer + i * PRODUCERS_OF_A;
          gate[i] = row < segment.len ? low_float(gates[slots[segment.first + row]]) : 0.0f;
        }
#endif
        for (int step = 0; step < STEPS; ++step) {
          if (number > 0) {
            for (int team = 0; team < 2; ++team)
              barrier_wait(a_empty + (team * STEPS + step) * 8, (number - 1) & 1);
          }
#if IS_VJP
          if (step == 0) {
            float* places = (float*)(shared + SHARED_GATES) + number % 2 * BM + producer;
#pragma unroll
            for (int i = 0; i < BM / PRODUCERS_OF_A; ++i) places[i * PRODUCERS_OF_A] = gate[i];
            barrier_arrive(a_full);
          }
#endif
          int k = step * BK + chunk * 8;
#pragma unroll
          for (int i = 0; i < BM / LINES; ++i) {
            int row = line + LINES * i;
            bool valid = k < (int)p.k && row < segment.len;
            copy16(base + step * A_STEP_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4),
                   a + (valid ? (u64)source[i] * p.lda + k : 0), valid);
          }
          arrive_after_copies(a_full + step * 8);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
  auto team = [] { return (int)(thread_index() / TEAM); };
  auto own_a_empty = [&](int step) { return a_empty + (team() * STEPS + step) * 8; };
  int before = 0;  // column tiles that this cube is done with
  for (int number = 0;; ++number) {
    // Read from shared memory wherever it is used: there are no registers for it, and what the
    // compiler would keep in local memory takes ten times as long to come back.
    volatile Segment& rows = ((volatile Segment*)(shared + SHARED_SEGMENTS))[thread_index() / 32];
    Segment found = find_segment(shared, number, p);
    if (!found.exists) break;
    __syncwarp();
    if (thread_index() % 32 == 0) keep(rows, found);
    __syncwarp();
    // Shuffled, so that the compiler sees that it is the same for all lanes.
    int own = __shfl_sync(~0u, (before + team()) & 1, 0);
    if (own >= rows.tiles && thread_index() % 32 < STEPS)
      barrier_arrive(own_a_empty(thread_index() % 32));
    for (bool first = true; own < rows.tiles; own += 2, first = false) {
      int n0 = (rows.start + own) * BN;
      bool last = own + 2 >= rows.tiles;
      int warp = __shfl_sync(~0u, thread_index() / 32, 0), lane = thread_index() % 32;
      int warp_row = warp % (TEAM / 32) * 16;
      u32 patches = base + SHARED_PATCHES + warp * PATCH;
#if IS_VJP
      // Pre-activations come into the patch, half of the columns at a time.
      auto load_h = [&](int part) {
        int column = n0 + part * 64 + lane % 8 * 8;
        int row = warp_row + lane / 8;
        asm volatile("" : "+r"(row));
        const u16* source = pre_activation + rows.first * p.h_stride;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          bool valid = column < (int)p.n && row + 4 * i < rows.len;
          u32 offset = (row + 4 * i) * (u32)p.h_stride + column;
          copy16(patch_chunk(patches, 4 * i + lane / 8, lane % 8),
                 source + (valid ? offset : 0), valid);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
      };
      if (warp_row < rows.len) {
        load_h(0);
        // The other half is brought near.
        int row = warp_row + lane % 16, column = n0 + 64;
        if (row < rows.len && column < (int)p.n)
          asm volatile("prefetch.global.L2 [%0];" ::"l"(
              pre_activation + (u64)(rows.first + row) * p.h_stride + column));
      }
#endif
      float acc[BN / 2];
#if HAS_BIAS
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        int column = n0 + j * 8 + (lane % 4) * 2;
        u32 pair = *(const u32*)(bias + (u64)rows.expert * p.bias_stride +
                                 min(column, (int)p.n - 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          acc[j * 4 + half * 2] = low_float(pair);
          acc[j * 4 + half * 2 + 1] = high_float(pair);
        }
      }
#else
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) acc[i] = 0.0f;
#endif
      // Without this the compiler makes the products wait for one another.
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
      // The other team has waited for all of b before this tile's. Without that, parities would not
      // tell a stage's second filling from none.
      if (before + own > 0)
        asm volatile("bar.sync %0, %1;" ::"r"(1 + team()), "n"(CONSUMERS) : "memory");
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      int turn = (before + own) * STEPS;
      u32 s = turn % STAGES, parity = turn / STAGES & 1;
      u32 a_words = descriptor_words(base + warp_row / 64 * 8192, 8192);
      u32 b_words = descriptor_words(base + SHARED_STAGES, 8192);
      u32 last_stage = 0;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        if (first) {
          barrier_wait(a_full + step * 8, number & 1);
          // a was copied through the generic proxy, the matrix unit reads through the asynchronous.
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        barrier_wait(full + s * 8, parity);
        u32 a_step = a_words + step * (A_STEP_BYTES >> 4), b_step = b_words + s * (B_BYTES >> 4);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < BK / 16; ++k)
          wgmma(acc, descriptor_of(a_step + k * 2),
                descriptor_of(b_step + k * (B_FIRST_IS_K ? 128 : 2)));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0) {
          if (lane == 0) barrier_arrive(empty + last_stage * 8);
          else if (last && lane == 1) barrier_arrive(own_a_empty(step - 1));
        }
        last_stage = s;
        s = s + 1 == STAGES ? 0 : s + 1;
        parity ^= s == 0;
      }
      if (!rows.is_last || own + 1 < rows.tiles)
        asm volatile("bar.arrive %0, %1;" ::"r"(2 - team()), "n"(CONSUMERS) : "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
      if (lane == 0) barrier_arrive(empty + last_stage * 8);
      else if (last && lane == 1) barrier_arrive(own_a_empty(STEPS - 1));

      // ---- Epilogue: 16 rows x 64 columns at a time ----
      if (warp_row >= rows.len) continue;
      lane = thread_index() % 32;
#if IS_VJP
      // Gate weights of this lane's rows of the sums.
      volatile float* places =
          (volatile float*)(shared + SHARED_GATES) + number % 2 * BM + warp_row + lane / 4;
      float gate[2] = {places[0], places[8]};
#endif
      // Rows that this lane stores: 16 bytes of every fourth.
      int rows_left = rows.len - warp_row - lane / 8;
      auto store_rows = [&](u32 patch, u16* to, u32 stride, int column) {
        // Hidden from the compiler, which would compute all addresses once, and has no registers
        // for them.
        u32 place = lane;
        asm volatile("" : "+r"(place), "+r"(patch));
        column += place % 8 * 8;
        u16* corner = to + rows.first * (u64)stride + (warp_row + place / 8) * stride + column;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint4 v = patch_load(patch_chunk(patch, 4 * i + place / 8, place % 8));
          if (4 * i < rows_left && column < (int)p.n) store16(corner + 4 * i * stride, v);
        }
        __syncwarp();
      };
#if IS_VJP
      float dot[2] = {0.0f, 0.0f};
#endif
#pragma unroll
      for (int part = 0; part < BN / 64; ++part) {
        float* sums = acc + part * 32;
        u32 patch = patches;
        asm volatile("" : "+r"(patch));
        int column = n0 + part * 64;
#if IS_VJP
        u32 weighted[16];
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          // Beside saving work, branches keep the compiler from doing all columns at one time, for
          // which it has no registers.
          if (column + j * 8 < (int)p.n) {
            float* v = sums + j * 4;
            u32 h[4];
            patch_load_pairs(patch, j, h);
            u32 to_h[4];
            activate_vjp(v, h, gate, dot, to_h, weighted + j * 2);
            patch_store_pairs(patch, j, to_h);
          }
        }
        __syncwarp();
#if SUMS_BIAS
        // Sums over these 16 rows, by products with ones.
        float* sums_of_rows = bias_parts +
            ((u64)(rows.first / BM + rows.expert) * (BM / 16) + warp_row / 16) * p.n;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          float two[2][4];
          sum_rows(patch, j, two);
          int at = column + (j + lane / 4) * 8 + lane % 4 * 2;
          if (lane < 8 && at < (int)p.n)
            *(float2*)(sums_of_rows + at) = lane < 4 ? make_float2(two[0][0], two[0][1])
                                                     : make_float2(two[1][0], two[1][1]);
        }
#endif
        store_rows(patch, out, p.h_stride, column);
#pragma unroll
        for (int j = 0; j < 8; j += 2) patch_store_pairs(patch, j, weighted + j * 2);
        __syncwarp();
        store_rows(patch, out2, p.n, column);
        if (part == 0) load_h(1);
#else
#pragma unroll
        for (int j = 0; j < 8; j += 2) patch_store(patch, j, sums + j * 4);
        __syncwarp();
        store_rows(patch, out, p.n, column);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          float act[8], slope;
#pragma unroll
          for (int i = 0; i < 8; ++i) activate(sums[j * 4 + i], act[i], slope);
          patch_store(patch, j, act);
        }
        __syncwarp();
        store_rows(patch, out2, p.n, column);
#endif
      }
#if IS_VJP
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dot[half] += __shfl_xor_sync(~0u, dot[half], 1);
        dot[half] += __shfl_xor_sync(~0u, dot[half], 2);
        if (lane % 4 == 0 && warp_row + half * 8 + lane / 4 < rows.len)
          gate_parts[(u64)(n0 / BN) * p.num_slots + rows.first + warp_row + half * 8 + lane / 4] =
              dot[half];
      }
#endif
    }
    before += rows.tiles;
  }
  }
}
