//! Choice of tiles, of windows and of how long sums are cut. Pure.

use super::source::{CLUSTER, Epilogue, STAGE_DEPTH, STATIONARY_TILE, Schedule, Tile};
use crate::types::Favor;

/// Rows of most tiles.
pub(super) const TILE_ROWS: usize = 128;

/// Tiles of ESMM and ESTMM besides the highest.
const TILES: [Tile; 3] = [
    Tile::new(TILE_ROWS, 256),
    Tile::new(TILE_ROWS, 192),
    Tile::new(TILE_ROWS, 128),
];

/// A tile of ESTMM, and of ESMM without an activation. A pair of them has 384 rows, a width of
/// Swin-MoE-Small, of which two pairs of the others would leave a quarter empty, and reads less for
/// each multiplication.
const HIGH_TILE: Tile = Tile::new(192, 192);

/// Bytes that a multiprocessor gets from the second-level cache in a cycle when all of them read.
const CACHE_BYTES_PER_CYCLE: usize = 30;

/// Cycles of an epilogue, for each column of 128 rows.
const EPILOGUE_CYCLES_PER_COLUMN: usize = 18;

/// Estimated time of `pairs` pairs of tiles, in cycles: clusters work on them in rounds; a round
/// takes `depth / 64` steps and an epilogue. In a last round for half of the clusters or fewer tiles have
/// half of the columns if `halves` (`HALVES` of the text).
fn cycles(tile: Tile, pairs: usize, depth: usize, multiprocessors: usize, halves: bool) -> usize {
    let clusters = (multiprocessors / CLUSTER).max(1);
    let round = |columns: usize| {
        // A multiprocessor does 32 × 64 multiplications in a cycle.
        let multiplied = tile.rows * columns / 32;
        let read = 2 * STAGE_DEPTH * (tile.rows + columns / CLUSTER) / CACHE_BYTES_PER_CYCLE;
        let epilogue = EPILOGUE_CYCLES_PER_COLUMN * columns * tile.rows / 128;
        depth.div_ceil(STAGE_DEPTH) * multiplied.max(read) + epilogue
    };
    let last = match pairs % clusters {
        0 => 0,
        rest if halves && tile.halves() && 2 * rest <= clusters => round(tile.columns / 2),
        _ => round(tile.columns),
    };
    pairs / clusters * round(tile.columns) + last
}

/// Most stages' depths of rows that shared memory has room for beside three stages of columns.
const MAX_STATIONARY_STEPS: usize = 8;

/// Fewest column tiles for which rows that stay pay, as nothing is multiplied while they are copied.
const MIN_STATIONARY_TILES: usize = 4;

/// Tile and schedule of ESMM. Rows stay where they fit and an activation follows that is not gated.
pub(super) fn row_schedule(
    num_slots: usize,
    num_experts: usize,
    (width, depth): (usize, usize),
    epilogue: Epilogue,
    multiprocessors: usize,
) -> (Tile, Schedule) {
    let steps = depth.div_ceil(STAGE_DEPTH);
    let is_suited = epilogue.activation().is_some_and(|a| !a.is_gated());
    let pays = width > (MIN_STATIONARY_TILES - 1) * STATIONARY_TILE.columns;
    if pays && is_suited && steps <= MAX_STATIONARY_STEPS {
        return (STATIONARY_TILE, Schedule::Stationary { steps });
    }
    // Epilogues with an activation need more registers than three multiplying warpgroups leave.
    let is_plain = epilogue == Epilogue::Store;
    let tiles = TILES.into_iter().chain(is_plain.then_some(HIGH_TILE));
    let widths = (width, depth);
    let tile = row_tile(
        tiles,
        is_plain,
        num_slots,
        num_experts,
        widths,
        multiprocessors,
    );
    (tile, Schedule::Ring)
}

