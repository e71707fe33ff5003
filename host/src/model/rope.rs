//! Rotary position embeddings (RoFormer, arXiv:2104.09864) and what stretches them over longer contexts,
//! as tables of cosines and sines.

use super::keys::Keys;
use crate::error::Result;

/// One way of turning queries and keys by their position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// The angle of pair `i` at position `p` is `p * base^(-2i / dims)`, before any scaling.
    pub base: f32,
    pub scaling: Scaling,
    /// Multiplies cosines and sines.
    pub magnitude: f32,
}

/// How angles are scaled.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// All divided by a factor (arXiv:2306.15595).
    Linear {
        factor: f32,
    },
    /// Slow ones divided by a factor, fast ones kept, a ramp between (YaRN, arXiv:2309.00071).
    Yarn {
        factor: f32,
        /// Tokens the model was trained on before.
        original: usize,
        /// Turns over `original` tokens above which an angle is kept, and below which it is divided.
        beta_fast: f32,
        beta_slow: f32,
        /// Whether the ramp's ends are whole pairs.
        truncate: bool,
    },
    /// Each divided by a factor of its own, which is another for sequences of more than `original`
    /// tokens (LongRoPE, arXiv:2402.13753); the factors are tensors.
    Long {
        original: usize,
    },
}

impl Rotation {
    /// The rotation that `rope.*` describes.
    ///
    /// # Errors
    /// A value out of range, or a type of scaling that is not known.
    pub fn read(keys: &Keys<'_>) -> Result<Rotation> {
        let base = keys.positive_or("rope.freq_base", 10_000.0)?;
        let attention = keys.positive_or("rope.scaling.attn_factor", 1.0)?;
        let kind = keys.opt_str("rope.scaling.type")?.unwrap_or("none");
        let mut rotation = Rotation {
            base,
            scaling: Scaling::None,
            magnitude: 1.0,
        };
        let original =
            |keys: &Keys<'_>| keys.required("rope.scaling.original_context_length", 1 << 28);
        match kind {
            "none" => {
                if keys.has_tensor("rope_factors_long.weight") {
                    // Files say so by their tensors alone.
                    rotation.scaling = Scaling::Long {
                        original: original(keys)?,
                    };
                    rotation.magnitude = attention;
                }
            }
            "linear" => {
                rotation.scaling = Scaling::Linear {
                    factor: keys.positive("rope.scaling.factor")?,
                };
            }
            "yarn" => {
                let factor = keys.positive("rope.scaling.factor")?;
                rotation.scaling = Scaling::Yarn {
                    factor,
                    original: original(keys)?,
                    beta_fast: keys.positive_or("rope.scaling.yarn_beta_fast", 32.0)?,
                    beta_slow: keys.positive_or("rope.scaling.yarn_beta_slow", 1.0)?,
                    truncate: true,
                };
                rotation.magnitude = attention * (1.0 + 0.1 * factor.max(1.0).ln());
            }
            "longrope" | "su" => {
                rotation.scaling = Scaling::Long {
                    original: original(keys)?,
                };
                rotation.magnitude = attention;
            }
            other => {
                return Err(keys.bad(format!(
                    "{} is {other:?}, expected none, linear, yarn or longrope",
                    keys.name("rope.scaling.type")
                )));
            }
        }
        Ok(rotation)
    }

    /// A rotation without scaling.
    pub fn plain(base: f32) -> Rotation {
        Rotation {
            base,
            scaling: Scaling::None,
            magnitude: 1.0,
        }
    }

    /// Radians per position of each pair; `divisors` are factors from tensors.
    fn frequencies(&self, dims: usize, divisors: Option<&[f32]>) -> Vec<f64> {
        let base = f64::from(self.base);
        let n = dims as f64;
        // The pair that turns so often over so many tokens.
        let pair = |turns: f32, tokens: usize| {
            let tau = std::f64::consts::TAU;
            n * (tokens as f64 / (f64::from(turns) * tau)).ln() / (2.0 * base.ln())
        };
        (0..dims / 2)
            .map(|i| {
                let kept = base.powf(-2.0 * i as f64 / n);
                let scaled = match &self.scaling {
                    Scaling::None | Scaling::Long { .. } => kept,
                    Scaling::Linear { factor } => kept / f64::from(*factor),
                    Scaling::Yarn {
                        factor,
                        original,
                        beta_fast,
                        beta_slow,
                        truncate,
                    } => {
                        let (mut low, mut high) =
                            (pair(*beta_fast, *original), pair(*beta_slow, *original));
                        if *truncate {
                            (low, high) = (low.floor(), high.ceil());
                        }
                        (low, high) = (low.max(0.0), high.min(n - 1.0));
                        if low == high {
                            high += 0.001;
                        }
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        kept / f64::from(*factor) * ramp + kept * (1.0 - ramp)
                    }
                };
                scaled / divisors.map_or(1.0, |d| f64::from(d[i]))
            })
            .collect()
    }

    /// `(cos, sin)` pairs, `[context][dims / 2][2]`. `divisors`, `dims / 2` of them, divide the angles
    /// further: llama-3's `rope_freqs`, or LongRoPE's factors.
    pub fn table(&self, context: usize, dims: usize, divisors: Option<&[f32]>) -> Vec<f32> {
        let frequencies = self.frequencies(dims, divisors);
        let magnitude = f64::from(self.magnitude);
        let mut table = Vec::with_capacity(context * dims);
        for position in 0..context {
            for f in &frequencies {
                let (sin, cos) = (position as f64 * f).sin_cos();
                table.extend([(magnitude * cos) as f32, (magnitude * sin) as f32]);
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_angles_are_powers_of_the_base() {
        let table = Rotation::plain(100.0).table(3, 4, None);
        let angle = |position: f64, i: i32| position * 10f64.powi(-i);
        for position in 0..3 {
            for i in 0..2 {
                let at = (position * 2 + i) * 2;
                let (sin, cos) = angle(position as f64, i as i32).sin_cos();
                assert!((f64::from(table[at]) - cos).abs() < 1e-7);
                assert!((f64::from(table[at + 1]) - sin).abs() < 1e-7);
            }
        }
    }

    #[test]
    fn yarn_keeps_fast_angles_and_divides_slow_ones() {
        let yarn = Rotation {
            scaling: Scaling::Yarn {
                factor: 8.0,
                original: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
            },
            ..Rotation::plain(10_000.0)
        };
        let (plain, scaled) = (
            Rotation::plain(10_000.0).frequencies(128, None),
            yarn.frequencies(128, None),
        );
        // 4096 tokens are 32 turns of pair 20.9 and one of pair 45.03 (of dims 128, base 10000).
        for i in 0..64 {
            let ratio = plain[i] / scaled[i];
            match i {
                ..=20 => assert!((ratio - 1.0).abs() < 1e-12, "{i} {ratio}"),
                46.. => assert!((ratio - 8.0).abs() < 1e-9, "{i} {ratio}"),
                _ => assert!(ratio > 1.0 && ratio < 8.0, "{i} {ratio}"),
            }
        }
    }
}
