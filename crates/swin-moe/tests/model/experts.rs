//! Which expert took which patch: a model in which a patch's pixels alone decide about its expert,
//! and in which they come to the router through attention in shifted windows.

use burn::module::Param;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_moe::Scorer;
use hexa_ops::{ExpertOps, backend_test};
use swin_moe::inspect::{LayerChoices, layer_choices};
use swin_moe::model::block::FeedForward;
use swin_moe::model::geometry::WindowLayout;
use swin_moe::model::window::partition;
use swin_moe::model::{MoeSettings, SwinMoe, SwinMoeConfig};

use crate::{alone, floats};

const PATCH: usize = 3;
const GRID: usize = 12;
const WINDOW: usize = 3;
const DIM: usize = 7;
const EXPERTS: usize = 5;

/// Experts in the second, shifted block of both stages.
fn config() -> SwinMoeConfig {
    SwinMoeConfig {
        image_size: GRID * PATCH,
        patch_size: PATCH,
        in_chans: 1,
        num_classes: 2,
        embed_dim: DIM,
        depths: vec![2, 2],
        num_heads: vec![1, 1],
        window_size: WINDOW,
        mlp_ratio: 1.0,
        pretrained_window_sizes: vec![0, 0],
        drop_path: 0.0,
        moe_blocks: vec![vec![1], vec![1]],
        moe: MoeSettings {
            num_experts: EXPERTS,
            top_k: 2,
            ..MoeSettings::default()
        },
        ..SwinMoeConfig::default()
    }
}

/// The expert that the patch of an image at a row and column is made for: like no rotation, mirror
/// image or shift of itself.
fn pattern(image: usize, row: usize, column: usize) -> usize {
    (row * row + 3 * column + row * column + image * (column / 2 + 2)) % EXPERTS
}

/// `[rows, columns]` with `value` wherever row and column are paired.
fn paired<B: Backend>(
    [rows, columns]: [usize; 2],
    value: f32,
    pair: impl Fn(usize, usize) -> bool,
    device: &B::Device,
) -> Param<Tensor<B, 2>> {
    let values: Vec<f32> = (0..rows * columns)
        .map(|i| match pair(i / columns, i % columns) {
            true => value,
            false => 0.0,
        })
        .collect();
    let data = TensorData::new(values, [rows, columns]);
    Param::from_tensor(Tensor::from_data(data, device))
}

/// Pixel `k` of a patch becomes channel `k`; attention looks for tokens like the own one and
/// outweighs the residual; channel `k` chooses expert `k`; merging keeps the upper left token.
fn forced<B: ExpertOps>(config: &SwinMoeConfig, device: &B::Device) -> SwinMoe<B> {
    let mut model: SwinMoe<B> = config.init(device).unwrap();
    let zeros = |len: usize| Param::from_tensor(Tensor::<B, 1>::zeros([len], device));
    model.patch_embed.proj.weight =
        paired([PATCH * PATCH, DIM], 1.0, |pixel, c| pixel == c, device);
    model.patch_embed.proj.bias = Some(zeros(DIM));
    for (number, stage) in model.layers.iter_mut().enumerate() {
        let dim = DIM << number;
        for block in &mut stage.blocks {
            let attention = &mut block.attn;
            attention.qkv.weight = paired([dim, 3 * dim], 10.0, |c, out| c == out % dim, device);
            attention.proj.weight = paired([dim, dim], 100.0, |c, out| c == out, device);
            attention.qkv.bias = Some(zeros(3 * dim));
            attention.proj.bias = Some(zeros(dim));
            if let FeedForward::Moe(moe) = &mut block.mlp
                && let Scorer::Linear(scorer) = &mut moe.router.scorer
            {
                scorer.weight = paired([dim, EXPERTS], 1.0, |c, expert| c == expert, device);
            }
        }
        if let Some(merging) = &mut stage.downsample {
            merging.reduction.weight = paired(
                [4 * dim, 2 * dim],
                1.0,
                |c, out| c == out && c < dim,
                device,
            );
        }
    }
    model.without_noise()
}

/// Images whose patches have one bright pixel: the one of their pattern.
fn images<B: Backend>(count: usize, device: &B::Device) -> Tensor<B, 4> {
    let side = GRID * PATCH;
    let mut pixels = Vec::with_capacity(count * side * side);
    for image in 0..count {
        for y in 0..side {
            for x in 0..side {
                let pixel = y % PATCH * PATCH + x % PATCH;
                let bright = pixel == pattern(image, y / PATCH, x / PATCH);
                pixels.push(f32::from(u8::from(bright)));
            }
        }
    }
    Tensor::from_data(TensorData::new(pixels, [count, 1, side, side]), device)
}

fn places<B: ExpertOps>() {
    let _alone = alone();
    let device = Default::default();
    let config = config();
    let output = forced::<B>(&config, &device)
        .forward(images(3, &device))
        .unwrap();
    let layers = layer_choices(&output, &config.geometry().unwrap()).unwrap();
    let shapes = |l: &LayerChoices| (l.stage, l.block, l.grid, l.num_experts, l.experts.len());
    assert_eq!(
        layers.iter().map(shapes).collect::<Vec<_>>(),
        [(0, 1, 12, EXPERTS, 3 * 144), (1, 1, 6, EXPERTS, 3 * 36)]
    );
    for (layer, step) in layers.iter().zip([1, 2]) {
        for image in 0..3 {
            let want: Vec<usize> = (0..layer.grid * layer.grid)
                .map(|i| pattern(image, i / layer.grid * step, i % layer.grid * step))
                .collect();
            assert_eq!(layer.image(image), want, "stage {}", layer.stage);
        }
    }
}

/// The patterns would tell if tokens stayed in the order of windows, or rows were columns.
fn patterns_tell<B: ExpertOps>() {
    let device = Default::default();
    let tokens: Vec<f32> = (0..GRID * GRID)
        .map(|i| pattern(0, i / GRID, i % GRID) as f32)
        .collect();
    for shifted in [false, true] {
        let data = TensorData::new(tokens.clone(), [GRID * GRID, 1]);
        let grid = Tensor::<B, 2>::from_data(data, &device);
        let sorted = floats(partition(grid, WindowLayout::new(GRID, WINDOW, shifted)));
        assert_ne!(sorted, tokens);
    }
    let transposed: Vec<f32> = (0..GRID * GRID)
        .map(|i| tokens[i % GRID * GRID + i / GRID])
        .collect();
    assert_ne!(transposed, tokens);
}

backend_test!(tokens_go_back_to_their_patches, places);
backend_test!(patterns_tell_orders_apart, patterns_tell);
