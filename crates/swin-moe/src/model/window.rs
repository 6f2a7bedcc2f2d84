//! Cutting a grid of tokens into windows, shifted or not, and the mask that shifting needs.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::geometry::WindowLayout;

/// What keeps tokens that are neighbours by wrapping around from attending to each other.
const MASKED: f32 = -100.0;

/// Shifts the grid and sorts the tokens by window.
///
/// # Shapes
/// - `x`: `[batch · grid · grid, dim]`, by sample, row, column
/// - result: the same, by sample, window, row in the window, column in the window
pub fn partition<B: Backend>(x: Tensor<B, 2>, layout: WindowLayout) -> Tensor<B, 2> {
    let WindowLayout {
        grid,
        window,
        shift,
    } = layout;
    if grid == window {
        return x;
    }
    let [tokens, dim] = x.dims();
    let batch = tokens / (grid * grid);
    let per_side = grid / window;
    rotate(x.reshape([batch, grid, grid, dim]), shift)
        .reshape([batch, per_side, window, per_side, window, dim])
        .permute([0, 1, 3, 2, 4, 5])
        .reshape([tokens, dim])
}

/// Undoes [`partition`].
pub fn reverse<B: Backend>(x: Tensor<B, 2>, layout: WindowLayout) -> Tensor<B, 2> {
    let WindowLayout {
        grid,
        window,
        shift,
    } = layout;
    if grid == window {
        return x;
    }
    let [tokens, dim] = x.dims();
    let batch = tokens / (grid * grid);
    let per_side = grid / window;
    let x = x
        .reshape([batch, per_side, per_side, window, window, dim])
        .permute([0, 1, 3, 2, 4, 5])
        .reshape([batch, grid, grid, dim]);
    let back = if shift == 0 { 0 } else { grid - shift };
    rotate(x, back).reshape([tokens, dim])
}

/// Moves row and column `by` of the grid to the front, what was before them to the end.
fn rotate<B: Backend>(x: Tensor<B, 4>, by: usize) -> Tensor<B, 4> {
    if by == 0 {
        return x;
    }
    let grid = x.dims()[1];
    [1, 2].into_iter().fold(x, |x, dim| {
        let head = x.clone().narrow(dim, 0, by);
        let tail = x.narrow(dim, by, grid - by);
        Tensor::cat(vec![tail, head], dim)
    })
}

/// Additive mask of the shifted windows, `[windows, n, n]` in row-major order, `n` tokens a
/// window; `None` if nothing is shifted.
///
/// After the shift, a window at the far edges holds tokens of up to four regions of the image;
/// those of different regions get `MASKED`.
pub fn attention_mask(layout: WindowLayout) -> Option<Vec<f32>> {
    let WindowLayout {
        grid,
        window,
        shift,
    } = layout;
    if shift == 0 {
        return None;
    }
    let band = |i: usize| match i {
        i if i < grid - window => 0,
        i if i < grid - shift => 1,
        _ => 2,
    };
    let per_side = grid / window;
    let n = layout.window_tokens();
    let mut mask = Vec::with_capacity(layout.num_windows() * n * n);
    for window_row in 0..per_side {
        for window_col in 0..per_side {
            let region = |token: usize| {
                let row = window_row * window + token / window;
                let col = window_col * window + token % window;
                (band(row), band(col))
            };
            for query in 0..n {
                for key in 0..n {
                    let same = region(query) == region(key);
                    mask.push(if same { 0.0 } else { MASKED });
                }
            }
        }
    }
    Some(mask)
}
