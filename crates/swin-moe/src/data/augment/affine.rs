//! Affine transforms with bicubic interpolation.

use crate::data::pixels::Pixels;

/// `[a, b, c, d, e, f]`: the result at (x, y) is the image at (a x + b y + c, d x + e y + f).
pub type Matrix = [f64; 6];

impl Pixels {
    /// The matrix that rotates the image counter-clockwise about its centre.
    pub(super) fn rotation(&self, degrees: f64) -> Matrix {
        let angle = -degrees.to_radians();
        let (sin, cos) = angle.sin_cos();
        let (cx, cy) = (self.width() as f64 / 2.0, self.height() as f64 / 2.0);
        [
            cos,
            sin,
            cx - cos * cx - sin * cy,
            -sin,
            cos,
            cy + sin * cx - cos * cy,
        ]
    }

    /// Applies the transform. What lies outside of the image is `fill`; neighbours that the
    /// interpolation needs beyond the edge are those on the edge.
    pub(super) fn transform(&mut self, matrix: &Matrix, fill: &[u8]) {
        let (width, height, channels) = (self.width(), self.height(), self.channels());
        let source = self.data().to_vec();
        let [a, b, c, d, e, f] = *matrix;
        let mut place = 0;
        for row in 0..height {
            for column in 0..width {
                let (x, y) = (column as f64 + 0.5, row as f64 + 0.5);
                let from = [a * x + b * y + c, d * x + e * y + f];
                let out = &mut self.data_mut()[place..place + channels];
                place += channels;
                if (0.0..width as f64).contains(&from[0]) && (0.0..height as f64).contains(&from[1])
                {
                    let taps = Taps::new(from, width, height);
                    for (channel, v) in out.iter_mut().enumerate() {
                        *v = taps.value(&source[channel..], width, channels);
                    }
                } else {
                    out.copy_from_slice(fill);
                }
            }
        }
    }
}

/// Where a value is interpolated from.
struct Taps {
    columns: [usize; 4],
    rows: [usize; 4],
    /// Distance from the second column and row, 0..1.
    offset: [f64; 2],
}

impl Taps {
    fn new([x, y]: [f64; 2], width: usize, height: usize) -> Self {
        let (x, y) = (x - 0.5, y - 0.5);
        let near = |centre: f64, len: usize| {
            let first = centre.floor() as isize - 1;
            std::array::from_fn(|i| (first + i as isize).clamp(0, len as isize - 1) as usize)
        };
        Self {
            columns: near(x, width),
            rows: near(y, height),
            offset: [x - x.floor(), y - y.floor()],
        }
    }

    /// The interpolated value of the channel that `data` begins with; cut off, not rounded.
    fn value(&self, data: &[u8], width: usize, channels: usize) -> u8 {
        let [dx, dy] = self.offset;
        let rows = self.rows.map(|row| {
            let of_row = self
                .columns
                .map(|column| f64::from(data[(row * width + column) * channels]));
            cubic(of_row, dx)
        });
        cubic(rows, dy) as u8
    }
}

/// The cubic whose slope at the inner points is the difference of their neighbours (a = −1).
fn cubic([v1, v2, v3, v4]: [f64; 4], d: f64) -> f64 {
    let p2 = v3 - v1;
    let p3 = 2.0 * (v1 - v2) + v3 - v4;
    let p4 = v2 - v1 - v3 + v4;
    v2 + d * (p2 + d * (p3 + d * p4))
}