/// Column tiles of a segment, where rows stay: as many as give the least time, if cubes work on segments
/// in rounds and a segment's rows cost three quarters of a column tile. Each segment has one for both of
/// the kernel's teams; `width` is of two tiles or more. The kernel halves the segments of a last round
/// that no more than half of the cubes would have.
pub(super) fn segment_tiles(
    num_slots: usize,
    num_experts: usize,
    width: usize,
    multiprocessors: usize,
) -> usize {
    let cubes = multiprocessors.max(1);
    let tiles = width.div_ceil(STATIONARY_TILE.columns).max(1);
    // Each expert is expected to end with a tile that is half empty.
    let least = num_slots.div_ceil(STATIONARY_TILE.rows) + num_experts.saturating_sub(3) / 2;
    let round = |segment: usize| 4 * segment + 3;
    let time = |&segment: &usize| -> usize {
        let last = tiles % segment;
        let is_halved = segment >= 4 && segment % 2 == 0 && (last == 0 || last > segment / 2);
        (least..least + 4)
            .map(|row_tiles| {
                let segments = row_tiles * tiles.div_ceil(segment);
                segments / cubes * round(segment)
                    + match segments % cubes {
                        0 => 0,
                        rest if is_halved && 2 * rest <= cubes => round(segment / 2),
                        _ => round(segment),
                    }
            })
            .sum()
    };
    let suits_teams = |segment: &usize| tiles % segment != 1;
    (2..=tiles)
        .filter(suits_teams)
        .min_by_key(time)
        .unwrap_or(tiles)
}

/// Of these tiles for ESMM in a ring the one with the least estimated time for results `width` wide.
/// Pairs of wide ones are halved where that pays, if `halves`.
fn row_tile(
    tiles: impl IntoIterator<Item = Tile>,
    halves: bool,
    num_slots: usize,
    num_experts: usize,
    (width, depth): (usize, usize),
    multiprocessors: usize,
) -> Tile {
    let time = |tile: &Tile| {
        let pairs = row_pairs(*tile, num_slots, num_experts, width);
        cycles(*tile, pairs, depth, multiprocessors, halves)
    };
    tiles.into_iter().min_by_key(time).unwrap_or(TILES[0])
}

/// Pairs of tiles of ESMM that balanced experts have for results `width` wide: one tile above the other,
/// and an odd last one beside its neighbour.
fn row_pairs(tile: Tile, num_slots: usize, num_experts: usize, width: usize) -> usize {
    let experts = num_experts.clamp(1, num_slots.max(1));
    let row_tiles = num_slots.div_ceil(experts).div_ceil(tile.rows);
    let column_tiles = width.div_ceil(tile.columns);
    experts * (row_tiles / 2 * column_tiles + row_tiles % 2 * column_tiles.div_ceil(2))
}

/// Narrowest hidden width for which [`sorts_rows`].
const SORTED_WIDTH: usize = 8192;

/// Whether rows in token order are copied into expert order before they are multiplied.
///
/// Rows that lie as they are read come by bulk copies, which makes the four products that would
/// gather them 4 to 10 % faster: time that grows with `d_ff`, while the copies' does not.
pub(super) fn sorts_rows(d_ff: usize) -> bool {
    d_ff >= SORTED_WIDTH
}

/// Columns of one piece of the activation's gradient, whose weighted activations are then summed to
/// their piece of the second weights' gradient and forgotten.
///
/// Two pieces halve the largest buffer of the backward pass. They pay where slots outnumber the
/// weights' rows and each piece is made of whole tiles. They are made with one choice per token, as the
/// backward pass needs the most memory there, and if memory is favored; with more choices they win
/// nothing unless the forward pass is cut, too.
pub(super) fn gradient_piece(
    favor: Favor,
    (num_slots, top_k): (usize, usize),
    num_experts: usize,
    (d_model, d_ff): (usize, usize),
) -> usize {
    let is_cut = favor == Favor::Memory || top_k == 1;
    let pays = num_slots > num_experts * d_model && d_ff.is_multiple_of(2 * TILES[0].columns);
    if is_cut && pays { d_ff / 2 } else { d_ff }
}

