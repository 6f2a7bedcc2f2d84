//! Log-spaced continuous position bias: an MLP on the offset between two tokens of a window.

use burn::module::Module;
use burn::tensor::activation::relu;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use hexa_ops::{ExpertOps, MatmulPrecision, matmul};

use super::error::Result;
use super::geometry::BlockGeometry;
use super::layers::{Linear, LinearOptions};

/// Hidden width of the MLP.
pub const HIDDEN: usize = 512;

/// The MLP of a block's position bias.
#[derive(Module, Debug)]
pub struct CpbMlp<B: Backend> {
    /// `[2, 512]`.
    pub fc1: Linear<B>,
    /// `[512, heads]`, without bias.
    pub fc2: Linear<B>,
}

impl<B: ExpertOps> CpbMlp<B> {
    /// A new MLP for `num_heads` heads.
    pub fn new(
        num_heads: usize,
        init_std: f64,
        precision: MatmulPrecision,
        device: &B::Device,
    ) -> Self {
        let options = |bias| LinearOptions {
            bias,
            init_std,
            precision,
        };
        Self {
            fc1: Linear::new(2, HIDDEN, options(true), device),
            fc2: Linear::new(HIDDEN, num_heads, options(false), device),
        }
    }

    /// # Shapes
    /// - `coords`: `[offsets, 2]`
    /// - result: `[offsets, heads]`
    ///
    /// # Errors
    /// If the widths differ.
    pub fn forward(&self, coords: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        self.fc2.forward(relu(self.fc1.forward(coords)?))
    }
}

/// Coordinates of all offsets inside a window and the way from offsets to pairs of tokens.
///
/// The bias of the pair (query, key) is the table's entry at their offset. Looking it up is a
/// gather, whose backward pass adds hundreds of rows one after the other; the offset's row and
/// column being independent, two small products with one-hot matrices do the same.
#[derive(Module, Debug)]
pub struct PairExpansion<B: Backend> {
    /// MLP input: `[side · side, 2]`, `side = 2 · window − 1`.
    coords: Tensor<B, 2>,
    /// Row `a · window + b` has its one in column `a − b + window − 1`: `[window², side]`.
    one_hot: Tensor<B, 2>,
    window: usize,
    #[module(skip)]
    precision: MatmulPrecision,
}

impl<B: ExpertOps> PairExpansion<B> {
    /// The tables of a block's window.
    pub fn new(block: &BlockGeometry, precision: MatmulPrecision, device: &B::Device) -> Self {
        let window = block.layout.window;
        let side = 2 * window - 1;
        let coords = relative_coords_table(window, block.pretrained_window);
        let mut one_hot = vec![0f32; window * window * side];
        for a in 0..window {
            for b in 0..window {
                one_hot[(a * window + b) * side + a + window - 1 - b] = 1.0;
            }
        }
        Self {
            coords: Tensor::from_data(TensorData::new(coords, [side * side, 2]), device),
            one_hot: Tensor::from_data(TensorData::new(one_hot, [window * window, side]), device),
            window,
            precision,
        }
    }

    /// Bias of every pair of tokens: `[heads, window², window²]`, head, query, key.
    ///
    /// # Errors
    /// If the MLP's widths differ from those it was built with.
    pub fn bias(&self, mlp: &CpbMlp<B>) -> Result<Tensor<B, 3>> {
        let table = mlp.forward(self.coords.clone())?;
        let [offsets, heads] = table.dims();
        let w = self.window;
        let side = 2 * w - 1;
        debug_assert_eq!(offsets, side * side);
        // [row offset, column offset, head] → [row pair, column offset, head]
        let rows = matmul(
            self.one_hot.clone(),
            table.reshape([side, side * heads]),
            self.precision,
        )?;
        let rows = rows
            .reshape([w * w, side, heads])
            .permute([1, 0, 2])
            .reshape([side, w * w * heads]);
        // → [column pair, row pair, head]
        let pairs = matmul(self.one_hot.clone(), rows, self.precision)?;
        Ok(pairs
            .reshape([w, w, w, w, heads])
            .permute([4, 2, 0, 3, 1])
            .reshape([heads, w * w, w * w]))
    }
}

/// `sign(x) · log2(|x| · 8 + 1) / log2(8)` of both offsets, `x` being the offset over the
/// largest one of a window of `pretrained` (or of `window`, if that is 0): `[side, side, 2]`.
pub fn relative_coords_table(window: usize, pretrained: usize) -> Vec<f32> {
    let reference = if pretrained > 0 { pretrained } else { window };
    // A window of one token has the offset zero alone; any scale will do.
    let largest = reference.saturating_sub(1).max(1) as f32;
    let reach = window as i64 - 1;
    let log = |offset: i64| {
        let x = offset as f32 / largest * 8.0;
        // signum() of +0.0 is 1, and log2(1) is 0.
        x.signum() * (x.abs() + 1.0).log2() / 3.0
    };
    let mut table = Vec::with_capacity((2 * window - 1).pow(2) * 2);
    for row in -reach..=reach {
        for col in -reach..=reach {
            table.extend([log(row), log(col)]);
        }
    }
    table
}

/// Entry of the table of offsets for each pair of tokens, `[window², window²]`; the published
/// model keeps it as a buffer.
pub fn relative_position_index(window: usize) -> Vec<i64> {
    let n = window * window;
    let mut index = Vec::with_capacity(n * n);
    for query in 0..n {
        for key in 0..n {
            let row = query / window + window - 1 - key / window;
            let col = query % window + window - 1 - key % window;
            index.push((row * (2 * window - 1) + col) as i64);
        }
    }
    index
}
