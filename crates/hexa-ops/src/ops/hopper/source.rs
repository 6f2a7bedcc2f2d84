//! The kernels' CUDA source: definitions for one variant, then the common text.

use crate::types::{Activation, RowOrder};

/// Text of what the matrix products are made of.
const INSTRUCTIONS: &str = include_str!("instructions.cu");

/// Text that both forms of the matrix products share.
const OPERANDS: &str = include_str!("operands.cu");

/// Text of the matrix products whose operands both pass through a ring.
const GROUPED: &str = include_str!("grouped.cu");

/// Text of the matrix products with rows that stay.
const STATIONARY: &str = include_str!("stationary.cu");

/// Text of the small kernels.
const FINISH: &str = include_str!("finish.cu");

/// Cubes that share their columns, one tile below the other.
pub(super) const CLUSTER: usize = 2;

/// Rows of a tile that a warpgroup multiplies.
const GROUP_ROWS: usize = 64;

/// Threads of a warpgroup.
const GROUP_THREADS: usize = 128;

/// Threads of a cube of the small kernels.
pub(super) const FINISH_THREADS: u32 = 256;

/// Rows and columns of the results that a warp passes through shared memory at a time.
const PATCH_BYTES: usize = 16 * 64 * 2;

/// Bytes in which a warp keeps what it needs to know of its segment, where rows stay.
const SEGMENT_BYTES: usize = 24;

/// Most experts that the kernels' shared memory has room for.
pub(super) const MAX_EXPERTS: usize = 512;

/// Bytes of shared memory that a cube may use.
const SHARED_BYTES: usize = 232_448;

/// Most stages that pay.
const MAX_STAGES: usize = 6;

/// Summed elements of a stage.
pub(super) const STAGE_DEPTH: usize = 64;

/// Changes whenever the text does, so that a cache of compiled kernels cannot serve an older one.
pub(super) const TEXT_HASH: u64 = {
    let hash = fnv1a(INSTRUCTIONS.as_bytes(), FNV_OFFSET);
    let hash = fnv1a(GROUPED.as_bytes(), fnv1a(OPERANDS.as_bytes(), hash));
    fnv1a(FINISH.as_bytes(), fnv1a(STATIONARY.as_bytes(), hash))
};

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

const fn fnv1a(bytes: &[u8], mut hash: u64) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}

/// What becomes of a tile's sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Epilogue {
    /// Bias, gate weight, store.
    Store,
    /// Bias, store; activate, store.
    Activate(Activation),
    /// The activation's gradient.
    ActivateVjp {
        /// Which activation.
        activation: Activation,
        /// Whether sums of the pre-activation's gradient over [`SLAB_ROWS`] rows each are left, too.
        /// Only with rows that stay.
        sums_bias: bool,
    },
}

impl Epilogue {
    /// Its activation, if it has one.
    pub(super) fn activation(&self) -> Option<Activation> {
        match *self {
            Epilogue::Store => None,
            Epilogue::Activate(activation) | Epilogue::ActivateVjp { activation, .. } => {
                Some(activation)
            }
        }
    }
}

/// Which product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Problem {
    /// ESMM: rows times the expert's matrix.
    Rows {
        /// Order of the results' rows.
        out: RowOrder,
        /// Whether the matrices are stored `[out, in]`.
        transposed: bool,
        /// What becomes of the sums.
        epilogue: Epilogue,
    },
    /// ESTMM: sums over an expert's rows.
    Sums {
        /// Whether the result is stored `[b's width, a's width]`.
        out_transposed: bool,
        /// Whether long sums are cut into parts.
        split: bool,
    },
}

/// Rows whose sum is a slab of partial sums.
pub(super) const SLAB_ROWS: usize = 16;

/// Rows of the tiles by which slabs are counted.
pub(super) const SLAB_TILE_ROWS: usize = STATIONARY_TILE.rows;

/// The tile of rows that stay.
pub(super) const STATIONARY_TILE: Tile = Tile::new(128, 128);