/// Positions in the first of two windows that the forward pass works on one after the other, so that
/// one's activations are forgotten before the other's are made; 0 if it is not cut.
///
/// If memory is favored, two windows halve that buffer with more choices per token, where the forward
/// pass needs the most memory and slots outnumber the weights' rows. The first is as long as the
/// second product takes whole rounds of the lower tiles for, half of them at most, so that the cut costs
/// no round of these.
pub(super) fn first_window(
    favor: Favor,
    (num_slots, top_k): (usize, usize),
    num_experts: usize,
    (d_model, d_ff): (usize, usize),
    multiprocessors: usize,
) -> usize {
    let is_cut = favor == Favor::Memory && top_k > 1 && !sorts_rows(d_ff);
    let widths = (d_model, d_ff);
    let tile = row_tile(
        TILES,
        false,
        num_slots,
        num_experts,
        widths,
        multiprocessors,
    );
    let clusters = (multiprocessors / CLUSTER).max(1);
    let column_tiles = d_model.div_ceil(tile.columns);
    let rounds = row_pairs(tile, num_slots, num_experts, d_model).div_ceil(clusters);
    // Of the pairs, as many may be partly filled as half of the window's share of the experts.
    let filled = (rounds / 2 * clusters / column_tiles).saturating_sub(num_experts.div_ceil(4));
    let first = filled * CLUSTER * TILE_ROWS;
    if !is_cut || num_slots <= num_experts * d_model || first == 0 {
        return 0;
    }
    first.min(num_slots.div_ceil(2))
}

/// How sums over an expert's rows are cut, so that one expert with most of the rows, or few experts
/// with small results, keep the device busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SumSplit {
    /// Most rows of a part; experts with no more of them have one, and write their result directly.
    /// Others' parts are equally long, up to a stage's depth.
    pub(super) chunk: usize,
    /// Most parts there can be.
    pub(super) max_parts: usize,
}

/// Bytes that a multiprocessor moves to or from the device's memory in a cycle when all of them do.
const MEMORY_BYTES_PER_CYCLE: usize = 18;

/// Fewest rows of a part that is made only to keep the device busy: results of parts are written in f32
/// and read again.
const MIN_PART_ROWS: usize = 512;

