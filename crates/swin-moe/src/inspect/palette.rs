//! Colours of experts.

/// Okabe and Ito's colours, which colour-blind people tell apart; black is lightened, so that it
/// is not taken for a shadow.
const BASE: [[u8; 3]; 8] = [
    [0xe6, 0x9f, 0x00],
    [0x56, 0xb4, 0xe9],
    [0x00, 0x9e, 0x73],
    [0xf0, 0xe4, 0x42],
    [0x00, 0x72, 0xb2],
    [0xd5, 0x5e, 0x00],
    [0xcc, 0x79, 0xa7],
    [0x38, 0x38, 0x38],
];

/// The colour of an expert, sRGB. No palette has a colour for each of dozens that everybody tells
/// apart: beyond eight, colours return darker and lighter, and the number in the patch decides.
pub fn expert_color(expert: usize) -> [u8; 3] {
    let base = BASE[expert % BASE.len()].map(f64::from);
    let round = expert / BASE.len() % 3;
    base.map(|value| match round {
        0 => value as u8,
        1 => (value * 0.55) as u8,
        _ => (value * 0.45 + 255.0 * 0.55) as u8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Matrix = [[f64; 3]; 3];

    const SAME: Matrix = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
    /// How colours look without red or green cones, in linear RGB (Machado, Oliveira and Fernandes
    /// 2009, severity 1).
    const PROTANOPIA: Matrix = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ];
    const DEUTERANOPIA: Matrix = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ];
    const TO_XYZ: Matrix = [
        [0.4124, 0.3576, 0.1805],
        [0.2126, 0.7152, 0.0722],
        [0.0193, 0.1192, 0.9505],
    ];

    fn times(matrix: Matrix, v: [f64; 3]) -> [f64; 3] {
        matrix.map(|row| row.iter().zip(v).map(|(m, v)| m * v).sum())
    }

    /// CIE L*a*b* of a colour as an eye sees it.
    fn lab(rgb: [u8; 3], eye: Matrix) -> [f64; 3] {
        let linear = rgb.map(|byte| {
            let value = f64::from(byte) / 255.0;
            if value <= 0.04045 {
                value / 12.92
            } else {
                ((value + 0.055) / 1.055).powf(2.4)
            }
        });
        let seen = times(eye, linear).map(|value| value.clamp(0.0, 1.0));
        let [x, y, z] = times(TO_XYZ, seen);
        let f = |t: f64| {
            if t > 216.0 / 24389.0 {
                t.cbrt()
            } else {
                (24389.0 / 27.0 * t + 16.0) / 116.0
            }
        };
        let [x, y, z] = [f(x / 0.9505), f(y), f(z / 1.089)];
        [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
    }

    #[test]
    fn eight_experts_are_told_apart_by_every_eye() {
        for (name, eye) in [
            ("all cones", SAME),
            ("no red cones", PROTANOPIA),
            ("no green cones", DEUTERANOPIA),
        ] {
            for a in 0..8 {
                for b in 0..a {
                    let (one, other) = (lab(expert_color(a), eye), lab(expert_color(b), eye));
                    let square: f64 = one.iter().zip(other).map(|(x, y)| (x - y).powi(2)).sum();
                    // 2.3 is a just noticeable difference.
                    assert!(
                        square.sqrt() > 12.0,
                        "{name}: {a} and {b}: {}",
                        square.sqrt()
                    );
                }
            }
        }
    }

    #[test]
    fn twenty_four_colours_are_different() {
        let colours: std::collections::BTreeSet<_> = (0..24).map(expert_color).collect();
        assert_eq!(colours.len(), 24);
    }
}