/// Extent of the part of a result that a cube computes at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    /// 128 or 192, of which each multiplying warpgroup has 64.
    pub(super) rows: usize,
    /// 128, 192 or 256; 256 only with 128 rows, as sums are held in registers.
    pub(super) columns: usize,
}

impl Tile {
    pub(super) const fn new(rows: usize, columns: usize) -> Self {
        Self { rows, columns }
    }

    /// Whether plain products halve tiles like this in a last round that few clusters would have.
    pub(super) fn halves(&self) -> bool {
        self.columns >= 192
    }
}

/// How operands come to the matrix units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Schedule {
    /// Both pass through a ring of stages (`grouped.cu`).
    Ring,
    /// Rows stay in shared memory while a segment's columns pass by (`stationary.cu`). The tile is
    /// [`STATIONARY_TILE`].
    Stationary {
        /// Stages' depths in the summed width.
        steps: usize,
    },
}

/// One compiled matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub(super) tile: Tile,
    pub(super) schedule: Schedule,
    /// Order of the rows of `a`.
    pub(super) a: RowOrder,
    pub(super) problem: Problem,
    pub(super) top_k: usize,
    pub(super) has_bias: bool,
    pub(super) has_gates: bool,
    pub(super) is_f16: bool,
    /// Number of experts, for the shared memory's size.
    pub(super) num_experts: usize,
}

impl Variant {
    /// Whether the rows of `a` lie as the kernel reads them, so that nothing need be gathered.
    pub(super) fn copies_in_bulk(&self) -> bool {
        self.a == RowOrder::Expert && self.schedule == Schedule::Ring
    }

    /// Warpgroups that multiply: one for each 64 rows of a tile, and where rows stay two teams of them.
    fn groups(&self) -> usize {
        let teams = match self.schedule {
            Schedule::Ring => 1,
            Schedule::Stationary { .. } => 2,
        };
        teams * self.tile.rows / GROUP_ROWS
    }

    /// Threads of a cube: those that multiply, and one warpgroup that copies.
    pub(super) fn threads(&self) -> usize {
        (self.groups() + 1) * GROUP_THREADS
    }

    /// Registers of a thread that copies and of one that multiplies: together at most the 65,536
    /// that a multiprocessor has, of which each thread begins with an equal share in multiples of 8.
    fn registers(&self) -> (usize, usize) {
        match self.groups() {
            2 => (88, 208),
            3 => (56, 152),
            _ => (64, 104),
        }
    }

    /// Bytes of a stage and its barriers.
    fn stage_bytes(&self) -> usize {
        let rows = match self.schedule {
            Schedule::Ring => self.tile.rows,
            Schedule::Stationary { .. } => 0,
        };
        (rows + self.tile.columns) * STAGE_DEPTH * 2 + 16
    }

    /// Bytes of shared memory beside the stages: a patch for each multiplying warp and the table of
    /// tiles; rows that stay with their barriers, two segments' gate weights, and warps' segments.
    fn other_bytes(&self) -> usize {
        let warps = self.groups() * GROUP_THREADS / 32;
        match self.schedule {
            Schedule::Ring => {
                let table = 4 * (4 * self.num_experts + 3);
                warps * PATCH_BYTES + table.next_multiple_of(1024)
            }
            Schedule::Stationary { steps } => {
                let table = 12 + 8 * (self.num_experts + 1);
                let gates = 2 * 4 * self.tile.rows;
                let rows = steps * (self.tile.rows * STAGE_DEPTH * 2 + 24);
                let own = PATCH_BYTES + SEGMENT_BYTES;
                warps * own + gates + rows + table.next_multiple_of(256)
            }
        }
    }

    /// Stages that fit into the shared memory.
    fn stages(&self) -> usize {
        ((SHARED_BYTES - self.other_bytes()) / self.stage_bytes()).min(MAX_STAGES)
    }

    /// Bytes of dynamic shared memory.
    pub(super) fn shared_bytes(&self) -> usize {
        self.stages() * self.stage_bytes() + self.other_bytes()
    }