/// ESTMM's tile, and the cut of its sums or none, with the least estimated time for an `m` × `n` result
/// of each expert, the experts being balanced. A function of shapes alone: sums are reproducible.
///
/// If all experts' tiles leave clusters without any, each sum may be cut into as many parts as these have
/// room for. A part holds a third more than its share of an average expert's rows, so that balanced
/// routing needs no more parts, or half of what a cluster is to add up, as that is short enough to fill
/// gaps with. Nothing is cut if one expert's tiles occupy most of the device.
pub(super) fn sum_plan(
    num_slots: usize,
    num_experts: usize,
    (m, n): (usize, usize),
    multiprocessors: usize,
) -> (Tile, Option<SumSplit>) {
    let experts = num_experts.max(1);
    let rows = num_slots.div_ceil(experts);
    let clusters = (multiprocessors / CLUSTER).max(1);
    let pairs = |tile: Tile| m.div_ceil(CLUSTER * tile.rows) * n.div_ceil(tile.columns);
    let most_parts = |tile: Tile| {
        let room = clusters / (experts * pairs(tile)).max(1);
        room.min(rows / MIN_PART_ROWS).max(1)
    };
    let time = |&(tile, parts): &(Tile, usize)| {
        let pairs = experts * pairs(tile) * parts;
        // Each part's result is written in f32 and read again; both count twice, as it takes memory, too.
        let moved = if parts > 1 {
            16 * experts * parts * m * n
        } else {
            0
        };
        cycles(tile, pairs, rows.div_ceil(parts), multiprocessors, false)
            + moved / (MEMORY_BYTES_PER_CYCLE * multiprocessors.max(1))
    };
    let tiles = TILES.into_iter().chain([HIGH_TILE]);
    let (tile, parts) = tiles
        .flat_map(|tile| [(tile, 1), (tile, most_parts(tile))])
        .min_by_key(time)
        .unwrap_or((TILES[0], 1));

    let is_busy = 4 * CLUSTER * pairs(TILES[0]) >= 3 * multiprocessors;
    if is_busy || experts * parts < 2 {
        return (tile, None);
    }
    let thirds = if experts == 1 { 3 } else { 4 };
    let share = (thirds * num_slots.max(1)).div_ceil(3 * experts * parts);
    let filling = num_slots * pairs(tile) / (2 * clusters);
    let chunk = share.max(filling).next_multiple_of(STAGE_DEPTH);
    // An expert is cut if it has more rows than a part holds, and its last part holds one at least.
    let cut = experts.min(num_slots / (chunk + 1));
    let max_parts = (num_slots - cut) / chunk + cut;
    (
        tile,
        (max_parts > 0).then_some(SumSplit { chunk, max_parts }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Activation;

    fn row_tile_of(slots: usize, experts: usize, width: usize, depth: usize) -> (usize, usize) {
        let epilogue = Epilogue::Store;
        let (tile, schedule) = row_schedule(slots, experts, (width, depth), epilogue, 132);
        assert_eq!(schedule, Schedule::Ring);
        (tile.rows, tile.columns)
    }

    #[test]
    fn narrow_results_get_tiles_that_fit() {
        // Stage 3 of Swin-MoE-Small: 384 columns are two tiles of 192, and with 192 rows 96 pairs of
        // them are two rounds of 66 clusters, where 144 of 128 rows are three.
        assert_eq!(row_tile_of(18_432, 8, 384, 1536), (192, 192));
        assert_eq!(row_tile_of(18_432, 8, 512, 2048), (128, 256));
        assert_eq!(row_tile_of(18_432, 8, 1536, 384), (192, 192));
        // Half of a tile of 192.
        assert_eq!(row_tile_of(1, 8, 8, 8), (128, 192));
        assert_eq!(row_tile_of(0, 8, 8, 8), (128, 256));
    }

    #[test]
    fn rows_stay_if_they_are_narrow_and_the_result_is_wide() {
        let schedule =
            |width, depth, epilogue| row_schedule(18_432, 8, (width, depth), epilogue, 132).1;
        let gelu = Epilogue::Activate(Activation::Gelu);
        assert_eq!(schedule(1536, 384, gelu), Schedule::Stationary { steps: 6 });
        assert_eq!(schedule(2048, 505, gelu), Schedule::Stationary { steps: 8 });
        assert_eq!(schedule(2048, 520, gelu), Schedule::Ring);
        assert_eq!(schedule(384, 384, gelu), Schedule::Ring);
        assert_eq!(schedule(392, 8, gelu), Schedule::Stationary { steps: 1 });
        assert_eq!(schedule(1536, 384, Epilogue::Store), Schedule::Ring);
        let gated = Epilogue::Activate(Activation::SwiGlu);
        assert_eq!(schedule(1536, 384, gated), Schedule::Ring);
    }

    #[test]
    fn segments_fill_the_clusters() {
        // 292 row tiles of 16 column tiles: 584 segments of 8 for 132 cubes are 4 rounds and a half.
        assert_eq!(segment_tiles(36_864, 8, 2048, 132), 8);
        assert_eq!(segment_tiles(36_864, 8, 1536, 132), 6);
        assert_eq!(segment_tiles(18_432, 8, 1024, 132), 4);
        assert_eq!(segment_tiles(1, 1, 1536, 132), 2);
        // Five tiles in two segments, not in three of two, two and one.
        assert_eq!(segment_tiles(1, 1, 520, 132), 3);
        assert_eq!(segment_tiles(0, 8, 1, 132), 1);
    }

    #[test]
    fn odd_tiles_pair_with_their_neighbours() {
        let pairs = |tile, slots, width| row_pairs(tile, slots, 8, width);
        assert_eq!(pairs(TILES[0], 18_432, 512), 144);
        assert_eq!(pairs(HIGH_TILE, 18_432, 384), 96);
        assert_eq!(pairs(TILES[0], 4608, 4096), 8 * (2 * 16 + 8));
        assert_eq!(pairs(TILES[1], 4608, 576), 8 * (2 * 3 + 2));
        assert_eq!(pairs(HIGH_TILE, 4608, 576), 8 * (3 + 2));
        assert_eq!(pairs(TILES[2], 3, 8), 3);
        assert_eq!(pairs(TILES[2], 0, 8), 0);
    }

    #[test]
    fn sums_get_the_tile_with_the_fewest_rounds() {
        let tile = |slots, m, n| {
            let (tile, _) = sum_plan(slots, 8, (m, n), 132);
            (tile.rows, tile.columns)
        };
        // 64 pairs for 66 clusters, where other tiles take two rounds.
        assert_eq!(tile(18_432, 384, 1536), (192, 192));
        assert_eq!(tile(18_432, 384, 768), (128, 192));
        assert_eq!(tile(18_432, 512, 2048), (128, 256));
        assert_eq!(tile(0, 8, 8), (128, 128));
    }

    /// Parts that the kernel counts for these experts' rows.
    fn parts(rows: &[usize], chunk: usize) -> usize {
        rows.iter()
            .filter(|&&rows| rows > chunk)
            .map(|rows| rows.div_ceil(chunk))
            .sum()
    }

    #[test]
    fn parts_never_exceed_their_bound() {
        for num_experts in 1..=5 {
            for num_slots in [1, 63, 64, 500, 1000, 5000] {
                let (_, split) = sum_plan(num_slots, num_experts, (8, 8), 132);
                let Some(split) = split else {
                    assert!(num_slots < 2 * MIN_PART_ROWS, "{num_experts}");
                    continue;
                };
                for first in (0..=num_slots).step_by(7) {
                    let mut rows = vec![0; num_experts];
                    rows[0] = first;
                    rows[num_experts - 1] += num_slots - first;
                    let found = parts(&rows, split.chunk);
                    assert!(found <= split.max_parts, "{rows:?} {split:?}: {found}");
                }
            }
        }
    }

    #[test]
    fn wide_results_are_not_cut_and_few_small_ones_fill_the_clusters() {
        let split = |slots, experts, widths| sum_plan(slots, experts, widths, 132).1;
        assert_eq!(split(8192, 8, (4096, 14_336)), None);
        assert_eq!(split(8192, 1, (8192, 8192)), None);
        assert_eq!(split(4608, 8, (1024, 4096)), None);
        assert_eq!(split(1000, 1, (64, 64)), None);
        // An average expert has one part, and a single one with eight pairs of tiles has eight.
        let average = split(18_432, 8, (384, 1536)).map(|split| split.chunk);
        assert_eq!(average, Some(3072));
        let all = Some(SumSplit {
            chunk: 2304,
            max_parts: 8,
        });
        assert_eq!(split(18_432, 1, (384, 1536)), all);
        // Of many experts with large results none is cut that others can be summed beside.
        let many = split(131_072, 64, (2048, 1024));
        assert_eq!(many.map(|many| many.max_parts), Some(8));
        // Of four parts that there is room for, two balanced experts have three each.
        let chunk = split(18_432, 2, (384, 1536)).map_or(0, |two| two.chunk);
        assert_eq!(parts(&[9216, 9216], chunk), 6);
        assert_eq!(parts(&[12_000, 6432], chunk), 7);
    }

    #[test]
    fn pieces_are_whole_tiles_of_layers_with_many_slots() {
        let s3 = (384, 1536);
        assert_eq!(gradient_piece(Favor::Speed, (18_432, 1), 8, s3), 768);
        assert_eq!(gradient_piece(Favor::Speed, (36_864, 2), 8, s3), 1536);
        assert_eq!(gradient_piece(Favor::Memory, (36_864, 2), 8, s3), 768);
        assert_eq!(
            gradient_piece(Favor::Memory, (18_432, 1), 8, (384, 1500)),
            1500
        );
        let large = (4096, 14_336);
        assert_eq!(gradient_piece(Favor::Memory, (16_384, 1), 8, large), 14_336);
    }

    #[test]
    fn windows_are_of_layers_with_many_slots_and_cost_no_round() {
        let first = |favor, slots, top_k, experts, widths| {
            first_window(favor, (slots, top_k), experts, widths, 132)
        };
        for slots in [36_864, 73_728] {
            let window = first(Favor::Memory, slots, 2, 8, (384, 1536));
            assert!(window > 0 && slots - window <= 3 * slots / 5, "{window}");
            // Two column tiles, and no more than half a pair of rows empty in each expert.
            let rounds =
                |rows: usize, experts: usize| (2 * (rows / 256 + experts / 2)).div_ceil(66);
            let cut = rounds(window, 4) + rounds(slots - window, 4);
            assert!(cut <= rounds(slots, 8), "{window}");
            assert_eq!(first(Favor::Speed, slots, 2, 8, (384, 1536)), 0);
        }
        for (slots, top_k, experts, widths) in [
            (18_432, 1, 8, (384, 1536)),
            (16_384, 2, 8, (4096, 14_336)),
            (131_072, 8, 64, (2048, 1024)),
            (40, 2, 3, (8, 8)),
        ] {
            assert_eq!(first(Favor::Memory, slots, top_k, experts, widths), 0);
        }
    }
}