    /// The whole text.
    pub(super) fn text(&self) -> String {
        let mut defines = Defines::default();
        let is_sums = matches!(self.problem, Problem::Sums { .. });
        let first_is_k = |transposed: bool| usize::from(is_sums || !transposed);
        let (producer_registers, consumer_registers) = self.registers();
        let (out, transposed, epilogue, out_transposed, split) = match self.problem {
            Problem::Rows {
                out,
                transposed,
                epilogue,
            } => (out, transposed, epilogue, false, false),
            Problem::Sums {
                out_transposed,
                split,
            } => (
                RowOrder::Expert,
                false,
                Epilogue::Store,
                out_transposed,
                split,
            ),
        };
        let activation = epilogue.activation().unwrap_or(Activation::Relu);
        let (epilogue, sums_bias) = match epilogue {
            Epilogue::Store => (0, false),
            Epilogue::Activate(_) => (1, false),
            Epilogue::ActivateVjp { sums_bias, .. } => (2, sums_bias),
        };
        let (grouped, steps) = match self.schedule {
            Schedule::Ring => (GROUPED, 0),
            Schedule::Stationary { steps } => (STATIONARY, steps),
        };
        defines
            .add("BN", self.tile.columns)
            .add("STAGES", self.stages())
            .add("STEPS", steps)
            .add("SUMS_BIAS", usize::from(sums_bias))
            .add("PRODUCER_REGISTERS", producer_registers)
            .add("CONSUMER_REGISTERS", consumer_registers)
            .add("TOP_K", self.top_k)
            .add("PROBLEM_SUMS", usize::from(is_sums))
            .add("A_SOURCE", source_number(self.a))
            .add("A_BULK", usize::from(self.copies_in_bulk()))
            .add("B_TRANSPOSED", usize::from(transposed))
            .add("OUT_SOURCE", source_number(out))
            .add("OUT_TRANSPOSED", usize::from(out_transposed))
            .add("SPLIT", usize::from(split))
            .add("EPILOGUE", epilogue)
            .add("ACTIVATION", activation_number(activation))
            .add("GATED", usize::from(activation.is_gated()))
            .add("HAS_BIAS", usize::from(self.has_bias))
            .add("HAS_GATES", usize::from(self.has_gates))
            .add("IS_F16", usize::from(self.is_f16))
            .add("A_FIRST_IS_K", usize::from(is_sums))
            .add("B_FIRST_IS_K", first_is_k(transposed));
        let wgmma = [("wgmma", 1), ("wgmma_half", 2)].map(|(name, parts)| {
            wgmma(
                name,
                self.tile.columns / parts,
                usize::from(is_sums),
                first_is_k(transposed),
                self.is_f16,
            )
        });
        if self.schedule == Schedule::Ring {
            defines.add("BM", self.tile.rows);
        }
        defines.0 + &wgmma.concat() + INSTRUCTIONS + OPERANDS + grouped
    }
}

/// Text of the small kernels.
pub(super) fn finish_text(is_f16: bool, top_k: usize) -> String {
    let mut defines = Defines::default();
    defines
        .add("IS_F16", usize::from(is_f16))
        .add("TOP_K", top_k)
        .add("SLAB_ROWS", SLAB_ROWS)
        .add("TILE_SLABS", SLAB_TILE_ROWS / SLAB_ROWS);
    defines.0 + FINISH
}

/// Preprocessor definitions.
#[derive(Default)]
struct Defines(String);

impl Defines {
    fn add(&mut self, name: &str, value: usize) -> &mut Self {
        self.0 += &format!("#define {name} {value}\n");
        self
    }
}

/// `BY_POSITION`, `BY_SLOT` or `BY_TOKEN` of the text.
fn source_number(order: RowOrder) -> usize {
    match order {
        RowOrder::Expert => 0,
        RowOrder::Slot => 1,
        RowOrder::Token => 2,
    }
}

/// `GELU`, `GELU_TANH`, `RELU` or `SILU` of the text.
fn activation_number(activation: Activation) -> usize {
    match activation {
        Activation::Gelu | Activation::GeGlu => 0,
        Activation::GeluTanh => 1,
        Activation::Relu => 2,
        Activation::Silu | Activation::SwiGlu => 3,
    }
}

/// A function `name` around one instruction, `d += a · b` for 64 rows, `columns` columns and a depth of
/// 16. `a_first_is_k` and `b_first_is_k` say that the operand is stored with the summed dimension
/// first.
fn wgmma(
    name: &str,
    columns: usize,
    a_first_is_k: usize,
    b_first_is_k: usize,
    is_f16: bool,
) -> String {
    let count = columns / 2;
    let list = |item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
    let registers = list(&|i| format!("%{i}"));
    let operands = list(&|i| format!("\"+f\"(d[{i}])"));
    let dtype = if is_f16 { "f16" } else { "bf16" };
    format!(
        "__device__ __forceinline__ void {name}(float* d, unsigned long long a, unsigned long long b) {{\n\
         asm volatile(\"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} \
         {{{registers}}}, %{count}, %{b}, 1, 1, 1, {a_first_is_k}, {b_first_is_k};\" \
         : {operands} : \"l\"(a), \"l\"(b));\n}}\n",
        b = count + 1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variant(rows: usize, columns: usize, num_experts: usize) -> Variant {
        Variant {
            tile: Tile { rows, columns },
            schedule: Schedule::Ring,
            a: RowOrder::Token,
            problem: Problem::Sums {
                out_transposed: true,
                split: true,
            },
            top_k: 2,
            has_bias: false,
            has_gates: false,
            is_f16: false,
            num_experts,
        }
    }

    #[test]
    fn shared_memory_suffices_for_the_most_experts() {
        for (rows, columns, stages) in [
            (128, 128, 6),
            (128, 192, 5),
            (128, 256, 4),
            (192, 128, 4),
            (192, 192, 4),
        ] {
            let variant = variant(rows, columns, MAX_EXPERTS);
            assert_eq!(variant.stages(), stages, "{rows} {columns}");
            assert!(variant.shared_bytes() <= SHARED_BYTES, "{rows} {columns}");
        }
    }

    #[test]
    fn few_experts_leave_room_for_more_stages() {
        let stages = [128, 192, 256].map(|columns| variant(128, columns, 8).stages());
        assert_eq!(stages, [6, 5, 4]);
    }

    #[test]
    fn rows_that_stay_leave_room_for_stages() {
        for (steps, num_experts, stages) in [(1, 8, 6), (6, 8, 6), (8, 8, 4), (8, MAX_EXPERTS, 3)] {
            let variant = Variant {
                tile: STATIONARY_TILE,
                schedule: Schedule::Stationary { steps },
                ..variant(128, 128, num_experts)
            };
            assert_eq!(variant.stages(), stages, "{steps} {num_experts}");
            assert!(variant.shared_bytes() <= SHARED_BYTES, "{steps}");
        }
    }

    #[test]
    fn a_multiprocessor_has_the_registers() {
        let stationary = Variant {
            schedule: Schedule::Stationary { steps: 6 },
            ..variant(128, 128, 8)
        };
        for variant in [variant(128, 128, 8), variant(192, 128, 8), stationary] {
            let (copying, multiplying) = variant.registers();
            let registers = GROUP_THREADS * (copying + variant.groups() * multiplying);
            let at_first = 65_536 / variant.threads() / 8 * 8 * variant.threads();
            assert!(registers <= at_first, "{variant:?}: {registers}");
            assert!(copying % 8 == 0 && multiplying % 8 == 0, "{variant:?}");
        }
    }

    #[test]
    fn the_text_begins_with_its_definitions() {
        let text = variant(128, 192, 8).text();
        for line in [
            "#define BN 192\n",
            "#define TOP_K 2\n",
            "m64n192k16.f32.bf16.bf16",
        ] {
            assert!(text.contains(line), "{line}");
        }
        assert_eq!(text.matches("\"+f\"(d[").count(), 96 + 48);
    }
}
